"""Trackers mirror metrics.jsonl: every finite number at its step; a missing extra is one line that names it.

trackio and wandb are replaced by recording modules here. `--long` writes and reads real files of those trackers that are installed.

    uv run python scripts/verify/verify_tracking.py [--long]
"""

import atexit
import os
import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from vgrout.core import RunRecord, UserError
from vgrout.run import tracking
from vgrout.run.provenance import provenance
from vgrout.run.tracking import TRACKERS, numbers, tracker

ROWS = [
    {"step": 0, "kl": 0.5, "loss": None, "note": "text"},
    {"step": 1, "kl": float("nan"), "loss": 2.0, "rows_route": 3},
]
WANT = [(0, {"kl": 0.5}), (1, {"loss": 2.0, "rows_route": 3.0})]


def record() -> RunRecord:
    return RunRecord(
        schema_version=1, arm="routeV", preset="smoke", seed=41, config={"grpo": {"steps": 2}}, data_hashes={}, pair_hash="",
        split_hashes={}, sandbox_layers={}, status="running", **provenance(),
    )  # fmt: skip


def recording(name: str, calls: list) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.init = lambda **options: calls.append(options)
    module.log = lambda values, step: calls.append((step, values))
    module.finish = lambda: None
    return module


def check_missing() -> None:
    before, tracking.find_spec = tracking.find_spec, lambda name: None
    try:
        for name in (*TRACKERS, "zap"):
            try:
                tracker(name, record(), Path("x"))
                raise AssertionError(f"{name} was accepted, though it is not installed")
            except UserError as error:
                assert (
                    name in str(error)
                    and "\n" not in str(error)
                    and ("--extra" in str(error)) == (name in TRACKERS)
                ), error
        tracker("", record(), Path("x"))(ROWS[0])  # no tracker needs no package
    finally:
        tracking.find_spec = before
    print(
        "ok  a tracker that is unknown or not installed is one line; without --track nothing is needed"
    )


def check_mirrored() -> None:
    for name in ("trackio", "wandb"):
        calls, before = [], sys.modules.get(name)
        sys.modules[name] = recording(name, calls)
        try:
            track = tracker(name, record(), Path("out/runs/mine"))
            for row in ROWS:
                track(row)
        finally:
            sys.modules.pop(name)
            sys.modules.update({name: before} if before else {})
        assert (
            calls[0]["name"] == "mine"
            and calls[0]["config"]["grpo"] == {"steps": 2}
            and calls[0]["config"]["arm"] == "routeV"
        )
        assert calls[1:] == WANT, f"{name} got {calls[1:]}, SHOULD get {WANT}"
    assert (
        numbers({"step": 3, "x": float("inf")}) == {}
        and [(r["step"], dict(r)) for r in ROWS] != WANT
    )
    print(
        "ok  trackio and wandb get run name, config and every finite number at its step, and nothing that does not exist"
    )


def check_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = tracker("tensorboard", record(), folder)
    for row in ROWS:
        track(row)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    got = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert got == {"kl": [(0, 0.5)], "loss": [(1, 2.0)], "rows_route": [(1, 3.0)]}, got
    print("ok  tensorboard: the event files hold what metrics.jsonl holds")


def check_trackio(folder: Path) -> None:
    os.environ["TRACKIO_DIR"] = str(folder)
    track = tracker("trackio", record(), folder / "mine")
    for row in ROWS:
        track(row)
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
