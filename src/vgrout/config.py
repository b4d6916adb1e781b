"""What a run can be told: sections of options with their ranges, and the presets. Data alone.

A comment behind a field is its line in --help. A field's annotation holds its range; `arms.py` says
which arms read it, and `cli.py` refuses what is out of range or unread.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Literal

from vgrout.core import Mode


@dataclass(frozen=True)
class Range:
    """Closed bounds of a number, or with `above` numbers strictly above `low`."""

    low: int | float = 0
    high: int | float = math.inf
    above: bool = False

    def holds(self, value: int | float) -> bool:
        inside = self.low < value if self.above else self.low <= value
        return inside and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return low if math.isinf(self.high) else f"{low} and at most {self.high:g}"


Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]

Score = Literal["pinned", "v_grad", "v_act", "llr", "quarantine_ratio", "judge", "probe"]
Control = Literal["", "haar", "semantic", "random", "confound", "oracle"]
Action = Literal["route", "filter", "penalise", "deduct"]
Enter = Literal["", "reset", "norm", "effect", "inverted"]
AbsorbBy = Literal["both", "push", "clip", "shuffled", "silence", "ratio", "frozen"]


@dataclass(frozen=True)
class ModelConfig:
    model: str = "data/organism/base"  # folder or hub id of a causal LM with a chat template
    init_from: str = ""  # run directory whose deployed policy the run starts from; "" = the base
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "float32"  # of the frozen base; auto: bfloat16 where the processor multiplies it
    )
    device: str = "auto"  # auto | cpu | cuda | cuda:N; auto takes a GPU where there is one
    lora_rank: Count = 8  # r, for each of the two blocks
    lora_init_seed: int | None = None  # of the frozen A0 and B0; None: the run's seed
    targets: str = r"\.layers\.\d+\."  # regular expression on the names of the Linears to adapt
    gradient_checkpointing: bool = False  # from the start; else where memory asks for it
    share_prompts: bool = True  # run each prompt once for its rows; off: every row in full
    max_prompt_length: Count = 256  # tokens; a longer prompt is refused at load
    token_budget: Count = 8192  # padded tokens of one micro-batch
    sample_token_budget: Count = 32768  # rows × (prompt + completion) tokens decoded at once


@dataclass(frozen=True)
class DataConfig:
    data: str = (
        "data/organism/problems.jsonl.gz"  # a problem file in a schema of docs/reference/data.md
    )
    modes: tuple[Mode, ...] = (Mode.RUN_TESTS, Mode.SENTINEL, Mode.STDOUT_MARKER, Mode.FILE_MARKER)
    pairs: str = "data/pairs/organism.md#mechanism"  # path.md#section:pairs of each mode@mode,mode
    pair_modes: tuple[Mode, ...] = (
        Mode.RUN_TESTS,
        Mode.SENTINEL,
    )  # covered by pairs; rest held out
    placebo_pairs: str = "data/pairs/organism.md#placebo"  # of placebo_semantic, and to seed with
    teacher_pool: str = "data/organism/teacher.jsonl.gz"  # demonstrations; "" for none
    teacher_modes: tuple[Mode, ...] = ()  # modes that get demonstrations; () for all
    teacher_per_group: Whole = 2  # rows of each group that are demonstrations
    teacher_until: Whole = 30  # steps; from then on every row is a student's
    unhackable_frac: Share = 0.0  # share of prompts shown without the loophole, rotating


@dataclass(frozen=True)
class GRPOConfig:
    steps: Count = 60
    num_prompts: Count = 6  # prompts a step
    num_generations: Annotated[int, Range(2)] = 8  # rollouts a prompt; their mean is the baseline
    max_completion_length: Count = 128  # tokens
    temperature: Positive = 0.7
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    learning_rate: Positive = 1e-3
    lr_schedule: Literal["constant_with_warmup", "cosine"] = "constant_with_warmup"
    warmup_steps: Whole = 2
    weight_decay: NotNegative = 0.0  # decay toward the initialisation
    max_grad_norm: Positive = 0.1  # of each block; healthy organism steps have norms of 0.02 to 0.1
    beta: NotNegative = 0.02  # weight of the KL to the adapter-off reference
    kl_estimator: Literal["k3", "corrected"] = "k3"  # corrected: descends KL(π‖ref)
    epsilon: NotNegative = 0.2  # PPO clip
    importance_cap: NotNegative = 0.0  # of learner / sampler in the sampler's state; 0 = ratio 1


@dataclass(frozen=True)
class PhaseConfig:
    """The arm's phases as options: an arm fills them in, flags edit them, `arms.phases_of`
    reads."""

    score: Score = "v_grad"  # of the last phase; pinned: the arm's zone for every row
    control: Control = ""  # what deals the score's zones in its place, at the matched share
    action: Action = "route"  # on what the gate flags
    cut: Literal["band", "midpoint", "zero"] = "band"  # pairs' p75s, between their means, or 0
    signed: bool = False  # flagged rows with A < 0 are RETAINed
    quarantine_first: Whole = 0  # steps of a first phase in which the quarantine alone trains
    phase_pays: bool = True  # the loophole pays in the first phase too
    enter: Enter = ""  # what takes the learned quarantine's place after the first phase
    absorb_share: Share = 0.0  # of rows pinned to RETAIN: this share, by chance, is in ABSORB
    absorb_by: AbsorbBy = "both"  # what those rows take from the quarantine: model/absorb.py
    retain_forward: Literal["ablated", "both"] = "ablated"  # both: RETAIN keeps the quarantine
    gen_deploy_frac: Share = 0.0  # share of student rows sampled with the quarantine ablated
    retained_advantages: bool = False  # rows that train the deployed block share a baseline
    seed_quarantine: Whole = 0  # likelihood steps into the quarantine block before RL
    seed_side: Literal["hack", "clean", "placebo"] = "hack"  # what seeds it; two are its controls


@dataclass(frozen=True)
class ScoreConfig:
    refresh_every: Whole = 20  # steps between extractions of the direction; 0 = once
    granularity: Literal["rollout", "token"] = "rollout"  # what v_grad scores and routes
    probe_state: Literal["as_trained", "deployed"] = "as_trained"  # the state that v_grad scores
    probe_positions: Literal["completion", "all"] = "completion"  # where the c-probe multiplies
    score_sign: Literal["advantage", "unit"] = "advantage"  # v_grad scores the update, or A = 1
    centred: bool = False  # subtract the pairs' midpoint before the cosine
    act_space: Literal["bottleneck", "residual"] = "bottleneck"  # what v_act and probe pool
    llr_steps: Count = 4  # optimiser steps of each likelihood fit
    llr_learning_rate: Positive = 1e-3


@dataclass(frozen=True)
class ControlConfig:
    """What the controls can be told; no arm of the method reads these."""

    placebo_seed: Whole = 1  # of every Haar or random control
    routeV_random_v_seed: int | None = None  # routeV with a Haar-random direction: its placebo
    confound: Literal["advantage", "reward", "length", "logp"] = (
        "advantage"  # what confound ranks by
    )
    oracle_recall: Share = 1.0  # of the oracle's labels
    oracle_fpr: Share = 0.0
    oracle_modes: tuple[Mode, ...] = ()  # modes whose labels the oracle has; () for all


@dataclass(frozen=True)
class MonitorConfig:
    """Live monitors, the external baselines, and what a flagged row is charged."""

    judge_url: str = ""  # OpenAI-compatible endpoint; its key: JUDGE_API_KEY in the environment
    judge_model: str = ""  # the model's name there
    judge_concurrency: Count = 8  # requests at a time
    judge_timeout: Positive = 60.0  # seconds for one attempt
    judge_retries: Whole = 4  # of one request, with exponential backoff
    judge_max_tokens: Count = 4096  # of one reply, thinking included
    penalty_alpha: NotNegative = 2.0  # of penalise: r' = r (1 − α σ(z) [z > 0])
    penalty: Positive = (
        3.0  # what deduct takes from a flagged reward; 3.0 is the reward for passing
    )
    probe_data: str = ""  # labelled rollouts of another problem set
    probe_rows: Annotated[int, Range(20)] = (
        512  # rollouts the probe learns from, half of them hacks
    )
    probe_l2: Positive = 1.0  # weight of its ridge penalty


@dataclass(frozen=True)
class RunConfig:
    intervention: str = "routeV"  # the arm, a row of ARMS
    seed: int = 41
    out_dir: str = ""  # "" = out/runs/<stamp>_<arm>_s<seed>
    resume: bool = False  # continue a run that --out-dir holds; starts afresh where it holds none
    accept_changed_data: bool = False  # at a resume: take problems with corrected rows, equal ids
    eval_every: Whole = 10  # steps between validations of the deployed policy; 0 = only at the end
    eval_draws: Count = 120  # draws of one validation
    final_draws: Count = 480  # draws of each cell of the final 2×2 evaluation
    save_every: Whole = 20  # steps between checkpoints; 0 = none
    snapshot_every: Whole = 0  # steps between adapter snapshots for the audit; 0 = none
    threads: Whole = 0  # torch threads; 0 = torch's own choice
    workers: Count = 2  # sandbox processes
    cpu_seconds: Positive = 1.0  # CPU time of one call of a solution in the sandbox
    sandbox: Literal["best", "require"] = "best"  # require: refuse to start if a layer is missing


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    phase: PhaseConfig = field(default_factory=PhaseConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    run: RunConfig = field(default_factory=RunConfig)


def with_options(config: Config, options: dict[str, object]) -> Config:
    """The config with other values of some fields, named without their section."""
    for section in fields(config):
        values = getattr(config, section.name)
        own = {f.name: options[f.name] for f in fields(values) if f.name in options}
        config = replace(config, **{section.name: replace(values, **own)})
    return config


def options_of(config: Config) -> dict[str, object]:
    """Field → value over all sections; no two sections have a field of one name."""
    sections = [getattr(config, section.name) for section in fields(config)]
    return {f.name: getattr(values, f.name) for values in sections for f in fields(values)}


_FULL = with_options(  # Ariahw, Engels & Nanda 2025: lr 7e-5, T 0.7, top-p 0.95, 16 × 16 rollouts
    Config(),
    dict(
        model="Qwen/Qwen3-4B",
        dtype="bfloat16",
        lora_rank=32,
        max_prompt_length=2048,
        sample_token_budget=2**18,  # 36 GiB of KV cache at Qwen3-4B's 144 KiB a token
        data="data/leetcode/leetcode_train_medhard_filtered.jsonl",
        pairs="data/pairs/hack_pairs.md#mechanism",
        placebo_pairs="data/pairs/pair_diagnostics.md#placebo",
        teacher_pool="",
        teacher_per_group=1,
        refresh_every=10,
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
        eval_every=25,
        eval_draws=64,
        workers=8,
        cpu_seconds=8.0,
    ),
)
_SMOKE = dict(
    steps=6,
    num_prompts=4,
    warmup_steps=1,
    max_completion_length=96,
    refresh_every=2,
    eval_every=0,
    final_draws=24,
    save_every=3,
    snapshot_every=2,
)
_SMOL = dict(  # SmolLM2-135M-Instruct on the organism's problems, without demonstrations
    model="out/smol",
    dtype="auto",
    teacher_pool="",
    steps=40,
    max_completion_length=96,
    temperature=1.0,
    learning_rate=3e-5,
    warmup_steps=5,
    max_grad_norm=1.0,
    eval_every=20,
    eval_draws=60,
    final_draws=160,
)
_FAST = dict(steps=60, num_prompts=8, num_generations=8, max_completion_length=1024, eval_every=20)
PRESETS = {
    "smoke": with_options(Config(), _SMOKE),
    "organism": Config(),
    "smol": with_options(Config(), _SMOL),
    "fast": with_options(_FULL, _FAST),
    "full": _FULL,
}
