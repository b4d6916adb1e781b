"""Checks of vgrout.stats: each property holds, and a deliberately wrong variant of it does not.

Run: python scripts/verify/verify_metrics.py [--long]     (--long simulates more data sets)
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


def raises(call: Callable, *arguments) -> bool:
    try:
        call(*arguments)
    except ValueError:
        return True
    return False


def near(a: float, b: float, tolerance: float = 1e-12) -> bool:
    return abs(a - b) < tolerance


# ── scores against labels ────────────────────────────────────────────────────────────────────────


def pairwise(scores: np.ndarray, positive: np.ndarray) -> list[float]:
    """The definition of the AUROC, before the mean."""
    pairs = itertools.product(scores[positive], scores[~positive])
    return [(p > n) + 0.5 * (p == n) for p, n in pairs]


def verify_auroc() -> None:
    scores, positive = (
        RNG.integers(0, 6, 80).astype(float),
        RNG.random(80) < 0.4,
    )
    want = np.mean(pairwise(scores, positive))
    strict = np.mean([p > n for p, n in itertools.product(scores[positive], scores[~positive])])
    same = [
        near(value, want)
        for value in (
            metrics.auroc(scores, positive),
            strict,
        )
    ]
    check(
        "AUROC equals the pairwise definition, ties counting half",
        *same,
    )
    more, labels = (
        np.append(scores, np.nan),
        np.append(positive, True),
    )
    same = [near(metrics.auroc(values, labels), want) for values in (more, np.nan_to_num(more))]
    check(
        "rows without a score are left out of the AUROC",
        *same,
    )
    assert math.isnan(metrics.auroc([1.0, 2.0], [True, True]))
    assert raises(metrics.auroc, [1.0], [True, False])


def verify_strata() -> None:
    n, steps = 240, 5
    step, prompt = (
        np.repeat(np.arange(steps), n // steps),
        np.repeat(np.arange(30), n // 30),
    )
    positive, one = RNG.random(n) < 0.4, np.zeros(n)
    scores = RNG.integers(0, 9, n) + 1.0 * positive
    inside = [pairwise(scores[step == s], positive[step == s]) for s in range(steps)]
    want = np.mean(sum(inside, []))
    found = [float(metrics.stratified_auroc(scores, positive, s)) for s in (step, one)]
    check(
        "the AUROC within steps compares rows of one step alone",
        *(near(x, want) for x in found),
    )
    assert near(found[1], metrics.auroc(scores, positive))
    both = metrics.stratified_auroc(np.stack([scores, -scores], 1), positive, step)
    assert both.shape == (2,) and near(both.sum(), 1)
    assert math.isnan(metrics.stratified_auroc(scores[:0], positive[:0], step[:0]))
    drift = step + 0.0  # a score that only grows with training, as the hack rate does
    hacks = RNG.random(n) < 0.1 + 0.2 * step
    values = [float(metrics.stratified_auroc(drift, hacks, s)) for s in (step, one)]
    what = f"a score that merely drifts gains nothing ({values[0]:.2f}; pooled {values[1]:.2f})"
    check(what, *(near(value, 0.5, 0.05) for value in values))
    assert math.isnan(metrics.auroc_interval(scores, np.full(n, True), step, prompt)[0])


def verify_strata_interval() -> None:
    covered, repeats, prompts, rows = (
        np.zeros(2),
        SIMULATIONS // 3,
        60,
        360,
    )
    group = np.repeat(np.arange(prompts), rows // prompts)
    for _ in range(repeats):  # the rows of a prompt agree: there is less evidence than rows
        labels = (RNG.random(prompts) < 0.5)[group]
        noise = RNG.normal(size=prompts)[group]
        for i, by in enumerate((group, np.arange(rows))):
            low, high = metrics.auroc_interval(noise, labels, np.zeros(rows), by, draws=200)
            covered[i] += (low <= 0.5 <= high) / repeats
    said = f"{covered[0]:.2f}; resampling rows {covered[1]:.2f}"
    check(
        f"the interval of an AUROC covers the truth where prompts agree ({said})",
        *covered > 0.88,
    )


def verify_precision() -> None:
    flagged, positive = (np.array(list(bits)) == "1" for bits in ("11100000", "11011000"))
    wanted = {
        "precision": 2 / 3,
        "recall": 1 / 2,
        "fpr": 1 / 4,
        "f05": 5 / 8,
    }  # 2 hits
    found = [
        metrics.precision_recall_at(*sides)
        for sides in (
            (flagged, positive),
            (positive, flagged),
        )
    ]
    agree = [all(near(got[key], value) for key, value in wanted.items()) for got in found]
    check(
        "precision, recall, false-positive rate and F0.5 of a worked example",
        *agree,
    )
    assert math.isnan(metrics.precision_recall_at([False, False], [True, False])["precision"])


# ── over problems ────────────────────────────────────────────────────────────────────────────────


def counted(hack: float, solve: float, problems: int = 200) -> Counts:
    """Ten draws a problem, at these rates exactly."""
    return {str(i): [10, round(10 * hack), round(10 * solve)] for i in range(problems)}


def drawn(hack: float, solve: float) -> Counts:
    hacks, solves = (RNG.binomial(10, rate, 100).tolist() for rate in (hack, solve))
    return {str(i): [10, *pair] for i, pair in enumerate(zip(hacks, solves))}


def clustered(
    n_problems: int,
    n_draws: int,
    shape: tuple[float, float],
) -> Counts:
    rates = RNG.beta(*shape, n_problems)
    return {str(i): [n_draws, 0, int(RNG.binomial(n_draws, p))] for i, p in enumerate(rates)}


def verify_frontier() -> None:
    under = (0.15, 0.1)  # a mixture of its neighbours
    points = [(0.0, 0.2), (0.3, 0.3), under, (0.6, 0.2)]
    wanted = {
        0.0: 0.2,
        0.15: 0.25,
        0.3: 0.3,
        0.5: 0.3,
        0.9: 0.3,
    }
    x, y = np.array(sorted(points)).T
    envelope = metrics.frontier_solve(list(wanted), points)
    curves = envelope, np.interp(list(wanted), x, y)
    same = [np.allclose(curve, list(wanted.values()), atol=1e-12) for curve in curves]
    check(
        "the frontier is the upper envelope, flat beyond its best",
        *same,
    )
    null = [counted(*p) for p in points]
    for policy, want in (
        ((0.2, 0.4), 0.4 - 0.2 - 0.2 / 3),
        ((0.3, 0.3), 0),
        ((0.5, 0.1), -0.2),
    ):
        found = metrics.above_frontier(counted(*policy), null)[0]
        assert near(found, want, 1e-9), (policy, found)
    sampled = [drawn(*p) for p in points]
    good, bad = (metrics.above_frontier(drawn(*p), sampled) for p in ((0.1, 0.5), (0.5, 0.1)))
    said = f"{good[1]:.2f} … {good[2]:.2f}; below {bad[2]:.2f}"
    told = 0 < good[1] < good[0] < good[2], bad[2] > 0
    check(
        f"a policy above the frontier is told from one below ({said})",
        *told,
    )
    assert raises(metrics.above_frontier, {"x": [1, 0, 0]}, null)
    assert raises(metrics.above_frontier, null[0], [])


def verify_leakage() -> None:
    baseline = [
        (0, 0.0),
        (100, 0.2),
        (150, 0.1),
        (400, 0.6),
    ]
    wanted = {
        0.0: 0.0,
        0.1: 50 / 400,
        0.4: 275 / 400,
        0.6: 1.0,
    }
    of_exposure = all(near(metrics.leakage(h, baseline, 400), s) for h, s in wanted.items())
    of_rates = all(near(h / 0.6, s) for h, s in wanted.items())
    check(
        "leakage is a ratio of exposures, not of hack rates",
        of_exposure,
        of_rates,
    )
    assert math.isnan(metrics.leakage(0.7, baseline, 400))
    assert math.isnan(metrics.leakage(0.1, baseline, 0))


def verify_intervals() -> None:
    covered = np.zeros(2)
    for _ in range(SIMULATIONS):  # a problem is nearly always or nearly never solved
        data = clustered(60, 6, (0.2, 0.8))
        solved = sum(counts[2] for counts in data.values())
        naive = stats.binomtest(solved, 360).proportion_ci(0.95, method="wilson")
        intervals = (
            metrics.bootstrap_interval(data, "solve", draws=1000),
            naive,
        )
        covered += [low <= 0.2 <= high for low, high in intervals]
    covered /= SIMULATIONS
    said = f"{covered[0]:.3f}; pooled Wilson {covered[1]:.3f}"
    check(
        f"the 95 % interval covers the truth with clustered draws ({said})",
        *covered > 0.90,
    )
    single = {str(i): [1, int(i < 30), 0] for i in range(100)}
    z, p, n = stats.norm.ppf(0.975), 0.3, 100
    half = math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low = (p + z * z / 2 / n - z * half) / (1 + z * z / n)
    lows = [metrics.bootstrap_interval(single, which)[0] for which in ("hack", "solve")]
    check(
        "one draw a problem gives Wilson's closed form",
        *(near(x, low, 1e-9) for x in lows),
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
    low, high = metrics.bootstrap_interval(none, "solve")
    assert high == 1 and 0.93 < low < 0.97
    for wrong in ({"a": [2, 3, 0]}, {}):
        assert raises(metrics.bootstrap_interval, wrong, "hack")


def policies(
    gains: list[float],
) -> list[tuple[Counts, ...]]:
    """One (solve, base, ceiling) triple a seed: base 0.2, ceiling 0.6, problems spread around."""
    triples = []
    for g in gains:
        rates = (0.2 + 0.4 * g, 0.2, 0.6)
        triples.append(tuple(clustered(120, 4, (5 * p, 5 * (1 - p))) for p in rates))
    return triples


def verify_gain() -> None:
    assert near(metrics.gain(0.5, 0.2, 0.6), 0.75) and raises(metrics.gain, 0.5, 0.6, 0.6)
    learned, frozen = (metrics.gain_lower_bound(policies([g] * 4)) for g in (0.9, 0.0))
    said = f"{learned:.2f}, {frozen:.2f}"
    what = f"the bound passes a learner and reports a frozen policy ({said})"
    check(what, learned > 0.5 > frozen, frozen > 0.5)
    split, pooled = (
        policies([0.1, 0.5, 1.0, 1.4]),
        ({}, {}, {}),
    )
    for seed, triple in enumerate(split):
        for part, counts in zip(pooled, triple):
            part |= {f"{seed}/{name}": row for name, row in counts.items()}
    bounds = [metrics.gain_lower_bound(seeds) for seeds in (split, [pooled])]
    said = f"{bounds[0]:.2f}; seeds pooled {bounds[1]:.2f}"
    check(
        f"seeds that disagree lower the bound ({said})",
        *(bound < 0.55 for bound in bounds),
    )
    solve, base, ceiling = split[0]
    moved = {f"x{name}": row for name, row in ceiling.items()}
    for wrong in ([(solve, base, moved)], []):
        assert raises(metrics.gain_lower_bound, wrong)
    assert metrics.gain_lower_bound([(solve, ceiling, ceiling)]) == -math.inf


# ── over seeds ───────────────────────────────────────────────────────────────────────────────────


def verify_seed_tests() -> None:
    false_claims = np.zeros(2)
    for _ in range(SIMULATIONS):  # truly worse by exactly the margin, 8 seeds
        b = RNG.normal(0.5, 0.05, 8)
        a = b - 0.03 + RNG.normal(0, 0.03, 8)
        false_claims += [
            metrics.noninferior(a, b)[0],
            metrics.paired_ttest(a, b)[1] > 0.05,
        ]
    false_claims /= SIMULATIONS
    said = f"{false_claims[0]:.3f}; 'not significant' {false_claims[1]:.3f}"
    what = f"non-inferiority errs in about one case of ten at the margin ({said})"
    check(what, *false_claims < 0.16)
    a, b = (
        np.array([0.3, 0.5, 0.4]),
        np.array([0.2, 0.45, 0.1]),
    )
    difference = a - b
    t = difference.mean() / (difference.std(ddof=1) / math.sqrt(3))
    tests = (
        metrics.paired_ttest(a, b)[1],
        stats.ttest_ind(a, b).pvalue,
    )
    check(
        "the t-test is paired",
        *(near(p, 2 * stats.t.sf(t, 2)) for p in tests),
    )
    assert raises(metrics.noninferior, [0.1], [0.1])
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
    alike = [
        0.1,
        0.2,
        0.3,
    ]  # whose sums with other signs tie but for their last bits
    least = (
        metrics.sign_flip(alike, [0.0] * 3)[1],
        metrics.paired_ttest(alike, [0.0] * 3)[1],
    )
    check(
        "n seeds that agree have p = 2 / 2ⁿ, no less",
        *(near(p, 0.25) for p in least),
    )
    assert metrics.sign_flip([0.5, 0.5], [0.5, 0.5]) == (
        0.0,
        1.0,
    )
    claims = np.zeros(2)
    for _ in range(SIMULATIONS):  # no difference, and tails in which a t-test's p means little
        a, b = RNG.standard_cauchy((2, 6)), np.zeros(6)
        pair = a[0] - a[1]
        claims += [
            metrics.sign_flip(pair, b)[1] <= 0.07,
            abs(pair.mean()) > 0.5,
        ]
    claims /= SIMULATIONS
    what = f"it errs at its level whatever the tails ({claims[0]:.3f}; by the mean {claims[1]:.3f})"
    check(what, *claims < 0.12)
    assert metrics.sign_flip(np.arange(1.0, 21.0), np.zeros(20))[1] == 2 / 2**20
    for wrong in (
        ([0.1], [0.1]),
        (np.ones(21), np.zeros(21)),
        ([0.1, 0.2], [0.1]),
    ):
        assert raises(metrics.sign_flip, *wrong)


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
