"""How far does a quarantine push, and toward what? At every snapshot: KL(base ‖ base beside the quarantine alone), and its hack and solve.

The KL is the mean over tokens of exp(d) − 1 − d, d = log p_quarantine − log p_base (k3, http://joschu.net/blog/kl-approx.html), in nats, on
the base's own samples of training prompts; ± the standard error over prompts. Beside it stand Gaussian quarantines with the learned one's
norm in every tensor, as `placebo_absorbQ` trains with one. Hack and solve are of the quarantine alone, on held-out problems with novel
markers.

Run: python scripts/analysis/push.py RUN … [--prompts 48]      (runs made with --snapshot-every; writes push.csv into --out, default out/after)
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from scripts.analysis.after import ROOT, rates, show
from scripts.experiments.reopen import Stored, reopen
from torch import Tensor

from vgrout.entry import at_least, run_main
from vgrout.env.problems import messages
from vgrout.env.rollouts import stream
from vgrout.files import load_tensors
from vgrout.gate.ratio import logps_with
from vgrout.grader import Grader
from vgrout.model.batch import Batch
from vgrout.model.likelihood import random_deltas
from vgrout.model.sampling import sample
from vgrout.model.tokens import collate, encode_prompt
from vgrout.run.diagnose import scaled
from vgrout.run.records import load_snapshots
from vgrout.train import seeded

ROWS_A_PROMPT, DRAWS = 4, (1, 2, 3)


def base_samples(run: Stored, prompts: int) -> Batch:
    """Completions of the base, `group` numbering their prompts."""
    policy, seed = run.policy, run.config.run.seed
    ids = [
        encode_prompt(policy.tokenizer, messages(p))
        for p in stream(run.splits["train"], 0, prompts, seed)
    ]
    how = asdict(replace(run.sampling, top_p=1.0)) | {"generator": seeded(policy, "push", seed)}
    with scaled(policy.adapter, 0.0):
        drawn = sample(policy, ids, [ROWS_A_PROMPT] * prompts, **how)
    rows = [(i, completion) for i, group in enumerate(drawn) for completion, _ in group]
    zeros = [0.0] * len(rows)
    return collate(
        [ids[i] for i, _ in rows],
        [c for _, c in rows],
        zeros,
        [i for i, _ in rows],
        zeros,
        policy.pad_id,
        policy.device,
    )


def push(run: Stored, batch: Batch, deltas: list[Tensor]) -> dict[str, float]:
    """`push` and `push_error` of a quarantine of these deltas, in nats a token; the deployed block plays no part."""
    how = run.config.grpo.temperature, run.config.grpo.token_budget
    base = logps_with(run.policy, [torch.zeros_like(d) for d in deltas], batch, *how)
    d = logps_with(run.policy, deltas, batch, *how) - base
    k3 = (d.expm1() - d) * batch.completion_mask
    total, tokens = (torch.zeros(int(batch.group.max()) + 1).index_add(0, batch.group.cpu(), x.sum(1).float().cpu())
                     for x in (k3, batch.completion_mask))  # fmt: skip
    mean = total.sum() / tokens.sum()
    return {
        "push": float(mean),
        "push_error": float((total - mean * tokens).std() / tokens.mean() / len(tokens) ** 0.5),
    }  # of a ratio


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with snapshots")
    parser.add_argument(
        "--prompts",
        type=at_least(1),
        default=48,
        help=f"training prompts, {ROWS_A_PROMPT} samples each",
    )
    parser.add_argument(
        "--draws",
        type=at_least(1),
        default=0,
        help="draws of each evaluation (default: the run's --final-draws)",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "after", help="folder of the table"
    )
    options = parser.parse_args(argv)
    snapshots = {
        path: load_snapshots(path) for path in options.runs
    }  # a run without any is refused before work starts
    rows = []
    for path in options.runs:
        run = reopen(path, finished=False)
        batch = base_samples(run, options.prompts)
        with Grader(run.config.run.workers) as grader:
            for step, file in snapshots[path].items():
                run.load(load_tensors(file)[0])
                learned = [p.detach().clone() for p in run.policy.adapter.parameters("quarantine")]
                name = {
                    "run": path.name,
                    "arm": run.record.arm,
                    "seed": run.record.seed,
                    "step": step,
                }
                with scaled(run.policy.adapter, 0.0, ("deployed",)):
                    cell = run.cell(
                        grader, f"push {step}", False, options.draws or run.config.run.final_draws
                    )
                rows.append(
                    name | {"quarantine": "learned", **push(run, batch, learned), **rates(cell)}
                )
                for seed in DRAWS if any(d.any() for d in learned) else ():
                    rows.append(
                        name
                        | {
                            "quarantine": f"random {seed}",
                            **push(run, batch, random_deltas(learned, seed)),
                        }
                    )
    show(rows, options.out / "push.csv")
    print(f"table in {options.out}")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
