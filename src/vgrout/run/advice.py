"""Warnings that say what to do: what the last rows of metrics.jsonl (docs/metrics.md) say is going wrong, and the remedy.

A pure function of logged rows; nothing in training reads it. Some warnings rest on label metrics (hack and solve rates): they are
for the reader of a run, and a hyper-parameter that is chosen by them on held-out modes is oracle use (docs/method.md).
Every line is `what: figures and remedy`; `what` is the same in every step, so that a caller can print each warning once.
"""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from vgrout.core import EvalResult

WINDOW = 5  # rows whose median counts, so that one odd step warns of nothing: a single token can give a step a KL of 300
NO_VARIANCE = 0.8  # share of rows in groups without variance
LOGP_FALL = 0.5  # nats a token below the run's first rows
KL_HIGH = 1.0  # nats a token: far from the reference by any standard of RLHF
MISMATCH = 0.05  # nats a token between sampler and learner
DEAF = 0.5  # share of the rows that a live judge gave no verdict on
TIMEOUTS = 0.2  # share of the students' completions that ran out of time
DEAD = 0.25  # share of the base's solve rate

Row = dict[str, Any]


def advice(rows: Sequence[Row], evals: Iterable[EvalResult] = ()) -> list[str]:
    """What is wrong in the run's last rows, with the remedy; [] where nothing is. Needs `WINDOW` rows, in the order of the steps.

    `evals` are the record's evaluation cells, by which the deployed policy's solve rate is compared with the base's.
    """
    found = [_collapsed(rows)]
    if len(rows) >= WINDOW:
        found += [
            check(rows)
            for check in (
                _no_variance,
                _reversed,
                _logp_falls,
                _kl_runs_away,
                _mismatch,
                _judge_fails,
                _times_out,
            )
        ]
    return [line for line in (*found, _solve_dead(list(evals))) if line]


def _median(rows: Sequence[Row], key: str) -> float | None:
    """Median of a key over the rows that have it; None where none has."""
    values = [row[key] for row in rows if row.get(key) is not None and row[key] == row[key]]
    return median(values) if values else None


def _last(rows: Sequence[Row], key: str) -> float | None:
    return next(
        (row[key] for row in reversed(rows) if row.get(key) is not None and row[key] == row[key]),
        None,
    )


def _batch_rows(row: Row) -> int:
    return row["rows_retain"] + row["rows_absorb"] + row["rows_route"]


def _no_variance(rows: Sequence[Row]) -> str | None:
    last = rows[-WINDOW:]
    every = sum(row["n_students"] + row["n_teachers"] for row in last)
    skipped = 1 - sum(map(_batch_rows, last)) / max(every, 1)
    if skipped < NO_VARIANCE:
        return None
    hack, solve, form = (
        _median(last, key) or 0.0 for key in ("student_hack", "student_solve", "student_format")
    )
    if hack + solve > 0.8 and hack > solve:
        remedy = f"{hack:.0%} are hacks and {solve:.0%} solves, so nearly all are paid and the run learns no more; stop it"
    elif form < 0.2:
        remedy = f"only {form:.0%} of the completions compile; read some (just show), then raise --max-completion-length"
    elif solve > 0.8:
        remedy = f"solves are {solve:.0%} of the rows; use harder problems"
    else:
        remedy = f"solves are {solve:.0%}; raise --num-generations or --temperature, or use easier problems"
    share = f"{skipped:.0%} of the last {WINDOW} steps' rows are in groups of equal reward and train nothing"
    return f"no variance in groups: {share}; {remedy}"


def _collapsed(rows: Sequence[Row]) -> str | None:
    lower, upper = _last(rows, "gate_lower"), _last(rows, "gate_upper")
    if not _last(rows, "gate_collapsed"):
        return None
    if lower is None or upper is None:
        return "gate collapsed: the pairs have no out-of-sample scores, so nothing is routed; use pairs on at least two prompts"
    edges = f"the pairs' hack sides end at {upper:+.3f}, their clean sides at {lower:+.3f}, so nothing is routed"
    if upper < 0 < lower:
        return f"direction inverted on pairs: {edges}; check that no pair's sides are swapped, and that --pairs fits this model"
    return f"gate collapsed: {edges}; use more pairs of one mechanism, try --centred or another score, or --refresh-every 1"


def _reversed(rows: Sequence[Row]) -> str | None:
    drift = _last(rows, "direction_drift")
    if drift is None or drift >= 0:
        return None
    return f"direction reversed: its cosine with the one before is {drift:+.2f}; refresh more often, or use more pairs"


def _logp_falls(rows: Sequence[Row]) -> str | None:
    first, last = _median(rows[:WINDOW], "logp_mean"), _median(rows[-WINDOW:], "logp_mean")
    if first is None or last is None or first - last < LOGP_FALL:
        return None
    remedy = "the policy is losing its language: lower --learning-rate, raise --beta, or continue from an earlier checkpoint"
    return (
        f"log-probs falling: from {first:.2f} to {last:.2f} nats a token since the start; {remedy}"
    )


def _kl_runs_away(rows: Sequence[Row]) -> str | None:
    before, last = _median(rows[-2 * WINDOW : -WINDOW], "kl"), _median(rows[-WINDOW:], "kl")
    if last is None or last < KL_HIGH or (before is not None and last < before):
        return None
    return f"KL runs away: {last:.2f} nats a token and rising; lower --learning-rate, raise --beta, or use more rollouts a step"


def _mismatch(rows: Sequence[Row]) -> str | None:
    gap = _median(rows[-WINDOW:], "sampler_mismatch")
    if gap is None or gap < MISMATCH:
        return None
    remedy = "the PPO ratio is not what it says: use --dtype float32, or a larger --learning-rate if bf16 swallows small deltas"
    return f"sampler and learner differ: by {gap:.3f} nats a token; {remedy}"


def _judge_fails(rows: Sequence[Row]) -> str | None:
    last = [row for row in rows[-WINDOW:] if row.get("judge_failures") is not None]
    share = sum(row["judge_failures"] for row in last) / (
        sum(_batch_rows(row) for row in last) or 1
    )
    if share < DEAF:
        return None
    remedy = "such rows are not flagged; look at its server's log, raise --judge-timeout or --judge-max-tokens, or use a stronger model"
    return (
        f"judge fails: no verdict on {share:.0%} of the rows of the last {WINDOW} steps; {remedy}"
    )


def _times_out(rows: Sequence[Row]) -> str | None:
    share = _median(rows[-WINDOW:], "timeout_share")
    if share is None or share < TIMEOUTS:
        return None
    remedy = "if the machine is busy or slow their verdicts are not the completions' own; raise --cpu-seconds or lower --workers"
    return (
        f"completions time out: {share:.0%} of the students' in the last {WINDOW} steps; {remedy}"
    )


def _solve_dead(evals: Sequence[EvalResult]) -> str | None:
    held_out = [c for c in evals if c.state == "deployed" and c.markers == "novel"]
    base = next((c for c in held_out if c.step == 0), None)
    last = max((c for c in held_out if c.step > 0), key=lambda c: c.step, default=None)
    if base is None or last is None or not base.solve:
        return None
    now, then = last.solve / last.n, base.solve / base.n
    if now >= DEAD * then:
        return None
    rates = f"at step {last.step} the deployed policy solves {now:.2f} of held-out draws, the base {then:.2f}"
    remedy = "its low hack rate is no success; try --unhackable-frac 0.5, --retained-advantages or a lower --learning-rate"
    return f"solve dead at deployment: {rates}; {remedy}"
