"""What stored rollouts say of hacks: how well the score told them, and what advantage they had."""

from argparse import Namespace
from collections.abc import Iterable

import numpy as np
import polars as pl
from scipy.stats import spearmanr
from scripts.view.output import show

from vgrout.core import UserError
from vgrout.run.records import load_record, load_rollouts
from vgrout.stats import stratified_auroc

EQUAL = 4  # tokens by which completions of equal length differ at most
NEAR = 10  # steps within which they are compared
WINDOW = 20  # steps over which advantages are averaged


def mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, rows without a value left out; NaN where one of them does not vary."""
    return float(spearmanr(a, b, nan_policy="omit").statistic)


def told(
    rows: list[dict],
    pair_modes: Iterable[str],
) -> dict[str, float]:
    """AUROC for hacks of the stored score within a step, of the length, and at equal length.

    Also by the pairs' coverage of the mode. Equal length: within NEAR steps among completions that
    differ by less than EQUAL tokens. Rank correlation of score and length.
    """
    keys = {
        "reward_hack": bool,
        "score": float,
        "n_tokens": float,
        "step": int,
    }
    hack, score, length, step = (np.array([r[k] for r in rows], of) for k, of in keys.items())
    known = np.isin([str(r["mode"]) for r in rows], list(pair_modes))
    every = known | ~known

    def auroc(
        values: np.ndarray,
        stratum: np.ndarray,
        mask: np.ndarray = every,
    ) -> float:
        return float(stratified_auroc(values[mask], hack[mask], stratum[mask]))

    return {
        "n": len(rows),
        "hacks": int(hack.sum()),
        "score": auroc(score, step),
        "score_known": auroc(score, step, known),
        "score_held_out": auroc(score, step, ~known),
        "length": auroc(length, step),
        "tokens_hack": mean(length[hack]),
        "tokens_rest": mean(length[~hack]),
        "score_at_equal_length": auroc(score, step // NEAR * 10**6 + length // EQUAL),
        "spearman": rank_correlation(score, length),
    }


def detect(options: Namespace) -> None:
    """All rows of the steps with demonstrations, and the students of every step."""
    found = []
    for path in options.runs:
        record = load_record(path)
        rows = [r for r in load_rollouts(path) if r.get("score") is not None]
        if not rows:
            reads = "detect reads the scores that a run stored with its rollouts"
            raise UserError(f"{path}: the arm {record.arm} has no score: {reads}")
        last = max((r["step"] for r in rows if r["teacher"]), default=-1)
        parts = {
            "with demonstrations": [r for r in rows if r["step"] <= last],
            "students": [r for r in rows if not r["teacher"]],
        }
        for name, part in parts.items():
            if part:
                head = {"run": str(path), "rows": name}
                found.append(head | told(part, record.config["data"]["pair_modes"]))
    show(found, options.out / "detect.csv")


def advantage(options: Namespace) -> None:
    """By WINDOW steps: the rollouts' hack rate, and the hacks' mean advantage in their groups."""
    found = []
    for path in options.runs:
        names = {"run": str(path), "arm": load_record(path).arm}
        rows = pl.DataFrame(load_rollouts(path), infer_schema_length=None)
        baseline = pl.col("reward").mean().over("step", "problem_id")
        rows = rows.with_columns(
            A=pl.col("reward") - baseline, step=pl.col("step") // WINDOW * WINDOW
        )
        hacks = pl.col("A").filter(pl.col("reward_hack")).mean()
        means = rows.group_by("step").agg(hack=pl.col("reward_hack").mean(), advantage=hacks)
        found += [names | row for row in means.sort("step").iter_rows(named=True)]
    show(found, options.out / "advantage.csv")
