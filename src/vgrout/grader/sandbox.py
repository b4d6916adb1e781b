"""A pool of isolated workers that run completions; what each layer promises stands in
docs/reference/sandbox.md.

A worker is a separate interpreter with a scrubbed environment that has a confined process forked
per job (`worker`). This module is the trusted side: it sends code and inputs, and receives facts.
Expected values never leave this process.
"""

import contextlib
import functools
import importlib.util
import json
import marshal
import os
import pwd
import queue
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from vgrout.core import UserError
from vgrout.grader.child import parse_records
from vgrout.grader.scratch import Scratch

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
NOTHING = marshal.dumps(())
NO_SETUP = marshal.dumps(compile("", "<setup>", "exec"))
GRACE = 10.0  # seconds beyond a job's longest wall time until the worker itself is given up
SLOWEST = 4 * 3 * 8  # wall seconds that a job may last for a CPU second of a call: worker.Clocks
MAX_REPLY = 16 << 20  # bytes
NO_PROBE = set("antigravity this test idlelib turtledemo".split())  # no use, or noisy
LAYERS = ("uid", "landlock", "namespaces", "seccomp")  # each can be switched off


BODY = ("imports", "setup", "entry", "calls", "compares", "own_tests")  # of a job
SEEN = ("status", "exceeded", "cpu", "wall", "said", "file")  # facts of a result


class SandboxError(Exception):
    """The sandbox itself failed, twice: nothing is known about the completion, so nothing may be
    scored.
    """


@dataclass(frozen=True, slots=True)
class Job:
    """One process' worth of work: execute `code`, then either the ground-truth calls or the
    completion's own tests.
    """

    code: str = ""
    imports: bool = False  # begin with `IMPORTS`
    setup: bytes = NO_SETUP  # marshalled code object: the problem's preamble
    entry: str = ""  # method of Solution
    calls: bytes = (
        NOTHING  # marshalled code objects, each of the expression `__call__(<arguments>)`
    )
    compares: tuple[str, ...] = ()  # per call: plain | list_node | tree_node
    own_tests: str = ""  # the function to call instead of the calls
    phrase: str = ""  # look for it in the output
    file: str = ""  # read the plain file of this name, left in the working directory
    cpu_seconds: float = 8.0  # for one call; 8 times as much for the job; 3 times of wall time
    memory_mb: int = 512  # above the worker's own size

    def message(self) -> bytes:
        """(what the worker needs to know, what the job's process does): the latter does not get the
        former, and the worker does not read the latter.
        """
        code = self.code.encode("utf-8", "surrogatepass")
        limits = {"cpu_seconds": self.cpu_seconds, "memory_mb": self.memory_mb}
        watch = {
            "numpy": b"numpy" in code + self.setup,
            "calls": len(self.compares),
            "phrase": self.phrase,
            "file": self.file,
        }
        body = {"code": code, "asyncio": b"asyncio" in code + self.setup}
        body |= {name: getattr(self, name) for name in BODY}
        return marshal.dumps((watch | limits, marshal.dumps(body | limits)))


@dataclass(frozen=True, slots=True)
class Result:
    """What the worker saw from outside (all but `records`), and what the child wrote down about
    itself (`records`).
    """

    status: int  # exit status, or minus the signal that ended the process
    exceeded: str  # the limit that ended it: cpu | wall | disk, or ""
    cpu: float  # seconds
    wall: float  # seconds
    said: bool  # the phrase is in the first 16 MiB of the output
    file: str  # the first 4 KiB of the file, "" if there is no plain file of that name
    records: tuple[tuple[str, str], ...]  # (kind, payload) in order; see worker


class _Worker:
    """One worker process and the two pipes to it."""

    def __init__(self, slot: int, directory: str, without: dict[str, str], library: list[str]):
        scratch = os.path.join(directory, str(slot))
        os.makedirs(scratch, mode=0o700, exist_ok=True)
        readable, hidden = _readable()
        config = {
            "scratch": scratch,
            "readable": readable,
            "hidden": hidden,
            "packages": {name: importlib.util.find_spec(name).origin for name in PACKAGES},
            "uid": _free_uid(slot),
            "without": without,
            "library": library,
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
        self.missing: list[str] = []  # of the library: what a confined process cannot import

    def greet(self) -> None:
        """Wait until the worker is ready. In a mount namespace its scratch directory is its own:
        ours can go.
        """
        try:
            greeting = self._receive(time.monotonic() + 60)[0]
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            raise SandboxError(
                f"a sandbox worker did not start ({error}); what it printed stands above"
            ) from error
        self.layers, self.missing = greeting["layers"], greeting["missing"]
        if self.layers["namespaces"] == "active":
            os.rmdir(self.scratch)

    def request(self, job: Job) -> tuple[dict, bytes]:
        """Send one job and wait for its facts. OSError, EOFError or TimeoutError: the worker is
        lost.
        """
        self.process.stdin.write(job.message())
        self.process.stdin.flush()
        return self._receive(time.monotonic() + SLOWEST * job.cpu_seconds + GRACE)

    def _receive(self, deadline: float) -> tuple[dict, bytes]:
        descriptor, data, facts = self.process.stdout.fileno(), b"", None
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while facts is None or len(data) < facts["size"]:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("a sandbox worker does not answer")
            part = os.read(descriptor, 1 << 20)
            data += part
            if not part or len(data) > MAX_REPLY:
                raise EOFError("a sandbox worker died, or its reply is too large")
            if facts is None and b"\n" in data:
                line, data = data.split(b"\n", 1)
                facts = json.loads(line)
        return facts, data

    def stop(self, patience: float = 0.0) -> None:
        """End the worker and all below it: an end of its input, and SIGKILL for the process group
        after `patience` s.
        """
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

    `level`: "best" uses each layer that this machine offers; "require" raises `UserError` if one is
    missing (`uid` is required of root only). `layers` says which are active. `without` switches
    layers off, for the sandbox's own checks.
    """

    def __init__(
        self, workers: int = 2, level: str = "best", without: frozenset[str] = frozenset()
    ):
        if workers < 1 or level not in LEVELS or sys.platform != "linux":
            raise UserError(
                f"the sandbox takes Linux, at least one worker and a level of {LEVELS}, "
                f"not {sys.platform}, {workers} and {level!r}"
            )
        self._directory = tempfile.mkdtemp(prefix="vgrout-")
        self._without = dict.fromkeys(without, "switched off")
        self._workers: list[_Worker] = []
        self.executor = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._lock, self._closed, self.restarts = threading.Lock(), False, 0
        try:
            self._start_first()
            self._workers += [self._worker(slot) for slot in range(1, workers)]
            for worker in self._workers[1:]:
                worker.greet()
            self.layers: dict[str, str] = self._workers[0].layers
            self._require(level)
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            self._idle.put(worker)

    def _worker(self, slot: int, **without: str) -> _Worker:
        return _Worker(slot, self._directory, self._without | without, [])

    def _start_first(self) -> None:
        """Start a worker whose confined processes can import the whole library: without the layer
        that keeps them from it.

        UserError if no single layer is to blame.
        """
        problem = ""
        for layer in (None, *LAYERS):
            without = self._without | ({layer: problem} if layer else {})
            worker = _Worker(0, self._directory, without, _library())
            worker.greet()
            missing = _importable(worker.missing)
            self._workers = [worker]
            if not missing:
                self._without = without
                return
            self.close_workers()
            count = f"{len(missing)} modules ({missing[0]}, …) cannot be imported"
            problem = problem or f"with it {count}"
        raise UserError(
            f"in the sandbox {count} of {sys.prefix}: use a Python that every user can read"
        )

    def _require(self, level: str) -> None:
        """UserError if a layer is missing and the level asks for it; the uid of its own is asked of
        root only.
        """
        missing = "; ".join(
            f"{name} is {why}"
            for name, why in self.layers.items()
            if why != "active" and (name != "uid" or not os.geteuid())
        )
        if level == "require" and missing:
            raise UserError(
                f"--sandbox require: {missing} (docs/reference/sandbox.md says how to turn "
                "layers on; --sandbox best runs without them)"
            )

    def run(self, jobs: list[Job]) -> list[Result]:
        """The jobs' results in their order, over the whole pool. SandboxError if a job fails twice
        for our reasons.
        """
        return list(self.executor.map(self.run_one, jobs))

    def run_one(self, job: Job) -> Result:
        """Run one job on an idle worker, in this thread. A lost worker is replaced, and the job
        retried once.

        UserError if the job's preamble does not run; SandboxError if the job fails twice for our
        reasons.
        """
        for _ in range(2):
            worker = self._idle.get()
            try:
                facts, records = worker.request(job)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
                worker = self._replace(worker)
            else:
                if facts["confined"] and not facts["set_up"]:
                    why = " ".join(facts["told"].split())[:200] or "it ended its process"
                    raise UserError(f"a problem's setup code does not run ({why}); correct it")
                if facts["confined"]:
                    records = tuple(parse_records(records, most=len(job.compares) + 8))
                    return Result(*map(facts.get, SEEN), records)
                why = "a job's process could not be confined"
            finally:
                self._idle.put(worker)
        raise SandboxError(why)

    def _replace(self, lost: _Worker) -> _Worker:
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox was closed while the job ran")
            lost.stop()
            worker = self._worker(lost.slot)
            self._workers[self._workers.index(lost)] = worker
            self.restarts += 1
        worker.greet()
        return worker

    def close(self) -> None:
        """Stop the workers, and leave no process and no file. Jobs that have not started are
        cancelled.
        """
        with self._lock:
            self._closed = True
            self.executor.shutdown(wait=False, cancel_futures=True)
            self.close_workers()
        with contextlib.suppress(OSError):
            os.rmdir(self._directory)

    def close_workers(self) -> None:
        """Stop them, and empty and remove what is theirs: only of a worker that was killed is
        anything left.
        """
        for worker in self._workers:
            worker.stop(patience=2.0)
            with contextlib.suppress(OSError):
                os.chmod(worker.scratch, 0o700)
                Scratch(worker.scratch).empty()
                os.rmdir(worker.scratch)
        self._workers.clear()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@functools.cache
def _readable() -> tuple[list[str], list[str]]:
    """What a completion may read, and what below it may not: the library and the offered packages,
    no other package.
    """
    base = {"platbase": sysconfig.get_config_var("installed_platbase")}  # not a virtual environment
    library = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars=base)]
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    system = [f"/lib/{multiarch}", f"/usr/lib/{multiarch}"] if multiarch else []
    system += ["/lib64", "/usr/lib64", "/usr/lib/locale", "/usr/share/zoneinfo"]
    own = [Path(importlib.util.find_spec(name).origin).parent for name in PACKAGES]
    offered = [str(path) for folder in own for path in (folder, Path(f"{folder}.libs"))]
    paths = [path for path in library + system + offered if os.path.exists(path)]
    paths = sorted({*paths, *map(os.path.realpath, paths)})
    found = [p for root in paths for at in ("", "*/") for p in Path(root).glob(f"{at}*-packages")]
    return paths, sorted(set(map(str, found)))


@functools.cache
def _library() -> list[str]:
    """The modules that must be importable in the sandbox: those of the standard library that this
    Python has.
    """
    names = sorted(sys.stdlib_module_names - NO_PROBE)
    return [name for name in names if PathFinder.find_spec(name)] + list(PACKAGES)


def _importable(names: list[str]) -> list[str]:
    """Which of the modules can be imported without a sandbox."""
    if not names:
        return []
    program = "import sys, importlib\nfor name in sys.argv[1:]:\n"
    program += (
        "    try: importlib.import_module(name)\n    except Exception: continue\n    print(name)"
    )
    command = [sys.executable, "-c", program, *names]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def _free_uid(slot: int) -> int:
    """A user id for this process' slot that no account has, within the 65,536 ids that containers
    usually map.
    """
    taken = {account.pw_uid for account in pwd.getpwall()}
    first = 50_000 + (os.getpid() * 16 + slot) % 10_000
    return next(uid for uid in range(first, 65_534) if uid not in taken)
