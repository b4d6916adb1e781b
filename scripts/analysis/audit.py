"""Every score of the family on stored rollouts: a snapshot's parameters, that step's batch, the classes that train (diag_pinning.py).

`train.make_gate` builds each score from a row of ARMS' kind and the run's own configuration, so that what is audited here is what an
arm would use. Nothing is trained.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from jaxtyping import Float
from scripts.experiments.reopen import Stored
from torch import Tensor

from vgrout import train
from vgrout.config import Arm, Config
from vgrout.core import Grade, Group, Mode, Rollout, UserError, Verdict, Zone
from vgrout.env.problems import disclose
from vgrout.env.rollouts import compose
from vgrout.gate.gate import Gate, match_shares, zones_from_band, zones_from_edge
from vgrout.gate.ratio import LikelihoodRatio, QuarantineRatio, RandomQuarantine
from vgrout.gate.scores import DirectionScore, HaarScore, Score, Scored
from vgrout.model.batch import Batch, Origin
from vgrout.model.likelihood import batch_logps, mean_logps, random_deltas
from vgrout.model.policy import Policy
from vgrout.model.tokens import encode_completion, encode_prompt

SEED_FORM = dict(granularity="rollout", probe_state="as_trained", score_sign="advantage", centred=False, metric="cosine",
                 act_space="bottleneck", act_layer=None, probe_positions="completion", llr_form="ratio")  # fmt: skip
UNIT, CENTRED = dict(score_sign="unit"), dict(score_sign="unit", centred=True)
FAMILY: dict[
    str, tuple[Arm, dict]
] = {  # name → arm whose control, or else whose score, is audited; options beside SEED_FORM
    "v_grad": (Arm("v_grad"), {}),
    "v_grad all positions": (Arm("v_grad"), dict(probe_positions="all")),
    "v_grad deployed": (Arm("v_grad"), dict(probe_state="deployed")),
    "v_grad unit": (Arm("v_grad"), UNIT),
    "v_grad centred": (Arm("v_grad"), CENTRED),
    "v_grad centred dot": (Arm("v_grad"), CENTRED | dict(metric="dot")),
    "v_act bottleneck": (Arm("v_act"), {}),
    "v_act bottleneck centred": (Arm("v_act"), dict(centred=True)),
    "v_act residual": (Arm("v_act"), dict(act_space="residual")),
    "v_act residual centred": (Arm("v_act"), dict(act_space="residual", centred=True)),
    "llr": (Arm("llr"), {}),
    "llr one-sided": (Arm("llr"), dict(llr_form="one_sided")),
    "llr first order": (Arm("llr"), dict(llr_form="first_order")),
    "quarantine ratio": (Arm("quarantine_ratio"), {}),
    "semantic placebo": (Arm("v_grad", "semantic"), {}),
    "semantic placebo centred": (Arm("v_grad", "semantic"), CENTRED),
    "framing": (Arm("v_grad", "framing"), {}),
    "framing centred": (Arm("v_grad", "framing"), CENTRED),
    "advantage": (Arm("v_grad", "confound"), dict(confound="advantage")),
    "reward": (Arm("v_grad", "confound"), dict(confound="reward")),
    "length": (Arm("v_grad", "confound"), dict(confound="length")),
    "mean logp": (Arm("v_grad", "confound"), dict(confound="logp")),
    "random": (Arm("v_grad", "random"), {}),
}
SHARES = {"top 10 %": 0.10, "top 25 %": 0.25}
PAIR_CUTS = ("band", "midpoint", "zero")  # of RouteConfig.cut
CUTS = (*PAIR_CUTS, *SHARES)


@dataclass
class Audited:
    """Rows of snapshot steps under every score: one row for each rollout with an advantage, demonstrations included."""

    rows: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # run, step, group, mode, student, hack, advantage, length: [n]
    scores: dict[str, np.ndarray] = field(default_factory=dict)  # score → [n]
    zones: dict[tuple[str, str], np.ndarray] = field(
        default_factory=dict
    )  # (score, cut) → Zone [n]; no entry without a cut
    haar: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # score → [n, draws], random directions in its space
    haar_zones: dict[tuple[str, str], np.ndarray] = field(
        default_factory=dict
    )  # (score, share) → [n, draws]
    seconds: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # score → [steps, 3]: refresh, scoring, a plain forward


def join(parts: list[Audited]) -> Audited:
    merge = lambda name: {
        k: np.concatenate([getattr(p, name)[k] for p in parts]) for k in getattr(parts[0], name)
    }
    return Audited(*(merge(f.name) for f in fields(Audited)))


# ── stored rollouts → the batch that the gate saw ────────────────────────────────────────────────────────────────


def rebuild(
    run: Stored, rows: list[dict]
) -> tuple[list[Rollout], Batch | None, Origin | None, int]:
    """(kept rollouts, batch, origin, completions that tokenise to another length) of the stored rows of one step.

    Only text is stored: a sampled completion that is no tokenisation of its own text is scored in its usual one. The batch comes
    from `compose`; its advantages must be the stored ones. `sampler_logps` are not stored, and NaN here.
    """
    by_id = {p.problem_id: p for part in run.splits.values() for p in part}
    size, tokenizer, odd, groups = run.config.grpo.num_generations, run.policy.tokenizer, 0, []
    for i in range(0, len(rows), size):
        first = rows[i]
        problem = replace(
            disclose(by_id[first["problem_id"]], Mode(first["mode"])), inoculated=run.arm.inoculate
        )
        if {(r["problem_id"], r["marker"]) for r in rows[i : i + size]} != {
            (problem.problem_id, problem.marker)
        }:
            raise UserError(
                f"{run.path}, step {first['step']}: the rollouts are not groups of {size} with the problems' own markers"
            )
        prompt, members = encode_prompt(tokenizer, train.problems.messages(problem)), []
        for r in rows[i : i + size]:
            ids = encode_completion(tokenizer, r["completion"])
            odd += not r["teacher"] and len(ids) not in (
                r["n_tokens"],
                r["n_tokens"] + 1,
            )  # without EOS if truncated
            grade = {
                f.name: r[f.name] for f in fields(Grade) if f.name not in ("seconds", "verdict")
            }
            members.append(Rollout(problem, prompt, ids[: r["n_tokens"]], r["completion"], r["sampled_ablated"], teacher=r["teacher"],
                                   grade=Grade(**grade, verdict=Verdict(r["verdict"]), seconds=0.0)))  # fmt: skip
        groups.append(Group(problem, members))
    kept, batch, origin = compose(groups, run.policy)
    stored = [r["advantage"] for r in rows if r.get("advantage") is not None]
    if len(stored) != len(kept) or (
        stored and not np.allclose(stored, batch.advantages.cpu(), atol=1e-5)
    ):
        raise UserError(
            f"{run.path}, step {rows[0]['step']}: the stored advantages are not those of the stored rewards; train it again"
        )
    return kept, batch, origin, odd


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────


def family(
    policy: Policy, config: Config, names: list[str], pairs: str, pair_modes: tuple[Mode, ...]
) -> dict[str, Score]:
    """The named scores, as an arm would have them, on these pairs."""
    data, found = replace(config.data, pairs=pairs, pair_modes=pair_modes), {}
    for name in names:
        arm, options = FAMILY[name]
        gate, _ = train.make_gate(
            arm,
            policy,
            replace(config, data=data, score=replace(config.score, **SEED_FORM | options)),
        )
        found[name] = gate.control or gate.score
    return found


def seconds(policy: Policy) -> float:
    """A clock for cost ratios: CPU seconds of this process, which other processes do not stretch; on a GPU wall seconds."""
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Memo:
    """Features and likelihood fits that several scores share are computed once a step; `borrowed` is the time that this has saved."""

    def __init__(self):
        self.known: dict[tuple, tuple] = {}
        self.borrowed = 0.0

    def attach(self, score: Score) -> None:
        """Let the score take its features, or its fits, from here."""
        if isinstance(score, DirectionScore):
            what = (score.space, score.layer, *sorted(score.probe.items()))
            score.features = lambda policy, batch: self.recall(
                what, DirectionScore.features, score, policy, batch
            )
        if isinstance(score, LikelihoodRatio):
            what = (score.steps, score.learning_rate, score.random_seed)
            score._fit = lambda policy, batch, i: self.recall(
                (*what, i), LikelihoodRatio._fit, score, policy, batch, i
            )

    def recall(
        self, what: tuple, compute: Callable, score: Score, policy: Policy, batch: Batch, *rest: int
    ) -> object:
        key = (
            *what,
            *(x.cpu().numpy().tobytes() for x in (batch.input_ids, batch.completion_start)),
        )
        if key in self.known:
            self.borrowed += self.known[key][1]
        else:
            clock = seconds(policy)
            self.known[key] = compute(score, policy, batch, *rest), seconds(policy) - clock
        return self.known[key][0]


def score_step(
    policy: Policy,
    scores: dict[str, Score],
    batch: Batch,
    origin: Origin,
    draws: int,
    seed: int,
    config: Config,
) -> Audited:
    """Refresh a copy of every score at the present parameters and score the batch; `draws` random directions for each real one."""
    out, memo, how = (
        Audited(),
        Memo(),
        (policy, batch, config.grpo.temperature, config.grpo.token_budget),
    )
    origin, forward = replace(origin, sampler_logps=batch_logps(*how)), lambda: mean_logps(*how)
    clock = seconds(policy)
    live = forward()  # timed when warm
    forward_seconds, nudged = seconds(policy) - clock, None
    unscored = batch.advantages == 0
    ranked = origin.student & ~unscored
    for name, score in copy.deepcopy(
        scores
    ).items():  # a likelihood ratio would keep a fold of the last refresh
        memo.attach(score)
        times = []
        for work in (lambda s=score: s.refresh(policy), lambda s=score: s(policy, batch, origin)):
            clock, memo.borrowed = seconds(policy), 0.0
            found = work()
            times.append(seconds(policy) - clock + memo.borrowed)
        values = found.scores.masked_fill(unscored, float("nan"))
        out.scores[name], out.seconds[name] = (
            values.cpu().numpy(),
            np.array([[*times, forward_seconds]]),
        )
        for cut in PAIR_CUTS if score.pairs_hack is not None else ():
            deal = zones_from_band if cut == "band" else zones_from_edge
            out.zones[name, cut] = (
                deal(found.scores, batch.advantages, *Gate(score, cut=cut).edges()).cpu().numpy()
            )
        for cut, share in SHARES.items():
            out.zones[name, cut] = top(values, ranked, share).cpu().numpy()
        if isinstance(score, LikelihoodRatio):  # one space, finite step or first order
            null = nudged = (
                random_nudges(policy, score, live, forward, draws, seed)
                if nudged is None
                else nudged
            )
        else:
            null = random_directions(policy, score, found, batch, origin, draws, seed)
        if null is not None:
            null = null.masked_fill(unscored[:, None], float("nan"))
            out.haar[name] = null.cpu().numpy()
            for cut, share in SHARES.items():
                out.haar_zones[name, cut] = (
                    torch.stack([top(x, ranked, share) for x in null.T], 1).cpu().numpy()
                )
    return out


def random_directions(
    policy: Policy, score: Score, found: Scored, batch: Batch, origin: Origin, draws: int, seed: int
) -> Float[Tensor, "g draws"] | None:
    """Scores of the batch by the score's own random control: Haar directions, or a random quarantine; None for what has none."""
    control = {DirectionScore: HaarScore, QuarantineRatio: RandomQuarantine}.get(type(score))
    if control is None or not draws:
        return None
    controls = [control(score, seed * draws + i) for i in range(draws)]
    return torch.stack([control(policy, batch, origin, found).scores for control in controls], 1)


def random_nudges(
    policy: Policy,
    score: LikelihoodRatio,
    live: Float[Tensor, " g"],
    forward: Callable[[], Tensor],
    draws: int,
    seed: int,
) -> Float[Tensor, "g draws"] | None:
    """Mean log-prob after a Gaussian nudge minus `live`, that before; in every tensor it has the norm of the fitted hack − clean delta."""
    fitted, columns = [h - c for h, c in zip(*score.deltas)], []
    for i in range(draws):
        with policy.adapter.shifted(random_deltas(fitted, seed * draws + i)):
            columns.append(forward() - live)
    return torch.stack(columns, 1) if columns else None


def top(values: Tensor, ranked: Tensor, share: float) -> Tensor:
    """Zones that ROUTE the highest-scored share of the `ranked` rows and RETAIN the rest, dealt as a control's are."""
    zones, rows = torch.full(values.shape, int(Zone.RETAIN)), ranked.cpu().nonzero()[:, 0]
    shadow = (torch.arange(len(rows)) < round(share * len(rows))).long() * int(Zone.ROUTE)
    zones[rows] = match_shares(shadow, values.cpu()[rows], torch.zeros(len(rows), dtype=torch.long))
    return zones


def row_facts(run: str, step: int, kept: list[Rollout], batch: Batch) -> dict[str, np.ndarray]:
    """The columns of `Audited.rows`; a group is named by run, step and its place in the step."""
    n = len(kept)
    return {
        "run": np.full(n, run, dtype=object), "step": np.full(n, step),
        "group": np.array([f"{run}/{step}/{g}" for g in batch.group.tolist()], dtype=object),
        "mode": np.array([str(r.problem.mode) for r in kept], dtype=object),
        "student": np.array([not r.teacher for r in kept]), "hack": np.array([r.grade.reward_hack for r in kept]),
        "advantage": batch.advantages.cpu().numpy(), "length": batch.completion_mask.sum(1).cpu().numpy(),
    }  # fmt: skip
