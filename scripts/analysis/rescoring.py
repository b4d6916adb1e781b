"""Every score of the family on stored rollouts: a snapshot's parameters and that step's batch.

Each score, and each control, is built by the functions that training uses, from the run's own
configuration. Nothing is trained.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scripts.experiments.reopen import Stored
from torch import Tensor

from vgrout.arms import Phase, phases_of
from vgrout.config import with_options
from vgrout.core import (
    Grade,
    Group,
    Mode,
    Problem,
    Rollout,
    UserError,
    Verdict,
)
from vgrout.env.pairs import load_pairs
from vgrout.env.problems import disclose, messages
from vgrout.env.rollouts import Composed, compose
from vgrout.gate.controls import Control, Haar, RandomQuarantine
from vgrout.gate.gate import Gate
from vgrout.gate.phases import build_gate
from vgrout.gate.ratio import LikelihoodRatio, QuarantineRatio
from vgrout.gate.scores import Materials, Scored
from vgrout.gate.v_grad import DirectionScore
from vgrout.model.batch import Behaviour
from vgrout.model.likelihood import batch_logps, mean_logps, random_deltas
from vgrout.model.policy import Policy
from vgrout.model.tokens import encode_completion, encode_prompt

PLAIN = {  # every score starts from this form, whatever the run's own is
    "granularity": "rollout",
    "probe_state": "as_trained",
    "probe_positions": "completion",
    "score_sign": "advantage",
    "centred": False,
    "act_space": "bottleneck",
}
CONFOUND = "confound"
V_GRAD, V_ACT = Phase(score="v_grad"), Phase(score="v_act")
RANKED = replace(V_GRAD, control=CONFOUND)
FAMILY: dict[str, tuple[Phase, dict]] = {  # a phase with a control stands for that control
    "v_grad": (V_GRAD, {}),
    "v_grad all positions": (V_GRAD, {"probe_positions": "all"}),
    "v_grad deployed": (V_GRAD, {"probe_state": "deployed"}),
    "v_grad unit": (V_GRAD, {"score_sign": "unit"}),
    "v_grad centred": (V_GRAD, {"score_sign": "unit", "centred": True}),
    "v_act bottleneck": (V_ACT, {}),
    "v_act residual": (V_ACT, {"act_space": "residual"}),
    "v_act residual centred": (
        V_ACT,
        {"act_space": "residual", "centred": True},
    ),
    "llr": (Phase(score="llr"), {}),
    "quarantine ratio": (Phase(score="quarantine_ratio"), {}),
    "semantic placebo": (replace(V_GRAD, control="semantic"), {}),
    "advantage": (RANKED, {CONFOUND: "advantage"}),
    "reward": (RANKED, {CONFOUND: "reward"}),
    "length": (RANKED, {CONFOUND: "length"}),
    "mean logp": (RANKED, {CONFOUND: "logp"}),
    "random": (replace(V_GRAD, control="random"), {}),
}


# ── stored rollouts → the batch that the gate saw ────────────────────────────────────────────────


def stored_rollout(policy: Policy, problem: Problem, row: dict) -> Rollout:
    """A stored row; what is no tokenisation of its own text is taken in its usual one."""
    ids = encode_completion(policy.tokenizer, row["completion"])
    known = {f.name: row[f.name] for f in fields(Grade) if f.name in row}
    grade = Grade(**known | {"verdict": Verdict(row["verdict"]), "seconds": 0.0})
    return Rollout(
        problem=problem,
        prompt_ids=encode_prompt(policy.tokenizer, messages(problem)),
        completion_ids=ids[: row["n_tokens"]],
        completion=row["completion"],
        sampled_ablated=row["sampled_ablated"],
        teacher=row["teacher"],
        grade=grade,
    )


def rebuild(run: Stored, rows: list[dict]) -> Composed | None:
    """The rows of one step as the gate saw them; None where no group has variance in reward.

    Only text is stored: what sampled it had the log-probs of the policy at hand. The advantages
    must be the stored ones; UserError where they, or the groups, are not.
    """
    by_id = {p.problem_id: p for part in run.splits.values() for p in part}
    size, groups = run.config.grpo.num_generations, []
    where = f"{run.path}, step {rows[0]['step']}"
    inoculated = phases_of(run.config)[-1].inoculate
    for i in range(0, len(rows), size):
        members = rows[i : i + size]
        shown = disclose(by_id[members[0]["problem_id"]], Mode(members[0]["mode"]))
        problem = replace(shown, inoculated=inoculated)
        asked = {(row["problem_id"], row["marker"]) for row in members}
        if asked != {(problem.problem_id, problem.marker)}:
            raise UserError(f"{where}: the rollouts are not groups of {size} on one prompt each")
        rollouts = [stored_rollout(run.policy, problem, row) for row in members]
        groups.append(Group(problem, rollouts))
    composed = compose(groups, run.policy, run.config.phase.action == "deduct")
    stored = [r["advantage"] for r in rows if r.get("advantage") is not None]
    found = [] if composed is None else composed.batch.advantages.tolist()
    if len(stored) != len(found) or not np.allclose(stored, found, atol=1e-5):
        remedy = "are not those of the stored rewards; train it again"
        raise UserError(f"{where}: the stored advantages {remedy}")
    if composed is None:
        return None
    logps = batch_logps(run.policy, composed.batch, run.config.grpo.temperature)
    return replace(composed, behaviour=Behaviour(composed.behaviour.ablated, logps))


# ── scores ───────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Found:
    """A batch under one score. A row without an advantage has none (NaN)."""

    scores: Float[Tensor, " g"]
    zones: Int[Tensor, " g"] | None  # of the pairs' band; None for a control
    null: Float[Tensor, "g d"]  # d random controls in the score's own space; d = 0: it has none


def members(run: Stored, names: Iterable[str]) -> dict[str, tuple[Gate, Control | None]]:
    """The named scores on the run's pairs, as an arm would have them; a control with its gate."""
    data, found = run.config.data, {}
    used = load_pairs(data.pairs, data.pair_modes)
    placebo = load_pairs(data.placebo_pairs)
    for name in names:
        phase, options = FAMILY[name]
        config = with_options(run.config, PLAIN | options)
        gate, control = build_gate(phase, Materials(run.policy, config, used), placebo)
        found[name] = gate, control if phase.control else None
    return found


def score_step(
    policy: Policy,
    gate: Gate,
    control: Control | None,
    composed: Composed,
    draws: int,
    seed: int,
) -> Found:
    """Refresh one score at the present parameters and score the batch, with `draws` controls."""
    batch = composed.batch
    unscored = batch.advantages == 0
    if control is not None:
        control.refresh(policy)
        scores = control.score.rank(policy, composed, Scored(batch.advantages))
        nothing = scores.new_empty(len(scores), 0)
        return Found(scores.masked_fill(unscored, float("nan")), None, nothing)
    gate.refresh(policy)
    gated = gate(policy, batch)
    seeds = [seed * draws + i for i in range(draws)]
    null = null_scores(policy, gate.score, gated.scored, composed, seeds)
    columns = torch.stack([*null, gated.scores], 1)[:, :-1]
    columns[unscored] = float("nan")
    return Found(gated.scores, gated.zones, columns)


def null_scores(
    policy: Policy, score, scored: Scored, composed: Composed, seeds: list[int]
) -> list[Float[Tensor, " g"]]:
    """The batch under random controls of the score.

    A likelihood ratio's is the mean log-prob after a Gaussian nudge that has in every tensor the
    norm of the fitted hack − clean delta, minus that before.
    """
    if isinstance(score, LikelihoodRatio):
        fitted = [hack - clean for hack, clean in zip(*score.deltas)]
        how = policy, composed.batch, score.temperature
        live, columns = mean_logps(*how), []
        for seed in seeds:
            with policy.adapter.shifted(random_deltas(fitted, seed)):
                columns.append(mean_logps(*how) - live)
        return columns
    control = {DirectionScore: Haar, QuarantineRatio: RandomQuarantine}[type(score)]
    return [control(score, seed).rank(policy, composed, scored) for seed in seeds]
