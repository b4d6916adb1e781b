"""Run directories: what a run writes down, atomically, and how it is read back and resumed.

    record.json           the RunRecord: replaced whole (temporary file, fsync, rename)
    metrics.jsonl         one JSON line a step; NaN and infinities are null
    rollouts.jsonl.gz     one gzip member a step, so that a killed run leaves a readable file
    evals.jsonl.gz        every completion of every evaluation with its grade, one member a cell
    adapter.safetensors   the adapter's tensors
    snapshots/            with --snapshot-every: the adapters that sampled a step's rollouts
    checkpoints/          step folders and `latest.json`, the pointer that one rename moves
    .reserve              bytes that a last status is written from when the disk is full
    resumes.jsonl         when and by which command the run was continued; absent if it never was
    .lock                 held by the one process that writes here

Nothing is pickled. What was appended after the newest checkpoint is cut off at resume, so that a
resumed run writes the same files as an uninterrupted one. Two `Run`s on one directory inside a
single process are not detected.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.files import (
    append_line,
    dumps,
    gzip_lines,
    load_tensors,
    pack,
    parse_object,
    plain,
    read_json_lines,
    write_atomic,
)
from vgrout.run.provenance import now

SCHEMA_VERSION = 1
APPENDED = ("metrics.jsonl", "rollouts.jsonl.gz", "evals.jsonl.gz")
FREE_TO_CHANGE = set(  # at a resume: where and how a run goes, not what it computes
    "out_dir resume accept_changed_data track workers sandbox judge_url judge_concurrency".split()
)
IDENTITY = "arm preset seed config data_hashes pair_hash split_hashes".split()
KEPT_CHECKPOINTS = 2
RESERVE = 1 << 20  # bytes; a record of ten evaluations takes about 100 kB
DAMAGED = "copy it anew, or repeat the run"

Row = dict[str, Any]
Tensors = dict[str, Tensor]


class Run:
    """One run directory, locked for this process until it exits."""

    def __init__(self, out_dir: Path, record: RunRecord, lock: IO[str]):
        self.dir, self.record, self._lock = out_dir, record, lock
        self.step_seconds: dict[str, float] = {}
        self.saved_step: int | None = None  # of the newest checkpoint
        write_atomic(out_dir / ".reserve", bytes(RESERVE))
        self.save()  # before the other files: a directory that holds any of them holds a record
        self._streams = {name: open(out_dir / name, "ab", buffering=0) for name in APPENDED}

    @staticmethod
    def create(
        out_dir: str | Path, record: RunRecord, resume: bool, accept_changed_data: bool = False
    ) -> "Run":
        """Open a fresh directory, or with `resume` cut an unfinished run back to its checkpoint.

        Raises UserError, before anything is changed, if another process holds the directory, if it
        holds a run already (a finished one even with `resume`), or if the run to resume has another
        config, other data or a newer schema. `accept_changed_data`: a problem file that differs in
        its rows and not in their ids is taken. `resume` without a checkpoint starts afresh, and the
        record is then the new one: nothing that it says was done by the run before.
        """
        out_dir = Path(out_dir)
        lock = _lock(out_dir)
        if (out_dir / "record.json").exists():
            changed = _refuse_other(out_dir, record, resume, accept_changed_data)
            record = _cut_back(out_dir, record, changed)
        elif stale := [name for name in APPENDED if (out_dir / name).exists()]:
            what = f"{out_dir} holds {stale[0]} but no record.json"
            raise UserError(f"{what}: choose another --out-dir")
        record.status = "running"
        return Run(out_dir, record, lock)

    def log_metrics(self, row: Row) -> None:
        """Append one step's row to metrics.jsonl in one write."""
        self._append("metrics.jsonl", (dumps(row) + "\n").encode())

    def log_rollouts(self, rows: list[Row]) -> None:
        """Append one step's rollouts to rollouts.jsonl.gz."""
        self._append("rollouts.jsonl.gz", gzip_lines(rows))

    def log_evals(self, rows: list[Row]) -> None:
        """Append one evaluation's completions to evals.jsonl.gz."""
        self._append("evals.jsonl.gz", gzip_lines(rows))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall seconds of what is inside to the step's and to the record's totals."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            for totals in (self.step_seconds, self.record.seconds):
                totals[name] = totals.get(name, 0.0) + spent

    def save(self) -> None:
        """Replace record.json by the present record."""
        text = dumps(asdict(self.record), indent=1) + "\n"
        write_atomic(self.dir / "record.json", text.encode())

    def save_adapter(self, tensors: Tensors, metadata: dict[str, str]) -> None:
        """Replace adapter.safetensors; equal inputs give equal bytes."""
        write_atomic(self.dir / "adapter.safetensors", pack(tensors, metadata))

    def snapshot(self, step: int, tensors: Tensors, metadata: dict[str, str]) -> None:
        """Store the adapter that samples the rollouts of `step`; repeated, the same bytes again."""
        folder = self.dir / "snapshots"
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"step_{step:04d}.safetensors", pack(tensors, metadata))

    def checkpoint(self, step: int, tensors: Tensors, state: Row) -> None:
        """Store all that an exact resume after `step` steps needs.

        That is tensors, JSON state, the record and how long the appended files are.
        """
        root = self.dir / "checkpoints"
        kept = _pointer_names(self.dir)
        name = next(n for i in count() if (n := f"step_{step:06d}_{i}") not in kept)
        shutil.rmtree(root / name, ignore_errors=True)  # no pointer names it: a kill cut it short
        (root / name).mkdir(parents=True)
        for stream in self._streams.values():
            os.fsync(stream.fileno())
        saved = {
            "step": step,
            "state": state,
            "record": asdict(self.record),
            "offsets": {key: os.path.getsize(self.dir / key) for key in APPENDED},
        }
        write_atomic(root / name / "tensors.safetensors", pack(tensors, {}))
        whole = json.dumps(saved, default=plain)  # NaN stays NaN here
        write_atomic(root / name / "state.json", whole.encode())
        kept = [name, *kept][:KEPT_CHECKPOINTS]
        write_atomic(root / "latest.json", json.dumps(kept).encode())
        self.saved_step = step
        for folder in root.iterdir():
            if folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder)

    def load_checkpoint(self) -> tuple[int, Tensors, Row] | None:
        """(step, tensors, state) of the newest checkpoint, or None where there is none."""
        if (saved := _newest(self.dir)) is None:
            return None
        self.saved_step = saved["step"]
        tensors = load_tensors(saved["folder"] / "tensors.safetensors")[0]
        return saved["step"], tensors, saved["state"]

    def finish(self, status: str) -> None:
        """Write the final status in one line; on a full disk, into the reserve's place."""
        self.record.status = " ".join(status.split())
        (self.dir / ".reserve").unlink(missing_ok=True)
        self.save()

    def close(self) -> None:
        """Close the files and give up the lock. The end of the process does the same."""
        for stream in (*self._streams.values(), self._lock):
            stream.close()

    def _append(self, name: str, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # unbuffered: what a full disk refuses is not tried again at the end
            rest = rest[self._streams[name].write(rest) :]


# ── resume ───────────────────────────────────────────────────────────────────────────────────────


def _lock(out_dir: Path) -> IO[str]:
    """Take the POSIX record lock: no forked worker inherits it, a killed process drops it."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / ".lock", "a")
    except OSError as error:
        what = f"cannot write to --out-dir {out_dir} ({error.strerror})"
        raise UserError(f"{what}: choose another") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        what = f"another process is running in {out_dir}"
        raise UserError(f"{what}: wait for it or choose another --out-dir") from None
    return lock


def _refuse_other(out_dir: Path, record: RunRecord, resume: bool, accept: bool) -> Row:
    """UserError unless `record` may continue the run that the directory holds.

    Returns the change of data that is accepted: {key: [hash before, hash now]}.
    """
    old = load_record(out_dir)
    if old.status == "finished":
        raise UserError(f"{out_dir} already holds a finished run: choose another --out-dir")
    if not resume:
        status = "killed" if old.status == "running" else old.status  # nobody holds its lock
        what = f"{out_dir} already holds a run ({status})"
        raise UserError(f"{what}: add --resume or change --out-dir")
    changed, accepted = _differences(old, record), {}
    data = f"data_hashes.{record.config['data']['data']}"
    if accept and data in changed and old.split_hashes == record.split_hashes:
        accepted = {data: changed.pop(data)}
    if changed:
        listed = "; ".join(f"{key} {a!r} → {b!r}" for key, (a, b) in changed.items())
        mend = "repeat its flags and files (--accept-changed-data takes corrected problems)"
        raise UserError(f"cannot resume {out_dir}, the run differs: {listed}; {mend}")
    return accepted


def _cut_back(out_dir: Path, record: RunRecord, changed: Row) -> RunRecord:
    """Cut the files to the newest checkpoint; returns its record, or `record` where there is none.

    The record's note `commits` names every commit that a part of the run is of, if they differ.
    """
    saved = _newest(out_dir)
    resumed = {"at": now(), "from_step": saved["step"] if saved else 0, "changed": changed}
    resumed |= {"argv": record.argv, "commit": record.commit, "dirty": record.dirty}
    append_line(out_dir / "resumes.jsonl", resumed)
    for name in APPENDED:
        if (out_dir / name).exists():
            os.truncate(out_dir / name, saved["offsets"].get(name, 0) if saved else 0)
    if saved is None:
        return record
    old = _record_from(saved["record"])
    commits = old.notes.get("commits", [old.commit])
    if record.commit not in commits:
        old.notes["commits"] = [*commits, record.commit]
    old.dirty |= record.dirty
    old.data_hashes = record.data_hashes  # equal, but for what was accepted
    return old


def _differences(old: RunRecord, new: RunRecord) -> dict[str, list[Any]]:
    """{"config.grpo.steps": [60, 80]} for every field of a run's identity that changed."""

    def identity(record: RunRecord) -> Row:
        return json.loads(dumps(flatten({k: getattr(record, k) for k in IDENTITY})))

    before, after = identity(old), identity(new)
    return {
        key: [before.get(key), after.get(key)]
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.rpartition(".")[2] not in FREE_TO_CHANGE
    }


def flatten(value: Any, prefix: str = "") -> Row:
    """Nested dicts as one: {"grpo": {"steps": 60}} → {"grpo.steps": 60}."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _pointer_names(out_dir: Path) -> list[str]:
    path = out_dir / "checkpoints" / "latest.json"
    return json.loads(path.read_text()) if path.exists() else []


def _newest(out_dir: Path) -> Row | None:
    """What the newest checkpoint's state.json says, with its `folder`."""
    if not (names := _pointer_names(out_dir)):
        return None
    folder = out_dir / "checkpoints" / names[0]
    return json.loads((folder / "state.json").read_text()) | {"folder": folder}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def load_record(run_dir: str | Path) -> RunRecord:
    """record.json of a run, or a record file; UserError if missing, malformed or newer."""
    path = Path(run_dir)
    path = path / "record.json" if path.is_dir() else path
    try:
        return _record_from(parse_object(path.read_bytes(), str(path), "rerun the run"))
    except FileNotFoundError:
        hint = "name a run directory such as out/runs/demo_routeQ"
        raise UserError(f"no run record at {path}: {hint}") from None
    except (KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a run record ({found}): rerun the run") from None


def _record_from(data: Row) -> RunRecord:
    if data["schema_version"] > SCHEMA_VERSION:
        newer = f"schema {data['schema_version']}, newer than {SCHEMA_VERSION}"
        raise UserError(f"the record has {newer}: update vgrout")
    evals = [EvalResult(**entry) for entry in data["evals"]]
    return RunRecord(**{f.name: data[f.name] for f in fields(RunRecord)} | {"evals": evals})


def load_metrics(run_dir: str | Path) -> list[Row]:
    """metrics.jsonl, one dict a step; nulls are None. A last line that a kill cut is left out."""
    return _rows(Path(run_dir) / "metrics.jsonl")


def load_rollouts(run_dir: str | Path) -> list[Row]:
    """rollouts.jsonl.gz, [] where there is none. A last member that a kill cut is left out."""
    return _rows(Path(run_dir) / "rollouts.jsonl.gz")


def load_evals(run_dir: str | Path) -> list[Row]:
    """evals.jsonl.gz, as `load_rollouts` does; runs older than that file have none."""
    return _rows(Path(run_dir) / "evals.jsonl.gz")


def _rows(path: Path) -> list[Row]:
    lines = read_json_lines(path, DAMAGED, partial=True) if path.exists() else ()
    return [row for row, _ in lines]


def load_adapter(run_dir: str | Path) -> tuple[Tensors, dict[str, str]]:
    """adapter.safetensors of a run: tensors and metadata."""
    path = Path(run_dir) / "adapter.safetensors"
    tensors, metadata = load_tensors(path)
    if "model" not in metadata or not all(t.isfinite().all() for t in tensors.values()):
        raise UserError(f"{path} names no model, or has NaN in it: it is no adapter of a run")
    return tensors, metadata


def load_snapshots(run_dir: str | Path) -> dict[int, Path]:
    """Step → file of the adapter that sampled it, in order; UserError where the run stored none."""
    if not (found := sorted((Path(run_dir) / "snapshots").glob("step_*.safetensors"))):
        raise UserError(f"{run_dir} has no snapshots: train it with --snapshot-every N")
    return {int(path.stem.removeprefix("step_")): path for path in found}


def load_deployed(run_dir: str | Path, model: str) -> Tensors:
    """Tensors of what the run deploys: the deployed block, or both where it deploys as trained."""
    tensors, metadata = load_adapter(run_dir)
    if (own := metadata["model"]) != model:
        raise UserError(f"{run_dir} adapts {own}, not {model}: set --model to the same")
    every = load_record(run_dir).notes["deployed"] == "as_trained"
    return {k: v for k, v in tensors.items() if every or k.split(".")[-2] == "deployed"}
