"""The experiments: records and waves as data, the criterion, a plan's tests, pool and artifacts.

Each kind of clause passes a synthetic policy that meets it and fails one that misses it; the pool
(with cheap stand-ins for training) skips what has finished, resumes what was stopped, reports what
failed and records each run once; the generated files in docs/ are those of the committed records.

Run: python -m scripts.verify.verify_decision
"""

import argparse
import hashlib
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
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for _, name in sums}
    return [name for wanted, name in sums if found[name] != wanted]


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


def chosen(*words: str) -> list[Job]:
    parser = argparse.ArgumentParser()
    waves.add_arguments(parser)
    return waves.jobs_of(parser.parse_args(words))


def check_waves() -> None:
    wave = "01_label_free"
    jobs = chosen(wave)
    waves.check(jobs)  # training's own parser reads each
    waves.check(chosen(wave, "--rehearse"))
    refused(lambda: waves.check([replace(jobs[0], options=("organism", "--top-p", "7"))]), "row ")
    refused(lambda: chosen(wave, "--only", "routeX"), "routeX")
    assert all("--resume" in job.argv and job.own for job in jobs)
    assert len({job.out_dir for job in jobs}) == len(jobs) == 50
    order = [job.name for job in jobs]
    pair = ["absorbQ_s400", "no_gateQ_s400"]
    assert order[:2] == pair and order[20] == "none2r_s400" and order[-1] == "routeQ_s409"
    for changed in (["--seeds", "41"], ["--flags", "--beta 0"], ["--rehearse"]):
        assert not any(job.own for job in chosen(wave, *changed)), changed
    record = next(iter(records.load(records.files("decision"))[0]["routeQ"].values()))
    again = records.repetition(record)
    assert record.commit in again and "--intervention routeQ --seed" in again, again
    print("ok  plan 1 parses, its stages and seeds come in turn; an archived run can be repeated")


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
TWICE = "routeQ+routeQ_again no_loophole+no_loophole_again"
CASES = (  # test, rows, bound, then what breaks it: a row and its hack, solve and steps
    ("low", "routeQ", 0.05, "routeQ", (0.06, 0.395, 120)),
    ("below", "routeQ placeboQ_1", 0.05, "placeboQ_1", (0.012, 0.36, 120)),
    ("below", "routeQ absorb", 0.05, "none2r", (0.024, 0.19, 120)),
    ("not_inferior", "routeQ no_loophole", -0.03, "routeQ", (0.012, 0.35, 120)),
    ("not_inferior", TWICE, -0.03, "routeQ_again", (0.012, 0.30, 120)),
    ("solves_less", "no_gateQ_both no_gateQ", 0.05, "no_gateQ_both", (0.0, 0.36, 120)),
    ("gain", "routeQ no_loophole", 0.5, "routeQ", (0.012, 0.175, 120)),
    ("above_plain", "routeQ none2r", 0.05, "none2r", (0.01, 0.45, 120)),
    ("long_solve", "routeQ_long routeQ", -0.03, "routeQ_long", (0.02, 0.30, 240)),
    ("long_steps", "routeQ_long none2r", 4, "routeQ_long", (0.02, 0.45, 70)),
)


def evidence_of(change: dict) -> criterion.Evidence:
    runs = {}
    for name, rates in (GOOD | change).items():
        row = records.named(name)
        runs[name] = make_runs(row.arm, *rates, row.seeds)
    return criterion.gather(runs, {})


def check_criterion() -> None:
    assert {case[0] for case in CASES} == criterion.TESTS.keys(), "a kind of clause has no case"
    good = evidence_of({})

    def holds(test: str, rows: str, bound: float, evidence: criterion.Evidence) -> str:
        answer = criterion.evaluate(Clause(test, tuple(rows.split()), bound), evidence)
        return f"{answer['holds']}: {answer['figure']}"

    for *clause, row, rates in CASES:
        assert holds(*clause, good).startswith("yes: "), clause
        broken = holds(*clause, evidence_of({row: rates}))
        assert broken.startswith("no: "), f"{row} at {rates} SHOULD fail {clause}: {broken}"
    frozen = evidence_of({"routeQ": (0.012, 0.175, 120)})
    assert holds("low", "routeQ", 0.05, frozen).startswith("yes, frozen"), "it does nothing"
    against = ("below", "routeQ placeboQ_1", 0.05, good)
    del good.runs["placeboQ_1"][103]
    assert holds(*against) == "not run: misses: placeboQ_1 s103"
    good.diverged["placeboQ_1"] = [103]
    assert holds(*against) == "no: diverged: placeboQ_1 s103"
    assert holds("low", "", 0.05, good).startswith("not run")
    alone = {"routeQ": make_runs("routeQ", *GOOD["routeQ"], (41,))}
    assert not criterion.gather(alone, {}).is_frozen("routeQ"), "no ceiling, no gain"
    print(f"ok  the criterion: {len(CASES)} clauses of every kind hold, and one change fails each")


def check_plan(tmp: Path) -> None:
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
    for words in ("p = 0.0215", "none2r s400", "not shown to be as good"):
        assert words in said, said
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


def run_pool(jobs: list[Job], on_end: Callable[[Job], object] = str) -> run.Pool:
    pool = run.Pool(jobs, 2, on_end)
    pool()
    return pool


def check_pool(tmp: Path) -> None:
    jobs = stand_ins(tmp, {"done": 3, "broken": 0, "a": 4, "b": 4})
    run_pool(jobs[:1])
    pool = run_pool(jobs)
    assert starts(jobs[0]) == ["0"], "a finished run was run again"
    assert pool.unfinished() == ["broken_s101: failed: this one cannot work (exit 2)"]
    record = jobs[0].out_dir / "record.json"
    honest = record.read_text()
    record.write_text(honest.replace('"finished"', '"running"'))  # the mutation: it never finished
    run_pool(jobs[:1])
    assert len(starts(jobs[0])) == 2, "a run that was killed was taken for finished"
    refused(lambda: run.settled(replace(jobs[0], options=("9",))), "other options (3)")
    record.write_text(honest.replace('"finished"', '"failed: diverged at step 2"'))
    pool = run_pool(jobs[:1])
    assert len(starts(jobs[0])) == 2 and "diverged" in pool.ended["done_s101"]
    print("ok  the pool: what has finished is skipped, a failure is one line and the rest goes on")


def check_recorder(tmp: Path) -> None:
    jobs = stand_ins(tmp, {"c": 2, "d": 2})
    foreign = replace(stand_ins(tmp, {"e": 2})[0], own=False)
    folder = tmp / "records"
    folder.mkdir()
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "-q"], check=True)
    for key in ("name", "email"):
        subprocess.run([*git, "config", f"user.{key}", "x@x"], check=True)
    recorder = run.Recorder("wave", folder, commit=True)
    run_pool([*jobs, foreign], recorder)
    file = folder / "wave.jsonl"
    recorded = [row for row, _ in records.read(file)]
    assert sorted(recorded) == ["c", "d"], "its own runs, each once"
    log = subprocess.run([*git, "log", "--format=%s"], capture_output=True, text=True).stdout
    assert "Record of wave: c, seed 101" in log and log.count("\n") == 2, log
    later = run.Recorder("wave", folder, commit=False)
    assert [later.has(job) for job in (*jobs, foreign)] == [True, True, False]
    later.known.clear()  # the mutation: it does not know what is there
    later(jobs[0])
    refused(lambda: records.load([file]), "twice")
    print("ok  each run that ends is one line of its wave's file, committed, and never two")


def check_resume(tmp: Path) -> None:
    jobs = stand_ins(tmp, {"f": 2000, "g": 2000, "h": 2000})
    saved = [job.out_dir / "saved" for job in jobs[:2]]
    pool = run.Pool(jobs, 2, str)

    def stop() -> None:
        while not all(path.exists() for path in saved):
            time.sleep(0.02)
        pool.stop()

    threading.Thread(target=stop, daemon=True).start()
    pool()
    said = ["f_s101: interrupted", "g_s101: interrupted", "h_s101: not started"]
    assert pool.unfinished() == said, pool.unfinished()
    short = []
    for job, path in zip(jobs, saved):
        steps = int(path.read_text()) + 2
        short.append(replace(job, options=(str(steps),)))
    again = run_pool(short)
    assert not again.unfinished() and all(int(starts(job)[-1]) > 0 for job in short), "began anew"
    saved[0].unlink()  # the mutation: no checkpoint
    (jobs[0].out_dir / "record.json").unlink()
    run_pool([replace(jobs[0], options=("2",))])
    assert starts(jobs[0])[-1] == "0", "the check of resuming has no teeth"
    with run.only_pool(tmp / "locked"):
        held = (
            f"from scripts.experiments import run; run.only_pool(run.Path({str(tmp)!r}, 'locked'))"
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
