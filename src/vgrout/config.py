"""Presets, arms and the command line: data, checked before anything heavy is imported. Only `train.py` reads a Config.

    python -m vgrout.train PRESET [--flag value …]
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import tyro

from vgrout.types import Mode, UserError, Zone


@dataclass(frozen=True)
class ModelConfig:
    model: str = "data/organism/base"  # folder or hub id of a causal LM with a chat template
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen base; the adapter trains in fp32
    device: str = "auto"  # auto | cpu | cuda; auto takes a GPU where there is one
    lora_rank: int = 8  # r, for each of the two blocks
    lora_init_seed: int = 0  # of the frozen A0 and B0
    targets: str = r"\.layers\.\d+\."  # regular expression on the qualified names of the Linears to adapt
    gradient_checkpointing: bool = False
    max_prompt_length: int = 256  # tokens; a longer prompt is refused at load


@dataclass(frozen=True)
class DataConfig:
    data: str = "data/organism/problems.jsonl.gz"  # a problem file in any of the schemas of docs/data.md
    modes: tuple[Mode, ...] = (Mode.RUN_TESTS, Mode.SENTINEL, Mode.STDOUT_MARKER, Mode.FILE_MARKER)
    pairs: str = "data/pairs/organism.md#mechanism"  # path.md#section@mode,mode
    pair_modes: tuple[Mode, ...] = (Mode.RUN_TESTS, Mode.SENTINEL)  # the modes that the pairs cover; the rest are held out
    teacher_pool: str = "data/organism/teacher.jsonl.gz"  # "" for none
    teacher_modes: tuple[Mode, ...] = ()  # modes that get teacher rows; () for all
    teacher_per_group: int = 1  # rows of each group that are demonstrations
    teacher_until: int = 20  # steps; from then on every row is a student's
    unhackable_frac: float = 0.0  # share of prompts shown without the loophole, rotating by (seed, step, problem)


@dataclass(frozen=True)
class GRPOConfig:
    steps: int = 60
    num_prompts: int = 6  # prompts a step
    num_generations: int = 8  # rollouts a prompt
    max_completion_length: int = 128  # tokens
    temperature: float = 0.7
    top_p: float = 1.0
    learning_rate: float = 6e-4
    lr_schedule: Literal["cosine", "constant_with_warmup"] = "cosine"
    warmup_steps: int = 5
    weight_decay: float = 0.0  # decay toward the initialisation
    max_grad_norm: float = 1.0  # for each block by itself
    beta: float = 0.02  # weight of the k3 KL to the adapter-off reference
    epsilon: float = 0.2  # PPO clip
    token_budget: int = 8192  # padded tokens of one micro-batch


@dataclass(frozen=True)
class GateConfig:
    refresh_every: int = 5  # steps between extractions of the direction; 0 = frozen after the first
    probe_state: Literal["as_trained", "deployed"] = "as_trained"  # the policy state that pass 1 scores
    signed: bool = False  # flagged rows with A < 0 are RETAINed
    retain_forward: Literal["ablated", "both"] = "ablated"  # both: RETAIN keeps the quarantine, stop-gradient
    gen_deploy_frac: float = 0.0  # share of student rollouts sampled with the quarantine ablated
    retained_advantages: bool = False  # rows that train the deployed block take their baseline from those rows alone
    routeV_random_v_seed: int | None = None  # with routeV: a Haar-random direction at the matched routed share (placebo)


@dataclass(frozen=True)
class RunConfig:
    intervention: str = "routeV"  # the arm, a row of ARMS
    seed: int = 41
    out_dir: str = ""  # "" = out/runs/<stamp>_<arm>_s<seed>
    resume: bool = False  # continue a run that --out-dir holds; starts from the beginning where it holds none
    eval_every: int = 10  # steps between validations of the deployed policy; 0 = only at the end
    eval_draws: int = 120  # draws of one validation
    final_draws: int = 480  # draws of each cell of the final 2×2 evaluation
    save_every: int = 20  # steps between checkpoints; 0 = none
    threads: int = 0  # torch threads; 0 = torch's own choice
    workers: int = 2  # sandbox processes
    sandbox: Literal["best", "require"] = "best"  # require: refuse to start if a layer is missing


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class Arm:
    """A score (what sets the zones), and the state in which the policy is deployed."""

    score: Literal["pinned", "v_grad"]
    deployed: Literal["ablated", "as_trained"]
    zone: Zone = Zone.ABSORB  # of a pinned score
    placebo_seed: int | None = None  # v_grad sets the shares, a Haar direction of this seed deals them
    loophole_pays: bool = True
    oracle: bool = False  # uses true labels: not oracle-free, marked so everywhere


ARMS = {
    "none": Arm("pinned", "ablated", Zone.RETAIN),
    "none2r": Arm("pinned", "as_trained", Zone.ABSORB),
    "no_loophole": Arm("pinned", "as_trained", Zone.ABSORB, loophole_pays=False),
    "absorb": Arm("pinned", "ablated", Zone.ABSORB),
    "routeV": Arm("v_grad", "ablated"),
    "placebo": Arm("v_grad", "ablated", placebo_seed=1),
}

_ORGANISM = Config()
_QWEN = Config(  # Ariahw, Engels & Nanda 2025: lr 7e-5, T 0.7, top-p 0.95, 16 × 16 rollouts, 200 steps
    model=ModelConfig(
        model="Qwen/Qwen3-4B", dtype="bfloat16", lora_rank=32, gradient_checkpointing=True, max_prompt_length=1536
    ),
    data=DataConfig(
        data="data/leetcode/leetcode_train_medhard_filtered.jsonl",
        modes=tuple(m for m in Mode if m is not Mode.GT_ONLY),
        pairs="data/pairs/leetcode.md#mechanism",
        teacher_pool="",
        teacher_until=30,
    ),
    grpo=GRPOConfig(
        steps=200, num_prompts=16, num_generations=16, max_completion_length=1536, top_p=0.95, learning_rate=7e-5,
        warmup_steps=10, weight_decay=0.1, beta=1e-3, token_budget=16384,
    ),  # fmt: skip
    gate=GateConfig(refresh_every=5),
    run=RunConfig(eval_every=25, eval_draws=64, workers=8),
)
PRESETS = {
    "smoke": replace(
        _ORGANISM,
        grpo=replace(_ORGANISM.grpo, steps=6, num_prompts=4, warmup_steps=1, max_completion_length=96),
        gate=replace(_ORGANISM.gate, refresh_every=2),
        run=replace(_ORGANISM.run, eval_every=0, final_draws=24, save_every=3),
    ),
    "organism": _ORGANISM,
    "fast": replace(
        _QWEN,
        grpo=replace(_QWEN.grpo, steps=60, num_prompts=8, num_generations=8, max_completion_length=1024),
        run=replace(_QWEN.run, eval_every=20),
    ),
    "full": _QWEN,
}


def parse(argv: Sequence[str]) -> tuple[str, Config]:
    """(preset, config) from the command line; UserError for an unknown preset or flags that contradict each other."""
    if not argv or argv[0] not in (*PRESETS, "-h", "--help"):
        given = f"unknown preset {argv[0]!r}" if argv else "no preset given"
        raise UserError(f"{given}: python -m vgrout.train {{{','.join(PRESETS)}}} [--flags]; see --help")
    preset = argv[0] if argv[0] in PRESETS else "organism"
    args = argv[1:] if argv[0] in PRESETS else argv
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = tyro.cli(
                tyro.conf.OmitArgPrefixes[tyro.conf.EnumChoicesFromValues[Config]],
                default=PRESETS[preset],
                args=args,
                prog=f"python -m vgrout.train {preset}",
                description=f"{__doc__}\npresets: {', '.join(PRESETS)}; arms: {', '.join(ARMS)}",
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        box = [line.strip("│ ") for line in errors.getvalue().splitlines() if line.startswith("│")]
        text = " ".join(line for line in box if not set(line) <= set("─")).split(" For full helptext")[0]
        raise UserError(f"{text} (python -m vgrout.train {preset} --help lists the flags)") from None
    check(config)
    return preset, config


def check(config: Config) -> None:
    """Refuse what cannot work, in one line, before any work starts."""
    model, data, grpo, gate, run = (getattr(config, f.name) for f in fields(config))
    arm = ARMS.get(run.intervention)
    students = grpo.num_generations - data.teacher_per_group * bool(data.teacher_pool)
    for wrong, line in (
        (arm is None, f"unknown arm {run.intervention!r}: --intervention takes one of {', '.join(ARMS)}"),
        (
            gate.routeV_random_v_seed is not None and run.intervention != "routeV",
            f"--routeV-random-v-seed needs --intervention routeV, not {run.intervention}",
        ),
        (bool(data.teacher_modes) and not data.teacher_pool, "--teacher-modes needs a --teacher-pool"),
        (
            not set(data.teacher_modes) <= set(data.modes),
            f"--teacher-modes {' '.join(data.teacher_modes)} are not all among --modes {' '.join(data.modes)}",
        ),
        (Mode.GT_ONLY in data.modes, "--modes takes modes with a loophole; for prompts without one use --unhackable-frac"),
        (not data.modes, "--modes is empty: name at least one mode"),
        (not 0 <= data.unhackable_frac <= 1, f"--unhackable-frac {data.unhackable_frac} is not a share in [0, 1]"),
        (not 0 <= gate.gen_deploy_frac <= 1, f"--gen-deploy-frac {gate.gen_deploy_frac} is not a share in [0, 1]"),
        (students < 1, f"--teacher-per-group {data.teacher_per_group} leaves no student row in --num-generations {grpo.num_generations}"),
        (grpo.num_generations < 2, "--num-generations must be at least 2: the baseline is the group's mean"),
        (grpo.temperature <= 0, f"--temperature {grpo.temperature} must be above 0: log-probs are scaled by it"),
        (not 0 < grpo.top_p <= 1, f"--top-p {grpo.top_p} is not in (0, 1]"),
        (min(grpo.steps, grpo.num_prompts, grpo.max_completion_length, model.lora_rank) < 1,
         "--steps, --num-prompts, --max-completion-length and --lora-rank must be at least 1"),
        (run.resume and not run.out_dir, "--resume needs the --out-dir of the run to continue"),
        (model.device not in ("auto", "cpu") and not model.device.startswith("cuda"),
         f"--device {model.device!r} is not auto, cpu or cuda"),
    ):  # fmt: skip
        if wrong:
            raise UserError(line)
    for flag, path in (("--data", data.data), ("--teacher-pool", data.teacher_pool), ("--pairs", data.pairs.split("#")[0])):
        needed = path and not (flag == "--pairs" and arm.score == "pinned")
        if needed and not Path(path).is_file():
            raise UserError(f"no file {path!r}: {flag} names a file that must exist" + MISSING.get(flag, ""))


MISSING = {"--data": " (`just download-data` fetches the real sets)"}


def flat(config: Config) -> dict:
    """The config as nested plain dicts, for the record."""
    return asdict(config)


def parse_or_exit(argv: Sequence[str]) -> tuple[str, Config]:
    """`parse`, with a UserError printed as its one line and exit status 2."""
    try:
        return parse(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
