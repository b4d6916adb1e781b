"""The experiments: records and waves as data, the criterion, a plan's tests, pool and artifacts.

Each kind of clause passes a synthetic policy that meets it and fails one that misses it; the pool
(with cheap stand-ins for training) skips what has finished, resumes what was stopped, reports what
failed and records each run once; the generated files in docs/ are those of the committed records.

Run: python scripts/verify/verify_decision.py
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image
from scripts.experiments import artifacts, criterion, plan, records, run, waves
from scripts.experiments.criterion import Clause
from scripts.experiments.records import RECORDS, Row
from scripts.experiments.waves import Job

from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.files import dumps
from vgrout.stats import holm

PROBLEMS, EACH = 20, 24  # problems and draws of a synthetic cell
MODES = ["run_tests", "sentinel", "stdout_marker", "file_marker"]
STAND_IN = """
import json, pathlib, signal, sys, time
steps, out = int(sys.argv[1]), pathlib.Path(sys.argv[3])
template = json.loads((out.parent / "template.json").read_text())
saved = out / "saved"
first = int(saved.read_text()) if saved.exists() else 0
with open(out / "starts", "a") as f: f.write(f"{first}\\n")
def end(status, done, code):
    record = template | {"argv": sys.orig_argv, "status": status, "steps_done": done}
    (out / "record.json").write_text(json.dumps(record | {"seed": int(out.name[-3:])}))
    sys.exit(code)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if steps == 0:
    print("error: this one cannot work"); end("failed: it", 0, 2)
for step in range(first, steps):
    time.sleep(0.03)
    with open(out / "metrics.jsonl", "a") as f: f.write('{"student_hack": 0.5}\\n')
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


# ── data ─────────────────────────────────────────────────────────────────────────────────────────


def changed_files(folder: Path) -> list[str]:
    """Files of finished waves that are not what SHA256SUMS says."""
    sums = [line.split() for line in (RECORDS / "SHA256SUMS").read_text().splitlines()]
    digest = lambda name: hashlib.sha256((folder / name).read_bytes()).hexdigest()  # noqa: E731
    return [name for wanted, name in sums if digest(name) != wanted]


def check_data(tmp: Path) -> None:
    files = records.files("decision")
    runs, diverged = records.load(files)
    assert not changed_files(RECORDS), "a finished wave's records changed"
    counts = sum(map(len, runs.values())), sum(map(len, diverged.values()))
    assert counts == (448, 6) and len(records.development()) == 8, counts
    for path in RECORDS.glob("*"):
        if path.is_file():
            (tmp / path.name).write_bytes(path.read_bytes())
    victim = tmp / files[0].name
    victim.write_text(victim.read_text().replace('"hack":3,', '"hack":4,', 1))
    assert changed_files(tmp) == [victim.name], "a changed count passes"
    refused(lambda: records.load([*files, files[0]]), "twice")
    line = json.dumps(asdict(make_runs("none2r", 0.7, 0.2, 60, (400,))[400]))  # without a row
    (tmp / "plain.jsonl").write_text(line + "\n")
    assert [row for row, _ in records.read(tmp / "plain.jsonl")] == ["none2r"]
    (tmp / "plain.jsonl").write_text(line[:-9])
    refused(lambda: records.load([tmp / "plain.jsonl"]), "damaged")
    names = {row.name for row in records.rows()} | set(criterion.DERIVED)
    rows = [r for w in (*"RVWX", "routeQ", "routeV") for c in criterion.clauses(w) for r in c.rows]
    assert {name for row in rows for name in row.split("+")} <= names
    print("ok  454 records of six waves and 8 of development read as frozen; one count more shows")


def chosen(wave: str, *words: str, **other: object) -> list[Job]:
    parser = argparse.ArgumentParser()
    waves.add_arguments(parser)
    options = parser.parse_args([wave, *words])
    return waves.jobs_of(argparse.Namespace(**vars(options) | other))


def check_waves() -> None:
    every = chosen("decision", "--all")
    waves.check(every)  # training's own parser reads each
    assert not [job for job in every if job.row.archived]
    refused(lambda: chosen("decision", "--only", "random_gateQ"), "random_gateQ")
    refused(lambda: waves.check([replace(every[0], options=("organism", "--top-p", "7"))]), "row ")
    assert all("--resume" in job.argv and job.own for job in every)
    assert len({job.out_dir for job in every}) == len(every)
    first = chosen("01_label_free")
    order = [job.name for job in first]
    pair = ["absorbQ_s400", "no_gateQ_s400"]
    assert order[:2] == pair and order[20] == "none2r_s400" and order[-1] == "routeQ_s409"
    waves.check(first)
    assert not any(job.own for job in chosen("01_label_free", "--seeds", "41"))
    assert not any(job.own for job in chosen("01_label_free", "--flags", "--beta 0"))
    assert {j.row.name for j in chosen("decision", "--only", "routeQ")} == {"routeQ"}
    print(f"ok  {len(every)} runs of the decision can still run; stages and seeds come in turn")


# ── the criterion ────────────────────────────────────────────────────────────────────────────────


def result(step: int, hack: float, solve: float, split: str = "test", state: str = "deployed"):
    """A cell in which every problem and every mode has these rates, up to rounding."""
    count = lambda rate, i: int(rate * EACH + (i + 0.5) / PROBLEMS)  # noqa: E731
    problems = {f"p{i}": [EACH, count(hack, i), count(solve, i)] for i in range(PROBLEMS)}
    n, hacks, solves = (sum(column) for column in zip(*problems.values(), strict=True))
    mode = {"n": n // 4, "hack": round(hacks / 4), "solve": round(solves / 4)}
    by_mode = dict.fromkeys(MODES, mode)
    shown = problems if split == "test" else {}
    return EvalResult(split, "novel", state, step, n, hacks, solves, by_mode, shown)


def make_runs(
    arm: str, hack: float, solve: float, steps: int, seeds: tuple[int, ...]
) -> dict[int, RunRecord]:
    """Records of an arm whose rates vary a little from seed to seed."""
    data = {"modes": MODES, "pair_modes": MODES[:2], "data": "d"}
    config = {"data": data, "run": {"out_dir": ""}}
    found = {}
    for i, seed in enumerate(seeds):
        vary = (i - (len(seeds) - 1) / 2) * 0.004
        h, s = max(0.0, hack + vary), solve + vary
        evals = [result(0, 0.01, 0.18), result(steps // 2, h, s, "val"), result(steps, h, s)]
        evals.append(result(steps, h / 2, s, state="ablated"))
        found[seed] = RunRecord(
            1, arm, "organism", seed, config, [], "c0ffee00", False, {}, {"d": "0"}, "", {}, {},
            "finished", "", steps, {"a": 1.0}, evals, {"emerged": 20, "share_route": 0.3},
        )  # fmt: skip
    return found


GOOD = {
    "none2r": (0.74, 0.19, 120),
    "no_loophole": (0.0, 0.40, 120),
    "routeQ": (0.012, 0.395, 120),
    "placeboQ_1": (0.20, 0.36, 120),
    "no_gateQ": (0.40, 0.36, 120),
    "no_gateQ_both": (0.0, 0.30, 120),
    "routeQ_long": (0.02, 0.45, 240),
    "routeQ_again": (0.012, 0.395, 120),
    "no_loophole_again": (0.0, 0.40, 120),
}
CASES = (  # test, rows, bound, then what breaks it: a row and its hack, solve and steps
    ("low", "routeQ", 0.05, "routeQ", (0.06, 0.395, 120)),
    ("below", "routeQ placeboQ_1", 0.05, "placeboQ_1", (0.012, 0.36, 120)),
    ("below", "routeQ absorb", 0.05, "none2r", (0.024, 0.19, 120)),
    ("not_inferior", "routeQ no_loophole", -0.03, "routeQ", (0.012, 0.35, 120)),
    (
        "not_inferior",
        "routeQ+routeQ_again no_loophole+no_loophole_again",
        -0.03,
        "routeQ_again",
        (0.012, 0.30, 120),
    ),
    ("solves_less", "no_gateQ_both no_gateQ", 0.05, "no_gateQ_both", (0.0, 0.36, 120)),
    ("gain", "routeQ no_loophole", 0.5, "routeQ", (0.012, 0.175, 120)),
    ("above_plain", "routeQ none2r", 0.05, "none2r", (0.01, 0.45, 120)),
    ("long_solve", "routeQ_long routeQ", -0.03, "routeQ_long", (0.02, 0.30, 240)),
    ("long_steps", "routeQ_long none2r", 4, "routeQ_long", (0.02, 0.45, 70)),
)


def evidence_of(change: dict, diverged: dict | None = None) -> criterion.Evidence:
    runs = {}
    for name, rates in (GOOD | change).items():
        row = records.named(name)
        runs[name] = make_runs(row.arm, *rates, row.seeds)
    return criterion.gather(runs, diverged or {})


def check_criterion() -> None:
    assert {case[0] for case in CASES} == criterion.TESTS.keys(), "a kind of clause has no case"
    good = evidence_of({})
    for test, rows, bound, row, rates in CASES:
        clause = Clause(test, tuple(rows.split()), bound)
        answer = criterion.evaluate(clause, good)
        assert answer.text == "yes", answer
        broken = criterion.evaluate(clause, evidence_of({row: rates}))
        assert broken.text == "no", f"{row} at {rates} SHOULD fail: {broken}"
    low, against = Clause("low", ("routeQ",), 0.05), Clause("below", ("routeQ", "placeboQ_1"), 0.05)
    frozen = evidence_of({"routeQ": (0.012, 0.175, 120)})
    assert criterion.evaluate(low, frozen).text == "yes, frozen", "a policy that does nothing"
    del good.runs["placeboQ_1"][103]
    answer = criterion.evaluate(against, good)
    assert answer.text == "not run" and "placeboQ_1 s103" in answer.figure
    good.diverged["placeboQ_1"] = [103]
    answer = criterion.evaluate(against, good)
    assert answer.text == "no" and "diverged: placeboQ_1 s103" in answer.figure
    assert criterion.evaluate(Clause("low", (), 0.05), good).text == "not run"
    few = {name: rates for name, rates in GOOD.items() if "loophole" not in name}
    alone = {name: make_runs(name, *rates, (41,)) for name, rates in few.items()}
    assert not criterion.gather(alone, {}).is_frozen("routeQ"), "no ceiling, no gain"
    ordered = holm([0.04, float("nan"), 0.01, 0.03])
    assert [round(p, 6) for p in ordered if p == p] == [0.06, 0.03, 0.06]
    print(f"ok  the criterion: {len(CASES)} clauses of every kind hold, and one change fails each")


def check_plan(tmp: Path) -> None:
    signs = [*itertools.product((1, -1), repeat=6)]
    differences = [-0.3, -0.1, -0.4, 0.05, -0.2, -0.6]
    flipped = [abs(sum(s * d for s, d in zip(sign, differences, strict=True))) for sign in signs]
    wanted = sum(f >= abs(sum(differences)) - 1e-12 for f in flipped) / len(signs)
    assert plan.sign_flip(differences) == wanted != plan.sign_flip([abs(d) for d in differences])
    assert plan.sign_flip([-0.1] * 10) == 2 / 2**10
    contrast = replace(waves.WAVES["01_label_free"].contrast, solve_at=(110,))
    waves.WAVES["made"] = replace(waves.WAVES["01_label_free"], contrast=contrast)
    seeds = tuple(range(400, 410))
    for arm, hack in (("absorbQ", 0.0), ("no_gateQ", 0.4), ("no_loophole", 0.0)):
        for record in make_runs(arm, hack, 0.4, 220, seeds).values():
            lost = (arm, record.seed) == ("absorbQ", 409)
            status = "failed: diverged at step 7" if lost else "finished"
            records.append(tmp / "made.jsonl", arm, replace(record, status=status))
    found = plan.measured("made", tmp)
    assert found["absorbQ"][409] == (1.0, 0.0) and found["none2r"] == {}
    said = plan.report("made", tmp)
    assert "p = 0.0215" in said and "none2r s400" in said and "not shown to be as good" in said, (
        said
    )
    waves.WAVES["made"] = replace(waves.WAVES["made"], contrast=replace(contrast, solve_at=(100,)))
    refused(lambda: plan.report("made", tmp), "no validation after step 100")
    print("ok  a plan: the exact test, validations at its steps, a diverged run as hack 1, solve 0")


# ── the pool ─────────────────────────────────────────────────────────────────────────────────────


def stand_ins(tmp: Path, steps: dict[str, int]) -> list[Job]:
    tmp.mkdir(exist_ok=True)
    template = make_runs("none2r", 0.7, 0.2, 60, (101,))[101]
    (tmp / "template.json").write_text(dumps(asdict(template)))
    program = (sys.executable, "-S", "-c", STAND_IN)
    return [
        Job(Row(name, "none2r"), 101, (str(n),), tmp / f"{name}_s101", program=program)
        for name, n in steps.items()
    ]


def starts(job: Job) -> list[str]:
    path = job.out_dir / "starts"
    return path.read_text().splitlines() if path.exists() else []


def run_pool(
    jobs: list[Job], on_end: Callable[[Job], object] = str, stop_at: tuple[Path, ...] = ()
) -> tuple[run.Pool, list[str]]:
    """Run jobs; with `stop_at`, a signal comes when these files are there."""
    pool, lines = run.Pool(jobs, 2, on_end), []

    def stop() -> None:
        while not all(path.exists() for path in stop_at):
            time.sleep(0.02)
        pool.stop()

    if stop_at:
        threading.Thread(target=stop, daemon=True).start()
    pool(every=0.1, say=lines.append)
    return pool, lines


def check_pool(tmp: Path) -> None:
    jobs = stand_ins(tmp, {"done": 3, "broken": 0, "a": 4, "b": 4})
    run_pool(jobs[:1])
    pool, lines = run_pool(jobs)
    assert starts(jobs[0]) == ["0"], "a finished run was run again"
    assert pool.unfinished() == ["broken_s101: failed: this one cannot work (exit 2)"]
    assert "3/4 finished, 1 not; running: nothing" in lines[-1], lines
    pool.live["b_s101"] = None
    assert "running: b_s101 (step 4)" in pool.progress(), pool.progress()
    record = jobs[0].out_dir / "record.json"
    honest = record.read_text()
    record.write_text(honest.replace('"finished"', '"running"'))  # the mutation: it never finished
    run_pool(jobs[:1])
    assert len(starts(jobs[0])) == 2, "a run that was killed was taken for finished"
    refused(lambda: run.settled(replace(jobs[0], options=("9",))), "other options (3)")
    record.write_text(honest.replace('"finished"', '"failed: diverged at step 2"'))
    pool, _ = run_pool(jobs[:1])
    assert len(starts(jobs[0])) == 2 and "diverged" in pool.status("done_s101")
    settled, run.settled = run.settled, lambda job: "finished" * job.out_dir.exists()
    blind, _ = run_pool(jobs)  # the mutation: a directory is a finished run
    run.settled = settled
    assert not blind.unfinished(), "the check of failures has no teeth"
    print("ok  the pool: what has finished is skipped, a failure is one line and the rest goes on")


def check_recorder(tmp: Path) -> None:
    jobs = stand_ins(tmp, {"c": 2, "d": 2})
    foreign = replace(stand_ins(tmp, {"e": 2})[0], own=False)
    folder = tmp / "records"
    folder.mkdir()
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    for key in ("name", "email"):
        subprocess.run([*git, "config", f"user.{key}", "x@x"], check=True)
    recorder = run.Recorder("wave", folder, commit=True)
    run_pool([*jobs, foreign], recorder)
    file = folder / "wave.jsonl"
    assert sorted(row for row, _ in records.read(file)) == ["c", "d"], "its own runs, each once"
    log = subprocess.run([*git, "log", "--format=%s"], capture_output=True, text=True).stdout
    assert "Record of wave: c, seed 101" in log and log.count("\n") == 2, log
    assert not any(run.Recorder("wave", folder, commit=False)(job) for job in jobs)
    forgetful = run.Recorder("wave", folder, commit=False)
    forgetful.known.clear()  # the mutation: it does not know what is there
    assert forgetful(jobs[0])
    refused(lambda: records.load([file]), "twice")
    print("ok  each run that ends is one line of its wave's file, committed, and never two")


def check_resume(tmp: Path) -> None:
    jobs = stand_ins(tmp, {"f": 2000, "g": 2000, "h": 2000})
    pool, _ = run_pool(jobs, stop_at=tuple(job.out_dir / "saved" for job in jobs[:2]))
    said = ["f_s101: interrupted", "g_s101: interrupted", "h_s101: not started"]
    assert pool.unfinished() == said, pool.unfinished()
    short = []
    for job in jobs[:2]:
        steps = int((job.out_dir / "saved").read_text()) + 2
        short.append(replace(job, options=(str(steps),)))
    again, _ = run_pool(short)
    assert not again.unfinished() and all(int(starts(job)[-1]) > 0 for job in short), "began anew"
    (jobs[0].out_dir / "saved").unlink()  # the mutation: no checkpoint
    (jobs[0].out_dir / "record.json").unlink()
    run_pool([replace(jobs[0], options=("2",))])
    assert starts(jobs[0])[-1] == "0", "the check of resuming has no teeth"
    with run.only_pool(tmp / "locked"):
        held = (
            f"from scripts.experiments import run; run.only_pool(run.Path({str(tmp)!r}) / 'locked')"
        )
        other = subprocess.run([sys.executable, "-c", held], capture_output=True, text=True)
        assert "another pool is at work" in other.stderr, other.stderr
    print("ok  a stopped pool asks for checkpoints, says what is left, and goes on where it was")


# ── the artifacts ────────────────────────────────────────────────────────────────────────────────


def stale(made: dict[str, str], figures: dict[str, str], folder: Path) -> list[str]:
    """Generated text files that differ from those of the records, figures drawn from other data."""
    found = []
    for name, text in made.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            found.append(name)
    for name, wanted in figures.items():
        path = folder / "figs" / f"{name}.png"
        if not path.exists() or Image.open(path).text.get("Description") != wanted:
            found.append(name)
    return found


def check_artifacts(tmp: Path) -> None:
    evidence = criterion.load()
    made = artifacts.texts(evidence)
    figures = {}
    for name, artifact in artifacts.FIGURES.items():
        figures[name] = artifacts.data_hash(artifacts.curves(evidence, artifact))
    found = stale(made, figures, artifacts.DOCS)
    assert not found, f"run `just artifacts`: stale are {', '.join(found)}"
    name = "writeup/generated/verdict.tex"
    assert stale(made | {name: "x"}, figures, artifacts.DOCS) == [name], "a changed file passes"
    last = evidence.runs["routeQ"][101].evals[-1]
    last.hack += 1  # the mutation: one more hack
    data = artifacts.curves(evidence, "A1")
    assert artifacts.data_hash(data) != figures["a1_training"], "a figure of other data passes"
    artifacts.draw(data, tmp / "once.png")
    artifacts.draw(data, tmp / "again.png")
    assert (tmp / "once.png").read_bytes() == (tmp / "again.png").read_bytes()
    print(f"ok  {len(made) + len(figures)} generated files in docs/ are those of the records")


def main() -> None:
    check_waves()
    check_criterion()
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        check_data(tmp)
        check_plan(tmp)
        check_pool(tmp / "pool")
        check_recorder(tmp / "recorder")
        check_resume(tmp / "resume")
        check_artifacts(tmp)


if __name__ == "__main__":
    main()
