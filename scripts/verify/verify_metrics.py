"""Checks of vgrout.stats: each property holds, and a deliberately wrong variant of it does not.

Run: python scripts/verify/verify_metrics.py [--long]     (--long simulates more data sets)
"""

import math
import sys

import numpy as np
from scipy import stats

from vgrout import stats as metrics

RNG = np.random.default_rng(0)
SIMULATIONS = 2000 if "--long" in sys.argv else 300


def check(what: str, holds: bool, mutant_holds: bool) -> None:
    assert holds, f"broken: {what}"
    assert not mutant_holds, f"the check cannot fail: {what}"
    print(f"ok  {what}")


def raises(call, *arguments) -> bool:
    try:
        call(*arguments)
    except ValueError:
        return True
    return False


def verify_auroc() -> None:
    scores, positive = RNG.integers(0, 6, 80).astype(float), RNG.random(80) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    mutant = stats.rankdata(scores, method="min")[positive].sum()
    n_pos, n_neg = positive.sum(), (~positive).sum()
    mutant = (mutant - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)
    same = [
        abs(value - np.mean(pairs)) < 1e-12 for value in (metrics.auroc(scores, positive), mutant)
    ]
    check("AUROC equals the pairwise definition, ties counting half", *same)
    with_nan = np.append(scores, np.nan), np.append(positive, True)
    kept = metrics.auroc(*with_nan) == metrics.auroc(scores, positive)
    as_zero = metrics.auroc(np.nan_to_num(with_nan[0]), with_nan[1]) == metrics.auroc(
        scores, positive
    )
    check("rows without a score are left out of the AUROC", kept, as_zero)
    assert math.isnan(metrics.auroc([1.0, 2.0], [True, True])) and raises(
        metrics.auroc, [1.0], [True, False]
    )


def verify_strata() -> None:
    n = 240
    step, prompt, positive = (
        np.repeat(np.arange(5), n // 5),
        np.repeat(np.arange(30), n // 30),
        RNG.random(n) < 0.4,
    )
    scores = RNG.integers(0, 9, n) + 1.0 * positive
    sides = [(scores[positive & (step == s)], scores[~positive & (step == s)]) for s in range(5)]
    inside = [(p > q) + 0.5 * (p == q) for hits, misses in sides for p in hits for q in misses]
    one = np.zeros(n)
    same = [
        abs(float(metrics.stratified_auroc(scores, positive, s)) - np.mean(inside)) < 1e-12
        for s in (step, one)
    ]
    check("the AUROC within steps compares rows of one step alone", *same)
    assert (
        abs(
            float(metrics.stratified_auroc(scores, positive, one)) - metrics.auroc(scores, positive)
        )
        < 1e-12
    )
    both = metrics.stratified_auroc(np.stack([scores, -scores], 1), positive, step)
    assert (
        both.shape == (2,)
        and abs(both.sum() - 1) < 1e-12
        and math.isnan(metrics.stratified_auroc(scores[:0], positive[:0], step[:0]))
    )
    drift = step + 0.0  # a score that only grows with training, as the hack rate does
    hacks = RNG.random(n) < 0.1 + 0.2 * step
    within, pooled = (
        float(metrics.stratified_auroc(drift, hacks, step)),
        metrics.auroc(drift, hacks),
    )
    what = f"a score that merely drifts gains nothing ({within:.2f}; pooled {pooled:.2f})"
    check(what, abs(within - 0.5) < 0.05, abs(pooled - 0.5) < 0.05)
    covered = np.zeros(2)
    for _ in range(
        SIMULATIONS // 3
    ):  # the rows of a prompt agree in label and score, so that there is less evidence than rows
        labels, noise = np.repeat(RNG.random(60) < 0.5, 6), np.repeat(RNG.normal(size=60), 6)
        group = np.repeat(np.arange(60), 6)
        for i, by in enumerate((group, np.arange(360))):
            low, high = metrics.auroc_interval(noise, labels, np.zeros(360), by, draws=200)
            covered[i] += low <= 0.5 <= high
    covered /= SIMULATIONS // 3
    what = f"the interval of an AUROC covers the truth with rows that agree by prompt ({covered[0]:.2f}; resampling rows {covered[1]:.2f})"
    check(what, *(covered > 0.88))
    assert math.isnan(metrics.auroc_interval(scores, np.full(n, True), step, prompt)[0])


def counted(hack: float, solve: float, problems: int = 200) -> dict[str, list[int]]:
    """Ten draws a problem, at these rates exactly."""
    return {str(i): [10, round(10 * hack), round(10 * solve)] for i in range(problems)}


def verify_frontier() -> None:
    points = [
        (0.0, 0.2),
        (0.3, 0.3),
        (0.15, 0.1),
        (0.6, 0.2),
    ]  # the third lies under a mixture of the first two
    wanted = {0.0: 0.2, 0.15: 0.25, 0.3: 0.3, 0.5: 0.3, 0.9: 0.3}
    x, y = np.array(sorted(points)).T
    right = all(
        abs(float(metrics.frontier_solve(h, points)) - s) < 1e-12 for h, s in wanted.items()
    )
    by_neighbours = all(abs(np.interp(h, x, y) - s) < 1e-12 for h, s in wanted.items())
    check("the frontier is the upper envelope, flat beyond its best", right, by_neighbours)
    null = [counted(*p) for p in points]
    above, on, below = (
        metrics.above_frontier(counted(*p), null)[0] for p in ((0.2, 0.4), (0.3, 0.3), (0.5, 0.1))
    )
    assert (
        abs(above - (0.4 - 0.2 - 0.1 * 2 / 3)) < 1e-9
        and abs(on) < 1e-12
        and abs(below + 0.2) < 1e-12
    ), (above, on, below)
    spread = lambda h, s: {
        str(i): [10, int(RNG.binomial(10, h)), int(RNG.binomial(10, s))] for i in range(100)
    }
    good, bad = (
        metrics.above_frontier(spread(*p), [spread(*q) for q in points])
        for p in ((0.1, 0.5), (0.5, 0.1))
    )
    what = f"a policy above the frontier is told from one below ({good[1]:.2f} … {good[2]:.2f}; below {bad[2]:.2f})"
    check(what, 0 < good[1] < good[0] < good[2], bad[2] > 0)
    assert raises(metrics.above_frontier, {"x": [1, 0, 0]}, null) and raises(
        metrics.above_frontier, null[0], []
    )
    baseline = [(0, 0.0), (100, 0.2), (150, 0.1), (400, 0.6)]
    found = [metrics.leakage(h, baseline, 400) for h in (0.0, 0.1, 0.4, 0.6)]
    rate_ratio = [h / 0.6 for h in (0.0, 0.1, 0.4, 0.6)]
    exposure = [0.0, 50 / 400, 275 / 400, 1.0]
    check("leakage is the exposure that explains a hack rate over the exposure that was had, not a ratio of rates",
          np.allclose(found, exposure), np.allclose(rate_ratio, exposure))  # fmt: skip
    assert math.isnan(metrics.leakage(0.7, baseline, 400)) and math.isnan(
        metrics.leakage(0.1, baseline, 0)
    )


def verify_precision() -> None:
    flagged, positive = (
        np.array([1, 1, 1, 0, 0, 0, 0, 0]),
        np.array([1, 1, 0, 1, 1, 0, 0, 0]),
    )  # 2 hits
    wanted = {
        "precision": 2 / 3,
        "recall": 0.5,
        "fpr": 0.25,
        "f05": 1.25 * (2 / 3) * 0.5 / (0.25 * (2 / 3) + 0.5),
    }
    both = (
        metrics.precision_recall_at(flagged, positive),
        metrics.precision_recall_at(positive, flagged),
    )
    agree = [all(abs(got[k] - v) < 1e-12 for k, v in wanted.items()) for got in both]
    check("precision, recall, false-positive rate and F0.5 of a worked example", *agree)
    assert math.isnan(metrics.precision_recall_at([False, False], [True, False])["precision"])


def clustered(n_problems: int, n_draws: int, shape: tuple[float, float]) -> dict[str, list[int]]:
    rates = RNG.beta(*shape, n_problems)
    return {str(i): [n_draws, 0, int(RNG.binomial(n_draws, p))] for i, p in enumerate(rates)}


def verify_intervals() -> None:
    covered = np.zeros(2)
    for _ in range(
        SIMULATIONS
    ):  # a problem is nearly always or nearly never solved: draws of one problem agree
        data = clustered(60, 6, (0.2, 0.8))
        solved = sum(v[2] for v in data.values())
        naive = stats.binomtest(solved, 360).proportion_ci(0.95, method="wilson")
        intervals = metrics.bootstrap_interval(data, "solve", draws=1000), (naive.low, naive.high)
        covered += [low <= 0.2 <= high for low, high in intervals]
    covered /= SIMULATIONS
    check(
        f"the 95 % interval covers the truth with clustered draws ({covered[0]:.3f}; pooled Wilson {covered[1]:.3f})",
        *(covered > 0.90),
    )
    single = {str(i): [1, int(i < 30), 0] for i in range(100)}
    z, p, n = stats.norm.ppf(0.975), 0.3, 100
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low = (p + z * z / 2 / n) / (1 + z * z / n) - half
    matches = [
        abs(metrics.bootstrap_interval(single, which)[0] - low) < 1e-9
        for which in ("hack", "solve")
    ]
    check("one draw a problem gives Wilson's closed form", *matches)
    none = {str(i): [4, 0, 4] for i in range(60)}
    (low, high), (s_low, s_high) = (
        metrics.bootstrap_interval(none, which) for which in ("hack", "solve")
    )
    plain = np.quantile(RNG.multinomial(60, np.full(60, 1 / 60), size=100) @ np.zeros(60), 0.975)
    check(
        "no hack in 240 draws of 60 problems still has an upper bound",
        0.03 < high < 0.07 and low == 0,
        plain > 0.03,
    )
    assert s_high == 1 and 0.93 < s_low < 0.97
    for wrong in ({"a": [2, 3, 0]}, {}):
        assert raises(metrics.bootstrap_interval, wrong, "hack")


def policies(gains: list[float], n_problems: int = 120) -> list[tuple]:
    """Return one (solve, base, ceiling) triple a seed: base 0.2, ceiling 0.6, problems spread around their mean."""
    return [
        tuple(clustered(n_problems, 4, (5 * p, 5 * (1 - p))) for p in (0.2 + 0.4 * g, 0.2, 0.6))
        for g in gains
    ]


def verify_gain() -> None:
    assert abs(metrics.gain(0.5, 0.2, 0.6) - 0.75) < 1e-12 and raises(metrics.gain, 0.5, 0.6, 0.6)
    learned, frozen = (metrics.gain_lower_bound(policies([g] * 4)) for g in (0.9, 0.0))
    check(
        f"the bound passes a learner and reports a frozen policy ({learned:.2f}, {frozen:.2f})",
        learned > 0.5 > frozen,
        frozen > 0.5,
    )
    split = policies([0.1, 0.5, 1.0, 1.4])
    pooled = tuple(
        {f"{s}/{k}": v for s, triple in enumerate(split) for k, v in triple[i].items()}
        for i in range(3)
    )
    bound, ignoring_seeds = metrics.gain_lower_bound(split), metrics.gain_lower_bound([pooled])
    check(
        f"seeds that disagree lower the bound ({bound:.2f}; seeds pooled {ignoring_seeds:.2f})",
        bound < 0.55,
        ignoring_seeds < 0.55,
    )
    moved = [(s, b, {f"x{k}": v for k, v in c.items()}) for s, b, c in split]
    assert raises(metrics.gain_lower_bound, moved) and raises(metrics.gain_lower_bound, [])
    assert metrics.gain_lower_bound([(s, c, c) for s, _, c in split[:1]]) == -math.inf


def verify_seed_tests() -> None:
    false_claims = np.zeros(2)
    for _ in range(SIMULATIONS):  # truly worse by exactly the margin, 8 seeds
        b = RNG.normal(0.5, 0.05, 8)
        a = b - 0.03 + RNG.normal(0, 0.03, 8)
        false_claims += [metrics.noninferior(a, b)[0], metrics.paired_ttest(a, b)[1] > 0.05]
    false_claims /= SIMULATIONS
    check(
        f"non-inferiority errs in about one case of ten at the margin ({false_claims[0]:.3f}; "
        f"'not significant' {false_claims[1]:.3f})",
        *(false_claims < 0.16),
    )
    a, b = np.array([0.3, 0.5, 0.4]), np.array([0.2, 0.45, 0.1])
    t = (a - b).mean() / ((a - b).std(ddof=1) / math.sqrt(3))
    p = 2 * stats.t.sf(t, 2)
    unpaired = stats.ttest_ind(a, b).pvalue
    check(
        "the t-test is paired",
        abs(metrics.paired_ttest(a, b)[1] - p) < 1e-12,
        abs(unpaired - p) < 1e-12,
    )
    assert raises(metrics.noninferior, [0.1], [0.1])
    mean, sem = metrics.mean_sem([1.0, 2.0, 3.0])
    assert (
        mean == 2.0
        and abs(sem - 1 / math.sqrt(3)) < 1e-12
        and math.isnan(metrics.mean_sem([1.0])[1])
    )


if __name__ == "__main__":
    verify_auroc()
    verify_strata()
    verify_frontier()
    verify_precision()
    verify_intervals()
    verify_gain()
    verify_seed_tests()
