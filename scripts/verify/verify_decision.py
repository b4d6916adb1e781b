"""The experiments: archived records and their figures, waves as data, a plan's tests, the pool.

The records are those of the checksums and give the figures of the archived tables. The pool (with
cheap stand-ins for training) skips what has finished, resumes what was stopped, reports what failed
and records each run once.

Run: python -m scripts.verify.verify_decision
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from scripts.experiments import plan, records, run, waves
from scripts.experiments.records import BOTH, RECORDS, ROOT
from scripts.experiments.waves import Job, Row
from scripts.verify.stored import novel_cell, planted_record, refused

from vgrout.core import RunRecord
from vgrout.files import dumps, sha256_file

WAVE = "01_label_free"
TABLES = ROOT / "docs" / "findings" / "tables.md"
STAND_IN = """
import json, pathlib, signal, sys, time
steps, out = int(sys.argv[1]), pathlib.Path(sys.argv[3])
template = json.loads((out.parent / "template.json").read_text())
saved = out / "saved"
first = int(saved.read_text()) if saved.exists() else 0
with open(out / "starts", "a") as f: f.write(f"{first}\\n")
def end(status, done, code):
    record = template | {"argv": sys.orig_argv, "status": status, "steps_done": done}
    (out / "record.json").write_text(json.dumps(record))
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


def made(arm: str, seed: int, hack: int, solve: int) -> RunRecord:
    """A finished record; hacks and solves of a thousand draws."""
    last = novel_cell(220, hack, solve, 1000)
    half = replace(last, split="val", step=110)
    config = {"run": {"out_dir": ""}}
    changes = {"arm": arm, "seed": seed, "config": config, "status": "finished"}
    return planted_record(**changes, evals=[half, last])


# ── data ─────────────────────────────────────────────────────────────────────────────────────────


def changed_files(folder: Path) -> list[str]:
    """Files of finished waves that are not what SHA256SUMS says."""
    sums = [line.split() for line in (RECORDS / "SHA256SUMS").read_text().splitlines()]
    return [name for digest, name in sums if sha256_file(folder / name) != digest]


def unlike(figures: dict[str, list], page: str) -> list[str]:
    """Means ± SEM in the page's tables that are not those of the records."""
    wrong, head = [], []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        head = (head or cells) if line.startswith("|") else []
        shown = dict(zip(head, cells))
        for which in {*BOTH} & {*shown}:
            if re.match(r"\d\.\d\d ± ", shown[which]):
                found = [records.share(c, which) for c in figures[shown["row"]]]
                if shown[which] != records.spread(found, 2):
                    wrong.append(f"{shown['row']}: {which} {shown[which]}")
    return wrong


def check_data(tmp: Path) -> None:
    files = records.files("decision")
    runs, diverged = records.load(files)
    assert not changed_files(RECORDS), "a finished wave's records changed"
    counts = [sum(map(len, part.values())) for part in (runs, diverged)]
    assert counts == [448, 6], counts
    figures, page = records.decided(runs), TABLES.read_text()
    assert not (wrong := unlike(figures, page)), wrong
    figures["absorbQ"][0].solve += 60  # the mutation: a count more would show in both
    assert unlike(figures, page), "a changed figure passes"
    for path in RECORDS.glob("*.*"):
        (tmp / path.name).write_bytes(path.read_bytes())
    (tmp / files[0].name).write_bytes(files[0].read_bytes().replace(b'"hack":3,', b'"hack":4,', 1))
    assert changed_files(tmp) == [files[0].name], "a changed count passes"
    refused("twice", records.load, [*files, files[0]])
    record = next(iter(runs["routeQ"].values()))
    again = records.repetition(record)
    assert record.commit in again and "--intervention routeQ --seed" in again, again
    print("ok  454 records are as frozen and give the archived tables; one count more shows")


def chosen(*words: str) -> list[Job]:
    parser = argparse.ArgumentParser()
    waves.add_arguments(parser)
    return waves.jobs_of(parser.parse_args(words))


def check_waves() -> None:
    jobs = chosen(WAVE)
    waves.check(jobs)  # training's own parser reads each
    waves.check(chosen(WAVE, "--rehearse"))
    bad = replace(jobs[0], options=("organism", "--top-p", "7"))
    refused("row ", waves.check, [bad])
    refused("routeX", chosen, WAVE, "--only", "routeX")
    assert all("--resume" in job.argv and job.own for job in jobs)
    assert len({job.out_dir for job in jobs}) == len(jobs) == 50
    order = [job.name for job in jobs]
    pair = ["absorbQ_s400", "no_gateQ_s400"]
    assert order[:2] == pair and order[20] == "none2r_s400" and order[-1] == "routeQ_s409"
    assert not any(job.own for job in chosen(WAVE, "--flags", "--beta 0")), "another run's record"
    print("ok  plan 1 parses, its stages and seeds come in turn")


def check_plan(tmp: Path) -> None:
    contrast = replace(waves.WAVES[WAVE].contrast, solve_at=(110,))
    waves.WAVES["made"] = replace(waves.WAVES[WAVE], contrast=contrast)
    hacks = {"absorbQ": 0, "no_gateQ": 400, "no_loophole": 0}
    for arm, hack in hacks.items():
        for seed in range(400, 410):
            record = made(arm, seed, hack, 400)
            if (arm, seed) == ("absorbQ", 409):
                record.status = "failed: diverged at step 7"
            records.append(tmp / "made.jsonl", arm, record)
    rates = plan.measured("made", tmp)
    assert rates["absorbQ"][409] == plan.LOST and rates["none2r"] == {}
    said = plan.report("made", tmp)
    for words in ("p = 0.0215", "none2r s400", "not shown to be as good"):
        assert words in said, said
    late = replace(contrast, solve_at=(100,))
    waves.WAVES["made"] = replace(waves.WAVES["made"], contrast=late)
    refused("no validation after step 100", plan.report, "made", tmp)
    print("ok  a plan: the exact test, validations at its steps, a diverged run as hack 1, solve 0")


# ── the pool ─────────────────────────────────────────────────────────────────────────────────────


def stand_ins(tmp: Path, steps: dict[str, int]) -> list[Job]:
    tmp.mkdir(exist_ok=True)
    template = dumps(asdict(made("none2r", 101, 700, 200)))
    (tmp / "template.json").write_text(template)
    program = (sys.executable, "-S", "-c", STAND_IN)
    jobs = []
    for name, count in steps.items():
        row, folder = Row(name, "none2r"), tmp / f"{name}_s101"
        jobs.append(Job(row, 101, (str(count),), folder, program=program))
    return jobs


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
    finished = record.read_text()
    record.write_text(finished.replace('"finished"', '"running"'))  # the mutation
    run_pool(jobs[:1])
    assert len(starts(jobs[0])) == 2, "a run that was killed was taken for finished"
    refused("other options (3)", run.settled, replace(jobs[0], options=("9",)))
    record.write_text(finished.replace('"finished"', '"failed: diverged at step 2"'))
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
    assert [later.has(job) for job in (*jobs, foreign)] == [
        True,
        True,
        False,
    ]
    later.known.clear()  # the mutation: it does not know what is there
    later(jobs[0])
    refused("twice", records.load, [file])
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
    said = [
        "f_s101: interrupted",
        "g_s101: interrupted",
        "h_s101: not started",
    ]
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
    lock = f"from scripts.experiments import run; run.only_pool(run.Path({str(tmp / 'locked')!r}))"
    with run.only_pool(tmp / "locked"):
        other = subprocess.run([sys.executable, "-c", lock], capture_output=True, text=True)
        assert "another pool is at work" in other.stderr, other.stderr
    print("ok  a stopped pool asks for checkpoints, says what is left, and goes on where it was")


def main() -> None:
    check_waves()
    checks = (
        check_data,
        check_plan,
        check_pool,
        check_recorder,
        check_resume,
    )
    for check in checks:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))


if __name__ == "__main__":
    main()
