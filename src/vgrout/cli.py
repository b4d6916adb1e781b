"""The command line: a preset's name and flags → a checked Config. Bad input is one line, before anything heavy is imported."""

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import tyro

from vgrout.config import ARMS, PRESETS, Arm, Config
from vgrout.types import Mode, UserError

DESCRIPTION = "GRPO with vector gradient routing. PRESET sets every default; flags change them."


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
                description=f"{DESCRIPTION} presets: {', '.join(PRESETS)}; arms: {', '.join(ARMS)}",
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
    arm = ARMS.get(config.run.intervention)
    if arm is None:
        raise UserError(f"unknown arm {config.run.intervention!r}: --intervention takes one of {', '.join(ARMS)}")
    for line in (*_ranges(config), *_contradictions(config, arm), *_missing_files(config, arm)):
        raise UserError(line)


def _ranges(config: Config) -> Iterator[str]:
    """Values that are out of range."""
    model, data, grpo, score, route, run = (getattr(config, f.name) for f in fields(config))
    shares = {
        "--unhackable-frac": data.unhackable_frac, "--gen-deploy-frac": route.gen_deploy_frac,
        "--oracle-recall": route.oracle_recall, "--oracle-fpr": route.oracle_fpr,
    }  # fmt: skip
    counts = {
        "--steps": grpo.steps, "--num-prompts": grpo.num_prompts, "--max-completion-length": grpo.max_completion_length,
        "--lora-rank": model.lora_rank, "--token-budget": grpo.token_budget, "--llr-steps": score.llr_steps, "--workers": run.workers,
    }  # fmt: skip
    yield from (f"{flag} {x} is not a share in [0, 1]" for flag, x in shares.items() if not 0 <= x <= 1)
    yield from (f"{flag} {x} must be at least 1" for flag, x in counts.items() if x < 1)
    if grpo.num_generations < 2:
        yield "--num-generations must be at least 2: the baseline is the group's mean"
    if grpo.temperature <= 0:
        yield f"--temperature {grpo.temperature} must be above 0: log-probs are scaled by it"
    if not 0 < grpo.top_p <= 1:
        yield f"--top-p {grpo.top_p} is not in (0, 1]"
    if model.device not in ("auto", "cpu") and not model.device.startswith("cuda"):
        yield f"--device {model.device!r} is not auto, cpu or cuda"


def _contradictions(config: Config, arm: Arm) -> Iterator[str]:
    """Flags that do not go together, or not with the arm."""
    data, score, route, run = config.data, config.score, config.route, config.run
    if score.routeV_random_v_seed is not None and run.intervention != "routeV":
        yield f"--routeV-random-v-seed needs --intervention routeV, not {run.intervention}"
    if (route.oracle_recall, route.oracle_fpr, route.oracle_modes) != (1.0, 0.0, ()) and not arm.oracle:
        yield f"--oracle-recall, --oracle-fpr and --oracle-modes need an oracle arm, not {run.intervention}"
    if score.granularity == "token" and arm.score != "v_grad":
        yield f"--granularity token needs a v_grad arm, not {run.intervention}"
    if score.granularity == "token" and (route.retained_advantages or arm.action != "route"):
        yield "--granularity token routes tokens: it does not go with --retained-advantages, filter or penalise"
    if data.teacher_modes and not data.teacher_pool:
        yield "--teacher-modes needs a --teacher-pool"
    if not set(data.teacher_modes) <= set(data.modes):
        yield f"--teacher-modes {' '.join(data.teacher_modes)} are not all among --modes {' '.join(data.modes)}"
    if Mode.GT_ONLY in data.modes or not data.modes:
        yield "--modes takes at least one mode, each with a loophole; for prompts without one use --unhackable-frac"
    if config.grpo.num_generations <= data.teacher_per_group * bool(data.teacher_pool):
        yield f"--teacher-per-group {data.teacher_per_group} leaves no student among {config.grpo.num_generations} generations"
    if run.resume and not run.out_dir:
        yield "--resume needs the --out-dir of the run to continue"


def _missing_files(config: Config, arm: Arm) -> Iterator[str]:
    """Files that the arm will read and that are not there; a model that can only be a folder and is none."""
    data, score, seeding = config.data, config.score, config.route.seed_quarantine > 0
    empty_seed = seeding and config.route.seed_side == "placebo"
    files = {
        "--data": data.data,
        "--teacher-pool": data.teacher_pool,
        "--pairs": data.pairs if (seeding and not empty_seed) or arm.score not in ("pinned", "oracle") else "",
        "--placebo-pairs": score.placebo_pairs if arm.control == "semantic" or empty_seed else "",
        "--framing-pairs": score.framing_pairs if arm.control == "framing" else "",
    }
    for flag, path in files.items():
        if path and not Path(path.split("#")[0]).is_file():
            yield f"no file {path.split('#')[0]!r}: {flag} names a file that must exist{MISSING.get(flag, '')}"
    model = config.model.model
    if not Path(model).exists() and (model.count("/") != 1 or model.startswith(("/", ".", "data/", "out/"))):
        yield f"no model folder {model!r}: --model takes a folder, or a hub id such as Qwen/Qwen3-4B"


MISSING = {"--data": " (`just download-data` fetches the real sets)"}


def parse_or_exit(argv: Sequence[str]) -> tuple[str, Config]:
    """`parse`, with a UserError printed as its one line and exit status 2."""
    try:
        return parse(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
