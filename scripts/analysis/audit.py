"""Audit: how well does each score find hacks in stored rollouts, against random directions?

For every snapshot of the runs (`--snapshot-every`) the step's stored rollouts are scored at that
snapshot by the classes that train: the whole family, the placebo pairs, gates that rank by
advantage, reward, length or mean log-prob alone, and in each space of directions random draws,
whose 5–95 % band is the null. Nothing is trained. Labels come from the stored grades. Rows are
student rollouts with an advantage; an AUROC compares rows of one step alone, since a gate never
sees two, and its interval resamples prompts. *Known* modes are those that the pairs cover, the
others are *held out*: they may be reported, and may select nothing.

Run: python scripts/analysis/audit.py RUN … [--pair-modes run_tests sentinel]
         [--pairs data/pairs/organism.md#mechanism] [--out DIR]

DIR (default out/audit) gets audit.csv (AUROC by score, modes, rows, period), cuts.csv (what the
pairs' band and midpoint, 0, and the highest tenth and quarter would route), checks.csv (confounds)
and auroc.png.
"""

import argparse
import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from scripts.analysis.detect import mean, rank_correlation
from scripts.analysis.rescoring import (
    FAMILY,
    PAIR_CUTS,
    SHARES,
    Columns,
    family,
    joined,
    rebuild,
    row_facts,
    score_step,
)
from scripts.experiments.reopen import reopen
from scripts.view import plot
from scripts.view.output import (
    OUT,
    add_runs,
    parser,
    table,
    text,
    write_csv,
)

from vgrout.core import Mode, UserError, Zone, at_least, run_main
from vgrout.files import load_tensors
from vgrout.run import runlog
from vgrout.run.records import (
    load_metrics,
    load_record,
    load_rollouts,
    load_snapshots,
)
from vgrout.run.repeat import config_of
from vgrout.stats import (
    auroc,
    auroc_interval,
    precision_recall_at,
    stratified_auroc,
)

EMERGED = 0.5  # student hack rate of a step
SIGNS = {"all": (-1, 1), "pos": (1,), "neg": (-1,)}  # of the advantage
MODES = {"known": "#1f6fb2", "heldout": "#c0392b"}
POOLED, PERIODS = "pooled", ("all", "early", "late", "before", "after")
PLACE = ("run", "modes", "rows", "period")
BAND = (
    "haar_p05",
    "haar_median",
    "haar_p95",
)  # of the AUROC of random directions
QUALITY = ("precision", "recall", "fpr", "f05")
Place = tuple[str, str, str, str]
Figures = dict[tuple[str, ...], dict[str, float]]


# ── runs → scores ────────────────────────────────────────────────────────────────────────────────


def audit_run(
    path: Path,
    name: str,
    options: argparse.Namespace,
    pair_modes: tuple[Mode, ...],
) -> Columns:
    """Every snapshot step of one run, scored; columns of periods say where in training it lies."""
    run, snapshots, stored = (
        reopen(path, finished=False),
        load_snapshots(path),
        load_rollouts(path),
    )
    pairs, parts, odd, total = (
        options.pairs or run.config.data.pairs,
        [],
        0,
        0,
    )
    emerged = [r["step"] for r in load_metrics(path) if r["student_hack"] >= EMERGED]
    steps = sorted(snapshots.keys() & {r["step"] for r in stored})
    for place, step in enumerate(steps):
        run.load(load_tensors(snapshots[step])[0])
        rows = [r for r in stored if r["step"] == step]
        kept, batch, origin, strange = rebuild(run, rows)
        odd, total = odd + strange, total + len(rows)
        if batch is None:
            continue
        scores = family(run.policy, run.config, options.scores, pairs, pair_modes)
        part = score_step(
            run.policy,
            scores,
            batch,
            origin,
            options.draws,
            step,
            run.config,
        )
        late = np.full(len(kept), 2 * place >= len(steps))
        after = np.full(len(kept), bool(emerged) and step >= emerged[0])
        when = {
            "all": late | ~late,
            "early": ~late,
            "late": late,
            "before": ~after,
            "after": after,
        }
        parts.append(part | when | row_facts(name, step, kept, batch))
        print(
            f"  {name} step {step}: {len(kept)} rows of groups with variance",
            flush=True,
        )
    if odd:
        strange = f"{name}: {odd} of {total} completions tokenise to another length"
        runlog.warn(strange, "they are scored in their usual tokenisation")
    if not parts:
        nothing = "no snapshot step has a group with variance in reward"
        raise UserError(f"{path}: {nothing}; nothing can be scored")
    when = f"at {emerged[0]}" if emerged else "none"
    what = f"{run.record.arm} seed {run.record.seed}"
    print(f"{name}: {what}, snapshots {steps}, emergence {when}")
    return joined(parts)


def modes_of(options: argparse.Namespace) -> tuple[Mode, ...]:
    """The modes that the pairs cover: as told, or those of the runs, which must agree."""
    if options.pair_modes:
        return tuple(map(Mode, options.pair_modes))
    found = {config_of(load_record(path).config).data.pair_modes for path in options.runs}
    if len(found) > 1:
        raise UserError("the runs' pairs cover different modes: choose with --pair-modes")
    return found.pop()


# ── scores → figures ─────────────────────────────────────────────────────────────────────────────


def masks(a: Columns, known: tuple[Mode, ...], runs: list[str]) -> dict[Place, np.ndarray]:
    """PLACE → the student rows that it names."""
    covered = np.isin(a["mode"], [str(mode) for mode in known])
    by_mode = {"all": a["all"], "known": covered, "heldout": ~covered}
    by_run = {name: a["run"] == name for name in runs} if len(runs) > 1 else {}
    by_run[POOLED] = a["all"]
    chosen = {}
    for place in itertools.product(by_run, by_mode, SIGNS, PERIODS):
        run, mode, sign, period = place
        signed = np.isin(np.sign(a["advantage"]), SIGNS[sign])
        chosen[place] = a["student"] & by_run[run] & by_mode[mode] & signed & a[period]
    return chosen


def step_of(a: Columns) -> np.ndarray:
    """The stratum of every row: its run and step."""
    return a["run"] + "/" + a["step"].astype(str)


def ranking(a: Columns, name: str, mask: np.ndarray) -> dict[str, float]:
    """AUROC with its interval, within prompt groups, and of random directions."""
    hack, step, group = a["hack"][mask], step_of(a)[mask], a["group"][mask]
    scores = a["score", name][mask]
    low, high = auroc_interval(scores, hack, step, group)
    within = np.array([auroc(scores[group == g], hack[group == g]) for g in np.unique(group)])
    null = np.full(1, np.nan)
    if ("null", name) in a:
        null = stratified_auroc(a["null", name][mask], hack, step)
    return {
        "n": int(mask.sum()),
        "hacks": int(hack.sum()),
        "auroc": float(stratified_auroc(scores, hack, step)),
        "low": low,
        "high": high,
        "within_prompt": mean(within[~np.isnan(within)]),
    } | dict(zip(BAND, np.quantile(null, [0.05, 0.5, 0.95]).tolist()))


def cutting(a: Columns, name: str, cut: str, mask: np.ndarray) -> dict[str, float]:
    """What a cut would do with the rows, and how right it would be."""
    zones, hack = a["zone", name, cut][mask], a["hack"][mask]
    out = {"n": int(mask.sum()), "hacks": int(hack.sum())}
    out |= {f"share_{z.name.lower()}": mean(zones == z) for z in Zone}
    return out | precision_recall_at(zones == Zone.ROUTE, hack)


def checks(a: Columns, name: str) -> dict[str, float]:
    """Rivals of a hack: the completion's length, the look of a demonstration."""
    scores, hack, step = a["score", name], a["hack"], step_of(a)
    scored = ~np.isnan(scores)
    student, hacks = a["student"] & scored, hack & scored
    clean = student & ~hack
    return {
        "length_spearman": rank_correlation(scores[student], a["length"][student]),
        "length_spearman_clean": rank_correlation(scores[clean], a["length"][clean]),
        "teacher_over_student_hacks": float(
            stratified_auroc(scores[hacks], ~a["student"][hacks], step[hacks])
        ),
    }


# ── figures → what people read ───────────────────────────────────────────────────────────────────


def numbers(cell: dict, *keys: str) -> str:
    return " ".join(text(cell.get(key), 2) for key in keys)


def interval(cell: dict) -> str:
    value, low, high = (text(cell[key], 2) for key in ("auroc", "low", "high"))
    return value if value == "–" else f"{value} [{low}, {high}]"


def show(title: str, rows: list[list], headers: list[str]) -> None:
    print(f"\n{title}\n{table(rows, ['score', *headers])}", flush=True)


def print_ranks(ranks: Figures, names: list[str]) -> None:
    views = [(m, sign) for sign in ("all", "pos") for m in MODES] + [("heldout", "neg")]
    rows = []
    for name in names:
        cells = {view: ranks[name, POOLED, *view, "all"] for view in views}
        bands = [numbers(cells[m, "pos"], *BAND) for m in MODES]
        rows.append([name, *map(interval, cells.values()), *bands])
    headers = [
        "known",
        "held out",
        "known, A > 0",
        "held out, A > 0",
        "held out, A < 0",
    ]
    title = "AUROC [95 % over prompts] of student rows; 5 %, median, 95 % of random directions"
    show(
        title,
        rows,
        [*headers, "random: known, A > 0", "random: held out, A > 0"],
    )


def print_cuts(cuts: Figures, names: list[str]) -> None:
    shares = [f"share_{z.name.lower()}" for z in Zone]
    dealt = "Cuts from the pairs: shares of RETAIN, ABSORB, ROUTE"
    quality = "precision, recall, false-positive rate, F0.5 of ROUTE"
    matched = "Matched shares"
    for title, some in ((dealt, PAIR_CUTS), (matched, tuple(SHARES))):
        rows = []
        for name in (n for n in names if (n, some[0], POOLED, "all", "all", "all") in cuts):
            row = [name]
            for cut in some:
                row += [
                    numbers(
                        cuts[name, cut, POOLED, "all", "all", "all"],
                        *shares,
                    )
                ]
                cells = [cuts[name, cut, POOLED, mode, "all", "all"] for mode in MODES]
                row += [numbers(cell, *QUALITY) for cell in cells]
            rows.append(row)
        show(
            f"{title}; {quality}",
            rows,
            [f"{cut}{of}" for cut in some for of in ("", ", known", ", held out")],
        )


def draw(ranks: Figures, names: list[str], path: Path) -> None:
    """AUROC by score with intervals; grey: 5–95 % of random directions on the same rows."""
    size = (11, 1.2 + 0.3 * len(names))
    figure, axes = plot.plt.subplots(1, 2, figsize=size, sharey=True)
    titles = {"all": "all student rows", "pos": "student rows with A > 0"}
    for axis, (sign, title) in zip(axes, titles.items()):
        for (mode, colour), shift in zip(MODES.items(), (-0.17, 0.17)):
            cells = [ranks[name, POOLED, mode, sign, "all"] for name in names]
            y = np.arange(len(names)) + shift
            value, low, high, null_low, null_high = (
                np.array([cell[key] for cell in cells])
                for key in ("auroc", "low", "high", "haar_p05", "haar_p95")
            )
            axis.barh(
                y,
                null_high - null_low,
                left=null_low,
                height=0.3,
                color="0.85",
                zorder=0,
            )
            axis.hlines(y, low, high, color=colour, linewidth=1.2)
            axis.plot(
                value,
                y,
                "o",
                color=colour,
                markersize=4,
                label=f"{mode} modes",
            )
        axis.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="AUROC within steps", xlim=(0, 1))
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    plot.save(figure, path)


def write(figures: Figures, columns: tuple[str, ...], path: Path) -> None:
    write_csv(
        [dict(zip(columns, key)) | values for key, values in figures.items()],
        path,
    )


def arguments(argv: list[str]) -> argparse.Namespace:
    command = parser(__doc__)
    add_runs(command, OUT / "audit")
    modes, names = [str(mode) for mode in Mode], list(FAMILY)
    covered = "modes that the pairs cover (default: the runs')"
    command.add_argument("--pair-modes", nargs="+", choices=modes, help=covered)
    command.add_argument("--pairs", default="", help="path.md#section (default: each run's)")
    command.add_argument("--scores", nargs="+", choices=names, default=names, metavar="SCORE")
    null = "random directions in each space"
    command.add_argument("--draws", type=at_least(0), default=20, help=null)
    return command.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    for path in options.runs:
        load_snapshots(path)
    known, names = modes_of(options), options.scores
    counts = Counter(path.name for path in options.runs)
    runs = {path.name if counts[path.name] == 1 else str(path): path for path in options.runs}
    a = joined([audit_run(path, name, options, known) for name, path in runs.items()])
    places = masks(a, known, list(runs)).items()
    ranks = {(name, *at): ranking(a, name, mask) for name in names for at, mask in places}
    dealt = [key[1:] for key in a if key[0] == "zone"]
    cuts = {(*key, *at): cutting(a, *key, mask) for key in dealt for at, mask in places}
    rivals = {(name,): checks(a, name) for name in names}
    write(ranks, ("score", *PLACE), options.out / "audit.csv")
    write(cuts, ("score", "cut", *PLACE), options.out / "cuts.csv")
    write(rivals, ("score",), options.out / "checks.csv")
    draw(ranks, names, options.out / "auroc.png")
    hacks = sorted(Counter(a["mode"][a["student"] & a["hack"]]).items())
    covered = f"hacks: {', '.join(f'{m} {n}' for m, n in hacks)}; pairs cover {', '.join(known)}"
    print(f"{a['student'].sum()} student rows, {covered}")
    print_ranks(ranks, names)
    print_cuts(cuts, names)
    title = "Rank correlation with length, of all and of those that are no hack; AUROC of "
    title += "demonstrations over student hacks"
    rows = [[name, *(text(x, 2) for x in rivals[name,].values())] for name in names]
    show(title, rows, ["length", "length, no hack", "demonstrations"])
    if "random" in names:
        misaligned = "labels, rows or scores are misaligned"
        runlog.stage("the score `random` has 0.50 within its intervals", misaligned)
    print(f"audit.csv, cuts.csv, checks.csv and auroc.png in {options.out}")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
