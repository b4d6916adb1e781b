"""What a completion's process does: compile, execute, call, and write down what it sees. Runs
confined, trusted by nobody.

It leaves records in a shared memory block, not in a descriptor; the worker reads it after this
process is dead. A record is kind (1 byte), length (4 bytes, little endian), payload. Kinds: C
compiled ("" or the error), then per call V value (canonical text), E exception (its type's name) or
O not a plain value (its text, ANY for each part that equals everything; "" if another part is not
plain), at the end A names of true attributes of the instances and Z; for the completion's own tests
S and T ("1" if they return without error with a stub of Solution, and with its own) instead. A
completion that forges records can forge no verdict by it: the parent compares the values with what
it alone holds, and reads a channel only under the mode and marker that it alone holds.
"""

import mmap
import os
import struct
import sys
import time
import types
from typing import Any, NoReturn

from vgrout.grader.plain_values import canonical, list_values, tree_values

REGION = 8 << 20  # bytes of the shared block
RECORDS = 16  # its layout: end of the records (8 bytes), calls begun (8 bytes), records
CHECKS_ENDED = 77  # exit status after the last record: exit status 0 is the completion's own doing
HEADER = struct.Struct("<BI")
COMMIT_EVERY = 0.02  # seconds at least; a call's clock is early by as much
exit_now, monotonic = os._exit, time.monotonic  # before a completion can replace them
# How most setup codes begin, as the benchmark has it; executed once in the template, as a child
# would pay 0.6 ms for it.
IMPORTS = """import random
import functools
import collections
import string
import math
import datetime

from typing import *
from functools import *
from collections import *
from itertools import *
from heapq import *
from bisect import *
from string import *
from operator import *
from math import *
"""
KEPT = {"__dict__", "__weakref__", "__module__", "__doc__"}  # of a class without its methods
UNLIKE = (0, -7.5, "x", [None], (), {}, None, object())
AS_PLAIN = {"list_node": list_values, "tree_node": tree_values}


class Recorder:
    """Buffers records and copies them into the shared block; what does not fit is dropped, and the
    job has no Z.
    """

    def __init__(self, region: mmap.mmap):
        self.region, self.buffer = region, []
        self.position, self.calls = RECORDS, 0
        self.flushed = monotonic()

    def add(self, kind: str, payload: str = "") -> None:
        data = payload.encode("utf-8", "surrogatepass")
        self.buffer.append(HEADER.pack(ord(kind), len(data)) + data)

    def begin_call(self) -> None:
        """Commit what was returned so far, and restart the clocks of one call; those of the job run
        on.
        """
        self.calls += 1
        if (now := monotonic()) - self.flushed < COMMIT_EVERY:
            return
        self.flush()
        self.flushed = now
        self.region[8:RECORDS] = self.calls.to_bytes(8, "little")

    def flush(self) -> None:
        data = b"".join(self.buffer)
        self.buffer = []
        if self.position + len(data) > REGION:
            exit_now(1)
        self.region[self.position : self.position + len(data)] = data
        self.position += len(data)
        self.region[:8] = self.position.to_bytes(8, "little")


def parse_records(data: bytes, most: int) -> list[tuple[str, str]]:
    """At most so many (kind, payload) pairs, up to the first that is cut short. Nothing in them is
    to be trusted.
    """
    records, position = [], 0
    while position + HEADER.size <= len(data) and len(records) < most:
        kind, size = HEADER.unpack_from(data, position)
        position += HEADER.size + size
        if position > len(data):
            break
        payload = data[position - size : position]
        records.append((chr(kind), payload.decode("utf-8", "replace")))
    return records


def leave(status: Any) -> NoReturn:
    """Exit as a program does that raised SystemExit(status): its output is flushed, its clean-up
    handlers do not run.
    """
    try:
        sys.stdout.flush()
    finally:
        clean = status is None or type(status) in (int, bool) and not status & 0xFF
        exit_now(0 if clean else 1)


def guarded(function: Any, *args: Any) -> tuple[Any, str]:
    """(result, "") or (None, name of the exception's type). SystemExit leaves the process, as it
    does in a program.
    """
    try:
        return function(*args), ""
    except SystemExit as error:
        leave(error.code)
    except MemoryError:
        return None, "MemoryError"
    except BaseException as error:
        return None, type.__getattribute__(type(error), "__name__")[:80]


def equals_everything(value: Any) -> bool:
    """Does `==` hold between the value and each of several values of unlike types, which no plain
    value equals?
    """
    return all([bool(value == other) for other in UNLIKE])


def true_attributes(instance: Any) -> set[str]:
    """Names without a leading "__" under which the instance has a true value, no callable."""
    names = set(getattr(instance, "__dict__", ()))
    for cls in type(instance).__mro__[:-1]:  # without object
        names.update(vars(cls))
    found = set()
    for name in names:
        if isinstance(name, str) and not name.startswith("__"):
            value, error = guarded(getattr, instance, name)
            if not error and not callable(value) and guarded(bool, value)[0] is True:
                found.add(name)
    return found


def one_call(
    module: dict[str, Any], entry: str, call: types.CodeType, ours: dict[str, Any]
) -> tuple[Any, Any]:
    """A new Solution, and what the call on it returns. Its arguments see the names of `ours`."""
    instance = module["Solution"]()
    return instance, eval(call, ours, {"__call__": getattr(instance, entry)})


def run_calls(
    record: Recorder, ours: dict[str, Any], module: dict[str, Any], job: dict[str, Any]
) -> None:
    """One new Solution, one call and one record for each ground-truth test."""
    attributes = set()
    for call, compare in zip(job["calls"], job["compares"], strict=True):
        record.begin_call()
        returned, error = guarded(one_call, module, job["entry"], call, ours)
        if error:
            record.add("E", error)
            continue
        instance, value = returned
        text, error = guarded(as_text, value, compare)
        if error:
            record.add("O", guarded(canonical, value, equals_everything)[0] or "")
        else:
            record.add("V", text)
        attributes |= true_attributes(instance)
    record.add("A", "\0".join(sorted(attributes)[:64]))


def as_text(value: Any, compare: str) -> str:
    return canonical(value if compare == "plain" else AS_PLAIN[compare](value))


def run_own_tests(
    record: Recorder, module: dict[str, Any], code: types.CodeType, name: str
) -> None:
    """Call the completion's own test function, first with Solution replaced by an empty stub, then
    as it was written.

    The methods are removed from the class itself, too, so that instances made before the
    replacement are stubs as well.
    """
    for kind, names in (("S", module), ("T", dict(module))):
        error = guarded(exec, code, names)[1]
        if kind == "S" and not error:
            solution = names.get("Solution", object)
            for attribute in set(vars(solution)) - KEPT:
                guarded(delattr, solution, attribute)
            names["Solution"] = type("Solution", (), {})
        error = error or guarded(lambda names=names: names[name]())[1]
        record.add(kind, "" if error else "1")


class PipeEnd:
    """One end of a pipe with what asyncio's event loop asks of its own socket pair: no socket can
    be made here.
    """

    def __init__(self, descriptor: int):
        self.fileno = lambda: descriptor
        self.recv = lambda size: os.read(descriptor, size)
        self.send = lambda data: os.write(descriptor, data)
        self.close = lambda: os.close(descriptor)


def make_self_pipe(loop: Any) -> None:
    """In place of asyncio.selector_events.BaseSelectorEventLoop._make_self_pipe."""
    loop._ssock, loop._csock = map(PipeEnd, os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
    loop._internal_fds += 1
    loop._add_reader(loop._ssock.fileno(), loop._read_from_self)


def run_completion(
    region: mmap.mmap, job: dict[str, Any], ours: dict[str, Any], module: dict[str, Any]
) -> NoReturn:
    """Compile, execute in `module`, call with arguments of `ours`; never returns."""
    record = Recorder(region)
    try:
        code = compile(
            job["code"].decode("utf-8", "surrogatepass"), "<completion>", "exec", dont_inherit=True
        )
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        record.add("C", type(error).__name__)
        record.flush()
        exit_now(CHECKS_ENDED)
    record.add("C")
    record.flush()
    if job["own_tests"]:
        run_own_tests(record, module, code, job["own_tests"])
    else:
        error = guarded(exec, code, module)[1]
        if error:
            record.add("E", error)
        else:
            run_calls(record, ours, module, job)
    guarded(lambda: sys.stdout.flush())
    record.add("Z")
    record.flush()
    exit_now(CHECKS_ENDED)
