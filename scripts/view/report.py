"""One self-contained HTML page about runs: curves, 2×2 tables with intervals, score histograms by ground-truth label with the cut
points, and completions to browse by step, mode, zone, outcome and score. It loads nothing from outside and runs no run's code.

Run: python scripts/view/report.py RUN_DIR … [--out FILE] [--rollouts N]     (default: out/figs/report.html, 3,000 completions a run)
"""

import argparse
import html
import io
import json
import shlex
import tempfile
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from scripts.view import dyn
from scripts.view.show import OUTCOMES, outcome
from tabulate import tabulate

from vgrout.core import RunRecord, UserError, Zone, run_main
from vgrout.run.advice import advice
from vgrout.run.records import load_metrics, load_record, load_rollouts
from vgrout.run.runlog import last_cells, rate_with_interval

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("report.html")
COLOURS = {"hack": "#c0392b", "solve": "#2d8a57", "neither": "#8a93a6"}
plt.rcParams["svg.fonttype"] = "none"  # text stays text


def svg_of(figure: plt.Figure) -> str:
    """A figure as an inline <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def curves(runs: dict[str, tuple[RunRecord, list[dict], list[dict]]]) -> str:
    """The figure of `just dyn` for these runs."""
    data = pl.concat([dyn.frame(name, record, rows) for name, (record, rows, _) in runs.items()])
    with tempfile.TemporaryDirectory() as folder:
        dyn.draw(data, path := Path(folder) / "curves.svg")
        plt.close("all")
        text = path.read_text()
    return text[text.index("<svg") :]


def edges(rows: list[dict], steps: range) -> list[tuple[float, float]]:
    """(lower, upper) of the gate in force at each of `steps`: those of the last refresh before it."""
    found, last = [], None
    for row in rows:
        if row.get("gate_lower") is not None and row.get("gate_upper") is not None:
            last = (row["gate_lower"], row["gate_upper"])
        if row["step"] in steps and last:
            found.append(last)
    return found


def histogram(rows: list[dict], rollouts: list[dict]) -> str | None:
    """Scores of student rows by ground-truth label, by third of the run and by sign of the advantage, with the band's edges.

    The lines are the medians of the edges over the third, the shading their range. None where no row has a score.
    """
    scored = [r for r in rollouts if not r["teacher"] and r.get("score") is not None]
    if not scored:
        return None
    last = max(r["step"] for r in rollouts) + 1
    thirds = [range(last * i // 3, last * (i + 1) // 3) for i in range(3)]
    bins = np.histogram_bin_edges([r["score"] for r in scored], bins=30)
    figure, axes = plt.subplots(2, 3, figsize=(13, 5.6), sharex=True)
    for line, (name, sign) in zip(axes, (("A > 0", 1), ("A < 0", -1))):
        for axis, steps in zip(line, thirds):
            part = [r for r in scored if r["step"] in steps and sign * r["advantage"] > 0]
            values = [[r["score"] for r in part if outcome(r) == label] for label in OUTCOMES]
            axis.hist(values, bins=bins, stacked=True, color=[COLOURS[label] for label in OUTCOMES],
                      label=[f"{label} ({len(v)})" for label, v in zip(OUTCOMES, values)])  # fmt: skip
            if steps and (cuts := np.array(edges(rows, steps))).size:
                for cut, style in zip(cuts.T, (":", "--")):
                    axis.axvline(np.median(cut), color="black", linestyle=style, linewidth=1.6)
                    axis.axvspan(cut.min(), cut.max(), color="black", alpha=0.08, linewidth=0)
            axis.legend(fontsize=8, frameon=False)
            axis.set_title(
                f"{name}, steps {steps.start}–{max(steps.stop - 1, steps.start)}", fontsize=10
            )
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("score")
    figure.tight_layout()
    return svg_of(figure)


def facts(record: RunRecord) -> str:
    shown = [
        ("status", f"{record.status}, {record.steps_done} steps"),
        ("preset, model", f"{record.preset}, {record.config['model']['model']}"),
        ("oracle-free", "NO: this arm reads true labels" if record.notes.get("oracle") else "yes"),
        ("live monitor", f"NEEDED in training: {record.notes['monitor']}" if record.notes.get("monitor") else "none"),
        ("deployed state", record.notes["deployed"].replace("_", " ")),
        ("pairs cover", ", ".join(record.notes.get("pairs_cover") or ["no pairs are read"])),
        ("commit", record.commit + (", dirty tree" if record.dirty else "")), ("started", record.started),
        ("wall time", ", ".join(f"{k.removeprefix('sec_')} {v:.0f} s" for k, v in record.seconds.items())),
        ("command", shlex.join(record.argv)),
    ]  # fmt: skip
    return f'<div class="facts">{tabulate(shown, tablefmt="html", disable_numparse=True)}</div>'


def evaluation(record: RunRecord) -> str:
    """The base, then the 2×2 table of the last evaluation, with 95 % intervals over problems, hack / solve by mode."""
    if not (cells := last_cells(record)):
        return "<p>No evaluation yet.</p>"
    modes = sorted({mode for cell in cells for mode in cell.by_mode})
    body = []
    for c in cells:
        by = [
            f"{m['hack'] / m['n']:.2f} / {m['solve'] / m['n']:.2f}"
            if (m := c.by_mode.get(mode))
            else "–"
            for mode in modes
        ]
        name = "base" if c.step == 0 else c.state.replace("_", " ")
        body.append(
            [
                name,
                c.markers,
                c.step,
                c.n,
                rate_with_interval(c, "hack"),
                rate_with_interval(c, "solve"),
                *by,
            ]
        )
    headers = ["policy", "markers", "step", "draws", "hack [95 %]", "solve [95 %]", *modes]
    table = tabulate(body, headers=headers, tablefmt="html", disable_numparse=True)
    return f'<div class="wide">{table}</div><p class="note">Columns of a mode: hack / solve.</p>'


def counts(rollouts: list[dict]) -> str:
    """Outcome by zone, student rows alone (skipped: the row's group had no variance in reward)."""
    zones = [*(zone.name for zone in Zone), "skipped"]
    tally = Counter((outcome(r), r.get("zone") or "skipped") for r in rollouts if not r["teacher"])
    body = [[name, *(tally[name, zone] for zone in zones)] for name in OUTCOMES]
    return str(tabulate(body, headers=["student rows", *zones], tablefmt="html"))


def section(name: str, record: RunRecord, rows: list[dict], rollouts: list[dict]) -> str:
    warnings = "".join(
        f'<p class="warn">{html.escape(line)}</p>' for line in advice(rows, record.evals)
    )
    picture = histogram(rows, rollouts)
    caption = (
        '<p class="note">Scores of student rows by ground-truth label. Dotted: lower edge, RETAIN below it; dashed: upper edge, '
        "ROUTE above it (medians over the third of the run; shaded: their range). The score carries the sign of the advantage, so "
        "the two rows are read apart. Labels are for this picture alone: the gate never sees them.</p>"
    )
    return (
        f"<h2>{html.escape(name)}: {html.escape(record.arm)}, seed {record.seed}</h2>{warnings}{facts(record)}"
        f"<h3>Evaluation on held-out problems</h3>{evaluation(record)}<h3>Zones by outcome</h3>{counts(rollouts)}"
        f"<h3>Scores</h3>{caption + picture if picture else '<p>No row of this run has a score.</p>'}"
    )


def browsable(name: str, rollouts: list[dict], limit: int) -> list[dict]:
    """At most `limit` completions, evenly spread over the run, as the page's script reads them."""
    step = max(1, -(-len(rollouts) // limit))
    return [
        {
            "run": name, "step": r["step"], "problem": r["problem_id"], "mode": r["mode"], "marker": r["marker"],
            "outcome": outcome(r), "zone": r.get("zone") or "skipped", "score": r.get("score"), "advantage": r.get("advantage"),
            "reward": r["reward"], "verdict": r["verdict"], "teacher": r["teacher"], "ablated": r["sampled_ablated"],
            "completion": r["completion"],
        }
        for r in rollouts[::step]
    ]  # fmt: skip


def page(folders: list[Path], limit: int) -> str:
    runs = {f.name: (load_record(f), load_metrics(f), load_rollouts(f)) for f in folders}
    if len(runs) < len(folders):
        raise UserError("two of these run directories have the same name: rename one")
    if empty := [name for name, (_, rows, _) in runs.items() if not rows]:
        raise UserError(f"{empty[0]} has no finished step yet: wait for its first line of metrics")
    shown = {name: browsable(name, rollouts, limit) for name, (_, _, rollouts) in runs.items()}
    said = "; ".join(
        f"{len(rows)} of {len(runs[name][2])} of {name}" for name, rows in shown.items()
    )
    note = '<p class="note">Student rates: running means over five steps. Deployed rates: held-out problems, novel markers.</p>'
    body = f"<h2>Curves</h2>{note}{curves(runs)}" + "".join(
        section(name, *run) for name, run in runs.items()
    )
    data = json.dumps([row for rows in shown.values() for row in rows], ensure_ascii=False).replace(
        "<", "\\u003c"
    )
    text = TEMPLATE.read_text()
    for mark, part in (
        ("BODY", body),
        ("SHOWN", f'<p class="note">{html.escape(said)}, evenly spread.</p>'),
        ("DATA", data),
    ):
        text = text.replace(f"<!-- {mark} -->", part, 1)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "figs" / "report.html", help="file to write"
    )
    parser.add_argument(
        "--rollouts", type=int, default=3000, help="completions to keep of each run (default 3000)"
    )
    options = parser.parse_args()
    if options.rollouts < 1:
        raise UserError(f"--rollouts {options.rollouts} must be at least 1")
    if options.out.is_dir():
        raise UserError(
            f"--out {options.out} is a directory: name a file, such as {options.out / 'report.html'}"
        )
    text = page(options.runs, options.rollouts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(
        f"{options.out}: {len(options.runs)} runs, {len(text.encode()) / 2**20:.1f} MiB; open it in any browser"
    )


if __name__ == "__main__":
    run_main(main)
