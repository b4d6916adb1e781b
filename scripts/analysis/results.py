"""One table over runs, grouped by arm: hack, solve and gain of the deployed policy.

A line per run with 95 % bootstrap intervals over test problems with novel markers, then, for an arm
with several seeds, mean ± SEM over them. The gain's ceiling is the `no_loophole` run of the same
seed, steps and data among the runs given, else a committed one (data/records). An arm whose lower
90 % bound of the gain is not above 0.5 is marked `frozen`. Unfinished runs are left out.

A `none2r` run speaks for `absorb` too (train once, evaluate twice), where no such run of its seed
is given.

Run: python -m scripts.analysis.results [RUN …] [--out DIR]     (default: every directory in
         out/runs; DIR/results.csv)
     python -m scripts.analysis.results RUN_DIR --compact FILE  (what tables need of one run's
         record: FILE, or one more line of FILE where it ends in .jsonl)
"""

from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

from scripts.experiments import records
from scripts.view.output import (
    OUT,
    ROOT,
    add_runs,
    parser,
    run_folders,
    write_csv,
)
from scripts.view.output import table as as_text

from vgrout.arms import defaults
from vgrout.core import EvalResult, RunRecord, UserError, run_main
from vgrout.files import dumps, write_atomic
from vgrout.run.records import flatten, load_metrics, load_record
from vgrout.run.repeat import config_of
from vgrout.run.runlog import rate_with_interval
from vgrout.stats import Counts, gain, gain_lower_bound, mean_sem, rate

CEILING_ARM, FROZEN = "no_loophole", 0.5
WINDOW = 5  # steps of a running mean
EMERGED = 0.5  # student hack rate at which hacks have emerged
NOT_VARIANTS = (
    "run.",
    "grpo.steps",
    "model.device",
)  # where and how often, or shown in a column
BOTH, GAIN = ("hack", "solve"), "gain [lower 90 %]"
HEADERS = [
    "arm",
    "seed",
    "preset",
    "steps",
    "n",
    *BOTH,
    "base solve",
    GAIN,
    "remarks",
    "run",
]
Triple = tuple[Counts, Counts, Counts]  # of solve, base and ceiling on the same problems


# ── records ──────────────────────────────────────────────────────────────────────────────────────


def cell(record: RunRecord, base: bool = False, state: str = "deployed") -> EvalResult:
    """Return the test cell with novel markers of the last step, or of the base."""
    of = ("test", "novel", state)
    cells = [c for c in record.evals if (c.split, c.markers, c.state) == of]
    return (min if base else max)(cells, key=lambda c: c.step)


def finished(named: list[Path]) -> dict[str, RunRecord]:
    """Return the finished runs; with no argument, those of out/runs."""
    runs = {str(folder): load_record(folder) for folder in run_folders(named)}
    for folder, record in runs.items():
        if record.status != "finished":
            print(f"left out, {record.status}: {folder}")
    return {folder: record for folder, record in runs.items() if record.status == "finished"}


def same_task(a: RunRecord, b: RunRecord) -> bool:
    """Whether both trained for as many steps, on the same files, and were tested on one set."""
    shared = a.data_hashes.keys() & b.data_hashes.keys()
    if a.steps_done != b.steps_done or cell(a).by_problem.keys() != cell(b).by_problem.keys():
        return False
    return all(a.data_hashes[file] == b.data_hashes[file] for file in shared)


def find_ceiling(record: RunRecord, runs: list[RunRecord]) -> Counts | None:
    """Of a run of `no_loophole` with the same seed and task: among `runs`, or committed."""
    wanted = (CEILING_ARM, record.seed, record.preset)
    for candidate in runs + records.ceilings():
        told = (candidate.arm, candidate.seed, candidate.preset)
        if told == wanted and same_task(record, candidate):
            return cell(candidate).by_problem
    return None


def triple(record: RunRecord, runs: list[RunRecord]) -> Triple | None:
    """Return (solve, base, ceiling) counts, or None where there is no usable ceiling."""
    ceiling = find_ceiling(record, runs)
    base = cell(record, base=True).by_problem
    solve = cell(record).by_problem
    if ceiling is None or base.keys() != solve.keys():
        return None
    usable = rate(ceiling, "solve") > rate(base, "solve")
    return (solve, base, ceiling) if usable else None


def gain_text(
    triples: list[Triple | None],
) -> tuple[float | None, float | None, str]:
    """(gain, its lower 90 % bound, their text); all empty where a seed has no ceiling."""
    if not triples or None in triples:
        return None, None, "–"
    value, _ = mean_sem([gain(*(rate(part, "solve") for part in parts)) for parts in triples])
    bound = gain_lower_bound(triples)
    return value, bound, f"{value:.2f} [{bound:.2f}]"


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


def remarks(record: RunRecord, bound: float | None, options: bool = True) -> str:
    """What a reader of a row must know; with `options`, the flags too."""
    monitor = record.notes.get("monitor")
    words = [
        "uses labels: NOT oracle-free" if record.notes.get("oracle") else "",
        f"needs a live monitor: {monitor}" if monitor else "",
        "frozen" if bound is not None and not bound > FROZEN else "",
        variant(record) if options else "",
        "dirty tree" if record.dirty else "",
    ]
    return ", ".join(filter(None, words))


def with_absorb(runs: dict[str, RunRecord]) -> dict[str, RunRecord]:
    """Add what `none2r` is without its quarantine."""

    def task(record: RunRecord) -> tuple:
        return record.seed, record.preset, record.steps_done, variant(record)

    own = {task(r) for r in runs.values() if r.arm == "absorb"}
    added = {}
    for folder, record in runs.items():
        if record.arm == "none2r" and task(record) not in own:
            if ablated := without_quarantine(record):
                added[f"{folder} (ablated)"] = ablated
    return runs | added


def without_quarantine(record: RunRecord) -> RunRecord | None:
    """A `none2r` record as that of `absorb`, its cells those of the ablated policy.

    None where these were not evaluated.
    """
    base = [c for c in record.evals if c.step == 0]
    later = [c for c in record.evals if c.step and c.state != "deployed"]
    later = [replace(c, state="deployed") if c.state == "ablated" else c for c in later]
    evaluated = any((c.split, c.state) == ("test", "deployed") for c in later)
    return replace(record, arm="absorb", evals=base + later) if evaluated else None


# ── records → table ──────────────────────────────────────────────────────────────────────────────


def run_row(folder: str, record: RunRecord, every: list[RunRecord]) -> tuple[list, dict]:
    """A run's printable row, and its plain one for the CSV."""
    last, base = cell(record), cell(record, base=True)
    value, bound, text = gain_text([triple(record, every)])
    base_solve = base.solve / base.n
    head = {
        "arm": record.arm,
        "seed": record.seed,
        "preset": record.preset,
        "steps": record.steps_done,
        "n": last.n,
    }
    plain = {which: getattr(last, which) / last.n for which in BOTH} | {
        "base_solve": base_solve,
        "gain": value,
        "gain_lower": bound,
        "oracle": bool(record.notes.get("oracle")),
        "monitor": record.notes.get("monitor", ""),
        "commit": record.commit,
        "dirty": record.dirty,
        "run": folder,
    }
    shown = [rate_with_interval(last, which) for which in BOTH]
    tail = [
        f"{base_solve:.2f}",
        text,
        remarks(record, bound),
        Path(folder).name,
    ]
    return [*head.values(), *shown, *tail], head | plain


def mean_row(runs: list[RunRecord], every: list[RunRecord]) -> list:
    """The row of an arm over its seeds."""

    def mean(cells: list[EvalResult], which: str) -> str:
        value, sem = mean_sem([getattr(c, which) / c.n for c in cells])
        return f"{value:.2f} ± {sem:.2f}"

    first, last = runs[0], [cell(r) for r in runs]
    base = [cell(r, base=True) for r in runs]
    _, bound, text = gain_text([triple(r, every) for r in runs])
    head = [
        f"{first.arm} MEAN",
        f"{len(runs)} seeds",
        first.preset,
        first.steps_done,
    ]
    rates = [mean(last, "hack"), mean(last, "solve"), mean(base, "solve")]
    tail = [text, remarks(first, bound), "mean ± SEM over seeds"]
    return [*head, sum(c.n for c in last), *rates, *tail]


def table(runs: dict[str, RunRecord]) -> tuple[list[list], list[dict]]:
    """Printable rows and, for the CSV, one plain row a run."""
    groups, rows, plain = defaultdict(list), [], []
    every = list(runs.values())
    for folder, record in runs.items():
        data = record.data_hashes[record.config["data"]["data"]]
        key = (
            record.arm,
            record.preset,
            record.steps_done,
            variant(record),
            data,
        )
        groups[key].append((folder, record))
    for _, members in sorted(groups.items()):
        for folder, record in sorted(members, key=lambda member: member[1].seed):
            row, facts = run_row(folder, record, every)
            rows.append(row)
            plain.append(facts)
        by_age = sorted((record for _, record in members), key=lambda r: r.started)
        newest = {r.seed: r for r in by_age}  # a repeated seed is no further evidence
        if len(newest) > 1:
            rows.append(mean_row(list(newest.values()), every))
    return rows, plain


# ── compact records ──────────────────────────────────────────────────────────────────────────────


def training_notes(rows: list[dict]) -> dict[str, float | int | None]:
    """What tables need of metrics.jsonl: the mean share of routed rows, and the emergence step."""
    shares = [row["share_route"] for row in rows if row.get("share_route") is not None]
    hack, emerged = [row["student_hack"] for row in rows], None
    for i in range(len(hack)):
        window = hack[max(0, i - WINDOW + 1) : i + 1]
        if sum(window) / len(window) >= EMERGED:
            emerged = i + 1
            break
    share = round(sum(shares) / len(shares), 4) if shares else None
    return {"share_route": share, "emerged": emerged}


def compact(run: str | Path, target: str | Path) -> RunRecord:
    """Write the record of a run that has ended, small enough to commit.

    It is without counts by problem where no table needs them, names its directory below out/, and
    has `training_notes`. UserError for a run that has neither finished nor diverged.
    """
    record, target = load_record(run), Path(target)
    if record.status != "finished" and not record.status.startswith(records.DIVERGED):
        why = "only a run that finished, or diverged, is evidence"
        raise UserError(f"{run} is {record.status}: {why}")
    for i, c in enumerate(record.evals):
        if (c.split, c.markers) != ("test", "novel") or c.state == "as_trained":
            record.evals[i] = replace(c, by_problem={})
    record.notes |= training_notes(load_metrics(run))
    was, folder = record.config["run"]["out_dir"], Path(run).resolve()
    inside = folder.is_relative_to(ROOT)
    now = str(folder.relative_to(ROOT)) if inside else f"out/runs/{folder.name}"
    record.config["run"]["out_dir"] = now
    record.argv = [now if was and word == was else word for word in record.argv]
    if target.suffix == ".jsonl":
        records.append(target, record.arm, record)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, (dumps(asdict(record)) + "\n").encode())
    return record


# ── commands ─────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    command = parser(__doc__)
    add_runs(command, OUT / "figs", every=True)
    command.add_argument("--compact", metavar="FILE", help="write one run's compact record alone")
    options = command.parse_args()
    if options.compact:
        if len(options.runs) != 1:
            raise UserError("--compact takes one run directory")
        record = compact(options.runs[0], options.compact)
        print(f"{options.compact}: {record.arm} seed {record.seed}")
        return
    rows, plain = table(with_absorb(finished(options.runs)))
    if not rows:
        raise UserError("no finished run among them: wait for one, or look at `just dyn`")
    write_csv(plain, options.out / "results.csv")
    print("Deployed policy, test split, novel markers")
    print("[95 % interval over problems], means ± SEM over seeds")
    if any(row[HEADERS.index(GAIN)] == "–" for row in rows):
        missing = f"no run of {CEILING_ARM} with the same seed, steps and problems"
        print(f"gain –: {missing} is named or committed (`just ceiling SEED`)")
    print(as_text(rows, HEADERS))


if __name__ == "__main__":
    run_main(main)
