"""Where labels meet scores and gradients, for the log: nothing in training reads what is made
here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from vgrout.config import GRPOConfig
from vgrout.core import NO_ZONE, Group, Rollout, Verdict, Zone
from vgrout.env.rollouts import Composed, rows_of
from vgrout.gate.gate import Gated
from vgrout.model import tokens
from vgrout.model.batch import Trained
from vgrout.model.grpo import normaliser, scored_loss
from vgrout.model.lora2r import BLOCKS, Lora2r, restored
from vgrout.model.policy import Policy, logps
from vgrout.run.evaluate import graded_row
from vgrout.stats import auroc, precision_recall_at

Figures = dict[str, float | int]
LATE = (Verdict.CPU_TIMEOUT, Verdict.WALL_TIMEOUT)


def audit(
    groups: Sequence[Group],
    composed: Composed | None,
    gated: Gated | None,
    eos_ids: frozenset[int],
) -> Figures:
    """The step's figures that use labels: rates of student rows, zones, how the score finds
    hacks."""
    figures = student_rates(groups, eos_ids)
    if composed is None or gated is None:
        return figures | {f"rows_{zone.name.lower()}": 0 for zone in Zone}
    if not gated.scores.isnan().all():
        figures |= score_figures(composed, gated)
    return figures | zone_figures(composed, gated)


def student_rates(
    groups: Sequence[Group],
    eos_ids: frozenset[int],
) -> Figures:
    rollouts = rows_of(groups)
    students = [r for r in rollouts if not r.teacher]
    grades = [r.grade for r in students]
    skipped = [len({r.grade.reward for r in g.rollouts}) == 1 for g in groups]
    figures = {
        "reward_mean": _mean([g.reward for g in grades]),
        "student_hack": _mean([g.reward_hack for g in grades]),
        "student_solve": _mean([g.correct for g in grades]),
        "student_format": _mean([g.format_ok for g in grades]),
        "groups_skipped": sum(skipped),
        "n_students": len(students),
        "n_teachers": len(rollouts) - len(students),
        "completion_length": _mean([len(r.completion_ids) for r in students]),
        "timeout_share": _mean([g.verdict in LATE for g in grades]),
        "truncated_share": _mean([r.completion_ids[-1] not in eos_ids for r in students]),
    }
    for mode in sorted({r.problem.mode for r in students}):
        of_mode = [r.grade for r in students if r.problem.mode == mode]
        figures[f"hack_{mode}"] = _mean([g.reward_hack for g in of_mode])
        figures[f"solve_{mode}"] = _mean([g.correct for g in of_mode])
    return figures


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / max(len(values), 1)


def score_figures(
    composed: Composed,
    gated: Gated,
) -> Figures:
    """AUROC of the score over student rows, by sign of the advantage; precision and recall of
    ROUTE."""
    hack = np.array([r.grade.reward_hack for r in composed.rollouts])
    scores, zones = (x.cpu().numpy() for x in gated.by_row())
    student = composed.student.cpu().numpy()
    sign = composed.batch.advantages.sign().cpu().numpy()
    figures = {}
    for name, of_sign in (("all", sign == sign), ("pos", sign > 0), ("neg", sign < 0)):
        rows = student & of_sign
        figures[f"score_auroc_{name}"] = auroc(scores[rows], hack[rows])
    at = precision_recall_at(zones[student] == Zone.ROUTE, hack[student])
    figures["score_precision_route"] = at["precision"]
    figures["score_recall_route"] = at["recall"]
    return figures


def zone_figures(
    composed: Composed,
    gated: Gated,
) -> Figures:
    """Rows and shares by zone; shares are of student rows with an advantage, which controls
    match."""
    zones = gated.zones[composed.student & (composed.batch.advantages != 0)]
    known = zones[zones != NO_ZONE]
    figures = dict(gated.stats)
    for zone in Zone:
        name = zone.name.lower()
        figures[f"rows_{name}"] = int((gated.zones == zone).sum())
        figures[f"share_{name}"] = float((known == zone).float().mean())
    return figures


def rollout_rows(
    step: int,
    groups: Sequence[Group],
    composed: Composed | None,
    gated: Gated | None,
) -> list[dict[str, object]]:
    """Every rollout of the step for rollouts.jsonl.gz: grade, advantage, score and zone."""
    place = {id(r): i for i, r in enumerate(composed.rollouts)} if composed else {}
    scores, zones = gated.by_row() if gated else ([], [])
    rows = []
    for r in rows_of(groups):
        row = {
            "step": step,
            "n_tokens": len(r.completion_ids),
            "teacher": r.teacher,
            "sampled_ablated": r.sampled_ablated,
        }
        row |= graded_row(r.problem, r.completion, r.grade)
        if (i := place.get(id(r))) is not None:
            row["advantage"] = float(composed.batch.advantages[i])
            row["zone"] = Zone(int(zones[i])).name
            row["score"] = float(scores[i])
        rows.append(row)
    return rows


def sampled_tokens(groups: Sequence[Group]) -> int:
    return sum(len(r.completion_ids) for r in rows_of(groups) if not r.teacher)


def gradient_norms(
    policy: Policy,
    trained: Trained,
    rollouts: Sequence[Rollout],
    config: GRPOConfig,
    retain_forward: str,
) -> Figures:
    """‖∂L/∂block‖ of the student rows that are hacks and of those that are not, each in its zone.

    L is the policy-gradient term of the step's loss at ratio 1, without KL: −Σ_i A_i Σ_t logp_t /
    (G · max_completion_length · P) over the rows of one label, as an action left them. After
    Shilov et al. 2025, section 4.4 (https://arxiv.org/abs/2512.05648): do hacks update the
    quarantine, and the rest the deployed block? `autograd.grad` touches no `.grad`, and nothing
    draws at random. `rollouts` are those of the step's batch, before the action; a label without a
    row has norm 0.
    """
    rows = [rollouts[i] for i in trained.rows.tolist()]
    norms: Figures = {}
    for label, wanted in (("hack", True), ("clean", False)):
        of_label = [not r.teacher and r.grade.reward_hack == wanted for r in rows]
        chosen = torch.tensor(of_label, device=trained.rows.device).nonzero()[:, 0]
        part = tokens.part(trained, chosen) if len(chosen) else None
        sizes = torch.stack([g.norm() for g in _gradient(policy, part, config, retain_forward)])
        for block, own in zip(BLOCKS, sizes.chunk(2)):
            norms[f"gradnorm_{block}_{label}"] = float(own.norm())
    return norms


def _gradient(
    policy: Policy,
    trained: Trained | None,
    config: GRPOConfig,
    retain_forward: str,
) -> list[Tensor]:
    """Of both blocks' parameters, in their order; 0 for no row."""
    every = [p for block in BLOCKS for p in policy.adapter.parameters(block)]
    total = [torch.zeros_like(p) for p in every]
    if trained is None:
        return total
    for rows in policy.micro_batches(trained.batch, False):
        part = tokens.part(trained, rows)
        route = policy.adapter.route(part.zones, retain_forward)
        with torch.enable_grad(), policy.training(), route:
            lp = logps(policy, part.batch, config.temperature)
            A, mask = part.batch.advantages, part.batch.completion_mask
            loss = scored_loss(lp, mask, A, normaliser(config)).sum()
            for held, gradient in zip(total, torch.autograd.grad(loss, every)):
                held += gradient
    return total


@contextmanager
def scaled(
    adapter: Lora2r,
    scale: float,
    blocks: Sequence[str] = BLOCKS,
) -> Iterator[None]:
    """Multiply the weight deltas of some blocks by `scale` for a while.

    1 is the policy as trained, 0 on the quarantine ablates it. A block's delta is B dA + dB A0 with
    B = B0 + dB, so that scaling B0 and dB scales it exactly.
    """
    own = [getattr(layer, block) for layer in adapter.layers.values() for block in blocks]
    tensors = [x for block in own for x in (block.B0, block.dB)]
    with restored(tensors):
        for x in tensors:
            x.data.mul_(scale)
        yield
