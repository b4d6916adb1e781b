"""Run directories: what a run writes down, atomically, and how it is read back and resumed.

    record.json           the RunRecord: replaced whole (temporary file, fsync, rename)
    metrics.jsonl         one JSON line a step; NaN and infinities are null
    rollouts.jsonl.gz     one gzip member a step, so that a killed run leaves a readable file
    evals.jsonl.gz        every completion of every evaluation with its grade, one gzip member a cell
    adapter.safetensors   the adapter's tensors; with --snapshot-every also snapshots/, those that sampled a step's rollouts
    checkpoints/          step folders and `latest.json`, the pointer that one rename moves
    .reserve              bytes that a last status is written from when the disk is full
    resumes.jsonl         when and by which command the run was continued; absent if it never was
    .lock                 held by the one process that writes here

Nothing is pickled. What was appended after the newest checkpoint is cut off at resume, so that a resumed run writes the
same files as an uninterrupted one. Two `Run`s on one directory inside a single process are not detected.
"""

import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.files import append_line, dumps, load_tensors, pack, plain, write_atomic
from vgrout.files import sha256_file as sha256_file
from vgrout.run.provenance import now

SCHEMA_VERSION = 1
APPENDED = ("metrics.jsonl", "rollouts.jsonl.gz", "evals.jsonl.gz")
FREE_TO_CHANGE = {
    "out_dir",
    "resume",
    "track",
    "workers",
    "sandbox",
    "judge_url",
    "judge_concurrency",
}  # where and how, not what
IDENTITY = ("arm", "preset", "seed", "config", "data_hashes", "pair_hash", "split_hashes")
KEPT_CHECKPOINTS = 2
RESERVE = 1 << 20  # bytes; a record of ten evaluations takes about 100 kB


class Run:
    """One run directory, locked for this process until it exits."""

    def __init__(self, out_dir: Path, record: RunRecord, lock: IO[str]):
        self.dir, self.record, self._lock = out_dir, record, lock
        self.step_seconds: dict[str, float] = {}
        self.saved_step: int | None = None  # of the newest checkpoint
        write_atomic(out_dir / ".reserve", bytes(RESERVE))
        self.save()  # before the other files exist: a directory that holds any of them holds a record
        self._streams = {name: open(out_dir / name, "ab", buffering=0) for name in APPENDED}

    @staticmethod
    def create(out_dir: str | Path, record: RunRecord, resume: bool) -> "Run":
        """Open a fresh directory, or with `resume` an unfinished one, and cut its files back to the newest checkpoint.

        Raises UserError, before anything is changed, if another process holds the directory, if it holds a run already
        (a finished one even with `resume`), or if the run to resume has another config, other data or a newer schema.
        `resume` on a directory without a run or without a checkpoint starts from the beginning.
        """
        out_dir = Path(out_dir)
        lock = _lock(out_dir)
        if (out_dir / "record.json").exists():
            old = load_record(out_dir)
            if old.status == "finished":
                raise UserError(f"{out_dir} already holds a finished run: choose another --out-dir")
            if not resume:
                status = (
                    "killed" if old.status == "running" else old.status
                )  # nobody holds its lock
                raise UserError(
                    f"{out_dir} already holds a run ({status}): add --resume or change --out-dir"
                )
            if changed := _differences(old, record):
                raise UserError(f"cannot resume {out_dir}, the run differs: {'; '.join(changed)}")
            checkpoint = _read_pointer(out_dir)
            saved = json.loads((checkpoint / "state.json").read_text()) if checkpoint else None
            append_line(
                out_dir / "resumes.jsonl",
                {
                    "at": now(),
                    "from_step": saved["step"] if saved else 0,
                    "argv": record.argv,
                    "commit": record.commit,
                },
            )
            for name in APPENDED:
                if (out_dir / name).exists():
                    os.truncate(out_dir / name, saved["offsets"].get(name, 0) if saved else 0)
            record.started, record.argv, record.config, record.commit = (
                old.started,
                old.argv,
                old.config,
                old.commit,
            )
            if saved:
                record = _record_from(saved["record"])
        elif stale := [name for name in APPENDED if (out_dir / name).exists()]:
            raise UserError(
                f"{out_dir} holds {stale[0]} but no record.json: choose another --out-dir"
            )
        record.status = "running"
        return Run(out_dir, record, lock)

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Append one step's row to metrics.jsonl in one write."""
        self._append("metrics.jsonl", (dumps(row) + "\n").encode())

    def log_rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Append one step's rollouts to rollouts.jsonl.gz."""
        self._append("rollouts.jsonl.gz", _member(rows))

    def log_evals(self, rows: list[dict[str, Any]]) -> None:
        """Append one evaluation's completions to evals.jsonl.gz."""
        self._append("evals.jsonl.gz", _member(rows))

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
        write_atomic(
            self.dir / "record.json", (dumps(asdict(self.record), indent=1) + "\n").encode()
        )

    def save_adapter(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Replace adapter.safetensors; equal inputs give equal bytes."""
        write_atomic(self.dir / "adapter.safetensors", pack(tensors, metadata))

    def snapshot(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Store the adapter that samples the rollouts of `step`; a resumed run writes the same bytes again."""
        (self.dir / "snapshots").mkdir(exist_ok=True)
        write_atomic(
            self.dir / "snapshots" / f"step_{step:04d}.safetensors", pack(tensors, metadata)
        )

    def checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Store all that an exact resume after `step` steps needs: tensors, JSON state, the record, file offsets."""
        root = self.dir / "checkpoints"
        kept = _pointer_names(self.dir)
        name = next(n for i in count() if (n := f"step_{step:06d}_{i}") not in kept)
        shutil.rmtree(
            root / name, ignore_errors=True
        )  # a folder that no pointer names was cut short by a kill
        (root / name).mkdir(parents=True)
        for stream in self._streams.values():
            os.fsync(stream.fileno())
        saved = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "state": state,
            "record": asdict(self.record),
            "offsets": {key: os.path.getsize(self.dir / key) for key in APPENDED},
        }
        write_atomic(root / name / "tensors.safetensors", pack(tensors, {}))
        write_atomic(
            root / name / "state.json", json.dumps(saved, default=plain).encode()
        )  # NaN stays NaN here
        kept = [name, *kept][:KEPT_CHECKPOINTS]
        write_atomic(root / "latest.json", json.dumps(kept).encode())
        self.saved_step = step
        for folder in root.iterdir():
            if folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder)

    def load_checkpoint(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Return (step, tensors, state) of the newest checkpoint, or None where there is none."""
        if (folder := _read_pointer(self.dir)) is None:
            return None
        saved = json.loads((folder / "state.json").read_text())
        self.saved_step = saved["step"]
        return saved["step"], load_tensors(folder / "tensors.safetensors")[0], saved["state"]

    def finish(self, status: str) -> None:
        """Write the final status: `finished`, `interrupted`, or `failed: <one line>`; on a full disk, into the reserve's place."""
        self.record.status = " ".join(status.split())
        (self.dir / ".reserve").unlink(missing_ok=True)
        self.save()

    def close(self) -> None:
        """Close the files and give up the lock. The end of the process does the same."""
        for stream in (*self._streams.values(), self._lock):
            stream.close()

    def _append(self, name: str, data: bytes) -> None:
        rest = memoryview(data)
        while (
            rest
        ):  # unbuffered: what a full disk refuses is not tried again when the file is closed
            rest = rest[self._streams[name].write(rest) :]


def _member(rows: list[dict[str, Any]]) -> bytes:
    """Rows as JSON lines in a gzip member of their own."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress("".join(dumps(row) + "\n" for row in rows).encode()) + packer.flush()


def load_record(run_dir: str | Path) -> RunRecord:
    """Read record.json of a run directory, or a record file itself; UserError if missing, malformed or newer."""
    path = Path(run_dir)
    path = path / "record.json" if path.is_dir() else path
    try:
        return _record_from(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(
            f"no run record at {path}: name a run directory such as out/runs/demo_routeQ"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a run record ({type(error).__name__}: {error}): rerun the run"
        ) from None


def load_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, one dict a step; nulls are None. A last line that a kill cut short is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): copy it anew, or repeat the run") from None


def load_rollouts(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read rollouts.jsonl.gz, [] where there is none. A last gzip member that a kill cut short is left out whole."""
    return _members(Path(run_dir) / "rollouts.jsonl.gz")


def load_evals(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read evals.jsonl.gz, as `load_rollouts` does; runs older than that file have none."""
    return _members(Path(run_dir) / "evals.jsonl.gz")


def _members(path: Path) -> list[dict[str, Any]]:
    data, rows = path.read_bytes() if path.exists() else b"", []
    try:
        while data:
            member = zlib.decompressobj(wbits=31)
            text = member.decompress(data)
            if not member.eof:
                break
            rows += [json.loads(line) for line in text.splitlines()]
            data = member.unused_data
    except (ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): copy it anew, or repeat the run") from None
    return rows


def load_adapter(run_dir: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read adapter.safetensors of a run: tensors and metadata."""
    return load_tensors(Path(run_dir) / "adapter.safetensors")


def load_snapshots(run_dir: str | Path) -> dict[int, Path]:
    """Step → file of the adapter that sampled the step's rollouts, in order; UserError where the run stored none."""
    if not (found := sorted((Path(run_dir) / "snapshots").glob("step_*.safetensors"))):
        raise UserError(f"{run_dir} has no snapshots: train it with --snapshot-every N")
    return {int(path.stem.removeprefix("step_")): path for path in found}


def load_deployed(run_dir: str | Path, model: str) -> dict[str, Tensor]:
    """Tensors of the blocks that the run's arm deploys: the deployed block, or both where it deploys as trained."""
    tensors, metadata = load_adapter(run_dir)
    if metadata["model"] != model:
        raise UserError(
            f"{run_dir} adapts {metadata['model']}, not {model}: set --model to the same"
        )
    every = load_record(run_dir).notes["deployed"] == "as_trained"
    return {k: v for k, v in tensors.items() if every or k.split(".")[-2] == "deployed"}


def _lock(out_dir: Path) -> IO[str]:
    """Take the directory's POSIX record lock: forked workers do not inherit it, and a killed process drops it."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / ".lock", "a")
    except OSError as error:
        raise UserError(
            f"cannot write to --out-dir {out_dir} ({error.strerror}): choose another"
        ) from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"another process is running in {out_dir}: wait for it or choose another --out-dir"
        ) from None
    return lock


def _differences(old: RunRecord, new: RunRecord) -> list[str]:
    """Return `config.grpo.steps 60 → 80` for every field of a run's identity that changed."""
    before, after = (
        flatten(json.loads(dumps({k: getattr(r, k) for k in IDENTITY}))) for r in (old, new)
    )
    return [
        f"{key} {before.get(key)!r} → {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.rpartition(".")[2] not in FREE_TO_CHANGE
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one: {"grpo": {"steps": 60}} → {"grpo.steps": 60}."""
    if not isinstance(value, dict):
        return {prefix: value}
    inner = ((f"{prefix}.{key}" if prefix else key, item) for key, item in value.items())
    return {k: v for path, item in inner for k, v in flatten(item, path).items()}


def _record_from(data: dict[str, Any]) -> RunRecord:
    if data["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"the record has schema {data['schema_version']}, newer than {SCHEMA_VERSION}: update vgrout"
        )
    evals = [EvalResult(**entry) for entry in data["evals"]]
    return RunRecord(**{f.name: data[f.name] for f in fields(RunRecord)} | {"evals": evals})


def _pointer_names(out_dir: Path) -> list[str]:
    path = out_dir / "checkpoints" / "latest.json"
    return json.loads(path.read_text()) if path.exists() else []


def _read_pointer(out_dir: Path) -> Path | None:
    names = _pointer_names(out_dir)
    return out_dir / "checkpoints" / names[0] if names else None
