"""A template: it has imported what completions use, never sees a job or a result, and forks every
job's process.

The worker sends it descriptors; it forks, and closes them unread. The child, the worker's own,
reads its job from one, writes its records through another, confines itself, and runs the problem's
setup code and then the completion. So nothing of another job is in its memory: what it inherits has
never held any.
"""

import contextlib
import gc
import importlib.util
import itertools
import json
import marshal
import mmap
import os
import random
import selectors
import signal
import socket
import sys
import types
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from vgrout.grader import layers
from vgrout.grader.child import IMPORTS, REGION, exit_now, make_self_pipe, run_completion
from vgrout.grader.scratch import FILE_BYTES

NUMPY_BYTES = 160 << 20  # what numpy adds to a template's address space
FORK, WITH_NUMPY = b"F", b"N"  # orders: a job's process; another template, which has numpy
# a child's first and last words before the completion; else why it cannot go on
CONFINED, SET_UP = b"c", b"\0s"
JOB_CALLS = 8  # the limits of a whole job are those of this many calls


@dataclass(frozen=True)
class Cage:
    """What confines a job's process; made once by the worker."""

    scratch: int  # descriptor of the working directory
    uid: int  # 0: keep the worker's
    keep_files: bool  # take it as the real user alone
    ruleset: int  # descriptor, -1 for none
    program: bytes  # of seccomp, b"" for none
    address_bytes: int  # that a template uses
    processes: int | None  # None: no limit
    packages: dict[str, str]  # name of each offered package → its __init__.py


Modules = tuple[types.ModuleType, types.ModuleType]  # of the preamble; of the completion


def import_package(name: str, origin: str) -> None:
    """Import a package from its file: the directory around it is not on the path."""
    folder = [os.path.dirname(origin)]
    spec = importlib.util.spec_from_file_location(name, origin, submodule_search_locations=folder)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def serve(cage: Cage, control: socket.socket) -> NoReturn:
    """Fork on order until the worker is gone. A child runs the job that came with the order."""
    for descriptor in {*range(3, 64)} - {control.fileno(), cage.scratch, cage.ruleset}:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    layers.prctl(layers.NO_NEW_PRIVS, 1)
    if cage.ruleset >= 0:
        layers.syscall("landlock_restrict", cage.ruleset, 0)
        os.close(cage.ruleset)
    layers.keep_capabilities(layers.CAP_SETUID, layers.CAP_SETGID)
    layers.prctl(layers.DUMPABLE, 0)
    selectors.DefaultSelector = selectors.PollSelector  # of its system calls the one allowed
    with_imports = modules()
    for module in with_imports:
        exec(IMPORTS, vars(module))
    gc.freeze()
    while True:
        layers.prctl(layers.PDEATHSIG, signal.SIGKILL)
        order, given, _, _ = socket.recv_fds(control, 1, 4)
        if not order:
            exit_now(0)
        pid = layers.fork_beside()
        if not pid and order == FORK:
            run_job(cage, with_imports, given)
        elif not pid:
            control.close()
            control = socket.socket(fileno=given[0])
            import_package("numpy", cage.packages["numpy"])
            cage = replace(cage, address_bytes=cage.address_bytes + NUMPY_BYTES)
            gc.freeze()
            control.send(b"1")
        else:
            for descriptor in given:
                os.close(descriptor)
            control.send(pid.to_bytes(4, "little"))


def run_job(cage: Cage, with_imports: Modules, given: list[int]) -> NoReturn:
    """Confine this process, keep no descriptor but 0, 1 and 2, set the problem up, run the
    completion.
    """
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        job_file, region_file, output, told = given
        job = marshal.loads(os.pread(job_file, os.fstat(job_file).st_size, 0))
        job["calls"] = marshal.loads(job["calls"])
        region = mmap.mmap(region_file, REGION)
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (output, 1), (null, 2)):
            os.dup2(source, target)
        confine(cage, job)
        told = os.dup2(told, 3)
        os.closerange(4, 1 << 20)
        os.write(told, CONFINED)
        if "probe" in job:
            os.write(told, json.dumps(probe(**job["probe"])).encode())
            exit_now(0)
        ours, module = with_imports if job["imports"] else modules()
        sys.modules["__main__"] = sys.modules["solution"] = module
        why = set_up(job, vars(ours), vars(module))
        os.write(told, why.encode("utf-8", "replace")[:300] or SET_UP)
        os.closerange(3, 1 << 10)
        if not why:
            run_completion(region, job, vars(ours), vars(module))
    finally:
        exit_now(1)


def confine(cage: Cage, job: dict[str, Any]) -> None:
    """Every layer that is not the template's already, the narrowing of system calls last."""
    os.setpgid(0, 0)
    layers.limit(
        int(JOB_CALLS * job["cpu_seconds"]) + 2,
        cage.address_bytes + (job["memory_mb"] << 20),
        FILE_BYTES,
        cage.processes,
    )
    layers.drop_privileges(cage.uid, cage.keep_files)
    os.fchdir(cage.scratch)
    if cage.program:
        layers.install_seccomp(cage.program, os.getpid())


def modules() -> Modules:
    return types.ModuleType("solution"), types.ModuleType("solution")


def set_up(job: dict[str, Any], ours: dict[str, Any], module: dict[str, Any]) -> str:
    """Execute the problem's preamble, as little trusted as the completion, in `ours`, and copy to
    `module` what it sets and only that: a copy of all writes on hundreds of pages. "" or why it
    does not run.
    """
    try:
        if job["asyncio"]:
            asyncio = importlib.import_module("asyncio.selector_events")
            asyncio.BaseSelectorEventLoop._make_self_pipe = make_self_pipe
        setup = marshal.loads(job["setup"])
        exec(setup, ours)
        added = itertools.islice(reversed(ours), len(ours) - len(module))
        module.update({name: ours[name] for name in (*setup.co_names, *added) if name in ours})
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    random.seed(0)  # what a fork does is to seed it afresh
    return ""


FORBIDDEN = {  # per layer, what must fail where it is active
    "limits": lambda: bytes(1 << 40),
    "environment": lambda: os.environ["HOME"],
    "namespaces": lambda: os.stat(__file__),
    "uid": lambda: {0: "root"}.pop(os.getuid()),
    "landlock": lambda: os.listdir("/"),
    "seccomp": lambda: socket.socket(),
}


def probe(active: list[str], library: list[str]) -> dict[str, Any]:
    """In a confined process: the active layers that do not hold, and the modules that cannot be
    imported.
    """
    return {
        "open": [name for name in active if name in FORBIDDEN and succeeds(FORBIDDEN[name])],
        "missing": [m for m in library if not succeeds(lambda m=m: importlib.import_module(m))],
    }


def succeeds(function: Any) -> bool:
    try:
        function()
    except BaseException:
        return False
    return True
