"""Is the run healthy? One table of figures with limits and remedies: some warn, some stop the run.

A check is a pure function of the rows logged so far, so that a resumed run judges alike; nothing in
training reads it. Some rest on label metrics: they are for the reader of a run, and a
hyper-parameter that is chosen by them on held-out modes is oracle use (docs/method/monitors.md).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from vgrout.core import EvalResult, Problem, UserError, warn
from vgrout.env.problems import messages
from vgrout.env.rollouts import Sampling
from vgrout.model.batch import Batch
from vgrout.model.likelihood import mean_logps, written
from vgrout.model.lora2r import BLOCKS
from vgrout.model.policy import Policy

WINDOW = 5  # rows whose median counts, so that one odd step warns of nothing
SPIKE_WINDOW = 20  # trained steps that make the median gradient norm; half of them are needed
CLIPS = 10.0  # times max_grad_norm; a gradient norm below that is clipped without harm
PATIENCE = 5  # steps in a row that a breach of a stopping limit must last: k3 has a heavy tail
REFERENCES = 8  # reference solutions whose log-prob is followed
EVERY = slice(None)
FINITE = ("loss", "kl", "logp_mean", "reference_logp", *(f"grad_norm_{b}" for b in BLOCKS))

Row = dict[str, Any]


class Diverged(UserError):
    """A limit ended the run. Its line holds the evidence; the newest checkpoint precedes it."""


@dataclass
class History:
    """What the checks see: rows of metrics.jsonl in order, evaluations, and two constants."""

    rows: list[Row] = field(default_factory=list)
    evals: Sequence[EvalResult] = ()
    base_logp: float = 0.0  # of the reference solutions under the base, nats a token
    max_grad_norm: float = math.inf

    def values(self, key: str, rows: slice = EVERY) -> list[float]:
        """The key's values in some rows, where it has one."""
        found = (row.get(key) for row in self.rows[rows])
        return [x for x in found if x is not None and x == x]

    def window(self) -> list[Row]:
        """The last WINDOW rows; none before there are so many."""
        return self.rows[-WINDOW:] if len(self.rows) >= WINDOW else []

    def recent(self, key: str, back: int = 0) -> float | None:
        """Median over the WINDOW rows that ended `back` rows ago; None before there are any."""
        end = len(self.rows) - back
        return self._median(key, slice(end - WINDOW, end)) if end >= WINDOW else None

    def first(self, key: str) -> float | None:
        return self._median(key, slice(WINDOW)) if self.window() else None

    def _median(self, key: str, rows: slice) -> float | None:
        values = self.values(key, rows)
        return median(values) if values else None

    def deployed(self) -> list[EvalResult]:
        """Evaluations of the deployed policy with novel markers, in order."""
        return [c for c in self.evals if (c.state, c.markers) == ("deployed", "novel")]


Measure = Callable[[History], float | None]


@dataclass(frozen=True)
class Check:
    """One figure: the run is unhealthy where it exceeds `limit`."""

    what: str
    measure: Measure
    limit: float
    unit: str
    remedy: str
    stops: bool = False

    def breach(self, history: History) -> float | None:
        value = self.measure(history)
        return value if value is not None and value > self.limit else None


# ── the figures ──────────────────────────────────────────────────────────────────────────────────


def _now(key: str) -> Measure:
    return lambda history: history.rows[-1].get(key) if history.rows else None


def _median(key: str) -> Measure:
    return lambda history: history.recent(key)


def _last(key: str, sign: int = 1) -> Measure:
    return lambda history: next((sign * x for x in history.values(key)[-1:]), None)


def _reference_fall(history: History) -> float | None:
    now = _now("reference_logp")(history)
    return None if now is None else history.base_logp - now


def _spike(block: str) -> Measure:
    key = f"grad_norm_{block}"

    def measure(history: History) -> float | None:
        norm = _now(key)(history) or 0.0
        before = [x for x in history.values(key, slice(-1)) if x][-SPIKE_WINDOW:]
        judged = len(before) >= SPIKE_WINDOW // 2 and norm > CLIPS * history.max_grad_norm
        return norm / median(before) if judged else None

    return measure


def _no_variance(history: History) -> float | None:
    rows = history.window()
    every = sum(row["n_students"] + row["n_teachers"] for row in rows)
    return 1 - sum(map(batch_rows, rows)) / max(every, 1) if rows else None


def _logp_fall(history: History) -> float | None:
    first, last = history.first("logp_mean"), history.recent("logp_mean")
    return None if first is None or last is None else first - last


def _rising_kl(history: History) -> float | None:
    before, last = history.recent("kl", back=WINDOW), history.recent("kl")
    rising = last is not None and (before is None or last >= before)
    return last if rising else None


def _deaf(history: History) -> float | None:
    rows = [row for row in history.window() if row.get("judge_failures") is not None]
    failures = sum(row["judge_failures"] for row in rows)
    return failures / (sum(map(batch_rows, rows)) or 1) if rows else None


def _unsolved(history: History) -> float | None:
    """How many of the last two evaluations saw the deployed policy solve nothing."""
    return float(sum(not cell.solve for cell in history.deployed()[-2:]))


def _solve_lost(history: History) -> float | None:
    """Share of the base's solve rate that the deployed policy has lost."""
    rates = {cell.step: cell.solve / cell.n for cell in history.deployed()}
    base = rates.pop(0, 0.0)
    return 1 - rates[max(rates)] / base if base and rates else None


def batch_rows(row: Row) -> int:
    return row["rows_retain"] + row["rows_absorb"] + row["rows_route"]


CALMER = "lower --learning-rate or raise --beta"
DEAD = "DEAD POLICY?"
CHECKS = (
    Check("KL", _now("kl"), 10.0, "nats a token", CALMER, stops=True),
    Check("fall of the reference log-prob", _reference_fall, 3.0, "nats", CALMER, stops=True),
    *(Check(f"{b} gradient norm", _spike(b), 30.0, "medians", CALMER, stops=True) for b in BLOCKS),
    Check(
        "no variance in groups",
        _no_variance,
        0.8,
        "of the rows are in groups of equal reward and train nothing",
        "read some completions (just show): if they do not compile raise --max-completion-length, "
        "if few solve --num-generations or --temperature; if nearly all are paid the run is over",
    ),
    Check(
        "gate collapsed",
        _last("gate_collapsed"),
        0.5,
        "(the pairs' hack sides do not end above their clean sides: nothing is routed)",
        "check that no pair's sides are swapped; use more pairs of one mechanism on several "
        "prompts, or another score",
    ),
    Check(
        "direction reversed",
        _last("direction_drift", -1),
        0.0,
        "is minus its cosine with the one before",
        "refresh more often, or use more pairs",
    ),
    Check(
        "log-probs falling",
        _logp_fall,
        0.5,
        "nats a token since the start",
        "the policy is losing its language: " + CALMER,
    ),
    Check("KL runs away", _rising_kl, 1.0, "nats a token and rising", CALMER),
    Check(
        "sampler and learner differ",
        _median("sampler_mismatch"),
        0.05,
        "nats a token",
        "use --dtype float32, or a larger --learning-rate if bf16 swallows small deltas",
    ),
    Check(
        "judge fails",
        _deaf,
        0.5,
        "of the rows have no verdict, and are not flagged",
        "see its server's log, raise --judge-timeout or --judge-max-tokens, or use a stronger one",
    ),
    Check(
        "completions time out",
        _median("timeout_share"),
        0.2,
        "of the students' completions",
        "if the machine is busy, raise --cpu-seconds or lower --workers",
    ),
    Check(
        "completions cut off",
        _median("truncated_share"),
        0.2,
        "of the students' completions reach the limit without an end",
        "raise --max-completion-length",
    ),
    Check(
        DEAD,
        _unsolved,
        1.5,
        "evaluations in a row saw the deployed policy solve nothing",
        "hack 0 with solve 0 is no success: compare with the base at step 0",
    ),
    Check(
        "solve dead at deployment",
        _solve_lost,
        0.75,
        "of the base's solve rate is lost",
        "a low hack rate is no success; try --unhackable-frac 0.5, --retained-advantages or a "
        "lower --learning-rate",
    ),
)


# ── during a run ─────────────────────────────────────────────────────────────────────────────────


class Health:
    """Judges every step; warns once of each fault, raises Diverged where a limit stays broken."""

    def __init__(
        self, policy: Policy, problems: Sequence[Problem], sampling: Sampling, history: History
    ):
        """`problems` give the reference solutions; `history` has the rows logged so far."""
        self.history, self.warned = history, set()
        self.references = reference_batch(policy, problems[:REFERENCES], sampling)
        self.temperature = sampling.temperature
        with policy.adapter.disabled():
            history.base_logp = self.reference_logp(policy)
        rows, history.rows = history.rows, []
        self.streak = 0
        for row in rows:
            self._count(row)

    def reference_logp(self, policy: Policy) -> float:
        """Mean log-prob of the reference solutions, nats a token, as trained."""
        lp = mean_logps(policy, self.references, self.temperature)
        return float(lp.mean())

    @property
    def calm(self) -> bool:
        """No breach of a stopping limit is under way: the state may become a checkpoint."""
        return self.streak == 0

    def __call__(self, row: Row) -> None:
        """Judge one step, after its row is logged."""
        broken = [key for key in FINITE if not math.isfinite(row.get(key) or 0.0)]
        if broken:
            raise Diverged(self._line(row, f"{', '.join(broken)} not finite"))
        evidence = self._count(row)
        if self.streak >= PATIENCE:
            raise Diverged(self._line(row, f"{evidence}, {self.streak} steps in a row"))
        if evidence:
            text = "a run that goes on like this is stopped; nothing is saved meanwhile"
            warn(f"step {row['step']}: {evidence}", text)
        self.advise()

    def advise(self) -> list[str]:
        """Print each warning once in a run; returns the names of those that are new."""
        new = []
        for check in CHECKS:
            value = None if check.stops else check.breach(self.history)
            if value is not None and check.what not in self.warned:
                new.append(check.what)
                warn(check.what, f"{value:.2f} {check.unit}; {check.remedy}")
        self.warned |= {*new}
        return new

    def _count(self, row: Row) -> str:
        """Take a row in; returns the evidence of broken limits."""
        self.history.rows.append(row)
        broken = []
        for check in CHECKS:
            value = check.breach(self.history) if check.stops else None
            if value is not None:
                broken.append(f"{check.what} {value:.3g} > {check.limit:g} {check.unit}")
        self.streak = self.streak + 1 if broken else 0
        return "; ".join(broken)

    def _line(self, row: Row, evidence: str) -> str:
        return f"diverged at step {row['step']}: {evidence}; {CALMER}, in another --out-dir"


def reference_batch(policy: Policy, problems: Sequence[Problem], sampling: Sampling) -> Batch:
    """The problems' canonical solutions, up to the limit, as completions of their prompts."""
    texts = [f"```python\n{p.canonical.strip()}\n```" for p in problems]
    return written(policy, [messages(p) for p in problems], texts, sampling.max_completion_length)
