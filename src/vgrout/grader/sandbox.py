"""A pool of isolated workers that run completions; what each layer promises stands in docs/sandbox.md.

A worker is a separate interpreter with a scrubbed environment that forks a confined child per job (`worker`). This
module is the trusted side: it sends code and inputs, and receives facts. Expected values never leave this process.
"""

import importlib.util
import json
import marshal
import os
import pwd
import queue
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vgrout.core import UserError

LEVELS = ("best", "require")
WORKER = Path(__file__).with_name("worker.py")
PACKAGES = ("numpy", "sortedcontainers")  # offered to completions, as LeetCode's environment does
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
NO_CALLS = marshal.dumps(())
GRACE = 10.0  # seconds beyond a job's wall limit until the worker itself is given up
MAX_REPLY = 16 << 20  # bytes


class SandboxError(Exception):
    """The sandbox itself failed, twice: nothing is known about the completion, so nothing may be scored."""


@dataclass(frozen=True, slots=True)
class Job:
    """One process' worth of work: execute `code`, then either the ground-truth calls or the completion's own tests."""

    code: str
    setup: str = ""  # trusted preamble
    entry: str = ""  # method of Solution
    calls: bytes = (
        NO_CALLS  # marshalled tuple of code objects, each the expression `__call__(<arguments>)`
    )
    compares: tuple[str, ...] = ()  # per call: plain | list_node | tree_node
    own_tests: str = ""  # the function to call instead of the calls
    phrase: str = ""  # look for it in the output
    file: str = ""  # read the plain file of this name, left in the working directory
    cpu_seconds: float = (
        8.0  # for one call; 3 times as much wall time, 8 times as much of both for the job
    )
    memory_mb: int = 512  # above the worker's own size


@dataclass(frozen=True, slots=True)
class Result:
    """What the worker saw from outside (all but `records`), and what the child wrote down about itself (`records`)."""

    status: int  # exit status, or minus the signal that ended the process
    exceeded: str  # the limit that ended it: cpu | wall | disk, or ""
    cpu: float  # seconds
    wall: float  # seconds
    said: bool  # the phrase is in the first 16 MiB of the output
    file: str  # the first 4 KiB of the file, "" if there is no plain file of that name
    records: tuple[tuple[str, str], ...]  # (kind, payload) in order; see worker


class _Worker:
    """One worker process and the two pipes to it."""

    def __init__(
        self,
        slot: int,
        directory: str,
        readable: list[str],
        packages: list[str],
        without: frozenset[str],
    ):
        scratch = os.path.join(directory, str(slot))
        os.makedirs(scratch, mode=0o700, exist_ok=True)
        config = {
            "scratch": scratch,
            "readable": readable,
            "packages": packages,
            "uid": _free_uid(slot),
            "without": sorted(without),
        }
        self.slot, self.scratch = slot, scratch
        self.process = subprocess.Popen(
            [sys.executable, "-sSBP", str(WORKER), json.dumps(config)],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        self.layers: dict[str, str] = {}

    def greet(self) -> None:
        """Wait until the worker is ready. In a mount namespace its scratch directory is its own: ours can go."""
        try:
            self.layers = self._receive(time.monotonic() + 60)[0]["layers"]
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            raise SandboxError(
                f"a sandbox worker did not start ({error}); what it printed stands above"
            ) from error
        if self.layers["namespaces"] == "active":
            os.rmdir(self.scratch)
            if not os.listdir(os.path.dirname(self.scratch)):
                os.rmdir(os.path.dirname(self.scratch))

    def request(self, job: Job) -> tuple[dict, bytes]:
        """Send one job and wait for its facts. OSError, EOFError or TimeoutError: the worker is lost."""
        fields = {name: getattr(job, name) for name in job.__slots__}
        data = marshal.dumps(fields | {"code": job.code.encode("utf-8", "surrogatepass")})
        self.process.stdin.write(len(data).to_bytes(4, "little") + data)
        self.process.stdin.flush()
        return self._receive(time.monotonic() + 3 * 8 * job.cpu_seconds + GRACE)

    def _receive(self, deadline: float) -> tuple[dict, bytes]:
        head, records = struct.unpack("<II", self._read(8, deadline))
        if head + records > MAX_REPLY:
            raise EOFError("oversized reply")
        return json.loads(self._read(head, deadline)), self._read(records, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        descriptor, data = self.process.stdout.fileno(), bytearray()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while len(data) < size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("a sandbox worker does not answer")
            part = os.read(descriptor, min(size - len(data), 1 << 20))
            if not part:
                raise EOFError("a sandbox worker died")
            data += part
        return bytes(data)

    def stop(self, patience: float = 0.0) -> None:
        """End the worker and all below it: an end of its input, and SIGKILL for the process group after `patience` s."""
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()


class Sandbox:
    """A context manager over `workers` worker processes; `run` is thread-safe.

    `level`: "best" uses each layer that this machine offers; "require" raises `UserError` if one is missing (`uid` is
    required of root only). `layers` says which are active. `without` switches layers off, for the sandbox's own checks.
    """

    def __init__(
        self, workers: int = 2, level: str = "best", without: frozenset[str] = frozenset()
    ):
        if workers < 1 or level not in LEVELS:
            raise UserError(
                f"the sandbox takes at least one worker, not {workers}, and a level of {LEVELS}, not {level!r}"
            )
        if sys.platform != "linux":
            raise UserError(
                f"the sandbox needs Linux, not {sys.platform}: completions are run on Linux only"
            )
        self._directory = tempfile.mkdtemp(prefix="vgrout-")
        packages = sorted(
            {str(Path(importlib.util.find_spec(name).origin).parent.parent) for name in PACKAGES}
        )
        self._arguments = (self._directory, _readable(), packages, without)
        self._workers = [_Worker(slot, *self._arguments) for slot in range(workers)]
        self.executor = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        try:
            for worker in self._workers:
                worker.greet()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise
        self.layers: dict[str, str] = self._workers[0].layers
        self.restarts = 0
        missing = {
            name: why
            for name, why in self.layers.items()
            if why != "active" and (name != "uid" or not os.geteuid())
        }
        if level == "require" and missing:
            self.close()
            raise UserError(
                "--sandbox require: "
                + "; ".join(f"{name} is {why}" for name, why in missing.items())
                + " (docs/sandbox.md says how to turn layers on; --sandbox best runs without them)"
            )

    def run(self, jobs: list[Job]) -> list[Result]:
        """The jobs' results in their order, over the whole pool. SandboxError if a job fails twice for our reasons."""
        return [future.result() for future in [self.submit(job) for job in jobs]]

    def submit(self, job: Job) -> Future[Result]:
        return self.executor.submit(self.run_one, job)

    def run_one(self, job: Job) -> Result:
        """Run one job on an idle worker, in this thread. A lost worker is replaced, and the job retried once.

        UserError if the job's preamble does not run; SandboxError if the job fails twice for our reasons.
        """
        for _ in range(2):
            worker = self._idle.get()
            try:
                facts, records = worker.request(job)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
                worker = self._replace(worker)
            else:
                if "broken" in facts:
                    raise UserError(facts["broken"])
                if facts["confined"]:
                    return Result(
                        facts["status"],
                        facts["exceeded"],
                        facts["cpu"],
                        facts["wall"],
                        facts["said"],
                        facts["file"],
                        tuple(_records(records, most=len(job.compares) + 8)),
                    )
                why = "a job's process could not be confined"
            finally:
                self._idle.put(worker)
        raise SandboxError(why)

    def _replace(self, lost: _Worker) -> _Worker:
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox was closed while the job ran")
            lost.stop()
            worker = _Worker(lost.slot, *self._arguments)
            self._workers[self._workers.index(lost)] = worker
            self.restarts += 1
        worker.greet()
        return worker

    def close(self) -> None:
        """Stop the workers, and leave no process and no file. Jobs that have not started are cancelled."""
        with self._lock:
            self._closed = True
            self.executor.shutdown(wait=False, cancel_futures=True)
            for worker in self._workers:
                worker.stop(patience=2.0)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _records(data: bytes, most: int) -> list[tuple[str, str]]:
    """At most so many (kind, payload) pairs, up to the first that is cut short. The bytes may be a completion's own."""
    found, position = [], 0
    while position + 5 <= len(data) and len(found) < most:
        kind, size = struct.unpack_from("<BI", data, position)
        position += 5 + size
        if position > len(data):
            break
        found.append((chr(kind), data[position - size : position].decode("utf-8", "replace")))
    return found


def _readable() -> list[str]:
    """What a completion may read: the standard library, the offered packages and the system's shared libraries."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    for name in PACKAGES:
        package = Path(importlib.util.find_spec(name).origin).parent
        paths += [str(package), f"{package}.libs"]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    paths += [os.path.realpath(path) for path in paths]
    return sorted({path for path in paths if os.path.exists(path)})


def _free_uid(slot: int) -> int:
    """A user id for this process' slot that no account has, within the 65,536 ids that containers usually map."""
    for attempt in range(1000):
        uid = 50_000 + (os.getpid() * 16 + slot + attempt * 997) % 10_000
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    return 65_534
