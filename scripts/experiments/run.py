"""Run a wave: a few processes here, or the same jobs on pueue or on a Ray cluster. Resumable.

A run that has finished or diverged is not run again, one that was stopped continues from its newest
checkpoint, one that fails otherwise is reported while the others go on. Ctrl-C or SIGTERM lets every
process write a checkpoint at the end of its step; a second one kills them. The compact record of each
run that ends is one more line of `data/records/<wave>.jsonl`; with --commit it is committed at once.

Run: python scripts/experiments/run.py decision [--all] [--only A3] [--arms routeQ …] [--seeds 101 …]
     python scripts/experiments/run.py 01_label_free --commit [--records DIR] [--workers 2]
     python scripts/experiments/run.py WAVE --dry-run | --rehearse | --compact
     python scripts/experiments/run.py real --on pueue [--group NAME]
     python scripts/experiments/run.py real --on ray [--address auto] [--gpus 1] [--retries 5]
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
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from scripts.analysis.results import compact
from scripts.experiments import pueue, ray_pool, records, waves
from scripts.experiments.records import DIVERGED, RECORDS, ROOT
from scripts.experiments.waves import Job

from vgrout.core import UserError
from vgrout.entry import at_least, run_main
from vgrout.run.records import load_metrics, load_record

PROGRESS_SECONDS = 60
FINISHED, STOPPED = "finished", "interrupted"
NOT_STARTED = "not started"


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
        raise UserError(
            f"{job.out_dir} was made with other options ({shlex.join(given)}): move it away"
        )
    return record.status


class Pool:
    """Runs jobs, `workers` at a time, each a process of one thread with its output in log.txt.

    `ended` says how each ended; `on_end` is called after each run that finished or diverged.
    """

    def __init__(self, jobs: list[Job], workers: int, on_end: Callable[[Job], object]):
        self.jobs, self.workers, self.on_end, self.signals = jobs, workers, on_end, 0
        self.live: dict[str, subprocess.Popen] = {}
        self.ended = {job.name: status for job in jobs if (status := settled(job))}
        self.before, self.lock = len(self.ended), threading.Lock()

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
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
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
        failure = STOPPED if self.signals else f"failed: {last_error(job)} (exit {code})"
        self.ended[job.name] = status or failure

    def __call__(self, every: float = PROGRESS_SECONDS, say: Callable[[str], object] = print):
        """Run what has not ended; say how far it is, now and then and whenever a run ends."""
        told, due = set(self.ended), 0.0
        with ThreadPoolExecutor(self.workers) as executor:
            todo = [job for job in self.jobs if job.name not in self.ended]
            pending = {executor.submit(self.run, job) for job in todo}
            while pending:
                done, pending = wait(pending, timeout=0.2)
                for future in done:
                    future.result()  # an error of this program itself is raised here
                news = [name for name in self.ended if name not in told]
                for name in news:
                    say(f"{name}: {self.ended[name]}")
                told.update(news)
                if news or time.monotonic() >= due:
                    due = time.monotonic() + every
                    say(self.progress())

    def count(self) -> int:
        return list(self.ended.values()).count(FINISHED)

    def progress(self) -> str:
        running = [f"{j.name} (step {steps_done(j)})" for j in self.jobs if j.name in self.live]
        parts = [f"{self.count()}/{len(self.jobs)} finished"]
        if failed := len(self.ended) - self.count():
            parts.append(f"{failed} not")
        if running:
            parts.append(("stopping: " if self.signals else "running: ") + ", ".join(running))
        if minutes := self.minutes_left():
            parts.append(f"about {minutes:.0f} min left")
        return f"{time.strftime('%H:%M:%S')}  " + " · ".join(parts)

    def minutes_left(self) -> float | None:
        """From the mean time of the finished runs; None while nothing has finished."""
        finished = [job for job in self.jobs if self.ended.get(job.name) == FINISHED]
        if not finished or self.signals:
            return None
        spent = [sum(load_record(job.out_dir).seconds.values()) for job in finished]
        left = len(self.jobs) - len(self.ended)
        return left * sum(spent) / len(spent) / self.workers / 60

    def summary(self) -> str:
        """What ran and what did not."""
        status = {job.name: self.ended.get(job.name, NOT_STARTED) for job in self.jobs}
        lines = [
            f"{self.count()} of {len(self.jobs)} runs are finished, {self.before} of them before"
        ]
        lines += [f"{name}: {how}" for name, how in status.items() if how.startswith("failed")]
        for kind in (STOPPED, NOT_STARTED):
            if names := [name for name, how in status.items() if how == kind]:
                lines.append(f"{kind}: {' '.join(names)}")
        if self.count() < len(self.jobs):
            lines.append(f"go on with: {shlex.join(['python', *sys.argv])}")
        return "\n".join(lines)


def last_error(job: Job) -> str:
    """Why a run failed, in one line: its error, else the last line of its output."""
    said = (job.out_dir / "log.txt").read_text(errors="replace").splitlines() or ["no output"]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return (errors or said)[-1]


def steps_done(job: Job) -> int:
    return len(load_metrics(job.out_dir))


class Recorder:
    """Appends the compact records of a wave's own runs to its file, each once."""

    def __init__(self, wave: str, folder: Path, commit: bool):
        self.commit, self.path = commit, folder / f"{wave}.jsonl"
        files = records.decision_files(folder) if wave == "decision" else [self.path]
        if wave == "decision":
            self.path = folder / "decision_later.jsonl"
        runs, lost = records.load(path for path in files if path.exists())
        found = {row: {*runs.get(row, ()), *lost.get(row, ())} for row in {*runs, *lost}}
        self.known = {(row, seed) for row, seeds in found.items() for seed in seeds}

    def __call__(self, job: Job) -> bool:
        """True where a line was added."""
        if not job.own or (job.row.name, job.seed) in self.known:
            return False
        with tempfile.TemporaryDirectory() as folder:
            record = compact(job.out_dir, Path(folder) / "record.json")
        records.append(self.path, job.row.name, record)
        self.known.add((job.row.name, job.seed))
        if self.commit:
            git = ["git", "-C", str(self.path.parent)]
            message = f"Record: {job.row.name}, seed {job.seed}"
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
        changed = ["git", "status", "--porcelain"]
        if subprocess.run(changed, cwd=ROOT, capture_output=True, text=True).stdout:
            print("WARNING uncommitted changes: every record will say so; commit first")
        pool(say=lambda line: print(line, flush=True))
    print(pool.summary())
    return 130 if pool.signals else int(pool.count() < len(jobs))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    waves.add_arguments(parser)
    parser.add_argument("--on", choices=("here", "pueue", "ray"), default="here")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes here")
    parser.add_argument("--missing", action="store_true", help="only runs without a record")
    parser.add_argument("--dry-run", action="store_true", help="print commands, start nothing")
    parser.add_argument("--compact", action="store_true", help="only record what has ended")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the wave's file")
    parser.add_argument("--commit", action="store_true", help="commit each record as its run ends")
    parser.add_argument("--group", default="", help="pueue: its group")
    parser.add_argument("--address", default="auto", help="ray: of the cluster")
    parser.add_argument("--gpus", type=float, default=1, help="ray: GPUs of a task")
    parser.add_argument("--retries", type=int, default=5, help="ray: starts after a lost node")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    jobs = waves.jobs_of(options)
    recorder = Recorder(options.wave, options.records, options.commit)
    if options.missing:
        jobs = [job for job in jobs if (job.row.name, job.seed) not in recorder.known]
    if options.dry_run:
        show = pueue.command if options.on == "pueue" else lambda job, _: job.argv
        print(*(shlex.join(show(job, options.group)) for job in jobs), sep="\n")
        return 0
    if options.compact:
        added = sum(recorder(job) for job in jobs if settled(job))
        print(f"{added} records added to {recorder.path}")
        return 0
    waves.check(jobs)
    if options.on == "pueue":
        return pueue.submit(jobs, options.group)
    if options.on == "ray":
        return ray_pool.submit(jobs, options.address, options.gpus, options.retries)
    return run_here(jobs, options.workers, recorder)


if __name__ == "__main__":
    sys.exit(run_main(main))
