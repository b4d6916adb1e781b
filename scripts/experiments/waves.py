"""Waves as data: which rows run, on which seeds, and why. `run.py` runs them.

A wave is a list of rows of one preset; a row with a seed is a job. A new wave is an entry of WAVES,
written with its page in `docs/plans/` and committed before its first run.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scripts.view.output import ROOT

from vgrout.arms import arm_of
from vgrout.cli import parse
from vgrout.core import UserError

REHEARSAL = "--steps 2 --final-draws 24 --eval-every 1 --eval-draws 12"


@dataclass(frozen=True)
class Row:
    """An arm with its flags; with a seed it is a run."""

    name: str
    arm: str
    flags: str = ""
    seeds: tuple[int, ...] = ()
    stage: int = 0  # all runs of a stage come before those of the next
    why: str = ""
    resolve: str = ""


@dataclass(frozen=True)
class Contrast:
    """What a plan tests: `first` deploys fewer hacks than `second`, and solves as `ceiling` does.

    Solving is the mean of the validations at `solve_at`; it is not inferior where the lower bound,
    at `level`, of its paired difference lies above `margin`.
    """

    first: str
    second: str
    ceiling: str
    solve_at: tuple[int, ...]
    margin: float = -0.05
    level: float = 0.975


@dataclass(frozen=True)
class Wave:
    preset: str
    rows: tuple[Row, ...]
    contrast: Contrast | None = None


@dataclass(frozen=True)
class Job:
    """One run. `own`: it is as its row says, so that its record belongs into the wave's file."""

    row: Row
    seed: int
    options: tuple[str, ...]  # of the program, but for the directory
    out_dir: Path
    own: bool = True
    program: tuple[str, ...] = (sys.executable, "-m", "vgrout.train")

    @property
    def name(self) -> str:
        return f"{self.row.name}_s{self.seed}"

    @property
    def argv(self) -> list[str]:
        """It resumes, so that a job that is started again goes on from its newest checkpoint."""
        folder = self.out_dir
        if folder.is_relative_to(ROOT):
            folder = folder.relative_to(ROOT)
        return [*self.program, *self.options, "--out-dir", str(folder), "--resume"]

    @property
    def label(self) -> str:
        return f"why: {self.row.why}. resolve: {self.row.resolve}."


ALONE = "--teacher-pool '' --steps 220"
LABEL_FREE = f"{ALONE} --eval-every 20 --eval-draws 240 --threads 1"
TEN_SEEDS = tuple(range(400, 410))
FIRST = "--quarantine-first 100"


def label_free() -> tuple[Row, ...]:
    """Plan 1: no demonstration in any arm."""
    first = f"{LABEL_FREE} {FIRST}"
    return (
        Row("absorbQ", "absorbQ", first, TEN_SEEDS),
        Row("no_gateQ", "no_gateQ", first, TEN_SEEDS),
        Row("none2r", "none2r", LABEL_FREE, TEN_SEEDS, stage=1),
        Row("no_loophole", "no_loophole", LABEL_FREE, TEN_SEEDS, stage=1),
        Row("routeQ", "routeQ", first, TEN_SEEDS, stage=2),
    )


PRETRAINED = "--threads 1 --eval-every 10"


def pretrained() -> tuple[Row, ...]:
    """Plan 2: the first runs on a pretrained model; no demonstration in any arm."""
    first = f"{PRETRAINED} --quarantine-first 15"
    flags = dict(none2r=PRETRAINED, no_loophole=PRETRAINED, absorbQ=first, no_gateQ=first)
    return tuple(Row(arm, arm, words, (401, 402, 403)) for arm, words in flags.items())


MECHANISM = "--steps 120 --eval-every 20 --eval-draws 120 --threads 1"


def mechanism() -> tuple[Row, ...]:
    """Plan 3: what rows in ABSORB take from the quarantine, cell by cell."""
    by, random = f"{MECHANISM} --absorb-by", "--enter effect"
    return (
        Row("clip", "clipQ", MECHANISM, TEN_SEEDS),
        Row("shuffled", "absorbQ", f"{by} shuffled", TEN_SEEDS),
        Row("push", "absorbQ", f"{by} push", TEN_SEEDS),
        Row("both", "absorbQ", MECHANISM, TEN_SEEDS),
        Row("none", "no_gateQ", MECHANISM, TEN_SEEDS),
        Row("silence", "absorbQ", f"{by} silence", TEN_SEEDS, stage=1),
        Row("ratio", "absorbQ", f"{by} ratio", TEN_SEEDS, stage=1),
        Row("frozen", "absorbQ", f"{by} frozen", TEN_SEEDS, stage=1),
        Row("random_clip", "clipQ", f"{MECHANISM} {random}", TEN_SEEDS, stage=1),
        Row("random_push", "absorbQ", f"{by} push {random}", TEN_SEEDS, stage=1),
    )


POOL = "data/leetcode/teacher.jsonl.gz"
THREE_SEEDS = (51, 52, 53)
REAL = (  # arm, why it is run, what would resolve the question
    (
        "none2r",
        "plain GRPO: does it find the loopholes, and when",
        "its student hack rate reaches .5; else the environment decides nothing",
    ),
    (
        "no_loophole",
        "the ceiling for solving, which gains need",
        "its solve rate lies at least .1 above the base's",
    ),
    (
        "routeV",
        "C1 and C2: does routing by v_grad lower deployed hacking, on modes without pairs too",
        "deployed hack at least .30 below none2r's, and solve no worse by .03, over seeds",
    ),
    (
        "placebo",
        "C3: does it need the direction; Haar-random, same machinery and routed share",
        "routeV deploys fewer hacks than placebo in a paired test over seeds",
    ),
    (
        "absorb",
        "no gate: what ablating one of two blocks trained alike removes",
        "routeV deploys fewer hacks than absorb; else the gate adds nothing",
    ),
    (
        "routeQ",
        "does the learned quarantine's likelihood ratio find hacks on a pretrained model",
        "deployed hack below no_gateQ's at a gain above .5",
    ),
    (
        "absorbQ",
        "is a share of rows beside the learned quarantine enough, without a score",
        "deployed hack below no_gateQ's at a gain above .5",
    ),
    (
        "no_gateQ",
        "the same schedule without a gate",
        "its hack rate emerges in the second phase; else the schedule alone explains the rest",
    ),
)


def real() -> tuple[Row, ...]:
    """The decision run of a real model: each arm with a pool of demonstrations and without one."""
    rows = []
    pool = f"--teacher-pool {POOL} --teacher-until 20"
    for arm, why, resolve in REAL:
        alone = f"{ALONE} {FIRST}" if arm.endswith("Q") else ALONE
        of_pool, of_none = (
            f"{why}; demonstrations in the first 20 steps",
            f"{why}; no demonstrations",
        )
        rows.append(Row(arm, arm, pool, THREE_SEEDS, 0, of_pool, resolve))
        rows.append(Row(f"{arm}_alone", arm, alone, THREE_SEEDS, 1, of_none, resolve))
    return tuple(rows)


WAVES = {
    "01_label_free": Wave(
        "organism",
        label_free(),
        contrast=Contrast("absorbQ", "no_gateQ", "no_loophole", solve_at=(140, 180, 200)),
    ),
    "02_smol": Wave(
        "smol",
        pretrained(),
        contrast=Contrast("absorbQ", "no_gateQ", "no_loophole", solve_at=(20, 30)),
    ),
    "03_mechanism": Wave(
        "organism",
        mechanism(),
        contrast=Contrast("clip", "shuffled", "none", solve_at=(60, 80, 100)),
    ),
    "real": Wave("full", real()),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("wave", choices=WAVES, help="which rows")
    parser.add_argument("--only", nargs="+", metavar="ROW", default=[], help="rows or arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the rows' own")
    parser.add_argument("--flags", default="", help="more training flags of every job, one string")
    parser.add_argument("--rehearse", action="store_true", help="two steps, into out/rehearsal")


def choose(options: argparse.Namespace) -> list[Row]:
    """The rows that --only leaves and whose pool of demonstrations is there."""
    rows, words = WAVES[options.wave].rows, set(options.only)
    known = {word for row in rows for word in (row.name, row.arm)}
    if unknown := words - known:
        raise UserError(f"--only {min(unknown)}: no row or arm of {options.wave}")
    chosen = [row for row in rows if not words or words & {row.name, row.arm}]
    absent = [row.name for row in chosen if POOL in row.flags and not (ROOT / POOL).exists()]
    if absent:
        print(f"left out, there is no {POOL}: {', '.join(absent)}", file=sys.stderr)
    return [row for row in chosen if row.name not in absent]


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Stage by stage and seed by seed, so that a first full comparison is there early."""
    folder = ROOT / "out" / ("rehearsal" if options.rehearse else options.wave)
    preset = WAVES[options.wave].preset
    jobs = []
    for row in choose(options):
        extra = options.flags
        if options.rehearse:
            first = " --quarantine-first 1" * (len(arm_of(row.arm).phases) > 1)
            extra = f"{extra} {REHEARSAL}{first}"
        for seed in options.seeds or row.seeds:
            words = f"{preset} --intervention {row.arm} --seed {seed} {row.flags} {extra}"
            own = seed in row.seeds and not extra
            place = folder / f"{row.name}_s{seed}"
            jobs.append(Job(row, seed, tuple(shlex.split(words)), place, own))
    return sorted(jobs, key=lambda job: (job.row.stage, job.seed))


def check(jobs: Iterable[Job]) -> None:
    """UserError for a row that training would refuse, before anything is started."""
    for name, job in {job.row.name: job for job in jobs}.items():
        try:
            parse(job.options)
        except UserError as error:
            raise UserError(f"row {name}: {error}") from None
