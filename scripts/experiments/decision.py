"""Run the decision experiment: every row of decision_manifest.py on its seeds, a few processes at a time, resumably.

A run that has finished or diverged is not run again, one that was killed or interrupted continues from its newest checkpoint, and
one that fails otherwise is reported while the others go on. Ctrl-C or SIGTERM lets every running process write a checkpoint at the
end of its step; a second one kills them. (kill -9 of this program alone leaves its processes to finish their runs.) When nothing is
left to do, the records of runs that have ended are compacted into docs/results/decision/; not before, because a changed tree would
mark the later runs as dirty.

Run: python scripts/experiments/decision.py [--all] [--only A3 M] [--arms routeQ …] [--seeds 101 …] [--workers 2] [--dry-run]
     python scripts/experiments/decision.py --all --missing           (only runs that have no committed compact record)
     python scripts/experiments/decision.py --compact                 (compact what has finished, and run nothing)
     python scripts/experiments/decision.py --rehearse --all          (two steps of every row, into out/rehearsal: does each command run?)
"""

import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from scripts.analysis.results import compact
from scripts.experiments.decision_manifest import (
    ARTIFACTS,
    RECORDS,
    ROOT,
    Job,
    choose,
    differs,
    jobs_of,
)

from vgrout.core import UserError, run_main
from vgrout.run.records import load_metrics, load_record

PROGRESS_SECONDS = 60
FINISHED, STOPPED, DIVERGED = "finished", "interrupted", "failed: diverged"


class Pool:
    """Runs jobs, `workers` at a time, each in a process of one thread with its output in log.txt. `ended` says how each ended."""

    def __init__(self, jobs: list[Job], workers: int):
        self.jobs, self.workers, self.signals = jobs, workers, 0
        self.live: dict[str, subprocess.Popen] = {}
        self.ended: dict[str, str] = {job.name: status for job in jobs if (status := settled(job))}
        self.before = len(self.ended)

    def stop(self, *_: object) -> None:
        """A signal handler: ask every process for a checkpoint; the second time, kill them."""
        self.signals += 1
        for process in list(self.live.values()):
            process.send_signal(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def run(self, job: Job) -> None:
        if self.signals:
            return
        job.out_dir.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(job.out_dir / "log.txt", "a") as log:
            process = subprocess.Popen(job.argv, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                       start_new_session=True)  # fmt: skip
            self.live[job.name] = process
            if self.signals:  # it came between the question above and here
                process.terminate()
            code = process.wait()
        del self.live[job.name]
        self.ended[job.name] = settled(job) or (
            STOPPED if self.signals else f"failed: {reason(job, code)}"
        )

    def __call__(
        self,
        every: float = PROGRESS_SECONDS,
        say: Callable[[str], object] = lambda line: print(line, flush=True),
    ) -> None:
        """Run what has not finished, and say how far it is, now and then and whenever a run ends."""
        with ThreadPoolExecutor(self.workers) as executor:
            pending = {
                executor.submit(self.run, job) for job in self.jobs if job.name not in self.ended
            }
            shown, known, due = -1, set(self.ended), 0.0
            while pending:
                done, pending = wait(pending, timeout=0.2)
                [
                    future.result() for future in done
                ]  # an error of this program itself is raised here
                for name in [name for name in self.ended if name not in known]:
                    say(f"{name}: {self.ended[name]}")
                    known.add(name)
                if len(known) != shown or time.monotonic() >= due:
                    shown, due = len(known), time.monotonic() + every
                    say(self.progress())

    def progress(self) -> str:
        count = sum(status == FINISHED for status in self.ended.values())
        failed = len(self.ended) - count
        running = [
            f"{job.name} ({steps_done(job)}/{job.steps})"
            for job in self.jobs
            if job.name in self.live
        ]
        parts = [f"{count}/{len(self.jobs)} finished" + (f", {failed} not" if failed else "")]
        parts += (
            [("stopping: " if self.signals else "running: ") + ", ".join(running)]
            if running
            else []
        )
        left = seconds_left(self.jobs, self.ended, self.workers)
        parts += (
            []
            if self.signals
            else ["time left: known after the first run"]
            if left is None
            else [f"about {left / 60:.0f} min left"]
        )
        return f"{time.strftime('%H:%M:%S')}  " + " · ".join(parts)


def settled(job: Job) -> str | None:
    """How a run that is not to be run again has ended: finished, or diverged. UserError if its row has other options now."""
    path = job.out_dir / "record.json"
    status = json.loads(path.read_text())["status"] if path.exists() else ""
    if status != FINISHED and not status.startswith(DIVERGED):
        return None
    if job.config and (changed := differs(job.config, load_record(path))):
        raise UserError(
            f"{job.out_dir} was made with other options ({'; '.join(changed)}): move it away, or give its row another name"
        )
    return status


def reason(job: Job, code: int) -> str:
    """Why a run failed, in one line: its error, else the last line of its output."""
    lines = (job.out_dir / "log.txt").read_text(errors="replace").splitlines() or ["no output"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{(errors or lines)[-1]} (exit {code})"


def steps_done(job: Job) -> int:
    return len(load_metrics(job.out_dir))


def seconds_left(jobs: list[Job], ended: dict[str, str], workers: int) -> float | None:
    """From the seconds a step of the finished runs, of the same arm where there are any; None while nothing has finished."""
    paces: dict[str, list[float]] = {}
    for job in jobs:
        if ended.get(job.name) == FINISHED:
            record = load_record(job.out_dir)
            paces.setdefault(job.arm, []).append(sum(record.seconds.values()) / record.steps_done)
    if not paces:
        return None
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    usual = mean([mean(values) for values in paces.values()])
    left = [
        (job.steps - steps_done(job)) * mean(paces.get(job.arm, [usual]))
        for job in jobs
        if job.name not in ended
    ]
    return max([sum(left) / workers, *left, 0.0])


def compact_all(jobs: list[Job]) -> int:
    """Write the compact record of each run of its row's own seeds that has ended; returns their number."""
    own = [job for job in jobs if job.own and settled(job)]
    for job in own:
        compact(job.out_dir, RECORDS / f"{job.name}.json")
    return len(own)


def summary(pool: Pool) -> str:
    """What ran and what did not."""
    names = lambda wanted: [
        job.name for job in pool.jobs if wanted(pool.ended.get(job.name, "not started"))
    ]
    lines = [
        f"{len(names(lambda s: s == FINISHED))} of {len(pool.jobs)} runs are finished; {pool.before} had ended before"
    ]
    lines += [f"{name}: {pool.ended[name]}" for name in names(lambda s: s.startswith("failed"))]
    for status in (STOPPED, "not started"):
        if listed := names(lambda s, status=status: s == status):
            lines.append(f"{status}: {' '.join(listed)}")
    if len(names(lambda s: s == FINISHED)) < len(pool.jobs):
        lines.append(f"go on with: {shlex.join(['python', *sys.argv])}")
    return "\n".join(lines)


def only_pool(folder: Path) -> IO[str]:
    """A lock on the folder, held until it is closed: two pools would refuse each other's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".pool", "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"another `just decision` is at work in {folder}: wait for it, or stop it with Ctrl-C"
        ) from None
    return lock


def warn_if_dirty() -> None:
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    if changed:
        print(
            f"WARNING {len(changed)} uncommitted changes: every record will say so; commit first, or accept the remark in tables",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every row (default: the headline's)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="A",
        help=f"rows that serve an artifact: {' '.join(ARTIFACTS)}",
    )
    parser.add_argument(
        "--arms", nargs="+", default=[], metavar="NAME", help="rows of these names or arms"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[],
        help="some of a row's seeds; others than a row's are development",
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="leave out runs whose compact record is committed already",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the commands and what is finished; start nothing",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="two steps of each run, into out/rehearsal"
    )
    parser.add_argument("--compact", action="store_true", help="only compact what has finished")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.workers < 1:
        raise UserError(f"--workers {options.workers} must be at least 1")
    jobs = jobs_of(choose(options), options.seeds, options.rehearse)
    if options.missing:
        jobs = [job for job in jobs if not (RECORDS / f"{job.name}.json").exists() or settled(job)]
    if not jobs:
        raise UserError(
            "no row is left: --all, --only and --arms choose rows, --seeds some of their seeds"
        )
    if options.dry_run:
        print(
            *(f"{'ended ' if settled(job) else 'to run'}  {shlex.join(job.argv)}" for job in jobs),
            sep="\n",
        )
        return 0
    if not options.compact:
        pool = Pool(jobs, options.workers)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pool.stop)
        with only_pool(jobs[0].out_dir.parent):
            warn_if_dirty()
            pool()
        print(summary(pool))
        if pool.signals:
            return 130
    if not options.rehearse:
        print(
            f"{compact_all(jobs)} compact records in {RECORDS.relative_to(ROOT)}; `just artifacts` makes tables and figures of them"
        )
    return 0 if options.compact else int(any(status != FINISHED for status in pool.ended.values()))


if __name__ == "__main__":
    sys.exit(run_main(main))
