"""A wave's jobs on a Ray cluster: a task a run; one whose node is lost starts again elsewhere.

The working directory must be at the same path on every node, on a file system that they share: a
task that is started again resumes from the run directory there. A run that fails by itself (bad
input, a bug) is reported and not tried again. Ray is an optional extra: uv sync --extra ray.
"""

import ctypes
import os
import signal
import subprocess
from pathlib import Path

from scripts.experiments.records import ROOT
from scripts.experiments.waves import Job

from vgrout.core import UserError

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """In the child: be killed when the Ray worker dies, so that no orphan holds the run's lock."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def train(argv: list[str], out_dir: str, folder: str) -> int:
    """Run one job to its end on this node, with its output in log.txt; returns its exit status."""
    place = Path(folder) / out_dir
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "log.txt", "a") as log:
        return subprocess.run(
            argv,
            cwd=folder,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            preexec_fn=die_with_parent,
        ).returncode


def run(jobs: list[Job], gpus: float, retries: int) -> dict[str, int | str]:
    """All jobs on the cluster that was joined: the exit status of each, or why Ray gave it up."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=retries, retry_exceptions=False)(train)
    names = {}
    for job in jobs:
        started = task.options(name=job.name).remote(job.argv, str(job.out_dir), str(ROOT))
        names[started] = job.name
    pending = list(names)
    ended: dict[str, int | str] = {}
    while pending:
        (ready,), pending = ray.wait(pending, num_returns=1)
        try:
            status = ray.get(ready)
        except ray.exceptions.RayError as error:
            status = f"{type(error).__name__}: {str(error).splitlines()[-1]}"
        ended[names[ready]] = status
        print(f"{names[ready]}: {status or 'finished'} ({len(pending)} left)", flush=True)
    return ended


def submit(jobs: list[Job], gpus: float, retries: int) -> int:
    """Run every job to its end; UserError where there is no Ray, or no cluster."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # tasks start this interpreter
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("Ray is not installed: uv sync --extra ray, or use --dry-run") from None
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster ({error}): start one with `ray start --head`, or set RAY_ADDRESS"
        ) from None
    ended = run(jobs, gpus, retries)
    wrong = {name: status for name, status in ended.items() if status != 0}
    print(f"{len(ended) - len(wrong)} finished, {len(wrong)} not" + (f": {wrong}" if wrong else ""))
    return int(bool(wrong))
