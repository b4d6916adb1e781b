"""Trackers mirror metrics.jsonl: every finite number at its step; a missing extra is one line.

trackio and wandb are replaced by recording modules here.

Run: python -m scripts.verify.verify_tracking
"""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest import mock

from scripts.verify.stored import planted_record, refused

from vgrout.run import tracking
from vgrout.run.tracking import TRACKERS, tracker

ROWS = [
    {"step": 0, "kl": 0.5, "loss": float("inf"), "note": "text"},
    {"step": 1, "kl": float("nan"), "loss": 2.0, "rows_route": 3},
]
WANT = [(0, {"kl": 0.5}), (1, {"loss": 2.0, "rows_route": 3.0})]
RECORD = planted_record(config={"grpo": {"steps": 2}})


def track(name: str, folder: Path) -> None:
    mirror = tracker(name, RECORD, folder)
    for row in ROWS:
        mirror(row)


def recording(name: str, calls: list) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.init = lambda **options: calls.append(options)
    module.log = lambda values, step: calls.append((step, values))
    module.finish = lambda: None
    return module


def check_missing() -> None:
    with mock.patch.object(tracking, "find_spec", lambda name: None):
        for name in TRACKERS:
            refused(f"uv sync --extra {name}", track, name, Path("x"))
        refused("unknown tracker 'zap'", track, "zap", Path("x"))
        track("", Path("x"))  # no tracker needs no package
    print(
        "ok  a tracker that is unknown or not installed is one line; without --track none is needed"
    )


def check_mirrored() -> None:
    for name in TRACKERS:
        calls: list = []
        with mock.patch.dict(sys.modules, {name: recording(name, calls)}):
            track(name, Path("out/runs/mine"))
        config = calls[0]["config"]
        assert calls[0]["name"] == "mine" and config["arm"] == "routeV"
        assert config["grpo"] == {"steps": 2}
        assert calls[1:] == WANT, f"{name} got {calls[1:]}, SHOULD get {WANT}"
    with mock.patch.object(tracking, "numbers", dict):  # the mutation: rows as they are
        assert [tracking.numbers(row) for row in ROWS] != [values for _, values in WANT]
    print("ok  trackio and wandb get run name, config and every finite number at its step alone")


if __name__ == "__main__":
    check_missing()
    check_mirrored()
