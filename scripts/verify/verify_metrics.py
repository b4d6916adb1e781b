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
Value = float | list[float] | np.ndarray


def check(what: str, holds: bool, mutant_holds: bool) -> None:
    assert holds, f"broken: {what}"
    assert not mutant_holds, f"the check cannot fail: {what}"
    print(f"ok  {what}")


def equal(what: str, got: Value, want: Value, wrong: Value) -> None:
    check(what, *(np.allclose(value, want, rtol=0, atol=1e-9) for value in (got, wrong)))


def seldom(what: str, below: float, errors: Callable[[], tuple[bool, bool]], draws: int) -> None:
    """The right method errs in less than `below` of the data sets, the wrong one in more."""
    right, wrong = np.mean([errors() for _ in range(draws)], axis=0)
    check(f"{what} ({right:.3f}; wrong variant {wrong:.3f})", right < below, wrong < below)


# ── scores against labels ────────────────────────────────────────────────────────────────────────


def pairwise(scores: np.ndarray, positive: np.ndarray, tie: float = 0.5) -> list[float]:
    """The definition of the AUROC, before the mean."""
    pairs = itertools.product(scores[positive], scores[~positive])
    return [(p > n) + tie * (p == n) for p, n in pairs]


def verify_auroc() -> None:
    scores, positive = RNG.integers(0, 6, 80).astype(float), RNG.random(80) < 0.4
    want, strict = (np.mean(pairwise(scores, positive, tie)) for tie in (0.5, 0.0))
    what = "AUROC equals the pairwise definition, ties counting half"
    equal(what, metrics.auroc(scores, positive), want, strict)
    more, labels = np.append(scores, np.nan), np.append(positive, True)
    got, zeroed = (metrics.auroc(values, labels) for values in (more, np.nan_to_num(more)))
    equal("rows without a score are left out of the AUROC", got, want, zeroed)


def verify_strata() -> None:
    step, one = np.repeat(np.arange(5), 48), np.zeros(240)
    positive = RNG.random(240) < 0.4
    scores = RNG.integers(0, 9, 240) + 1.0 * positive + step
    inside = [pairwise(scores[step == s], positive[step == s]) for s in range(5)]
    got, pooled = (metrics.stratified_auroc(scores, positive, s) for s in (step, one))
    equal("the AUROC within steps compares one step alone", got, np.mean(sum(inside, [])), pooled)
    both = metrics.stratified_auroc(np.stack([scores, -scores], 1), positive, step)
    assert np.allclose(both, [got, 1 - got]), "several scores at once are each their own"
    group, rows = np.repeat(np.arange(60), 6), np.arange(360)

    def misses() -> tuple[bool, bool]:  # a prompt's rows agree: there is less evidence than rows
        noise, labels = RNG.normal(size=60)[group], (RNG.random(60) < 0.5)[group]
        given = noise, labels, np.zeros(360)
        intervals = [metrics.auroc_interval(*given, by, draws=200) for by in (group, rows)]
        right, wrong = (not low <= 0.5 <= high for low, high in intervals)
        return right, wrong

    seldom("the interval of an AUROC resamples prompts", 0.12, misses, SIMULATIONS // 3)


def verify_precision() -> None:
    flagged, positive = (np.array(list(bits)) == "1" for bits in ("11100000", "11011000"))
    want = {"precision": 2 / 3, "recall": 1 / 2, "fpr": 1 / 4, "f05": 5 / 8}  # 2 hits
    orders = (flagged, positive), (positive, flagged)
    got, swapped = ([*map(metrics.precision_recall_at(*x).get, want)] for x in orders)
    what = "precision, recall, false-positive rate and F0.5 of an example"
    equal(what, got, [*want.values()], swapped)


# ── over problems ────────────────────────────────────────────────────────────────────────────────


def counted(hack: float, solve: float) -> Counts:
    """Ten draws a problem, at these rates exactly."""
    return {str(i): [10, round(10 * hack), round(10 * solve)] for i in range(200)}


def clustered(n_problems: int, n_draws: int, shape: tuple[float, float]) -> Counts:
    """Solves of problems whose rates are spread as Beta(shape)."""
    rates = RNG.beta(*shape, n_problems)
    return {str(i): [n_draws, 0, int(RNG.binomial(n_draws, p))] for i, p in enumerate(rates)}


def verify_frontier() -> None:
    points = [(0.0, 0.2), (0.3, 0.3), (0.15, 0.1), (0.6, 0.2)]  # the third is under a mixture
    want = {0.0: 0.2, 0.15: 0.25, 0.3: 0.3, 0.5: 0.3, 0.9: 0.3}
    got, joined = (
        metrics.frontier_solve([*want], points),
        np.interp([*want], *np.array(sorted(points)).T),
    )
    what = "the frontier is the upper envelope, flat beyond its best"
    equal(what, got, [*want.values()], joined)
    null = [counted(*p) for p in points]
    policies = {(0.2, 0.4): 0.2 - 0.2 / 3, (0.3, 0.3): 0.0, (0.5, 0.1): -0.2}
    above = [metrics.above_frontier(counted(*p), null) for p in policies]
    got, under = [distance for distance, *_ in above], [p[1] - 0.2 for p in policies]
    equal(
        "a policy's distance to the frontier is at its own hack rate",
        got,
        [*policies.values()],
        under,
    )
    assert all(low <= distance + 1e-9 and distance - 1e-9 <= high for distance, low, high in above)


def verify_leakage() -> None:
    baseline = [(0, 0.0), (100, 0.2), (150, 0.1), (400, 0.6)]
    want = {0.0: 0.0, 0.1: 50 / 400, 0.4: 275 / 400, 0.6: 1.0}
    got, of_rates = [metrics.leakage(h, baseline, 400) for h in want], [h / 0.6 for h in want]
    what = "leakage is a ratio of exposures, not of hack rates"
    equal(what, got, [*want.values()], of_rates)


def wilson(successes: int, n: int) -> tuple[float, float]:
    return stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")


def verify_intervals() -> None:
    def misses() -> tuple[bool, bool]:  # a problem is nearly always or nearly never solved
        data = clustered(60, 6, (0.2, 0.8))
        low, high = metrics.bootstrap_interval(data, "solve", draws=1000)
        naive = wilson(sum(solved for *_, solved in data.values()), 360)
        return not low <= 0.2 <= high, not naive[0] <= 0.2 <= naive[1]

    what = "the 95 % interval seldom misses the truth with clustered draws"
    seldom(what, 0.1, misses, SIMULATIONS)
    single = {str(i): [1, int(i < 30), 0] for i in range(100)}
    got, other = (metrics.bootstrap_interval(single, which) for which in ("hack", "solve"))
    equal("one draw a problem gives Wilson's closed form", got, wilson(30, 100), other)
    none = {str(i): [4, 0, 4] for i in range(60)}
    got, of_draws = metrics.bootstrap_interval(none, "hack"), wilson(0, 240)
    what = "no hack in 240 draws of 60 problems is bounded by 60 draws"
    equal(what, got, wilson(0, 60), of_draws)


def policies(gains: list[float]) -> list[tuple[Counts, ...]]:
    """One (solve, base, ceiling) triple a seed: base 0.2, ceiling 0.6, problems spread around."""
    rates = [(0.2 + 0.4 * gain, 0.2, 0.6) for gain in gains]
    return [tuple(clustered(120, 4, (5 * p, 5 * (1 - p))) for p in triple) for triple in rates]


def verify_gain() -> None:
    assert np.isclose(metrics.gain(0.5, 0.2, 0.6), 0.75)
    learned, frozen = (metrics.gain_lower_bound(policies([g] * 4)) for g in (0.9, 0.0))
    assert learned > 0.5 > frozen, "the bound passes a frozen policy, or no learner"
    split, pooled = policies([0.1, 0.5, 1.0, 1.4]), ({}, {}, {})
    for seed, triple in enumerate(split):
        for part, counts in zip(pooled, triple):
            part |= {f"{seed}/{name}": row for name, row in counts.items()}
    bounds = [metrics.gain_lower_bound(seeds) for seeds in (split, [pooled])]
    check("seeds that disagree lower the bound", *(bound < 0.55 for bound in bounds))
    solve, _, ceiling = split[0]
    assert metrics.gain_lower_bound([(solve, ceiling, ceiling)]) == -math.inf


# ── over seeds ───────────────────────────────────────────────────────────────────────────────────


def verify_seed_tests() -> None:
    a, b = np.array([0.3, 0.5, 0.4]), np.array([0.2, 0.45, 0.1])
    paired, loose = stats.ttest_rel(a, b), stats.ttest_ind(a, b)
    equal("the t-test is paired", metrics.paired_ttest(a, b)[1], paired.pvalue, loose.pvalue)
    one_sided, two_sided = (paired.confidence_interval(level).low for level in (0.8, 0.9))
    passes, bound = metrics.noninferior(a, b)
    what = "the bound of non-inferiority is one-sided at 90 %"
    equal(what, bound, one_sided, two_sided)
    margins = [bound + shift for shift in (-1e-3, 1e-3)]
    decided = [metrics.noninferior(a, b, margin)[0] for margin in margins]
    check("non-inferior is a bound above the margin", *decided)
    assert passes == (bound > -0.03), "the margin is 0.03"
    mean, sem = metrics.mean_sem([1.0, 2.0, 3.0])
    assert np.allclose([mean, sem], [2.0, 1 / math.sqrt(3)])
    assert math.isnan(metrics.mean_sem([1.0])[1])


def verify_sign_flip() -> None:
    a, b = RNG.normal(0.2, 1.0, (2, 9))
    difference = a - b
    sums = [difference @ signs for signs in itertools.product((-1, 1), repeat=9)]
    observed = difference.sum() - 1e-12
    two_sided, one_sided = np.mean(np.abs(sums) >= abs(observed)), np.mean(sums >= abs(observed))
    mean, p = metrics.sign_flip(a, b)
    what = "the sign-flip test enumerates every assignment, on both sides"
    equal(what, [mean, p], [difference.mean(), two_sided], [difference.mean(), one_sided])
    seeds, none = [0.1, 0.2, 0.3], [0.0] * 3  # other signs' sums tie but for their last bits
    tests = metrics.sign_flip, metrics.paired_ttest
    got, by_t = (test(seeds, none)[1] for test in tests)
    equal("n seeds that agree have p = 2 / 2ⁿ, no less", got, 2 / 2**3, by_t)
    assert metrics.sign_flip([0.5, 0.5], [0.5, 0.5]) == (0.0, 1.0)
    assert metrics.sign_flip(np.arange(1.0, 21.0), np.zeros(20))[1] == 2 / 2**20


def verify_refusals() -> None:
    """What has no answer is NaN or a ValueError."""
    triple = policies([0.5])[0]
    moved = {f"x{name}": row for name, row in triple[2].items()}
    for call, *arguments in (
        (metrics.auroc, [1.0], [True, False]),
        (metrics.above_frontier, {"x": [1, 0, 0]}, [counted(0.1, 0.1)]),
        (metrics.above_frontier, counted(0.1, 0.1), []),
        (metrics.bootstrap_interval, {"a": [2, 3, 0]}, "hack"),
        (metrics.bootstrap_interval, {}, "hack"),
        (metrics.gain, 0.5, 0.6, 0.6),
        (metrics.gain_lower_bound, [(*triple[:2], moved)]),
        (metrics.gain_lower_bound, []),
        (metrics.noninferior, [0.1], [0.1]),
        (metrics.sign_flip, np.ones(21), np.zeros(21)),
        (metrics.sign_flip, [0.1, 0.2], [0.1]),
    ):
        try:
            call(*arguments)
        except ValueError:
            continue
        raise AssertionError(f"{call.__name__} accepts {arguments}")
    baseline, nothing, one = [(0, 0.0), (400, 0.6)], np.zeros(0), np.ones(2)
    for value in (
        metrics.auroc([1.0, 2.0], [True, True]),
        metrics.stratified_auroc(nothing, nothing > 0, nothing),
        metrics.auroc_interval(one, one > 0, one, np.arange(2))[0],
        metrics.precision_recall_at([False, False], [True, False])["precision"],
        metrics.leakage(0.7, baseline, 400),
        metrics.leakage(0.1, baseline, 0),
    ):
        assert math.isnan(value), value
    print("ok  what has no answer is NaN, and what makes no sense is refused")


if __name__ == "__main__":
    verify_auroc()
    verify_strata()
    verify_precision()
    verify_frontier()
    verify_leakage()
    verify_intervals()
    verify_gain()
    verify_seed_tests()
    verify_sign_flip()
    verify_refusals()
