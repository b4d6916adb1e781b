"""The sandbox's worker: an isolated interpreter that forks one confined child for each job.

Started by `sandbox.Sandbox` as `python -sSBP worker.py CONFIG` with a scrubbed environment: standard library only.
The parent sends code and inputs and gets facts back: it never sends an expected value, and the child never sees a marker
except the name of the function that a job asks it to call. Three processes with falling trust:

    parent (expected values, markers, verdict)  →  worker (inputs)  →  child: the completion (inputs, no way out)
"""

import contextlib
import gc
import importlib
import json
import marshal
import mmap
import os
import random
import resource
import select
import signal
import struct
import sys
import time
import types
from typing import Any

PREIMPORT = (
    "bisect collections copy dataclasses datetime enum functools heapq itertools math operator random re string "
    "typing sortedcontainers"
).split()  # what solutions use; numpy follows with the first that names it
NUMPY_BYTES = 160 << 20  # what numpy adds to the address space of the worker
JOB_CALLS = 8  # the limits of a whole job are those of this many calls

for name in ("vgrout", "vgrout.grader"):  # without the real packages' __init__
    sys.modules[name] = types.ModuleType(name)
package = sys.modules["vgrout.grader"]
package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
from vgrout.grader import layers  # noqa: E402
from vgrout.grader.child import RECORDS, REGION, exit_now, run_completion  # noqa: E402
from vgrout.grader.scratch import FILE_BYTES, TOTAL_BYTES, Scratch, contains  # noqa: E402

package.__path__ = []


def child(
    worker: "Worker", job: dict[str, Any], region: mmap.mmap, output: int, ready: int
) -> None:
    """Confine this process, say so on `ready`, close every descriptor but 0, 1, 2, and run the completion."""
    try:
        worker.confine(job)
        os.dup2(output, 1)
        os.dup2(0, 2)
        os.write(ready, b"1")
        os.closerange(3, 1 << 20)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        module = worker.setups[job["setup"]]
        sys.modules["__main__"] = sys.modules["solution"] = module
        random.seed(0)  # what a fork does is to seed it afresh
        run_completion(region, job, vars(module))
    finally:
        exit_now(1)


class Worker:
    """Holds what every job's child needs, and is forked from: modules, preambles, the Landlock ruleset, limits."""

    def __init__(self, config: dict[str, Any], control_in: int):
        self.config, self.control_in = config, control_in
        self.setups: dict[str, types.ModuleType] = {}
        self.in_pid_namespace = self.bounded = (
            False  # bounded: the scratch directory is a tmpfs of limited size
        )
        self.uid, self.ruleset, self.confined_by_seccomp = 0, -1, False
        self.layers = dict.fromkeys(("process", "limits", "environment"), "active")
        self.preimport(PREIMPORT)
        with open("/proc/self/statm") as file:
            self.own_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + REGION
        self.layers["namespaces"] = self.attempt("namespaces", self.enter_namespaces)
        self.scratch = Scratch("/scratch" if self.bounded else config["scratch"])
        self.layers["uid"] = self.attempt("uid", self.take_uid)
        self.layers["landlock"] = self.attempt("landlock", self.make_ruleset)
        self.layers["seccomp"] = self.attempt("seccomp", self.try_seccomp)

    def preimport(self, names: list[str]) -> None:
        """Import on behalf of all children; of the packages' directory they can import nothing else."""
        sys.path += self.config["packages"]
        for name in names:
            importlib.import_module(name)
        sys.path[:] = [path for path in sys.path if path not in self.config["packages"]]

    def attempt(self, name: str, function: Any) -> str:
        if name in self.config["without"]:
            return "unavailable: switched off"
        try:
            function()
        except OSError as error:
            return f"unavailable: {error}"
        return "active"

    def enter_namespaces(self) -> None:
        """Move into new namespaces and go on there as process 1; the outer process stays behind and waits."""
        layers.unshare()
        if pid := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
        self.in_pid_namespace = True
        layers.prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: not without the outer process, which the parent can kill
        layers.change_root(self.config["scratch"], self.config["readable"], TOTAL_BYTES)
        self.bounded = True

    def take_uid(self) -> None:
        if os.geteuid() != 0:
            raise OSError("needs root")
        os.chown(self.scratch.descriptor, self.config["uid"], self.config["uid"])
        if not (pid := os.fork()):
            try:
                layers.drop_privileges(self.config["uid"])
                os._exit(
                    0
                    if all(
                        os.access(path, os.R_OK)
                        for path in self.config["readable"]
                        if os.path.exists(path)
                    )
                    else 1
                )
            finally:
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            raise OSError(
                f"uid {self.config['uid']} cannot be taken, or cannot read Python's library there"
            )
        self.uid = self.config["uid"]

    def make_ruleset(self) -> None:
        self.ruleset = layers.landlock_ruleset(self.config["readable"], self.scratch.path)

    def try_seccomp(self) -> None:
        self.program = layers.seccomp_program()
        if not (pid := os.fork()):
            try:
                layers.prctl(38, 1)
                layers.install_seccomp(self.program, os.getpid())
                os._exit(0)
            except OSError as error:
                os._exit(error.errno or 1)
        if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise OSError(status, f"seccomp: {os.strerror(abs(status))}")
        self.confined_by_seccomp = True

    def confine(self, job: dict[str, Any]) -> None:
        """In the child: every active layer, the narrowing of system calls last."""
        os.setsid()
        os.fchdir(self.scratch.descriptor)
        for name, value in job["limits"]:
            resource.setrlimit(name, (value, value))
        layers.drop_privileges(self.uid)
        if self.ruleset >= 0:
            layers.syscall(layers.LANDLOCK_RESTRICT, self.ruleset, 0)
        if self.confined_by_seccomp:
            layers.install_seccomp(self.program, os.getpid())

    def prepare(self, setup: str) -> None:
        """Execute a problem's trusted preamble once; every child inherits its namespace."""
        if setup not in self.setups:
            module = types.ModuleType("solution")
            exec(compile(setup, "<setup>", "exec"), vars(module))
            if len(self.setups) >= 32:
                self.setups.clear()
            self.setups[setup] = module
            gc.freeze()

    def run(self, job: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """One job: fork, wait within the limits, kill what is left, collect the facts, clean up."""
        try:
            if b"numpy" in job["code"] and "numpy" not in sys.modules:
                self.preimport(["numpy"])
                self.own_bytes += NUMPY_BYTES
                gc.freeze()
            self.prepare(job["setup"])
        except Exception as error:
            return {
                "broken": f"a problem's setup code does not run ({type(error).__name__}: {error}); correct it"
            }, b""
        processes = (
            64 if self.uid or self.in_pid_namespace else None if self.confined_by_seccomp else 0
        )
        job["limits"] = layers.limits(
            int(JOB_CALLS * job["cpu_seconds"]) + 2,
            self.own_bytes + (job["memory_mb"] << 20),
            FILE_BYTES,
            processes,
        )
        region, output = mmap.mmap(-1, REGION), os.memfd_create("output")
        ready, told = os.pipe()
        start = time.monotonic()
        pid = os.fork()
        if not pid:
            child(self, job, region, output, told)
        os.close(told)
        confined = os.read(ready, 1) == b"1"
        os.close(ready)
        facts = self.wait(pid, region, job["cpu_seconds"])
        self.kill_rest(pid)
        facts |= {
            "wall": time.monotonic() - start,
            "confined": confined,
            "said": contains(output, job["phrase"]),
            "file": self.scratch.text_of(job["file"]) if job["file"] else "",
        }
        records = region[RECORDS : min(int.from_bytes(region[:8], "little"), REGION)]
        region.close()
        os.close(output)
        self.scratch.empty()
        return facts, records

    def wait(self, pid: int, region: mmap.mmap, cpu_seconds: float) -> dict[str, Any]:
        """Wait for the child, which may use `cpu_seconds` of CPU time for a call, three times as much wall time, and
        `JOB_CALLS` times as much of both for the whole job."""
        cpu_clock = (~pid << 3) | 2  # the id of that process's CPU clock, clock_getcpuclockid(3)
        started = time.monotonic()
        call, call_cpu, call_wall = 0, 0.0, started
        exceeded = ""
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            now, cpu = time.monotonic(), usage_of(cpu_clock)
            if (begun := int.from_bytes(region[8:RECORDS], "little")) != call:
                call, call_cpu, call_wall = begun, cpu, now
            cpu_left = cpu_seconds - max(cpu - call_cpu, cpu / JOB_CALLS)
            wall_left = 3 * cpu_seconds - max(now - call_wall, (now - started) / JOB_CALLS)
            if cpu_left <= 0 or wall_left <= 0:
                exceeded = "cpu" if cpu_left <= 0 else "wall"
            elif not self.bounded and self.scratch.overfull():
                exceeded = "disk"
            elif select.select([self.control_in], [], [], 0)[0]:
                exceeded = "wall"  # nothing is sent during a job: the parent is gone
            if exceeded:
                os.kill(pid, signal.SIGKILL)
                _, status, usage = os.wait4(pid, 0)
                break
            signal.sigtimedwait(
                {signal.SIGCHLD},
                min(max(cpu_left, 0.002), wall_left, 0.1 if self.bounded else 0.05),
            )
        return {
            "status": os.waitstatus_to_exitcode(status),
            "exceeded": exceeded,
            "cpu": usage.ru_utime + usage.ru_stime,
        }

    def kill_rest(self, group: int) -> None:
        """Kill and reap whatever the child started: all else in the pid namespace, or its group and all descendants."""
        while True:
            for target in [-1] if self.in_pid_namespace else [-group, *self.descendants()]:
                try:
                    os.kill(target, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            try:
                while os.waitpid(-1, 0 if self.in_pid_namespace else os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.001)

    def descendants(self) -> list[int]:
        """All processes below this one; orphans are among them, for this process is their subreaper."""
        found = [os.getpid()]
        for pid in found:
            try:
                with open(f"/proc/{pid}/task/{pid}/children") as file:
                    found += map(int, file.read().split())
            except OSError:
                pass
        return found[1:]


def usage_of(cpu_clock: int) -> float:
    """CPU seconds of another process by its clock; 0.0 if it has just died."""
    try:
        return time.clock_gettime(cpu_clock)
    except OSError:
        return 0.0


def read_exactly(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(descriptor: int, facts: dict[str, Any], records: bytes = b"") -> None:
    head = json.dumps(facts).encode()
    data = memoryview(struct.pack("<II", len(head), len(records)) + head + records)
    while data:
        data = data[os.write(descriptor, data) :]


def main() -> None:
    control_in, control_out, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.stdout, sys.stderr = (
        open(d, "w", encoding="utf-8", errors="replace", closefd=False) for d in (1, 2)
    )
    sys.setrecursionlimit(10_000)
    for handled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(handled, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    layers.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    os.umask(0o077)
    worker = Worker(json.loads(sys.argv.pop()), control_in)
    sys.orig_argv.clear()
    gc.collect()
    gc.freeze()
    send(control_out, {"layers": worker.layers})
    try:
        while True:
            size = int.from_bytes(read_exactly(control_in, 4), "little")
            job = marshal.loads(read_exactly(control_in, size))
            job["calls"] = marshal.loads(job["calls"])
            send(control_out, *worker.run(job))
    except (EOFError, BrokenPipeError):  # the parent is gone
        worker.scratch.empty()
        if not worker.bounded:
            with contextlib.suppress(OSError):
                os.rmdir(worker.scratch.path)
                os.rmdir(
                    os.path.dirname(worker.scratch.path)
                )  # the last worker removes the pool's directory


if __name__ == "__main__":
    main()
