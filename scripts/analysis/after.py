"""After training: what of the hack is left in a policy, how easily it returns, and the null.

    frontier RUN … --against NONE2R …   the shrinkage null: hack and solve of plain GRPO, stopped at
                                        each of its snapshots or with its whole adapter scaled from
                                        0 to 1; how far each RUN's deployed policy lies above it
    forget RUN …                        the deployed policy as the quarantine's delta is scaled from
                                        0 (ablated) to 1 (as trained), and the quarantine alone
    push RUN …                          how far each run's quarantine pushes the base at every
                                        snapshot, against random ones of its norm
    relearn RUN …                       GRPO steps from each RUN's deployed policy, and from the
                                        base, until hacks reach one half
    detect RUN …                        how well the score that each RUN used told its hacks, the
                                        completions' length alone, and the score at equal length
    advantage RUN …                     the rollouts' hack rate and the mean advantage of hacks over
                                        training: does the pressure to hack vanish?

All rates are of held-out test problems with novel markers. Tables go to the terminal and, with the
frontier's figure, into --out (out/after). A method must lie above the frontier: a point on it is
what training less, or mixing the adapter with nothing, would give for free.

Run: python -m scripts.analysis.after frontier out/runs/routeV_s41 --against out/runs/none2r_s41
"""

import sys
from pathlib import Path
from typing import Any

from scripts.analysis.detect import advantage, detect
from scripts.analysis.policies import ROWS_A_PROMPT, forget, frontier, push
from scripts.analysis.relearn import relearn
from scripts.view.output import OUT, add_runs, parser

from vgrout.core import at_least, run_main

COUNT = {"type": at_least(1)}
SCALES = {"nargs": "+", "type": float}
OPTIONS: dict[str, dict[str, Any]] = {
    "--against": {"nargs": "+", "type": Path, "help": "none2r runs with snapshots"},
    "--draws": COUNT | {"help": "draws of each evaluation (default: the run's --final-draws)"},
    "--prompts": COUNT | {"help": f"training prompts, {ROWS_A_PROMPT} samples each"},
    "--scales": SCALES | {"help": "0 and 1 are always among them"},
    "--steps": COUNT | {"help": "optimiser steps"},
}
TENTHS = [i / 10 for i in range(11)]
COMMANDS = {  # work, default of each option (None: required)
    "frontier": (frontier, {"--against": None, "--draws": 0, "--scales": TENTHS}),
    "forget": (forget, {"--draws": 0, "--scales": [0.25, 0.5, 0.75]}),
    "push": (push, {"--draws": 0, "--prompts": 48}),
    "relearn": (relearn, {"--steps": 40}),
    "detect": (detect, {}),
    "advantage": (advantage, {}),
}


def main(argv: list[str]) -> None:
    root = parser(__doc__)
    commands = root.add_subparsers(required=True)
    for name, (work, defaults) in COMMANDS.items():
        command = commands.add_parser(name, help=(work.__doc__ or "").splitlines()[0])
        command.set_defaults(work=work)
        add_runs(command, OUT / "after")
        for flag, default in defaults.items():
            how = {"required": True} if default is None else {"default": default}
            command.add_argument(
                flag,
                **OPTIONS[flag],
                **how,
            )
    options = root.parse_args(argv)
    options.work(options)
    print(f"tables and figures in {options.out}")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
