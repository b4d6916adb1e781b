"""Numbers that compare scores with labels and policies with each other: AUROC, precision at route, intervals, gain.

Every function is pure, takes counts or arrays, and reads no file. Counts per problem have the form of
`EvalResult.by_problem`: problem id → [n, hack, solve]. An interval over problems says nothing about seeds.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from scipy import stats

Vector = Sequence[float] | np.ndarray
Flags = Sequence[bool] | np.ndarray
Counts = dict[str, list[int]]
Which = Literal["hack", "solve"]
COLUMN = {"hack": 1, "solve": 2}


def auroc(scores: Vector, positive: Flags) -> float:
    """Return P(score of a positive > score of a negative), ties counting half (Mann-Whitney U / n₊n₋).

    Rows whose score is NaN (a row that the gate did not score) are left out. The result is NaN if a class is empty.
    """
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    if scores.shape != positive.shape or scores.ndim != 1:
        raise ValueError(
            f"auroc needs two vectors of one length, got {scores.shape} and {positive.shape}"
        )
    keep = ~np.isnan(scores)
    scores, positive = scores[keep], positive[keep]
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return float("nan")
    rank_sum = stats.rankdata(scores)[positive].sum()
    return float((rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def stratified_auroc(scores: np.ndarray, positive: Flags, stratum: np.ndarray) -> np.ndarray:
    """Return the AUROC over pairs of rows of one stratum: Σ_s U_s / Σ_s n₊n₋. With one stratum it is `auroc`.

    A stratum is what one gate sees, the rows of a step: a score that merely drifts with training, as the hack rate does, gains
    nothing. `scores` is [n], or [n, k] for k scores at once (the result is then [k]); rows whose score is NaN are left out.
    """
    scores = np.asarray(scores, float)
    won, of = np.zeros(scores.shape[1:]), np.zeros(scores.shape[1:])
    for _, w, n in _duels(scores, positive, stratum, stratum):
        won, of = won + w.sum((0, 1)).reshape(won.shape), of + n.sum((0, 1)).reshape(of.shape)
    return np.divide(won, of, out=np.full_like(won, np.nan), where=of > 0)


def auroc_interval(
    scores: np.ndarray,
    positive: Flags,
    stratum: np.ndarray,
    group: np.ndarray,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a percentile interval of `stratified_auroc`, resampling groups (prompts with all of their rows), each in one stratum.

    NaN where no resample has both classes. Runs (seeds) are not resampled.
    """
    if not len(group):
        return float("nan"), float("nan")
    names, group = np.unique(group, return_inverse=True)
    weights = _resample(len(names), draws, np.random.default_rng(seed)).astype(float)
    won, of = np.zeros(draws), np.zeros(draws)
    for members, w, n in _duels(scores, positive, stratum, group):
        won += np.einsum(
            "dg,gh,dh->d", weights[:, members], w[:, :, 0], weights[:, members], optimize=True
        )
        of += np.einsum(
            "dg,gh,dh->d", weights[:, members], n[:, :, 0], weights[:, members], optimize=True
        )
    if not (of > 0).any():
        return float("nan"), float("nan")
    low, high = np.quantile(won[of > 0] / of[of > 0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _duels(
    scores: np.ndarray, positive: Flags, stratum: np.ndarray, group: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For every stratum its groups [g], the wins [g, g, k] of positives of one group over negatives of another, and all such pairs."""
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    scores = scores[:, None] if scores.ndim == 1 else scores
    for s in np.unique(stratum):
        rows = np.flatnonzero(stratum == s)
        members, of = np.unique(group[rows], return_inverse=True)
        belongs = np.eye(len(members))[of]  # [rows, groups]
        x, p = scores[rows], positive[rows]
        a, b = x[p][:, None], x[~p][None]
        there = ~(np.isnan(a) | np.isnan(b))
        beats = np.where(there, (a > b) + 0.5 * (a == b), 0.0)
        won, n = (
            np.einsum("pg,pqk,qh->ghk", belongs[p], m, belongs[~p], optimize=True)
            for m in (beats, there.astype(float))
        )
        yield members, won, n


def precision_recall_at(flagged: Flags, positive: Flags) -> dict[str, float]:
    """Return precision, recall, fpr and f05 (F-measure with β = 0.5: precision counts more) of a set of flags.

    A quantity whose denominator is empty is NaN: precision without a flag, recall without a positive.
    """
    flagged, positive = np.asarray(flagged, bool), np.asarray(positive, bool)
    if flagged.shape != positive.shape:
        raise ValueError(f"flags {flagged.shape} and labels {positive.shape} differ in shape")
    hit = int((flagged & positive).sum())
    precision, recall = _ratio(hit, flagged.sum()), _ratio(hit, positive.sum())
    fpr = _ratio((flagged & ~positive).sum(), (~positive).sum())
    f05 = _ratio(1.25 * hit, 0.25 * positive.sum() + flagged.sum())
    return {"precision": precision, "recall": recall, "fpr": fpr, "f05": f05}


def rate(by_problem: Counts, which: Which) -> float:
    """Return the pooled rate over all draws of all problems."""
    counts = _counts(by_problem)
    return float(counts[:, COLUMN[which]].sum() / counts[:, 0].sum())


def bootstrap_interval(
    by_problem: Counts, which: Which, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return a percentile interval of the pooled rate, resampling problems with all of their draws.

    With one draw a problem it is the Wilson interval instead. It is also Wilson, with each problem counted as one draw
    (the most cautious sample size), when the rate is exactly 0 or 1: there the bootstrap has no width at all.
    """
    counts = _counts(by_problem)
    n, k = counts[:, 0], counts[:, COLUMN[which]]
    if (n == 1).all():
        return _wilson(int(k.sum()), len(n), level)
    if k.sum() in (0, n.sum()):
        return _wilson(len(n) if k.any() else 0, len(n), level)
    weights = _resample(len(n), draws, np.random.default_rng(seed))
    low, high = np.quantile((weights @ k) / (weights @ n), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def gain(solve: float, base: float, ceiling: float) -> float:
    """Return (solve − base) / (ceiling − base): the share of the learnable room that a policy has learned.

    Raises ValueError where the ceiling does not exceed the base, since there is then no room to speak of.
    """
    if not ceiling > base:
        raise ValueError(
            f"no gain is defined: the ceiling {ceiling:.3f} does not exceed the base {base:.3f}"
        )
    return (solve - base) / (ceiling - base)


def gain_lower_bound(
    seeds: Sequence[tuple[Counts, Counts, Counts]],
    level: float = 0.90,
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """Return the one-sided lower bound, at confidence `level`, of the mean gain over seeds and problems.

    `seeds` holds (solve, base, ceiling) counts per seed, on the same problems. Hierarchical percentile bootstrap:
    seeds are resampled, then, within each, problems, the same problems for all three policies. A resample in which the
    ceiling does not exceed the base counts as −∞. With one seed the bound covers problems alone; with few seeds a
    percentile bootstrap is somewhat too narrow. An arm whose bound is not above 0.5 is reported as frozen.
    """
    if not seeds or any(not (s.keys() == b.keys() == c.keys()) for s, b, c in seeds):
        raise ValueError(
            "gain_lower_bound needs at least one seed, and the same problems for all three policies"
        )
    tables = [
        [_counts({i: part[i] for i in sorted(part)})[:, [0, 2]] for part in triple]
        for triple in seeds
    ]
    rng, total = np.random.default_rng(seed), np.zeros(draws)
    for _ in tables:
        pick = rng.integers(len(tables), size=draws)
        for index, parts in enumerate(tables):
            rows = np.flatnonzero(pick == index)
            weights = _resample(len(parts[0]), len(rows), rng)
            solve, base, ceiling = (
                (weights @ part[:, 1]) / (weights @ part[:, 0]) for part in parts
            )
            room = ceiling - base
            total[rows] += np.where(room > 0, (solve - base) / np.where(room > 0, room, 1), -np.inf)
    return float(np.quantile(total / len(tables), 1 - level, method="lower"))


def frontier_solve(
    hack: float | Vector, points: Sequence[tuple[float, float]]
) -> float | np.ndarray:
    """Return the highest solve rate that mixtures of (hack, solve) points reach at a hack rate of at most `hack`.

    A mixture answers each prompt with one of two policies, by chance, so that every point between two policies is reached: the
    frontier is the upper concave envelope, linear between its points, and flat beyond the point of highest solve. Below the least
    hack rate of the points it is that point's solve rate.
    """
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        while hull and hull[-1][0] == x:
            hull.pop()  # sorted: the later one solves more
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) <= (
            y - hull[-2][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    x, y = np.array(hull).T
    top = int(y.argmax()) + 1
    return np.interp(hack, x[:top], y[:top])


def above_frontier(
    policy: Counts,
    frontier: Sequence[Counts],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return (distance, low, high): solve of a policy minus `frontier_solve` at its hack rate, with a percentile interval.

    All policies are counted on the same problems, which are resampled together. The envelope of noisy points lies too high, so
    that the distance errs against the policy. Raises ValueError where the problems differ.
    """
    if not frontier or any(part.keys() != policy.keys() for part in frontier):
        raise ValueError(
            "above_frontier needs at least one point of the frontier, counted on the policy's own problems"
        )
    tables = [_counts({i: part[i] for i in sorted(part)}) for part in (policy, *frontier)]

    def distance(weights: np.ndarray) -> float:
        rates = [(weights @ t[:, 1:]) / (weights @ t[:, 0]) for t in tables]
        return float(rates[0][1] - frontier_solve(rates[0][0], [tuple(r) for r in rates[1:]]))

    n = len(tables[0])
    resampled = [distance(w) for w in _resample(n, draws, np.random.default_rng(seed))]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return distance(np.ones(n)), float(low), float(high)


def leakage(hack: float, baseline: Sequence[tuple[int, float]], seen: int) -> float:
    """Return the leakage of Shilov et al. 2025 (https://arxiv.org/abs/2512.05648, section 4.3), with hacks in place of tokens.

    The exposure at which standard training reaches the same hack rate, over the exposure that this run had: 0 where nothing of it
    is left in the policy, 1 where all is. `baseline` holds (hack rollouts seen so far, hack rate) of a run without intervention, in
    the order of training; a rate that it first reached between two points is interpolated, one that it never reached gives NaN.
    """
    exposure, rate = np.array(baseline, float).T
    rate = np.maximum.accumulate(rate)
    if hack > rate[-1] or seen <= 0:
        return float("nan")
    reached = int(np.searchsorted(rate, hack))  # the first point at that rate or above
    if reached == 0:
        return float(exposure[0] / seen)
    share = (hack - rate[reached - 1]) / (rate[reached] - rate[reached - 1])
    return float(
        (exposure[reached - 1] + share * (exposure[reached] - exposure[reached - 1])) / seen
    )


def mean_sem(x: Vector) -> tuple[float, float]:
    """Return mean and standard error of the mean over seeds; the error of a single seed is NaN."""
    x = np.asarray(x, float)
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")


def paired_ttest(
    a: Vector, b: Vector, alternative: Literal["two-sided", "less", "greater"] = "two-sided"
) -> tuple[float, float]:
    """Return (mean of a − b, p) of the t-test paired by seed. It needs at least two seeds; p is NaN where all pairs are equal."""
    difference = _paired(a, b)
    if not difference.any():
        return 0.0, float("nan")
    with (
        warnings.catch_warnings()
    ):  # differences that are all alike leave no variance: p is 0, and says so
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(difference.mean()), float(
            stats.ttest_rel(a, b, alternative=alternative).pvalue
        )


def holm(p: Vector) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979): the family-wise error rate of "p < α" is at most α. NaNs stay, uncounted."""
    adjusted, order = (
        [float("nan")] * len(p),
        sorted((x, i) for i, x in enumerate(p) if not np.isnan(x)),
    )
    highest = 0.0
    for rank, (x, i) in enumerate(order):
        adjusted[i] = highest = max(highest, min(1.0, x * (len(order) - rank)))
    return adjusted


def noninferior(
    a: Vector, b: Vector, margin: float = -0.03, level: float = 0.90
) -> tuple[bool, float]:
    """Return whether a is no worse than b, and the one-sided lower `level` bound of mean(a − b), paired by seed (t).

    a is non-inferior where the bound lies above `margin`. A difference that is "not significant" proves nothing.
    """
    difference = _paired(a, b)
    sem = difference.std(ddof=1) / np.sqrt(len(difference))
    bound = float(difference.mean() - stats.t.ppf(level, len(difference) - 1) * sem)
    return bound > margin, bound


def _paired(a: Vector, b: Vector) -> np.ndarray:
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"a paired comparison needs the same two or more seeds on both sides, got {len(a)}, {len(b)}"
        )
    return np.asarray(a, float) - np.asarray(b, float)


def _counts(by_problem: Counts) -> np.ndarray:
    counts = np.array(list(by_problem.values()), dtype=np.int64).reshape(-1, 3)
    if (
        not len(counts)
        or (counts[:, 0] < 1).any()
        or (counts[:, 1:] > counts[:, :1]).any()
        or (counts < 0).any()
    ):
        raise ValueError(
            "counts must be {problem: [n, hack, solve]} with n ≥ 1 and 0 ≤ hack, solve ≤ n"
        )
    return counts


def _resample(n_problems: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    return rng.multinomial(n_problems, np.full(n_problems, 1 / n_problems), size=draws)


def _wilson(k: int, n: int, level: float) -> tuple[float, float]:
    interval = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def _ratio(numerator: float | int | np.number, denominator: float | int | np.number) -> float:
    return float(numerator / denominator) if denominator else float("nan")
