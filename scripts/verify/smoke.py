"""The gate before every run: all scripts/verify/verify_*.py and a tiny routeV run, two at a time, with shapes checked.

The tiny run goes through the real pipeline with teacher rows; at least three of its steps must move the parameters and
every zone must be occupied. The last line is `N passed, M failed`; the exit status is 1 if M > 0.

Importing torch and transformers costs seconds a process, so the jobs are forks of one server that has imported them once; the
scripts of FRESH check what is imported when, and get an interpreter of their own.

Run: python scripts/verify/smoke.py [--arms] [--long]     (--arms: every arm, tiny, but those with a live monitor, which
verify_monitors.py runs; --long: the long forms alone)
"""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vgrout.config import ARMS

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "out" / f"smoke_{os.getpid()}"
ENVIRONMENT = os.environ | {"BEARTYPE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
AT_ONCE, TAIL_LINES, LIMIT = 2, 40, 300
FRESH = {"verify_errors.py", "verify_budget.py", "verify_sandbox.py"}
SERVER = multiprocessing.get_context("forkserver")
LIVE: set[int] = set()  # process groups of running jobs


@dataclass(frozen=True)
class Job:
    name: str
    command: list[str]
    limit: float  # seconds; a job that hangs has failed


def tiny(arm: str) -> Job:
    run = [sys.executable, "-m", "vgrout.train", "smoke", "--intervention", arm]
    run += (
        ["--quarantine-first", "1"] if "quarantine_first" in ARMS[arm].options else []
    )  # of six steps
    return Job(
        f"train smoke {arm}", [*run, "--out-dir", str((RUNS / arm).relative_to(ROOT))], LIMIT
    )


def script(path: Path, *arguments: str) -> Job:
    name = " ".join([path.name, *arguments]).replace(f"{RUNS}/", "")
    return Job(
        name,
        [sys.executable, str(path.relative_to(ROOT)), *arguments],
        7200 if "--long" in arguments else LIMIT,
    )


def execute(arguments: list[str], output: str) -> None:
    """A job's body, in a fork of the server: `script.py …` or `-m module …`, its output in a file."""
    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdin = open(os.devnull)
    os.chdir(ROOT)
    module = arguments[0] == "-m"
    sys.argv = arguments[module:]
    sys.path[0] = str(ROOT)
    try:
        (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush(), sys.stderr.flush()


def status_of(job: Job, output: str) -> int | None:
    """Run a job to its end; its exit status, None if it was killed at its limit."""
    if Path(job.command[1]).name in FRESH:
        with open(output, "w") as log:
            process = subprocess.Popen(job.command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                       start_new_session=True)  # fmt: skip
        wait = lambda: process.wait(job.limit)  # noqa: E731
    else:
        process = SERVER.Process(target=execute, args=(job.command[1:], output))
        process.start()
        wait = lambda: process.join(job.limit)  # noqa: E731
    LIVE.add(process.pid)
    try:
        wait()
    except subprocess.TimeoutExpired:
        pass
    status = process.exitcode if hasattr(process, "exitcode") else process.returncode
    if status is None:
        os.killpg(process.pid, signal.SIGKILL)
    LIVE.discard(process.pid)
    return status


def run(job: Job) -> bool:
    """Run one job to its end or its limit, print its line, and its last lines if it failed."""
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        status = status_of(job, log.name)
        output = log.read() + (f"\nkilled after {job.limit:.0f} s" if status is None else "")
    print(
        f"{'ok' if status == 0 else 'FAILED':6} {time.perf_counter() - start:6.1f} s  {job.name}",
        flush=True,
    )
    if status != 0:
        print(
            *(f"        {line}" for line in output.splitlines()[-TAIL_LINES:]), sep="\n", flush=True
        )
    return status == 0


def really_trained(rows: list[dict]) -> list[str]:
    """Return what is wrong with the tiny routeV run: too few updates, or a zone that no row was in."""
    moved = sum((row.get("param_delta") or 0) > 0 for row in rows)
    wrong = [f"only {moved} steps moved the parameters, SHOULD be 3 or more"] if moved < 3 else []
    for zone in ("retain", "absorb", "route"):
        if sum(row[f"rows_{zone}"] for row in rows) == 0:
            wrong.append(f"no row was ever in {zone.upper()}, SHOULD be some in every zone")
    return wrong


def checked_tiny_run() -> list[bool]:
    """Run routeV at tiny size; then check what it did, and that the keys that it logged are defined."""
    if not run(tiny("routeV")):
        return [False]
    metrics = RUNS / "routeV" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    wrong = really_trained(rows)
    print(
        f"{'FAILED' if wrong else 'ok':6}          the tiny run trained, with all zones occupied",
        *wrong,
        sep="\n        ",
    )
    folder = str(metrics.parent)
    after = [
        script(ROOT / "scripts/verify/verify_budget.py", str(metrics)),
        script(ROOT / "scripts/view/show.py", folder),
    ]
    after += [
        script(ROOT / "scripts" / name, folder, "--out", folder)
        for name in ("analysis/results.py", "view/dyn.py")
    ]
    return [True, not wrong, *map(run, after)]


def check_the_check() -> None:
    good = [{"param_delta": 0.1, "rows_retain": 1, "rows_absorb": 2, "rows_route": 1}] * 3
    assert not really_trained(good)
    for mutation in ({"param_delta": 0.0}, {"rows_route": 0}, {"rows_absorb": 0}):
        assert really_trained([good[0] | mutation] * 3), f"the check misses {mutation}"


def main() -> int:
    check_the_check()
    scripts = sorted((ROOT / "scripts" / "verify").glob("verify_*.py"))
    if "--long" in sys.argv:
        jobs = [script(path, "--long") for path in scripts if '"--long"' in path.read_text()]
    else:
        jobs = [script(path) for path in scripts]
    if "--arms" in sys.argv:
        jobs += [tiny(name) for name, arm in ARMS.items() if name != "routeV" and not arm.monitor]
    start = time.perf_counter()
    os.environ.update(ENVIRONMENT)
    SERVER.set_forkserver_preload(["vgrout.train", "vgrout.organism.problems"])
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        trained = (
            [] if "--long" in sys.argv else [pool.submit(checked_tiny_run)]
        )  # the longest job first
        results = list(pool.map(run, jobs)) + [
            passed for future in trained for passed in future.result()
        ]
    finally:  # also on Ctrl-C: nothing stays behind
        for group in list(LIVE):
            os.killpg(group, signal.SIGKILL)
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(RUNS, ignore_errors=True)
    print(f"{time.perf_counter() - start:.0f} s in all")
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
