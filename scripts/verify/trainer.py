"""Training runs in processes of their own, to be killed in a phase; two runs compared to the bit.

Processes are forked from the importing one, so that torch is imported once. For verify_faults.py.
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

from scripts.verify.loop import SECONDS, same_adapter

from vgrout import train
from vgrout.cli import parse
from vgrout.core import run_main
from vgrout.run import evaluate, records
from vgrout.run.records import Run, load_evals, load_metrics, load_rollouts

PHASES = {  # name → the function that it is
    "sample": (train, "sample_groups"),
    "grade": (train, "grade_groups"),
    "update": (train, "update"),
    "save": (Run, "checkpoint"),
    "evaluate": (evaluate, "evaluate"),
}
ORDER = [*PHASES]
AMBIENT = set(  # of the record; the work tree may move on under a long check
    "started commit dirty notes.commits config.run.out_dir config.run.resume argv".split()
)
PATIENCE = 600.0  # seconds for one process; the machine may be busy
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class Trainer:
    """A run in a process of its own; `begun` counts how often each phase has begun."""

    pid: int
    begun: mmap.mmap
    log: Path
    status: int | None = None

    def ended(self) -> bool:
        if self.status is None and (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(done[1])
        return self.status is not None

    def wait_until(self, holds: Callable[[], object], pause: float = 0.0005) -> bool:
        """Wait until something holds; False if the run ended before."""
        end = time.monotonic() + PATIENCE
        while not self.ended():
            if holds():
                return True
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"{PATIENCE:.0f} s: {self.log.read_text()[-2000:]}")
            time.sleep(pause)
        return False

    def enters(self, phase: str, nth: int = 0) -> bool:
        """Wait for a phase to begin for the nth time, or once more; False: the run ended before."""
        place = ORDER.index(phase)
        nth = nth or self.begun[place] + 1
        return self.wait_until(lambda: self.begun[place] >= nth)

    def ends(self, code: int) -> str:
        """Wait for the end with this exit status (negative for a signal); the last line printed."""
        self.wait_until(lambda: False, pause=0.01)
        text = self.log.read_text()
        assert self.status == code, f"exit {self.status}, not {code}: {text[-3000:]}"
        return text.strip().splitlines()[-1] if text.strip() else ""

    def kill(self) -> None:
        """Kill -9; nothing that it started may stay."""
        below = descendants(self.pid)
        os.kill(self.pid, signal.SIGKILL)
        self.ends(-signal.SIGKILL)
        end = time.monotonic() + 10
        while alive(below) and time.monotonic() < end:
            time.sleep(0.05)
        assert below, "the trainer had no sandbox worker: the check for orphans means nothing"
        assert not (left := alive(below)), f"{len(left)} processes outlived a killed trainer"
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def start(
    out: Path, *flags: str, arm: str = "routeV", within: Callable[[], object] = lambda: None
) -> Trainer:
    """Fork a run of the smoke preset into `out`, as the command line does it.

    It continues the run that `out` holds. `within` is called in the child first.
    """
    begun, log = mmap.mmap(-1, len(PHASES)), out.parent / f"{out.name}.log"
    resume = ["--resume"] * (out / "record.json").exists()
    argv = ["smoke", "--intervention", arm, "--out-dir", str(out), *flags, *resume]
    sys.stdout.flush()
    if pid := os.fork():
        return Trainer(pid, begun, log)
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        for place, (owner, name) in enumerate(PHASES.values()):
            setattr(owner, name, counted(getattr(owner, name), begun, place))
        within()
        run_main(lambda: train.main(*parse(argv)))
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def counted(function: Callable, begun: mmap.mmap, place: int) -> Callable:
    """The function, which counts its calls in `begun`."""

    def wrapper(*args, **kwargs):
        begun[place] += 1
        return function(*args, **kwargs)

    return wrapper


def kill_in(run: Trainer, name: str, rng: random.Random, nth: int = 1) -> bool:
    """Kill -9 at a random moment of a phase, or soon after it. False if the run ended first."""
    if run.enters(name, nth):
        time.sleep(rng.random() ** 3)  # seconds: mostly within the phase
    if run.ended():
        return False
    run.kill()
    return True


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not share; wall times and their folders aside."""
    found = [] if same_adapter(a, b) else ["adapter.safetensors"]
    for load in (load_metrics, load_rollouts, load_evals, flat_record):
        one, two = load(a), load(b)
        keys = {k for p, q in zip(one, two) for k in p.keys() | q.keys() if p.get(k) != q.get(k)}
        if keys - SECONDS or len(one) != len(two):
            found.append(f"{load.__name__}: {len(one)} and {len(two)} rows, {sorted(keys)[:5]}")
    return found


def flat_record(folder: Path) -> list[dict]:
    record = records.flatten(json.loads((folder / "record.json").read_text()))
    return [{k: v for k, v in record.items() if k not in AMBIENT and "seconds." not in k}]


def descendants(pid: int) -> set[int]:
    """All processes below one, by /proc."""
    found = [pid]
    for parent in found:  # of every thread: a replaced worker is a pool thread's child
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return {*found[1:]}


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    left = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                left.add(pid)
    return left


def adopt_orphans() -> None:
    """Become the parent of what a killed trainer leaves behind (prctl(2), child subreaper)."""
    LIBC.prctl(36, 1, 0, 0, 0)
