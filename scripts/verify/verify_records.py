"""Checks of vgrout.run.records and vgrout.files: a kill at any write loses nothing, and every refusal is a UserError.

A small run (noise, appended files, a checkpoint every second step) is killed at each of its writes in
turn, in the middle of the bytes, then resumed, and must leave the files of an uninterrupted run. This covers a killed
process, not a machine that loses power.

Run: python scripts/verify/verify_records.py [--long]     (--long kills at every write and half-write, else at every third)
"""

import fcntl
import gzip
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vgrout import files as store
from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.run import records
from vgrout.run.provenance import provenance
from vgrout.run.records import (
    SCHEMA_VERSION,
    Run,
    load_evals,
    load_metrics,
    load_record,
    load_rollouts,
)

STEPS, KILLED = 7, -signal.SIGKILL
ROOT = Path(tempfile.mkdtemp(prefix="verify_records_"))


def check(what: str, holds: bool, mutant_holds: bool) -> None:
    assert holds, f"broken: {what}"
    assert not mutant_holds, f"the check cannot fail: {what}"
    print(f"ok  {what}", flush=True)


@contextmanager
def patched(module, name: str, value):
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield original
    finally:
        setattr(module, name, original)


def in_fork(body, *arguments) -> int:
    """Run `body` in a forked process; return its exit code, negative for a signal, 3 for an exception."""
    if (pid := os.fork()) == 0:
        try:
            body(*arguments)
            os._exit(0)
        except UserError:
            os._exit(2)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def new_record(**config) -> RunRecord:
    return RunRecord(
        schema_version=SCHEMA_VERSION,
        arm="routeV",
        preset="smoke",
        seed=41,
        pair_hash="p",
        config={"grpo": {"steps": STEPS, "rates": (0.1, 0.2)}, "run": {"out_dir": "a"}} | config,
        argv=["python"],
        commit="c",
        dirty=False,
        versions={},
        data_hashes={},
        split_hashes={},
        sandbox_layers={},
        status="running",
        started="2026-01-01T00:00:00+00:00",
    )


def small_run(folder: Path, resume: bool) -> None:
    """Train nothing, but accumulate noise that is a function of the step, log, evaluate and checkpoint as a run does."""
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
            run.record.evals.append(
                EvalResult("val", "novel", "deployed", step, 4, 1, 2, {}, {"a": [4, 1, 2]})
            )
        run.record.steps_done = step + 1
        run.save()
        if step % 2:
            run.checkpoint(step + 1, {"weights": weights / 4}, {"scale": 4.0})
    run.save_adapter(
        {"b": weights, "a": torch.ones(2)}, {"seed": "41", "arm": "routeV", "rank": "8"}
    )
    run.finish("finished")


def killed_at(folder: Path, nth: int, half: bool) -> int:
    """Kill the run at its nth write to disk, before the write or, with `half`, after half of its bytes."""
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

        with patched(records, "write_atomic", dying_atomic), patched(Run, "_append", dying_append):
            small_run(folder, False)

    return in_fork(body)


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("record.json", "metrics.jsonl", "rollouts.jsonl.gz", "adapter.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def resumes_exactly(reference: dict[str, bytes], nth: int, half: bool) -> tuple[bool, bool]:
    """Return whether the run was killed at all, and whether the resumed run equals the reference."""
    folder = ROOT / f"kill_{nth}_{half}"
    if killed_at(folder, nth, half) != KILLED:
        return False, True
    rows, rollouts = (
        load_metrics(folder),
        load_rollouts(folder),
    )  # readable at once, whatever the moment
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rollouts) - 3 * len(
        rows
    ) in (0, 3)
    exact = in_fork(small_run, folder, True) == 0 and files_of(folder) == reference
    shutil.rmtree(folder)
    return True, exact


def verify_kills(every: int) -> None:
    assert in_fork(small_run, ROOT / "reference", False) == 0
    reference, outcomes = files_of(ROOT / "reference"), []
    for nth in range(0, 10_000, every):
        pair = [resumes_exactly(reference, nth, half) for half in (False, True)]
        if not any(killed for killed, _ in pair):
            break
        outcomes += [exact for _, exact in pair]
    mutants = []  # a resume that does not cut the files back, and one that starts from other tensors
    for module, name, value in (
        (records.os, "truncate", lambda path, length: None),
        (records, "load_tensors", lambda path: ({"weights": torch.zeros(4)}, {})),
    ):
        with patched(module, name, value):
            mutants.append(resumes_exactly(reference, 14, False)[1])
    check(
        f"a run killed at any of {len(outcomes)} points resumes to the same bytes",
        all(outcomes),
        any(mutants),
    )
    kept = sorted(path.name for path in (ROOT / "reference" / "checkpoints").iterdir())
    assert kept == ["latest.json", "step_000004_0", "step_000006_0"], kept


def refused(folder: Path, record: RunRecord, resume: bool, words: str) -> bool:
    try:
        Run.create(folder, record, resume).close()
    except UserError as error:
        return words in str(error) and "\n" not in str(error)
    return False


def verify_refusals() -> None:
    finished = ROOT / "reference"
    check(
        "a finished run is refused, with --resume too",
        refused(finished, new_record(), False, "finished")
        and refused(finished, new_record(), True, "finished"),
        refused(ROOT / "fresh", new_record(), True, "finished"),
    )
    unfinished = ROOT / "unfinished"
    killed_at(unfinished, 12, False)
    elsewhere = new_record(run={"out_dir": "b"})
    other = new_record(grpo={"steps": 9, "rates": (0.1, 0.2)})
    check(
        "another config is refused at resume with the difference, another out_dir is not",
        refused(unfinished, other, True, f"config.grpo.steps {STEPS} → 9"),
        refused(unfinished, elsewhere, True, ""),
    )
    assert refused(unfinished, new_record(), False, "--resume")
    newer = json.loads((unfinished / "record.json").read_text()) | {
        "schema_version": SCHEMA_VERSION + 1
    }
    (unfinished / "record.json").write_text(json.dumps(newer))
    older = newer | {"schema_version": SCHEMA_VERSION}
    answer = refused(unfinished, new_record(), True, "newer")
    (unfinished / "record.json").write_text(json.dumps(older))
    check("a newer schema is refused", answer, refused(unfinished, new_record(), True, "newer"))
    (unfinished / "record.json").write_text("{")
    assert refused(unfinished, new_record(), True, "not a run record")
    assert refused(Path("/proc/vgrout"), new_record(), False, "--out-dir")


def verify_lock() -> None:
    folder = ROOT / "locked"
    run = Run.create(folder, new_record(), False)
    second = in_fork(Run.create, folder, new_record(), True)
    with patched(records.fcntl, "lockf", lambda *arguments: None):
        unlocked = in_fork(Run.create, folder, new_record(), True)
    check("a second process on the same directory is refused", second == 2, unlocked == 2)
    run.close()

    def owner_dies_and_worker_stays(pipe: int) -> None:
        run = Run.create(folder, new_record(), True)
        if (worker := os.fork()) == 0:
            signal.pause()
        os.write(pipe, str(worker).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        run.close()  # never reached: the kill gives up the lock

    def reopened() -> bool:
        reading, writing = os.pipe()
        in_fork(owner_dies_and_worker_stays, writing)
        worker = int(os.read(reading, 20))
        answer = in_fork(Run.create, folder, new_record(), True)
        os.kill(worker, signal.SIGKILL)
        return answer == 0

    kept = reopened()
    with patched(records.fcntl, "lockf", fcntl.flock):
        inherited = reopened()
    check("a killed owner's forked workers do not keep the lock", kept, inherited)


def verify_files() -> None:
    def strict(text: str) -> bool:
        try:
            return json.loads(text, parse_constant=lambda name: 1 / 0) is not None
        except ZeroDivisionError:
            return False

    row = {
        "a": float("nan"),
        "b": [float("inf"), np.float32("nan")],
        "c": torch.tensor(2),
        "d": np.arange(2),
    }
    assert json.loads(store.dumps(row)) == {"a": None, "b": [None, None], "c": 2, "d": [0, 1]}
    check(
        "NaN and infinities are written as null",
        strict(store.dumps(row)),
        strict(json.dumps({"a": float("nan")})),
    )
    metadata = {str(i): str(i) for i in range(8)}
    tensors = {"x": torch.arange(4.0)}
    same = [
        len({pack(tensors, metadata) for _ in range(8)}) == 1 for pack in (store.pack, store.save)
    ]
    check("an adapter with the same content has the same bytes", *same)
    path = ROOT / "reference" / "adapter.safetensors"
    assert records.load_adapter(path.parent)[1] == {"seed": "41", "arm": "routeV", "rank": "8"}
    broken = ROOT / "cut.safetensors"
    broken.write_bytes(path.read_bytes()[:-3])
    try:
        store.load_tensors(broken)
        raise AssertionError("a cut safetensors file was read")
    except UserError as error:
        assert "safetensors" in str(error)
    cut = ROOT / "rollouts.jsonl.gz"
    cut.write_bytes((ROOT / "reference" / "rollouts.jsonl.gz").read_bytes()[:-5])
    try:
        plain = len(gzip.decompress(cut.read_bytes()).splitlines())
    except EOFError:
        plain = -1
    check(
        "a cut rollout file reads up to its last whole step",
        len(load_rollouts(ROOT)) == 3 * (STEPS - 1),
        plain >= 0,
    )
    for name, read, rest in (("metrics.jsonl", load_metrics, b"no JSON\n"), ("rollouts.jsonl.gz", load_rollouts, b"no gzip"),
                             ("evals.jsonl.gz", load_evals, gzip.compress(b"no JSON"))):  # fmt: skip
        whole = (ROOT / "reference" / name).read_bytes()
        found = []
        for data in (whole, whole + rest):
            (ROOT / name).write_bytes(data)
            try:
                read(ROOT)
                found.append("")
            except UserError as error:
                found.append(str(error))
        assert found[0] == "" and f"{name} is damaged" in found[1], f"{name}: {found}"
    record = load_record(ROOT / "reference")
    assert record.status == "finished" and record.evals[0] == EvalResult(
        "val", "novel", "deployed", 0, 4, 1, 2, {}, {"a": [4, 1, 2]}
    )
    assert set(provenance()["versions"]) >= {"python", "torch", "transformers", "vgrout"}


if __name__ == "__main__":
    torch.set_num_threads(1)  # forked processes must not inherit a thread pool
    try:
        verify_kills(every=1 if "--long" in sys.argv else 3)
        verify_refusals()
        verify_lock()
        verify_files()
    finally:
        shutil.rmtree(ROOT)
