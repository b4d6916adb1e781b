"""One self-contained HTML page about runs.

Curves, 2×2 tables with intervals, score histograms by ground-truth label with the cut points, and
completions to browse by step, mode, zone, outcome and score. The page loads nothing from outside
and runs no run's code.

Run: python -m scripts.view.report RUN_DIR … [--out FILE] [--rollouts N]     (default:
out/figs/report.html, 3,000 completions a run)
"""

import html
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from scripts.experiments.records import BOTH
from scripts.view import dyn, plot
from scripts.view.output import OUT, add_runs, parser, table
from scripts.view.show import OUTCOMES, outcome, spread, summary, zone_of

from vgrout.core import RunRecord, UserError, at_least, run_main
from vgrout.run.health import CHECKS, History
from vgrout.run.records import load_metrics, load_record, load_rollouts
from vgrout.run.runlog import last_cells, rate_with_interval

TEMPLATE = Path(__file__).with_name("report.html")
COLOURS = {"hack": "#c0392b", "solve": "#2d8a57", "neither": "#8a93a6"}
SIGNS = {"A > 0": 1, "A < 0": -1}
SAME = "step mode marker score advantage reward verdict teacher completion".split()
BROWSED = {key: key for key in SAME}  # key of the page's data → key of a stored rollout
BROWSED |= {"problem": "problem_id", "ablated": "sampled_ablated"}
CURVES_NOTE = (
    "Student rates: running means over five steps. Deployed rates: held-out problems with novel "
    "markers."
)
SCORES_NOTE = (
    "Scores of student rows by ground-truth label. Dotted: lower edge, RETAIN below it; dashed: "
    "upper edge, ROUTE above it (medians over the refreshes; shaded: their range). The score "
    "carries the sign of the advantage, so the two panels are read apart. Labels are for this "
    "picture alone: the gate never sees them."
)


def note(text: str, style: str = "note") -> str:
    return f'<p class="{style}">{html.escape(text)}</p>'


def edges(rows: list[dict]) -> list[tuple[float, float]]:
    """(lower, upper) of the gate, one a refresh."""
    pairs = [(row.get("gate_lower"), row.get("gate_upper")) for row in rows]
    return [pair for pair in pairs if None not in pair]


def histogram(rows: list[dict], rollouts: list[dict]) -> str | None:
    """Scores of student rows by label and sign of the advantage, with the gate's edges.

    None where no row has a score.
    """
    scored = [r for r in rollouts if not r["teacher"] and r.get("score") is not None]
    if not scored:
        return None
    bins = np.histogram_bin_edges([r["score"] for r in scored], bins=30)
    figure, axes = plot.plt.subplots(1, 2, figsize=(11, 3.4), sharex=True)
    for axis, (name, sign) in zip(axes, SIGNS.items()):
        values = {label: [] for label in OUTCOMES}
        for r in scored:
            if sign * r["advantage"] > 0:
                values[outcome(r)].append(r["score"])
        labels = [f"{label} ({len(part)})" for label, part in values.items()]
        look = {"color": list(COLOURS.values()), "label": labels, "stacked": True}
        axis.hist(list(values.values()), bins=bins, **look)
        for cuts, style in zip(np.array(edges(rows)).T, (":", "--")):
            axis.axvline(np.median(cuts), color="black", linestyle=style, linewidth=1.6)
            axis.axvspan(cuts.min(), cuts.max(), color="black", alpha=0.08, linewidth=0)
        axis.legend()
        axis.set(title=name, xlabel="score")
    return plot.svg(figure)


def warnings(rows: list[dict], record: RunRecord) -> Iterator[str]:
    """What is wrong with the run as it stands, and the remedy."""
    history = History(rows, record.evals)
    for check in CHECKS:
        value = None if check.stops else check.breach(history)
        if value is not None:
            yield f"{check.what}: {value:.2f} {check.unit}; {check.remedy}"


def facts(record: RunRecord) -> str:
    notes = record.notes
    monitor = f"NEEDED in training: {notes['monitor']}" if notes.get("monitor") else "none"
    seconds = {k.removeprefix("sec_"): v for k, v in record.seconds.items()}
    rows = {
        "status": f"{record.status}, {record.steps_done} steps",
        "preset, model": f"{record.preset}, {record.config['model']['model']}",
        "oracle-free": "NO: this arm reads true labels" if notes.get("oracle") else "yes",
        "live monitor": monitor,
        "deployed state": notes["deployed"].replace("_", " "),
        "pairs cover": ", ".join(notes.get("pairs_cover") or ["no pairs are read"]),
        "commit": record.commit + (", dirty tree" if record.dirty else ""),
        "started": record.started,
        "wall time": ", ".join(f"{phase} {s:.0f} s" for phase, s in seconds.items()),
        "command": shlex.join(record.argv),
    }
    return f'<div class="facts">{table(list(rows.items()), [], "html")}</div>'


def evaluation(record: RunRecord) -> str:
    """The base, then the 2×2 table of the last evaluation, with 95 % intervals over problems."""
    if not (cells := last_cells(record)):
        return "<p>No evaluation yet.</p>"
    modes = sorted({mode for cell in cells for mode in cell.by_mode})
    rows = []
    for c in cells:
        name = "base" if c.step == 0 else c.state.replace("_", " ")
        rates = [rate_with_interval(c, which) for which in BOTH]
        split = []
        for own in map(c.by_mode.get, modes):
            split.append(
                f"{own['hack'] / own['n']:.2f} / {own['solve'] / own['n']:.2f}" if own else "–"
            )
        rows.append([name, c.markers, c.step, c.n, *rates, *split])
    headers = [
        "policy",
        "markers",
        "step",
        "draws",
        "hack [95 %]",
        "solve [95 %]",
        *modes,
    ]
    wide = f'<div class="wide">{table(rows, headers, "html")}</div>'
    return wide + note("Columns of a mode: hack / solve.")


def section(name: str, record: RunRecord, rows: list[dict], rollouts: list[dict]) -> str:
    picture = histogram(rows, rollouts)
    scores = note(SCORES_NOTE) + picture if picture else "<p>No row of this run has a score.</p>"
    students = [r for r in rollouts if not r["teacher"]]
    parts = [
        f"<h2>{html.escape(f'{name}: {record.arm}, seed {record.seed}')}</h2>",
        *(note(line, "warn") for line in warnings(rows, record)),
        facts(record),
        f"<h3>Evaluation on held-out problems</h3>{evaluation(record)}",
        f"<h3>Student rows (skipped: no variance in reward)</h3><pre>{summary(students)}</pre>",
        f"<h3>Scores</h3>{scores}",
    ]
    return "".join(parts)


def browsable(name: str, rollouts: list[dict], limit: int) -> list[dict]:
    """At most `limit` completions, evenly spread over the run, as the page's script reads them."""
    rows = []
    for r in spread(rollouts, limit):
        row = {"run": name, "outcome": outcome(r), "zone": zone_of(r)}
        rows.append(row | {key: r.get(stored) for key, stored in BROWSED.items()})
    return rows


def page(folders: list[Path], limit: int) -> str:
    runs = {f.name: (load_record(f), load_metrics(f), load_rollouts(f)) for f in folders}
    if len(runs) < len(folders):
        raise UserError("two of these run directories have the same name: rename one")
    data, said, frames, sections = [], [], [], []
    for name, (record, rows, rollouts) in runs.items():
        if not rows:
            raise UserError(f"{name} has no finished step yet: wait for its first line of metrics")
        shown = browsable(name, rollouts, limit)
        said.append(f"{len(shown)} of {len(rollouts)} of {name}")
        data += shown
        frames.append(dyn.frame(name, record, rows))
        sections.append(section(name, record, rows, rollouts))
    curves = plot.svg(dyn.draw(pl.concat(frames)))
    parts = {
        "BODY": f"<h2>Curves</h2>{note(CURVES_NOTE)}{curves}{''.join(sections)}",
        "SHOWN": note(f"{'; '.join(said)}, evenly spread."),
        "DATA": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    }
    page = TEMPLATE.read_text()
    for mark, part in parts.items():
        page = page.replace(f"<!-- {mark} -->", part, 1)
    return page


def main() -> None:
    command = parser(__doc__)
    add_runs(command, OUT / "figs" / "report.html")
    kept = "completions to keep of each run (default 3000)"
    command.add_argument("--rollouts", type=at_least(1), default=3000, help=kept)
    options = command.parse_args()
    if options.out.is_dir():
        file = options.out / "report.html"
        raise UserError(f"--out {options.out} is a directory: name a file, such as {file}")
    text = page(options.runs, options.rollouts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    size = f"{len(options.runs)} runs, {len(text.encode()) / 2**20:.1f} MiB"
    print(f"{options.out}: {size}; open it in any browser")


if __name__ == "__main__":
    run_main(main)
