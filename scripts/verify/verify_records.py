"""Run folders and files: a kill at any write loses nothing, and every refusal is a UserError.

A small run (noise, appended files, a checkpoint every second step) is killed at its writes in turn,
in the middle of the bytes, then resumed, and must leave the files of the whole run. This covers
a killed process, not a machine that loses power.

Run: python scripts/verify/verify_records.py [--long]     (--long: at every write, not each third)
"""

import copy
import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from scripts.verify.stored import answer, in_fork, novel_cell, planted_record

from vgrout import files as store
from vgrout.core import RunRecord
from vgrout.run import provenance, records
from vgrout.run.records import (
    SCHEMA_VERSION,
    Run,
    load_evals,
    load_metrics,
    load_record,
    load_rollouts,
)

STEPS = 7
KILLED = -signal.SIGKILL
ROOT = Path(tempfile.mkdtemp(prefix="verify_records_"))
WHOLE = ROOT / "reference"
CELL = novel_cell(0, 1, 2)
DATA, OTHER = "problems.jsonl", "pool.jsonl"
RECORD = planted_record(
    commit="c",
    config={"grpo": {"steps": STEPS}, "run": {"out_dir": "a"}, "data": {"data": DATA}},
    data_hashes={DATA: "d", OTHER: "o"},
    split_hashes={"train": "t"},
)
METADATA = {"seed": "41", "arm": "routeV", "rank": "8", "model": "tiny"}
FILES = ("record.json", "metrics.jsonl", "rollouts.jsonl.gz", "adapter.safetensors")


def check(what: str, holds: bool, mutant_holds: bool) -> None:
    assert holds, f"broken: {what}"
    assert not mutant_holds, f"the check cannot fail: {what}"
    print(f"ok  {what}", flush=True)


def new_record(**changes: object) -> RunRecord:
    return copy.deepcopy(replace(RECORD, **changes))


def small_run(folder: Path, resume: bool) -> None:
    """Noise that is a function of the step, logged, evaluated and stored as a run does."""
    run = Run.create(folder, new_record(), resume)
    first, weights = 0, torch.zeros(4)
    if checkpoint := run.load_checkpoint():
        first, weights = checkpoint[0], checkpoint[1]["weights"] * checkpoint[2]["scale"]
    for step in range(first, STEPS):
        draws = torch.randn(3, generator=torch.Generator().manual_seed(step)).tolist()
        weights = weights * 0.9 + sum(draws)
        run.log_rollouts([{"step": step, "text": "x" * 50, "draw": draw} for draw in draws])
        run.log_metrics({"step": step, "loss": float(weights.sum()), "kl": float("nan")})
        if step % 3 == 0:
            run.record.evals.append(CELL)
        run.record.steps_done = step + 1
        run.save()
        if step % 2:
            run.checkpoint(step + 1, {"weights": weights / 4}, {"scale": 4.0})
    run.save_adapter({"b": weights, "a": torch.ones(2)}, METADATA)
    run.finish("finished")


# ── kills ────────────────────────────────────────────────────────────────────────────────────────


def killed_at(folder: Path, nth: int, half: bool) -> int:
    """Kill a run at its nth write: before it or, with `half`, after half of its bytes."""
    left = [nth]

    def body() -> None:
        write_atomic, append = records.write_atomic, Run._append

        def die(path: Path, data: bytes) -> None:
            left[0] -= 1
            if left[0] < 0:
                with open(path, "ab") as file:
                    file.write(data[: len(data) // 2 if half else 0])
                os.kill(os.getpid(), signal.SIGKILL)

        def dying_atomic(path: Path, data: bytes) -> None:
            die(path.with_name(path.name + ".tmp"), data)
            write_atomic(path, data)

        def dying_append(self: Run, name: str, data: bytes) -> None:
            die(self.dir / name, data)
            append(self, name, data)

        records.write_atomic, Run._append = dying_atomic, dying_append
        small_run(folder, False)

    return in_fork(body)


def files_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def resumes_exactly(nth: int, half: bool) -> bool | None:
    """Does the killed and resumed run equal the whole one? None: it was not killed at all."""
    folder = ROOT / f"kill_{nth}_{half}"
    if killed_at(folder, nth, half) != KILLED:
        return None
    rows, rollouts = (load_metrics(folder), load_rollouts(folder))  # readable, whatever the moment
    assert [row["step"] for row in rows] == [*range(len(rows))]
    assert len(rollouts) - 3 * len(rows) in (0, 3)
    exact = in_fork(small_run, folder, True) == 0 and files_of(folder) == files_of(WHOLE)
    shutil.rmtree(folder)
    return exact


def verify_kills(every: int) -> None:
    assert in_fork(small_run, WHOLE, False) == 0
    outcomes: list[bool] = []
    for nth in range(0, 10_000, every):
        pair = [resumes_exactly(nth, half) for half in (False, True)]
        if pair == [None, None]:
            break
        outcomes += pair
    with mock.patch.object(records.os, "truncate"):
        uncut = resumes_exactly(14, False)
    what = f"a run killed at any of {len(outcomes)} points resumes to the same bytes"
    check(what, all(outcomes), uncut)
    kept = sorted(path.name for path in (WHOLE / "checkpoints").iterdir())
    assert kept == ["latest.json", "step_000004_0", "step_000006_0"], kept


# ── refusals, restarts, the lock ─────────────────────────────────────────────────────────────────


def opened(folder: Path, resume: bool = True, accept: bool = False, **changes) -> str:
    """The line with which a directory is refused to a record, "" where it is opened."""
    record = new_record(**changes)
    return answer(lambda: Run.create(folder, record, resume, accept).close())


def unfinished(name: str, killed: int = 12) -> Path:
    """A run that was killed at one of its writes: before its first checkpoint, or behind it."""
    killed_at(ROOT / name, killed, False)
    return ROOT / name


def verify_refusals() -> None:
    lines = [opened(WHOLE, resume) for resume in (False, True)]
    fresh = opened(ROOT / "fresh", resume=False)
    check("a finished run is refused", all("finished" in line for line in lines), bool(fresh))
    folder = unfinished("unfinished")
    steps = RECORD.config | {"grpo": {"steps": 9}}
    out_dir = RECORD.config | {"run": {"out_dir": "b"}}
    line = opened(folder, config=steps)
    check(
        "another config is refused at resume with the difference, another out_dir is not",
        f"config.grpo.steps {STEPS} → 9" in line,
        bool(opened(folder, config=out_dir)),
    )
    assert "--resume" in opened(folder, resume=False)
    path = folder / "record.json"
    whole = path.read_text()
    newer = json.dumps(json.loads(whole) | {"schema_version": SCHEMA_VERSION + 1})
    bare = json.dumps({"schema_version": SCHEMA_VERSION})
    for text, words in (
        (newer, "newer"),
        (bare, "not a run record"),
        ("{", "rerun the run"),
    ):
        path.write_text(text)
        assert words in opened(folder), words
    path.write_text(whole)
    check("a damaged or newer record is refused", True, bool(opened(folder)))
    assert "--out-dir" in opened(Path("/proc/vgrout"), resume=False)


def verify_changed_data() -> None:
    """Problems with corrected rows are taken when that is said, and noted; nothing else is."""
    folder = unfinished("changed")
    rows, pool = (RECORD.data_hashes | {file: "new"} for file in (DATA, OTHER))
    silent = opened(folder, data_hashes=rows)
    others = opened(folder, accept=True, data_hashes=pool)
    moved = opened(folder, accept=True, data_hashes=rows, split_hashes={"train": "u"})
    assert not opened(folder, accept=True, data_hashes=rows)
    note = json.loads((folder / "resumes.jsonl").read_text().splitlines()[-1])
    assert note["changed"] == {f"data_hashes.{DATA}": ["d", "new"]}, note
    assert load_record(folder).data_hashes == rows
    refused = f"data_hashes.{DATA} 'd' → 'new'" in silent and OTHER in others and DATA in moved
    what = "corrected problems are taken when told so and noted, another file or split never"
    check(what, refused, bool(opened(folder, data_hashes=rows)))


def verify_restarts() -> None:
    """A record names the commits that its run is of: a restart from nothing has its own."""

    def commits(killed: int) -> list[tuple[str, list[str]]]:
        folder, seen = unfinished(f"commits_{killed}", killed), []
        for commit in ("d", "d", "e"):
            run = Run.create(folder, new_record(commit=commit), True)
            seen.append((run.record.commit, run.record.notes.get("commits", [])))
            if run.load_checkpoint():
                run.checkpoint(2, {"weights": torch.zeros(4)}, {"scale": 4.0})
            run.close()
        return seen

    afresh = [("d", []), ("d", []), ("e", [])]
    continued = [("c", ["c", "d"]), ("c", ["c", "d"]), ("c", ["c", "d", "e"])]
    whole = commits(3) == afresh and commits(20) == continued
    with mock.patch.object(records, "_newest", lambda out_dir: None):
        mutant = commits(21) == continued
    check("a record names every commit of its run", whole, mutant)


def verify_lock() -> None:
    folder = ROOT / "locked"
    run = Run.create(folder, new_record(), False)
    second = in_fork(Run.create, folder, new_record(), True)
    run.close()
    after = in_fork(Run.create, folder, new_record(), True)
    check("a second process on the same directory is refused", second == 2, after == 2)

    def owner_dies_and_worker_stays(pipe: int) -> None:
        owner = Run.create(folder, new_record(), True)  # held: the kill gives up the lock
        if (worker := os.fork()) == 0:
            signal.pause()
        os.write(pipe, str(worker).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        owner.close()

    def reopened() -> bool:
        reading, writing = os.pipe()
        in_fork(owner_dies_and_worker_stays, writing)
        worker = int(os.read(reading, 20))
        status = in_fork(Run.create, folder, new_record(), True)
        os.kill(worker, signal.SIGKILL)
        return status == 0

    kept = reopened()
    with mock.patch.object(fcntl, "lockf", fcntl.flock):
        inherited = reopened()
    check("a killed owner's forked workers do not keep the lock", kept, inherited)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def verify_files() -> None:
    row = {"a": float("nan"), "b": [np.float32("inf")], "c": torch.tensor(2)}
    finite = {"a": None, "b": [None], "c": 2}
    loose = json.loads(json.dumps({"a": float("nan")}))["a"] is None
    check(
        "what is not finite is written as null",
        json.loads(store.dumps(row)) == finite,
        loose,
    )
    metadata = {str(i): str(i) for i in range(8)}
    tensors = {"x": torch.arange(4.0)}
    packers = store.pack, safetensors.torch.save
    same = [len({pack(tensors, metadata) for _ in range(8)}) == 1 for pack in packers]
    check("an adapter with the same content has the same bytes", *same)
    assert records.load_adapter(WHOLE)[1] == METADATA


def verify_dirty() -> None:
    """Changed code makes a run dirty; a record that was stored since does not."""
    tree = ROOT / "tree"
    source, stored = tree / "src", tree / "data" / "records"
    for folder in (source, stored):
        folder.mkdir(parents=True)
        (folder / "kept").touch()
    who = "-c user.name=a -c user.email=a@b.c commit -qm a".split()
    for command in (["init", "-q"], ["add", "-A"], who):
        subprocess.run(["git", "-C", tree, *command], check=True)
    (stored / "new").touch()
    after_record = provenance.dirty(source)
    (tree / "new").touch()
    changed = provenance.dirty(source)
    what = "a new record leaves the tree clean, a new file elsewhere does not"
    check(what, not after_record, not changed)
    untouched = provenance.uncommitted(source)
    (source / "kept").write_text("x = 1\n")
    what = "a patch holds what was changed since the commit"
    check(what, "+x = 1" in provenance.uncommitted(source), untouched)


def verify_damage() -> None:
    """What a kill cut is left out; what is damaged otherwise is refused."""
    whole = (WHOLE / "rollouts.jsonl.gz").read_bytes()
    (ROOT / "rollouts.jsonl.gz").write_bytes(whole[:-5])
    rows = len(load_rollouts(ROOT))
    check(
        "a cut file reads up to its last whole step",
        rows == 3 * (STEPS - 1),
        rows == 3 * STEPS,
    )
    broken = ROOT / "cut.safetensors"
    broken.write_bytes((WHOLE / "adapter.safetensors").read_bytes()[:-3])
    assert "safetensors" in answer(store.load_tensors, broken)
    for name, read, rest in (
        ("metrics.jsonl", load_metrics, b"no JSON\n"),
        ("rollouts.jsonl.gz", load_rollouts, b"no gzip"),
        ("evals.jsonl.gz", load_evals, gzip.compress(b"no JSON\n")),
    ):
        (ROOT / name).write_bytes((WHOLE / name).read_bytes())
        assert not answer(read, ROOT), name
        with open(ROOT / name, "ab") as file:
            file.write(rest)
        assert "copy it anew" in answer(read, ROOT), name


if __name__ == "__main__":
    torch.set_num_threads(1)  # forked processes must not inherit a thread pool
    try:
        verify_kills(every=1 if "--long" in sys.argv else 3)
        verify_refusals()
        verify_changed_data()
        verify_restarts()
        verify_lock()
        verify_files()
        verify_dirty()
        verify_damage()
    finally:
        shutil.rmtree(ROOT)
