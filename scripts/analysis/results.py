"""One table over runs, grouped by arm: hack, solve and gain of the deployed policy on the test split, novel markers.

A line per run with 95 % bootstrap intervals over problems, then, for an arm with several seeds, mean ± SEM over them.
The gain's ceiling is the `no_loophole` run of the same seed, steps and data among the runs given, else the committed one in
docs/results/. An arm whose lower 90 % bound of the gain is not above 0.5 is marked `frozen`. Unfinished runs are left out.

A `none2r` run speaks for `absorb` too (train once, evaluate twice), where no such run of its seed is given.

Run: python scripts/analysis/results.py [RUN …] [--out DIR]        (default: every directory in out/runs; DIR/results.csv)
     python scripts/analysis/results.py RUN_DIR --compact FILE     (write what tables need of one finished run's record)
     python scripts/analysis/results.py --page docs/results.md     (make its tables anew, each from the compact records that it names)
"""

import argparse
import json
import re
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl
from tabulate import tabulate

from vgrout.config import defaults
from vgrout.core import EvalResult, RunRecord, UserError, run_main
from vgrout.files import dumps, write_atomic
from vgrout.run.records import flatten, load_metrics, load_record
from vgrout.run.runlog import rate_with_interval
from vgrout.stats import Counts, gain, gain_lower_bound, mean_sem, rate

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "results"
CEILING_ARM, FROZEN, GAIN = "no_loophole", 0.5, "gain [lower 90 %]"
WINDOW, EMERGED = (
    5,
    0.5,
)  # steps of a running mean; the hack rate of student rows at which hacks have emerged
NOT_VARIANTS = ("run.", "grpo.steps", "model.device")  # where and how often, or shown in a column
HEADERS = [
    "arm",
    "seed",
    "preset",
    "steps",
    "n",
    "hack",
    "solve",
    "base solve",
    GAIN,
    "remarks",
    "run",
]


def cell(record: RunRecord, base: bool = False) -> EvalResult:
    """Return the deployed test cell with novel markers of the last step, or of the base."""
    cells = [
        c for c in record.evals if (c.split, c.markers, c.state) == ("test", "novel", "deployed")
    ]
    return min(cells, key=lambda c: c.step) if base else max(cells, key=lambda c: c.step)


def find_runs(arguments: list[str]) -> dict[str, RunRecord]:
    """Return the finished runs; with no argument, those of out/runs."""
    folders = [Path(a) for a in arguments] or [
        p.parent for p in sorted((ROOT / "out" / "runs").glob("*/record.json"))
    ]
    if not folders:
        raise UserError("out/runs holds no run: start with `just demo`, or name run directories")
    runs = {str(folder): load_record(folder) for folder in folders}
    for folder, record in runs.items():
        if record.status != "finished":
            print(f"left out, {record.status}: {folder}")
    return {folder: record for folder, record in runs.items() if record.status == "finished"}


def same_task(a: RunRecord, b: RunRecord) -> bool:
    """Both trained for as many steps, were evaluated on the same problems, and every input file that both name is the same."""
    shared = a.data_hashes.keys() & b.data_hashes.keys()
    same = a.steps_done == b.steps_done and cell(a).by_problem.keys() == cell(b).by_problem.keys()
    return same and all(a.data_hashes[f] == b.data_hashes[f] for f in shared)


def find_ceiling(record: RunRecord, runs: list[RunRecord]) -> Counts | None:
    """Of a run of `no_loophole` with the same seed and task: among `runs`, or committed."""
    candidates = [
        r
        for r in runs
        if r.arm == CEILING_ARM and r.seed == record.seed and r.preset == record.preset
    ]
    committed = map(load_record, sorted(COMMITTED.rglob(f"{CEILING_ARM}*_s{record.seed}.json")))
    candidates += [r for r in committed if r.status == "finished"]
    return next((cell(r).by_problem for r in candidates if same_task(record, r)), None)


def triple(record: RunRecord, runs: list[RunRecord]) -> tuple[Counts, Counts, Counts] | None:
    """Return (solve, base, ceiling) counts on the same problems, or None where there is no usable ceiling."""
    ceiling, base, solve = (
        find_ceiling(record, runs),
        cell(record, base=True).by_problem,
        cell(record).by_problem,
    )
    if (
        ceiling is None
        or base.keys() != solve.keys()
        or not rate(ceiling, "solve") > rate(base, "solve")
    ):
        return None
    return solve, base, ceiling


def gain_text(triples: list) -> tuple[float | None, float | None, str]:
    """Return gain, its lower 90 % bound, and their text; all empty where a seed has no ceiling."""
    if not triples or None in triples:
        return None, None, "–"
    value, _ = mean_sem([gain(*(rate(part, "solve") for part in parts)) for parts in triples])
    bound = gain_lower_bound(triples)
    return value, bound, f"{value:.2f} [{bound:.2f}]"


def variant(record: RunRecord) -> str:
    """Return the options that differ from the arm's usual ones, e.g. `signed=true`; runs of unlike options share no mean."""
    usual, used = (
        json.loads(dumps(flatten(config)))
        for config in (asdict(defaults(record.preset, record.arm)), record.config)
    )
    return ", ".join(f"{key.rpartition('.')[2]}={json.dumps(value)}" for key, value in used.items()
                     if not key.startswith(NOT_VARIANTS) and value != usual.get(key, value))  # fmt: skip


def remarks(record: RunRecord, bound: float | None, options: bool = True) -> str:
    """What a reader of a row must know; with `options`, the flags too."""
    words = ["uses labels: NOT oracle-free"] if record.notes.get("oracle") else []
    words += (
        [f"needs a live monitor: {record.notes['monitor']}"] if record.notes.get("monitor") else []
    )
    words += ["frozen"] if bound is not None and not bound > FROZEN else []
    return ", ".join(
        [
            *words,
            *filter(
                None, [variant(record) if options else "", "dirty tree" if record.dirty else ""]
            ),
        ]
    )


def mean_text(values: list[float]) -> str:
    mean, sem = mean_sem(values)
    return f"{mean:.2f} ± {sem:.2f}"


def table(runs: dict[str, RunRecord]) -> tuple[list[list], list[dict]]:
    """Return printable rows and, for the CSV, one plain row a run."""
    groups, rows, plain = defaultdict(list), [], []
    for folder, record in runs.items():
        data = record.data_hashes[record.config["data"]["data"]]
        groups[record.arm, record.preset, record.steps_done, variant(record), data].append(
            (folder, record)
        )
    every = list(runs.values())
    for (arm, preset, steps, _, _), members in sorted(groups.items()):
        for folder, record in sorted(members, key=lambda m: m[1].seed):
            last, base = cell(record), cell(record, base=True)
            value, bound, text = gain_text([triple(record, every)])
            rates = [
                rate_with_interval(last, "hack"),
                rate_with_interval(last, "solve"),
                f"{base.solve / base.n:.2f}",
            ]
            rows.append(
                [
                    arm,
                    record.seed,
                    preset,
                    steps,
                    last.n,
                    *rates,
                    text,
                    remarks(record, bound),
                    Path(folder).name,
                ]
            )
            plain.append({"arm": arm, "seed": record.seed, "preset": preset, "steps": steps, "n": last.n,
                          "hack": last.hack / last.n, "solve": last.solve / last.n, "base_solve": base.solve / base.n,
                          "gain": value, "gain_lower": bound, "oracle": bool(record.notes.get("oracle")),
                          "monitor": record.notes.get("monitor", ""),
                          "commit": record.commit, "dirty": record.dirty, "run": folder})  # fmt: skip
        newest = {r.seed: r for r in sorted((r for _, r in members), key=lambda r: r.started)}
        if len(records := list(newest.values())) > 1:  # a repeated seed is no further evidence
            cells = [cell(record) for record in records]
            _, bound, text = gain_text([triple(record, every) for record in records])
            rates = [
                mean_text([getattr(c, which) / c.n for c in cells]) for which in ("hack", "solve")
            ]
            base = mean_text([cell(r, base=True).solve / cell(r, base=True).n for r in records])
            rows.append([f"{arm} MEAN", f"{len(records)} seeds", preset, steps, sum(c.n for c in cells), *rates, base, text,
                         remarks(records[0], bound), "mean ± SEM over seeds"])  # fmt: skip
    return rows, plain


def with_absorb(runs: dict[str, RunRecord]) -> dict[str, RunRecord]:
    """Add what `none2r` is without its quarantine."""
    key = lambda r: (r.seed, r.preset, r.steps_done, variant(r))  # noqa: E731
    own = {key(r) for r in runs.values() if r.arm == "absorb"}
    added = {}
    for folder, record in runs.items():
        if (
            record.arm == "none2r"
            and key(record) not in own
            and (ablated := without_quarantine(record))
        ):
            added[f"{folder} (ablated)"] = ablated
    return runs | added


def without_quarantine(record: RunRecord) -> RunRecord | None:
    """A `none2r` record as that of `absorb`, its cells those of the ablated policy; None where these were not evaluated."""
    cells = [c if c.step == 0 else replace(c, state={"ablated": "deployed"}.get(c.state, c.state))
             for c in record.evals if c.step == 0 or c.state != "deployed"]  # fmt: skip
    evaluated = any((c.split, c.state) == ("test", "deployed") and c.step for c in cells)
    return replace(record, arm="absorb", evals=cells) if evaluated else None


BLOCK = re.compile(r"(<!-- runs: (\S+)(?: arms: ([\w ]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The page's text with every table between `<!-- runs: GLOB [arms: ARM …] -->` and `<!-- end -->` made anew from its records."""

    def block(match: re.Match) -> str:
        opening, pattern, arms, closing = match.groups()
        runs = with_absorb(find_runs([str(f) for f in sorted(ROOT.glob(pattern))]))
        if not runs:
            raise UserError(
                f"no record matches {pattern!r}; commit them with --compact, or take the table out"
            )
        rows = [r for r in table(runs)[0] if not arms or r[0].split()[0] in arms.split()]
        several = {r[0].split()[0] for r in rows if "MEAN" in r[0]}
        rows = [
            [r[0].removesuffix(" MEAN"), *r[1:-1]]
            for r in rows
            if "MEAN" in r[0] or r[0] not in several
        ]
        return f"{opening}{tabulate(rows, headers=HEADERS[:-1], tablefmt='github', disable_numparse=True)}\n{closing}"

    return BLOCK.sub(block, text)


def training_notes(rows: list[dict]) -> dict[str, float | int | None]:
    """What tables need of metrics.jsonl: the mean share of routed rows, and the step at which hacks emerge among the students'."""
    shares = [row["share_route"] for row in rows if row.get("share_route") is not None]
    hack = [row["student_hack"] for row in rows]
    means = [
        sum(part) / len(part)
        for part in (hack[max(0, i - WINDOW + 1) : i + 1] for i in range(len(hack)))
    ]
    emerged = next((i + 1 for i, mean in enumerate(means) if mean >= EMERGED), None)
    return {
        "share_route": round(sum(shares) / len(shares), 4) if shares else None,
        "emerged": emerged,
    }


def compact(run: str | Path, target: str | Path) -> RunRecord:
    """Write the record of a run that has ended, small enough to commit: without counts by problem where no table needs them, with its
    directory below out/, and with `training_notes`."""
    record = load_record(run)
    if record.status != "finished" and not record.status.startswith("failed: diverged"):
        raise UserError(
            f"{run} is {record.status}: only a run that finished, or diverged, is evidence"
        )
    counted = lambda c: (c.split, c.markers) == ("test", "novel") and c.state != "as_trained"  # noqa: E731
    record.evals = [c if counted(c) else replace(c, by_problem={}) for c in record.evals]
    record.notes |= training_notes(load_metrics(run))
    where, name = record.config["run"]["out_dir"], Path(run).resolve()
    record.config["run"]["out_dir"] = (
        str(name.relative_to(ROOT)) if name.is_relative_to(ROOT) else f"out/runs/{name.name}"
    )
    record.argv = [
        record.config["run"]["out_dir"] if where and word == where else word for word in record.argv
    ]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(target), (dumps(asdict(record)) + "\n").encode())
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="run directories (default: all of out/runs)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "figs", help="folder of results.csv"
    )
    parser.add_argument(
        "--compact", metavar="FILE", help="write the compact record of one run, and no table"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="make the tables of a results page anew"
    )
    options = parser.parse_args()
    if options.page and not options.page.is_file():
        raise UserError(
            f"no page {options.page}: --page takes one whose tables are to be made anew, such as docs/results.md"
        )
    if options.page:
        options.page.write_text(with_tables(options.page.read_text()))
        return print(f"{options.page}: tables made anew")
    if options.compact:
        if len(options.runs) != 1:
            raise UserError("--compact takes one run directory")
        record = compact(options.runs[0], options.compact)
        return print(
            f"{options.compact}: {record.arm} seed {record.seed}, solve {rate(cell(record).by_problem, 'solve'):.3f}"
        )
    rows, plain = table(with_absorb(find_runs(options.runs)))
    if not rows:
        raise UserError("no finished run among them: wait for one, or look at `just dyn`")
    options.out.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(plain).write_csv(options.out / "results.csv")
    print(
        "Deployed policy, test split, novel markers; [95 % interval over problems], means ± SEM over seeds"
    )
    if any(row[HEADERS.index(GAIN)] == "–" for row in rows):
        print(
            f"gain –: no run of {CEILING_ARM} with the same seed, steps and problems is named or committed (`just ceiling SEED`)"
        )
    print(tabulate(rows, headers=HEADERS, disable_numparse=True))


if __name__ == "__main__":
    run_main(main)
