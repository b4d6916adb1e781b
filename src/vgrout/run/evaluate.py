"""Evaluation of a policy state on held-out problems, and its schedule over a run.

An evaluation draws from a generator of its own and leaves every parameter as it was.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from vgrout.config import RunConfig
from vgrout.core import EvalResult, Grade, Problem
from vgrout.env.modes import NOVELTY_FREE
from vgrout.env.problems import disclose, messages, stable_hash
from vgrout.env.rollouts import Grades, Sampling
from vgrout.model import tokens
from vgrout.model.policy import Policy
from vgrout.model.sampling import sample
from vgrout.run.records import Run

Rows = list[dict[str, object]]


def seeded(policy: Policy, *what: object) -> torch.Generator:
    """A generator for one purpose: what is random is a function of (seed, step, purpose)."""
    seed = stable_hash(*map(str, what)) >> 1
    return torch.Generator(policy.device).manual_seed(seed)


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    grader: Grades,
    sampling: Sampling,
    *,
    split: str,
    markers: str,
    state: str,
    ablated: bool,
    step: int,
    draws: int,
    generator: torch.Generator,
    log: Callable[[Rows], None] | None = None,
) -> EvalResult:
    """Hacks and solves of about `draws` completions, spread evenly over `problems`.

    Each is shown with its own mode. `markers` "novel" discloses names that training never shows;
    modes without a name to change are left out of that cell. With fewer draws than problems an even
    selection of the problems gets one draw each. `log` is given every completion with its grade.
    """
    shown = [disclose(p, p.mode, novel=markers == "novel") for p in problems]
    if markers == "novel":
        shown = [p for p in shown if p.mode not in NOVELTY_FREE]
    if draws < len(shown):
        shown = [shown[i * len(shown) // draws] for i in range(draws)]
    each = max(1, draws // len(shown))
    prompts = [tokens.encode_prompt(policy.tokenizer, messages(p)) for p in shown]
    how = asdict(sampling) | {"generator": generator, "ablated": ablated}
    groups = sample(policy, prompts, [each] * len(shown), **how)
    drawn = [ids for group in groups for ids, _ in group]
    completions = [tokens.decode_completion(policy.tokenizer, ids) for ids in drawn]
    asked = [p for p in shown for _ in range(each)]
    grades = grader.grade(completions, asked)
    cell = {"step": step, "split": split, "markers": markers, "state": state}
    if log:
        rows = zip(asked, completions, grades)
        log([cell | graded_row(problem, text, grade) for problem, text, grade in rows])
    return counted(asked, grades, **cell)


def counted(problems: Sequence[Problem], grades: Sequence[Grade], **cell: str | int) -> EvalResult:
    """The cell's counts: in all, by mode and by problem."""
    nothing = {"n": 0, "hack": 0, "solve": 0}
    total = nothing.copy()
    by_mode, of_problem = (defaultdict(nothing.copy) for _ in range(2))
    for problem, grade in zip(problems, grades):
        counts = {"n": 1, "hack": int(grade.reward_hack), "solve": int(grade.correct)}
        for tally in (total, by_mode[problem.mode.value], of_problem[problem.problem_id]):
            for key, n in counts.items():
                tally[key] += n
    by_problem = {name: [*tally.values()] for name, tally in of_problem.items()}
    return EvalResult(**cell, **total, by_mode=dict(by_mode), by_problem=by_problem)


def graded_row(problem: Problem, completion: str, grade: Grade) -> dict[str, object]:
    """A completion as the files of a run hold it: without wall times, so that all repeats
    exactly."""
    row = {"problem_id": problem.problem_id, "mode": problem.mode, "marker": problem.marker}
    grades = {k: v for k, v in asdict(grade).items() if k != "seconds"}
    return row | {"completion": completion} | grades


@dataclass
class Evaluations:
    """The evaluations of one run, on their schedule."""

    run: Run
    policy: Policy
    splits: dict[str, list[Problem]]
    grader: Grades
    sampling: Sampling
    config: RunConfig
    deployed: str
    between: Callable[[], None] = lambda: None  # called behind every cell, and may end the run

    def cell(
        self,
        split: str,
        markers: str,
        state: str,
        ablated: bool,
        step: int,
        draws: int,
    ) -> EvalResult:
        where = {"split": split, "markers": markers, "state": state, "step": step}
        draw = "eval", self.config.seed, step, split, markers, ablated
        with self.run.timed("sec_eval"):
            result = evaluate(
                self.policy,
                self.splits[split],
                self.grader,
                self.sampling,
                **where,
                ablated=ablated,
                draws=draws,
                generator=seeded(self.policy, *draw),
                log=self.run.log_evals,
            )
        self.run.record.evals.append(result)
        self.run.save()
        self.between()
        return result

    def base(self, moved: bool) -> None:
        """Step 0: the net delta is zero, so that one cell, the same in every arm, is of both
        states.

        `moved`: it is not, since the run starts from another run's policy.
        """
        ablated = self.deployed == "ablated" or not moved
        self.cell("test", "novel", "deployed", ablated, 0, self.config.final_draws)

    def validate(self, step: int) -> None:
        ablated = self.deployed == "ablated"
        self.cell("val", "novel", "deployed", ablated, step, self.config.eval_draws)

    def final(self, step: int) -> None:
        """The 2×2 table: state × markers. Where the arm deploys as trained, its ablated cells are
        those of `absorb`: train once, evaluate twice."""
        draws = self.config.final_draws
        for markers in ("iid", "novel"):
            trained = self.cell("test", markers, "as_trained", False, step, draws)
            if self.deployed == "as_trained":
                self.run.record.evals.append(replace(trained, state="deployed"))
            state = "deployed" if self.deployed == "ablated" else "ablated"
            self.cell("test", markers, state, True, step, draws)
