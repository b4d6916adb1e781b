"""Run a wave: a few processes here, or the same jobs on pueue or on a Ray cluster. Resumable.

A run that has finished or diverged is not run again, one that was stopped continues from its newest
checkpoint, one that fails otherwise is reported while the others go on. Ctrl-C or SIGTERM lets each
process write a checkpoint at the end of its step; a second one kills them. The compact record of a
run that ends is one more line of `data/records/<wave>.jsonl`; --commit commits it at once.

Run: python scripts/experiments/run.py decision [--all] [--only A3 routeQ …] [--seeds 101 …]
     python scripts/experiments/run.py 01_label_free --commit [--records DIR] [--workers 2]
     python scripts/experiments/run.py WAVE --dry-run | --rehearse | --compact | --missing
     python scripts/experiments/run.py real --on pueue | ray [--gpus 1] [--retries 5]
"""

import argparse
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from scripts.analysis.results import compact
from scripts.experiments import pueue, ray_pool, records, waves
from scripts.experiments.records import DIVERGED, RECORDS, ROOT
from scripts.experiments.waves import Job

from vgrout.core import UserError, at_least, run_main
from vgrout.run.records import load_metrics, load_record

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
        self.live: dict[str, subprocess.Popen] = {}
        self.ended = {job.name: status for job in jobs if (status := settled(job))}
        self.lock, self.signals = threading.Lock(), 0

    def stop(self, *_: object) -> None:
        """A signal handler: ask every process for a checkpoint; the second time, kill them."""
        self.signals += 1
        for process in list(self.live.values()):
            process.send_signal(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def run(self, job: Job) -> None:
        if self.signals:
            return
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
            self.live[job.name] = process
            if self.signals:  # it came between the question above and here
                process.terminate()
            code = process.wait()
        del self.live[job.name]
        status = settled(job)
        if status:
            with self.lock:
                self.on_end(job)
        elif self.signals:
            status = "interrupted"
        self.ended[job.name] = status or f"failed: {last_error(job)} (exit {code})"

    def __call__(self, every: float = 60.0, say: Callable[[str], object] = print) -> None:
        """Run what has not ended; say how far it is, every so many seconds and after each run."""
        todo = [job for job in self.jobs if job.name not in self.ended]
        with ThreadPoolExecutor(self.workers) as executor:
            pending = {executor.submit(self.run, job): job for job in todo}
            while pending:
                done, _ = wait(pending, every, FIRST_COMPLETED)
                for future in done:
                    future.result()  # an error of this program itself is raised here
                    name = pending.pop(future).name
                    say(f"{name}: {self.status(name)}")
                say(self.progress())

    def status(self, name: str) -> str:
        return self.ended.get(name, "not started")

    def progress(self) -> str:
        count = list(self.ended.values()).count(FINISHED)
        live = [job for job in self.jobs if job.name in self.live]
        running = [f"{job.name} (step {len(load_metrics(job.out_dir))})" for job in live]
        doing = "stopping" if self.signals else "running"
        return (
            f"{time.strftime('%H:%M:%S')}  {count}/{len(self.jobs)} finished, "
            f"{len(self.ended) - count} not; {doing}: {', '.join(running) or 'nothing'}"
        )

    def unfinished(self) -> list[str]:
        """`name: how it stands` of every run that has not finished."""
        stand = [(job.name, self.status(job.name)) for job in self.jobs]
        return [f"{name}: {status}" for name, status in stand if status != FINISHED]


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

    def __call__(self, job: Job) -> bool:
        """True where a line was added."""
        key = job.row.name, job.seed
        if not job.own or key in self.known:
            return False
        with tempfile.TemporaryDirectory() as folder:
            record = compact(job.out_dir, Path(folder) / "record.json")
        records.append(self.path, job.row.name, record)
        self.known.add(key)
        if self.commit:
            git = ["git", "-C", str(self.path.parent)]
            message = f"Record of {self.path.stem}: {job.row.name}, seed {job.seed}"
            subprocess.run([*git, "add", self.path.name], check=True)
            subprocess.run([*git, "commit", "-qm", message, "--", self.path.name], check=True)
        return True


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
        pool(say=lambda line: print(line, flush=True))
    unfinished = pool.unfinished()
    print(*unfinished, f"{len(jobs) - len(unfinished)} of {len(jobs)} runs are finished", sep="\n")
    if unfinished:
        print(f"go on with: {shlex.join(['python', *sys.argv])}")
    return 130 if pool.signals else bool(unfinished)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    waves.add_arguments(parser)
    for flag, what in (
        ("--dry-run", "print the commands, start nothing"),
        ("--missing", "only runs without a record"),
        ("--compact", "only record what has ended"),
        ("--commit", "commit each record as its run ends"),
    ):
        parser.add_argument(flag, action="store_true", help=what)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the wave's file")
    parser.add_argument("--on", choices=("here", "pueue", "ray"), default="here")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes here")
    parser.add_argument("--gpus", type=float, default=1, help="ray: GPUs of a task")
    parser.add_argument("--retries", type=int, default=5, help="ray: starts after a lost node")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    jobs = waves.jobs_of(options)
    recorder = Recorder(options.wave, options.records, options.commit)
    if options.missing:
        jobs = [job for job in jobs if (job.row.name, job.seed) not in recorder.known]
    if not jobs:
        raise UserError("no run is left: --all, --only and --seeds choose, --missing leaves out")
    if options.dry_run:
        show = pueue.command if options.on == "pueue" else lambda job: job.argv
        print(*(shlex.join(show(job)) for job in jobs), sep="\n")
        return 0
    if options.compact:
        print(f"{sum(recorder(job) for job in jobs if settled(job))} records added")
        return 0
    waves.check(jobs)
    if options.on == "pueue":
        return pueue.submit(jobs)
    if options.on == "ray":
        return ray_pool.submit(jobs, options.gpus, options.retries)
    return run_here(jobs, options.workers, recorder)


if __name__ == "__main__":
    sys.exit(run_main(main))
