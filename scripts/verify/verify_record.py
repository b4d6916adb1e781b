"""A record can be trusted and repeated: its adapter gives its counts, its config its command.

With run directories: evaluate each saved adapter again (the base and the 2×2 table, the record's
own draws) and compare the counts, to the last completion. Equal on the machine and device type that
made the run; another may round differently. Without: train a tiny run, verify it, and see that a
changed adapter and another data file are noticed.

Run: python -m scripts.verify.verify_record [RUN …]
"""

import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
from scripts.experiments.reopen import reopen
from scripts.verify.stored import captured, refused, trained

from vgrout.arms import defaults, deployed_state
from vgrout.cli import parse
from vgrout.config import PRESETS
from vgrout.core import EvalResult, UserError, run_main
from vgrout.experiment import sampling_of
from vgrout.files import pack
from vgrout.grader import Grader
from vgrout.run.evaluate import Evaluations
from vgrout.run.records import Run, load_adapter, load_record
from vgrout.run.repeat import argv_of, config_of
from vgrout.run.runlog import last_cells

TINY = """--steps 2 --num-prompts 2 --num-generations 4 --max-completion-length 96 --teacher-until 9
--final-draws 16 --save-every 0 --eval-every 0 --lr-schedule constant_with_warmup --warmup-steps 0
--learning-rate 1e-4 --intervention none2r"""
FLAGS = """--modes run_tests sentinel --teacher-modes sentinel --pair-modes run_tests --beta 0
--learning-rate 1e-5 --signed --no-gradient-checkpointing --targets q_proj|v_proj
--routeV-random-v-seed 3 --out-dir somewhere --teacher-until 3""".split()
COMMANDS = (
    [],
    FLAGS,
    "--intervention routeA --act-space residual --act-layer 2".split(),
    "--intervention routeQ --quarantine-first 3 --no-phase-pays".split(),
    "--intervention oracle --oracle-modes run_tests --teacher-pool=".split(),
)


def again(run: Path) -> Iterator[tuple[EvalResult, EvalResult]]:
    """(recorded, evaluated now) for the base and every cell of the last evaluation."""
    stored = reopen(run)
    config, deployed = stored.config, deployed_state(stored.config)
    unrecorded = mock.MagicMock(spec=Run, record=replace(stored.record, evals=[]))
    with Grader(config.run.workers) as grader:
        of = grader, sampling_of(config), config.run, deployed
        evaluations = Evaluations(unrecorded, stored.policy, stored.splits, *of)
        for cell in last_cells(stored.record):
            stored.load(stored.base if cell.step == 0 else None)
            ablated = {"ablated": True, "as_trained": False}.get(cell.state, stored.ablates)
            ablated |= cell.step == 0 and not config.model.init_from  # as `Evaluations.base`
            where = cell.split, cell.markers, cell.state, ablated, cell.step
            yield cell, evaluations.cell(*where, config.run.final_draws)


def verify(run: Path) -> bool:
    """Print one line for each cell; True if all counts are equal."""
    equal, record = True, load_record(run)
    for then, now in again(run):
        same = then == now
        equal &= same
        said = f"step {then.step} {then.state} {then.markers}: "
        said += f"hack {then.hack} solve {then.solve} of {then.n}"
        said += "" if same else f", now {now.hack} {now.solve} of {now.n}"
        print(f"{'ok    ' if same else 'DIFFERS'} {said}")
    command = argv_of(record.preset, config_of(record.preset, record.config))
    print("command: python -m vgrout.train", shlex.join(command))
    return equal


# ── the check of the check ───────────────────────────────────────────────────────────────────────


def check_mutation(run: Path) -> None:
    file = run / "record.json"
    assert verify(run), "a fresh run does not repeat"
    record, (tensors, metadata) = json.loads(file.read_text()), load_adapter(run)
    generator = torch.Generator().manual_seed(0)
    for name in (name for name in tensors if ".dA" in name):
        tensors[name] += 0.3 * torch.randn(tensors[name].shape, generator=generator)
    (run / "adapter.safetensors").write_bytes(pack(tensors, metadata))
    assert "DIFFERS" in captured(verify, run), "another adapter goes unnoticed"
    file.write_text(json.dumps(record | {"data_hashes": dict.fromkeys(record["data_hashes"], "0")}))
    refused("check out", verify, run)
    print("ok  a finished run's counts repeat; another adapter or data file is noticed")


def check_commands() -> None:
    """Config → record → Config → command line → Config, for every preset and kind of value."""
    for preset in PRESETS:
        for given in COMMANDS:
            with contextlib.suppress(UserError):  # a preset whose data or model is not here
                config = parse([preset, *given])[1]
                assert config_of(preset, json.loads(json.dumps(asdict(config)))) == config, preset
                assert parse(argv_of(preset, config))[1] == config, argv_of(preset, config)
    config = parse(["smoke", *FLAGS])[1]
    assert len(argv_of("smoke", config)) > 20
    assert argv_of("smoke", defaults("smoke", "routeV")) == ["smoke"]
    older = asdict(config)
    older["score"]["llr_form"] = "ratio"
    assert config_of("smoke", older) == config
    for name, value in (("zap", 1), ("llr_form", "one_sided")):
        older["score"][name] = value
        refused(name, config_of, "smoke", older)
        del older["score"][name]
    print("ok  a record's config gives the same config and command; another version's is refused")


def main(runs: list[str]) -> int:
    torch.set_num_threads(1)
    if runs:
        return int(not all([verify(Path(run)) for run in runs]))
    check_commands()
    with tempfile.TemporaryDirectory() as folder:
        check_mutation(trained(Path(folder) / "run", TINY))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
