"""The gate before every run: all scripts/verify/verify_*.py and a tiny run, with shapes checked.

The tiny run (routeV) goes through the real pipeline with demonstrations; at least three of its
steps must move the parameters and every zone must be occupied. Two jobs run at a time, the longest
first. The last line is `N passed, M failed`; the exit status is 1 if M > 0.

Importing torch and transformers costs seconds a process, so the jobs are forks of one server that
has imported them once; those of FRESH check what is imported when, in an interpreter of their own.

Run: python scripts/verify/smoke.py [--arms] [--long]     (--arms: every arm without a live monitor,
tiny; --long: the long forms alone)
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vgrout.arms import ARMS, FLAGS

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "out" / f"smoke_{os.getpid()}"
ENVIRONMENT = {"BEARTYPE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
AT_ONCE, TAIL_LINES, LIMIT, LONG_LIMIT = 2, 40, 600, 7200  # seconds; a job that hangs has failed
FRESH = ("verify_errors.py", "verify_budget.py", "verify_sandbox.py")
LONGEST = (  # the jobs that take longest start first
    "verify_faults verify_errors verify_train verify_audit verify_monitors verify_organism "
    "verify_record verify_full verify_tutorial verify_scores verify_lora2r"
).split()
SERVER = multiprocessing.get_context("forkserver")
LIVE: set[int] = set()  # process groups of running jobs


def tiny(arm: str) -> list[str]:
    flags = f"smoke --intervention {arm} --threads 1 --out-dir {RUNS / arm}"
    return ["-m", "vgrout.train", *flags.split()]


def execute(arguments: list[str], output: str) -> None:
    """A job in a fork of the server: `script.py …` or `-m module …`, its output in a file."""
    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = open(os.devnull)
    os.chdir(ROOT)
    if Path(arguments[0]).name in FRESH:
        os.execv(sys.executable, [sys.executable, *arguments])
    module = arguments[0] == "-m"
    sys.argv = arguments[module:]
    sys.path[0] = str(ROOT)
    try:
        (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(arguments: Sequence[str]) -> bool:
    """Run one job to its end or its limit, print its line, and its last lines if it failed."""
    start = time.perf_counter()
    name = " ".join(arguments).replace(f"{ROOT}/", "").replace("scripts/verify/", "")
    limit = LONG_LIMIT if "--long" in arguments else LIMIT
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        process = SERVER.Process(target=execute, args=([*arguments], log.name))
        process.start()
        LIVE.add(process.pid)
        process.join(limit)
        status = process.exitcode
        end(process.pid)
        output = log.read() + (f"\nkilled after {limit} s" if status is None else "")
    took = time.perf_counter() - start
    print(f"{'FAILED' if status != 0 else 'ok':6} {took:6.1f} s  {name}", flush=True)
    if status != 0:
        print(*(f"        {line}" for line in output.splitlines()[-TAIL_LINES:]), sep="\n")
    return status == 0


def end(group: int) -> None:
    """Nothing of a job stays behind."""
    LIVE.discard(group)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def untrained(rows: list[dict]) -> list[str]:
    """What is wrong with the tiny run: too few updates, or a zone that no row was in."""
    moved = sum((row.get("param_delta") or 0) > 0 for row in rows)
    wrong = [f"only {moved} steps moved the parameters, SHOULD be 3 or more"] if moved < 3 else []
    for zone in ("retain", "absorb", "route"):
        if not any(row[f"rows_{zone}"] for row in rows):
            wrong.append(f"no row was ever in {zone.upper()}, SHOULD be some in every zone")
    return wrong


def tiny_run() -> list[bool]:
    """routeV at tiny size; then what it did, the keys that it logged, and the views of a run."""
    if not run(tiny("routeV")):
        return [False]
    folder = str(RUNS / "routeV")
    metrics = f"{folder}/metrics.jsonl"
    wrong = untrained([json.loads(line) for line in open(metrics)])
    print("FAILED" if wrong else "ok    ", "the tiny run trained, with all zones occupied", *wrong)
    after = (
        ["scripts/verify/verify_budget.py", metrics],
        ["scripts/view/show.py", folder],
        ["scripts/analysis/results.py", folder, "--out", folder],
        ["scripts/view/dyn.py", folder, "--out", folder],
    )
    return [True, not wrong, *map(run, after)]


def check_the_check() -> None:
    good = {"param_delta": 0.1, "rows_retain": 1, "rows_absorb": 2, "rows_route": 1}
    assert not untrained([good] * 3)
    assert len(untrained([dict.fromkeys(good, 0)] * 3)) == 4, "an idle run goes unnoticed"


def place(path: Path) -> int:
    return LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST)


def main() -> int:
    check_the_check()
    long = "--long" in sys.argv
    gates = sorted((ROOT / "scripts" / "verify").glob("verify_*.py"), key=place)
    jobs = [[str(path.relative_to(ROOT))] for path in gates]
    if long:
        jobs = [
            [*job, "--long"] for job, path in zip(jobs, gates) if '"--long"' in path.read_text()
        ]
    if "--arms" in sys.argv:
        named = [name for name, arm in ARMS.items() if arm.phases[-1].score not in FLAGS]
        jobs += [tiny(name) for name in named if name != "routeV"]
    start = time.perf_counter()
    os.environ.update(ENVIRONMENT)
    SERVER.set_forkserver_preload(["vgrout.train", "vgrout.organism.problems"])
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        trained = [] if long else [pool.submit(tiny_run)]
        results = [*pool.map(run, jobs)]
        results += [passed for future in trained for passed in future.result()]
    finally:  # also on Ctrl-C
        for group in [*LIVE]:
            end(group)
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(RUNS, ignore_errors=True)
    print(f"{time.perf_counter() - start:.0f} s in all")
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
