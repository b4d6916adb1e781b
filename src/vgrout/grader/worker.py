"""The sandbox's worker: reads jobs and results, and runs no code of either. Templates fork the
processes that do.

Started by `sandbox.Sandbox` as `python -sSBP worker.py CONFIG` with a scrubbed environment:
standard library only. The parent sends code and inputs and gets facts back: it never sends an
expected value. Processes with falling trust:

    parent (expected values, verdict) → worker (phrase, file to look for) → child: the completion
                                                    template (nothing) forks it ↗
"""

import contextlib
import errno
import gc
import importlib
import json
import marshal
import mmap
import os
import select
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from typing import Any, BinaryIO

PREIMPORT = (
    "bisect collections copy dataclasses datetime enum functools heapq itertools math operator "
    "random re string typing"
).split()  # what solutions use; numpy is in a template of its own

for name in ("vgrout", "vgrout.grader"):  # without the real packages' __init__
    sys.modules[name] = types.ModuleType(name)
package = sys.modules["vgrout.grader"]
package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
from vgrout.grader import layers, template  # noqa: E402
from vgrout.grader.child import RECORDS, REGION, parse_records  # noqa: E402
from vgrout.grader.scratch import TOTAL_BYTES, Scratch, contains  # noqa: E402
from vgrout.grader.template import CONFINED, FORK, JOB_CALLS, SET_UP, WITH_NUMPY  # noqa: E402

package.__path__ = []
NOTHING = marshal.dumps(())
WALL = 3  # wall seconds for each CPU second of a limit
SLOWEST = 4  # how much of the wall time may be waiting for a core, as a multiple of the rest


class Family:
    """The processes below this one, as the /proc of the outermost pid namespace shows them; later
    none is mounted.
    """

    def __init__(self, proc: int) -> None:
        self.proc = proc
        self.templates: set[str] = set()
        self.own = os.readlink("self", dir_fd=proc)

    def words(self, name: str) -> list[str]:
        try:
            file = os.open(name, os.O_RDONLY, dir_fd=self.proc)
        except OSError:
            return []
        try:
            return os.read(file, 1 << 16).decode("utf-8", "replace").split()
        except OSError:  # it has just died
            return []
        finally:
            os.close(file)

    def children(self) -> list[str]:
        """This process' children but for the templates: of a running job, or orphans of one."""
        pids = self.words(f"{self.own}/task/{self.own}/children")
        return [pid for pid in pids if pid not in self.templates]

    def waiting(self) -> float:
        """Seconds for which the job's process was ready to run and waited for a core; 0 where
        nobody counts them.
        """
        counted = [self.words(f"{pid}/schedstat") for pid in self.children()]
        return sum(int(fields[1]) for fields in counted if fields) / 1e9

    def kill(self) -> None:
        """Stop whatever a job has left, so that no more can be started within its limit of
        processes; then kill and reap it.
        """
        while self.children():
            pids: list[str] = []
            while new := [pid for pid in self.descendants() if pid not in pids]:
                self.signal(new, signal.SIGSTOP)
                pids += new
            self.signal(pids, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.001)

    def descendants(self) -> list[str]:
        pids = self.children()
        for pid in pids:
            pids += self.words(f"{pid}/task/{pid}/children")
        return pids

    def signal(self, pids: list[str], number: int) -> None:
        for pid in pids:
            status = self.words(f"{pid}/status")
            with contextlib.suppress(ValueError, ProcessLookupError):
                innermost = status[status.index("NSpgid:") - 1]  # the last of the line NSpid
                os.kill(int(innermost), number)


class Clocks:
    """The time of one job. A call may use `cpu_seconds` of CPU time and `WALL` times as much wall
    time, not counting that it waits for a core; the whole job `JOB_CALLS` times as much of both.

    A call's clocks restart only when the calls before it have left records, `committed`, which must
    stay.
    """

    def __init__(self, pid: int, region: mmap.mmap, job: dict[str, Any]):
        self.cpu_clock = (~pid << 3) | 2  # the id of its CPU clock, as of clock_getcpuclockid(3)
        self.region, self.calls, self.limit = region, job["calls"], job["cpu_seconds"]
        self.started, self.committed = time.monotonic(), b""
        self.call, self.call_cpu, self.call_wall = 0, 0.0, 0.0

    def records(self) -> bytes:
        return self.region[RECORDS : min(int.from_bytes(self.region[:8], "little"), REGION)]

    def left(self, waiting: Callable[[], float]) -> tuple[float, float]:
        """Seconds of CPU and of wall time that are left."""
        cpu, wall = usage_of(self.cpu_clock), time.monotonic() - self.started
        if wall > 0.05:
            wall = max(wall / SLOWEST, wall - waiting())
        call = int.from_bytes(self.region[8:RECORDS], "little")
        if self.call < call <= self.calls and self.returned(call - 1):
            self.call, self.call_cpu, self.call_wall = call, cpu, wall
            self.committed = self.records()
        return (
            self.limit - max(cpu - self.call_cpu, cpu / JOB_CALLS),
            self.limit * WALL - max(wall - self.call_wall, wall / JOB_CALLS),
        )

    def returned(self, calls: int) -> bool:
        """Whether so many calls have left records, behind those that were there before."""
        records = self.records()
        kinds = [kind for kind, _ in parse_records(records, most=calls + 9)]
        return records.startswith(self.committed) and sum(map("VEO".count, kinds)) >= calls


class Worker:
    """Watches one job at a time: starts it through a template, ends it, looks at what it left."""

    def __init__(self, config: dict[str, Any], control_in: int):
        self.config, self.control_in = config, control_in
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self.missing: list[str] = []  # modules that a confined process cannot import
        self.bounded = False  # is the scratch directory a file system of limited size?
        self.uid, self.ruleset, self.program = 0, -1, b""
        self.layers = dict.fromkeys(("process", "limits", "environment"), "active")
        for name in PREIMPORT:
            importlib.import_module(name)
        template.import_package("sortedcontainers", config["packages"]["sortedcontainers"])
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + REGION
        self.attempt("namespaces", self.enter_namespaces)
        self.family = Family(proc)
        self.scratch = Scratch("/scratch" if self.bounded else config["scratch"])
        self.attempt("uid", self.take_uid)
        os.fchown(self.scratch.descriptor, self.uid or os.geteuid(), -1)
        self.attempt("landlock", self.make_ruleset)
        self.attempt("seccomp", self.make_program)
        root = not os.geteuid()
        self.cage = template.Cage(
            scratch=self.scratch.descriptor,
            uid=config["uid"] if root else 0,
            keep_files=not self.uid,
            ruleset=self.ruleset,
            program=self.program,
            address_bytes=used,
            processes=64 if root or self.bounded else None if self.program else 0,
            packages=config["packages"],
        )
        gc.collect()
        gc.freeze()
        self.templates = {False: self.first_template()}
        layers.keep_capabilities(layers.CAP_KILL, layers.CAP_DAC_OVERRIDE, layers.CAP_FOWNER)
        layers.prctl(layers.DUMPABLE, 0)

    def attempt(self, name: str, prepare: Callable[[], None]) -> None:
        why = self.config["without"].get(name)
        try:
            if not why:
                prepare()
        except OSError as error:
            why = str(error)
        self.layers[name] = f"unavailable: {why}" if why else "active"

    def enter_namespaces(self) -> None:
        """Move into new namespaces and go on there as process 1; the outer process stays behind and
        waits.
        """
        layers.unshare()
        if pid := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
        layers.prctl(layers.PDEATHSIG, signal.SIGKILL)  # of the outer one, as the parent kills that
        seen = [*self.config["readable"], os.devnull]
        layers.change_root(self.config["scratch"], seen, self.config["hidden"], TOTAL_BYTES)
        self.bounded = True

    def take_uid(self) -> None:
        if os.geteuid() != 0:
            raise OSError("needs root")

        def cannot_return() -> None:
            layers.drop_privileges(self.config["uid"])
            with contextlib.suppress(PermissionError):
                os.setuid(0)
                os._exit(errno.EPERM)

        tried(cannot_return)
        self.uid = self.config["uid"]

    def make_ruleset(self) -> None:
        paths = self.config["readable"], self.config["hidden"], self.scratch.path
        self.ruleset = layers.landlock_ruleset(*paths)

    def make_program(self) -> None:
        program = layers.seccomp_program(removal=self.bounded)

        def install() -> None:
            layers.prctl(layers.NO_NEW_PRIVS, 1)
            layers.install_seccomp(program, os.getpid())

        tried(install)
        self.program = program

    def first_template(self) -> socket.socket:
        """Fork it while nothing but the configuration is in this process' memory; returns the
        socket to it.
        """
        ours, theirs = socket.socketpair()
        if not os.fork():
            ours.close()
            template.serve(self.cage, theirs)
        theirs.close()
        self.family.templates = set(self.family.children())
        return ours

    def template_for(self, numpy: bool) -> socket.socket:
        if numpy not in self.templates:
            ours, theirs = socket.socketpair()
            order(self.templates[False], WITH_NUMPY, theirs.fileno())
            theirs.close()
            if not ours.recv(1):
                raise OSError("a template could not import numpy")
            self.family.templates |= set(self.family.children())
            self.templates[numpy] = ours
        return self.templates[numpy]

    def run(self, job: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """One job: have its process forked, wait within the limits, kill what is left, collect the
        facts, clean up.
        """
        files = [os.memfd_create(name) for name in ("job", "region", "output")]
        job_file, region_file, output = files
        os.write(job_file, body)
        os.ftruncate(region_file, REGION)
        ready, told = os.pipe()
        start = time.monotonic()
        with mmap.mmap(region_file, REGION) as region:
            pid = order(self.template_for(job["numpy"]), FORK, *files, told)
            os.close(told)
            clocks = Clocks(pid, region, job)
            facts = self.wait(pid, clocks)
            self.family.kill()
            records = clocks.records()
        if not records.startswith(clocks.committed):
            facts["exceeded"] = "cpu"  # it changed what had restarted the clock of a call
        elif not self.bounded and self.scratch.overfull():
            facts["exceeded"] = "disk"
        said = os.read(ready, 1 << 16)
        facts |= {
            "wall": time.monotonic() - start,
            "confined": said[:1] == CONFINED,
            "set_up": said.endswith(SET_UP),
            "told": said[1:].decode("utf-8", "replace"),
            "said": contains(output, job["phrase"]),
            "file": self.scratch.text_of(job["file"]) if job["file"] else "",
        }
        for descriptor in (*files, ready):
            os.close(descriptor)
        self.scratch.empty()
        return facts, records

    def wait(self, pid: int, clocks: Clocks) -> dict[str, Any]:
        """Wait for the child and end it when it exceeds a limit, which one that has ended by then
        does not.
        """
        exceeded = ""
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if not done and exceeded:
                os.kill(pid, signal.SIGKILL)
                _, status, usage = os.wait4(pid, 0)
            if done or exceeded:
                return {
                    "status": os.waitstatus_to_exitcode(status),
                    "exceeded": "" if done else exceeded,
                    "cpu": usage.ru_utime + usage.ru_stime,
                }
            cpu_left, wall_left = clocks.left(self.family.waiting)
            exceeded = self.exceeded(cpu_left, wall_left)
            if not exceeded:
                pause = min(max(cpu_left, 0.002), wall_left, 0.1 if self.bounded else 0.05)
                signal.sigtimedwait({signal.SIGCHLD}, pause)

    def exceeded(self, cpu_left: float, wall_left: float) -> str:
        if cpu_left <= 0 or wall_left <= 0:
            return "cpu" if cpu_left <= 0 else "wall"
        if not self.bounded and self.scratch.overfull():
            return "disk"
        parent_is_gone = select.select([self.control_in], [], [], 0)[0]  # nothing else is sent now
        return "wall" if parent_is_gone else ""

    def probe(self) -> None:
        """Try in a confined process what the layers promise, and import the library; correct
        `layers` by it.
        """
        active = [name for name, state in self.layers.items() if state == "active"]
        wanted = {"active": active, "library": self.config["library"]}
        limits = {"cpu_seconds": 30.0, "memory_mb": 512}
        watch = {"numpy": True, "calls": 0, "phrase": "", "file": ""} | limits
        try:
            facts, _ = self.run(watch, marshal.dumps({"probe": wanted, "calls": NOTHING} | limits))
            findings = json.loads(facts["told"])
        except (OSError, ValueError):  # nothing can be run at all
            findings = {"open": [], "missing": self.config["library"]}
        for name in findings["open"]:
            self.layers[name] = "unavailable: it was set up and has no effect"
        self.missing = findings["missing"]


def order(control: socket.socket, what: bytes, *descriptors: int) -> int:
    """Have a template fork; returns the new process' id. OSError if it cannot."""
    socket.send_fds(control, [what], descriptors)
    answer = control.recv(4)
    if not answer:
        raise OSError("a template died")
    return int.from_bytes(answer, "little")


def tried(function: Callable[[], None]) -> None:
    """Call the function in a process of its own. OSError if it fails there."""
    if not (pid := os.fork()):
        try:
            function()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 1)
        finally:
            os._exit(1)
    if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise OSError(status, os.strerror(abs(status)))


def usage_of(cpu_clock: int) -> float:
    """CPU seconds of another process by its clock; 0.0 if it has just died."""
    try:
        return time.clock_gettime(cpu_clock)
    except OSError:
        return 0.0


def send(parent: BinaryIO, facts: dict[str, Any], records: bytes = b"") -> None:
    """One line of JSON, and as many bytes of records as it says."""
    line = json.dumps(facts | {"size": len(records)})
    parent.write(line.encode() + b"\n" + records)
    parent.flush()


def main() -> None:
    orders, parent = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.stdout, sys.stderr = (
        open(d, "w", encoding="utf-8", errors="replace", closefd=False) for d in (1, 2)
    )
    sys.setrecursionlimit(10_000)
    for handled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(handled, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    layers.prctl(layers.SUBREAPER, 1)
    os.umask(0o077)
    worker = Worker(json.loads(sys.argv.pop()), orders.fileno())
    if worker.config["library"]:
        worker.probe()
    send(parent, {"layers": worker.layers, "missing": worker.missing})
    try:
        while True:
            send(parent, *worker.run(*marshal.load(orders)))
    except (EOFError, BrokenPipeError):  # the parent is gone
        worker.scratch.empty()
        if not worker.bounded:
            with contextlib.suppress(OSError):
                os.rmdir(worker.scratch.path)
                os.rmdir(os.path.dirname(worker.scratch.path))  # the last worker removes the pool's


if __name__ == "__main__":
    main()
