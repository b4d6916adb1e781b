"""Training runs in processes of their own, to be killed: start, watch their phase, kill, compare two runs to the bit.

Processes are forked from the importing one, so that torch is imported once. scripts/verify/chaos.py, verify_faults.py and soak_train.py use it.
"""

import contextlib
import ctypes
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vgrout import train
from vgrout.cli import parse
from vgrout.core import UserError
from vgrout.grader import Grader
from vgrout.run import records
from vgrout.run.records import load_adapter, load_evals, load_metrics, load_rollouts

PHASES = {
    "collect": b"s",
    "grade": b"g",
    "update": b"u",
    "save": b"c",
    "evaluate": b"e",
}  # name → its mark while it runs
TIMES = {
    "sec_refresh",
    "sec_sample",
    "sec_grade",
    "sec_score",
    "sec_update",
    "sec_step",
    "tokens_per_second",
}
AMBIENT = {
    "started",
    "commit",
    "dirty",
    "config.run.out_dir",
}  # of the record; the work tree may move on under a long check
PATIENCE = 600.0  # seconds for one process; the machine may be busy
LIBC = ctypes.CDLL(None, use_errno=True)


# ── a run in a forked process ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Trainer:
    """A run in a process of its own, forked from this one so that torch is imported once."""

    pid: int
    phase: mmap.mmap  # the mark of the phase that it is in, "-" between them
    log: Path
    status: int | None = None

    def wait(self, patience: float = PATIENCE) -> int:
        """The exit status, negative for a signal; TimeoutError, after a kill, if it does not end."""
        end = time.monotonic() + patience
        while not self.ended():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(
                    f"a run did not end within {patience:.0f} s: {self.log.read_text()[-2000:]}"
                )
            time.sleep(0.01)
        return self.status

    def ended(self) -> bool:
        if self.status is None and (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(done[1])
        return self.status is not None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()


def start(
    out: Path,
    *flags: str,
    arm: str = "routeV",
    log: Path | None = None,
    within: Callable[[], object] = lambda: None,
) -> Trainer:
    """Fork a run of the smoke preset into `out`; `within` is called in the child first. It ends as `python -m vgrout.train` does."""
    phase = mmap.mmap(-1, 1)
    phase[:1] = b"-"
    log = log or out.parent / f"{out.name}.log"
    sys.stdout.flush()
    if pid := os.fork():
        return Trainer(pid, phase, log)
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        _mark_phases(phase)
        within()
        code = main(["smoke", "--intervention", arm, "--out-dir", str(out), *flags])
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(argv: list[str]) -> int:
    """What the command line does with the same arguments; returns its exit status."""
    try:
        train.main(*parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except SystemExit as stop:
        return stop.code
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _mark_phases(phase: mmap.mmap) -> None:
    """Let the functions of the phases leave their mark in `phase` while they run."""

    def marked(function: Callable, mark: bytes) -> Callable:
        def wrapper(*args, **kwargs):
            before, phase[:1] = phase[:1], mark
            try:
                return function(*args, **kwargs)
            finally:
                phase[:1] = before

        return wrapper

    for name, mark in PHASES.items():
        owner = Grader if name == "grade" else train
        setattr(owner, name, marked(getattr(owner, name), mark))


# ── what must be equal, and what must be gone ────────────────────────────────────────────────────────────────────


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not have in common: adapter, metrics, rollouts, evaluations, record; wall times and out_dir aside."""
    found = []
    x, y = load_adapter(a)[0], load_adapter(b)[0]
    if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x):
        found.append("adapter.safetensors")
    files = (
        ("metrics.jsonl", load_metrics, TIMES),
        ("rollouts.jsonl.gz", load_rollouts, ()),
        ("evals.jsonl.gz", load_evals, ()),
    )
    for name, load, times in files:
        rows = [
            [{k: v for k, v in row.items() if k not in times} for row in load(folder)]
            for folder in (a, b)
        ]
        if rows[0] != rows[1]:
            odd = {k for p, q in zip(*rows) for k in p.keys() | q.keys() if p.get(k) != q.get(k)}
            found.append(f"{name} ({len(rows[0])} and {len(rows[1])} rows, {sorted(odd)[:5]})")
    one, two = (_timeless(folder) for folder in (a, b))
    return found + [
        f"record.json: {k}" for k in sorted(one.keys() | two.keys()) if one.get(k) != two.get(k)
    ]


def _timeless(folder: Path) -> dict:
    record = records.flatten(json.loads((folder / "record.json").read_text()))
    argv = record.pop("argv")
    record["argv"] = [word for i, word in enumerate(argv) if "--out-dir" not in (word, argv[i - 1])]
    return {k: v for k, v in record.items() if k not in AMBIENT and not k.startswith("seconds.")}


def descendants(pid: int) -> set[int]:
    """All processes below one, by /proc."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob(
            "*/children"
        ):  # of every thread: a replaced worker is a pool thread's
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return set(found[1:])


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    left = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                left.add(pid)
    return left


def orphans(pids: set[int], patience: float = 10.0) -> set[int]:
    """Those of `pids` that have not ended within `patience` seconds."""
    end = time.monotonic() + patience
    while (left := alive(pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def adopt_orphans() -> None:
    """Become the parent of what a killed trainer leaves behind, so that a zombie is reaped here (prctl(2), child subreaper)."""
    LIBC.prctl(36, 1, 0, 0, 0)


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


# ── kills ────────────────────────────────────────────────────────────────────────────────────────────────────────


def kill_in(trainer: Trainer, name: str, rng: random.Random, occurrence: int) -> bool:
    """Kill -9 at a random moment of an occurrence of a phase. False if the run ended first."""
    mark, seen, inside = PHASES[name], 0, False
    while not trainer.ended():
        now = trainer.phase[:1] == mark
        seen, inside = seen + (now and not inside), now
        if now and seen >= occurrence:
            time.sleep(
                rng.random() ** 3
            )  # seconds: mostly within the phase, sometimes in what follows it
            below = descendants(trainer.pid)
            if trainer.ended():
                return False
            trainer.kill()
            assert below, "the trainer had no sandbox worker: the check for orphans means nothing"
            assert not (left := orphans(below)), (
                f"{len(left)} processes outlived a killed trainer: {left}"
            )
            reap()
            return True
        time.sleep(0.001)
    return False
