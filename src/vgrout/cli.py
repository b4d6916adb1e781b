"""The command line: a preset's name and flags → a checked Config. Bad input is one line, before
anything heavy is imported: `parse` checks flags and that files exist, `check_inputs` reads those files. docs/errors.md lists the lines.
"""

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

import tyro

from vgrout.config import ARMS, PRESETS, Arm, Config, RouteConfig, ScoreConfig, defaults
from vgrout.core import Mode, Problem, UserError, Zone
from vgrout.entry import run_main
from vgrout.env import pairs, problems
from vgrout.env.demos import TeacherPool
from vgrout.gate.monitors.judge import Endpoint, check_endpoint
from vgrout.gate.monitors.labelled import LEAST, Labelled, load_labelled
from vgrout.run.tracking import check_tracker

DESCRIPTION = "GRPO with vector gradient routing. PRESET sets every default; flags change them."


def parse(argv: Sequence[str]) -> tuple[str, Config]:
    """(preset, config) from the command line; UserError for an unknown preset or flags that contradict each other."""
    if not argv or argv[0] not in (*PRESETS, "-h", "--help"):
        given = f"unknown preset {argv[0]!r}" if argv else "no preset given"
        raise UserError(
            f"{given}: python -m vgrout.train {{{','.join(PRESETS)}}} [--flags]; see --help"
        )
    preset = argv[0] if argv[0] in PRESETS else "organism"
    args = argv[1:] if argv[0] in PRESETS else argv
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = tyro.cli(
                tyro.conf.OmitArgPrefixes[tyro.conf.EnumChoicesFromValues[Config]],
                default=defaults(
                    preset, _flag(args, "--intervention") or PRESETS[preset].run.intervention
                ),
                args=args,
                prog=f"python -m vgrout.train {preset}",
                description=f"{DESCRIPTION} presets: {', '.join(PRESETS)}; arms: {', '.join(ARMS)}",
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        box = [
            line.strip("│ ") for line in errors.getvalue().splitlines()[1:]
        ]  # behind the title; without lines where stdout is ASCII
        text = " ".join(line for line in box if not set(line) <= set("╰─╯-"))
        text = re.split(" For full helptext| Argument helptext", text)[0].rstrip(".")
        raise UserError(
            f"{text} (python -m vgrout.train {preset} --help lists the flags)"
        ) from None
    check(config)
    return preset, config


def _flag(args: Sequence[str], name: str) -> str:
    """The last value of a flag, as `--name value` or `--name=value`; "" where it does not occur."""
    spaced = [value for flag, value in zip(args, args[1:]) if flag == name]
    joined = [flag.partition("=")[2] for flag in args if flag.startswith(f"{name}=")]
    return (spaced + joined or [""])[-1]


def check(config: Config) -> None:
    """Refuse what cannot work, in one line, before any work starts."""
    arm = ARMS.get(config.run.intervention)
    if arm is None:
        raise UserError(
            f"unknown arm {config.run.intervention!r}: --intervention takes one of {', '.join(ARMS)}"
        )
    for line in (*_ranges(config), *_contradictions(config, arm), *_missing_files(config, arm)):
        raise UserError(line)
    check_tracker(config.run.track)


def _ranges(config: Config) -> Iterator[str]:
    """Values that are out of range."""
    model, data, grpo, score, route, monitor, run = (
        getattr(config, f.name) for f in fields(config)
    )
    shares = {
        "--unhackable-frac": data.unhackable_frac, "--gen-deploy-frac": route.gen_deploy_frac,
        "--oracle-recall": route.oracle_recall, "--oracle-fpr": route.oracle_fpr, "--absorb-share": route.absorb_share,
    }  # fmt: skip
    counts = {
        "--steps": grpo.steps, "--num-prompts": grpo.num_prompts, "--max-completion-length": grpo.max_completion_length,
        "--lora-rank": model.lora_rank, "--max-prompt-length": model.max_prompt_length, "--token-budget": grpo.token_budget,
        "--judge-concurrency": monitor.judge_concurrency, "--judge-max-tokens": monitor.judge_max_tokens,
        "--sample-token-budget": model.sample_token_budget,
        "--llr-steps": score.llr_steps, "--workers": run.workers, "--eval-draws": run.eval_draws, "--final-draws": run.final_draws,
    }  # fmt: skip
    positive = {
        "--learning-rate": grpo.learning_rate, "--llr-learning-rate": score.llr_learning_rate, "--max-grad-norm": grpo.max_grad_norm,
        "--judge-timeout": monitor.judge_timeout, "--penalty": monitor.penalty, "--probe-l2": monitor.probe_l2,
        "--cpu-seconds": run.cpu_seconds,
    }  # fmt: skip
    not_negative = {
        "--beta": grpo.beta, "--epsilon": grpo.epsilon, "--weight-decay": grpo.weight_decay, "--warmup-steps": grpo.warmup_steps,
        "--refresh-every": score.refresh_every, "--eval-every": run.eval_every, "--save-every": run.save_every, "--threads": run.threads,
        "--seed-quarantine": route.seed_quarantine, "--quarantine-first": route.quarantine_first,
        "--penalty-alpha": route.penalty_alpha, "--lora-init-seed": model.lora_init_seed, "--teacher-per-group": data.teacher_per_group,
        "--teacher-until": data.teacher_until, "--judge-retries": monitor.judge_retries,
        "--snapshot-every": run.snapshot_every,
    }  # fmt: skip
    yield from (
        f"{flag} {x} is not a share in [0, 1]" for flag, x in shares.items() if not 0 <= x <= 1
    )
    yield from (f"{flag} {x} must be at least 1" for flag, x in counts.items() if x < 1)
    yield from (
        f"{flag} {x} must be a finite number above 0"
        for flag, x in positive.items()
        if not 0 < x < math.inf
    )
    yield from (
        f"{flag} {x} must be 0 or more, and finite"
        for flag, x in not_negative.items()
        if not 0 <= x < math.inf
    )
    if grpo.num_generations < 2:
        yield f"--num-generations {grpo.num_generations} must be at least 2: the baseline is the group's mean"
    if not 0 < grpo.temperature < math.inf:
        yield f"--temperature {grpo.temperature} must be above 0: log-probs are scaled by it"
    if not 0 < grpo.top_p <= 1:
        yield f"--top-p {grpo.top_p} is not in (0, 1]"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", model.device):
        yield f"--device {model.device!r} is not auto, cpu, cuda or cuda:N"
    try:
        re.compile(model.targets)
    except re.error as error:
        yield f"--targets {model.targets!r} is no regular expression ({error}): it selects the Linears to adapt by name"


def _contradictions(config: Config, arm: Arm) -> Iterator[str]:
    """Flags that do not go together, or not with the arm."""
    data, grpo, score, route, run = config.data, config.grpo, config.score, config.route, config.run
    if route.quarantine_first >= grpo.steps:
        yield f"--quarantine-first {route.quarantine_first} leaves none of --steps {grpo.steps} to the deployed block: shorten it"
    unread = {"--confound": (score.confound != ScoreConfig.confound, arm.control == "confound"),
              "--penalty-alpha": (route.penalty_alpha != RouteConfig.penalty_alpha, arm.action == "penalise")}  # fmt: skip
    yield from (
        f"{flag} is not read by {run.intervention}: leave it out"
        for flag, (given, read) in unread.items()
        if given and not read
    )
    if route.routeV_random_v_seed is not None and run.intervention != "routeV":
        yield f"--routeV-random-v-seed needs --intervention routeV, not {run.intervention}"
    if (route.oracle_recall, route.oracle_fpr, route.oracle_modes) != (
        1.0,
        0.0,
        (),
    ) and not arm.oracle:
        yield f"--oracle-recall, --oracle-fpr and --oracle-modes need an oracle arm, not {run.intervention}"
    if route.absorb_share and (arm.score, arm.zone) != ("pinned", Zone.RETAIN):
        yield f"--absorb-share needs an arm that RETAINs every row, such as absorbQ, not {run.intervention}"
    if score.granularity == "token" and arm.score != "v_grad":
        yield f"--granularity token needs a v_grad arm, not {run.intervention}"
    if score.granularity == "token" and (route.retained_advantages or arm.action != "route"):
        yield "--granularity token routes tokens: it does not go with --retained-advantages, filter or penalise"
    if data.teacher_modes and not data.teacher_pool:
        yield "--teacher-modes needs a --teacher-pool"
    if Mode.GT_ONLY in data.modes or not data.modes:
        yield "--modes takes at least one mode, each with a loophole; for prompts without one use --unhackable-frac"
    if len(set(data.modes)) < len(data.modes):
        yield f"--modes {' '.join(data.modes)} names a mode twice"
    if not set(data.teacher_modes) <= set(data.modes):
        yield f"--teacher-modes {' '.join(data.teacher_modes)} are not all among --modes {' '.join(data.modes)}"
    if not set(route.oracle_modes) <= set(data.modes):
        yield f"--oracle-modes {' '.join(route.oracle_modes)} are not all among --modes {' '.join(data.modes)}"
    if not data.pair_modes and (arm.reads_pairs or route.seed_quarantine):
        yield "--pair-modes takes at least one mode, those that the pairs cover; the other modes are held out"
    if set(data.modes) <= problems.NOVELTY_FREE:
        yield f"--modes {' '.join(data.modes)} has no marker that evaluation could change: add {' or '.join(problems.TRAINING_MARKERS)}"
    if grpo.num_generations <= data.teacher_per_group * bool(data.teacher_pool):
        yield f"--teacher-per-group {data.teacher_per_group} leaves no student among {grpo.num_generations} generations"
    yield from _monitor_contradictions(config, arm)
    if run.resume and not run.out_dir:
        yield "--resume needs the --out-dir of the run to continue"
    if run.out_dir and Path(run.out_dir).exists() and not Path(run.out_dir).is_dir():
        yield f"--out-dir {run.out_dir} is a file: choose a directory"
    elif run.out_dir and not _writable(Path(run.out_dir)):
        yield f"cannot write to --out-dir {run.out_dir}: choose another"


def _writable(folder: Path) -> bool:
    """Can the folder be written to, or be made?"""
    there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _monitor_contradictions(config: Config, arm: Arm) -> Iterator[str]:
    """A monitor's arm without its monitor, or a monitor without its arm."""
    monitor, name = config.monitor, config.run.intervention
    if arm.monitor == "judge" and not (monitor.judge_url and monitor.judge_model):
        yield f"{name} needs a live judge: --judge-url, such as http://localhost:8000/v1, and --judge-model"
    if arm.monitor == "probe" and not monitor.probe_data:
        yield f"{name} needs labelled rollouts of another problem set: --probe-data, such as another run's rollouts.jsonl.gz"
    if monitor.probe_rows < 2 * LEAST:
        yield f"--probe-rows {monitor.probe_rows} must be at least {2 * LEAST}"
    users = {
        "judge": arm.monitor == "judge",
        "probe": arm.monitor == "probe",
        "penalty": arm.action == "deduct",
    }
    for f in fields(monitor):
        kind = f.name.partition("_")[0]
        if getattr(monitor, f.name) != f.default and not users[kind]:
            suited = [
                n
                for n, a in ARMS.items()
                if (a.action == "deduct" if kind == "penalty" else a.monitor == kind)
            ]
            yield f"--{f.name.replace('_', '-')} needs one of the arms {', '.join(suited)}, not {name}"


def _missing_files(config: Config, arm: Arm) -> Iterator[str]:
    """Files that the arm will read and that are not there; a model that can only be a folder and is none."""
    for flag, path in {"--data": config.data.data, "--teacher-pool": config.data.teacher_pool, "--probe-data": config.monitor.probe_data,
                       **_pair_files(config, arm)}.items():  # fmt: skip
        if path and not Path(path.split("#")[0]).is_file():
            yield f"no file {path.split('#')[0]!r}: {flag} names a file that must exist{MISSING.get(flag, '')}"
    start, model = config.model.init_from, config.model.model
    if start and not all(
        (Path(start) / name).is_file() for name in ("record.json", "adapter.safetensors")
    ):
        yield f"--init-from {start} holds no record.json and adapter.safetensors: name the directory of a finished run"
    if not Path(model).exists() and (
        model.count("/") != 1 or model.startswith(("/", ".", "data/", "out/"))
    ):
        yield f"no model folder {model!r}: --model takes a folder, or a hub id such as Qwen/Qwen3-4B"


BEFORE_A_RUN = {
    "log.txt",
    ".lock",
    ".pool",
    ".reserve",
}  # what may lie in a run's directory before it: a caller's, or a killed start's
MISSING = {"--data": " (`just download-data` fetches the real sets)"}


def _pair_files(config: Config, arm: Arm) -> dict[str, str]:
    """The pair references that the arm will read, by flag."""
    data, score, seeding = config.data, config.score, config.route.seed_quarantine > 0
    empty_seed = seeding and config.route.seed_side == "placebo"
    return {
        "--pairs": data.pairs if (seeding and not empty_seed) or arm.reads_pairs else "",
        "--placebo-pairs": score.placebo_pairs if arm.control == "semantic" or empty_seed else "",
        "--framing-pairs": score.framing_pairs if arm.control == "framing" else "",
    }


# ── what the flags name, read and checked ────────────────────────────────────────────────────────────────────────


def load_splits(config: Config) -> dict[str, list[Problem]]:
    """train | val | test, each partitioned evenly over the modes."""
    return _splits(config.data.data, config.data.modes)


@cache
def _splits(path: str, modes: tuple[Mode, ...]) -> dict[str, list[Problem]]:
    splits = problems.split(problems.load_problems(path))
    if empty := [name for name, part in splits.items() if len(part) < len(modes)]:
        raise UserError(
            f"{path}: split {empty[0]} has fewer problems than there are modes: use more problems"
        )
    return {name: problems.partition(part, modes) for name, part in splits.items()}


def load_probe_data(config: Config) -> list[Labelled]:
    """The probe's labelled rollouts, none of them of a problem of this run."""
    problems_of_run = [p for part in load_splits(config).values() for p in part]
    return load_labelled(config.monitor.probe_data, problems_of_run, config.monitor.probe_rows)


def endpoint(config: Config) -> Endpoint:
    m = config.monitor
    return Endpoint(
        m.judge_url,
        m.judge_model,
        m.judge_concurrency,
        m.judge_timeout,
        m.judge_retries,
        m.judge_max_tokens,
    )


def check_inputs(config: Config) -> None:
    """Read every data file that the run will read, and ask a judge one question; UserError for what cannot be used."""
    data, arm = config.data, ARMS[config.run.intervention]
    _check_out_dir(config.run.out_dir, config.run.resume)
    splits = load_splits(config)
    for flag, reference in _pair_files(config, arm).items():
        found = (
            pairs.load_pairs(reference, data.pair_modes if flag == "--pairs" else ())
            if reference
            else []
        )
        if (
            found
            and flag == "--pairs"
            and arm.reads_pairs
            and len({p.problem.statement for p in found}) < 2
        ):
            raise UserError(
                f"--pairs {reference} holds pairs on one prompt alone: a pair is scored by those of the others, add some"
            )
    if data.teacher_pool:
        pool = TeacherPool(
            data.teacher_pool, data.teacher_modes, data.teacher_per_group, data.teacher_until
        )
        if not pool.covers(splits["train"]):
            raise UserError(
                f"{data.teacher_pool}: no demonstration fits a training problem of {data.data} and its mode: rebuild the pool"
            )
    if arm.monitor == "probe":
        load_probe_data(config)
    if arm.monitor == "judge":
        check_endpoint(endpoint(config))


def _check_out_dir(out_dir: str, resume: bool) -> None:
    """Answer early what `records.Run.create` will refuse under its lock."""
    path = Path(out_dir) / "record.json"
    if not out_dir or not path.exists():
        if out_dir and (
            strange := sorted(p.name for p in Path(out_dir).glob("*") if p.name not in BEFORE_A_RUN)
        ):
            raise UserError(
                f"{out_dir} holds {strange[0]!r} and no run: choose an empty or a new --out-dir"
            )
        if resume:
            print(
                f"note: --out-dir {out_dir} holds no run to resume: this one starts from the beginning"
            )
        return
    try:
        status = json.loads(path.read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a run record ({type(error).__name__}: {error}): choose another --out-dir"
        ) from None
    if status == "finished":
        raise UserError(f"{out_dir} already holds a finished run: choose another --out-dir")
    if not resume:
        status = "running or killed" if status == "running" else status
        raise UserError(
            f"{out_dir} already holds a run ({status}): add --resume or change --out-dir"
        )


def parse_or_exit(argv: Sequence[str]) -> tuple[str, Config]:
    """`parse` and `check_inputs`, with a UserError printed as its one line and exit status 2."""

    def parsed() -> tuple[str, Config]:
        preset, config = parse(argv)
        check_inputs(config)
        return preset, config

    return run_main(parsed)
