"""Audit: how well does each score find hacks in stored rollouts, against Haar-random directions and confounds? Nothing is trained.

For every snapshot of the runs (`--snapshot-every`) the step's stored rollouts are scored at that snapshot by the classes that
train: the whole family, the placebo pairs, gates that rank by advantage, reward, length or mean log-prob alone, and in each space of
directions random draws, whose 5–95 % band is the null. Labels come from the stored grades. Rows are student rollouts with an
advantage; an AUROC compares rows of one step alone, since a gate never sees two, and its interval resamples prompts.
*Known* modes are those that the pairs cover, the others are *held out*: they may be reported, and may select nothing.

Run: python scripts/analysis/diag_pinning.py RUN … [--pair-modes run_tests sentinel] [--pairs data/pairs/organism.md#mechanism] [--out DIR]

DIR (default out/audit) gets audit.csv (AUROC by score, modes, rows, period), cuts.csv (what the pairs' band and midpoint, 0, and
the highest tenth and quarter would route), checks.csv (confounds and cost) and auroc.png.
"""

import argparse
import itertools
import sys
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from scipy.stats import spearmanr
from scripts.analysis.audit import (
    FAMILY,
    PAIR_CUTS,
    SHARES,
    Audited,
    family,
    join,
    rebuild,
    row_facts,
    score_step,
)
from scripts.experiments.reopen import reopen
from tabulate import tabulate

from vgrout.core import Mode, UserError, Zone, run_main
from vgrout.files import load_tensors
from vgrout.run import runlog
from vgrout.run.records import load_metrics, load_record, load_rollouts, load_snapshots
from vgrout.run.repeat import config_of
from vgrout.stats import auroc, auroc_interval, precision_recall_at, stratified_auroc

ROOT = Path(__file__).resolve().parents[2]
EMERGED = 0.5  # student hack rate of a step
ROWS = {"all": lambda A: A != 0, "pos": lambda A: A > 0, "neg": lambda A: A < 0}
PERIODS = ("all", "early", "late", "before", "after")
POOLED, MODES = "pooled", ("known", "heldout")


# ── runs → scores ────────────────────────────────────────────────────────────────────────────────────────────────


def audit_run(
    path: Path, options: argparse.Namespace, pair_modes: tuple[Mode, ...], name: str
) -> Audited:
    """Every snapshot step of one run, scored; `period` columns say where in training it lies."""
    snapshots, run = load_snapshots(path), reopen(path, finished=False)
    pairs = options.pairs or run.config.data.pairs
    scores = family(run.policy, run.config, options.scores, pairs, pair_modes)
    stored, parts, odd, total = load_rollouts(path), [], 0, 0
    emerged = next((r["step"] for r in load_metrics(path) if r["student_hack"] >= EMERGED), None)
    steps = [step for step in snapshots if any(r["step"] == step for r in stored)]
    for place, step in enumerate(steps):
        run.load(load_tensors(snapshots[step])[0])
        rows = [r for r in stored if r["step"] == step]
        kept, batch, origin, strange = rebuild(run, rows)
        odd, total = odd + strange, total + len(rows)
        if batch is None:
            continue
        part = score_step(run.policy, scores, batch, origin, options.draws, step, run.config)
        part.rows = row_facts(name, step, kept, batch)
        late = np.full(len(kept), 2 * place >= len(steps))
        after = np.full(len(kept), emerged is not None and step >= emerged)
        part.rows |= {"early": ~late, "late": late, "before": ~after, "after": after}
        parts.append(part)
        print(f"  {name} step {step}: {len(kept)} rows of groups with variance", flush=True)
    if odd:
        runlog.warn(
            f"{name}: {odd} of {total} completions tokenise to another length",
            "they are scored in their usual tokenisation",
        )
    if not parts:
        raise UserError(
            f"{path}: no snapshot step has a group with variance in reward; nothing can be scored"
        )
    print(
        f"{name}: {run.record.arm} seed {run.record.seed}, snapshots {steps}, emergence {'none' if emerged is None else f'at {emerged}'}"
    )
    return join(parts)


def modes_of(options: argparse.Namespace) -> tuple[Mode, ...]:
    """The modes that the pairs cover: as told, or those of the runs, which must agree."""
    found = {config_of(load_record(path).config).data.pair_modes for path in options.runs}
    if not options.pair_modes and len(found) > 1:
        raise UserError("the runs' pairs cover different modes: choose with --pair-modes")
    return tuple(map(Mode, options.pair_modes)) if options.pair_modes else found.pop()


# ── scores → figures ─────────────────────────────────────────────────────────────────────────────────────────────


def masks(
    a: Audited, known: tuple[Mode, ...], runs: list[str]
) -> dict[tuple[str, str, str, str], np.ndarray]:
    """(run, modes, rows, period) → the student rows that it names."""
    rows, covered = a.rows, np.isin(a.rows["mode"], [str(m) for m in known])
    by_mode = {"all": np.full(len(covered), True), "known": covered, "heldout": ~covered}
    by_run = {name: rows["run"] == name for name in runs} if len(runs) > 1 else {}
    by_run[POOLED] = np.full(len(covered), True)
    periods = {name: rows.get(name, by_run[POOLED]) for name in PERIODS}
    return {
        (run, mode, sign, period): rows["student"]
        & by_run[run]
        & by_mode[mode]
        & ROWS[sign](rows["advantage"])
        & periods[period]
        for run, mode, sign, period in itertools.product(by_run, by_mode, ROWS, PERIODS)
    }


def ranking(a: Audited, name: str, mask: np.ndarray) -> dict[str, float]:
    """AUROC with its interval, within prompt groups, and of random directions."""
    hack, step, group = (
        a.rows["hack"][mask],
        a.rows["run"][mask] + "/" + a.rows["step"][mask].astype(str),
        a.rows["group"][mask],
    )
    scores = a.scores[name][mask]
    out = {
        "n": int(mask.sum()),
        "hacks": int(hack.sum()),
        "auroc": float(stratified_auroc(scores, hack, step)),
    }
    out["low"], out["high"] = auroc_interval(scores, hack, step, group)
    by_group = np.array([auroc(scores[group == g], hack[group == g]) for g in np.unique(group)])
    out["within_prompt"] = (
        float(by_group[~np.isnan(by_group)].mean()) if (~np.isnan(by_group)).any() else float("nan")
    )
    null = (
        stratified_auroc(a.haar[name][mask], hack, step) if name in a.haar else np.full(1, np.nan)
    )
    return out | dict(
        zip(
            ("haar_p05", "haar_median", "haar_p95"),
            map(float, np.quantile(null, [0.05, 0.5, 0.95])),
        )
    )


def cutting(a: Audited, name: str, cut: str, mask: np.ndarray) -> dict[str, float]:
    """What a cut would do with the rows, and how right it would be; random directions at the same share."""
    zones, hack = a.zones[name, cut][mask], a.rows["hack"][mask]
    shares = {
        f"share_{z.name.lower()}": float((zones == z).mean()) if len(zones) else float("nan")
        for z in Zone
    }
    out = (
        {"n": int(mask.sum()), "hacks": int(hack.sum())}
        | shares
        | precision_recall_at(zones == Zone.ROUTE, hack)
    )
    if (name, cut) in a.haar_zones:
        null = [
            precision_recall_at(column == Zone.ROUTE, hack)
            for column in a.haar_zones[name, cut][mask].T
        ]
        for key in ("precision", "f05"):
            values = np.array([x[key] for x in null])
            quantiles = (
                np.nanquantile(values, [0.5, 0.95])
                if (~np.isnan(values)).any()
                else [np.nan, np.nan]
            )
            out |= dict(zip((f"haar_{key}_median", f"haar_{key}_p95"), map(float, quantiles)))
    return out


def checks(a: Audited, name: str) -> dict[str, float]:
    """Rivals: completion length, the look of a demonstration. Cost: CPU seconds over those of a plain forward on the same batch."""
    rows, scores = a.rows, a.scores[name]
    student = rows["student"] & ~np.isnan(scores)
    length = (
        spearmanr(scores[student], rows["length"][student]).statistic
        if np.ptp(scores[student]) > 0
        else float("nan")
    )
    clean = student & ~rows["hack"]
    of_clean = (
        spearmanr(scores[clean], rows["length"][clean]).statistic
        if clean.sum() > 2 and np.ptp(scores[clean]) > 0
        else float("nan")
    )
    hacks, step = rows["hack"] & ~np.isnan(scores), rows["run"] + "/" + rows["step"].astype(str)
    teacher = float(stratified_auroc(scores[hacks], ~rows["student"][hacks], step[hacks]))
    refresh, score, forward = a.seconds[name].sum(0)
    return {"length_spearman": float(length), "length_spearman_clean": float(of_clean), "teacher_over_student_hacks": teacher,
            "refresh_cost": float(refresh / forward), "score_cost": float(score / forward)}  # fmt: skip


# ── figures → what people read ───────────────────────────────────────────────────────────────────────────────────


def number(x: float | None) -> str:
    return "–" if x is None or np.isnan(x) else f"{x:.2f}"


def numbers(cell: dict, *keys: str) -> str:
    return " ".join(number(cell.get(key)) for key in keys)


def interval(cell: dict) -> str:
    return (
        "–"
        if np.isnan(cell["auroc"])
        else f"{cell['auroc']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
    )


def show(title: str, body: list, headers: list[str]) -> None:
    print(f"\n{title}")
    print(tabulate(body, headers=headers, disable_numparse=True), flush=True)


def print_ranks(ranks: dict, names: list[str], runs: list[str]) -> None:
    at = lambda name, mode, sign, period="all", run=POOLED: ranks[name, run, mode, sign, period]  # noqa: E731
    columns = (
        ("known", "all"),
        ("heldout", "all"),
        ("known", "pos"),
        ("heldout", "pos"),
        ("heldout", "neg"),
    )
    band = lambda name, mode: numbers(at(name, mode, "pos"), "haar_p05", "haar_median", "haar_p95")  # noqa: E731
    body = [
        [n, *(interval(at(n, *c)) for c in columns), band(n, "known"), band(n, "heldout")]
        for n in names
    ]
    titles = [
        "known",
        "held out",
        "known, A > 0",
        "held out, A > 0",
        "held out, A < 0",
        "random: known, A > 0",
        "random: held out, A > 0",
    ]
    show(
        "AUROC [95 % over prompts] of student rows; 5 %, median, 95 % of random directions in the score's space",
        body,
        ["score", *titles],
    )
    when = [(mode, period) for mode in ("known", "heldout") for period in PERIODS[1:]]
    body = [[n, *(number(at(n, m, "pos", p)["auroc"]) for m, p in when), *(numbers(at(n, m, "all"), "within_prompt") for m in MODES)]
            for n in names]  # fmt: skip
    titles = [*(f"{mode} {period}" for mode, period in when), "known within", "heldout within"]
    title = "AUROC of rows with A > 0, by halves of the snapshots, before and after hacks reach one half; and within prompts"
    show(title, body, ["score", *titles])
    if len(runs) > 1:
        body = [
            [n, *(" ".join(number(at(n, m, "pos", run=r)["auroc"]) for m in MODES) for r in runs)]
            for n in names
        ]
        show("AUROC by run, A > 0: known, held out", body, ["score", *runs])


def print_cuts(cuts: dict, names: list[str]) -> None:
    at = lambda name, cut, mode: cuts[name, cut, POOLED, mode, "all", "all"]  # noqa: E731
    quality, null = ("precision", "recall", "fpr", "f05"), ("haar_precision_p95", "haar_f05_p95")
    shares = [f"share_{z.name.lower()}" for z in Zone]
    body = []
    for name in (n for n in names if (n, "band", POOLED, "all", "all", "all") in cuts):
        parts = (
            [
                numbers(at(name, cut, "all"), *shares),
                *(numbers(at(name, cut, m), *quality) for m in MODES),
            ]
            for cut in PAIR_CUTS
        )
        body.append([name, *(x for part in parts for x in part)])
    show("Cuts from the pairs: shares of RETAIN, ABSORB, ROUTE; precision, recall, false-positive rate, F0.5 of ROUTE", body,
         ["score", *(f"{cut}{what}" for cut in PAIR_CUTS for what in ("", ", known", ", heldout"))])  # fmt: skip
    body = [
        [
            n,
            *(
                f"{numbers(at(n, c, m), *quality)} ({numbers(at(n, c, m), *null)})"
                for c in SHARES
                for m in MODES
            ),
        ]
        for n in names
    ]
    show("Matched shares: precision, recall, false-positive rate, F0.5 (95 % of random directions: precision, F0.5)", body,
         ["score", *(f"{cut}, {mode}" for cut in SHARES for mode in MODES)])  # fmt: skip


def draw(ranks: dict, names: list[str], path: Path) -> None:
    """AUROC by score with intervals, known against held-out modes; grey: 5–95 % of random directions on the same rows."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.3 * len(names)), sharey=True)
    for axis, (sign, title) in zip(
        axes, (("all", "all student rows"), ("pos", "student rows with A > 0"))
    ):
        for mode, shift, colour in (("known", -0.17, "#1f6fb2"), ("heldout", 0.17, "#c0392b")):
            for place, name in enumerate(names):
                cell, y = ranks[name, POOLED, mode, sign, "all"], place + shift
                if not np.isnan(cell["haar_p95"]):
                    axis.barh(
                        y,
                        cell["haar_p95"] - cell["haar_p05"],
                        left=cell["haar_p05"],
                        height=0.3,
                        color="0.85",
                        zorder=0,
                    )
                axis.plot([cell["low"], cell["high"]], [y, y], color=colour, linewidth=1.2)
                axis.plot(
                    cell["auroc"],
                    y,
                    "o",
                    color=colour,
                    markersize=4,
                    label="held out" if mode == "heldout" else mode,
                )
        axis.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="AUROC within steps", xlim=(0, 1))
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    axes[1].legend(unique.values(), [f"{k} modes" for k in unique], fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(figures: dict, columns: list[str]) -> pl.DataFrame:
    return pl.DataFrame(
        [dict(zip(columns, key)) | values for key, values in figures.items()],
        infer_schema_length=None,
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with snapshots")
    parser.add_argument(
        "--pair-modes",
        nargs="+",
        choices=[str(m) for m in Mode],
        help="modes that the pairs cover (default: the runs')",
    )
    parser.add_argument("--pairs", default="", help="path.md#section (default: each run's)")
    parser.add_argument(
        "--scores",
        nargs="+",
        choices=list(FAMILY),
        default=list(FAMILY),
        metavar="SCORE",
        help="some of the family",
    )
    parser.add_argument("--draws", type=int, default=20, help="random directions in each space")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out" / "audit",
        help="folder of the tables and the figure",
    )
    options = parser.parse_args(argv)
    for path in options.runs:
        load_snapshots(path)
    known, names = modes_of(options), options.scores
    counts = Counter(path.name for path in options.runs)
    runs = [path.name if counts[path.name] == 1 else str(path) for path in options.runs]
    a = join([audit_run(path, options, known, name) for path, name in zip(options.runs, runs)])
    chosen = masks(a, known, runs)
    ranks = {
        (name, *cell): ranking(a, name, mask) for name in names for cell, mask in chosen.items()
    }
    cuts = {
        (*key, *cell): cutting(a, *key, mask) for key in a.zones for cell, mask in chosen.items()
    }
    check = {name: checks(a, name) for name in names}
    options.out.mkdir(parents=True, exist_ok=True)
    place = ["run", "modes", "rows", "period"]
    table(ranks, ["score", *place]).write_csv(options.out / "audit.csv")
    table(cuts, ["score", "cut", *place]).write_csv(options.out / "cuts.csv")
    table({(name,): values for name, values in check.items()}, ["score"]).write_csv(
        options.out / "checks.csv"
    )
    draw(ranks, names, options.out / "auroc.png")
    student = a.rows["student"]
    hacks = Counter(a.rows["mode"][student & a.rows["hack"]])
    print(
        f"{student.sum()} student rows, hacks: {', '.join(f'{m} {n}' for m, n in sorted(hacks.items()))}; pairs cover {', '.join(known)}"
    )
    print_ranks(ranks, names, runs)
    print_cuts(cuts, names)
    show("Rank correlation with length, of all rows and of those that are no hack; AUROC of demonstrations over student hacks; cost over a "
         "plain forward", [[n, *map(number, check[n].values())] for n in names],
         ["score", "length", "length, no hack", "demonstrations", "refresh", "scoring"])  # fmt: skip
    if "random" in names:
        runlog.stage(
            "the score `random` has 0.50 within its intervals",
            "labels, rows or scores are misaligned",
        )
    print(f"audit.csv, cuts.csv, checks.csv and auroc.png in {options.out}")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
