"""The bench says what it measured: medians, paired ratios, exponents, bounds, the page's block; and its synthetic work really trains.

No time is asserted. `--long` also runs the whole script once with --quick.

    uv run python scripts/verify/verify_bench.py
"""

import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from scripts.analysis import bench
from scripts.analysis import bench_synthetic as work
from scripts.analysis.bench_turns import take_turns
from transformers import AutoModelForCausalLM, Qwen3Config

from vgrout.config import PRESETS
from vgrout.core import UserError
from vgrout.model.batch import GateOutput

PAGE = Path("docs/performance.md")
MACHINE = {"cpu": "a CPU", "cores": 2, "threads": 1, "gpu": "", "load": 0.1, "commit": "c" * 40, "dirty": False,
           "versions": {"python": "3", "torch": "2", "transformers": "5"}}  # fmt: skip


def check_arithmetic() -> None:
    """Planted times come out as they were planted. Mutation: ratios to the reference of another repeat."""
    step = {"sec_sample": 0.2, "sec_grade": 0.1, "sec_score": 0.0, "sec_update": 0.5, "sec_step": 1.0, "n_students": 40,
            "completion_length": 50.0, "tokens_per_second": 10.0, "groups_skipped": 1}  # fmt: skip
    refreshing = step | {"sec_refresh": 2.0, "sec_step": 3.0}
    plain, refreshed = bench.spent(step, 0.4), bench.spent(refreshing, 0.4)
    for row in (plain, refreshed):
        assert (
            math.isclose(row["other"], 0.2)
            and math.isclose(row["step"], 1.4)
            and row["refresh"] == 0.4
        ), row
    assert (plain["refreshed"], refreshed["refreshed"]) == (0.0, 2.0)
    assert bench.spent(refreshing | {"sec_step": 4.0}, 0.4)["step"] > plain["step"] + 0.9, (
        "a slow step goes unnoticed"
    )
    noisy = {
        "a": [{"step": 2.0 * k} for k in (1, 3, 2)],
        "b": [{"step": 1.0 * k} for k in (1, 3, 2)],
    }  # the machine's noise is shared
    assert bench.ratios(noisy, "step", "a", "b") == [2.0] * 3
    assert bench.ratios(noisy | {"b": noisy["b"][::-1]}, "step", "a", "b") != [2.0] * 3, (
        "ratios SHOULD be of neighbours"
    )
    assert (
        work.figure([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3}
        and work.figure([1.0, 2.0])["median"] == 1.5
    )
    assert abs(work.exponent(1.0, 8.0, 4.0) - 1.5) < 1e-9 and work.exponent(1.0, 1.0, 4.0) == 0.0
    rows = [(2, 3), (2, 7), (2, 2)]  # sequences of 5, 9 and 4 tokens
    assert work.padding(rows, 1, 10, False) == (1 - 18 / 19, 2) and work.padding(
        rows, 1, 27, False
    ) == (1 - 18 / 27, 1)
    assert (
        work.padding([(2, 3), (2, 7), (2, 3), (2, 7)], 2, 18, True)[0]
        > work.padding([(2, 3), (2, 7)] * 2, 2, 18, False)[0]
        == 0
    )
    print(
        "ok  phases, a refresh spread over its cadence, ratios of neighbours, exponents and padding; planted changes are seen"
    )


def check_turns() -> None:
    """Steps of runs that take turns never overlap. Mutation: children that do not wait."""

    def overlaps(wait: str) -> list[tuple[float, float]]:
        body = (f"import os, sys, time; sys.path.insert(0, 'scripts'); from bench_turns import wait_for_turn\n"
                f"go, done = map(int, os.environ['BENCH_TURN'].split())\nfor i in range(20):\n"
                f"    start = time.monotonic(); time.sleep(0.01); open(sys.argv[1], 'a').write(f'{{start}} {{time.monotonic()}}\\n')\n"
                f"    {wait}\nwhile os.read(go, 1): pass")  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in "ab"]
            _, cpu = take_turns({f.name: ["-c", body, str(f)] for f in files}, 4, 1)
            assert all(len(seconds) == 4 for seconds in cpu.values())
            a, b = (
                [tuple(map(float, line.split())) for line in f.read_text().splitlines()]
                for f in files
            )
        assert len(a) >= 5 and len(b) >= 5
        return [(x, y) for x, until in a for y, end in b if x < end and y < until]

    assert not overlaps("wait_for_turn()")
    assert overlaps("os.write(done, bytes(8)) if i else wait_for_turn()"), (
        "runs that do not wait go unnoticed"
    )
    print("ok  runs that take turns never work at the same time; runs that do not wait are noticed")


def check_bounds() -> None:
    """Qwen3-4B: 4.02e9 parameters, 3.0 ms a decoding step of 64 rows at 655 tokens. More rows and longer ones take longer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**work.QWEN3_4B), dtype=torch.bfloat16)
    assert abs(sum(p.numel() for p in model.parameters()) / 4.022e9 - 1) < 1e-3
    size, budget = work.Size(8, 8, 655, 1), PRESETS["full"].model.sample_token_budget
    step = work.decoding_bound(model, size, budget)
    assert abs(step / 3.0e-3 - 1) < 0.02, step
    assert work.decoding_bound(model, replace(size, prompt=1310), budget) > 1.3 * step
    assert work.decoding_bound(model, size, 64 * 656 // 2) > 1.4 * step, (
        "two batches SHOULD read the weights twice"
    )
    size = work.Size(8, 8, 143, 512)
    three, four = work.update_bound(model, size, False), work.update_bound(model, size, True)
    by_hand = (
        3 * 2 * 4.02e9 * (8 * 143 + 64 * 512) / work.FLOPS
    )  # every token through every weight; attention adds some
    assert abs(three / by_hand - 1) < 0.1 and abs(four / three - 4 / 3) < 1e-9
    print(
        f"ok  bounds of Qwen3-4B agree with a count by hand: {1e3 * step:.2f} ms a decoding step, {three:.2f} s an update"
    )


def check_work() -> None:
    """The GPU's path, tiny, on the CPU: every phase of every arm runs, and its update moves parameters in every zone."""
    rows = work.large("cpu", "tiny", ("8x8", "worst"), 1)
    seen = {(r["workload"], r["arm"], r["phase"]) for r in rows}
    assert {
        ("8x8", "none2r", "sample"),
        ("8x8", "routeL", "refresh"),
        ("8x8", "routeV", "score"),
        ("worst", "routeV", "sample"),
    } <= seen
    assert sum(phase == "update" for *_, phase in seen) == 4 and all(
        r["seconds"]["low"] > 0 for r in rows
    )
    policy = work.random_policy(Qwen3Config(**work.TINY), "cpu", torch.bfloat16, 2, True)
    for arm in ("routeV", "routeL"):  # more pairs than the file holds
        many = work.Work(policy, PRESETS["full"], arm, work.Size(2, 4, 24, 16, 96, 12, 8))
        many.refresh()
        assert many.gate.score.pairs_hack.isfinite().sum() == 96, f"{arm}: not every pair is scored"
    job = work.Work(policy, PRESETS["full"], "routeV", work.Size(2, 4, 24, 16, 4, 12, 8))
    assert len(job.out.zones.unique()) == 3 and job.batch.advantages.abs().min() > 0
    ids = job.batch.input_ids
    assert len(ids[:, :24].unique(dim=0)) == 2 and len(ids.unique(dim=0)) == 8, (
        "a group SHOULD share its prompt and nothing else"
    )
    job.update()
    job.batch.advantages.zero_()  # mutation: nothing to train
    job.config = replace(job.config, grpo=replace(job.config.grpo, beta=0.0, weight_decay=0.0))
    job.optimizer = work.BlockOptimizer(policy.adapter, 1e-3, 0.0, 1.0)
    try:
        job.update()
        raise RuntimeError("an update that moves nothing is timed as one")
    except AssertionError:
        pass
    assert isinstance(job.out, GateOutput)
    print(
        f"ok  {len(rows)} figures of the GPU's path at tiny size; an update that moves nothing is refused"
    )


def check_page() -> None:
    """The page's block is the tables and nothing else changes; without marks, or figures, one line says so."""
    run = {"sample": 0.2, "grade": 0.1, "score": 0.0, "update": 0.5, "refresh": 0.0, "other": 0.1, "step": 0.9, "tokens": 2000.0,
           "tokens_per_second": 9000.0, "peak_gib": 1.1, "groups_skipped": 1.0}  # fmt: skip
    head = {"machine": MACHINE, "made": "then"}
    sides = {"vGROUT none2r": [run], "TRL GRPOTrainer": [run | {"step": 2.7}]}
    arms = {"runs": {"none2r": [run] * 2, "routeV": [run | {"step": 1.8}] * 2}, "resident": {"none2r": 1.0, "routeV": 2.0},
            "cpu": {"none2r": [1.0, 1.0], "routeV": [1.0, 4.0]}}  # fmt: skip
    trl = {
        "versions": {"trl": "1"},
        "runs": sides,
        "resident": dict.fromkeys(sides, 1.0),
        "cpu": dict.fromkeys(sides, [1.0]),
    }
    found = {"b": head | arms, "a": head | trl}
    text = bench.render(found)
    assert (
        "2.00 [2.00, 2.00]" in text
        and "| 3.00" in text
        and "| 2.50" in text
        and text.count("TODO") == 2
    )
    page = PAGE.read_text()
    once = bench.replaced(page, text)
    assert (
        bench.replaced(once, text) == once
        and text in once
        and len(once) - len(text) == len(bench.replaced(page, ""))
    )
    for broken in ("", page.replace(bench.END, "")):
        with contextlib.suppress(UserError):
            bench.replaced(broken, text)
            raise RuntimeError("a page without marks is accepted")
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench.main(bench.Args(measure=False, out=Path(folder) / "bench.json"))
            raise RuntimeError("a table of nothing is printed")
        except UserError as error:
            assert "\n" not in str(error)
        out, target = Path(folder) / "bench.json", Path(folder) / "page.md"
        (
            out.write_text(json.dumps(found | {"d": head | {"config": "tiny", "rows": []}})),
            target.write_text(page),
        )
        with contextlib.redirect_stdout(io.StringIO()) as said:
            bench.main(bench.Args(measure=False, out=out, write=target))
        printed, written = (
            "Configuration: tiny" in text for text in (said.getvalue(), target.read_text())
        )
        assert printed and not written, "figures of a CPU stand in the GPU's table"
    print(
        "ok  the page's block is replaced and nothing else; a CPU's figures do not enter the GPU's table"
    )


def check_script() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        subprocess.run(
            [sys.executable, "scripts/analysis/bench.py", "--quick", "--out", str(out)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = json.loads(out.read_text())
    assert (
        found.keys() == {"b", "c", "d"}
        and found["b"]["runs"]["routeV"][0]["update"] > 0
        and found["d"]["rows"]
    )
    print("ok  scripts/analysis/bench.py --quick runs its parts b, c and d")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--long" in sys.argv:
        check_script()
    else:
        for check in (check_arithmetic, check_turns, check_bounds, check_work, check_page):
            check()
