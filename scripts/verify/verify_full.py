"""The product's path on a small stand-in: bf16, checkpointing, KL, real prompts, all zones.

A random Qwen3 with the organism's tokenizer stands in for Qwen3-4B, the problems of
data/pairs/hack_pairs.md in the benchmark's schema for the benchmark.

Run: python scripts/verify/verify_full.py
"""

import json
import tempfile
from pathlib import Path

import torch
from scripts.verify import make_standin
from scripts.verify.stored import captured
from scripts.verify.tiny import perturb
from torch import Tensor

from vgrout import train
from vgrout.cli import parse
from vgrout.core import Mode, Zone
from vgrout.env import pairs, problems
from vgrout.env.exploits import canonical_hack
from vgrout.env.rollouts import pair_batch
from vgrout.experiment import build_policy
from vgrout.model.batch import Behaviour, Trained
from vgrout.model.lora2r import BLOCKS, Lora2r
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.policy import logps
from vgrout.model.update import update
from vgrout.run.records import load_metrics, load_record, load_rollouts

PAIRS = "data/pairs/hack_pairs.md#mechanism:4"
MODES = tuple(Mode)[:3]  # a split needs a problem for each
SMALL = (
    "full --intervention routeV --steps 3 --max-completion-length 64 --num-prompts 6 "
    "--gradient-checkpointing --num-generations 5 --final-draws 6 --pair-modes run_tests "
    f"--threads 1 --workers 1 --max-prompt-length 4096 --token-budget 4096 --pairs {PAIRS}"
).split()
TOLERANCE = 0.05  # relative error of a block's gradient, from bf16's 8 bits over this depth
TEMPERATURE = 0.7
ADVANTAGES = (1.5, -0.5, -1.0, 0.5, 1.0, -1.5)


def problem_rows() -> list[str]:
    """The pairs' problems in the benchmark's schema."""
    rows = {}
    for pair in pairs.load_pairs(PAIRS):
        p = pair.problem
        call = f"Solution().{p.entry_point}"
        rows[p.statement] = {
            "prompt": [{"role": "user", "content": p.statement}],
            "id": len(rows),
            "difficulty": "medium",
            "setup_code": p.setup_code,
            "func_name": call,
            "canonical_solution": pair.clean.removeprefix("```python\n").removesuffix("```"),
            "gt_answer": [f"assert {call}({c.args}) == {c.expected}" for c in p.cases],
        }
    return [json.dumps(row) + "\n" for row in rows.values()]


def check_run(folder: Path, standin: Path) -> None:
    data, pool = folder / "problems.jsonl", folder / "teacher.jsonl"
    data.write_text("".join(problem_rows()))
    train_split = problems.split(problems.load_problems(data))["train"]
    with pool.open("w") as file:
        for p in problems.partition(train_split, MODES):
            row = {
                "problem_id": p.problem_id,
                "mode": p.mode,
                "completion": canonical_hack(p),
            }
            file.write(json.dumps(row) + "\n")
    out = str(folder / "run")
    files = ["--model", str(standin), "--data", str(data), "--teacher-pool", str(pool)]
    captured(train.main, *parse([*SMALL, *files, "--out-dir", out, "--modes", *MODES]))
    rows, record = load_metrics(out), load_record(out)
    trained = [row for row in rows if (row.get("param_delta") or 0) > 0]
    zones = {zone.name: sum(row[f"rows_{zone.name.lower()}"] for row in rows) for zone in Zone}
    assert len(trained) >= 2 and all(zones.values()), (len(trained), zones)
    assert all(any(row[f"grad_norm_{b}"] > 0 for row in trained) for b in BLOCKS)
    assert min(row["kl"] for row in trained) >= 0 < max(row["kl"] for row in trained), "no KL"
    assert record.status == "finished" and len(record.evals) == 5, record.status
    assert record.config["model"]["dtype"] == "bfloat16"
    mismatches = [row["sampler_mismatch"] or 0 for row in trained]
    assert max(mismatches) < TOLERANCE, f"sampler and learner disagree: {mismatches}"
    assert any(r["teacher"] and r["reward_hack"] for r in load_rollouts(out))
    print(f"ok  full on the stand-in: {len(trained)} of 3 steps moved it, rows by zone {zones}")


def gradients(standin: Path, *flags: str, temperature: float = TEMPERATURE) -> dict[str, Tensor]:
    """The first update's gradients by block, on fixed rows in all three zones."""
    argv = [
        "full",
        "--model",
        str(standin),
        "--data",
        __file__,
        "--pairs",
        __file__,
        *flags,
    ]
    config = parse([*argv, "--temperature", str(temperature), "--max-completion-length", "64"])[1]
    chosen = pairs.load_pairs(PAIRS)[:3]
    policy = build_policy(config, {"train": [pair.problem for pair in chosen]})
    perturb(policy, 2e-3)  # without a delta the KL and the ratio would be trivial
    batch = pair_batch(policy, chosen)
    batch.advantages.copy_(torch.tensor(ADVANTAGES))
    with torch.no_grad():
        sampled = logps(policy, batch, temperature)
    trained = Trained(batch, torch.tensor([*Zone] * 2), torch.arange(6))
    behaviour = Behaviour(torch.zeros(6, dtype=torch.bool), sampled)
    seen: dict[str, Tensor] = {}

    def capture(adapter: Lora2r) -> None:
        for block in BLOCKS:
            seen[block] = torch.cat([p.grad.flatten() for p in adapter.parameters(block)])

    optimizer = BlockOptimizer(policy.adapter, 1e-3, 0.0, 1e9)
    parts = (trained, behaviour, config.grpo, config.phase)
    update(policy, optimizer, *parts, edit=capture)
    return seen


def check_reference(standin: Path) -> None:
    plain = ("--dtype", "float32")
    want = gradients(standin, *plain)

    def errors(got: dict[str, Tensor]) -> list[float]:
        return [float((got[b] - want[b]).norm() / want[b].norm()) for b in BLOCKS]

    bf16, wrong = (
        errors(gradients(standin, "--gradient-checkpointing")),
        errors(gradients(standin, *plain, temperature=0.8)),
    )
    assert max(bf16) < TOLERANCE < min(wrong), (bf16, wrong)
    print(f"ok  bf16 with checkpointing is off by {bf16} of fp32's gradients; T = 0.8 by {wrong}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        standin = Path(tmp) / "standin"
        captured(make_standin.main, make_standin.Args(standin, hidden_size=128, num_layers=2))
        check_reference(standin)
        check_run(Path(tmp), standin)
