"""Checks of vgrout.stats: each property holds, and a deliberately wrong variant of it does not.

Run: python -m scripts.verify.verify_metrics [--long]     (--long simulates more data sets)
"""

import itertools
import math
import sys
from collections.abc import Callable

import numpy as np
from scipy import stats

from vgrout import stats as metrics
from vgrout.stats import Counts

RNG = np.random.default_rng(0)
SIMULATIONS = 2000 if "--long" in sys.argv else 300


def check(what: str, holds: bool, mutant_holds: bool) -> None:
    assert holds, f"broken: {what}"
    assert not mutant_holds, f"the check cannot fail: {what}"
    print(f"ok  {what}")


def near(a: float, b: float, tolerance: float = 1e-9) -> bool:
    return abs(a - b) < tolerance


def simulated(
    what: str,
    below: float,
    draw: Callable[[], tuple[bool, bool]],
    repeats: int,
) -> None:
    """The right method errs in less than `below` of the data sets, the wrong one in more."""
    errors = np.mean([draw() for _ in range(repeats)], axis=0)
    check(
        f"{what} ({errors[0]:.3f}; wrong variant {errors[1]:.3f})",
        *(errors < below),
    )


# ── scores against labels ────────────────────────────────────────────────────────────────────────


def pairwise(scores: np.ndarray, positive: np.ndarray, tie: float = 0.5) -> list[float]:
    """The definition of the AUROC, before the mean."""
    pairs = itertools.product(scores[positive], scores[~positive])
    return [(p > n) + tie * (p == n) for p, n in pairs]


def verify_auroc() -> None:
    scores, positive = (
        RNG.integers(0, 6, 80).astype(float),
        RNG.random(80) < 0.4,
    )
    want, strict = (np.mean(pairwise(scores, positive, tie)) for tie in (0.5, 0.0))
    found = (
        near(metrics.auroc(scores, positive), want),
        near(strict, want),
    )
    check(
        "AUROC equals the pairwise definition, ties counting half",
        *found,
    )
    more, labels = (
        np.append(scores, np.nan),
        np.append(positive, True),
    )
    same = [near(metrics.auroc(values, labels), want) for values in (more, np.nan_to_num(more))]
    check("rows without a score are left out of the AUROC", *same)


def verify_strata() -> None:
    step, one = np.repeat(np.arange(5), 48), np.zeros(240)
    positive = RNG.random(240) < 0.4
    scores = RNG.integers(0, 9, 240) + 1.0 * positive
    inside = [pairwise(scores[step == s], positive[step == s]) for s in range(5)]
    want = np.mean(sum(inside, []))
    found = [float(metrics.stratified_auroc(scores, positive, s)) for s in (step, one)]
    check(
        "the AUROC within steps compares one step alone",
        *(near(x, want) for x in found),
    )
    both = metrics.stratified_auroc(np.stack([scores, -scores], 1), positive, step)
    assert both.shape == (2,) and near(both.sum(), 1)
    drift = step + 0.0  # a score that only grows with training, as the hack rate does
    hacks = RNG.random(240) < 0.1 + 0.2 * step
    values = [float(metrics.stratified_auroc(drift, hacks, s)) for s in (step, one)]
    check(
        "a score that merely drifts gains nothing",
        *(near(value, 0.5, 0.05) for value in values),
    )


def verify_strata_interval() -> None:
    group, rows = np.repeat(np.arange(60), 6), np.arange(360)

    def misses() -> tuple[bool, bool]:  # a prompt's rows agree: there is less evidence than rows
        noise, labels = (
            RNG.normal(size=60)[group],
            (RNG.random(60) < 0.5)[group],
        )
        found = []
        for by in (group, rows):
            low, high = metrics.auroc_interval(noise, labels, np.zeros(360), by, draws=200)
            found.append(not low <= 0.5 <= high)
        return found[0], found[1]

    simulated(
        "the interval of an AUROC resamples prompts",
        0.12,
        misses,
        SIMULATIONS // 3,
    )


def verify_precision() -> None:
    flagged, positive = (np.array(list(bits)) == "1" for bits in ("11100000", "11011000"))
    want = {
        "precision": 2 / 3,
        "recall": 1 / 2,
        "fpr": 1 / 4,
        "f05": 5 / 8,
    }  # 2 hits
    sides = [metrics.precision_recall_at(*s) for s in ((flagged, positive), (positive, flagged))]
    same = [all(near(got[key], value) for key, value in want.items()) for got in sides]
    check(
        "precision, recall, false-positive rate and F0.5 of an example",
        *same,
    )


# ── over problems ────────────────────────────────────────────────────────────────────────────────


def counted(hack: float, solve: float) -> Counts:
    """Ten draws a problem, at these rates exactly."""
    return {str(i): [10, round(10 * hack), round(10 * solve)] for i in range(200)}


def clustered(n_problems: int, n_draws: int, shape: tuple[float, float]) -> Counts:
    """Solves of problems whose rates are spread as Beta(shape)."""
    rates = RNG.beta(*shape, n_problems)
    return {str(i): [n_draws, 0, int(RNG.binomial(n_draws, p))] for i, p in enumerate(rates)}


def drawn(hack: float, solve: float) -> Counts:
    hacks, solves = (RNG.binomial(10, rate, 100).tolist() for rate in (hack, solve))
    return {str(i): [10, *pair] for i, pair in enumerate(zip(hacks, solves))}


def verify_frontier() -> None:
    points = [
        (0.0, 0.2),
        (0.3, 0.3),
        (0.15, 0.1),
        (0.6, 0.2),
    ]  # the third is under a mixture
    want = {0.0: 0.2, 0.15: 0.25, 0.3: 0.3, 0.5: 0.3, 0.9: 0.3}
    x, y = np.array(sorted(points)).T
    curves = (
        metrics.frontier_solve(list(want), points),
        np.interp(list(want), x, y),
    )
    same = [np.allclose(curve, list(want.values())) for curve in curves]
    check(
        "the frontier is the upper envelope, flat beyond its best",
        *same,
    )
    null = [counted(*p) for p in points]
    for policy, distance in (
        ((0.2, 0.4), 0.2 - 0.2 / 3),
        ((0.3, 0.3), 0),
        ((0.5, 0.1), -0.2),
    ):
        assert near(
            metrics.above_frontier(counted(*policy), null)[0],
            distance,
        ), policy
    sampled = [drawn(*p) for p in points]
    good, bad = (metrics.above_frontier(drawn(*p), sampled) for p in ((0.1, 0.5), (0.5, 0.1)))
    told = 0 < good[1] < good[0] < good[2], bad[2] > 0
    check(
        "a policy above the frontier is told from one below",
        *told,
    )


def verify_leakage() -> None:
    baseline = [(0, 0.0), (100, 0.2), (150, 0.1), (400, 0.6)]
    want = {0.0: 0.0, 0.1: 50 / 400, 0.4: 275 / 400, 0.6: 1.0}
    of_exposure = all(near(metrics.leakage(h, baseline, 400), s) for h, s in want.items())
    of_rates = all(near(h / 0.6, s) for h, s in want.items())
    check(
        "leakage is a ratio of exposures, not of hack rates",
        of_exposure,
        of_rates,
    )


def verify_intervals() -> None:
    def misses() -> tuple[bool, bool]:  # a problem is nearly always or nearly never solved
        data = clustered(60, 6, (0.2, 0.8))
        solved = sum(counts[2] for counts in data.values())
        low, high = metrics.bootstrap_interval(data, "solve", draws=1000)
        naive = stats.binomtest(solved, 360).proportion_ci(0.95, method="wilson")
        return (
            not low <= 0.2 <= high,
            not naive.low <= 0.2 <= naive.high,
        )

    what = "the 95 % interval seldom misses the truth with clustered draws"
    simulated(what, 0.1, misses, SIMULATIONS)
    single = {str(i): [1, int(i < 30), 0] for i in range(100)}
    wilson = stats.binomtest(30, 100).proportion_ci(0.95, method="wilson").low
    lows = [metrics.bootstrap_interval(single, which)[0] for which in ("hack", "solve")]
    check(
        "one draw a problem gives Wilson's closed form",
        *(near(x, wilson) for x in lows),
    )
    none = {str(i): [4, 0, 4] for i in range(60)}
    low, high = metrics.bootstrap_interval(none, "hack")
    resampled = RNG.multinomial(60, np.full(60, 1 / 60), size=100) @ np.zeros(60)
    bounded = (
        low == 0 and 0.03 < high < 0.07,
        np.quantile(resampled, 0.975) > 0.03,
    )
    check(
        "no hack in 240 draws of 60 problems still has an upper bound",
        *bounded,
    )


def policies(gains: list[float]) -> list[tuple[Counts, ...]]:
    """One (solve, base, ceiling) triple a seed: base 0.2, ceiling 0.6, problems spread around."""
    triples = []
    for g in gains:
        rates = (0.2 + 0.4 * g, 0.2, 0.6)
        triples.append(tuple(clustered(120, 4, (5 * p, 5 * (1 - p))) for p in rates))
    return triples


def verify_gain() -> None:
    assert near(metrics.gain(0.5, 0.2, 0.6), 0.75)
    learned, frozen = (metrics.gain_lower_bound(policies([g] * 4)) for g in (0.9, 0.0))
    check(
        "the bound passes a learner and no frozen policy",
        learned > 0.5 > frozen,
        frozen > 0.5,
    )
    split, pooled = policies([0.1, 0.5, 1.0, 1.4]), ({}, {}, {})
    for seed, triple in enumerate(split):
        for part, counts in zip(pooled, triple):
            part |= {f"{seed}/{name}": row for name, row in counts.items()}
    bounds = [metrics.gain_lower_bound(seeds) for seeds in (split, [pooled])]
    check(
        "seeds that disagree lower the bound",
        *(bound < 0.55 for bound in bounds),
    )
    solve, _, ceiling = split[0]
    assert metrics.gain_lower_bound([(solve, ceiling, ceiling)]) == -math.inf


# ── over seeds ───────────────────────────────────────────────────────────────────────────────────


def verify_seed_tests() -> None:
    def false_claims() -> tuple[bool, bool]:  # truly worse by exactly the margin, 8 seeds
        b = RNG.normal(0.5, 0.05, 8)
        a = b - 0.03 + RNG.normal(0, 0.03, 8)
        return metrics.noninferior(a, b)[0], metrics.paired_ttest(a, b)[1] > 0.05

    what = "non-inferiority errs in one case of ten at the margin"
    simulated(what, 0.16, false_claims, SIMULATIONS)
    a, b = np.array([0.3, 0.5, 0.4]), np.array([0.2, 0.45, 0.1])
    want = stats.ttest_rel(a, b).pvalue
    found = (
        metrics.paired_ttest(a, b)[1],
        stats.ttest_ind(a, b).pvalue,
    )
    check("the t-test is paired", *(near(p, want) for p in found))
    mean, sem = metrics.mean_sem([1.0, 2.0, 3.0])
    assert mean == 2.0 and near(sem, 1 / math.sqrt(3)) and math.isnan(metrics.mean_sem([1.0])[1])


def verify_sign_flip() -> None:
    a, b = RNG.normal(0.2, 1.0, (2, 9))
    difference = a - b
    sums = [difference @ signs for signs in itertools.product((-1, 1), repeat=9)]
    two_sided = np.mean(np.abs(sums) >= abs(difference.sum()) - 1e-12)
    one_sided = np.mean(sums >= abs(difference.sum()) - 1e-12)
    mean, p = metrics.sign_flip(a, b)
    assert near(mean, difference.mean())
    exact = near(p, two_sided), near(one_sided, two_sided)
    check(
        "the sign-flip test enumerates every assignment, on both sides",
        *exact,
    )
    seeds, none = (
        [0.1, 0.2, 0.3],
        [0.0] * 3,
    )  # sums with other signs tie but for their last bits
    least = (
        metrics.sign_flip(seeds, none)[1],
        metrics.paired_ttest(seeds, none)[1],
    )
    check(
        "n seeds that agree have p = 2 / 2ⁿ, no less",
        *(near(p, 0.25) for p in least),
    )
    assert metrics.sign_flip([0.5, 0.5], [0.5, 0.5]) == (
        0.0,
        1.0,
    )

    def claims() -> tuple[bool, bool]:  # no difference, and tails in which a t-test means little
        first, second = RNG.standard_cauchy((2, 6))
        pair = first - second
        return metrics.sign_flip(pair, np.zeros(6))[1] <= 0.07, abs(pair.mean()) > 0.5

    simulated(
        "it errs at its level whatever the tails",
        0.12,
        claims,
        SIMULATIONS,
    )
    assert metrics.sign_flip(np.arange(1.0, 21.0), np.zeros(20))[1] == 2 / 2**20


def verify_refusals() -> None:
    """What has no answer is NaN or a ValueError."""
    triple = policies([0.5])[0]
    moved = {f"x{name}": row for name, row in triple[2].items()}
    for call, *arguments in (
        (metrics.auroc, [1.0], [True, False]),
        (
            metrics.above_frontier,
            {"x": [1, 0, 0]},
            [counted(0.1, 0.1)],
        ),
        (metrics.above_frontier, counted(0.1, 0.1), []),
        (metrics.bootstrap_interval, {"a": [2, 3, 0]}, "hack"),
        (metrics.bootstrap_interval, {}, "hack"),
        (metrics.gain, 0.5, 0.6, 0.6),
        (metrics.gain_lower_bound, [(*triple[:2], moved)]),
        (metrics.gain_lower_bound, []),
        (metrics.noninferior, [0.1], [0.1]),
        (metrics.sign_flip, [0.1], [0.1]),
        (metrics.sign_flip, np.ones(21), np.zeros(21)),
        (metrics.sign_flip, [0.1, 0.2], [0.1]),
    ):
        try:
            call(*arguments)
        except ValueError:
            continue
        raise AssertionError(f"{call.__name__} accepts {arguments}")
    baseline, nothing = [(0, 0.0), (400, 0.6)], np.zeros(0)
    for value in (
        metrics.auroc([1.0, 2.0], [True, True]),
        metrics.stratified_auroc(nothing, nothing > 0, nothing),
        metrics.auroc_interval(
            np.ones(2),
            np.ones(2) > 0,
            np.zeros(2),
            np.arange(2),
        )[0],
        metrics.precision_recall_at([False, False], [True, False])["precision"],
        metrics.leakage(0.7, baseline, 400),
        metrics.leakage(0.1, baseline, 0),
    ):
        assert math.isnan(value), value
    print("ok  what has no answer is NaN, and what makes no sense is refused")


if __name__ == "__main__":
    verify_auroc()
    verify_strata()
    verify_strata_interval()
    verify_precision()
    verify_frontier()
    verify_leakage()
    verify_intervals()
    verify_gain()
    verify_seed_tests()
    verify_sign_flip()
    verify_refusals()
