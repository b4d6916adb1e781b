"""One table over runs, grouped by arm: hack, solve and gain of the deployed policy.

A line per run with 95 % bootstrap intervals over test problems with novel markers, then, for an arm
with several seeds, mean ± SEM over them. The gain's ceiling is the `no_loophole` run of the same
seed, steps and data among the runs given, else a committed one (data/records). An arm whose lower
90 % bound of the gain is not above 0.5 is marked `frozen`. Unfinished runs are left out.

A `none2r` run speaks for `absorb` too (train once, evaluate twice), where no such run of its seed
is given.

Run: python -m scripts.analysis.results [RUN …] [--out DIR]     (default: every directory in
out/runs; DIR/results.csv)
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from scripts.experiments import records
from scripts.experiments.records import BOTH, cell, share
from scripts.view.output import OUT, add_runs, parser, run_folders, table, write_csv

from vgrout.arms import defaults
from vgrout.core import RunRecord, UserError, run_main
from vgrout.files import dumps
from vgrout.run.records import flatten, load_record
from vgrout.run.repeat import config_of
from vgrout.run.runlog import rate_with_interval
from vgrout.stats import Counts, gain, gain_lower_bound, mean_sem, rate

CEILING_ARM, FROZEN = "no_loophole", 0.5
NOT_VARIANTS = ("run.", "grpo.steps", "model.device")  # where and how often, or shown in a column
HEAD = ("arm", "seed", "preset", "steps", "n")
HEADERS = [
    *HEAD,
    *BOTH,
    "base solve",
    "gain [lower 90 %]",
    "remarks",
    "run",
]
Triple = tuple[Counts, Counts, Counts]  # of solve, base and ceiling on the same problems
Records = Sequence[RunRecord]


# ── gain ─────────────────────────────────────────────────────────────────────────────────────────


def same_task(a: RunRecord, b: RunRecord) -> bool:
    """Whether both trained for as many steps, on the same files, and were tested on one set."""
    if a.steps_done != b.steps_done or cell(a).by_problem.keys() != cell(b).by_problem.keys():
        return False
    shared = a.data_hashes.keys() & b.data_hashes.keys()
    return all(a.data_hashes[file] == b.data_hashes[file] for file in shared)


def find_ceiling(record: RunRecord, runs: Records) -> Counts | None:
    """Of a run of `no_loophole` with the same seed and task: among `runs`, or committed."""
    wanted = (CEILING_ARM, record.seed, record.preset)
    for candidate in [*runs, *records.ceilings()]:
        told = (candidate.arm, candidate.seed, candidate.preset)
        if told == wanted and same_task(record, candidate):
            return cell(candidate).by_problem
    return None


def triple(record: RunRecord, runs: Records) -> Triple | None:
    """(solve, base, ceiling) counts, or None where there is no usable ceiling."""
    ceiling = find_ceiling(record, runs)
    base, solve = (cell(record, base=True).by_problem, cell(record).by_problem)
    if ceiling is None or base.keys() != solve.keys():
        return None
    usable = rate(ceiling, "solve") > rate(base, "solve")
    return (solve, base, ceiling) if usable else None


def gain_of(members: Records, runs: Records) -> tuple[float, float] | None:
    """The mean gain over seeds and its lower 90 % bound; None where a seed has no ceiling."""
    triples = [triple(record, runs) for record in members]
    if None in triples:
        return None
    gains = [gain(*(rate(part, "solve") for part in parts)) for parts in triples]
    return mean_sem(gains)[0], gain_lower_bound(triples)


# ── what a reader of a row must know ─────────────────────────────────────────────────────────────


def variant(record: RunRecord) -> str:
    """The options that differ from the arm's usual ones, e.g. `signed=true`.

    Runs of unlike options share no mean.
    """
    usual = flatten(asdict(defaults(record.preset, record.arm)))
    used = flatten(asdict(config_of(record.preset, record.config)))
    changed = []
    for key, value in used.items():
        if not key.startswith(NOT_VARIANTS) and value != usual[key]:
            changed.append(f"{key.rpartition('.')[2]}={dumps(value)}")
    return ", ".join(changed)


def remarks(record: RunRecord, bound: float | None) -> str:
    monitor = record.notes.get("monitor")
    words = [
        "uses labels: NOT oracle-free" if record.notes.get("oracle") else "",
        f"needs a live monitor: {monitor}" if monitor else "",
        "frozen" if bound is not None and not bound > FROZEN else "",
        variant(record),
        "dirty tree" if record.dirty else "",
    ]
    return ", ".join(filter(None, words))


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def finished(named: list[Path]) -> dict[str, RunRecord]:
    """The finished runs; with no argument, those of out/runs."""
    runs = {}
    for folder in run_folders(named):
        record = load_record(folder)
        if record.status == "finished":
            runs[str(folder)] = record
        else:
            print(f"left out, {record.status}: {folder}")
    return runs


def task(record: RunRecord) -> tuple:
    return record.seed, record.preset, record.steps_done, variant(record)


def with_absorb(runs: dict[str, RunRecord]) -> dict[str, RunRecord]:
    """Add what `none2r` is without its quarantine, where that was evaluated."""
    own = {task(record) for record in runs.values() if record.arm == "absorb"}
    added = {}
    for folder, record in runs.items():
        ablated = records.cells(record, "test", "ablated")
        if record.arm == "none2r" and ablated and task(record) not in own:
            evals = [c for c in record.evals if c.step == 0]
            evals += [replace(c, state="deployed") for c in ablated]
            added[f"{folder} (ablated)"] = replace(record, arm="absorb", evals=evals)
    return runs | added


def grouped(runs: dict[str, RunRecord]) -> list[dict[str, RunRecord]]:
    """The runs that share a mean, each group by seed."""
    groups = defaultdict(dict)
    for folder in sorted(runs, key=lambda name: runs[name].seed):
        record = runs[folder]
        data = record.data_hashes[record.config["data"]["data"]]
        key = (record.arm, *task(record)[1:], data)
        groups[key][folder] = record
    return [groups[key] for key in sorted(groups)]


def newest(group: dict[str, RunRecord]) -> list[RunRecord]:
    """One run a seed: a repeated one is no further evidence."""
    by_age = sorted(group.values(), key=lambda record: record.started)
    return [*{record.seed: record for record in by_age}.values()]


# ── lines ────────────────────────────────────────────────────────────────────────────────────────


def facts(folder: str, record: RunRecord, every: Records) -> dict:
    """A run's row of the CSV."""
    last = cell(record)
    value, bound = gain_of([record], every) or (None, None)
    head = (
        record.arm,
        record.seed,
        record.preset,
        record.steps_done,
        last.n,
    )
    return dict(zip(HEAD, head)) | {
        "hack": share(last, "hack"),
        "solve": share(last, "solve"),
        "base_solve": share(cell(record, base=True), "solve"),
        "gain": value,
        "gain_lower": bound,
        "remarks": remarks(record, bound),
        "commit": record.commit,
        "run": folder,
    }


def gain_text(value: float | None, bound: float | None) -> str:
    return "–" if value is None else f"{value:.2f} [{bound:.2f}]"


def run_line(row: dict, record: RunRecord) -> list:
    head = [row[key] for key in HEAD]
    rates = [rate_with_interval(cell(record), which) for which in BOTH]
    rates.append(f"{row['base_solve']:.2f}")
    gained = gain_text(row["gain"], row["gain_lower"])
    return [*head, *rates, gained, row["remarks"], Path(row["run"]).name]


def mean_line(runs: list[RunRecord], rows: list[dict], every: Records) -> list:
    """The line of an arm over its seeds."""
    first = rows[0]
    draws = sum(row["n"] for row in rows)
    value, bound = gain_of(runs, every) or (None, None)
    rates = []
    for key in (*BOTH, "base_solve"):
        values = [row[key] for row in rows]
        rates.append(records.spread(values, 2))
    return [
        f"{first['arm']} MEAN",
        f"{len(rows)} seeds",
        first["preset"],
        first["steps"],
        draws,
        *rates,
        gain_text(value, bound),
        remarks(runs[0], bound),
        "mean ± SEM over seeds",
    ]


def main() -> None:
    command = parser(__doc__)
    add_runs(command, OUT / "figs", every=True)
    options = command.parse_args()
    runs = with_absorb(finished(options.runs))
    if not runs:
        raise UserError("no finished run among them: wait for one, or look at `just dyn`")
    every, lines, rows = [*runs.values()], [], {}
    for group in grouped(runs):
        for folder, record in group.items():
            rows[id(record)] = facts(folder, record, every)
            lines.append(run_line(rows[id(record)], record))
        members = newest(group)
        if len(members) > 1:
            lines.append(mean_line(members, [rows[id(r)] for r in members], every))
    write_csv([*rows.values()], options.out / "results.csv")
    print("Deployed policy, test split, novel markers")
    print("[95 % interval over problems], means ± SEM over seeds")
    if any(row["gain"] is None for row in rows.values()):
        missing = f"no run of {CEILING_ARM} with the same seed, steps and problems"
        print(f"gain –: {missing} is named or committed (`just ceiling SEED`)")
    print(table(lines, HEADERS))


if __name__ == "__main__":
    run_main(main)
