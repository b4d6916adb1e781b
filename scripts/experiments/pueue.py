"""A wave's jobs on pueue (https://github.com/Nukesor/pueue), a queue that survives the terminal.

Each job is labelled with why it is run and what would resolve the question. A job that was stopped
goes on with `pueue restart --in-place ID`, from its newest checkpoint.
"""

import shutil
import subprocess

from scripts.experiments.records import ROOT
from scripts.experiments.waves import Job

from vgrout.core import UserError


def command(job: Job) -> list[str]:
    """The `pueue add` of a job; --escape keeps every argument whole through pueue's shell."""
    place = ["--working-directory", str(ROOT)]
    return ["pueue", "add", "--escape", *place, "--label", job.label, "--", *job.argv]


def submit(jobs: list[Job]) -> int:
    """Queue every job; UserError where there is no pueue, or it refuses one."""
    if shutil.which("pueue") is None:
        raise UserError(
            "pueue is not installed: see https://github.com/Nukesor/pueue, or use --dry-run"
        )
    for number, job in enumerate(jobs):
        done = subprocess.run(command(job), capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise UserError(
                f"pueue refused {job.name} after {number} jobs ({said[-1]}): is pueued running?"
            )
        print(f"queued {job.name}: {job.label}")
    print(
        f"{len(jobs)} jobs queued: `pueue status` lists them, `pueue follow ID` shows one's output"
    )
    return 0
