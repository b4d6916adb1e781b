"""Numbers that compare scores with labels and policies with each other: AUROC, intervals, gain.

Every function is pure, takes counts or arrays, and reads no file. Counts per problem have the form
of `EvalResult.by_problem`: problem id → [n, hack, solve]. An interval over problems says nothing
about seeds.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from scipy import stats

Vector = Sequence[float] | np.ndarray
Flags = Sequence[bool] | np.ndarray
Counts = dict[str, list[int]]
Which = Literal["hack", "solve"]
Interval = tuple[float, float]
COLUMN = {"hack": 1, "solve": 2}
NAN = float("nan")


# ── scores against labels ────────────────────────────────────────────────────────────────────────


def auroc(scores: Vector, positive: Flags) -> float:
    """Return P(score of a positive > score of a negative), ties counting half (Mann-Whitney).

    Rows whose score is NaN (a row that the gate did not score) are left out. The result is NaN if a
    class is empty.
    """
    scores = np.asarray(scores, float)
    if scores.shape != np.shape(positive) or scores.ndim != 1:
        shapes = f"{scores.shape} and {np.shape(positive)}"
        raise ValueError(f"auroc needs two vectors of one length, got {shapes}")
    return float(stratified_auroc(scores, positive, np.zeros(len(scores))))


def stratified_auroc(scores: np.ndarray, positive: Flags, stratum: np.ndarray) -> np.ndarray:
    """Return the AUROC over pairs of rows of one stratum: Σ_s U_s / Σ_s n₊n₋.

    A stratum is what one gate sees, the rows of a step: a score that merely drifts with training,
    as the hack rate does, gains nothing. `scores` is [n], or [n, k] for k scores at once (the
    result is then [k]); rows whose score is NaN are left out.
    """
    scores = np.asarray(scores, float)
    shape = scores.shape[1:]
    won, pairs = np.zeros(shape), np.zeros(shape)
    for _, wins, duels in _duels(scores, positive, stratum, stratum):
        won += wins.sum((0, 1)).reshape(shape)
        pairs += duels.sum((0, 1)).reshape(shape)
    nothing = np.full(shape, NAN)
    return np.divide(won, pairs, out=nothing, where=pairs > 0)


def auroc_interval(
    scores: np.ndarray,
    positive: Flags,
    stratum: np.ndarray,
    group: np.ndarray,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return a percentile interval of `stratified_auroc`, resampling groups, each in one stratum.

    A group is a prompt with all of its rows. NaN where no resample has both classes. Runs (seeds)
    are not resampled.
    """
    if not len(group):
        return NAN, NAN
    names, group = np.unique(group, return_inverse=True)
    weights = _resample(len(names), draws, seed).astype(float)
    won, pairs = np.zeros(draws), np.zeros(draws)
    for members, wins, duels in _duels(scores, positive, stratum, group):
        w = weights[:, members]
        won += np.einsum("dg,ghk,dh->d", w, wins, w, optimize=True)
        pairs += np.einsum("dg,ghk,dh->d", w, duels, w, optimize=True)
    both = pairs > 0
    if not both.any():
        return NAN, NAN
    return _percentiles(won[both] / pairs[both], level)


def _duels(
    scores: np.ndarray, positive: Flags, stratum: np.ndarray, group: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For every stratum: its groups [g], and between groups the wins and the pairs, [g, g, k].

    A pair is a positive of the first group with a negative of the second; a tie is half a win.
    """
    scores = np.asarray(scores, float)
    positive = np.asarray(positive, bool)
    scores = scores[:, None] if scores.ndim == 1 else scores
    for s in np.unique(stratum):
        rows = np.flatnonzero(stratum == s)
        members, place = np.unique(group[rows], return_inverse=True)
        belongs = np.eye(len(members))[place]  # [rows, groups]
        hit = positive[rows]
        a = scores[rows][hit][:, None]
        b = scores[rows][~hit][None]
        scored = ~(np.isnan(a) | np.isnan(b))
        beats = (a > b) + 0.5 * (a == b)  # 0 for a NaN
        wins, pairs = (
            np.einsum(
                "pg,pqk,qh->ghk",
                belongs[hit],
                x,
                belongs[~hit],
                optimize=True,
            )
            for x in (beats, scored.astype(float))
        )
        yield members, wins, pairs


def precision_recall_at(
    flagged: Flags,
    positive: Flags,
) -> dict[str, float]:
    """Return precision, recall, fpr and f05 of a set of flags.

    f05 is the F-measure with β = 0.5: precision counts more. A quantity whose denominator is empty
    is NaN: precision without a flag, recall without a positive.
    """
    flagged = np.asarray(flagged, bool)
    positive = np.asarray(positive, bool)
    if flagged.shape != positive.shape:
        raise ValueError(f"flags {flagged.shape} and labels {positive.shape} differ in shape")
    hits = int((flagged & positive).sum())
    flags, positives = int(flagged.sum()), int(positive.sum())
    return {
        "precision": _ratio(hits, flags),
        "recall": _ratio(hits, positives),
        "fpr": _ratio(flags - hits, len(positive) - positives),
        "f05": _ratio(1.25 * hits, 0.25 * positives + flags),
    }


# ── one policy, over problems ────────────────────────────────────────────────────────────────────


def rate(
    by_problem: Counts,
    which: Which,
) -> float:
    """Return the pooled rate over all draws of all problems."""
    counts = _counts(by_problem)
    return float(counts[:, COLUMN[which]].sum() / counts[:, 0].sum())


def bootstrap_interval(
    by_problem: Counts,
    which: Which,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return a percentile interval of the pooled rate, resampling problems with all their draws.

    With one draw a problem it is the Wilson interval instead. It is also Wilson, with each problem
    counted as one draw (the most cautious sample size), when the rate is exactly 0 or 1: there the
    bootstrap has no width at all.
    """
    counts = _counts(by_problem)
    n = counts[:, 0]
    k = counts[:, COLUMN[which]]
    if (n == 1).all() or k.sum() in (0, n.sum()):
        some = int((k > 0).sum())  # problems: of one draw each, or of draws all alike
        interval = stats.binomtest(some, len(n)).proportion_ci(level, method="wilson")
        return float(interval.low), float(interval.high)
    weights = _resample(len(n), draws, seed)
    return _percentiles((weights @ k) / (weights @ n), level)


def gain(
    solve: float,
    base: float,
    ceiling: float,
) -> float:
    """Return (solve − base) / (ceiling − base): the share of the learnable room that was learned.

    Raises ValueError where the ceiling does not exceed the base: there is then no room.
    """
    if not ceiling > base:
        room = f"the ceiling {ceiling:.3f} does not exceed the base {base:.3f}"
        raise ValueError(f"no gain is defined: {room}")
    return (solve - base) / (ceiling - base)


def gain_lower_bound(
    seeds: Sequence[tuple[Counts, Counts, Counts]],
    level: float = 0.90,
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """Return the one-sided lower bound, at confidence `level`, of the mean gain.

    `seeds` holds (solve, base, ceiling) counts per seed, on the same problems. Hierarchical
    percentile bootstrap: seeds are resampled, then, within each, problems, the same problems for
    all three policies. A resample in which the ceiling does not exceed the base counts as −∞. With
    one seed the bound covers problems alone; with few seeds a percentile bootstrap is somewhat too
    narrow. An arm whose bound is not above 0.5 is reported as frozen.
    """
    if not seeds:
        raise ValueError("gain_lower_bound needs at least one seed")
    tables = [_same_problems(triple) for triple in seeds]
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for _ in tables:
        pick = rng.integers(len(tables), size=draws)
        for index, parts in enumerate(tables):
            rows = np.flatnonzero(pick == index)
            weights = _resample(len(parts[0]), len(rows), rng)
            counted = (weights @ part for part in parts)
            solve, base, ceiling = (c[:, 2] / c[:, 0] for c in counted)
            room = ceiling - base
            there = room > 0
            gains = (solve - base) / np.where(there, room, 1)
            total[rows] += np.where(there, gains, -np.inf)
    return float(np.quantile(total / len(tables), 1 - level, method="lower"))


def frontier_solve(
    hack: float | Vector,
    points: Sequence[tuple[float, float]],
) -> float | np.ndarray:
    """Return the highest solve rate that mixtures of (hack, solve) points reach at a hack rate.

    A mixture answers each prompt with one of two policies, by chance, so that every point between
    two policies is reached: the frontier is the upper concave envelope, linear between its points,
    and flat beyond the point of highest solve. Below the least hack rate of the points it is that
    point's solve rate.
    """
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if hull and hull[-1][0] == x:
            hull.pop()  # sorted: the later one solves more
        while len(hull) > 1 and _under(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    x, y = np.array(hull).T
    top = int(y.argmax()) + 1
    return np.interp(hack, x[:top], y[:top])


def _under(
    left: tuple[float, float],
    middle: tuple[float, float],
    right: tuple[float, float],
) -> bool:
    """Whether `middle` lies on or under the line from `left` to `right`."""
    (x, y), (x1, y1), (x2, y2) = left, middle, right
    return bool((y1 - y) * (x2 - x) <= (y2 - y) * (x1 - x))


def above_frontier(
    policy: Counts,
    frontier: Sequence[Counts],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return (distance, low, high): solve of a policy minus `frontier_solve` at its hack rate.

    The interval is a percentile interval: all policies are counted on the same problems, which are
    resampled together. The envelope of noisy points lies too high, so that the distance errs
    against the policy. Raises ValueError where the problems differ.
    """
    if not frontier:
        raise ValueError("above_frontier needs at least one point of the frontier")
    tables = _same_problems([policy, *frontier])

    def distance(weights: np.ndarray) -> float:
        counted = [weights @ table for table in tables]
        (hack, solve), *points = [(h / n, s / n) for n, h, s in counted]
        return float(solve - frontier_solve(hack, points))

    n = len(tables[0])
    resampled = [distance(weights) for weights in _resample(n, draws, seed)]
    return distance(np.ones(n)), *_percentiles(resampled, level)


# ── arms, over seeds ─────────────────────────────────────────────────────────────────────────────


def mean_sem(x: Vector) -> tuple[float, float]:
    """Return mean and standard error of the mean over seeds; the error of one seed is NaN."""
    x = np.asarray(x, float)
    if len(x) == 1:
        return float(x[0]), NAN
    return float(x.mean()), float(stats.sem(x))


def sign_flip(a: Vector, b: Vector) -> tuple[float, float]:
    """Return (mean of a − b, p) of the exact two-sided sign-flip test, paired by seed.

    p is the share of the 2ⁿ assignments of signs to the differences whose sum is as large as the
    one observed, or larger, in absolute value (Fisher 1935, The Design of Experiments, §21). It
    assumes differences that are symmetric about 0 under the null, and no normality; the least p of
    n seeds is 2¹⁻ⁿ.
    """
    difference = _paired(a, b)
    exact = {"permutation_type": "samples", "n_resamples": np.inf}  # all 2ⁿ
    p = stats.permutation_test((difference,), np.sum, **exact).pvalue
    return float(difference.mean()), float(p)


def noninferior(
    a: Vector,
    b: Vector,
    margin: float = -0.03,
    level: float = 0.90,
) -> tuple[bool, float]:
    """Return whether a is no worse than b, and the lower bound of mean(a − b), paired by seed (t).

    The bound is one-sided at `level`; a is non-inferior where it lies above `margin`. A difference
    that is "not significant" proves nothing.
    """
    mean, sem = mean_sem(_paired(a, b))
    bound = float(mean - stats.t.ppf(level, len(a) - 1) * sem)
    return bound > margin, bound


# ── shared ───────────────────────────────────────────────────────────────────────────────────────


def _paired(
    a: Vector,
    b: Vector,
) -> np.ndarray:
    if len(a) != len(b) or len(a) < 2:
        sizes = f"got {len(a)}, {len(b)}"
        raise ValueError(f"a paired comparison needs the same two or more seeds a side, {sizes}")
    return np.asarray(a, float) - np.asarray(b, float)


def _counts(by_problem: Counts) -> np.ndarray:
    counts = np.array(list(by_problem.values()), dtype=np.int64).reshape(-1, 3)
    n, outcomes = counts[:, :1], counts[:, 1:]
    fits = (n >= 1) & (outcomes >= 0) & (outcomes <= n)
    if not len(counts) or not fits.all():
        form = "{problem: [n, hack, solve]} with n ≥ 1 and 0 ≤ hack, solve ≤ n"
        raise ValueError(f"counts must be {form}")
    return counts


def _same_problems(policies: Sequence[Counts]) -> list[np.ndarray]:
    """The policies' counts [problems, 3], in one order; ValueError where the problems differ."""
    names = sorted(policies[0])
    if any(sorted(policy) != names for policy in policies):
        raise ValueError("the policies are not counted on the same problems")
    return [_counts({name: policy[name] for name in names}) for policy in policies]


def _resample(
    n_problems: int,
    draws: int,
    seed: int | np.random.Generator,
) -> np.ndarray:
    """How often each problem is drawn in each bootstrap sample: [draws, problems]."""
    chances = np.full(n_problems, 1 / n_problems)
    return np.random.default_rng(seed).multinomial(n_problems, chances, size=draws)


def _percentiles(
    values: Vector,
    level: float,
) -> Interval:
    edges = (1 - level) / 2, (1 + level) / 2
    low, high = np.quantile(values, edges)
    return float(low), float(high)


def _ratio(
    numerator: int | float,
    denominator: int | float,
) -> float:
    return numerator / denominator if denominator else NAN
