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
    page = "https://github.com/Nukesor/pueue"
    if shutil.which("pueue") is None:
        raise UserError(f"pueue is not installed: see {page}, or use --dry-run")
    for number, job in enumerate(jobs):
        done = subprocess.run(command(job), capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr or done.stdout or "no message").strip().splitlines()[-1]
            refused = f"pueue refused {job.name} after {number} jobs"
            raise UserError(f"{refused} ({last}): is pueued running?")
        print(f"queued {job.name}: {job.label}")
    how = "`pueue status` lists them, `pueue follow ID` shows one's output"
    print(f"{len(jobs)} jobs queued: {how}")
    return 0
