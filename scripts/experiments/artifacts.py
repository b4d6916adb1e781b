"""The decision's tables and figures (A1 to A7, waves R, V, W and X, the maps M) from its records.

Each table is written as LaTeX into `docs/writeup/generated/` and into every block
`<!-- artifact: NAME --> … <!-- end -->` of a page below `docs/`, each figure into `docs/figs/`. A
row of which some seeds have run says how many, `coverage` what has not. Means are over seeds, ±
their standard error; p is of the two-sided t-test paired by seed, by Holm's method over the column.

Run: python -m scripts.experiments.artifacts
"""

import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scripts.analysis.results import cell
from scripts.experiments import criterion, records
from scripts.experiments.criterion import BASE, DERIVED, Evidence
from scripts.experiments.records import ROOT
from tabulate import tabulate

from vgrout.core import run_main
from vgrout.stats import gain, holm, mean_sem, paired_ttest, rate

DOCS = ROOT / "docs"
DASH = "–"
LATEX = {"α": r"$\alpha$", "±": r"$\pm$", "−": "$-$", "–": "--", "Δ": r"$\Delta$"}
LATEX |= {"≤": r"$\le$", "≥": r"$\ge$", "×": r"$\times$"}
Data = list[dict]
Table = tuple[Data, str]  # rows of numbers, and which of their keys are shown, behind " | "


# ── a table as text ──────────────────────────────────────────────────────────────────────────────


def show(row: dict, key: str) -> str:
    """A number, with what the row has beside it: an error `± key`, a `p key`, a `lower key`."""
    value = row.get(key)
    if value is None or value == "":
        return DASH
    if not isinstance(value, float):
        return str(value)
    p = row.get(f"p {key}")
    if p is not None:
        found = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        return f"{value:+.2f} ({found if p == p else 'equal'})"
    for beside, form in ((f"± {key}", " ± {:.2f}"), (f"lower {key}", " [{:.2f}]")):
        found = row.get(beside)
        if found is not None and found == found:
            return f"{value:.2f}{form.format(found)}"
    return f"{value:.2f}"


def render(table: Table, form: str) -> str:
    data, titles = table[0], table[1].split(" | ")
    cells = [[show(row, title) for title in titles] for row in data]
    return tabulate(cells, headers=titles, tablefmt=form, disable_numparse=True)


def latex(table: Table) -> str:
    made = render(table, "latex_booktabs").replace("--", "-{}-")
    for plain, command in LATEX.items():
        made = made.replace(plain, command)
    return made + "\n"


# ── the tables ───────────────────────────────────────────────────────────────────────────────────


def serving(artifact: str) -> list[str]:
    """Names of its rows, with what the runs of plain GRPO say of the base and of `absorb`."""
    names = [row.name for row in records.rows() if artifact in row.serves.split()]
    if BASE in names:
        names.insert(names.index(BASE) + 1, "absorb")
    return names


def numbers(evidence: Evidence, name: str) -> dict:
    """One row of a table: mean and standard error over seeds of each rate, routed share, gain."""
    row, own = records.named(DERIVED.get(name, name)), [*evidence.runs[name].values()]
    planned = len(row.seeds)
    seeds = str(planned) if len(own) == planned else f"{len(own)} of {planned}"
    found = {"row": name, "seeds": seeds, "change": row.changes}
    each = [criterion.rates(record) for record in own]
    for key in criterion.KEYS:
        found[key], found[f"± {key}"] = mean_sem([one[key] for one in each])
    shares = [record.notes.get("share_route") for record in own]
    if known := [share for share in shares if share is not None]:
        found["routed"] = mean(known)
    if triples := evidence.triples(name):
        found["gain"] = mean(gain(*(rate(part, "solve") for part in counts)) for counts in triples)
    return found


def compared(evidence: Evidence, pairs: list[tuple[str, str]], keys: tuple[str, ...]) -> Data:
    """A row for each (name, row that it is compared with), where both have runs; p adjusted."""
    data = []
    for name, other in pairs:
        own, of = evidence.runs[name], evidence.runs[other]
        if not own:
            continue
        data.append(numbers(evidence, name))
        shared = sorted(own.keys() & of.keys())
        if name != other and len(shared) > 1:
            for key in keys:
                a, b = (criterion.column([runs[s] for s in shared], key) for runs in (own, of))
                data[-1][f"Δ {key}"], data[-1][f"p Δ {key}"] = paired_ttest(a, b)
    for key in keys:
        family = [row for row in data if f"p Δ {key}" in row]
        for row, p in zip(family, holm([row[f"p Δ {key}"] for row in family]), strict=True):
            row[f"p Δ {key}"] = p
    return data


def keynote(evidence: Evidence) -> Table:
    """A2: every headline arm, against plain GRPO."""
    names = serving("A2")
    pairs = [("base", "base")] + [(name, BASE) for name in names]
    data = compared(evidence, pairs, ("hack", "solve"))
    for row in data[1:]:
        row["lower gain"] = evidence.gain_bound(row["row"])
        row["remarks"] = "frozen" if evidence.is_frozen(row["row"]) else ""
    titles = "row | seeds | hack | hack without pairs | solve | gain | Δ hack | Δ solve"
    return data, f"{titles} | routed | remarks"


def comparison(evidence: Evidence, artifact: str) -> Table:
    """Rows that change one thing, each against the row that it changes."""
    order = [*(row.name for row in records.rows()), "absorb"]
    changed = [records.named(name) for name in serving(artifact) if name not in DERIVED]
    changed = [row for row in changed if row.of]
    pairs: dict[str, str] = {}
    for row in sorted(changed, key=lambda row: order.index(row.of)):
        pairs.setdefault(row.of, row.of)
        pairs[row.name] = row.of
    data = compared(evidence, [*pairs.items()], ("hack without pairs", "solve"))
    for row in data:
        if pairs[row["row"]] == row["row"]:
            row["change"] = ""
    titles = "row | change | seeds | hack without pairs | hack with pairs | solve | gain"
    return data, f"{titles} | Δ hack without pairs | Δ solve | routed"


def modes(evidence: Evidence) -> Table:
    """A5: hack / solve by mode; a star: held out, since the row reads pairs of other modes."""
    data, every = [], []
    for name in serving("A5"):
        own = [*evidence.runs[name].values()]
        if not own:
            continue
        data.append(numbers(evidence, name))
        every = own[0].config["data"]["modes"]
        for mode in every:
            shares = []
            for which in ("hack", "solve"):
                found = [criterion.mode_rate(cell(record), which, [mode]) for record in own]
                shares.append(f"{sum(found) / len(found):.2f}")
            held = bool(own[0].pair_hash) and mode in criterion.without_pairs(own[0])
            data[-1][mode] = " / ".join(shares) + "*" * held
    return data, " | ".join(["row", "seeds", *every])


def maps(evidence: Evidence) -> Table:
    """M: true labels, and labels that err, on development seeds."""
    data = compared(evidence, [(name, name) for name in serving("M")], ())
    return data, "row | change | seeds | hack | hack without pairs | solve | gain | routed"


def judged(waves: tuple[str, ...], evidence: Evidence) -> Table:
    """Clauses of later waves, or of methods, each of which ends with a line for all of them."""
    data = []
    for wave in waves:
        found = criterion.answers(wave, evidence)
        data += found
        if wave in evidence.runs:
            worst = {answer["holds"].split(",")[0] for answer in found}
            success = next(word for word in ("no", "not run", "yes") if word in worst)
            data.append({"clause": f"{wave}: every clause", "figure": "", "holds": success})
    return data, "clause | figure | holds"


def coverage(evidence: Evidence) -> Table:
    """What ran and what did not."""
    data = []
    for row in records.rows():
        states = {seed: evidence.state(row.name, seed) for seed in row.seeds}
        entry = {"row": row.name, "arm": row.arm, "flags": row.flags, "for": row.serves}
        entry["seeds"] = len(evidence.runs[row.name])
        entry["absent"] = ", ".join(f"{state} {seed}" for seed, state in states.items() if state)
        data.append(entry)
    return data, "row | arm | flags | for | seeds | absent"


TABLES: dict[str, Callable[[Evidence], Table]] = {
    "a2_keynote": keynote,
    "a3_ablations": partial(comparison, artifact="A3"),
    "a5_modes": modes,
    "a7_context": partial(comparison, artifact="A7"),
    "r_second": partial(judged, ("R",)),
    "v_rows": partial(comparison, artifact="V"),
    "v_third": partial(judged, ("V",)),
    "w_rows": partial(comparison, artifact="W"),
    "w_fourth": partial(judged, ("W",)),
    "x_rows": partial(comparison, artifact="X"),
    "x_fifth": partial(judged, ("X",)),
    "m_maps": maps,
    "verdict": partial(judged, ("routeQ", "routeV", "routeA", "routeL")),
    "coverage": coverage,
}


# ── the figures: hack and solve over training, each curve with a band ────────────────────────────


def curves(evidence: Evidence, artifact: str) -> Data:
    """Rates of the deployed policy, novel markers, by step: mean, least and highest over runs.

    The draws of a placebo share one curve.
    """
    cells: dict[tuple[str, int], list] = {}
    for name in serving(artifact):
        row = records.named(DERIVED.get(name, name))
        series = f"{row.arm}, all draws" if row.role == "placebo" else name
        for record in evidence.runs[name].values():
            for c in record.evals:
                if (c.markers, c.state) == ("novel", "deployed"):
                    cells.setdefault((series, c.step), []).append(c)
    data = []
    for (series, step), found in sorted(cells.items()):
        for which in PANELS:
            each = [getattr(c, which) / c.n for c in found]
            point = {"series": series, "which": which, "step": step, "mean": sum(each) / len(each)}
            data.append(point | {"low": min(each), "high": max(each)})
    return data


def draw(data: Data, path: Path) -> None:
    """The PNG carries the hash of its data, so that it can be told from a stale one."""
    names = list(dict.fromkeys(point["series"] for point in data))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    for axis, (which, title) in zip(axes, PANELS.items(), strict=True):
        for i, name in enumerate(names):
            part = [p for p in data if (p["series"], p["which"]) == (name, which)]
            x, middle, low, high = ([p[k] for p in part] for k in ("step", "mean", "low", "high"))
            line = ":" if name.startswith("placebo") else "-"
            ends = len(x) == 2  # evaluated at its ends alone: no curve
            axis.plot(x, middle, "o" if ends else f"o{line}", color=f"C{i}", ms=3.5, label=name)
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0 if ends else 0.13, linewidth=0)
        axis.set(title=f"{title} of the deployed policy", xlabel="optimiser step", ylabel="rate")
        axis.grid(alpha=0.25)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncol=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06 * (1 + len(names) // 6), 1, 1))
    figure.savefig(path, dpi=130, metadata={"Software": None, "Description": data_hash(data)})
    plt.close(figure)


def data_hash(data: Data) -> str:
    return "data " + hashlib.sha256(json.dumps(data).encode()).hexdigest()


PANELS = {"hack": "Reward hacking", "solve": "Correct solutions"}
FIGURES = {"a1_training": "A1", "a4_long": "A4", "w_push": "push"}


# ── writing ──────────────────────────────────────────────────────────────────────────────────────

BLOCK = re.compile(r"(<!-- artifact: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def texts(evidence: Evidence) -> dict[str, str]:
    """Every generated text: name below docs/ → content."""
    found, blocks = {}, {}
    for name, make_table in TABLES.items():
        table = make_table(evidence)
        found[f"writeup/generated/{name}.tex"] = latex(table)
        blocks[name] = render(table, "github")
    for page in sorted(DOCS.rglob("*.md")):
        old = page.read_text()
        if BLOCK.search(old):
            new = BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}\n{match[3]}", old)
            found[str(page.relative_to(DOCS))] = new
    return found


def main() -> None:
    evidence = criterion.load()
    for name, content in texts(evidence).items():
        (DOCS / name).write_text(content)
    for name, artifact in FIGURES.items():
        draw(curves(evidence, artifact), DOCS / "figs" / f"{name}.png")
    done = sum(len(evidence.runs[row.name]) for row in records.rows())
    print(f"tables and figures of {done} finished runs, below {DOCS}")


if __name__ == "__main__":
    run_main(main)
