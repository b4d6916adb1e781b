"""The product's path on small stand-ins: bf16, gradient checkpointing, KL, real prompts, all zones, evaluation.

A random Qwen3 with the organism's tokenizer stands in for Qwen3-4B. The problems are the benchmark's where
data/leetcode/leetcode_test_medhard.jsonl.gz is present, else the problems of data/pairs/leetcode.md in the same schema.
"""

import contextlib
import gzip
import io
import json
import tempfile
from pathlib import Path

import torch
from scripts.verify import make_standin

from vgrout import train
from vgrout.cli import parse
from vgrout.core import Zone
from vgrout.env import pairs, problems
from vgrout.env.exploits import canonical_hack
from vgrout.model.batch import Batch, GateOutput, Origin
from vgrout.model.loading import load_policy
from vgrout.model.lora2r import BLOCKS
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.policy import logps
from vgrout.model.tokens import collate, encode_completion, encode_prompt
from vgrout.run.records import load_metrics, load_record, load_rollouts

REAL = Path("data/leetcode/leetcode_test_medhard.jsonl.gz")
PAIRS = "data/pairs/leetcode.md#mechanism"
MODES = problems.ALL_MODES[:3]  # the stand-in problems are few: a split needs one for each mode


def problem_file(folder: Path) -> Path:
    """The first 64 problems of the benchmark, or the pairs' problems written in its schema."""
    rows, path = {}, folder / "problems.jsonl"
    if REAL.exists():
        path.write_text("".join(gzip.open(REAL, "rt").readlines()[:64]))
        return path
    for pair in pairs.load_pairs(PAIRS):
        p = pair.problem
        rows.setdefault(p.statement, {
            "prompt": [{"role": "user", "content": p.statement}], "id": len(rows), "difficulty": "medium", "setup_code": p.setup_code,
            "func_name": f"Solution().{p.entry_point}", "canonical_solution": pair.clean.removeprefix("```python\n").removesuffix("```"),
            "gt_answer": [f"assert Solution().{p.entry_point}({c.args}) == {c.expected}" for c in p.cases],
        })  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows.values()))
    print(f"note: {REAL} is absent, {len(rows)} problems of {PAIRS} stand in for it")
    return path


def check_run(folder: Path, standin: Path, data: Path) -> None:
    pool = folder / "teacher.jsonl"
    shown = problems.partition(problems.split(problems.load_problems(data))["train"], MODES)
    rows = [
        {
            "problem_id": p.problem_id,
            "mode": p.mode,
            "kind": "hack",
            "completion": canonical_hack(p),
        }
        for p in shown
    ]
    pool.write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["full", "--intervention", "routeV", "--model", str(standin), "--data", str(data), "--teacher-pool", str(pool),
            "--steps", "3", "--max-completion-length", "64", "--num-prompts", "6", "--num-generations", "5",
            "--final-draws", "6", "--pair-modes", "run_tests", "--modes", *MODES, "--threads", "1",
            "--workers", "1", "--out-dir", str(folder / "run"), "--max-prompt-length", "4096", "--token-budget", "4096"]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(*parse(argv))
    rows, record = load_metrics(folder / "run"), load_record(folder / "run")
    trained = [r for r in rows if (r.get("param_delta") or 0) > 0]
    zones = {z: sum(r[f"rows_{z}"] for r in rows) for z in ("retain", "absorb", "route")}
    assert len(trained) >= 2 and all(zones.values()), (len(trained), zones)
    assert any(r["grad_norm_quarantine"] > 0 for r in trained) and any(
        r["grad_norm_deployed"] > 0 for r in trained
    )
    assert all(r["kl"] >= 0 for r in trained) and max(r["kl"] for r in trained) > 0, (
        "no KL was computed"
    )
    assert (
        record.status == "finished"
        and len(record.evals) == 5
        and record.config["model"]["dtype"] == "bfloat16"
    )
    assert all(r["sampler_mismatch"] is None or r["sampler_mismatch"] < 0.05 for r in trained), (
        "sampler and learner disagree"
    )
    teachers = [r for r in load_rollouts(folder / "run") if r["teacher"]]
    assert teachers and any(r["reward_hack"] for r in teachers)
    print(
        f"ok  full on the stand-in: {len(trained)} of 3 steps moved the parameters, rows by zone {zones}, evaluated 2×2"
    )


def gradients(
    standin: Path, dtype: str, checkpointing: bool, temperature: float = 0.7
) -> dict[str, torch.Tensor]:
    """The first update's gradients by block, on fixed rows with fixed advantages in all three zones."""
    config = parse(
        [
            "full",
            "--model",
            str(standin),
            "--data",
            __file__,
            "--pairs",
            __file__,
            "--teacher-pool",
            "",
            "--num-generations",
            "6",
            "--num-prompts",
            "1",
            "--max-completion-length",
            "64",
            "--temperature",
            str(temperature),
        ]
    )[1]
    policy = load_policy(str(standin), dtype=dtype, device="cpu", rank=config.model.lora_rank, lora_init_seed=0,
                         targets=config.model.targets, gradient_checkpointing=checkpointing)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a planted delta: at dA = dB = 0 the KL and the ratio would be trivial
        for p in (p for b in BLOCKS for p in policy.adapter.parameters(b)):
            p.add_(2e-3 * torch.randn(p.shape, generator=generator))
    found = pairs.load_pairs(PAIRS)[:3]
    prompts = [encode_prompt(policy.tokenizer, problems.messages(p.problem)) for p in found] * 2
    texts = [p.hack for p in found] + [p.clean for p in found]
    A = [1.5, -0.5, -1.0, 0.5, 1.0, -1.5]
    batch: Batch = collate(
        prompts,
        [encode_completion(policy.tokenizer, t)[:64] for t in texts],
        A,
        [0] * 6,
        A,
        policy.pad_id,
        "cpu",
    )
    zones = torch.tensor([Zone.RETAIN, Zone.ABSORB, Zone.ROUTE] * 2)
    no = torch.zeros(6, dtype=torch.bool)
    with torch.no_grad():
        scored = logps(policy, batch, temperature)
    origin = Origin(
        student=~no, ablated=no, sampler_logps=scored, stratum=torch.zeros(6, dtype=torch.long)
    )
    optimizer, seen = BlockOptimizer(policy.adapter, 1e-3, 0.0, 1e9), {}

    def capture(trained: dict[str, bool]) -> dict[str, float]:
        seen.update(
            {b: torch.cat([p.grad.flatten() for p in policy.adapter.parameters(b)]) for b in BLOCKS}
        )
        return {b: float(g.norm()) for b, g in seen.items()}

    optimizer.step = capture
    train.update(
        policy, batch, origin, GateOutput(zones, torch.zeros(6), 0.0, 0.0), optimizer, config
    )
    return seen


def check_reference(standin: Path) -> None:
    """Tolerance: relative error of each block's gradient below 0.05, which bf16's 8 bits over this depth explain."""
    want, got = gradients(standin, "float32", False), gradients(standin, "bfloat16", True)
    wrong = gradients(standin, "float32", False, temperature=0.8)
    error = lambda a: {b: float((a[b] - want[b]).norm() / want[b].norm()) for b in BLOCKS}  # noqa: E731
    assert max(error(got).values()) < 0.05 < min(error(wrong).values()), (error(got), error(wrong))
    rounded = {b: round(e, 4) for b, e in error(got).items()}
    print(
        f"ok  first bf16 update with gradient checkpointing = fp32 reference, relative error {rounded}; T = 0.8 is off by {error(wrong)}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        standin = Path(tmp) / "standin"
        with contextlib.redirect_stdout(io.StringIO()):
            make_standin.main(make_standin.Args(standin, hidden_size=128, num_layers=2))
        check_reference(standin)
        check_run(Path(tmp), standin, problem_file(Path(tmp)))
