"""The sandbox's worker: an isolated interpreter that forks one confined child for each job.

Started by `sandbox.Sandbox` as `python -sSB sandbox_worker.py CONFIG`, so it is standard library only, with a scrubbed
environment. The parent sends code and inputs and gets facts back: it never sends an expected value, and the child never
sees a marker except the name of the function that a job asks it to call. Three processes with falling trust:

    parent (expected values, markers, verdict)  →  worker (inputs)  →  child: the completion (inputs, no way out)

The child leaves records in a shared memory block, not in a descriptor; the worker reads it after the child is dead.
A record is kind (1 byte), length (4 bytes, little endian), payload. Kinds: C compiled ("" or the error), then per call
V value (canonical text), E exception (its type's name) or O not a plain value ("1" if it equals everything), at the end
A names of true attributes of the instances and Z; for the completion's own tests S and T ("1" if they return without
error with a stub of Solution, and with its own) instead. A completion that forges records can forge no verdict by it.
"""

import gc
import importlib
import importlib.util
import json
import marshal
import mmap
import os
import select
import signal
import struct
import sys
import time
import types
from typing import Any

PREIMPORT = ("bisect collections copy dataclasses datetime enum functools heapq itertools math operator random re string "
             "typing sortedcontainers").split()  # what solutions use; numpy follows with the first that names it
NUMPY_BYTES = 160 << 20  # what numpy adds to the address space of the worker
REGION = 8 << 20  # bytes of records
FILE_BYTES = 16 << 20  # the largest file, and the most output, of one job
SCRATCH_MB = 32
CHECKS_ENDED = 77  # the child's exit status after its last record: exit status 0 is the completion's own doing
JOB_CALLS = 8  # the limits of a whole job are those of this many calls
RECORDS = 16  # the shared block: end of the records (8 bytes), calls begun (8 bytes), records
HEADER = struct.Struct("<BI")


def load(name: str) -> types.ModuleType:
    """A module beside this file, by its path: the package itself stays out of the worker."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layers = load("sandbox_layers")
plain = load("plain_values")


# ---- in the child: the completion runs here -------------------------------------------------------------------------
class Recorder:
    """Buffers records and copies them into the shared block; what does not fit is dropped, and the job has no Z."""

    def __init__(self, region: mmap.mmap):
        self.region, self.position, self.buffer, self.calls = region, RECORDS, [], 0

    def add(self, kind: str, payload: str = "") -> None:
        data = payload.encode("utf-8", "surrogatepass")
        self.buffer.append(HEADER.pack(ord(kind), len(data)) + data)

    def begin_call(self) -> None:
        """Restart the clocks of one call; the clocks of the whole job run on."""
        self.calls += 1
        self.region[8:RECORDS] = self.calls.to_bytes(8, "little")

    def flush(self) -> None:
        data = b"".join(self.buffer)
        self.buffer = []
        if self.position + len(data) > REGION:
            os._exit(1)
        self.region[self.position : self.position + len(data)] = data
        self.position += len(data)
        self.region[:8] = self.position.to_bytes(8, "little")


def leave(status: Any) -> None:
    """Exit as a program does that raised SystemExit(status): its output is flushed, its clean-up handlers do not run."""
    try:
        sys.stdout.flush()
    finally:
        os._exit(0 if status is None or status == 0 else 1)


def guarded(function: Any, *args: Any) -> tuple[Any, str]:
    """(result, "") or (None, name of the exception's type). SystemExit leaves the process, as it does in a program."""
    try:
        return function(*args), ""
    except SystemExit as error:
        leave(error.code)
    except MemoryError:
        return None, "MemoryError"
    except BaseException as error:
        return None, type.__getattribute__(type(error), "__name__")[:80]


def equals_everything(value: Any) -> bool:
    """Does `==` hold between the value and each of several values of unlike types, which no plain value equals?"""
    return all([bool(value == other) for other in (0, -7.5, "x", [None], (), {}, None, object())])


def true_attributes(instance: Any) -> set[str]:
    """Names without a leading "__" under which the instance has a true value that is no callable."""
    names = set(getattr(instance, "__dict__", ()))
    names.update(*(vars(cls) for cls in type(instance).__mro__))
    found = set()
    for name in names:
        if isinstance(name, str) and not name.startswith("__"):
            value, error = guarded(getattr, instance, name)
            if not error and not callable(value) and guarded(bool, value)[0] is True:
                found.add(name)
    return found


def run_calls(record: Recorder, module: dict[str, Any], job: dict[str, Any]) -> None:
    """One new Solution, one call and one record for each ground-truth test."""
    attributes = set()
    as_plain = {"plain": lambda value: value, "list_node": plain.list_values, "tree_node": plain.tree_values}
    for call, compare in zip(job["calls"], job["compares"], strict=True):
        record.begin_call()
        instance, error = guarded(lambda: module["Solution"]())
        method, error = guarded(getattr, instance, job["entry"]) if not error else (None, error)
        if not error:
            value, error = guarded(eval, call, module, {"__call__": method})
        if error:
            record.add("E", error)
            continue
        text, error = guarded(lambda v, c: plain.canonical(as_plain[c](v)), value, compare)
        record.add("V", text) if not error else record.add("O", "1" if guarded(equals_everything, value)[0] else "")
        attributes |= true_attributes(instance)
    record.add("A", "\0".join(sorted(attributes)[:64]))


def run_own_tests(record: Recorder, module: dict[str, Any], code: types.CodeType, name: str) -> None:
    """Call the completion's own test function, first with Solution replaced by an empty stub, then as it was written.

    The methods are removed from the class itself, too, so that instances made before the replacement are stubs as well.
    """
    fresh = dict(module)
    error = guarded(exec, code, module)[1]
    for attribute in list(vars(module.get("Solution", object))) if not error else ():
        if attribute not in ("__dict__", "__weakref__", "__module__", "__doc__"):
            guarded(delattr, module["Solution"], attribute)
    module["Solution"] = type("Solution", (), {})
    record.add("S", "" if error or guarded(lambda: module[name]())[1] else "1")
    error = guarded(exec, code, fresh)[1]
    record.add("T", "" if error or guarded(lambda: fresh[name]())[1] else "1")


def run_completion(region: mmap.mmap, job: dict[str, Any], module: dict[str, Any]) -> None:
    """Compile, execute, call; never returns."""
    record = Recorder(region)
    try:
        code = compile(job["code"].decode("utf-8", "surrogatepass"), "<completion>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        record.add("C", type(error).__name__)
        record.flush()
        os._exit(CHECKS_ENDED)
    record.add("C")
    record.flush()
    if job["own_tests"]:
        run_own_tests(record, module, code, job["own_tests"])
    else:
        error = guarded(exec, code, module)[1]
        if error:
            record.add("E", error)
        else:
            run_calls(record, module, job)
    guarded(lambda: sys.stdout.flush())
    record.add("Z")
    record.flush()
    os._exit(CHECKS_ENDED)


def child(worker: "Worker", job: dict[str, Any], region: mmap.mmap, output: int, ready: int) -> None:
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
        run_completion(region, job, vars(module))
    finally:
        os._exit(1)


# ---- the worker -----------------------------------------------------------------------------------------------------
class Worker:
    """Holds what every job's child needs, and is forked from: modules, preambles, the Landlock ruleset, limits."""

    def __init__(self, config: dict[str, Any], control_in: int):
        self.config, self.control_in = config, control_in
        self.setups: dict[str, types.ModuleType] = {}
        self.scratch, self.in_pid_namespace = config["scratch"], False
        self.uid, self.ruleset, self.confined_by_seccomp = 0, -1, False
        self.layers = dict.fromkeys(("process", "limits", "environment"), "active")
        self.preimport(PREIMPORT)
        with open("/proc/self/statm") as file:
            self.own_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + REGION
        self.layers["namespaces"] = self.attempt("namespaces", self.enter_namespaces)
        self.scratch_fd = os.open(self.scratch, os.O_RDONLY | os.O_DIRECTORY)
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
        layers.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not without the outer process, which the parent can kill
        layers.change_root(self.scratch, self.config["readable"], SCRATCH_MB)
        self.scratch = "/scratch"

    def take_uid(self) -> None:
        if os.geteuid() != 0:
            raise OSError("needs root")
        os.chown(self.scratch_fd, self.config["uid"], self.config["uid"])
        if not (pid := os.fork()):
            try:
                layers.drop_privileges(self.config["uid"])
                os._exit(0 if all(os.access(path, os.R_OK) for path in self.config["readable"] if os.path.exists(path)) else 1)
            finally:
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            raise OSError(f"uid {self.config['uid']} cannot be taken, or cannot read Python's library there")
        self.uid = self.config["uid"]

    def make_ruleset(self) -> None:
        self.ruleset = layers.landlock_ruleset(self.config["readable"], self.scratch)

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
        os.fchdir(self.scratch_fd)
        owns_uid = self.uid or self.in_pid_namespace
        processes = 64 if owns_uid else None if self.confined_by_seccomp else 0
        layers.limit(int(JOB_CALLS * job["cpu_seconds"]) + 2, self.own_bytes + (job["memory_mb"] << 20), FILE_BYTES, processes)
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
            return {"broken": f"the problem's setup code fails: {type(error).__name__}: {error}"}, b""
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
        facts |= {"wall": time.monotonic() - start, "confined": confined, "said": self.said(output, job["phrase"]),
                  "file": self.file_text(job["file"])}
        records = region[RECORDS : min(int.from_bytes(region[:8], "little"), REGION)]
        region.close()
        os.close(output)
        self.empty_scratch()
        return facts, records

    def wait(self, pid: int, region: mmap.mmap, cpu_seconds: float) -> dict[str, Any]:
        """Wait for the child, which may use `cpu_seconds` of CPU time for a call, three times as much wall time, and
        `JOB_CALLS` times as much of both for the whole job."""
        cpu_clock = (~pid << 3) | 2  # the id of that process's CPU clock, clock_getcpuclockid(3)
        bounded = self.scratch == "/scratch"  # a tmpfs of that size
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
            elif not bounded and self.scratch_bytes() > SCRATCH_MB << 20:
                exceeded = "disk"
            elif select.select([self.control_in], [], [], 0)[0]:
                exceeded = "wall"  # nothing is sent during a job: the parent is gone
            if exceeded:
                os.kill(pid, signal.SIGKILL)
                _, status, usage = os.wait4(pid, 0)
                break
            signal.sigtimedwait({signal.SIGCHLD}, min(max(cpu_left, 0.002), wall_left, 0.1 if bounded else 0.05))
        return {"status": os.waitstatus_to_exitcode(status), "exceeded": exceeded, "cpu": usage.ru_utime + usage.ru_stime}

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

    def said(self, output: int, phrase: str) -> bool:
        if not phrase or not (size := min(os.fstat(output).st_size, FILE_BYTES)):
            return False
        with mmap.mmap(output, size, access=mmap.ACCESS_READ) as text:
            return text.find(phrase.encode()) >= 0

    def file_text(self, name: str) -> str:
        """The first 4 KiB of a plain file of that name in the scratch directory; "" for a link, FIFO, device or none."""
        if not name:
            return ""
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.scratch_fd)
        except OSError:
            return ""
        try:
            status = os.fstat(file)
            plain_file = status.st_mode & 0o170000 == 0o100000 and status.st_nlink == 1
            return os.read(file, 4096).decode("utf-8", "replace") if plain_file else ""
        finally:
            os.close(file)

    def scratch_bytes(self) -> int:
        """Bytes in the scratch directory; directories in it count as too many, for nothing needs them."""
        total = 0
        for name in os.listdir(self.scratch_fd):
            try:
                status = os.stat(name, dir_fd=self.scratch_fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            total += status.st_size if status.st_mode & 0o170000 != 0o040000 else SCRATCH_MB << 21
        return total

    def empty_scratch(self) -> None:
        """Remove everything from the scratch directory; directories are flattened into it, so depth does not matter."""
        serial = 0
        while names := os.listdir(self.scratch_fd):
            for name in names:
                try:
                    os.unlink(name, dir_fd=self.scratch_fd)
                except (IsADirectoryError, PermissionError):
                    os.chmod(name, 0o700, dir_fd=self.scratch_fd)
                    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self.scratch_fd)
                    for entry in os.listdir(inner):
                        serial += 1
                        os.rename(entry, f".{serial}.{os.getpid()}", src_dir_fd=inner, dst_dir_fd=self.scratch_fd)
                    os.close(inner)
                    os.rmdir(name, dir_fd=self.scratch_fd)


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
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # a child's output from its fork on
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.setrecursionlimit(10_000)
    for handled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(handled, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    layers.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    os.umask(0o077)
    worker = Worker(json.loads(sys.argv[1]), control_in)
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
        worker.empty_scratch()
        if worker.scratch != "/scratch":
            try:
                os.rmdir(worker.scratch)
                os.rmdir(os.path.dirname(worker.scratch))  # the last worker removes the pool's directory
            except OSError:
                pass


if __name__ == "__main__":
    main()
