"""The decision run as data: arms × seeds → jobs. `queue_decision.py` (pueue) and `pool_ray.py` (Ray) run the same list.

Every job trains one arm at one seed into a directory of its own and carries --resume, so that a job that is started again
continues from its newest checkpoint. The five arms: the method, its placebo, no quarantine, no gate, and the likelihood-ratio
score. `absorb` evaluated as trained is plain GRPO at full rank (docs/method.md), so that C1 needs no sixth arm; gains need the
ceiling `no_loophole` among --arms, too.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from vgrout.cli import parse
from vgrout.config import ARMS
from vgrout.core import UserError

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (51, 52, 53)  # fresh: development uses 41 to 43
WHY = {  # arm → (why it is run, what would resolve the question)
    "routeV": (
        "C1 and C2: does routing by v_grad lower the deployed hack rate, on modes without pairs too, at a matched solve rate",
        "deployed hack at least 0.30 below absorb as trained, and solve no worse by 0.03, over seeds",
    ),
    "placebo": (
        "C3: does it need the direction; Haar-random, same machinery, cadence and routed share",
        "routeV deploys a lower hack rate than placebo in a paired test over seeds; else the direction is not the cause",
    ),
    "none": (
        "structure-matched control: rank r alone trains",
        "its hack rate emerges as plain GRPO's does; else capacity explains a low hack rate",
    ),
    "absorb": (
        "no gate: what ablating one of two blocks trained alike removes; as trained it is plain GRPO at rank 2r",
        "routeV must deploy less hack than absorb; else the gate adds nothing",
    ),
    "routeL": (
        "the likelihood-ratio score in place of the c-probe cosine",
        "held-out modes' deployed hack against routeV over the same seeds",
    ),
}


@dataclass(frozen=True)
class TrainJob:
    """One training run: how to start it, where it writes, and the question that it is for."""

    name: str
    argv: tuple[str, ...]
    out_dir: str
    why: str
    resolve: str

    @property
    def label(self) -> str:
        return f"why: {self.why}. resolve: {self.resolve}."


def decision(
    arms: list[str], seeds: list[int], preset: str = "full", extra: tuple[str, ...] = ()
) -> list[TrainJob]:
    """One job for each seed and arm, seed by seed, so that a first full comparison is there early."""
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"unknown arm {unknown[0]!r}: --arms takes some of {', '.join(ARMS)}")
    jobs = []
    for seed in seeds:
        for arm in arms:
            out_dir = f"out/runs/decision_{preset}_{arm}_s{seed}"
            why, resolve = WHY.get(arm, (f"{arm}, named by hand", "see docs/method.md"))
            argv = (
                sys.executable,
                "-m",
                "vgrout.train",
                preset,
                "--intervention",
                arm,
                "--seed",
                str(seed),
            )
            jobs.append(
                TrainJob(
                    f"{arm} s{seed}",
                    (*argv, *extra, "--out-dir", out_dir, "--resume"),
                    out_dir,
                    why,
                    resolve,
                )
            )
    return jobs


def check(jobs: list[TrainJob]) -> None:
    """Refuse a job whose command line training would refuse, before any is queued: UserError."""
    for job in jobs:
        parse(job.argv[3:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that both runners share."""
    parser.add_argument("--arms", nargs="+", default=list(WHY), help=f"default: {' '.join(WHY)}")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(SEEDS),
        help=f"default: {' '.join(map(str, SEEDS))}",
    )
    parser.add_argument("--preset", default="full", help="default: full (Qwen3-4B, 200 steps)")
    parser.add_argument(
        "--flags", default="", help="more training flags of every job, in one string"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands and start nothing"
    )


def from_arguments(options: argparse.Namespace) -> list[TrainJob]:
    return decision(options.arms, options.seeds, options.preset, tuple(options.flags.split()))
