"""Run a wave: a few processes here, or the same jobs on pueue. Resumable.

A run that has finished or diverged is not run again, one that was stopped continues from its newest
checkpoint, one that fails otherwise is reported while the others go on. Ctrl-C or SIGTERM lets each
process write a checkpoint at the end of its step; a second one kills them. The compact record of a
run that ends is one more line of `data/records/<wave>.jsonl` (--commit commits it at once), and a
run that has a record there is not run again.

Run: python -m scripts.experiments.run 01_label_free [--only ROW …] [--seeds 400 …] [--workers 2]
     python -m scripts.experiments.run WAVE --dry-run | --rehearse | --commit [--records DIR]
     python -m scripts.experiments.run real --on pueue
"""

import argparse
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from scripts.experiments import pueue, records, waves
from scripts.experiments.compact import compact
from scripts.experiments.records import DIVERGED, RECORDS, ROOT
from scripts.experiments.waves import Job
from scripts.view import output

from vgrout.core import UserError, at_least, run_main
from vgrout.run.records import load_record

FINISHED = "finished"
THREAD = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def settled(job: Job) -> str:
    """How a run that is not to be run again ended; "" where it is to be run.

    UserError if the run in its directory was made with other options.
    """
    if not (job.out_dir / "record.json").exists():
        return ""
    record = load_record(job.out_dir)
    if record.status != FINISHED and not record.status.startswith(DIVERGED):
        return ""
    given = record.argv[len(job.program) :][: len(job.options)]
    if given != [*job.options]:
        words = shlex.join(given)
        raise UserError(f"{job.out_dir} was made with other options ({words}): move it away")
    return record.status


class Pool:
    """Runs jobs, `workers` at a time, each a process of one thread with its output in log.txt.

    `ended` says how each ended; `on_end` is called after a run that finished or diverged.
    """

    def __init__(self, jobs: list[Job], workers: int, on_end: Callable[[Job], object]):
        self.jobs, self.workers, self.on_end = jobs, workers, on_end
        self.live: set[subprocess.Popen] = set()
        self.ended = {job.name: status for job in jobs if (status := settled(job))}
        self.lock, self.signals = threading.Lock(), 0

    def stop(self, *_: object) -> None:
        """A signal handler: ask every process for a checkpoint; the second time, kill them."""
        self.signals += 1
        for process in [*self.live]:
            process.send_signal(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def run(self, job: Job) -> None:
        if self.signals or job.name in self.ended:
            return
        code = self.execute(job)
        status = settled(job)
        with self.lock:
            if status:
                self.on_end(job)
            elif self.signals:
                status = "interrupted"
            else:
                status = f"failed: {last_error(job)} (exit {code})"
            self.ended[job.name] = status
            print(f"{job.name}: {status}; {len(self.ended)}/{len(self.jobs)} ended", flush=True)

    def execute(self, job: Job) -> int:
        """The job's process from start to end; its exit status."""
        job.out_dir.mkdir(parents=True, exist_ok=True)
        with open(job.out_dir / "log.txt", "a") as log:
            process = subprocess.Popen(
                job.argv,
                cwd=ROOT,
                env=os.environ | THREAD,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self.live.add(process)
            if self.signals:  # it came before the process was known
                process.terminate()
            code = process.wait()
            self.live.remove(process)
        return code

    def __call__(self) -> None:
        """Run what has not ended."""
        with ThreadPoolExecutor(self.workers) as executor:
            list(executor.map(self.run, self.jobs))  # an error of this program is raised here

    def unfinished(self) -> list[str]:
        """`name: how it stands` of every run that has not finished."""
        stand = {job.name: self.ended.get(job.name, "not started") for job in self.jobs}
        return [f"{name}: {status}" for name, status in stand.items() if status != FINISHED]


def last_error(job: Job) -> str:
    """Why a run failed, in one line: its error, else the last line of its output."""
    said = (job.out_dir / "log.txt").read_text(errors="replace").splitlines() or ["no output"]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return (errors or said)[-1]


class Recorder:
    """Appends the compact records of a wave's own runs to its file, each once."""

    def __init__(self, wave: str, folder: Path, commit: bool):
        self.path, self.commit = folder / f"{wave}.jsonl", commit
        lines = [line for path in records.files(wave, folder) for line in records.read(path)]
        self.known = {(row, record.seed) for row, record in lines}

    def has(self, job: Job) -> bool:
        return job.own and (job.row.name, job.seed) in self.known

    def __call__(self, job: Job) -> None:
        if not job.own or self.has(job):
            return
        records.append(self.path, job.row.name, compact(job.out_dir))
        self.known.add((job.row.name, job.seed))
        if self.commit:
            git = ["git", "-C", str(self.path.parent)]
            message = f"Record of {self.path.stem}: {job.row.name}, seed {job.seed}"
            subprocess.run([*git, "add", self.path.name], check=True)
            subprocess.run([*git, "commit", "-qm", message, "--", self.path.name], check=True)


def only_pool(folder: Path) -> IO[str]:
    """A lock on the folder, held until it is closed: two pools would refuse each other's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".pool", "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another pool is at work in {folder}: wait, or stop it") from None
    return lock


def run_here(jobs: list[Job], workers: int, recorder: Recorder) -> int:
    """All jobs on this machine; the exit status."""
    pool = Pool(jobs, workers, recorder)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pool.stop)
    with only_pool(jobs[0].out_dir.parent):
        git = ["git", "status", "--porcelain"]
        if subprocess.run(git, cwd=ROOT, capture_output=True).stdout:
            print("WARNING uncommitted changes: every record will say so; commit first")
        pool()
    if unfinished := pool.unfinished():
        again = shlex.join(["python", *sys.argv])
        print(*unfinished, f"{len(unfinished)} runs have not finished; again: {again}", sep="\n")
    return 130 if pool.signals else bool(unfinished)


def arguments() -> argparse.Namespace:
    parser = output.parser(__doc__)
    waves.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("--commit", action="store_true", help="commit each record as its run ends")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the wave's file")
    parser.add_argument("--on", choices=("here", "pueue"), default="here")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes here")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    recorder = Recorder(options.wave, options.records, options.commit)
    jobs = [job for job in waves.jobs_of(options) if not recorder.has(job)]
    if options.dry_run:
        for job in jobs:
            print(shlex.join(pueue.command(job) if options.on == "pueue" else job.argv))
        return 0
    for job in filter(settled, jobs):  # they ended while no pool was there to record them
        recorder(job)
    jobs = [job for job in jobs if not settled(job)]
    if not jobs:
        raise UserError(f"nothing is left to run: {recorder.path} has the records")
    waves.check(jobs)
    if options.on == "pueue":
        return pueue.submit(jobs)
    return run_here(jobs, options.workers, recorder)


if __name__ == "__main__":
    sys.exit(run_main(main))
