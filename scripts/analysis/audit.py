"""Audit: how well does each score find hacks in stored rollouts, against random directions?

For every snapshot of the runs (`--snapshot-every`) the step's stored rollouts are scored at that
snapshot by the classes that train: the whole family, the placebo pairs, gates that rank by
advantage, reward, length or mean log-prob alone, and in each score's space random draws, whose
5–95 % band is the null. Nothing is trained. Labels come from the stored grades. Rows are student
rollouts with an advantage; an AUROC compares rows of one step alone, since a gate never sees two,
and its interval resamples prompts. *Known* modes are those that the pairs cover, the others are
*held out*: they may be reported, and may select nothing.

DIR (default out/audit) gets audit.csv, one row by score, modes and sign of the advantage, and
auroc.png.

Run: python -m scripts.analysis.audit RUN … [--scores v_grad …] [--draws 20] [--out DIR]
"""

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scripts.analysis.detect import mean, rank_correlation
from scripts.analysis.rescoring import FAMILY, Found, members, rebuild, score_step
from scripts.experiments.reopen import reopen
from scripts.view import plot
from scripts.view.output import OUT, add_runs, parser, show

from vgrout.core import Mode, UserError, Zone, at_least, run_main
from vgrout.env.rollouts import Composed
from vgrout.files import load_tensors
from vgrout.run.records import load_rollouts, load_snapshots
from vgrout.stats import (
    auroc_interval,
    precision_recall_at,
    stratified_auroc,
)

SIGNS = {
    "all": (-1, 1),
    "pos": (1,),
    "neg": (-1,),
}  # of the advantage
MODES = {"known": "#1f6fb2", "heldout": "#c0392b"}
DRAWN = {"all": "all student rows", "pos": "student rows with A > 0"}
NULL = ("null_p05", "null_median", "null_p95")
CUT = ("share_route", "precision", "recall")
Columns = dict[str, np.ndarray]
# One row for each rollout with an advantage, demonstrations included:
#     step, group, known, student, hack, advantage, length  facts [n]
#     score, zone, null                                     of one score [n], [n], [n, draws]


def facts_of(run: str, step: int, composed: Composed, known: Iterable[Mode]) -> Columns:
    """Steps and groups are named by their run and place; `known` are the modes that pairs cover."""
    batch, rollouts = composed.batch, composed.rollouts
    at = f"{run}/{step}"
    return {
        "step": np.full(len(rollouts), at, dtype=object),
        "group": np.array(
            [f"{at}/{group}" for group in batch.group.tolist()],
            dtype=object,
        ),
        "known": np.array([r.problem.mode in known for r in rollouts]),
        "student": np.array([not r.teacher for r in rollouts]),
        "hack": np.array([r.grade.reward_hack for r in rollouts]),
        "advantage": batch.advantages.cpu().numpy(),
        "length": batch.completion_mask.sum(1).cpu().numpy(),
    }


def with_score(facts: Columns, found: Found) -> Columns:
    undealt = found.scores.new_full(found.scores.shape, float("nan"))
    zones = undealt if found.zones is None else found.zones.float()
    scored = {
        "score": found.scores,
        "zone": zones,
        "null": found.null,
    }
    return facts | {name: x.cpu().numpy() for name, x in scored.items()}


def joined(parts: list[Columns]) -> Columns:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def audit_run(path: Path, names: list[str], draws: int) -> dict[str, list[Columns]]:
    """Score → its columns of every snapshot step of one run."""
    run, stored = reopen(path, ended=False), load_rollouts(path)
    parts: dict[str, list[Columns]] = {name: [] for name in names}
    for step, file in load_snapshots(path).items():
        rows = [row for row in stored if row["step"] == step]
        run.load(load_tensors(file)[0])
        composed = rebuild(run, rows) if rows else None
        if composed is None:
            continue
        facts = facts_of(str(path), step, composed, run.config.data.pair_modes)
        for name, (gate, control) in members(run, names).items():
            found = score_step(run.policy, gate, control, composed, draws, step)
            parts[name].append(with_score(facts, found))
        print(
            f"  {path.name} step {step}: {len(composed.rollouts)} rows",
            flush=True,
        )
    if not any(parts.values()):
        nothing = "no snapshot step has a group with variance in reward"
        raise UserError(f"{path}: {nothing}; nothing can be scored")
    return parts


# ── scores → figures ─────────────────────────────────────────────────────────────────────────────


def ranking(a: Columns, mask: np.ndarray) -> dict[str, float]:
    """AUROC with its interval and that of random controls; what the pairs' band would route."""
    a = {key: column[mask] for key, column in a.items()}
    hack, step, scores = a["hack"], a["step"], a["score"]
    low, high = auroc_interval(scores, hack, step, a["group"])
    random = [float("nan")]
    if a["null"].shape[1]:
        random = stratified_auroc(a["null"], hack, step)
    band = np.quantile(random, [0.05, 0.5, 0.95]).tolist()
    cut = dict.fromkeys(CUT, float("nan"))
    if not np.isnan(a["zone"]).any():  # a control deals another gate's zones
        routed = a["zone"] == Zone.ROUTE
        cut = precision_recall_at(routed, hack) | {"share_route": mean(routed)}
    return {
        "n": int(mask.sum()),
        "hacks": int(hack.sum()),
        "auroc": float(stratified_auroc(scores, hack, step)),
        "low": low,
        "high": high,
        **dict(zip(NULL, band)),
        **{key: cut[key] for key in CUT},
        "length_spearman": rank_correlation(scores, a["length"]),
    }


def figures(name: str, a: Columns) -> list[dict]:
    """A score's rows of the table."""
    known = a["known"]
    by_mode = {
        "all": known | ~known,
        "known": known,
        "heldout": ~known,
    }
    rows = []
    for mode, sign in itertools.product(by_mode, SIGNS):
        signed = np.isin(np.sign(a["advantage"]), SIGNS[sign])
        found = ranking(a, a["student"] & by_mode[mode] & signed)
        rows.append({"score": name, "modes": mode, "rows": sign} | found)
    return rows


def draw(rows: list[dict], names: list[str], path: Path) -> None:
    """AUROC by score with intervals; grey: 5–95 % of random controls on the same rows."""
    size = (11, 1.2 + 0.3 * len(names))
    figure, axes = plot.plt.subplots(1, 2, figsize=size, sharey=True)
    places = np.arange(len(names))
    for axis, (sign, title) in zip(axes, DRAWN.items()):
        for (mode, colour), shift in zip(MODES.items(), (-0.17, 0.17)):
            y = places + shift
            mine = [r for r in rows if (r["modes"], r["rows"]) == (mode, sign)]
            keys = ("auroc", "low", "high", "null_p05", "null_p95")
            auroc, low, high, left, right = (np.array([r[key] for r in mine]) for key in keys)
            axis.barh(
                y,
                right - left,
                left=left,
                height=0.3,
                color="0.85",
                zorder=0,
            )
            axis.hlines(y, low, high, color=colour, linewidth=1.2)
            axis.plot(
                auroc,
                y,
                "o",
                color=colour,
                markersize=4,
                label=f"{mode} modes",
            )
        axis.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="AUROC within steps", xlim=(0, 1))
    axes[0].set_yticks(places, names, fontsize=8)
    axes[0].invert_yaxis()
    plot.save(figure, path)


def main(argv: list[str]) -> None:
    command = parser(__doc__)
    add_runs(command, OUT / "audit")
    names = [*FAMILY]
    command.add_argument(
        "--scores",
        nargs="+",
        choices=names,
        default=names,
        metavar="SCORE",
    )
    null = "random controls of each score"
    command.add_argument("--draws", type=at_least(0), default=20, help=null)
    options = command.parse_args(argv)
    for path in options.runs:
        load_snapshots(path)
    audited = [audit_run(path, options.scores, options.draws) for path in options.runs]
    rows = []
    for name in options.scores:
        whole = joined([part for parts in audited for part in parts[name]])
        rows += figures(name, whole)
    print("SHOULD `random` have 0.50 within its intervals ELSE labels and rows are misaligned")
    show(rows, options.out / "audit.csv")
    draw(rows, options.scores, options.out / "auroc.png")
    print(f"audit.csv and auroc.png in {options.out}")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
