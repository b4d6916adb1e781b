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
    check(
        what,
        *(np.allclose(value, want, rtol=0, atol=1e-9) for value in (got, wrong)),
    )


def seldom(
    what: str,
    below: float,
    errors: Callable[[], tuple[bool, bool]],
    draws: int,
) -> None:
    """The right method errs in less than `below` of the data sets, the wrong one in more."""
    right, wrong = np.mean([errors() for _ in range(draws)], axis=0)
    check(
        f"{what} ({right:.3f}; wrong variant {wrong:.3f})",
        right < below,
        wrong < below,
    )


# ── scores against labels ────────────────────────────────────────────────────────────────────────


def pairwise(scores: np.ndarray, positive: np.ndarray, tie: float = 0.5) -> list[float]:
    """The definition of the AUROC, before the mean."""
    pairs = itertools.product(scores[positive], scores[~positive])
    return [(p > n) + tie * (p == n) for p, n in pairs]


def verify_auroc() -> None:
    scores = RNG.integers(0, 6, 80).astype(float)
    positive = RNG.random(80) < 0.4
    want = np.mean(pairwise(scores, positive))
    strict = np.mean(pairwise(scores, positive, tie=0.0))
    what = "AUROC equals the pairwise definition, ties counting half"
    equal(what, metrics.auroc(scores, positive), want, strict)
    more = np.append(scores, np.nan)
    labels = np.append(positive, True)
    got = metrics.auroc(more, labels)
    zeroed = metrics.auroc(np.nan_to_num(more), labels)
    equal(
        "rows without a score are left out of the AUROC",
        got,
        want,
        zeroed,
    )


def verify_strata() -> None:
    step = np.repeat(np.arange(5), 48)
    one = np.zeros(240)
    positive = RNG.random(240) < 0.4
    scores = RNG.integers(0, 9, 240) + 1.0 * positive + step
    inside = [pairwise(scores[step == s], positive[step == s]) for s in range(5)]
    got = metrics.stratified_auroc(scores, positive, step)
    pooled = metrics.stratified_auroc(scores, positive, one)
    want = np.mean(sum(inside, []))
    equal(
        "the AUROC within steps compares one step alone",
        got,
        want,
        pooled,
    )
    both = metrics.stratified_auroc(np.stack([scores, -scores], 1), positive, step)
    assert np.allclose(both, [got, 1 - got]), "several scores at once are each their own"
    prompts = np.repeat(np.arange(60), 6)
    rows = np.arange(360)

    def misses() -> tuple[bool, bool]:  # a prompt's rows agree: there is less evidence than rows
        noise = RNG.normal(size=60)[prompts]
        labels = (RNG.random(60) < 0.5)[prompts]
        wrong = []
        for by in (prompts, rows):
            low, high = metrics.auroc_interval(noise, labels, np.zeros(360), by, draws=200)
            wrong.append(not low <= 0.5 <= high)
        return wrong[0], wrong[1]

    what = "the interval of an AUROC resamples prompts"
    seldom(what, 0.12, misses, SIMULATIONS // 3)


def verify_precision() -> None:
    flagged = np.arange(8) < 3
    positive = np.isin(np.arange(8), (0, 1, 3, 4))
    want = {
        "precision": 2 / 3,
        "recall": 1 / 2,
        "fpr": 1 / 4,
        "f05": 5 / 8,
    }  # 2 hits
    got = metrics.precision_recall_at(flagged, positive)
    swapped = metrics.precision_recall_at(positive, flagged)
    rows = [[*figures.values()] for figures in (got, want, swapped)]
    equal(
        "precision, recall, false-positive rate and F0.5 of an example",
        *rows,
    )
    assert got.keys() == want.keys()


# ── over problems ────────────────────────────────────────────────────────────────────────────────


def counted(hack: float, solve: float) -> Counts:
    """Ten draws a problem, at these rates exactly."""
    return {str(i): [10, round(10 * hack), round(10 * solve)] for i in range(200)}


def clustered(n_problems: int, n_draws: int, shape: tuple[float, float]) -> Counts:
    """Solves of problems whose rates are spread as Beta(shape)."""
    rates = RNG.beta(*shape, n_problems)
    return {str(i): [n_draws, 0, int(RNG.binomial(n_draws, p))] for i, p in enumerate(rates)}


def verify_frontier() -> None:
    points = [
        (0.0, 0.2),
        (0.3, 0.3),
        (0.15, 0.1),
        (0.6, 0.2),
    ]  # the third is under a mixture
    want = {0.0: 0.2, 0.15: 0.25, 0.3: 0.3, 0.5: 0.3, 0.9: 0.3}
    got = metrics.frontier_solve([*want], points)
    joined = np.interp([*want], *np.array(sorted(points)).T)
    what = "the frontier is the upper envelope, flat beyond its best"
    equal(what, got, [*want.values()], joined)
    null = [counted(*p) for p in points]
    policies = [(0.2, 0.4), (0.3, 0.3), (0.5, 0.1)]
    distances = [0.2 - 0.2 / 3, 0.0, -0.2]
    got = [metrics.above_frontier(counted(*p), null)[0] for p in policies]
    above_base = [solve - 0.2 for _, solve in policies]
    what = "the distance to the frontier is taken at the policy's hack rate"
    equal(what, got, distances, above_base)


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
    got = metrics.bootstrap_interval(single, "hack")
    other = metrics.bootstrap_interval(single, "solve")
    equal(
        "one draw a problem gives Wilson's closed form",
        got,
        wilson(30, 100),
        other,
    )
    none = {str(i): [4, 0, 4] for i in range(60)}
    got = metrics.bootstrap_interval(none, "hack")
    what = "no hack in 240 draws of 60 problems is bounded by 60 draws"
    equal(what, got, wilson(0, 60), wilson(0, 240))


def policies(gains: list[float]) -> list[tuple[Counts, ...]]:
    """One (solve, base, ceiling) triple a seed: base 0.2, ceiling 0.6, problems spread around."""
    rates = [(0.2 + 0.4 * gain, 0.2, 0.6) for gain in gains]
    return [tuple(clustered(120, 4, (5 * p, 5 * (1 - p))) for p in triple) for triple in rates]


def verify_gain() -> None:
    assert np.isclose(metrics.gain(0.5, 0.2, 0.6), 0.75)
    learned = metrics.gain_lower_bound(policies([0.9] * 4))
    frozen = metrics.gain_lower_bound(policies([0.0] * 4))
    assert learned > 0.5 > frozen, "the bound passes a frozen policy, or no learner"
    split, pooled = policies([0.1, 0.5, 1.0, 1.4]), ({}, {}, {})
    for seed, triple in enumerate(split):
        for part, counts in zip(pooled, triple):
            part |= {f"{seed}/{name}": row for name, row in counts.items()}
    apart = metrics.gain_lower_bound(split)
    together = metrics.gain_lower_bound([pooled])
    check(
        "seeds that disagree lower the bound",
        apart < 0.55,
        together < 0.55,
    )


# ── over seeds ───────────────────────────────────────────────────────────────────────────────────


def verify_seed_tests() -> None:
    a = np.array([0.3, 0.5, 0.4])
    b = np.array([0.2, 0.45, 0.1])
    paired = stats.ttest_rel(a, b)
    one_sided = paired.confidence_interval(0.8).low
    two_sided = paired.confidence_interval(0.9).low
    bound = metrics.noninferior(a, b)[1]
    equal(
        "the bound of non-inferiority is one-sided at 90 %",
        bound,
        one_sided,
        two_sided,
    )
    below, above = (metrics.noninferior(a, b, bound + shift)[0] for shift in (-1e-3, 1e-3))
    check("non-inferior is a bound above the margin", below, above)
    assert np.allclose(metrics.mean_sem([1.0, 2.0, 3.0]), [2.0, 1 / math.sqrt(3)])
    assert math.isnan(metrics.mean_sem([1.0])[1])


def verify_sign_flip() -> None:
    seeds = [0.1, 0.2, 0.3]  # other signs' sums tie but for their last bits
    by_t = stats.ttest_1samp(seeds, 0.0).pvalue
    least = metrics.sign_flip(seeds, [0.0] * 3)[1]
    equal(
        "n seeds that agree have p = 2 / 2ⁿ, no less",
        least,
        2 / 2**3,
        by_t,
    )
    assert metrics.sign_flip([0.5, 0.5], [0.5, 0.5]) == (0.0, 1.0)


def verify_refusals() -> None:
    """What has no answer is NaN or a ValueError."""
    triple = policies([0.5])[0]
    moved = {f"x{name}": row for name, row in triple[2].items()}
    for call, *arguments in (
        (metrics.auroc, [1.0], [True, False]),
        (metrics.bootstrap_interval, {"a": [2, 3, 0]}, "hack"),
        (metrics.bootstrap_interval, {}, "hack"),
        (metrics.gain_lower_bound, [(*triple[:2], moved)]),
        (metrics.noninferior, [0.1], [0.1]),
    ):
        try:
            call(*arguments)
        except ValueError:
            continue
        raise AssertionError(f"{call.__name__} accepts {arguments}")
    nothing_flagged = metrics.precision_recall_at([False, False], [True, False])
    assert math.isnan(nothing_flagged["precision"])
    assert math.isnan(metrics.auroc([1.0, 2.0], [True, True]))
    print("ok  what has no answer is NaN, and what makes no sense is refused")


if __name__ == "__main__":
    verify_auroc()
    verify_strata()
    verify_precision()
    verify_frontier()
    verify_intervals()
    verify_gain()
    verify_seed_tests()
    verify_sign_flip()
    verify_refusals()
