"""How well the score that a run used told its hacks, from the rollouts that it stored."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from scripts.view.output import show

from vgrout.core import UserError
from vgrout.run.records import load_record, load_rollouts
from vgrout.stats import stratified_auroc

EQUAL = 4  # tokens by which completions of equal length differ at most
NEAR = 10  # steps within which they are compared


@dataclass
class Rows:
    """Scored rollouts of one run, as columns [n]."""

    hack: np.ndarray
    score: np.ndarray
    length: np.ndarray  # tokens
    step: np.ndarray
    mode: np.ndarray

    def auroc(
        self,
        values: np.ndarray,
        stratum: np.ndarray,
        mask: np.ndarray | None = None,
    ):
        rows = np.full(len(values), True) if mask is None else mask
        return float(stratified_auroc(values[rows], self.hack[rows], stratum[rows]))


def columns(rows: list[dict]) -> Rows:
    keys = {
        "reward_hack": bool,
        "score": float,
        "n_tokens": float,
        "step": int,
        "mode": str,
    }
    return Rows(*(np.array([r[key] for r in rows], of) for key, of in keys.items()))


def mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; NaN where one of them does not vary."""
    varies = len(a) > 2 and np.ptp(a) and np.ptp(b)
    return float(spearmanr(a, b).statistic) if varies else float("nan")


def told(rows: list[dict], pair_modes: Iterable[str]) -> dict[str, float]:
    """AUROC for hacks of the stored score within a step, of the length, and at equal length.

    Also by the pairs' coverage of the mode. Equal length: within NEAR steps among completions that
    differ by less than EQUAL tokens. Rank correlation of score and length.
    """
    a = columns(rows)
    known = np.isin(a.mode, list(pair_modes))
    equal = a.step // NEAR * 10**6 + a.length // EQUAL
    return {
        "n": len(rows),
        "hacks": int(a.hack.sum()),
        "score": a.auroc(a.score, a.step),
        "score_known": a.auroc(a.score, a.step, known),
        "score_held_out": a.auroc(a.score, a.step, ~known),
        "length": a.auroc(a.length, a.step),
        "tokens_hack": mean(a.length[a.hack]),
        "tokens_rest": mean(a.length[~a.hack]),
        "score_at_equal_length": a.auroc(a.score, equal),
        "spearman": rank_correlation(a.score, a.length),
    }


def by_age(rows: list[dict], cadence: int, width: int) -> dict[str, list[dict]]:
    """The rows by the age in steps of the direction that scored them, `width` steps together.

    With `cadence` 0 the direction is that of the first step.
    """
    parts: dict[int, list[dict]] = {}
    for row in rows:
        age = row["step"] % cadence if cadence else row["step"]
        parts.setdefault(age // width * width, []).append(row)
    return {f"students, age {n} to {n + width - 1}": parts[n] for n in sorted(parts)}


def detect(options: Namespace) -> None:
    """All rows of the steps with demonstrations, and students; with --ages these by age too."""
    found = []
    for path in options.runs:
        record = load_record(path)
        rows = [r for r in load_rollouts(path) if r.get("score") is not None]
        if not rows:
            reads = "detect reads the scores that a run stored with its rollouts"
            raise UserError(f"{path}: the arm {record.arm} has no score: {reads}")
        last = max((r["step"] for r in rows if r["teacher"]), default=-1)
        students = [r for r in rows if not r["teacher"]]
        parts = {
            "with demonstrations": [r for r in rows if r["step"] <= last],
            "students": students,
        }
        if options.ages:
            cadence = record.config["score"]["refresh_every"]
            parts |= by_age(students, cadence, options.ages)
        for name, part in parts.items():
            if part:
                head = {"run": str(path), "rows": name}
                found.append(head | told(part, record.config["data"]["pair_modes"]))
    show(found, options.out / "detect.csv")
