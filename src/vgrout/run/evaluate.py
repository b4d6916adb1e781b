"""Evaluation of a policy state on held-out problems, and the one function in which labels meet scores: it only logs.

An evaluation draws from a generator of its own and leaves every parameter as it was.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict

import torch

from vgrout.core import NO_ZONE, EvalResult, Grade, Group, Problem, Rollout, Verdict, Zone
from vgrout.env.problems import NOVELTY_FREE, disclose, messages
from vgrout.env.rollouts import Sampling
from vgrout.grader import Grader
from vgrout.model import tokens
from vgrout.model.batch import Batch, GateOutput, Origin
from vgrout.model.policy import Policy
from vgrout.model.sampling import sample
from vgrout.stats import auroc, precision_recall_at


def evaluate(
    policy: Policy,
    problems: list[Problem],
    grader: Grader,
    sampling: Sampling,
    *,
    split: str,
    markers: str,
    state: str,
    ablated: bool,
    step: int,
    draws: int,
    generator: torch.Generator,
    log: Callable[[list[dict]], None] | None = None,
) -> EvalResult:
    """Hacks and solves of about `draws` completions, spread evenly over `problems`, each shown with its own mode.

    `markers` "novel" discloses names that training never shows; modes without a name to change are left out of that cell.
    With fewer draws than problems an even selection of the problems gets one draw each. `log` is given every completion with its grade.
    """
    shown = [disclose(p, p.mode, novel=markers == "novel") for p in problems]
    if markers == "novel":
        shown = [p for p in shown if p.mode not in NOVELTY_FREE]
    if draws < len(shown):
        shown = [shown[i * len(shown) // draws] for i in range(draws)]
    each = max(1, draws // len(shown))
    prompts = [tokens.encode_prompt(policy.tokenizer, messages(p)) for p in shown]
    groups = sample(
        policy,
        prompts,
        [each] * len(shown),
        generator=generator,
        ablated=ablated,
        **asdict(sampling),
    )
    completions = [
        tokens.decode_completion(policy.tokenizer, ids) for group in groups for ids, _ in group
    ]
    asked = [p for p in shown for _ in range(each)]
    by_mode: dict[str, dict[str, int]] = defaultdict(lambda: {"n": 0, "hack": 0, "solve": 0})
    by_problem: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    grades = grader.grade(completions, asked)
    if log:
        cell = {"step": step, "split": split, "markers": markers, "state": state}
        log(
            [
                cell | _graded(problem, text, grade)
                for problem, text, grade in zip(asked, completions, grades)
            ]
        )
    for problem, grade in zip(asked, grades):
        counts = (1, int(grade.reward_hack), int(grade.correct))
        for key, n in zip(("n", "hack", "solve"), counts):
            by_mode[problem.mode.value][key] += n
        by_problem[problem.problem_id] = [
            a + b for a, b in zip(by_problem[problem.problem_id], counts)
        ]
    n, hack, solve = (sum(m[k] for m in by_mode.values()) for k in ("n", "hack", "solve"))
    return EvalResult(split, markers, state, step, n, hack, solve, dict(by_mode), dict(by_problem))


def monitor(
    groups: list[Group],
    kept: list[Rollout],
    batch: Batch | None,
    out: GateOutput | None,
    eos_ids: frozenset[int],
) -> dict[str, float | int]:
    """The step's figures that use labels, for the log alone: rates of student rows, and how well the score finds hacks.

    `kept` are the rows of `batch`, in its order.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    students = [r for r in rollouts if not r.teacher]
    mean = lambda values: sum(values) / max(len(values), 1)  # noqa: E731
    row = {
        "reward_mean": mean([r.grade.reward for r in students]),
        "student_hack": mean([r.grade.reward_hack for r in students]),
        "student_solve": mean([r.grade.correct for r in students]),
        "student_format": mean([r.grade.format_ok for r in students]),
        "groups_skipped": sum(len({r.grade.reward for r in g.rollouts}) == 1 for g in groups),
        "n_students": len(students),
        "n_teachers": len(rollouts) - len(students),
        "completion_length": mean([float(len(r.completion_ids)) for r in students]),
        "timeout_share": mean(
            [r.grade.verdict in (Verdict.CPU_TIMEOUT, Verdict.WALL_TIMEOUT) for r in students]
        ),
        "truncated_share": mean([r.completion_ids[-1] not in eos_ids for r in students]),
    }
    for mode in sorted({r.problem.mode for r in students}):
        rows = [r for r in students if r.problem.mode == mode]
        row[f"hack_{mode}"] = mean([r.grade.reward_hack for r in rows])
        row[f"solve_{mode}"] = mean([r.grade.correct for r in rows])
    if out is None or batch is None or out.scores.isnan().all():
        return row
    hack = torch.tensor([r.grade.reward_hack for r in kept])
    student = torch.tensor([not r.teacher for r in kept])
    scores, zones, A = *(x.cpu() for x in out.by_row()), batch.advantages.cpu()
    for name, rows in (
        ("all", student & ~scores.isnan()),
        ("pos", student & (A > 0)),
        ("neg", student & (A < 0)),
    ):
        row[f"score_auroc_{name}"] = auroc(scores[rows].numpy(), hack[rows].numpy())
    at = precision_recall_at((zones == Zone.ROUTE)[student].numpy(), hack[student].numpy())
    return row | {"score_precision_route": at["precision"], "score_recall_route": at["recall"]}


def sampled_tokens(groups: list[Group]) -> int:
    return sum(len(r.completion_ids) for g in groups for r in g.rollouts if not r.teacher)


def zone_figures(out: GateOutput | None, origin: Origin | None) -> dict[str, float | int]:
    """Rows and shares by zone; shares are of student rows with an advantage, the rows that a control must match."""
    if out is None:
        return {f"rows_{z.name.lower()}": 0 for z in Zone}
    counts = {z.name.lower(): int((out.zones == z).sum()) for z in Zone}
    scored = origin.student & (origin.stratum.div(2, rounding_mode="floor") != 0)
    zones = out.zones[scored]
    share = {
        f"share_{z.name.lower()}": float((zones[zones != NO_ZONE] == z).float().mean())
        for z in Zone
    }
    return {f"rows_{k}": v for k, v in counts.items()} | share | out.stats


def rollout_rows(
    step: int, groups: list[Group], kept: list[Rollout], batch: Batch | None, out: GateOutput | None
) -> list[dict]:
    """Every rollout of the step for rollouts.jsonl.gz, with its grade, advantage, score and zone."""
    scored = {id(r): i for i, r in enumerate(kept)}
    scores, zones = out.by_row() if out is not None else ([], [])
    rows = []
    for r in (r for g in groups for r in g.rollouts):
        row = {
            "step": step,
            "n_tokens": len(r.completion_ids),
            "teacher": r.teacher,
            "sampled_ablated": r.sampled_ablated,
        }
        row |= _graded(r.problem, r.completion, r.grade)
        if (i := scored.get(id(r))) is not None:
            row |= {
                "advantage": float(batch.advantages[i]),
                "zone": Zone(int(zones[i])).name,
                "score": float(scores[i]),
            }
        rows.append(row)
    return rows


def _graded(problem: Problem, completion: str, grade: Grade) -> dict:
    """A completion as the files of a run hold it: without the grading's wall time, so that all repeats exactly."""
    row = {
        "problem_id": problem.problem_id,
        "mode": problem.mode,
        "marker": problem.marker,
        "completion": completion,
    }
    return row | {k: v for k, v in asdict(grade).items() if k != "seconds"}
