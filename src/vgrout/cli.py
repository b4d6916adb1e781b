"""The command line: a preset's name and flags → a checked Config, or one line.

`parse` checks flags and that the files they name exist, before anything heavy is imported; what the
files hold is checked when they are read. docs/reference/errors.md lists the lines.
"""

import contextlib
import io
import json
import os
import re
import runpy
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import tyro

from vgrout import arms
from vgrout.arms import ARMS
from vgrout.config import PRESETS, Config, Range
from vgrout.core import Mode, UserError, Zone, run_main
from vgrout.env.modes import NOVELTY_FREE, TRAINING_MARKERS

DESCRIPTION = "GRPO with vector gradient routing. PRESET sets every default; flags change them."
PROGRAM = "python -m vgrout.train"
COMMANDS = {  # of the program `vgrout`: word → module
    "train": "vgrout.train",
    "grade": "vgrout.grader",
    "show": "scripts.view.show",
    "report": "scripts.view.report",
    "export": "scripts.tools.export",
}
BEFORE_A_RUN = {"log.txt", ".lock", ".pool", ".reserve"}  # what may lie in a run's directory before


def command() -> None:
    """The program `vgrout`: its first word names a module, which reads the others."""
    word = "".join(sys.argv[1:2])
    if word not in COMMANDS:
        print(f"usage: vgrout {{{','.join(COMMANDS)}}} …; vgrout COMMAND --help says more")
        sys.exit(0 if word in ("", "-h", "--help") else 2)
    del sys.argv[1]
    runpy.run_module(COMMANDS[word], run_name="__main__", alter_sys=True)


def parse(argv: Sequence[str]) -> tuple[str, Config]:
    """(preset, config) from the command line; UserError for flags that are wrong or contradict."""
    if not argv or argv[0] not in (*PRESETS, "-h", "--help"):
        given = f"unknown preset {argv[0]!r}" if argv else "no preset given"
        raise UserError(f"{given}: {PROGRAM} {{{','.join(PRESETS)}}} [--flags]; see --help")
    preset = argv[0] if argv[0] in PRESETS else "organism"
    args = list(argv[1:] if argv[0] in PRESETS else argv)
    ahead = ArgumentParser(add_help=False, allow_abbrev=False)  # the arm sets other defaults
    ahead.add_argument("--intervention", nargs="?")
    ahead.add_argument("--steps", nargs="?", default="")
    given = ahead.parse_known_args(args)[0]
    intervention = given.intervention or PRESETS[preset].run.intervention
    steps = int(given.steps) if (given.steps or "").isdecimal() else 0
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = tyro.cli(
                tyro.conf.OmitArgPrefixes[tyro.conf.EnumChoicesFromValues[Config]],
                default=arms.defaults(preset, intervention, steps),
                args=args,
                prog=f"{PROGRAM} {preset}",
                description=f"{DESCRIPTION} presets: {', '.join(PRESETS)}; arms: {', '.join(ARMS)}",
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        hint = f"({PROGRAM} {preset} --help lists the flags)"
        raise UserError(f"{_boxed(errors.getvalue())} {hint}") from None
    check(preset, config)
    return preset, config


def _boxed(text: str) -> str:
    """The message inside the box that the parser draws."""
    box = [line.strip("│ ") for line in text.splitlines()[1:]]  # the first line is its title
    message = " ".join(line for line in box if not set(line) <= set("╰─╯-"))
    return re.split(" For full helptext| Argument helptext", message)[0].rstrip(".")


def check(preset: str, config: Config) -> None:
    """Refuse what cannot work, in one line, before any work starts."""
    arms.arm_of(config.run.intervention)
    unread = arms.unread(preset, config)
    for line in chain(_ranges(config), _contradictions(config), unread, _paths(config)):
        raise UserError(line)


def _ranges(config: Config) -> Iterator[str]:
    """Values outside the range that their field's annotation names, or of the wrong form."""
    for section in fields(config):
        values = getattr(config, section.name)
        for name, hint in get_type_hints(type(values), include_extras=True).items():
            allowed = get_args(hint)[1] if get_origin(hint) is Annotated else None
            value = getattr(values, name)
            if isinstance(allowed, Range) and not allowed.holds(value):
                yield f"--{name.replace('_', '-')} {value} must be {allowed}"
    model = config.model
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", model.device):
        yield f"--device {model.device!r} is not auto, cpu, cuda or cuda:N"
    try:
        re.compile(model.targets)
    except re.error as error:
        what = f"--targets {model.targets!r} is no regular expression ({error})"
        yield f"{what}: it selects the Linears to adapt by name"


def _contradictions(config: Config) -> Iterator[str]:
    """Flags that do not go together, or not with the arm."""
    data, grpo, phase, name = config.data, config.grpo, config.phase, config.run.intervention
    score, steps = config.score, grpo.steps
    zone = arms.arm_of(name).phases[-1].zone
    if phase.quarantine_first >= steps:
        first = f"--quarantine-first {phase.quarantine_first}"
        yield f"{first} leaves none of --steps {steps} to the deployed block: shorten it"
    if phase.absorb_share and (phase.score, zone) != ("pinned", Zone.RETAIN):
        yield f"--absorb-share needs an arm that RETAINs every row, such as absorbQ, not {name}"
    if phase.score == "pinned" and phase.control not in ("", "oracle"):
        yield f"--control {phase.control} needs a score whose zones it deals: add --score"
    if phase.score != "pinned" and phase.control == "oracle":
        yield f"--control oracle deals zones by itself: leave out --score {phase.score}"
    if phase.control == "semantic" and phase.score not in ("v_grad", "v_act"):
        yield "--control semantic needs a direction: --score v_grad or v_act"
    by_token = score.granularity == "token"
    if by_token and (phase.retained_advantages or phase.action != "route"):
        yield "--granularity token goes with neither --retained-advantages nor another --action"
    if Mode.GT_ONLY in data.modes or not data.modes:
        yield "--modes takes at least one mode, each with a loophole; else use --unhackable-frac"
    if len(set(data.modes)) < len(data.modes):
        yield f"--modes {' '.join(data.modes)} names a mode twice"
    for flag, modes in (("teacher", data.teacher_modes), ("oracle", config.control.oracle_modes)):
        if not set(modes) <= set(data.modes):
            given = f"--{flag}-modes {' '.join(modes)}"
            yield f"{given} are not all among --modes {' '.join(data.modes)}"
    if not data.pair_modes and (arms.reads_pairs(config) or phase.seed_quarantine):
        yield "--pair-modes takes at least one mode, those that the pairs cover"
    if set(data.modes) <= NOVELTY_FREE:
        other = " or ".join(TRAINING_MARKERS)
        given = f"--modes {' '.join(data.modes)}"
        yield f"{given} has no marker that evaluation could change: add {other}"
    if grpo.num_generations <= data.teacher_per_group * bool(data.teacher_pool):
        taken = f"--teacher-per-group {data.teacher_per_group}"
        yield f"{taken} leaves no student among {grpo.num_generations} generations"
    monitor = config.monitor
    if phase.score == "judge" and not (monitor.judge_url and monitor.judge_model):
        yield (
            f"{name} needs a live judge: --judge-url, such as http://localhost:8000/v1, and "
            "--judge-model"
        )
    if phase.score == "probe" and not monitor.probe_data:
        yield f"{name} needs labelled rollouts of another problem set: --probe-data"


def _paths(config: Config) -> Iterator[str]:
    """Files that the arm will read and that are not there; a model that can only be a folder."""
    data, model, run = config.data, config.model.model, config.run
    pairs = arms.reads_pairs(config) or config.phase.seed_quarantine
    placebo = config.phase.control == "semantic" or config.phase.seed_side == "placebo"
    named = {
        "--data": data.data,
        "--teacher-pool": data.teacher_pool,
        "--probe-data": config.monitor.probe_data,
        "--pairs": data.pairs if pairs else "",
        "--placebo-pairs": data.placebo_pairs if placebo else "",
    }
    for flag, path in named.items():
        file = path.split("#")[0]
        if file and not Path(file).is_file():
            hint = " (`just download-data` fetches the real sets)" if flag == "--data" else ""
            yield f"no file {file!r}: {flag} names a file that must exist{hint}"
    start = config.model.init_from
    finished = ("record.json", "adapter.safetensors")
    if start and not all((Path(start) / name).is_file() for name in finished):
        yield f"--init-from {start} holds no {' and '.join(finished)}: name a finished run"
    local = model.count("/") != 1 or model.startswith(("/", ".", "data/", "out/"))
    if local and not Path(model).exists():
        yield f"no model folder {model!r}: --model takes a folder, or a hub id as Qwen/Qwen3-4B"
    if run.accept_changed_data and not run.resume:
        yield "--accept-changed-data goes with --resume: leave it out"
    if run.resume and not run.out_dir:
        yield "--resume needs the --out-dir of the run to continue"
    if run.out_dir:
        yield from _out_dir(Path(run.out_dir), run.resume)


def _out_dir(folder: Path, resume: bool) -> Iterator[str]:
    """What `records.Run.create` would refuse under its lock, answered early."""
    if folder.exists() and not folder.is_dir():
        yield f"--out-dir {folder} is a file: choose a directory"
        return
    there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), None)
    if there is None or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"cannot write to --out-dir {folder}: choose another"
        return
    path = folder / "record.json"
    if not path.exists():
        strange = sorted(p.name for p in folder.glob("*") if p.name not in BEFORE_A_RUN)
        if strange:
            yield f"{folder} holds {strange[0]!r} and no run: choose an empty or a new --out-dir"
        elif resume:
            print(f"note: --out-dir {folder} holds no run to resume: this one starts afresh")
        return
    try:
        status = json.loads(path.read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        yield f"{path} is not a run record ({found}): choose another --out-dir"
        return
    if status == "finished":
        yield f"{folder} already holds a finished run: choose another --out-dir"
    elif not resume:
        status = "running or killed" if status == "running" else status
        yield f"{folder} already holds a run ({status}): add --resume or change --out-dir"


def parse_or_exit(argv: Sequence[str]) -> tuple[str, Config]:
    """`parse`, with a UserError printed as its one line and exit status 2."""
    return run_main(parse, argv)
