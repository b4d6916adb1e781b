"""Trackers mirror metrics.jsonl: every finite number at its step; a missing extra is one line.

trackio and wandb are replaced by recording modules here. `--long` writes and reads real files of
those trackers that are installed.

Run: python -m scripts.verify.verify_tracking [--long]
"""

import atexit
import os
import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest import mock

from scripts.verify.stored import planted_record, refused

from vgrout.run import tracking
from vgrout.run.tracking import TRACKERS, numbers, tracker

ROWS = [
    {"step": 0, "kl": 0.5, "loss": None, "note": "text"},
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
    for name in ("trackio", "wandb"):
        calls: list = []
        with mock.patch.dict(sys.modules, {name: recording(name, calls)}):
            track(name, Path("out/runs/mine"))
        config = calls[0]["config"]
        assert calls[0]["name"] == "mine" and config["arm"] == "routeV"
        assert config["grpo"] == {"steps": 2}
        assert calls[1:] == WANT, f"{name} got {calls[1:]}, SHOULD get {WANT}"
    assert numbers({"step": 3, "x": float("inf")}) == {}
    unfiltered = [(row["step"], dict(row)) for row in ROWS]
    assert unfiltered != WANT, "rows as they are go unnoticed"
    print("ok  trackio and wandb get run name, config and every finite number at its step alone")


def check_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", folder)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    got = {}
    for tag in events.Tags()["scalars"]:
        got[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    assert got == {"kl": [(0, 0.5)], "loss": [(1, 2.0)], "rows_route": [(1, 3.0)]}, got
    print("ok  tensorboard: the event files hold what metrics.jsonl holds")


def check_trackio(folder: Path) -> None:
    os.environ["TRACKIO_DIR"] = str(folder)
    track("trackio", folder / "mine")
    import trackio

    atexit.unregister(trackio.finish)
    trackio.finish()
    files = [path.name for path in folder.rglob("*") if path.is_file()]
    assert any(name.startswith(tracking.PROJECT) for name in files), files
    print(f"ok  trackio: the run is in its local store ({', '.join(files)})")


if __name__ == "__main__":
    check_missing()
    check_mirrored()
    if "--long" in sys.argv:
        for name, check in {"tensorboard": check_tensorboard, "trackio": check_trackio}.items():
            if find_spec(name) is None:
                print(f"not checked: {name} (uv sync --extra {name})")
                continue
            with tempfile.TemporaryDirectory() as tmp:
                check(Path(tmp))
