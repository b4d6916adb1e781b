"""Every score of the family on stored rollouts: a snapshot's parameters and that step's batch.

`train.make_gate` builds each score from a row of ARMS' kind and the run's own configuration, so
that what is audited here is what an arm would use. Nothing is trained. This is the one place of the
analysis that knows how gates are built.
"""

from dataclasses import fields, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scripts.experiments.reopen import Stored
from torch import Tensor

from vgrout import train
from vgrout.config import Arm, Config
from vgrout.core import Grade, Group, Mode, Rollout, UserError, Verdict, Zone
from vgrout.env.problems import disclose, messages
from vgrout.env.rollouts import compose
from vgrout.gate.gate import Gate, match_shares, zones_from_band, zones_from_edge
from vgrout.gate.ratio import LikelihoodRatio, QuarantineRatio, RandomQuarantine
from vgrout.gate.scores import DirectionScore, HaarScore, Score, Scored
from vgrout.model.batch import Batch, Origin
from vgrout.model.likelihood import batch_logps, mean_logps, random_deltas
from vgrout.model.policy import Policy
from vgrout.model.tokens import encode_completion, encode_prompt

Columns = dict[str | tuple[str, ...], np.ndarray]
# One row for each rollout with an advantage, demonstrations included:
#     run, step, group, mode, student, hack, advantage, length   facts [n]
#     ("score", name), ("zone", name, cut)                       [n]; no zone without a cut
#     ("null", name)                                             [n, draws], of random directions

SEED_FORM = {
    "granularity": "rollout",
    "probe_state": "as_trained",
    "score_sign": "advantage",
    "centred": False,
    "metric": "cosine",
    "act_space": "bottleneck",
    "act_layer": None,
    "probe_positions": "completion",
}
GRADIENT, SEMANTIC, CONFOUND = (
    Arm("v_grad"),
    Arm("v_grad", "semantic"),
    Arm("v_grad", "confound"),
)
UNIT = {"score_sign": "unit"}
CENTRED = UNIT | {"centred": True}
FAMILY: dict[str, tuple[Arm, dict]] = {  # arm whose control, or else whose score, is audited
    "v_grad": (GRADIENT, {}),
    "v_grad all positions": (GRADIENT, {"probe_positions": "all"}),
    "v_grad deployed": (GRADIENT, {"probe_state": "deployed"}),
    "v_grad unit": (GRADIENT, UNIT),
    "v_grad centred": (GRADIENT, CENTRED),
    "v_grad centred dot": (GRADIENT, CENTRED | {"metric": "dot"}),
    "v_act bottleneck": (Arm("v_act"), {}),
    "v_act bottleneck centred": (Arm("v_act"), {"centred": True}),
    "v_act residual": (Arm("v_act"), {"act_space": "residual"}),
    "v_act residual centred": (
        Arm("v_act"),
        {"act_space": "residual", "centred": True},
    ),
    "llr": (Arm("llr"), {}),
    "quarantine ratio": (Arm("quarantine_ratio"), {}),
    "semantic placebo": (SEMANTIC, {}),
    "semantic placebo centred": (SEMANTIC, CENTRED),
    "advantage": (CONFOUND, {"confound": "advantage"}),
    "reward": (CONFOUND, {"confound": "reward"}),
    "length": (CONFOUND, {"confound": "length"}),
    "mean logp": (CONFOUND, {"confound": "logp"}),
    "random": (Arm("v_grad", "random"), {}),
}
SHARES = {"top 10 %": 0.10, "top 25 %": 0.25}
PAIR_CUTS = ("band", "midpoint", "zero")  # of RouteConfig.cut


def joined(parts: list[Columns]) -> Columns:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# ── stored rollouts → the batch that the gate saw ────────────────────────────────────────────────


def stored_rollout(run: Stored, group: Group, prompt: list[int], row: dict) -> Rollout:
    """A stored row; what is no tokenisation of its own text is taken in its usual one."""
    ids = encode_completion(run.policy.tokenizer, row["completion"])
    names = {f.name for f in fields(Grade)} - {"seconds", "verdict"}
    grade = Grade(
        **{name: row[name] for name in names},
        verdict=Verdict(row["verdict"]),
        seconds=0.0,
    )
    return Rollout(
        problem=group.problem,
        prompt_ids=prompt,
        completion_ids=ids[: row["n_tokens"]],
        completion=row["completion"],
        sampled_ablated=row["sampled_ablated"],
        teacher=row["teacher"],
        grade=grade,
    )


def rebuild(
    run: Stored, rows: list[dict]
) -> tuple[list[Rollout], Batch | None, Origin | None, int]:
    """(kept rollouts, batch, origin, completions of another length) of the rows of one step.

    Only text is stored; the last figure counts students whose usual tokenisation has another
    length than what was sampled. The batch comes from `compose`; its advantages must be the stored
    ones. `sampler_logps` are not stored, and NaN here.
    """
    by_id = {p.problem_id: p for part in run.splits.values() for p in part}
    size, groups, odd = run.config.grpo.num_generations, [], 0
    where = f"{run.path}, step {rows[0]['step']}"
    for i in range(0, len(rows), size):
        members = rows[i : i + size]
        problem = disclose(by_id[members[0]["problem_id"]], Mode(members[0]["mode"]))
        problem = replace(problem, inoculated=run.arm.inoculate)
        if any(
            (r["problem_id"], r["marker"]) != (problem.problem_id, problem.marker) for r in members
        ):
            own = f"groups of {size} with the problems' own markers"
            raise UserError(f"{where}: the rollouts are not {own}")
        group = Group(problem, [])
        prompt = encode_prompt(run.policy.tokenizer, messages(problem))
        groups.append(group)
        for row in members:
            group.rollouts.append(stored_rollout(run, group, prompt, row))
            length = len(encode_completion(run.policy.tokenizer, row["completion"]))
            ended = (
                row["n_tokens"],
                row["n_tokens"] + 1,
            )  # without EOS if truncated
            odd += not row["teacher"] and length not in ended
    kept, batch, origin = compose(groups, run.policy)
    stored = [r["advantage"] for r in rows if r.get("advantage") is not None]
    same = len(stored) == len(kept)
    if not same or stored and not np.allclose(stored, batch.advantages.cpu(), atol=1e-5):
        remedy = "are not those of the stored rewards; train it again"
        raise UserError(f"{where}: the stored advantages {remedy}")
    return kept, batch, origin, odd


def row_facts(run: str, step: int, kept: list[Rollout], batch: Batch) -> Columns:
    """The facts of Columns; a group is named by run, step and its place in the step."""
    n, groups = len(kept), batch.group.tolist()
    return {
        "run": np.full(n, run, dtype=object),
        "step": np.full(n, step),
        "group": np.array([f"{run}/{step}/{g}" for g in groups], dtype=object),
        "mode": np.array([str(r.problem.mode) for r in kept], dtype=object),
        "student": np.array([not r.teacher for r in kept]),
        "hack": np.array([r.grade.reward_hack for r in kept]),
        "advantage": batch.advantages.cpu().numpy(),
        "length": batch.completion_mask.sum(1).cpu().numpy(),
    }


# ── scores ───────────────────────────────────────────────────────────────────────────────────────


def family(
    policy: Policy,
    config: Config,
    names: list[str],
    pairs: str,
    pair_modes: tuple[Mode, ...],
) -> dict[str, Score]:
    """The named scores, as an arm would have them, on these pairs."""
    data, found = replace(config.data, pairs=pairs, pair_modes=pair_modes), {}
    for name in names:
        arm, options = FAMILY[name]
        score = replace(config.score, **SEED_FORM | options)
        gate, _ = train.make_gate(arm, policy, replace(config, data=data, score=score))
        found[name] = gate.control or gate.score
    return found


def score_step(
    policy: Policy,
    scores: dict[str, Score],
    batch: Batch,
    origin: Origin,
    draws: int,
    seed: int,
    config: Config,
) -> Columns:
    """Refresh every score at the present parameters and score the batch: Columns without facts.

    Each real score has `draws` random controls in its own space.
    """
    how = policy, batch, config.grpo.temperature, config.grpo.token_budget
    origin = replace(origin, sampler_logps=batch_logps(*how))
    unscored = batch.advantages == 0
    ranked = origin.student & ~unscored
    out: Columns = {}
    for name, score in scores.items():
        score.refresh(policy)
        found = score(policy, batch, origin)
        values = found.scores.masked_fill(unscored, float("nan"))
        out["score", name] = values.cpu().numpy()
        for cut in PAIR_CUTS if score.pairs_hack is not None else ():
            deal = zones_from_band if cut == "band" else zones_from_edge
            zones = deal(found.scores, batch.advantages, *Gate(score, cut=cut).edges())
            out["zone", name, cut] = zones.cpu().numpy()
        for share in SHARES:
            out["zone", name, share] = top(values, ranked, share).numpy()
        seeds = [seed * draws + i for i in range(draws)]
        if null := null_scores(score, found, how, origin, seeds):
            columns = torch.stack(null, 1).masked_fill(unscored[:, None], float("nan"))
            out["null", name] = columns.cpu().numpy()
    return out


def null_scores(
    score: Score,
    found: Scored,
    how: tuple[Policy, Batch, float, int],
    origin: Origin,
    seeds: list[int],
) -> list[Float[Tensor, " g"]]:
    """The batch under random controls of the score; none for a score that has no direction.

    A likelihood ratio's is the mean log-prob after a Gaussian nudge that has in every tensor the
    norm of the fitted hack − clean delta, minus that before.
    """
    policy, batch = how[:2]
    if isinstance(score, LikelihoodRatio):
        fitted, columns = [hack - clean for hack, clean in zip(*score.deltas)], []
        live = mean_logps(*how)
        for seed in seeds:
            with policy.adapter.shifted(random_deltas(fitted, seed)):
                columns.append(mean_logps(*how) - live)
        return columns
    controls = {DirectionScore: HaarScore, QuarantineRatio: RandomQuarantine}
    if (control := controls.get(type(score))) is None:
        return []
    return [control(score, seed)(policy, batch, origin, found).scores for seed in seeds]


def top(
    values: Float[Tensor, " g"],
    ranked: Tensor,
    share: str,
) -> Int[Tensor, " g"]:
    """ROUTE for the highest-scored share of the `ranked` rows, RETAIN for the rest.

    They are dealt as a control's are.
    """
    zones, rows = (
        torch.full(values.shape, int(Zone.RETAIN)),
        ranked.cpu().nonzero()[:, 0],
    )
    routed = round(SHARES[share] * len(rows))
    shadow = (torch.arange(len(rows)) < routed).long() * int(Zone.ROUTE)
    zones[rows] = match_shares(shadow, values.cpu()[rows], torch.zeros_like(rows))
    return zones
