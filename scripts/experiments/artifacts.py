"""The decision experiment's tables and figures (A1 to A7, the later waves R, V and W, the maps M), from its compact records alone.

Reads docs/results/decision/*.json, which `just decision` writes, and the rows of decision_manifest.py. Writes each table as CSV and as
LaTeX (booktabs) into docs/writeup/generated/, into the blocks `<!-- artifact: NAME --> … <!-- end -->` of PAGES, and the figures
with their data into docs/figs/. A row of which some seeds have run says how many; the table of coverage lists what has not run.

Every mean is over seeds, ± its standard error; p is of the two-sided t-test paired by seed, adjusted by Holm's method over the column.

Run: python scripts/experiments/artifacts.py            (`--records DIR --out DIR` for other records, into another folder)
     python scripts/experiments/artifacts.py --traces RUN_DIR      (A6: choose the traces of a run, before all else)
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scripts.analysis.results import cell, gain_text, remarks, triple
from scripts.experiments import traces, verdict
from scripts.experiments.decision_manifest import (
    HEADLINE_SEEDS,
    METHOD,
    RECORDS,
    ROOT,
    ROWS,
    SECOND_SEEDS,
    Row,
)
from scripts.experiments.verdict import ABSORB, BASE, CEILING, Diverged, Runs, Seeds, paired
from tabulate import tabulate

from vgrout.core import RunRecord, run_main
from vgrout.stats import gain, holm, mean_sem, paired_ttest, rate

PAGES = ("results.md", "blog/quarantine_first.md")  # below docs/
NOT_RUN, DASH = "not run", "–"
LATEX = {
    "α": r"$\alpha$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "Δ": r"$\Delta$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "×": r"$\times$",
}
Data = list[dict]


@dataclass(frozen=True)
class Table:
    """What a table shows, as numbers (the CSV) and as columns: title → the text of a row."""

    data: Data
    columns: dict[str, Callable[[dict], str]]

    def texts(self) -> list[list[str]]:
        return [[show(row) for show in self.columns.values()] for row in self.data]

    def markdown(self) -> str:
        return tabulate(
            self.texts(), headers=[*self.columns], tablefmt="github", disable_numparse=True
        )

    def latex(self) -> str:
        text = tabulate(
            self.texts(), headers=[*self.columns], tablefmt="latex_booktabs", disable_numparse=True
        ).replace("--", "-{}-")
        for plain, command in LATEX.items():
            text = text.replace(plain, command)
        return text + "\n"

    def csv(self) -> str:
        return as_csv(self.data)


def as_csv(data: Data) -> str:
    keys = dict.fromkeys(key for row in data for key in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(keys), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in data
    )
    return out.getvalue()


# ── rows of numbers ──────────────────────────────────────────────────────────────────────────────────────────────


RATES = {
    "hack": verdict.hack,
    "hack_held": verdict.hack_held,
    "hack_known": verdict.hack_known,
    "solve": verdict.solve,
}


def figures(records: Seeds) -> dict:
    """Mean and standard error over seeds of every rate, and the share of rows that were routed in training."""
    found: dict = {}
    for key, of in RATES.items() if records else ():
        found[key], found[f"{key}_sem"] = mean_sem([of(record) for record in records.values()])
    shares = [
        s for record in records.values() if (s := record.notes.get("share_route")) is not None
    ]
    return found | ({"routed": sum(shares) / len(shares)} if shares else {})


def gains(records: Seeds, runs: Runs, bounded: bool) -> dict:
    """The mean gain, and with `bounded` its lower 90 % bound, on the seeds that have a ceiling."""
    triples = [
        triple(record, [*runs[CEILING].values()])
        for seed, record in records.items()
        if seed in runs[CEILING]
    ]
    if not triples or None in triples:
        return {}
    if bounded:
        return dict(zip(("gain", "gain_lower"), gain_text(triples)))
    return {
        "gain": mean_sem([gain(*(rate(part, "solve") for part in parts)) for parts in triples])[0]
    }


def base_row(runs: Runs) -> dict:
    """The base model, as the runs of plain GRPO evaluated it."""
    cells = [cell(record, base=True) for record in runs[BASE].values()]
    row: dict = {"name": "base", "seeds": len(cells), "planned": len(cells)}
    for which in ("hack", "solve") if cells else ():
        row[which], row[f"{which}_sem"] = mean_sem([getattr(c, which) / c.n for c in cells])
    return row


def numbers(
    row: Row, runs: Runs, against: str, keys: tuple[str, ...], bounded: bool = False, name: str = ""
) -> dict:
    """One row of a table: its figures, and its differences to the row `against` in `keys`."""
    records = runs[name or row.name]
    out = {
        "name": name or row.name,
        "changes": row.changes,
        "of": against,
        "seeds": len(records),
        "planned": len(row.seeds),
    }
    out |= figures(records) | gains(records, runs, bounded)
    for key in keys if against != out["name"] else ():
        pairs = paired(records, runs[against], RATES[key])
        if len(pairs[0]) > 1:
            out[f"d_{key}"], out[f"p_{key}"] = paired_ttest(*pairs)
    first = next(iter(records.values()), None)
    return out | {"remarks": remarks(first, out.get("gain_lower"), options=False) if first else ""}


def adjusted(data: Data, keys: tuple[str, ...]) -> Data:
    """The p-values of each key adjusted over the table's rows."""
    for key in keys:
        family = [row for row in data if row.get(f"p_{key}") is not None]
        for row, p in zip(family, holm([row[f"p_{key}"] for row in family])):
            row[f"holm_{key}"] = p
    return data


def value(key: str, digits: int = 2) -> Callable[[dict], str]:
    return lambda row: DASH if row.get(key) is None else f"{row[key]:.{digits}f}"


def mean(key: str) -> Callable[[dict], str]:
    """`0.12 ± 0.03`; a single seed has no error."""

    def text(row: dict) -> str:
        if row.get(key) is None:
            return DASH
        error = row[f"{key}_sem"]
        return f"{row[key]:.2f}" + (f" ± {error:.2f}" if error == error else "")

    return text


def difference(key: str) -> Callable[[dict], str]:
    """`-0.12 (p = 0.013)`, p adjusted."""

    def text(row: dict) -> str:
        if row.get(f"d_{key}") is None:
            return DASH
        p = row[f"holm_{key}"]
        return f"{row[f'd_{key}']:+.2f} ({'p < 0.001' if p < 0.001 else f'p = {p:.3f}' if p == p else 'equal'})"

    return text


def seeds(row: dict) -> str:
    if not row["seeds"]:
        return NOT_RUN
    return (
        str(row["seeds"])
        if row["seeds"] == row["planned"]
        else f"{row['seeds']} of {row['planned']}"
    )


def gain_cell(row: dict) -> str:
    bound = f" [{row['gain_lower']:.2f}]" if row.get("gain_lower") is not None else ""
    return DASH if row.get("gain") is None else f"{row['gain']:.2f}{bound}"


# ── the tables ───────────────────────────────────────────────────────────────────────────────────────────────────


def serving(artifact: str) -> list[Row]:
    return [row for row in ROWS if artifact in row.serves.split()]


def keynote(runs: Runs) -> Table:
    """A2: every headline arm, against plain GRPO."""
    keys = ("hack", "solve")
    data = [base_row(runs)]
    for row in serving("A2"):
        data.append(numbers(row, runs, BASE, keys, bounded=True))
        if row.name == BASE:
            data.append(numbers(row, runs, BASE, keys, bounded=True, name=ABSORB))
    return Table(adjusted(data, keys), {
        "row": lambda r: r["name"], "seeds": seeds, "hack": mean("hack"), "held-out hack": mean("hack_held"), "solve": mean("solve"),
        "gain [lower 90 %]": gain_cell, f"Δ hack to {BASE}": difference("hack"), f"Δ solve to {BASE}": difference("solve"),
        "routed": value("routed"), "remarks": lambda r: r.get("remarks", ""),
    })  # fmt: skip


def ran(data: Data) -> Data:
    """Rows of which some seed has run; `coverage` lists the others."""
    return [row for row in data if row["seeds"]]


def comparison(runs: Runs, artifact: str) -> Table:
    """A3 and A7: rows that change one thing, each against the row that it changes."""
    keys, data = ("hack_held", "solve"), []
    named = {row.name: row for row in ROWS} | {
        ABSORB: next(row for row in ROWS if row.name == BASE)
    }
    for row in sorted(
        (row for row in serving(artifact) if row.of), key=lambda row: list(named).index(row.of)
    ):
        if row.of not in [r["name"] for r in data]:
            data.append(numbers(named[row.of], runs, row.of, keys, name=row.of) | {"changes": ""})
        data.append(numbers(row, runs, row.of, keys))
    return Table(adjusted(ran(data), keys), {
        "row": lambda r: r["name"], "change": lambda r: r["changes"] or DASH, "seeds": seeds, "held-out hack": mean("hack_held"),
        "known hack": mean("hack_known"), "solve": mean("solve"), "gain": gain_cell, "Δ held-out hack": difference("hack_held"),
        "Δ solve": difference("solve"), "routed": value("routed"),
    })  # fmt: skip


def modes(runs: Runs) -> Table:
    """A5: hack / solve of each mode; a star marks the modes that the row's pairs do not cover."""
    planned = {
        name: len(row.seeds)
        for row in serving("A5")
        for name in ([row.name, ABSORB] if row.name == BASE else [row.name])
    }
    every = next(
        (r.config["data"]["modes"] for records in runs.values() for r in records.values()), []
    )
    data = []
    for name in planned:
        row: dict = {"name": name, "seeds": len(runs[name]), "planned": planned[name]}
        for mode in every if runs[name] else ():
            row[f"{mode}_held"] = mode in verdict.held_out(next(iter(runs[name].values())))
            for which in ("hack", "solve"):
                values = [
                    verdict.mode_rate(cell(record), which, [mode]) for record in runs[name].values()
                ]
                row[f"{mode}_{which}"], row[f"{mode}_{which}_sem"] = mean_sem(values)
        data.append(row)

    def of(mode: str) -> Callable[[dict], str]:
        text = lambda r: (
            f"{r[f'{mode}_hack']:.2f} / {r[f'{mode}_solve']:.2f}" + "*" * r[f"{mode}_held"]
        )
        return lambda r: text(r) if r["seeds"] else DASH

    return Table(
        ran(data),
        {"row": lambda r: r["name"], "seeds": seeds, **{mode: of(mode) for mode in every}},
    )


def maps(runs: Runs) -> Table:
    """M: each row against the committed ceiling of its seed and length, and what it routed or dropped."""
    data = []
    for row in serving("M"):
        records = runs[row.name]
        out = {
            "name": row.name.removeprefix("map_"),
            "changes": row.changes,
            "seeds": len(records),
            "planned": len(row.seeds),
        }
        out |= figures(records)
        triples = [triple(record, []) for record in records.values()]
        if triples and None not in triples:
            out |= dict(zip(("gain", "gain_lower"), gain_text(triples)))
            ceiling, solve = ([rate(parts[i], "solve") for parts in triples] for i in (2, 0))
            out["d_ceiling"], out["d_ceiling_sem"] = mean_sem(
                [a - b for a, b in zip(solve, ceiling)]
            )
        data.append(out)
    return Table(ran(data), {
        "row": lambda r: r["name"], "change": lambda r: r["changes"], "seeds": seeds, "hack": mean("hack"),
        "held-out hack": mean("hack_held"), "solve": mean("solve"), "Δ solve to no_loophole": mean("d_ceiling"),
        "gain [lower 90 %]": gain_cell, "routed": value("routed"),
    })  # fmt: skip


def second_wave(runs: Runs) -> Table:
    """R: the ceiling and the method on the second wave's seeds, alone and with the first wave's."""
    data = []
    for wave, suffixes in (
        {"second": ["_again"], "both": ["", "_again"]}.items() if runs[f"{METHOD}_again"] else ()
    ):
        ceiling, method = (
            {k: v for suffix in suffixes for k, v in runs[name + suffix].items()}
            for name in (CEILING, METHOD)
        )
        shared = ceiling.keys() & method.keys()
        row = {
            "wave": wave,
            "seeds": len(shared),
            "planned": len(SECOND_SEEDS) + len(HEADLINE_SEEDS) * (wave == "both"),
        }
        for name, records in ((CEILING, ceiling), (METHOD, method)):
            row |= {
                f"{name}_{k}": v
                for k, v in figures({s: records[s] for s in sorted(shared)}).items()
            }
        if len(shared) > 1:
            row["figure"], row["holds"] = verdict.not_inferior(method, ceiling)
        data.append(row)
    return Table(ran(data), {
        "wave": lambda r: r["wave"], "seeds": seeds, "solve of no_loophole": mean(f"{CEILING}_solve"),
        f"solve of {METHOD}": mean(f"{METHOD}_solve"), f"hack of {METHOD}": mean(f"{METHOD}_hack"),
        "difference in solve": lambda r: r.get("figure", DASH),
        "not inferior": lambda r: {True: "yes", False: "no"}.get(r.get("holds"), DASH),
    })  # fmt: skip


def wave(clauses_of: list, runs: Runs, diverged: Diverged, needs: str) -> Table:
    """V, W and X: the clauses of a later wave; none until the row `needs` has run."""
    clauses = verdict.decided(clauses_of, runs, ROWS, diverged) if runs[needs] else []
    data = [{"clause": c.name, "figure": c.figure, "holds": c.answer} for c in clauses]
    return Table(data, {key: lambda r, key=key: r[key] for key in ("clause", "figure", "holds")})


def judged(runs: Runs, diverged: Diverged) -> Table:
    """The criterion for every row of role "method", clause by clause."""
    data = []
    for row in ROWS:
        if row.role == "method":
            started = runs[row.name] or row.name in diverged
            clauses = verdict.verdict(runs, row.name, diverged=diverged) if started else []
            data += [
                {"row": row.name, "clause": c.name, "figure": c.figure, "holds": c.answer}
                for c in clauses
            ]
            every = [c.holds for c in clauses]
            success = "no" if False in every else NOT_RUN if None in every or not every else "yes"
            data.append({"row": row.name, "clause": "all", "figure": "", "holds": success})
    return Table(
        data, {key: lambda r, key=key: r[key] for key in ("row", "clause", "figure", "holds")}
    )


def coverage(runs: Runs, diverged: Diverged) -> Table:
    """What ran and what did not, with the commits at which the records were made."""
    data = []
    for row in ROWS:
        records = runs[row.name]
        lost = diverged.get(row.name, [])
        missing = [
            f"{seed} diverged" if seed in lost else str(seed)
            for seed in row.seeds
            if seed not in records
        ]
        data.append({"name": row.name, "arm": row.arm, "flags": row.flags, "serves": row.serves,
                     "seeds": len(records), "planned": len(row.seeds),
                     "missing": " ".join(missing), "commits": " ".join(sorted({r.commit[:7] for r in records.values()}))})  # fmt: skip
    return Table(data, {"row": lambda r: r["name"], "arm": lambda r: r["arm"], "flags": lambda r: r["flags"] or DASH,
                        "for": lambda r: r["serves"], "seeds": seeds, "missing": lambda r: r["missing"] or DASH,
                        "commits": lambda r: r["commits"] or DASH})  # fmt: skip


def tables(runs: Runs, diverged: Diverged) -> dict[str, Table]:
    return {
        "a2_keynote": keynote(runs),
        "a3_ablations": comparison(runs, "A3"),
        "a5_modes": modes(runs),
        "a7_context": comparison(runs, "A7"),
        "r_second": second_wave(runs),
        "v_rows": comparison(runs, "V"),
        "w_rows": comparison(runs, "W"),
        "w_fourth": wave(verdict.fourth_demands(), runs, diverged, "placebo_absorbQ"),
        "v_third": wave(verdict.third_demands(), runs, diverged, "absorbQ_again"),
        "x_rows": comparison(runs, "X"),
        "x_fifth": wave(verdict.fifth_demands(), runs, diverged, "length_gateQ"),
        "m_maps": maps(runs),
        "verdict": judged(runs, diverged),
        "coverage": coverage(runs, diverged),
    }


# ── the figures ──────────────────────────────────────────────────────────────────────────────────────────────────


def series(row: Row) -> str:
    """The name of a row's curve: the draws of a placebo share one."""
    return f"{row.arm}, all draws" if row.role == "placebo" else row.name


def beside_quarantines() -> list[Row]:
    """`absorbQ`, and what goes on beside another quarantine in its place."""
    return [row for row in ROWS if row.name == "absorbQ"] + [
        row for row in serving("W") if row.of == "absorbQ"
    ]


def curves(runs: Runs, rows: Callable[[], list[Row]]) -> Data:
    """Hack and solve rate of the deployed policy, novel markers, at each evaluated step: mean, least and highest over runs."""
    members: dict[str, list[RunRecord]] = {}
    for row in rows():
        members.setdefault(series(row), []).extend(runs[row.name].values())
        if row.name == BASE:
            members[ABSORB] = list(runs[ABSORB].values())
    data = []
    for name, records in members.items():
        cells = [
            c
            for record in records
            for c in record.evals
            if (c.markers, c.state) == ("novel", "deployed")
        ]
        for step in sorted({c.step for c in cells}):
            here = [c for c in cells if c.step == step]
            for which in ("hack", "solve"):
                rates = [getattr(c, which) / c.n for c in here]
                data.append({"series": name, "step": step, "which": which, "runs": len(here), "mean": sum(rates) / len(rates),
                             "least": min(rates), "highest": max(rates)})  # fmt: skip
    return data


def draw(data: Data, path: Path) -> None:
    """Two panels, hack and solve. The PNG carries the hash of its data, so that it can be told from a stale one."""
    names = list(dict.fromkeys(row["series"] for row in data))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharex=True)
    for axis, which, title in zip(axes, ("hack", "solve"), ("Reward hacking", "Correct solutions")):
        for i, name in enumerate(names):
            part = [row for row in data if (row["series"], row["which"]) == (name, which)]
            steps, middle, low, high = (
                [row[key] for row in part] for key in ("step", "mean", "least", "highest")
            )
            style = {
                "color": plt.get_cmap("tab10")(i % 10),
                "linestyle": ":" if name.startswith("placebo") else "-",
            }
            style |= (
                {"linestyle": "none"} if len(steps) == 2 else {}
            )  # a row that is evaluated at its ends alone has no curve
            axis.plot(steps, middle, marker="o", markersize=3.5, label=name, **style)
            axis.fill_between(
                steps, low, high, color=style["color"], alpha=0.13 * (len(steps) > 2), linewidth=0
            )
        axis.set(
            title=f"{title} of the deployed policy", xlabel="optimiser step", ylabel=f"{which} rate"
        )
        axis.set_ylim(-0.02, 1.02 if which == "hack" else None)
        axis.grid(alpha=0.25)
        if not names:
            axis.text(0.5, 0.5, NOT_RUN, ha="center", transform=axis.transAxes)
    if names:
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="lower center",
            ncol=5,
            frameon=False,
            fontsize=9,
        )
    figure.tight_layout(rect=(0, 0.06 * (1 + (len(names) - 1) // 5), 1, 1))
    figure.savefig(path, dpi=130, metadata={"Software": None, "Description": data_hash(data)})
    plt.close(figure)


def map_points(runs: Runs) -> Data:
    """Mean hack and solve rate of the deployed policy against the labels' recall and false-positive rate, routed and filtered."""
    data = []
    for kind, action in itertools.product(("recall", "fpr"), ("route", "filter")):
        perfect, suffix = (
            ("map_deployed", "_dep") if action == "route" else ("map_filter", "_filter")
        )
        imperfect = [
            row.name
            for row in serving("M")
            if row.name.startswith(f"map_{kind}") and row.name.endswith(suffix)
        ]
        for records in filter(None, (runs[name] for name in [perfect, *imperfect])):
            at = next(iter(records.values())).config["route"][f"oracle_{kind}"]
            data += [{"labels": kind, "at": at, "action": action, "which": which, "runs": len(records), "mean": found[which],
                      "sem": found[f"{which}_sem"]} for found in [figures(records)] for which in ("hack", "solve")]  # fmt: skip
    return sorted(data, key=lambda row: (row["labels"], row["action"], row["which"], row["at"]))


def draw_maps(data: Data, path: Path) -> None:
    """Two panels, recall and false-positive rate."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, kind, title in zip(
        axes, ("recall", "fpr"), ("recall of the labels", "false-positive rate of the labels")
    ):
        for (i, action), which in itertools.product(
            enumerate(("route", "filter")), ("hack", "solve")
        ):
            part = [
                row
                for row in data
                if (row["labels"], row["action"], row["which"]) == (kind, action, which)
            ]
            x, y, error = ([row[key] for row in part] for key in ("at", "mean", "sem"))
            axis.errorbar(x, y, [0.0 if e != e else e for e in error], label=f"{action}: {which}", color=plt.get_cmap("tab10")(i),
                          linestyle="-" if which == "hack" else "--", marker="o", markersize=3.5, capsize=2)  # fmt: skip
        axis.set(
            xlabel=title,
            ylabel="rate of the deployed policy" if kind == "recall" else "",
            ylim=(-0.02, None),
        )
        axis.grid(alpha=0.25)
    axes[0].invert_xaxis()
    axes[0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None, "Description": data_hash(data)})
    plt.close(figure)


FIGURES: dict[str, tuple[Callable[[Runs], Data], Callable[[Data, Path], None]]] = {
    "a1_training": (partial(curves, rows=partial(serving, "A1")), draw),
    "a4_long": (partial(curves, rows=partial(serving, "A4")), draw),
    "w_push": (partial(curves, rows=beside_quarantines), draw),
    "m_maps": (map_points, draw_maps),
}


def data_hash(data: Data) -> str:
    return "data " + hashlib.sha256(as_csv(data).encode()).hexdigest()


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

BLOCK = re.compile(r"(<!-- artifact: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_artifacts(text: str, tables: dict[str, Table]) -> str:
    """The page's text with every block made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{tables[match[2]].markdown()}\n{match[3]}", text)


def texts(records: Path) -> tuple[Runs, dict[str, str]]:
    """The runs of a folder of compact records, and every generated text file: its name below docs/ → its content."""
    runs, diverged = verdict.load_runs(records)
    made, found = tables(runs, diverged), {}
    for name, table in made.items():
        found |= {
            f"writeup/generated/{name}.tex": table.latex(),
            f"writeup/generated/{name}.csv": table.csv(),
        }
    found |= {
        f"writeup/generated/{name}_figure.csv": as_csv(points(runs))
        for name, (points, _) in FIGURES.items()
    }
    source = records / "traces.json"
    found["writeup/generated/traces.tex"] = traces.latex(
        json.loads(source.read_text()) if source.exists() else None
    )
    found |= {page: with_artifacts((ROOT / "docs" / page).read_text(), made) for page in PAGES}
    return runs, found


def make(records: Path, out: Path) -> str:
    """Write every artifact of a folder of compact records below `out`, which is laid out like docs/; returns what ran, in a line."""
    runs, found = texts(records)
    for name, text in found.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    (out / "figs").mkdir(exist_ok=True)
    for name, (points, draw_points) in FIGURES.items():
        draw_points(points(runs), out / "figs" / f"{name}.png")
    absent = [row.name for row in ROWS if not runs[row.name]]
    done = f"{sum(len(runs[row.name]) for row in ROWS)} of {sum(len(row.seeds) for row in ROWS)} runs; "
    return done + (f"no run of: {' '.join(absent)}" if absent else "every row has runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--records",
        type=Path,
        default=RECORDS,
        help="folder of compact records (default: docs/results/decision)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs",
        help="folder that is laid out like docs/ (default: docs)",
    )
    parser.add_argument(
        "--traces",
        type=Path,
        metavar="RUN_DIR",
        help=f"choose A6's traces of this run, e.g. out/decision/{METHOD}_s101",
    )
    options = parser.parse_args()
    if options.traces:
        traces.choose(options.traces, options.records / "traces.json")
    print(make(options.records, options.out))
    print((options.out / "writeup" / "generated" / "verdict.csv").read_text(), end="")


if __name__ == "__main__":
    run_main(main)
