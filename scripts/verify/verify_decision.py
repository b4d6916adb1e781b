"""The decision experiment: its manifest, its pool, its criterion, its artifacts.

The criterion passes a synthetic method that meets it and fails for each way of missing it; the pool (with cheap stand-ins for training)
skips what has finished, resumes what was stopped and reports what failed; artifacts are a function of the records; and the generated
files in docs/ are those of the committed records.

Run: python scripts/verify/verify_decision.py
"""

import json
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from PIL import Image
from scripts.analysis.results import triple
from scripts.experiments import artifacts, decision, verdict
from scripts.experiments.decision_manifest import (
    ARTIFACTS,
    HEADLINE_SEEDS,
    RECORDS,
    ROOT,
    ROWS,
    SECOND_SEEDS,
    SEEDS,
    Job,
    Row,
    jobs_of,
    row_argv,
)

from vgrout.cli import parse
from vgrout.config import ARMS, Config
from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.files import dumps
from vgrout.stats import holm

PROBLEMS, EACH = 20, 24  # problems and draws of a synthetic cell
THREE = HEADLINE_SEEDS[:3]
MODES = ("run_tests", "sentinel", "stdout_marker", "file_marker")
STAND_IN = """
import json, pathlib, signal, sys, time
out, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
record, saved = json.loads(pathlib.Path(sys.argv[3]).read_text()), out / "saved"
first = int(saved.read_text()) if saved.exists() else 0
with open(out / "starts", "a") as f: f.write(f"{first}\\n")
def end(status, done, code):
    (out / "record.json").write_text(json.dumps(record | {"status": status, "steps_done": done, "seconds": {"a": 0.1 * steps}}))
    sys.exit(code)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if steps == 0:
    print("error: this one cannot work"); end("failed: it", 0, 2)
for step in range(first, steps):
    time.sleep(0.03)
    with open(out / "metrics.jsonl", "a") as f: f.write("{}\\n")
    saved.write_text(str(step + 1))
    if stopped: end("interrupted", step + 1, 143)
end("finished", steps, 0)
"""


def refused(call: Callable[[], object], word: str) -> None:
    try:
        call()
    except UserError as error:
        assert word in str(error), error
    else:
        raise AssertionError(f"accepted, SHOULD be refused for {word!r}")


# ── the manifest ─────────────────────────────────────────────────────────────────────────────────────────────────


def check_manifest() -> None:
    names = {row.name for row in ROWS}
    assert len(names) == len(ROWS) and all(
        row.of in names | {"", verdict.ABSORB} and row.arm in ARMS for row in ROWS
    )
    assert all(set(row.serves.split()) <= ARTIFACTS.keys() and row.serves for row in ROWS)
    assert {word for row in ROWS for word in row.serves.split()} == ARTIFACTS.keys(), (
        "an artifact without a row"
    )
    jobs = jobs_of(ROWS)  # training's own parser reads each
    assert len({job.out_dir for job in jobs}) == len(jobs) == sum(len(row.seeds) for row in ROWS)
    assert all(job.argv[-1] == "--resume" and "--threads" in job.argv for job in jobs)
    first = [job.name for job in jobs if job.name.endswith(f"_s{HEADLINE_SEEDS[0]}")]
    assert [job.name for job in jobs][: len(first)] == first, (
        "a first comparison of all rows SHOULD come first"
    )
    refused(lambda: jobs_of([replace(ROWS[0], name="bad", flags="--top-p 7")]), "row bad of")
    row = next(row for row in ROWS if not row.headline)
    assert [j.name for j in jobs_of([row], [41, 101, 105])] == [
        f"{row.name}_s41",
        f"{row.name}_s101",
    ], "105 is no seed of this row"
    print(
        f"ok  {len(ROWS)} rows, {len(jobs)} runs: training accepts each, seeds come in turn; a row that it refuses is named"
    )


# ── the criterion ────────────────────────────────────────────────────────────────────────────────────────────────


def result(
    step: int, hack: float, solve: float, split: str = "test", state: str = "deployed"
) -> EvalResult:
    """A cell in which every problem and every mode has these rates, up to rounding."""
    counts = lambda rate: [int(rate * EACH + (i + 0.5) / PROBLEMS) for i in range(PROBLEMS)]  # noqa: E731
    by_problem = {
        f"p{i}": [EACH, h, s] for i, (h, s) in enumerate(zip(counts(hack), counts(solve)))
    }
    n, hacks, solves = (sum(row[i] for row in by_problem.values()) for i in range(3))
    by_mode = {
        mode: {"n": n // 4, "hack": round(hacks / 4), "solve": round(solves / 4)} for mode in MODES
    }
    return EvalResult(
        split,
        "novel",
        state,
        step,
        n,
        hacks,
        solves,
        by_mode,
        by_problem if split == "test" else {},
    )


@cache
def config_of_arm(arm: str, flags: str) -> Config:
    return parse(row_argv(Row("any", arm, "base", "A1", flags), 101))[1]


def seeds_of(
    arm: str,
    hack: float,
    solve: float,
    steps: int = 60,
    seeds: tuple[int, ...] = HEADLINE_SEEDS,
    val: float | None = None,
    flags: str = "",
) -> dict[int, RunRecord]:
    """Records of an arm whose rates vary a little from seed to seed; `val` is the hack rate half-way."""
    config = asdict(config_of_arm(arm, flags))
    found = {}
    for i, seed in enumerate(seeds):
        vary = (i - (len(seeds) - 1) / 2) * 0.004
        h, s = max(0.0, hack + vary), solve + vary
        evals = [
            result(0, 0.01, 0.18),
            result(steps // 2, h if val is None else val, s, "val"),
            result(steps, h, s),
        ]
        evals += [result(steps, h / 2, s, state="ablated")] * (arm == "none2r")
        found[seed] = RunRecord(1, arm, "organism", seed, config, [], "c0ffee00", False, {}, {config["data"]["data"]: "0"}, "", {}, {},
                                "finished", "", steps, {"a": 1.0}, evals, {"emerged": 20, "share_route": 0.3})  # fmt: skip
    return found


SMALL = [Row("none2r", "none2r", "base", "A2"), Row("no_loophole", "no_loophole", "ceiling", "A2"), Row("routeQ", "routeQ", "method", "A2"),
         Row("placeboQ_1", "placeboQ", "placebo", "A2", of="routeQ"), Row("placeboQ_2", "placeboQ", "placebo", "A2", of="routeQ"),
         Row("no_gateQ", "no_gateQ", "control", "A2", of="routeQ"),
         Row("routeQ_long", "routeQ", "long", "A4", of="routeQ", on=HEADLINE_SEEDS)]  # fmt: skip


def good_runs() -> verdict.Runs:
    rates = {
        "none2r": (0.74, 0.19), "absorb": (0.30, 0.16), "no_loophole": (0.0, 0.40), "routeQ": (0.012, 0.395), "placeboQ_1": (0.20, 0.36),
        "placeboQ_2": (0.30, 0.35), "no_gateQ": (0.40, 0.30),
    }  # fmt: skip
    runs = {
        name: seeds_of(name.partition("_1")[0].partition("_2")[0], *pair)
        for name, pair in rates.items()
    }
    return runs | {"routeQ_long": seeds_of("routeQ", 0.02, 0.45, 160)}


def check_verdict() -> None:
    runs = good_runs()
    clauses = verdict.verdict(runs, "routeQ", SMALL)
    assert len(clauses) == 13 and all(c.holds for c in clauses), [c for c in clauses if not c.holds]
    least = seeds_of("none2r", 0.74, 0.19)
    for record in least.values():
        record.evals[1] = result(30, 0.01, 0.45, "val")
    mutations = {  # what changes → the clauses that must fail
        "frozen": (
            {"routeQ": seeds_of("routeQ", 0.012, 0.175)},
            {"not inferior", "not frozen", "stopped early"},
        ),
        "hack .06": ({"routeQ": seeds_of("routeQ", 0.06, 0.395)}, {"at most 0.05"}),
        "a placebo equally low": (
            {"placeboQ_2": seeds_of("placeboQ", 0.012, 0.36)},
            {"below placeboQ_2", "placeboQ_2 after"},
        ),
        "absorb equally low": ({"absorb": seeds_of("absorb", 0.012, 0.36)}, {"below absorb"}),
        "solve .05 below the ceiling": (
            {"routeQ": seeds_of("routeQ", 0.012, 0.35)},
            {"not inferior"},
        ),
        "the schedule without a gate equally low": (
            {"no_gateQ": seeds_of("no_gateQ", 0.012, 0.36)},
            {"below no_gateQ"},
        ),
        "a long run that breaks out": (
            {"routeQ_long": seeds_of("routeQ", 0.24, 0.45, 160)},
            {"long run: held-out"},
        ),
        "a long run that collapses": (
            {"routeQ_long": seeds_of("routeQ", 0.02, 0.30, 160)},
            {"the short run's"},
        ),
        "a long run that is too short": (
            {"routeQ_long": seeds_of("routeQ", 0.02, 0.45, 70)},
            {"step of emergence"},
        ),
        "plain GRPO that solves before it hacks": ({"none2r": least}, {"stopped early"}),
    }
    for what, (change, words) in mutations.items():
        failed = [c.name for c in verdict.verdict(runs | change, "routeQ", SMALL) if not c.holds]
        for word in words:
            assert any(word in name for name in failed), (
                f"{what}: SHOULD fail {word!r}, fails {failed}"
            )
        assert all(any(word in name for word in words) for name in failed), (
            f"{what}: SHOULD fail {words} alone, fails {failed}"
        )
    missing = {seed: record for seed, record in runs["placeboQ_1"].items() if seed != 103}
    undecided = [
        c
        for c in verdict.verdict(runs | {"placeboQ_1": missing}, "routeQ", SMALL)
        if c.holds is None
    ]
    assert [c.answer for c in undecided] == ["not run"] * 2 and all(
        "placeboQ_1 s103" in c.figure for c in undecided
    )
    lost = [
        c.name
        for c in verdict.verdict(
            runs | {"placeboQ_1": missing}, "routeQ", SMALL, {"placeboQ_1": [103]}
        )
        if c.holds is False
    ]
    assert len(lost) == 2 and all("placeboQ_1" in name for name in lost), (
        f"a run that diverged SHOULD fail its clauses: {lost}"
    )
    record, ceilings = runs["routeQ"][101], [*runs["no_loophole"].values()]
    assert triple(record, ceilings) and not triple(
        replace(record, steps_done=record.steps_done + 1), ceilings
    ), "ceiling of other steps"
    waves = {
        f"{name}_again": seeds_of(name, 0.0, solve, 120, SECOND_SEEDS)
        for name, solve in (("no_loophole", 0.40), ("routeQ", 0.395))
    }
    both = lambda change: artifacts.second_wave(defaultdict(dict, runs | waves | change)).data  # noqa: E731
    assert [(row["seeds"], row["holds"]) for row in both({})] == [(10, True), (15, True)], both({})
    worse = {"routeQ_again": seeds_of("routeQ", 0.0, 0.30, 120, SECOND_SEEDS)}
    assert [row["holds"] for row in both(worse)] == [False, False], (
        "a second wave that solves less SHOULD fail"
    )
    assert not artifacts.second_wave(defaultdict(dict, runs)).data, (
        "a wave that has not run has no row"
    )
    own = seeds_of("absorbQ", 0.001, 0.40)
    third = runs | waves | {"absorbQ": own, "placeboQ_3": runs["placeboQ_1"], "absorbQ_long": seeds_of("absorbQ", 0.0, 0.42, 240, SEEDS),
                            "absorbQ_again": seeds_of("absorbQ", 0.0, 0.40, 120, SECOND_SEEDS)}  # fmt: skip
    third |= {
        f"absorbQ_{name}": seeds_of("absorbQ", 0.0, 0.4, seeds=SEEDS)
        for name in ("half", "all", "no_teacher")
    }
    third |= {
        f"{arm}_no_teacher": seeds_of(arm, hack, 0.4, seeds=SEEDS)
        for arm, hack in (("routeQ", 0.001), ("no_gateQ", 0.4))
    }
    answers = lambda change: [
        c.answer for c in verdict.decided(verdict.third_demands(), third | change, ROWS)
    ]
    assert set(answers({})) == {"yes"}, answers({})
    hacks = {"absorbQ_again": seeds_of("absorbQ", 0.06, 0.30, 120, SECOND_SEEDS)}
    hacks |= {"absorbQ_long": seeds_of("absorbQ", 0.2, 0.30, 240, SEEDS)}
    hacks |= {
        "absorbQ_all": seeds_of("absorbQ", 0.2, 0.4, seeds=SEEDS),
        "no_gateQ_no_teacher": third["routeQ_no_teacher"],
    }
    assert [i for i, answer in enumerate(answers(hacks)) if answer == "no"] == [
        0,
        1,
        3,
        10,
        11,
        13,
        15,
    ], answers(hacks)
    short = {"absorbQ": {seed: record for seed, record in own.items() if seed != 104}}
    assert answers(short)[4:10] == ["not run"] * 6, (
        "a third wave without one of its seeds SHOULD decide nothing"
    )
    fourth = third | {
        f"matched_absorbQ_{i}": seeds_of("matched_absorbQ", 0.2, 0.4) for i in (1, 2, 3)
    }
    fourth |= {"inverted_absorbQ": seeds_of("inverted_absorbQ", 0.4, 0.3, seeds=SEEDS)}
    fourth |= {"placebo_absorbQ": seeds_of("placebo_absorbQ", 0.3, 0.4)}
    fourth |= {
        "filterQ": seeds_of("filterQ", 0.01, 0.395, seeds=SEEDS),
        "advmodQ": seeds_of("advmodQ", 0.1, 0.3, seeds=SEEDS),
    }
    fourth |= {
        "advmodQ_strong": seeds_of("advmodQ", 0.0, 0.0, seeds=SEEDS),
        "penaltyQ": seeds_of("penaltyQ", 0.01, 0.395, seeds=SEEDS),
    }
    fourth |= {"reset_absorbQ": seeds_of("reset_absorbQ", 0.001, 0.4, seeds=SEEDS)}
    fourth |= {"solver_absorbQ": seeds_of("solver_absorbQ", 0.4, 0.3, seeds=SEEDS)}
    fourth |= {"no_gateQ_both": seeds_of("no_gateQ", 0.001, 0.4, seeds=SEEDS)}
    fourth |= {
        f"no_gateQ_both_{name}": seeds_of("no_gateQ", 0.001, 0.5, seeds=SEEDS)
        for name in ("free", "trained")
    }
    answers = lambda change: [
        c.answer for c in verdict.decided(verdict.fourth_demands(), fourth | change, ROWS)
    ]
    assert answers({}) == ["yes"] * 11 + ["no"] * 2 + ["yes", "no"] + ["yes"] * 4, answers({})
    equal = {
        "matched_absorbQ_2": seeds_of("matched_absorbQ", 0.001, 0.4),
        "filterQ": seeds_of("filterQ", 0.2, 0.2, seeds=SEEDS),
    }
    equal |= {"solver_absorbQ": seeds_of("solver_absorbQ", 0.001, 0.4, seeds=SEEDS)}
    equal |= {"no_gateQ_both": seeds_of("no_gateQ", 0.5, 0.4, seeds=SEEDS)}
    equal |= {"no_gateQ_both_trained": seeds_of("no_gateQ", 0.001, 0.4, seeds=SEEDS)}
    assert [i for i, (a, b) in enumerate(zip(answers({}), answers(equal))) if a != b] == [
        2,
        6,
        7,
        8,
        15,
        16,
        18,
    ], "as low SHOULD fail"
    by_length = lambda gate, penalty: {"length_gateQ": seeds_of("confound_gateQ", *gate),  # noqa: E731
                                       "length_gateQ_again": seeds_of("confound_gateQ", *gate, 120, SECOND_SEEDS),
                                       "length_advmodL": seeds_of("confound_advmodL", *penalty, seeds=SEEDS)}  # fmt: skip
    fifth = fourth | by_length((0.2, 0.4), (0.03, 0.4))
    fifth |= {
        name: seeds_of("advmodL", 0.01, 0.395, seeds=SEEDS)
        for name in ("advmodL_tuned", "advmodQ_tuned")
    }
    fifth |= {
        f"placebo_advmodL_{i}": seeds_of("placebo_advmodL", 0.3, 0.1, seeds=SEEDS)
        for i in (1, 2, 3)
    }
    answers = lambda change: [
        c.answer for c in verdict.decided(verdict.fifth_demands(), fifth | change, ROWS)
    ]
    assert answers({}) == ["yes", "no"] * 2 + ["yes"] * 10, answers({})
    alike = answers(by_length((0.001, 0.4), (0.009, 0.2)))
    assert [i for i, (a, b) in enumerate(zip(answers({}), alike)) if a != b] == [
        0,
        1,
        2,
        3,
        9,
        13,
    ], "length that does as well SHOULD fail"
    adjusted = holm([0.04, float("nan"), 0.01, 0.03])
    assert [round(p, 6) for p in adjusted if p == p] == [0.06, 0.03, 0.06] and adjusted[
        1
    ] != adjusted[1], adjusted
    print(f"ok  the criterion: {len(clauses)} clauses hold for a method that meets it; {len(mutations)} ways to miss it fail their clause; "
          "a seed that is missing decides nothing, one that diverged fails")  # fmt: skip


# ── the pool ─────────────────────────────────────────────────────────────────────────────────────────────────────


def stand_ins(tmp: Path, steps: dict[str, int]) -> list[Job]:
    template = tmp / "template.json"
    template.write_text(dumps(asdict(seeds_of("none2r", 0.7, 0.2)[101])))
    command = (sys.executable, "-S", "-c", STAND_IN)
    return [
        Job(name, "none2r", (*command, str(tmp / name), str(n), str(template)), tmp / name, n)
        for name, n in steps.items()
    ]


def starts(job: Job) -> list[str]:
    path = job.out_dir / "starts"
    return path.read_text().splitlines() if path.exists() else []


def run_pool(jobs: list[Job], stop_at: list[Path] | None = None) -> tuple[decision.Pool, list[str]]:
    """Run jobs; with `stop_at`, a signal comes when these files are there."""
    pool, lines = decision.Pool(jobs, 2), []

    def stop() -> None:
        while not all(path.exists() for path in stop_at):
            time.sleep(0.02)
        pool.stop()

    if stop_at:
        threading.Thread(target=stop, daemon=True).start()
    pool(every=0.1, say=lines.append)
    return pool, lines


def with_steps(job: Job, steps: int) -> Job:
    return replace(job, argv=(*job.argv[:-2], str(steps), job.argv[-1]))


def check_pool(tmp: Path) -> None:
    jobs = stand_ins(tmp, {"done": 3, "broken": 0, "a": 4, "b": 4})
    run_pool(jobs[:1])
    pool, lines = run_pool(jobs)
    assert starts(jobs[0]) == ["0"] and pool.before == 1, "a finished run was run again"
    assert {n: s for n, s in pool.ended.items() if s == "finished"}.keys() == {"done", "a", "b"}, (
        pool.ended
    )
    assert pool.ended["broken"] == "failed: this one cannot work (exit 2)" and any(
        "failed: this one" in line for line in lines
    )
    assert (
        "3/4 finished, 1 not" in lines[-1]
        and "min left" in lines[-1]
        and "running" not in lines[-1]
    ), lines
    pool.live["b"] = None
    assert "running: b (" in pool.progress(), pool.progress()
    said = decision.summary(pool)
    assert (
        "3 of 4 runs are finished; 1 had ended before" in said
        and "broken: failed" in said
        and "go on with: " in said
    ), said
    record = jobs[0].out_dir / "record.json"
    record.write_text(
        record.read_text().replace('"finished"', '"running"')
    )  # the mutation: it never finished
    run_pool(jobs[:1])
    assert len(starts(jobs[0])) == 2, "a run that was killed was taken for finished"
    refused(
        lambda: decision.settled(replace(jobs[0], config={"grpo.steps": 61})),
        "other options (grpo.steps 61 → 120)",
    )
    record.write_text(record.read_text().replace('"finished"', '"failed: diverged at step 2"'))
    pool, _ = run_pool(jobs[:1])
    assert len(starts(jobs[0])) == 2 and pool.ended["done"].startswith("failed: diverged"), (
        "a run that diverged was run again"
    )
    honest, decision.settled = (
        decision.settled,
        lambda job: "finished" if job.out_dir.exists() else None,
    )
    blind, _ = run_pool(jobs)  # the mutation: a directory is a finished run
    decision.settled = honest
    assert "broken" in {n for n, s in blind.ended.items() if s == "finished"}, (
        "the check of failures has no teeth"
    )
    print(
        "ok  the pool: what has finished is skipped, a failure is reported in one line and the rest goes on"
    )


def check_resume(tmp: Path) -> None:
    jobs = stand_ins(tmp, {"c": 2000, "d": 2000, "e": 2000})
    pool, _ = run_pool(jobs, stop_at=[job.out_dir / "saved" for job in jobs[:2]])
    assert pool.ended.get("c") == pool.ended.get("d") == "interrupted" and "e" not in pool.ended, (
        pool.ended
    )
    assert "not started: e" in decision.summary(pool) and "interrupted: c d" in decision.summary(
        pool
    ), decision.summary(pool)
    short = [with_steps(job, int((job.out_dir / "saved").read_text()) + 2) for job in jobs[:2]]
    again, _ = run_pool(short)
    assert set(again.ended.values()) == {"finished"} and all(
        int(starts(job)[-1]) > 0 for job in short
    ), "a stopped run began anew"
    (jobs[0].out_dir / "saved").unlink()  # the mutation: no checkpoint
    (jobs[0].out_dir / "record.json").unlink()
    run_pool([with_steps(jobs[0], 2)])
    assert starts(jobs[0])[-1] == "0", "the check of resuming has no teeth"
    folder = tmp / "locked"
    with decision.only_pool(folder):
        assert (folder / ".pool").exists()
    print("ok  a stopped pool asks for checkpoints, says what is left, and goes on where it was")


# ── the artifacts ────────────────────────────────────────────────────────────────────────────────────────────────


def write_records(folder: Path) -> None:
    folder.mkdir()
    flags = {row.name: row.flags for row in ROWS}
    rates = {
        "none2r": (0.74, 0.19, 60),
        "no_loophole": (0.0, 0.4, 60),
        "routeQ": (0.012, 0.39, 60),
        "routeQ_long": (0.02, 0.45, 160),
    }
    for name, (hack, solve, steps) in rates.items():
        for seed, record in seeds_of(
            name.partition("_long")[0], hack, solve, steps, THREE, flags=flags.get(name, "")
        ).items():
            (folder / f"{name}_s{seed}.json").write_text(dumps(asdict(record)))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_artifacts(tmp: Path) -> None:
    records = tmp / "records"
    write_records(records)
    for out in ("one", "two"):
        artifacts.make(records, tmp / out)
    one = contents(tmp / "one")
    assert one == contents(tmp / "two"), "two makings of the same records differ"
    page = one["results.md"].decode()
    assert (
        "| routeQ" in page
        and "3 of 5" in page
        and "not run" in page
        and "misses routeQ s104" in page
    )
    path = records / "routeQ_s101.json"
    changed = json.loads(path.read_text())
    changed["evals"][-1]["hack"] += 1
    path.write_text(json.dumps(changed))
    artifacts.make(records, tmp / "two")
    differ = {name for name, data in contents(tmp / "two").items() if data != one[name]}
    assert {
        "figs/a1_training.png",
        "writeup/generated/a1_training_figure.csv",
        "writeup/generated/a2_keynote.csv",
    } <= differ, differ
    changed["config"]["grpo"]["learning_rate"] = 0.5
    path.write_text(json.dumps(changed))
    refused(
        lambda: verdict.load_runs(records), "routeQ_s101.json has other options (grpo.learning_rate"
    )
    assert all(len(data) < 300_000 for name, data in one.items() if name.endswith(".png"))
    print(
        f"ok  {len(one)} artifacts come out byte for byte, rows without runs say so, one more hack changes {len(differ)} of them"
    )


def stale(runs: verdict.Runs, made: dict[str, str], folder: Path) -> list[str]:
    """Generated text files that differ from those of the records, and figures that were drawn from other data."""
    found = [
        name
        for name, text in made.items()
        if not (folder / name).exists() or (folder / name).read_text() != text
    ]
    for name, (points, _) in artifacts.FIGURES.items():
        path = folder / "figs" / f"{name}.png"
        drawn = Image.open(path).text.get("Description") if path.exists() else ""
        found += [str(path)] if drawn != artifacts.data_hash(points(runs)) else []
    return found


def check_committed() -> None:
    runs, made = artifacts.texts(RECORDS)
    found = stale(runs, made, ROOT / "docs")
    assert not found, f"run `just artifacts`: stale are {', '.join(found)}"
    name = "writeup/generated/verdict.csv"
    assert stale(runs, made | {name: made[name] + "x"}, ROOT / "docs") == [name], (
        "a changed file passes"
    )
    large = [path.name for path in RECORDS.glob("*_s*.json") if path.stat().st_size > 60_000]
    assert not large, f"compact records above 60 kB: {large}"
    print(
        f"ok  {len(made) + len(artifacts.FIGURES)} generated files in docs/ are those of the committed records"
    )


def main() -> None:
    check_manifest()
    check_verdict()
    with tempfile.TemporaryDirectory() as folder:
        check_pool(Path(folder))
        check_resume(Path(folder))
        check_artifacts(Path(folder))
    check_committed()


if __name__ == "__main__":
    main()
