"""Queue the decision run on pueue: arms × seeds, each job labelled with why it is run and what would resolve the question.

pueue (https://github.com/Nukesor/pueue) runs a queue of commands one after another and survives the terminal. A job that was
stopped is continued with `pueue restart --in-place ID`. Nothing is queued if any job's command line or input would be refused.

Run: python scripts/experiments/queue_decision.py [--dry-run] [--arms …] [--seeds …] [--preset full] [--flags "--steps 20"] [--group NAME]
"""

import argparse
import shlex
import shutil
import subprocess

from scripts.experiments.manifest import ROOT, TrainJob, add_arguments, check, from_arguments

from vgrout.core import UserError, run_main


def command(job: TrainJob, group: str) -> list[str]:
    """The `pueue add` that queues a job; --escape keeps every argument whole through pueue's shell."""
    place = ["--working-directory", str(ROOT), *(["--group", group] if group else [])]
    return ["pueue", "add", "--escape", *place, "--label", job.label, "--", *job.argv]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--group", default="", help="pueue group (default: pueue's own)")
    options = parser.parse_args()
    jobs = from_arguments(options)
    if options.dry_run:
        print(*(shlex.join(command(job, options.group)) for job in jobs), sep="\n")
        return
    if shutil.which("pueue") is None:
        raise UserError(
            "pueue is not installed: see https://github.com/Nukesor/pueue, or print the commands with --dry-run"
        )
    check(jobs)
    for number, job in enumerate(jobs):
        done = subprocess.run(command(job, options.group), capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise UserError(
                f"pueue refused {job.name} after {number} jobs ({said[-1]}): is pueued running?"
            )
        print(f"queued {job.name}: {job.label}")
    print(
        f"{len(jobs)} jobs queued; watch them with `pueue status`, then `just results {' '.join(j.out_dir for j in jobs[:1])} …`"
    )


if __name__ == "__main__":
    run_main(main)
