"""What ends a run from outside: signals, full memory, full disk; and the status that they leave."""

import errno
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vgrout.core import UserError
from vgrout.run.records import Run

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # device, quota, size, read-only


class Stopped(SystemExit):
    """A signal asked for the stop; the exit status is 128 and the signal's number."""


class StopSignal:
    """SIGTERM and SIGINT ask for a stop, a second one stops at once.

    `check` stands wherever a run may stop: behind every step and every evaluation's cell.
    """

    def __init__(self):
        self.asked = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number

    def check(self) -> None:
        """End the run here if a signal has asked for it."""
        if self.asked:
            raise Stopped(128 + self.asked)


@contextmanager
def recorded(run: Run) -> Iterator[Run]:
    """The run's record ends with a truthful status that names the newest checkpoint's step."""
    try:
        yield run
    except BaseException as error:
        if run.record.status == "running":
            step = run.saved_step
            last = "no checkpoint" if step is None else f"checkpoint: step {step}"
            interrupted = isinstance(error, KeyboardInterrupt | Stopped)
            status = "interrupted" if interrupted else f"failed: {describe(error)}"
            run.finish(f"{status} ({last})")
        raise
    finally:
        run.close()


@contextmanager
def explained() -> Iterator[None]:
    """Memory or disk that is full becomes a UserError that says what to lower or free."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not (memory_is_full(error) or _disk_is_full(error)):
            raise
        raise UserError(describe(error)) from error


def describe(error: BaseException) -> str:
    """One line for an exception: what was full and what mends it, or its type and message."""
    if memory_is_full(error):
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == "sample" for frame in frames):
            return "out of memory while sampling: lower --sample-token-budget"
        return (
            "out of memory while training or scoring: lower --token-budget, then set "
            "--gradient-checkpointing, then lower --num-generations or --max-completion-length"
        )
    if _disk_is_full(error):
        where = error.filename or "the run directory"
        return f"cannot write {where} ({error.strerror}): make room there, then add --resume"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def memory_is_full(error: BaseException) -> bool:
    """CUDA has a type of its own; on the CPU it is a RuntimeError, whose text alone tells."""
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return True
    full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return full or getattr(error, "errno", None) == errno.ENOMEM


def _disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FULL
