"""Every row of the table of health fires on its fault and on nothing else, and stops or warns."""

from collections.abc import Sequence
from dataclasses import replace

from scripts.verify.stored import captured
from scripts.verify.tiny import tiny_policy

from vgrout.core import EvalResult
from vgrout.env.rollouts import Sampling
from vgrout.run import health
from vgrout.run.health import (
    CHECKS,
    FINITE,
    PATIENCE,
    WINDOW,
    Check,
    Diverged,
    Health,
    History,
)

Row = dict[str, float | None]
STEPS = 16
EVERY = 5  # steps between refreshes
BASE = -0.5  # reference log-prob of the base
ROW: Row = {
    "n_students": 44,
    "n_teachers": 4,
    "rows_retain": 20,
    "rows_absorb": 12,
    "rows_route": 8,
    "loss": 0.1,
    "kl": 0.03,
    "logp_mean": -0.25,
    "reference_logp": BASE,
    "grad_norm_deployed": 0.1,
    "grad_norm_quarantine": 0.1,
    "sampler_mismatch": 1e-6,
    "timeout_share": 0.0,
    "truncated_share": 0.0,
}
REFRESH: Row = {"gate_lower": 0.1, "gate_upper": 0.2, "gate_collapsed": 0.0, "direction_drift": 0.9}


def cell(step: int, solve: int, state: str = "deployed") -> EvalResult:
    return EvalResult("test" if step == 0 else "val", "novel", state, step, 100, 0, solve, {}, {})


CELLS = [cell(0, 20), cell(10, 15), cell(20, 6)]


def history(
    late: Row | None = None, cells: Sequence[EvalResult] = CELLS, n: int = WINDOW
) -> History:
    """A run whose last `n` rows are changed."""
    rows = [ROW | {"step": i} | (REFRESH if i % EVERY == 0 else {}) for i in range(STEPS)]
    rows[-n:] = [row | (late or {}) for row in rows[-n:]]
    return History(rows, cells, base_logp=BASE, max_grad_norm=0.1)


LIMITS = {  # row of the table → the figure that it reads, short of the limit and beyond it
    "KL": ("kl", 9.0, 11.0),
    "fall of the reference log-prob": ("reference_logp", BASE - 2.9, BASE - 3.1),
    "deployed gradient norm": ("grad_norm_deployed", 2.9, 3.1),
    "quarantine gradient norm": ("grad_norm_quarantine", 2.9, 3.1),
    "no variance in groups": ("rows_route", -20, -24),
    "gate collapsed": ("gate_collapsed", 0.0, 1.0),
    "direction reversed": ("direction_drift", 0.1, -0.1),
    "log-probs falling": ("logp_mean", -0.7, -0.8),
    "KL runs away": ("kl", 0.9, 2.5),
    "sampler and learner differ": ("sampler_mismatch", 0.04, 0.06),
    "judge fails": ("judge_failures", 15, 25),
    "completions time out": ("timeout_share", 0.1, 0.3),
    "completions cut off": ("truncated_share", 0.1, 0.3),
}
BRIEF = 2  # rows: a stopping limit is broken at once, and no median moves
STOPS = {check.what for check in CHECKS if check.stops}
FAULTS = {
    what: [history({key: value}, n=BRIEF if what in STOPS else WINDOW) for value in values]
    for what, (key, *values) in LIMITS.items()
} | {
    "DEAD POLICY?": [
        history(cells=[cell(10, 0), cell(20, 0, "as_trained")]),
        history(cells=[cell(10, 0), cell(20, 0)]),
    ],
    "solve dead at deployment": [history(cells=[cell(0, 20), cell(20, n)]) for n in (6, 4)],
}
HEALTHY = {
    "a healthy run": history(),
    "a run that begins": History(),
    "one odd step": history({"sampler_mismatch": 9.0, "timeout_share": 1.0}, n=1),
    "values that do not exist": history({"kl": None, "logp_mean": float("nan")}),
    "a base that solves nothing": history(cells=[cell(0, 0), cell(20, 1)]),
}
GIVEN = HEALTHY | {
    f"{side} {what}": given
    for what, pair in FAULTS.items()
    for side, given in zip(("short of", "beyond"), pair)
}


def fires_alone(check: Check) -> bool:
    """Does a row fire beyond its own limit, and nowhere else?"""
    fired = [name for name, given in GIVEN.items() if check.breach(given) is not None]
    return fired == [f"beyond {check.what}"]


def falling_kl() -> History:
    """A KL above its limit for warnings that comes down again."""
    given = history({"kl": 2.5})
    for row in given.rows[-2 * WINDOW : -WINDOW]:
        row["kl"] = 4.0
    return given


POLICY = tiny_policy()  # has no problem here: the rows bring their reference log-probs
health.reference_batch = lambda *arguments: None
Health.reference_logp = lambda self, policy: BASE


# ── in a run ─────────────────────────────────────────────────────────────────────────────────────


def judged(given: History, before: int = 0) -> tuple[int | None, list[str]]:
    """(step of the stop, lines printed) of a run that is resumed behind its first `before` rows."""
    rows = given.rows
    live = Health(POLICY, [], Sampling(8, 1.0, 1.0, 512), replace(given, rows=rows[:before]))
    stops: list[int] = []

    def go() -> None:
        for row in rows[before:]:
            try:
                live(row)
            except Diverged as error:
                assert f"step {row['step']}: " in str(error) and "\n" not in str(error), error
                return stops.append(row["step"])

    said = captured(go)
    return (stops or [None])[0], said.splitlines()


def check_stop(key: str, value: float) -> None:
    lasting, brief = (history({key: value}, n=PATIENCE - i) for i in (0, 1))
    stops = [judged(lasting, before)[0] for before in (0, STEPS - 2)]
    assert stops == [STEPS - 1] * 2, f"{key}: stops at {stops}"
    assert judged(brief)[0] is None, f"{key}: stops too early"


def main() -> None:
    assert {check.what for check in CHECKS} == FAULTS.keys(), "a row without its fault"
    for check in CHECKS:
        assert fires_alone(check), f"{check.what} does not fire beyond its limit, or elsewhere too"
        mutant = replace(check, limit=2 * check.limit + 1)
        assert not fires_alone(mutant), f"another limit of {check.what} goes unnoticed"
    assert not any(check.breach(falling_kl()) for check in CHECKS), "a falling KL warns"
    print(f"ok  {len(CHECKS)} rows: each fires beyond its limit alone, and never on a healthy run")
    for what in STOPS:
        key, _, value = LIMITS[what]
        check_stop(key, value)
    for what in FAULTS.keys() - STOPS:
        stop, lines = judged(FAULTS[what][1])
        named = [line for line in lines if line.startswith(f"WARNING {what}: ")]
        assert stop is None and len(named) == 1 and "; " in named[0], f"{what}: {lines}"
    silent = [key for key in FINITE if judged(history({key: float("nan")}, n=1))[0] != STEPS - 1]
    assert not silent, f"not finite, and it goes on: {silent}"
    print(f"ok  what stops a run lasts {PATIENCE} steps, resumed or not; a warning is printed once")


if __name__ == "__main__":
    main()
