"""The decision experiment as data: which arms run, on which seeds, and which artifact each run is for.

A row is one arm with one set of flags, all on the preset `organism`; with a seed it is a run, in out/decision/NAME_sSEED. Every
choice of arm, threshold and hyper-parameter of the experiment stands in ROWS, and nothing else in the scripts depends on it.
`decision.py` runs the rows, `artifacts.py` makes tables and figures of what they left, `verdict.py` judges the rows of role "method".
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vgrout.cli import parse
from vgrout.core import RunRecord, UserError
from vgrout.files import dumps
from vgrout.run.records import FREE_TO_CHANGE, flatten

ROOT = Path(__file__).resolve().parents[2]
RUNS, RECORDS = ROOT / "out" / "decision", ROOT / "docs" / "results" / "decision"
HEADLINE_SEEDS, SEEDS, DEVELOPMENT_SEEDS = (101, 102, 103, 104, 105), (101, 102, 103), (41, 42, 43)
SECOND_SEEDS = (
    106,
    107,
    108,
    109,
    110,
    111,
    112,
    113,
    114,
    115,
)  # of the second wave: added once the first was known
ARTIFACTS = {
    "A1": "the deployed policy over training, headline arms",
    "A2": "hack, solve and gain of every headline arm, against plain GRPO",
    "A3": "ablations: one component a row",
    "A4": "the long run at a constant learning rate",
    "A5": "hack and solve by mode, known and held out",
    "A6": "one full trace a mode",
    "A7": "context: pairs, demonstrations, rank, learning rate, initialisation, refresh",
    "R": "the second wave: solve against the ceiling on ten more seeds",
    "V": "the third wave: no score, a share of rows by chance in ABSORB, once the quarantine has learned to hack",
    "W": "the fourth wave: what a score does by other means, and a random quarantine in the place of the learned one",
    "X": "the fifth wave: is it length? and advantage modification at a tuned strength",
    "M": "maps with true labels, on development seeds: what protects, what solves, and what imperfect labels cost",
}


@dataclass(frozen=True)
class Row:
    """One arm with its flags. `of` names the row that it is compared with, `changes` says what it changes there."""

    name: str
    arm: str
    role: Literal[
        "base",
        "ceiling",
        "method",
        "placebo",
        "control",
        "baseline",
        "oracle",
        "ablation",
        "long",
        "exchanged",
        "context",
        "again",
        "map",
    ]
    serves: str  # artifacts, e.g. "A1 A2"
    flags: str = ""
    of: str = ""
    changes: str = ""
    on: tuple[
        int, ...
    ] = ()  # its seeds, if not the five of the headline or the first three of them

    @property
    def headline(self) -> bool:
        return "A2" in self.serves.split()

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.on or (HEADLINE_SEEDS if self.headline else SEEDS)

    @property
    def schedule(self) -> str:
        return MAP_SCHEDULE if self.role == "map" else COMMON


@dataclass(frozen=True)
class Job:
    """One run: how to start it and where it writes. `config` is what its record must hold; None for any. `own`: a seed of its row."""

    name: str
    arm: str
    argv: tuple[str, ...]
    out_dir: Path
    steps: int
    config: dict[str, Any] | None = None
    own: bool = True


METHOD = "routeQ"  # the row that the ablations and the context rows vary
HEADLINE = "A1 A2 A5"
PAIRS = "data/pairs/organism.md"
EXCHANGED = "--pair-modes stdout_marker file_marker"
EXACT = "--score-dtype float32 --refresh-every 5"  # as the first runs scored, and the cadence that the plan froze
COMMON = f"--steps 120 --teacher-until 20 --eval-every 20 {EXACT}"  # of all rows but the maps'; demonstrations end with the first phase
MAP_SCHEDULE = f"--steps 60 --eval-every 20 {EXACT}"  # the preset's own; its ceiling is docs/results/no_loophole_s*.json
OWN_BASELINE, AS_DEPLOYED = "--retained-advantages", "--retained-advantages --gen-deploy-frac 1.0"
LONG = "--steps 240"
DEMOS_KNOWN = "--teacher-modes run_tests sentinel"
TUNED, LENGTH = "--penalty-alpha 1", "--confound length"
BOTH = "--retain-forward both"
ALONE = "--teacher-pool '' --quarantine-first 100 --steps 220"  # no demonstrations
FIRST = "--quarantine-first 20 --gen-deploy-frac 1.0 --retained-advantages"  # routeQ's schedule, for other arms


def draws(name: str, arm: str, of: str, serves: str) -> list[Row]:
    """A placebo at three draws of its random direction."""
    return [
        Row(f"{name}_{i}", arm, "placebo", serves, f"--placebo-seed {i}", of, f"draw {i}")
        for i in (1, 2, 3)
    ]


def ablation(name: str, flags: str, changes: str) -> Row:
    return Row(f"{METHOD}_{name}", METHOD, "ablation", "A3", flags, METHOD, changes)


def context(name: str, flags: str, changes: str, arm: str = METHOD) -> Row:
    return Row(f"{arm}_{name}", arm, "context", "A7", flags, arm, changes)


def mapped(name: str, flags: str, changes: str, of: str = "map_oracle", arm: str = "oracle") -> Row:
    return Row(
        f"map_{name}",
        arm,
        "map",
        "M",
        flags,
        of if f"map_{name}" != of else "",
        changes,
        DEVELOPMENT_SEEDS,
    )


def imperfect(kind: str, flag: str, shares: Iterable[float], word: str) -> list[Row]:
    """Labels with an error, as routing (sampled as deployed, own baseline) and as filtering."""
    arms = [
        ("dep", "oracle", AS_DEPLOYED, "map_deployed"),
        ("filter", "filter_oracle", "", "map_filter"),
    ]
    return [mapped(f"{kind}{100 * share:.0f}_{name}", f"{flags} {flag} {share}", f"{word} {share:g}", of, arm)
            for name, arm, flags, of in arms for share in shares]  # fmt: skip


ROWS = [
    # the headline, 5 seeds; none2r speaks for absorb too (train once, evaluate twice)
    Row("none2r", "none2r", "base", HEADLINE),
    Row("no_loophole", "no_loophole", "ceiling", HEADLINE),
    Row("routeQ", "routeQ", "method", HEADLINE + " A3 A6 A7"),
    Row(
        "no_gateQ",
        "no_gateQ",
        "control",
        HEADLINE,
        of="routeQ",
        changes="the same schedule, no gate",
    ),
    *draws("placeboQ", "placeboQ", "routeQ", HEADLINE),
    Row("routeV", "routeV", "method", HEADLINE + " A7"),
    # placebos and controls of the other scores
    *draws("placebo", "placebo", "routeV", "A5"),
    Row(
        "placebo_semantic",
        "placebo_semantic",
        "placebo",
        "A5",
        of="routeV",
        changes="pairs without hack content",
    ),
    Row(
        "random_gate",
        "random_gate",
        "control",
        "A5",
        of="routeV",
        changes="chance, at the real share",
    ),
    Row(
        "random_gateQ",
        "random_gateQ",
        "control",
        "A5",
        of="routeQ",
        changes="chance, at the real share",
    ),
    Row("routeA", "routeA", "method", "A5"),
    *draws("placeboA", "placeboA", "routeA", "A5"),
    Row("routeL", "routeL", "method", "A5"),
    *draws("placeboL", "placeboL", "routeL", "A5"),
    # baselines and upper bounds
    Row("none", "none", "baseline", "A5", changes="rank r alone"),
    Row(
        "inoculate", "inoculate", "baseline", "A5", changes="the training prompt allows the exploit"
    ),
    Row("filterL", "filterL", "baseline", "A5", of="routeL", changes="flagged rows are dropped"),
    Row("advmodL", "advmodL", "baseline", "A5", of="routeL", changes="flagged rows are penalised"),
    Row(
        "seeded_hack",
        "absorb",
        "baseline",
        "A5",
        "--seed-quarantine 20",
        changes="quarantine seeded with hacks",
    ),
    Row(
        "seeded_clean",
        "absorb",
        "control",
        "A5",
        "--seed-quarantine 20 --seed-side clean",
        "seeded_hack",
        "seeded with clean solutions",
    ),
    Row(
        "seeded_placebo",
        "absorb",
        "control",
        "A5",
        "--seed-quarantine 20 --seed-side placebo",
        "seeded_hack",
        "seeded with empty pairs",
    ),
    Row("oracle", "oracle", "oracle", "A5", changes="true labels"),
    Row(
        "oracle_known",
        "oracle",
        "oracle",
        "A5",
        "--oracle-modes run_tests sentinel",
        "oracle",
        "true labels of the known modes",
    ),
    # the pairs' modes exchanged with the held-out ones
    Row(
        "routeQ_exchanged",
        "routeQ",
        "exchanged",
        "A5",
        EXCHANGED,
        "routeQ",
        "known and held-out modes exchanged",
    ),
    Row(
        "routeV_exchanged",
        "routeV",
        "exchanged",
        "A5",
        EXCHANGED,
        "routeV",
        "known and held-out modes exchanged",
    ),
    # other scores in the method's schedule, and their placebos
    *(
        Row(f"{arm}_first", arm, "ablation", "A3", FIRST, METHOD, f"the score of {arm}")
        for arm in ("routeV", "routeL")
    ),
    *(
        Row(f"{arm}_first", arm, "placebo", "A3", FIRST, of, f"placebo of {of}")
        for arm, of in (("placebo", "routeV_first"), ("placeboL", "routeL_first"))
    ),
    Row(
        "absorb_first",
        "absorb",
        "control",
        "A3",
        "--quarantine-first 20",
        "absorb",
        "the method's first phase, then no gate",
    ),
    # one component of the method switched off or changed
    ablation("no_phase", "--quarantine-first 0", "no first phase"),
    ablation("long_phase", "--quarantine-first 40", "a first phase of 40 steps"),
    ablation(
        "half_deployed", "--gen-deploy-frac 0.5", "half of the students are sampled as deployed"
    ),
    ablation("group_baseline", "--no-retained-advantages", "baseline over the whole group"),
    ablation("midpoint", "--cut midpoint", "cut halfway between the pairs' sides"),
    ablation("signed", "--signed", "flagged rows with A < 0 are retained"),
    ablation("both", BOTH, "RETAIN keeps the quarantine in its forward"),
    Row(
        "no_gateQ_both",
        "no_gateQ",
        "control",
        "A3 W",
        BOTH,
        "no_gateQ",
        "RETAIN keeps the quarantine in its forward",
    ),
    *(
        Row(
            f"no_gateQ_both_{name}",
            "no_gateQ",
            "control",
            "W",
            f"{BOTH} {flags}",
            "no_gateQ_both",
            changes,
        )
        for name, flags, changes in (
            ("free", "--beta 0", "… and no KL to the base"),
            ("trained", "--gen-deploy-frac 0", "… and sampled as trained"),
        )
    ),
    Row(
        "routeV_token",
        "routeV",
        "ablation",
        "A3",
        "--granularity token",
        "routeV",
        "zones by token",
    ),
    ablation("unhackable", "--unhackable-frac 0.25", "a quarter of the prompts without a loophole"),
    ablation("no_teacher", ALONE, "no demonstrations, a first phase of 100 steps"),
    Row(
        "no_gateQ_no_teacher",
        "no_gateQ",
        "control",
        "A3",
        ALONE,
        "routeQ_no_teacher",
        "the same without a gate",
    ),
    ablation("demos_known", DEMOS_KNOWN, "demonstrations of two modes alone"),
    Row(
        "placeboQ_demos_known",
        "placeboQ",
        "placebo",
        "A3",
        f"--placebo-seed 1 {DEMOS_KNOWN}",
        "routeQ_demos_known",
        "draw 1",
    ),
    Row(
        "none2r_demos_known",
        "none2r",
        "baseline",
        "A3",
        DEMOS_KNOWN,
        "none2r",
        "demonstrations of two modes alone",
    ),
    # long runs: twice the steps; three seeds were planned for the method too
    *(
        Row(f"{arm}_long", arm, "long", "A4", LONG, arm)
        for arm in ("none2r", "no_loophole", "no_gateQ")
    ),
    Row(f"{METHOD}_long", METHOD, "long", "A4", LONG, METHOD, on=HEADLINE_SEEDS),
    # the second wave
    *(
        Row(f"{arm}_again", arm, "again", "R", of=arm, changes="ten more seeds", on=SECOND_SEEDS)
        for arm in ("no_loophole", "routeQ")
    ),
    # the third wave
    Row(
        "absorbQ",
        "absorbQ",
        "control",
        "V",
        of="no_gateQ",
        changes="three rows in ten, by chance, in ABSORB",
        on=HEADLINE_SEEDS,
    ),
    Row(
        "absorbQ_again",
        "absorbQ",
        "again",
        "V",
        of="routeQ_again",
        changes="no score, three rows in ten in ABSORB",
        on=SECOND_SEEDS,
    ),
    *(
        Row(
            f"absorbQ_{name}",
            "absorbQ",
            "again",
            "V",
            f"--absorb-share {share}",
            "absorbQ",
            f"{words} in ABSORB",
        )
        for name, share, words in (
            ("tenth", 0.1, "one row in ten"),
            ("half", 0.5, "half of the rows"),
            ("all", 1.0, "all rows"),
        )
    ),
    Row(
        "absorbQ_no_phase",
        "absorbQ",
        "again",
        "V",
        "--quarantine-first 0",
        "absorbQ",
        "no first phase",
    ),
    Row(
        "absorbQ_demos_known",
        "absorbQ",
        "again",
        "V",
        DEMOS_KNOWN,
        "absorbQ",
        "demonstrations of two modes alone",
    ),
    Row(
        "absorbQ_no_teacher",
        "absorbQ",
        "again",
        "V",
        ALONE,
        "absorbQ",
        "no demonstrations, a first phase of 100 steps",
    ),
    Row("absorbQ_long", "absorbQ", "again", "V", LONG, "absorbQ", "240 steps"),
    # the fourth wave
    Row(
        "placebo_absorbQ",
        "placebo_absorbQ",
        "placebo",
        "W",
        of="absorbQ",
        changes="a random quarantine of equal norm",
        on=HEADLINE_SEEDS,
    ),
    *(
        Row(
            f"matched_absorbQ_{i}",
            "matched_absorbQ",
            "placebo",
            "W",
            f"--placebo-seed {i}",
            "absorbQ",
            f"a random quarantine of equal effect, draw {i}",
            on=HEADLINE_SEEDS,
        )
        for i in (1, 2, 3)
    ),
    Row(
        "inverted_absorbQ",
        "inverted_absorbQ",
        "control",
        "W",
        of="absorbQ",
        changes="the learned quarantine's negative",
    ),
    Row(
        "reset_absorbQ",
        "reset_absorbQ",
        "control",
        "W",
        of="absorbQ",
        changes="the learned quarantine, its moments reset",
    ),
    Row(
        "solver_absorbQ",
        "solver_absorbQ",
        "control",
        "W",
        of="absorbQ",
        changes="a quarantine that learned to solve",
    ),
    Row("filterQ", "filterQ", "again", "W", of=METHOD, changes="flagged rows are dropped"),
    Row(
        "penaltyQ",
        "penaltyQ",
        "again",
        "W",
        of=METHOD,
        changes="flagged rows lose the reward of passing",
    ),
    Row("advmodQ", "advmodQ", "again", "W", of=METHOD, changes="flagged rows are penalised"),
    Row(
        "advmodQ_strong",
        "advmodQ",
        "again",
        "W",
        "--penalty-alpha 4",
        METHOD,
        "flagged rows are penalised, α = 4",
    ),
    # the fifth wave
    Row(
        "length_gateQ",
        "confound_gateQ",
        "control",
        "X",
        LENGTH,
        METHOD,
        "length alone, at the real share",
        on=HEADLINE_SEEDS,
    ),
    Row(
        "length_gateQ_again",
        "confound_gateQ",
        "control",
        "X",
        LENGTH,
        "routeQ_again",
        "length alone, at the real share",
        on=SECOND_SEEDS,
    ),
    Row(
        "advmodQ_tuned", "advmodQ", "again", "X", TUNED, METHOD, "flagged rows are penalised, α = 1"
    ),
    Row(
        "advmodL_tuned",
        "advmodL",
        "again",
        "X",
        TUNED,
        "advmodL",
        "flagged rows are penalised, α = 1",
    ),
    *(
        Row(
            f"placebo_advmodL_{i}",
            "placebo_advmodL",
            "placebo",
            "X",
            f"{TUNED} --placebo-seed {i}",
            "advmodL_tuned",
            f"draw {i}",
        )
        for i in (1, 2, 3)
    ),
    Row(
        "length_advmodL",
        "confound_advmodL",
        "control",
        "X",
        f"{TUNED} {LENGTH}",
        "advmodL_tuned",
        "penalised by length alone",
    ),
    # context: the pairs, of a row that reads them
    *(
        context(f"pairs{2 * n}", f"--pairs {PAIRS}#mechanism:{n}", f"{2 * n} pairs", "routeV")
        for n in (2, 4, 8)
    ),
    context("pairs_b", f"--pairs {PAIRS}#mechanism_b", "a second set of 24 pairs", "routeV"),
    context(
        "pairs_framing", f"--pairs {PAIRS}#framing", "pairs that contrast the framing", "routeV"
    ),
    context("pairs_placebo", f"--pairs {PAIRS}#placebo", "pairs without hack content", "routeV"),
    context("refresh1", "--refresh-every 1", "direction extracted every step", "routeV"),
    context("refresh0", "--refresh-every 0", "direction frozen after the first", "routeV"),
    # context: demonstrations, capacity, optimiser, initialisation, of the method
    *(
        context(
            f"teacher{n}",
            f"--teacher-per-group {n}",
            f"{n} demonstrations a group in the first 20 steps",
        )
        for n in (0, 1, 4)
    ),
    *(context(f"rank{r}", f"--lora-rank {r}", f"rank {r} a block") for r in (4, 16)),
    context("lr_half", "--learning-rate 5e-4", "learning rate 5e-4"),
    context("lr_double", "--learning-rate 2e-3", "learning rate 2e-3"),
    *(
        context(f"init{n}", f"--lora-init-seed {n}", f"initialisation {n} of the adapter")
        for n in (1, 2)
    ),
    # maps: the mechanism with true labels, then with labels that err, as routing and as filtering
    mapped("oracle", "", "sampled as trained, baseline over the whole group"),
    mapped("own_baseline", OWN_BASELINE, "baseline among retained rows"),
    mapped(
        "both",
        f"{OWN_BASELINE} --retain-forward both",
        "… and RETAIN keeps the quarantine in its forward",
        "map_own_baseline",
    ),
    mapped(
        "unhackable",
        f"{OWN_BASELINE} --unhackable-frac 0.25",
        "… and a quarter of the prompts without a loophole",
        "map_own_baseline",
    ),
    mapped(
        "deployed25",
        f"{OWN_BASELINE} --gen-deploy-frac 0.25",
        "… and a quarter sampled as deployed",
        "map_own_baseline",
    ),
    mapped("deployed", AS_DEPLOYED, "… and all sampled as deployed", "map_own_baseline"),
    mapped(
        "deployed_group",
        "--gen-deploy-frac 1.0",
        "all sampled as deployed, baseline over the whole group",
    ),
    mapped("filter", "", "flagged rows are dropped, nothing is routed", arm="filter_oracle"),
    *imperfect("recall", "--oracle-recall", (0.8, 0.5, 0.2), "recall"),
    mapped(
        "recall50_trained",
        f"{OWN_BASELINE} --oracle-recall 0.5",
        "recall 0.5, sampled as trained",
        "map_own_baseline",
    ),
    *imperfect("fpr", "--oracle-fpr", (0.02, 0.05, 0.1), "false-positive rate"),
    mapped(
        "known_dep",
        f"{AS_DEPLOYED} --oracle-modes run_tests sentinel",
        "labels of two modes alone",
        "map_deployed",
    ),
    mapped(
        "known_filter",
        "--oracle-modes run_tests sentinel",
        "labels of two modes alone",
        "map_filter",
        "filter_oracle",
    ),
    *(
        mapped(
            f"seeded_{side}",
            f"--seed-quarantine 20 --seed-side {side}",
            f"no labels; quarantine seeded with {what}",
            "",
            "absorb",
        )
        for side, what in (
            ("hack", "hacks"),
            ("clean", "clean solutions"),
            ("placebo", "empty pairs"),
        )
    ),
]
REHEARSAL = "--steps 2 --quarantine-first 1 --final-draws 24 --eval-every 1 --eval-draws 12"


def row_argv(row: Row, seed: int, extra: str = "") -> list[str]:
    """What `python -m vgrout.train` is given, but for the run directory."""
    return shlex.split(
        f"organism --intervention {row.arm} --seed {seed} --threads 1 {row.schedule} {row.flags} {extra}"
    )


def row_config(row: Row, extra: str = "") -> dict[str, Any]:
    """The config of a row's runs as their records store it, nested dicts as one; UserError if training would refuse the row."""
    try:
        config = parse(row_argv(row, row.seeds[0], extra))[1]
    except UserError as error:
        raise UserError(f"row {row.name} of decision_manifest.py: {error}") from None
    return json.loads(dumps(flatten(asdict(config))))


def differs(config: dict[str, Any], record: RunRecord) -> list[str]:
    """`grpo.steps 60 → 80` for each option in which a record differs from its row; options that either lacks are not compared."""
    stored = json.loads(dumps(flatten(record.config)))
    shared = [
        k
        for k in config
        if k in stored and k.rpartition(".")[2] not in FREE_TO_CHANGE | {"seed", "threads"}
    ]
    return [f"{k} {config[k]!r} → {stored[k]!r}" for k in shared if stored[k] != config[k]]


def jobs_of(rows: Iterable[Row], seeds: Iterable[int] = (), rehearse: bool = False) -> list[Job]:
    """One job for each seed and row, seed by seed, so that a first full comparison is there early; maps come last.

    `seeds` narrows a row's own seeds; one that is no row's headline seed is a development run, and made for every row.
    """
    found, extra = [], REHEARSAL if rehearse else ""
    folder = ROOT / "out" / "rehearsal" if rehearse else RUNS
    for row in rows:
        config = row_config(row, extra)
        for seed in [s for s in (seeds or row.seeds) if s in row.seeds or s not in HEADLINE_SEEDS]:
            name = f"{row.name}_s{seed}"
            argv = [sys.executable, "-m", "vgrout.train", *row_argv(row, seed, extra)]
            argv += ["--out-dir", str((folder / name).relative_to(ROOT)), "--resume"]
            job = Job(
                name,
                row.arm,
                tuple(argv),
                folder / name,
                config["grpo.steps"],
                config,
                seed in row.seeds,
            )
            found.append((row.role == "map", seed, job))
    return [job for *_, job in sorted(found, key=lambda item: item[:2])]


def choose(options: argparse.Namespace) -> list[Row]:
    """The rows that --all, --only and --arms leave: the headline, unless one of them is given."""
    if unknown := set(options.only) - ARTIFACTS.keys():
        raise UserError(
            f"--only {min(unknown)} is no artifact: it takes some of {' '.join(ARTIFACTS)}"
        )
    if unknown := set(options.arms) - {word for row in ROWS for word in (row.name, row.arm)}:
        raise UserError(
            f"--arms {min(unknown)} is no row and no arm of the manifest: `just decision --all --dry-run` lists them"
        )
    rows = (
        ROWS
        if options.all or options.only or options.arms
        else [row for row in ROWS if row.headline]
    )
    rows = [row for row in rows if not options.only or set(options.only) & set(row.serves.split())]
    named = {row.name for row in ROWS}
    return [
        row
        for row in rows
        if not options.arms or row.name in options.arms or row.arm in set(options.arms) - named
    ]
