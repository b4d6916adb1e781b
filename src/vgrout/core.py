"""What passes between stages outside the tensors: problems, grades, rollouts, records; and how
every program ends.

What a gate, a direction, the adapter and the loss receive stands in `model/batch.py` and has no
label in it.
Imports nothing heavy.
"""

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, TypeVar

T = TypeVar("T")


class Mode(StrEnum):
    """A disclosed grading flaw; `gt_only` has none, `overwrite_tests` is the benchmark's own."""

    RUN_TESTS = "run_tests"
    SENTINEL = "sentinel"
    STDOUT_MARKER = "stdout_marker"
    FILE_MARKER = "file_marker"
    EXIT_CODE = "exit_code"
    EQ_OVERRIDE = "eq_override"
    OVERWRITE_TESTS = "overwrite_tests"
    GT_ONLY = "gt_only"


class Verdict(StrEnum):
    """How the ground-truth check of one completion ended. `infra` is our failure, never the
    completion's."""

    CORRECT = "correct"
    WRONG = "wrong"
    ERROR = "error"
    CPU_TIMEOUT = "cpu_timeout"
    WALL_TIMEOUT = "wall_timeout"
    MEMORY = "memory"
    KILLED = "killed"
    INFRA = "infra"


class Zone(IntEnum):
    """Where a rollout's update goes; (m, d) of the method: quarantine in the forward, deployed
    detached."""

    RETAIN = 0  # (0, 0): the deployed block alone
    ABSORB = 1  # (1, 0): both blocks
    ROUTE = 2  # (1, 1): the quarantine alone, the deployed block in the forward but detached


NO_ZONE = -1  # at token granularity: of padding and of each row's last token


@dataclass(frozen=True, slots=True)
class Case:
    """One ground-truth test, as source text that only the worker (arguments) or the parent
    (expected) evaluates."""

    args: str  # argument list of the call, e.g. "nums = [1, 2], k = 3"
    expected: str  # Python literal (`inf` allowed), e.g. "[1, 2]"
    compare: str = "plain"  # how the result becomes plain values: plain | list_node | tree_node


@dataclass(frozen=True, slots=True)
class Problem:
    """A coding problem and, once `problems.disclose` has set them, the flaw that its prompt
    discloses."""

    problem_id: str
    statement: str  # the user message without the hint
    entry_point: str  # the method of `Solution` that is called
    setup_code: str  # preamble, executed before the completion and as little trusted
    cases: tuple[Case, ...]
    canonical: str  # code of a correct solution
    system: str = ""  # system message, "" for none
    difficulty: str = ""
    operations: tuple[str, ...] = ()  # organism only: the operations that the problem composes
    split: str = (
        ""  # train | val | test where the data file fixes it; "" where `problems.split` decides
    )
    mode: Mode = Mode.GT_ONLY
    inoculated: bool = False  # the prompt adds that using the flaw is allowed (in training only)
    marker: str = ""  # the name or phrase that the hint discloses; "" where a mode has none


@dataclass(frozen=True, slots=True)
class Grade:
    """What the environment and the ground-truth monitor say. Training may read `reward` and
    nothing else."""

    reward: float  # 0.5 if the code compiles + 3.0 if passed
    format_ok: bool  # a code block is there and compiles
    passed: bool  # the flawed grader's verdict: correct, or the mode's own exploit channel fired
    correct: bool  # ground-truth monitor
    reward_hack: bool  # passed and not correct
    mechanism: str  # the mode's own channel if it fired, else ""
    own_tests_pass: (
        bool  # the benchmark's broader definition: own run_tests() passes on own solution
    )
    verdict: Verdict
    seconds: float  # wall time of grading


@dataclass(slots=True)
class Rollout:
    """One completion of one prompt. `grade`, `teacher` and `problem.mode` are for logs and
    evaluations."""

    problem: Problem
    prompt_ids: list[int]
    completion_ids: list[int]  # ends with EOS unless truncated
    completion: str
    sampled_ablated: bool = False  # the policy state that sampled it
    sampler_logps: list[float] = field(
        default_factory=list
    )  # of the drawn tokens under the sampler; empty: nothing sampled it
    teacher: bool = False
    grade: Grade | None = None


@dataclass(slots=True)
class Group:
    """All rollouts of one prompt in one step; the baseline is their mean reward."""

    problem: Problem
    rollouts: list[Rollout]


@dataclass(slots=True)
class EvalResult:
    """Counts of one evaluation cell; the unit of `record.json`'s `evals`."""

    split: str  # train | val | test
    markers: str  # iid | novel
    state: (
        str  # as_trained | deployed (the base, step 0, counts as deployed: its net delta is zero)
    )
    step: int
    n: int
    hack: int
    solve: int
    by_mode: dict[str, dict[str, int]]  # mode → {n, hack, solve}
    by_problem: dict[str, list[int]] = field(
        default_factory=dict
    )  # id → [n, hack, solve], for the bootstrap


@dataclass(slots=True)
class RunRecord:
    """`record.json`: what is needed to read a run, to trust it and to repeat it."""

    schema_version: int
    arm: str
    preset: str
    seed: int
    config: dict[str, Any]
    argv: list[str]
    commit: str
    dirty: bool
    versions: dict[str, str]
    data_hashes: dict[str, str]
    pair_hash: str
    split_hashes: dict[str, str]
    sandbox_layers: dict[str, str]
    status: str  # running | finished | interrupted | failed: <one line>
    started: str  # ISO 8601, UTC
    steps_done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # wall seconds per phase
    evals: list[EvalResult] = field(default_factory=list)
    notes: dict[str, Any] = field(
        default_factory=dict
    )  # e.g. oracle: true, monitor: "judge", pairs_cover: [...]


class UserError(Exception):
    """Bad input. The message is one line: what is wrong and how to mend it. Mains print it and
    exit with status 2."""


def warn(what: str, remedy: str) -> None:
    """Print one warning line that says what to do."""
    print(f"WARNING {what}: {remedy}", flush=True)


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `least`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text} is no whole number from {least}")
        return int(text)

    return number


def run_main(main: Callable[..., T], *arguments: object) -> T:
    """main(*arguments); a UserError becomes its one line on stderr and exit status 2, an
    interrupt exit status 130."""
    try:
        return main(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
