"""Experiment trackers behind one function: metrics.jsonl is the truth, a tracker mirrors its rows.

Each tracker is an optional extra, imported when it is asked for. None of them sees a completion,
and nothing is read back.
"""

import atexit
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vgrout.core import RunRecord, UserError

TRACKERS = ("trackio", "wandb")  # extra and module of one name
PROJECT = "vgrout"


def check_tracker(name: str) -> None:
    """Refuse a tracker that is unknown or not installed, before any work; "" is no tracker.

    The UserError names the extra.
    """
    if name and name not in TRACKERS:
        raise UserError(f"unknown tracker {name!r}: --track takes one of {', '.join(TRACKERS)}")
    if name and find_spec(name) is None:
        raise UserError(
            f"--track {name} needs a package that is not installed: uv sync --extra {name}"
        )


def tracker(name: str, record: RunRecord, out_dir: Path) -> Callable[[dict[str, Any]], None]:
    """A function that mirrors one metrics row at its `step`; with name "" it does nothing.

    trackio and wandb get a run named after the directory, in project `vgrout`, with the record's
    config. A resumed run repeats the steps after its checkpoint under the same name. Values that do
    not exist (None, NaN) are left out. The tracker is closed when the process ends.
    """
    check_tracker(name)
    if not name:
        return lambda row: None
    module = import_module(name)
    facts = {
        "arm": record.arm,
        "preset": record.preset,
        "seed": record.seed,
        "commit": record.commit,
        "dirty": record.dirty,
    }
    module.init(project=PROJECT, name=out_dir.name, group=record.arm, config=facts | record.config)
    atexit.register(module.finish)
    return lambda row: module.log(numbers(row), step=row["step"])


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The row's finite numbers, without the step itself."""
    return {
        k: float(x)
        for k, x in row.items()
        if k != "step" and isinstance(x, int | float) and math.isfinite(x)
    }
