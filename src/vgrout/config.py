"""The configuration: what a run can be told, the presets, and the arms. Data alone; `cli.py` checks it, `train.py` reads it.

A comment behind a field is its line in --help.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from vgrout.core import Mode, Zone


@dataclass(frozen=True)
class ModelConfig:
    model: str = "data/organism/base"  # folder or hub id of a causal LM with a chat template
    init_from: str = (
        ""  # run directory whose deployed policy the run starts from; "" = the base model
    )
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the frozen base; the adapter trains in fp32
    )
    score_dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the products in v_grad and llr; auto: bfloat16 if the device has it
    )
    device: str = "auto"  # auto | cpu | cuda; auto takes a GPU where there is one
    lora_rank: int = 8  # r, for each of the two blocks
    lora_init_seed: int = 0  # of the frozen A0 and B0
    targets: str = (
        r"\.layers\.\d+\."  # regular expression on the qualified names of the Linears to adapt
    )
    gradient_checkpointing: bool = False
    share_prompts: bool = True  # run each prompt once for the rows that share it; off: every row in full, the same function
    max_prompt_length: int = 256  # tokens; a longer prompt is refused at load
    sample_token_budget: int = (
        32768  # rows × (prompt + completion) tokens that are decoded at once: bounds the KV cache
    )


@dataclass(frozen=True)
class DataConfig:
    data: str = (
        "data/organism/problems.jsonl.gz"  # a problem file in any of the schemas of docs/data.md
    )
    modes: tuple[Mode, ...] = (Mode.RUN_TESTS, Mode.SENTINEL, Mode.STDOUT_MARKER, Mode.FILE_MARKER)
    pairs: str = "data/pairs/organism.md#mechanism"  # path.md#section:pairs of each mode@mode,mode
    pair_modes: tuple[Mode, ...] = (
        Mode.RUN_TESTS,
        Mode.SENTINEL,
    )  # the modes that the pairs cover; the rest are held out
    teacher_pool: str = "data/organism/teacher.jsonl.gz"  # "" for none
    teacher_modes: tuple[Mode, ...] = ()  # modes that get teacher rows; () for all
    teacher_per_group: int = 2  # rows of each group that are demonstrations
    teacher_until: int = 30  # steps; from then on every row is a student's
    unhackable_frac: float = (
        0.0  # share of prompts shown without the loophole, rotating by (seed, step, problem)
    )


@dataclass(frozen=True)
class GRPOConfig:
    steps: int = 60
    num_prompts: int = 6  # prompts a step
    num_generations: int = 8  # rollouts a prompt
    max_completion_length: int = 128  # tokens
    temperature: float = 0.7
    top_p: float = 1.0
    learning_rate: float = 1e-3
    lr_schedule: Literal["constant_with_warmup", "cosine"] = "constant_with_warmup"
    warmup_steps: int = 2
    weight_decay: float = 0.0  # decay toward the initialisation
    max_grad_norm: float = (
        0.1  # for each block by itself; healthy organism steps have norms of 0.02 to 0.1
    )
    beta: float = 0.02  # weight of the k3 KL to the adapter-off reference
    epsilon: float = 0.2  # PPO clip
    token_budget: int = 8192  # padded tokens of one micro-batch


@dataclass(frozen=True)
class ScoreConfig:
    refresh_every: int = (
        20  # steps between extractions of the direction; 0 = frozen after the first
    )
    granularity: Literal["rollout", "token"] = "rollout"  # what v_grad scores and routes
    probe_state: Literal["as_trained", "deployed"] = (
        "as_trained"  # the policy state that v_grad scores
    )
    probe_positions: Literal["completion", "all"] = (
        "completion"  # where the c-probe multiplies; all: the prompt's too
    )
    score_sign: Literal["advantage", "unit"] = (
        "advantage"  # v_grad scores the update, or the completion (A = 1)
    )
    centred: bool = False  # subtract the pairs' midpoint before the cosine
    metric: Literal["cosine", "dot"] = "cosine"
    act_space: Literal["bottleneck", "residual"] = "bottleneck"  # what v_act pools
    act_layer: int | None = None  # residual layer; None = all
    llr_steps: int = 4  # optimiser steps of each likelihood fit
    llr_learning_rate: float = 1e-3
    llr_form: Literal["ratio", "one_sided", "first_order"] = (
        "ratio"  # of the two nudges' likelihoods, see docs/method.md
    )
    confound: Literal["advantage", "reward", "length", "logp"] = (
        "advantage"  # what the arms confound_* rank by
    )
    placebo_pairs: str = "data/pairs/organism.md#placebo"  # of placebo_semantic
    framing_pairs: str = "data/pairs/organism.md#framing"  # of the framing control


@dataclass(frozen=True)
class RouteConfig:
    cut: Literal["band", "midpoint", "zero"] = (
        "band"  # of a score: the pairs' p75s, halfway between their sides' means, or 0
    )
    quarantine_first: int = 0  # first steps in which the quarantine alone trains, on every row: plain GRPO with the deployed block at rest
    absorb_share: float = (
        0.0  # of an arm that RETAINs all: this share of the rows, by chance, is in ABSORB
    )
    signed: bool = False  # flagged rows with A < 0 are RETAINed
    retain_forward: Literal["ablated", "both"] = (
        "ablated"  # both: RETAIN keeps the quarantine, stop-gradient
    )
    gen_deploy_frac: float = 0.0  # share of student rollouts sampled with the quarantine ablated
    retained_advantages: bool = (
        False  # rows that train the deployed block take their baseline from those rows alone
    )
    seed_quarantine: int = 0  # likelihood steps into the quarantine block before RL
    seed_side: Literal["hack", "clean", "placebo"] = (
        "hack"  # completions that seed it; clean and placebo are its controls
    )
    penalty_alpha: float = 2.0  # of advantage modification: r' = r (1 − α σ(z) [z > 0])
    oracle_recall: float = 1.0  # of the arm oracle's labels
    oracle_fpr: float = 0.0
    oracle_modes: tuple[Mode, ...] = ()  # modes whose labels the oracle has; () for all
    placebo_seed: int = 1  # of every Haar or random control
    routeV_random_v_seed: int | None = (
        None  # with routeV: a Haar-random direction at the matched routed share (placebo)
    )


@dataclass(frozen=True)
class MonitorConfig:
    """Live monitors, the external baselines: used by the arms of `Arm.monitor` alone, and not by the method."""

    judge_url: str = ""  # of an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1; its key: JUDGE_API_KEY in the environment
    judge_model: str = ""  # the model's name there
    judge_concurrency: int = 8  # requests at a time
    judge_timeout: float = 60.0  # seconds for one attempt
    judge_retries: int = 4  # of one request, with exponential backoff
    judge_max_tokens: int = 512  # of one reply; more for a judge that thinks first
    penalty: float = 3.0  # taken from a flagged rollout's reward by the arms penalty*; 3.0 is the reward for passing
    probe_data: str = (
        ""  # labelled rollouts of another problem set, e.g. another run's rollouts.jsonl.gz
    )
    probe_rows: int = 512  # rollouts that the probe learns from, hacks and others in equal number
    probe_l2: float = 1.0  # weight of its ridge penalty


@dataclass(frozen=True)
class RunConfig:
    intervention: str = "routeV"  # the arm, a row of ARMS
    seed: int = 41
    out_dir: str = ""  # "" = out/runs/<stamp>_<arm>_s<seed>
    resume: bool = (
        False  # continue a run that --out-dir holds; starts from the beginning where it holds none
    )
    eval_every: int = 10  # steps between validations of the deployed policy; 0 = only at the end
    eval_draws: int = 120  # draws of one validation
    final_draws: int = 480  # draws of each cell of the final 2×2 evaluation
    save_every: int = 20  # steps between checkpoints; 0 = none
    snapshot_every: int = 0  # steps between snapshots of the adapter and gradient norms by label, for the audit; 0 = none
    track: str = ""  # trackio | wandb | tensorboard mirrors metrics.jsonl; "" for none
    threads: int = 0  # torch threads; 0 = torch's own choice
    workers: int = 2  # sandbox processes
    cpu_seconds: float = 1.0  # CPU time of one call of a solution in the sandbox
    sandbox: Literal["best", "require"] = "best"  # require: refuse to start if a layer is missing


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    route: RouteConfig = field(default_factory=RouteConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    run: RunConfig = field(default_factory=RunConfig)


# options younger than some records, by section, with what was done before there was a choice
ADDED = {"model": {"score_dtype": "float32"}, "route": {"absorb_share": 0.0}}


@dataclass(frozen=True)
class Arm:
    """A score, the control that deals its zones if any, what is done with flagged rows, and the state that is deployed."""

    score: Literal[
        "pinned", "v_grad", "v_act", "llr", "quarantine_ratio", "oracle", "judge", "probe"
    ]
    control: Literal["", "haar", "semantic", "framing", "random", "confound"] = (
        ""  # at the score's matched routed share
    )
    action: Literal["route", "filter", "penalise", "deduct"] = "route"
    deployed: Literal["ablated", "as_trained"] = "ablated"
    zone: Zone = Zone.ABSORB  # of a pinned score
    loophole_pays: bool = True
    phase_pays: bool = True  # so it does in the first phase, too
    inoculate: bool = False  # the training prompt allows the exploit; evaluation does not
    options: dict[str, Any] = field(
        default_factory=dict
    )  # the arm's own defaults, by a field's name in any section; flags change them
    quarantine: Literal["learned", "reset", "norm", "effect", "inverted"] = (
        "learned"  # after the first phase; else its rival
    )
    oracle: bool = False  # reads true labels: not oracle-free, marked so everywhere

    @property
    def trains(self) -> Zone:
        """The zone of rows that an action other than `route` leaves to train: what is deployed learns from them."""
        return Zone.ABSORB if self.deployed == "as_trained" else Zone.RETAIN

    @property
    def zones(self) -> tuple[Zone, ...]:
        """Those that one update may mix, the first phase aside, in which all is ROUTE."""
        if self.action != "route":
            return (self.trains,)
        return (
            tuple(dict.fromkeys((self.zone, Zone.ABSORB)))
            if self.score == "pinned"
            else tuple(Zone)
        )

    @property
    def monitor(self) -> str:
        """The live monitor that training needs, marked so everywhere; "" for none, as in the method itself."""
        return self.score if self.score in ("judge", "probe") else ""

    @property
    def reads_pairs(self) -> bool:
        return self.score not in ("pinned", "oracle", "judge", "probe")


QUARANTINE_FIRST = dict(  # demonstrations end with the first phase, so that none of them trains the deployed block or meets a gate
    quarantine_first=20, teacher_until=20, gen_deploy_frac=1.0, retained_advantages=True, cut="zero"
)
ABSORB_SHARE = QUARANTINE_FIRST | dict(absorb_share=0.3)

ARMS = {
    "none": Arm("pinned", zone=Zone.RETAIN),
    "none2r": Arm("pinned", deployed="as_trained"),
    "no_loophole": Arm("pinned", deployed="as_trained", loophole_pays=False),
    "absorb": Arm("pinned"),
    "inoculate": Arm("pinned", deployed="as_trained", inoculate=True),
    "routeV": Arm("v_grad"),
    "routeA": Arm("v_act"),
    "routeL": Arm("llr"),
    "routeQ": Arm("quarantine_ratio", options=QUARANTINE_FIRST),
    "placebo": Arm("v_grad", "haar"),
    "placeboA": Arm("v_act", "haar"),
    "placeboL": Arm("llr", "haar"),
    "placeboQ": Arm("quarantine_ratio", "haar", options=QUARANTINE_FIRST),
    "random_gateQ": Arm("quarantine_ratio", "random", options=QUARANTINE_FIRST),
    "confound_gateQ": Arm("quarantine_ratio", "confound", options=QUARANTINE_FIRST),
    "no_gateQ": Arm("pinned", zone=Zone.RETAIN, options=QUARANTINE_FIRST),
    "absorbQ": Arm("pinned", zone=Zone.RETAIN, options=ABSORB_SHARE),
    "reset_absorbQ": Arm("pinned", zone=Zone.RETAIN, options=ABSORB_SHARE, quarantine="reset"),
    "solver_absorbQ": Arm(
        "pinned", zone=Zone.RETAIN, options=ABSORB_SHARE, quarantine="reset", phase_pays=False
    ),
    "placebo_absorbQ": Arm("pinned", zone=Zone.RETAIN, options=ABSORB_SHARE, quarantine="norm"),
    "matched_absorbQ": Arm("pinned", zone=Zone.RETAIN, options=ABSORB_SHARE, quarantine="effect"),
    "inverted_absorbQ": Arm(
        "pinned", zone=Zone.RETAIN, options=ABSORB_SHARE, quarantine="inverted"
    ),
    "filterQ": Arm("quarantine_ratio", action="filter", options=QUARANTINE_FIRST),
    "penaltyQ": Arm("quarantine_ratio", action="deduct", options=QUARANTINE_FIRST),
    "advmodQ": Arm("quarantine_ratio", action="penalise", options=QUARANTINE_FIRST),
    "placebo_semantic": Arm("v_grad", "semantic"),
    "framing": Arm("v_grad", "framing"),
    "random_gate": Arm("v_grad", "random"),
    "confound_gate": Arm("v_grad", "confound"),
    "filterV": Arm("v_grad", action="filter", deployed="as_trained"),
    "filterA": Arm("v_act", action="filter", deployed="as_trained"),
    "filterL": Arm("llr", action="filter", deployed="as_trained"),
    "advmodV": Arm("v_grad", action="penalise", deployed="as_trained"),
    "advmodA": Arm("v_act", action="penalise", deployed="as_trained"),
    "advmodL": Arm("llr", action="penalise", deployed="as_trained"),
    "placebo_advmodL": Arm("llr", "haar", action="penalise", deployed="as_trained"),
    "confound_advmodL": Arm("llr", "confound", action="penalise", deployed="as_trained"),
    "oracle": Arm("oracle", oracle=True),
    "filter_oracle": Arm("oracle", action="filter", deployed="as_trained", oracle=True),
    # external baselines, each with a live monitor: J an LLM judge (--judge-url), P a probe with another environment's labels (--probe-data)
    "penaltyJ": Arm("judge", action="deduct", deployed="as_trained"),
    "filterJ": Arm("judge", action="filter", deployed="as_trained"),
    "routeJ": Arm("judge"),
    "penaltyP": Arm("probe", action="deduct", deployed="as_trained"),
    "filterP": Arm("probe", action="filter", deployed="as_trained"),
    "routeP": Arm("probe"),
}

_ORGANISM = Config()
_QWEN = Config(  # Ariahw, Engels & Nanda 2025: lr 7e-5, T 0.7, top-p 0.95, 16 × 16 rollouts, 200 steps
    model=ModelConfig(
        model="Qwen/Qwen3-4B",
        dtype="bfloat16",
        lora_rank=32,
        gradient_checkpointing=True,
        max_prompt_length=2048,
        sample_token_budget=2**18,  # 36 GiB of KV cache at Qwen3-4B's 144 KiB a token
    ),  # fmt: skip
    data=DataConfig(
        data="data/leetcode/leetcode_train_medhard_filtered.jsonl",
        modes=tuple(m for m in Mode if m is not Mode.GT_ONLY),
        pairs="data/pairs/leetcode.md#mechanism",
        teacher_pool="",
        teacher_per_group=1,
        teacher_until=30,
    ),
    score=ScoreConfig(
        refresh_every=10
    ),  # the controls' pairs are the organism's: there are none on real-sized problems yet (TODO)
    grpo=GRPOConfig(
        steps=200,
        num_prompts=16,
        num_generations=16,
        max_completion_length=1536,
        top_p=0.95,
        learning_rate=7e-5,
        lr_schedule="cosine",
        warmup_steps=10,
        weight_decay=0.1,
        max_grad_norm=1.0,
        beta=1e-3,
        token_budget=16384,
    ),  # fmt: skip
    run=RunConfig(eval_every=25, eval_draws=64, workers=8, cpu_seconds=8.0),
)
PRESETS = {
    "smoke": replace(
        _ORGANISM,
        grpo=replace(
            _ORGANISM.grpo, steps=6, num_prompts=4, warmup_steps=1, max_completion_length=96
        ),
        score=replace(_ORGANISM.score, refresh_every=2),
        run=replace(_ORGANISM.run, eval_every=0, final_draws=24, save_every=3, snapshot_every=2),
    ),
    "organism": _ORGANISM,
    "fast": replace(
        _QWEN,
        grpo=replace(
            _QWEN.grpo, steps=60, num_prompts=8, num_generations=8, max_completion_length=1024
        ),
        run=replace(_QWEN.run, eval_every=20),
    ),
    "full": _QWEN,
}


def defaults(preset: str, intervention: str) -> Config:
    """The preset with the arm's own options; an unknown arm has none."""
    config, arm = PRESETS[preset], ARMS.get(intervention)
    for section in fields(config) if arm else ():
        values = getattr(config, section.name)
        own = {f.name: arm.options[f.name] for f in fields(values) if f.name in arm.options}
        config = replace(config, **{section.name: replace(values, **own)})
    return config
