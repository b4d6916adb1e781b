"""Run the decision run's jobs on a Ray cluster: one task a run, a GPU a task; a task whose node is lost starts again elsewhere.

The manifest is that of `queue_decision.py`. The working directory must be at the same path on every node, on a file system that
they share: the run directory there is what a task that is started again resumes from, and where the results are. A run that is
finished is not started; a run that fails by itself (bad input, a bug) is reported and not tried again. Ray is an optional extra:
uv sync --extra ray.

Run: python scripts/experiments/pool_ray.py [--dry-run] [--address auto] [--gpus 1] [--retries 5] [--arms …] [--seeds …] [--flags …]
"""

import argparse
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from scripts.experiments.manifest import ROOT, TrainJob, add_arguments, check, from_arguments

from vgrout.core import UserError, run_main

PR_SET_PDEATHSIG = 1  # prctl(2)


def finished(out_dir: Path) -> bool:
    record = out_dir / "record.json"
    return record.exists() and json.loads(record.read_text())["status"] == "finished"


def die_with_parent() -> None:
    """In the child: be killed when the Ray worker dies, so that no orphan holds the run directory's lock."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def train(argv: list[str], out_dir: str, folder: str) -> int:
    """Run one job to its end on this node; returns its exit status. Its output goes to <out_dir>/log.txt."""
    place = Path(folder) / out_dir
    if finished(place):
        return 0
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "log.txt", "a") as log:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        return subprocess.run(
            argv, cwd=folder, stdout=log, stderr=log, env=environment, preexec_fn=die_with_parent
        ).returncode


def run(jobs: list[TrainJob], folder: Path, gpus: float, retries: int) -> dict[str, int | str]:
    """All jobs on the cluster that `ray.init` has joined; returns each job's exit status, or why Ray gave it up."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=retries, retry_exceptions=False)(train)
    names = {
        task.options(name=job.name).remote(list(job.argv), job.out_dir, str(folder)): job.name
        for job in jobs
    }
    pending, ended = list(names), {}
    while pending:
        (ready,), pending = ray.wait(pending, num_returns=1)
        try:
            ended[names[ready]] = ray.get(ready)
        except ray.exceptions.RayError as error:
            last = (
                -1 if isinstance(error, ray.exceptions.RayTaskError) else 0
            )  # a traceback ends with the error
            ended[names[ready]] = f"{type(error).__name__}: {str(error).splitlines()[last]}"
        status = ended[names[ready]]
        print(
            f"{names[ready]}: {'finished' if status == 0 else status} ({len(pending)} left)",
            flush=True,
        )
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument(
        "--address",
        default="auto",
        help="of the Ray cluster (default auto: the one this node has joined)",
    )
    parser.add_argument("--gpus", type=float, default=1, help="GPUs of a task (default 1)")
    parser.add_argument(
        "--retries", type=int, default=5, help="starts after the loss of a node (default 5)"
    )
    options = parser.parse_args()
    jobs = from_arguments(options)
    if options.dry_run:
        print(*(shlex.join(job.argv) for job in jobs), sep="\n")
        return 0
    os.environ.setdefault(
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"
    )  # the tasks start this very interpreter: nothing to install
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError(
            "Ray is not installed: uv sync --extra ray, or print the commands with --dry-run"
        ) from None
    check(jobs)
    try:
        ray.init(address=options.address, log_to_driver=False)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster at {options.address!r} ({error}): start one with `ray start --head`"
        ) from None
    ended = run(jobs, ROOT, options.gpus, options.retries)
    wrong = {name: status for name, status in ended.items() if status != 0}
    print(f"{len(ended) - len(wrong)} finished, {len(wrong)} not" + (f": {wrong}" if wrong else ""))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(run_main(main))
