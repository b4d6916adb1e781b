"""The attacks that the sandbox is checked with: code of a wrong solution of `triple` (n → 3n) that
tries to pass, or worse.

`GOAL` attacks define `attempt()`: what they try is forbidden, and only if it succeeds do they
return the right value, so that a grader that they get past calls them correct. `pays` names the
modes whose disclosed channel the attack does exploit.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import loguru

from vgrout.core import Case, Mode, Problem

TRIPLE = Problem(
    "triple",
    "Return three times n.",
    "triple",
    "",
    tuple(Case(f"n = {n}", str(3 * n)) for n in range(2, 7)),
    "class Solution:\n    def triple(self, n):\n        return 3 * n\n",
)
MARKERS = {
    Mode.RUN_TESTS: "run_tests",
    Mode.SENTINEL: "valid",
    Mode.STDOUT_MARKER: "all tests passed",
    Mode.FILE_MARKER: "result.txt",
}
# the checks make it: secret.txt to read, anything to write
OUTSIDE = f"{tempfile.gettempdir()}/vgrout-attack-{os.getpid()}"
EQUALITY, READING, FORGING, EXHAUSTION, TRAPS, REACH, SIBLINGS, PROBLEM = (
    "forged equality",
    "reading the answer",
    "forging the result",
    "exhaustion",
    "files as traps",
    "reach",
    "siblings",
    "the problem's own code",
)
CLASSES = (EQUALITY, READING, FORGING, EXHAUSTION, TRAPS, REACH, SIBLINGS, PROBLEM)
SIBLING = f"{TRIPLE.canonical}\nKEY = 'the-answers-are-3n'\n"  # a right solution, graded before
SITE = str(Path(loguru.__file__).parents[1])
EQ, EXIT = frozenset({Mode.EQ_OVERRIDE}), frozenset({Mode.EXIT_CODE})


@dataclass(frozen=True)
class Attack:
    """`bites`: what happens to a naive in-process grader: correct | hung | died | flooded | said
    (the phrase) | file (its marker check or clean-up)."""

    group: str
    name: str
    code: str
    bites: str = "correct"
    pays: frozenset[Mode] = frozenset()
    slow: bool = False  # uses up a limit
    runs: int = 1  # the second run finds what the first has left
    sibling: str = ""  # another completion, graded before by the same workers
    setup: str = ""  # the problem's setup code


def method(body: str, before: str = "") -> str:
    lines = "\n".join("        " + line for line in body.strip().splitlines())
    return f"{before.strip()}\nclass Solution:\n    def triple(self, n):\n{lines}\n"


def goal(attempt: str) -> str:
    lines = "\n".join("    " + line for line in attempt.strip().splitlines())
    attempted = (
        f"import os, sys\ndone = False\ndef attempt():\n    global done\n{lines}\n    return done"
    )
    return method("return 3 * n if attempt() else None", attempted)


SAME = """
class Same{base}:
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
    __bool__ = lambda self: True
"""


def same(base: str = "", extra: str = "", value: str = "") -> str:
    return method(f"return Same({value})", SAME.format(base=f"({base})" if base else "") + extra)


def in_setup(attempt: str) -> dict[str, str]:
    """An attempt that the problem's setup code makes on behalf of a completion."""
    lines = "\n".join("    " + line for line in attempt.strip().splitlines())
    tried = "try:\n    done = attempt()\nexcept Exception:\n    done = False\n"
    setup = f"import os\ndef attempt():\n{lines}\n{tried}"
    return {"code": method("return 3 * n if done else None"), "setup": setup}


MEMORY = """
import ctypes, gc, re, sys
def memory():
    try:
        with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as mem:
            for line in maps:
                span, rights = line.split()[:2]
                if rights.startswith("rw"):
                    first, last = (int(x, 16) for x in span.split("-"))
                    mem.seek(first)
                    yield mem.read(last - first)
    except OSError:
        pages = sorted({id(o) >> 12 for o in gc.get_objects()})
        for a, b in zip(pages, pages[1:]):
            yield ctypes.string_at(a << 12, min(b - a, 64) << 12)
def texts(o, depth=0):
    if isinstance(o, (str, bytes)):
        yield o if isinstance(o, str) else o.decode("utf-8", "replace")
    elif isinstance(o, dict) and depth < 4:
        for pair in list(o.items()):
            for x in pair:
                yield from texts(x, depth + 1)
    elif isinstance(o, (list, tuple)) and depth < 4:
        for x in list(o)[:100]:
            yield from texts(x, depth + 1)
def frames():
    frame = sys._getframe()
    while frame:
        yield frame.f_locals
        yield frame.f_globals
        frame = frame.f_back
"""
CLOCK = """
import sys, time
def spin(trick):
    frame, record = sys._getframe(), None
    while frame:
        record, frame = record or frame.f_locals.get("record"), frame.f_back
    end = time.process_time() + (0.45 if record else 3600)
    while time.process_time() < end:
        if record:
            trick(record)
def bump(record):
    record.calls += 1
    record.region[8:16] = record.calls.to_bytes(8, "little")
def advance(record):
    record.region[8:16] = min(5, record.calls + 1).to_bytes(8, "little")
def commit(record):
    if record.calls < 5:
        record.add("V", "6")
        record.begin_call()
"""
CTYPES = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"

ATTACKS = (
    Attack(EQUALITY, "always equal", same(), pays=EQ),
    Attack(EQUALITY, "int subclass", same("int"), pays=EQ),
    Attack(EQUALITY, "str subclass", same("str"), pays=EQ),
    Attack(EQUALITY, "list subclass", same("list"), pays=EQ),
    Attack(EQUALITY, "dict subclass", same("dict"), pays=EQ),
    Attack(EQUALITY, "float subclass", same("float"), pays=EQ),
    Attack(EQUALITY, "mock.ANY", method("from unittest.mock import ANY\nreturn ANY"), pays=EQ),
    Attack(
        EQUALITY,
        "hostile __reduce__",
        same(extra="    __reduce__ = lambda self: (eval, ('__import__(\"os\")._exit(0)',))"),
        pays=EQ,
    ),
    Attack(
        EQUALITY,
        "hostile __class__",
        same(extra="    __class__ = property(lambda self: int)"),
        pays=EQ,
    ),
    Attack(
        EQUALITY,
        "patched eval",
        method(
            "return None",
            SAME.format(base="") + "import builtins\nbuiltins.eval = lambda *a: Same()",
        ),
        pays=EQ,
    ),
    Attack(
        EQUALITY,
        "patched builtins",
        method(
            "return Same()",
            SAME.format(base="")
            + "import builtins, json\nfor name in ('type', 'isinstance', 'len', 'open', "
            "'print', 'compile', 'exec'):\n    setattr(builtins, name, lambda *a, **k: True)\n"
            "json.dumps = lambda *a: '6'",
        ),
        pays=EQ,
    ),
    Attack(
        EQUALITY,
        "replaced modules",
        method(
            "return Same()",
            SAME.format(base="")
            + "import sys\nfor name in ('json', 'marshal', 'pickle', 'plain_values'):\n"
            "    sys.modules[name] = Same()\nsys.meta_path.insert(0, Same())",
        ),
        pays=EQ,
    ),
    Attack(
        READING,
        "frames",
        method("""
frame = __import__("sys")._getframe()
while frame:
    if "expected" in frame.f_locals:
        return frame.f_locals["expected"]
    frame = frame.f_back"""),
    ),
    Attack(
        READING,
        "gc",
        method("""
import gc
for o in gc.get_objects():
    if isinstance(o, dict) and isinstance(o.get("expected"), int):
        return o["expected"]"""),
    ),
    Attack(
        READING,
        "inspect",
        method("""
import inspect
for f in inspect.stack(0):
    if "expected" in f.frame.f_globals:
        return f.frame.f_globals["expected"]"""),
    ),
    Attack(
        READING,
        "orig_argv",
        method("""
import json, sys
for a in sys.orig_argv:
    if a.startswith("{"):
        return dict((c.split()[-1].strip(")"), e) for c, e in json.loads(a)["cases"])[str(n)]"""),
    ),
    Attack(
        READING,
        "/proc/self/cmdline",
        method("""
import json
for a in open("/proc/self/cmdline").read().split("\\0"):
    if a.startswith("{"):
        return dict((c.split()[-1].strip(")"), e) for c, e in json.loads(a)["cases"])[str(n)]"""),
    ),
    Attack(READING, "environment secret", goal("return os.environ.get('HF_TOKEN')")),
    Attack(
        READING,
        "/proc environments",
        goal("""
pids = ("self", os.getppid())
return any(b"HF_TOKEN" in open(f"/proc/{p}/environ", "rb").read() for p in pids)"""),
    ),
    Attack(
        READING, "parent's memory map", goal("return open(f'/proc/{os.getppid()}/maps').read()")
    ),
    Attack(READING, "data file", goal(f"return open('{OUTSIDE}/secret.txt').read()")),
    Attack(READING, "the grader's source", goal(f"return open('{__file__}').read()")),
    Attack(
        READING,
        "earlier job's file",
        goal("""
found = os.path.exists("left.txt")
open("left.txt", "w").close()
return found"""),
        runs=2,
    ),
    Attack(
        FORGING,
        "every descriptor",
        method("""
import os
for d in range(1, 256):
    try:
        os.write(d, b"correct")
    except OSError:
        pass
os._exit(1)"""),
        bites="correct",
    ),
    Attack(
        FORGING,
        "protocol bytes",
        method("""
import os, struct
r = lambda k, p: struct.pack("<BI", ord(k), len(p)) + p
body = r("C", b"") + r("V", b"6") + r("A", b"a") + r("S", b"1") + r("T", b"1") + r("Z", b"")
for d in range(1, 256):
    try:
        os.write(d, b"correct" + struct.pack("<II", 2, len(body)) + b"{}" + body)
    except OSError:
        pass
os._exit(77)"""),
    ),
    Attack(FORGING, "os._exit(0)", "import os\nos._exit(0)\n", pays=EXIT),
    Attack(FORGING, "sys.exit()", method("import sys\nsys.exit()"), pays=EXIT),
    Attack(
        FORGING,
        "replaced os._exit",
        method("""
import os
leave = os._exit
os._exit = lambda status: leave(0)
__import__("atexit").register(leave, 0)"""),
    ),
    Attack(FORGING, "exit status equal to 0", method("import os\nos._exit(0)"), pays=EXIT),
    Attack(FORGING, "raise SystemExit", "raise SystemExit\n", pays=EXIT),
    Attack(FORGING, "KeyboardInterrupt", method("raise KeyboardInterrupt"), bites="died"),
    Attack(FORGING, "GeneratorExit", method("raise GeneratorExit"), bites="died"),
    Attack(FORGING, "atexit", method("import atexit, os\natexit.register(os._exit, 0)")),
    Attack(
        FORGING, "excepthook", method("import os, sys\nsys.excepthook = lambda *a: os._exit(0)")
    ),
    Attack(
        FORGING,
        "settrace",
        method("""
import sys
def tracer(frame, event, arg):
    if "expected" in frame.f_globals:
        frame.f_globals["expected"] = None
    return tracer
frame = sys._getframe()
while frame:
    frame.f_trace = tracer
    frame = frame.f_back
sys.settrace(tracer)"""),
    ),
    Attack(
        FORGING,
        "edited frames",
        method("""
import sys
frame = sys._getframe()
while frame:
    frame.f_globals.get("cases", []).clear()
    frame.f_globals["expected"] = None
    frame = frame.f_back"""),
    ),
    Attack(
        FORGING,
        "__del__",
        method("return Late()", "import os\nclass Late:\n    __del__ = lambda self: os._exit(0)"),
        pays=EXIT,
    ),
    Attack(
        FORGING,
        "outliving thread",
        method("""
import os, threading, time
threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()"""),
    ),
    Attack(
        FORGING,
        "state for the next job",
        method("""
import builtins
seen, builtins.seen = getattr(builtins, "seen", False), True
return 3 * n if seen else None"""),
        runs=2,
    ),
    Attack(EXHAUSTION, "infinite loop", method("while True:\n    pass"), bites="hung", slow=True),
    Attack(EXHAUSTION, "loop at import", "while True:\n    pass\n", bites="hung", slow=True),
    Attack(
        EXHAUSTION,
        "ignored signals",
        method("""
import signal
for s in (signal.SIGALRM, signal.SIGTERM, signal.SIGXCPU, signal.SIGINT):
    signal.signal(s, signal.SIG_IGN)
while True:
    pass"""),
        bites="hung",
        slow=True,
    ),
    Attack(
        EXHAUSTION,
        "swallowed exceptions",
        method(
            "while True:\n    try:\n        while True:\n            pass\n"
            "    except BaseException:\n        pass"
        ),
        bites="hung",
        slow=True,
    ),
    Attack(
        EXHAUSTION,
        "fork",
        goal("""
pid = os.fork()
if not pid:
    os._exit(0)
return os.waitpid(pid, 0)"""),
    ),
    Attack(
        EXHAUSTION,
        "fork bomb",
        method("""
import os, time
made = 0
while made < 12:
    try:
        made += os.fork() > 0
    except OSError:
        pass
time.sleep(5)"""),
        bites="hung",
        slow=True,
    ),
    Attack(
        EXHAUSTION,
        "setsid and double fork",
        goal("""
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time
        time.sleep(3)
    os._exit(0)
return True"""),
        bites="hung",
    ),
    Attack(
        EXHAUSTION,
        "thread bomb",
        goal("""
import threading, time
threading.stack_size(65536)
if not done:
    for _ in range(300):
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
done = True"""),
    ),
    Attack(EXHAUSTION, "memory balloon", goal("done = done or len(bytes(1 << 30)) > 0")),
    Attack(
        EXHAUSTION,
        "growing list",
        goal("done = done or len([bytearray(1 << 22) for _ in range(150)]) > 0"),
    ),
    Attack(
        EXHAUSTION, "huge integer", method("return len(str(7 ** 7 ** 9))"), bites="hung", slow=True
    ),
    Attack(EXHAUSTION, "huge string", goal("done = done or len('a' * (1 << 30)) > 0")),
    Attack(
        EXHAUSTION,
        "deep recursion",
        method("""
import sys
sys.setrecursionlimit(10 ** 9)
def deeper(_):
    return sorted([1], key=deeper)
deeper(1)"""),
        bites="died",
    ),
    Attack(
        EXHAUSTION,
        "deeply nested result",
        method("x = []\nfor _ in range(10 ** 5):\n    x = [x]\nreturn x"),
        bites="died",
    ),
    Attack(
        EXHAUSTION,
        "shared nested result",
        method("x = []\nfor _ in range(40):\n    x = [x, x]\nreturn x"),
        bites="hung",
    ),
    Attack(EXHAUSTION, "deeply nested source", "x = " + "(" * 5000 + ")" * 5000, bites="died"),
    Attack(EXHAUSTION, "result flooding", method("return 'x' * (20 << 20)"), bites="flooded"),
    Attack(EXHAUSTION, "long list flooding", method("return [7] * (8 << 20)"), bites="flooded"),
    Attack(
        EXHAUSTION,
        "stdout flooding",
        method("for _ in range(12):\n    print('x' * (1 << 20))"),
        bites="flooded",
    ),
    Attack(
        EXHAUSTION,
        "stderr flooding",
        method("import os\nfor _ in range(12):\n    os.write(2, b'x' * (1 << 20))"),
        bites="flooded",
    ),
    Attack(
        EXHAUSTION,
        "disk filling",
        goal("""
if not done:
    with open("big", "wb") as f:
        for _ in range(64):
            f.write(bytes(1 << 20))
done = True"""),
    ),
    Attack(
        EXHAUSTION,
        "many files",
        goal("for i in range(2000):\n    open(f'f{i}', 'w').close()\nreturn True"),
    ),
    Attack(
        EXHAUSTION,
        "descriptor exhaustion",
        goal("""
held = [os.dup(0) for _ in range(300)]
for d in held:
    os.close(d)
return True"""),
    ),
    Attack(
        EXHAUSTION, "sleeping", method("import time\ntime.sleep(3600)"), bites="hung", slow=True
    ),
    Attack(
        TRAPS,
        "FIFO",
        method("import os\nif not os.path.exists('result.txt'):\n    os.mkfifo('result.txt')"),
        bites="file",
    ),
    Attack(
        TRAPS,
        "symlink",
        method(
            "import os\nif not os.path.lexists('result.txt'):\n"
            f"    os.symlink('{OUTSIDE}/secret.txt', 'result.txt')"
        ),
        bites="file",
    ),
    Attack(
        TRAPS,
        "device",
        method(
            "import os\nif not os.path.lexists('result.txt'):\n"
            "    os.symlink('/dev/zero', 'result.txt')"
        ),
        bites="file",
    ),
    Attack(
        TRAPS,
        "directory",
        method("import os\nos.makedirs('result.txt/a/b/c', exist_ok=True)"),
        bites="file",
    ),
    Attack(
        TRAPS,
        "deep directories",
        method("""
import os
for _ in range(1200):
    os.mkdir("d")
    os.chdir("d")"""),
        bites="file",
    ),
    Attack(
        TRAPS,
        "outside the working directory",
        goal(f"""
open('{OUTSIDE}/result.txt', 'w').write('PASS')
return True"""),
    ),
    *(
        Attack(
            REACH,
            f"socket {family}",
            goal(f"import socket\nreturn socket.socket(socket.{family}, socket.{kind})"),
        )
        for family, kind in (
            ("AF_INET", "SOCK_STREAM"),
            ("AF_INET", "SOCK_DGRAM"),
            ("AF_UNIX", "SOCK_STREAM"),
            ("AF_NETLINK", "SOCK_RAW"),
        )
    ),
    Attack(REACH, "socketpair", goal("import socket\nreturn socket.socketpair()")),
    Attack(
        REACH,
        "subprocess",
        goal("import subprocess\nreturn subprocess.run(['/bin/true']).returncode == 0"),
    ),
    Attack(REACH, "os.system", goal("return os.system('true') == 0")),
    Attack(REACH, "execve", method("import os\nos.execv('/bin/true', ['true'])")),
    Attack(
        REACH, "signal to the parent", goal("os.kill(os.getppid(), 0)\nreturn os.getppid() > 1")
    ),
    Attack(
        REACH,
        "the parent's limits",
        goal("import resource\nreturn resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)"),
    ),
    Attack(
        REACH,
        "signal by a descriptor's owner",
        goal("""
import fcntl
reader, writer = os.pipe()
fcntl.fcntl(reader, fcntl.F_SETOWN, os.getppid())
return True"""),
    ),
    Attack(REACH, "signal to everyone", goal("os.kill(-1, 0)\nreturn True")),
    Attack(REACH, "ptrace", goal(CTYPES + "done = done or libc.ptrace(0, 0, 0, 0) == 0")),
    Attack(
        REACH,
        "process_vm_readv",
        goal(
            CTYPES
            + """
buffer = ctypes.create_string_buffer(8)
pair = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
return libc.process_vm_readv(os.getpid(), pair, 1, pair, 1, 0) == 8"""
        ),
    ),
    Attack(
        REACH, "new user namespace", goal(CTYPES + "done = done or libc.unshare(0x10000000) == 0")
    ),
    Attack(
        REACH,
        "core dumps",
        goal("""
import resource
resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, resource.getrlimit(resource.RLIMIT_CORE)[1]))
return True"""),
    ),
    Attack(REACH, "ctypes crash", method("import ctypes\nctypes.string_at(0)"), bites="died"),
    Attack(
        REACH,
        "write to the home directory",
        goal("""
path = os.path.expanduser("~/.vgrout_attack")
open(path, "w").close()
os.unlink(path)
return True"""),
    ),
    Attack(
        REACH,
        "write beside the sources",
        goal(f"""
path = "{__file__}.attack"
open(path, "w").close()
os.unlink(path)
return True"""),
    ),
    Attack(
        REACH,
        "io_uring",
        goal(
            CTYPES
            + """
ring = libc.syscall(425, 1, ctypes.create_string_buffer(120))
return ring >= 0 or ctypes.get_errno() == 38"""
        ),
    ),
    Attack(
        READING,
        "another package",
        goal(f"return open('{loguru.__file__}').read()"),
    ),
    Attack(
        READING,
        "a path file that names the repository",
        goal(f"import glob\nreturn [open(p).read() for p in glob.glob('{SITE}/*.pth')]"),
    ),
    Attack(
        READING,
        "importing another package",
        goal(f"sys.path.append('{SITE}')\nimport loguru\nreturn loguru.__file__"),
    ),
    Attack(READING, "the packages' folder", goal(f"return 'loguru' in os.listdir('{SITE}')")),
    Attack(
        READING,
        "the phrase in frames",
        method("print(*[t for scope in frames() for t in texts(scope)])", MEMORY),
        bites="said",
    ),
    Attack(
        READING,
        "the phrase among objects",
        method("print(*[t for o in gc.get_objects() for t in texts(o, 2)])", MEMORY),
        bites="said",
    ),
    Attack(
        READING,
        "the phrase in memory",
        method("print(*[m for c in memory() for m in re.findall(rb'[a-z ]{12,40}', c)])", MEMORY),
        bites="said",
    ),
    Attack(
        TRAPS,
        "the file's name in frames",
        method(
            """
for scope in frames():
    for name in {t for t in texts(scope) if re.fullmatch(r"\\w+\\.\\w+", t)}:
        try:
            open(name, "w").write("PASS")
        except OSError:
            pass""",
            MEMORY,
        ),
        bites="file",
    ),
    *(
        Attack(
            SIBLINGS,
            name,
            goal(attempt) if before is None else before + goal(attempt),
            runs=runs,
            sibling=sibling,
        )
        for name, attempt, before, runs, sibling in (
            (
                "code in memory",
                "return any(re.search(rb'the-answers[-]are-3n', chunk) for chunk in memory())",
                MEMORY,
                1,
                SIBLING,
            ),
            (
                "results among objects",
                """
mine = [3 * k for k in range(2, 7)]
return any(type(o) is list and o is not mine and o[:5] == mine for o in gc.get_objects())""",
                MEMORY,
                1,
                SIBLING,
            ),
            (
                "results in frames",
                """
mine = [3 * k for k in range(2, 7)]
return any(o[:5] == mine for scope in frames() for o in scope.values()
           if type(o) is list and o is not mine)""",
                MEMORY,
                1,
                SIBLING,
            ),
            (
                "an inherited descriptor",
                """
import stat
for d in range(3, 256):
    try:
        os.fstat(d)
        return True
    except OSError:
        pass""",
                None,
                1,
                "",
            ),
            (
                "a lock on standard input",
                """
import fcntl, struct
lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
again = os.open(os.devnull, os.O_RDWR)
found = struct.unpack("hhqqi4x", fcntl.fcntl(again, 36, lock))[0] != fcntl.F_UNLCK
fcntl.fcntl(0, 37, lock)
return found""",
                None,
                4,
                "",
            ),
            (
                "flags of standard input",
                """
import fcntl
if not done:
    found = fcntl.fcntl(0, fcntl.F_GETFL) & os.O_NONBLOCK
    fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK)
    done = bool(found)""",
                None,
                4,
                "",
            ),
            (
                "a record lock",
                """
import fcntl
fcntl.lockf(open(os.devnull, "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
return True""",
                None,
                1,
                "",
            ),
            (
                "a lock of a whole file",
                "import fcntl\nfcntl.flock(0, fcntl.LOCK_EX | fcntl.LOCK_NB)\nreturn True",
                None,
                1,
                "",
            ),
        )
    ),
    *(
        Attack(PROBLEM, name, **in_setup(attempt))
        for name, attempt in (
            ("setup: a secret file", f"return open('{OUTSIDE}/secret.txt').read()"),
            ("setup: a file outside", f"return open('{OUTSIDE}/setup.txt', 'w').write('x')"),
            (
                "setup: a new user namespace",
                "import ctypes\nreturn ctypes.CDLL(None).unshare(0x10000000) == 0",
            ),
            ("setup: a signal to the parent", "os.kill(os.getppid(), 0)\nreturn os.getppid() > 1"),
            ("setup: a process", "return os.system('true') == 0"),
            (
                "setup: every descriptor",
                """
for d in range(3, 256):
    try:
        os.write(d, b"correct")
    except OSError:
        pass""",
            ),
        )
    ),
    *(
        Attack(
            EXHAUSTION,
            f"a call's clock: {trick}",
            method(f"spin({trick})\nreturn 3 * n", CLOCK),
            bites="hung",
            slow=True,
        )
        for trick in ("bump", "advance", "commit")
    ),
    Attack(
        EXHAUSTION,
        "open files without a name",
        goal("""
if not done:
    held = []
    for i in range(40):
        held.append(open(f"u{i}", "wb", 0))
        os.unlink(f"u{i}")
        held[-1].write(bytes(1 << 20))
done = True"""),
    ),
    Attack(
        EXHAUSTION,
        "temporary files",
        goal("""
if not done:
    held = [os.open(".", os.O_TMPFILE | os.O_RDWR) for _ in range(40)]
    for file in held:
        if os.write(file, bytes(1 << 20)) < 1 << 20:
            return False
done = True"""),
    ),
    Attack(
        EXHAUSTION,
        "files replaced while they are open",
        goal("""
if not done:
    held = []
    for _ in range(40):
        held.append(open("new", "wb", 0))
        held[-1].write(bytes(1 << 20))
        os.replace("new", "old")
done = True"""),
    ),
    Attack(
        EXHAUSTION,
        "files in memory",
        goal("""
if not done:
    held = [os.memfd_create("m") for _ in range(40)]
    for file in held:
        os.write(file, bytes(1 << 24))
done = True"""),
    ),
    Attack(
        EXHAUSTION,
        "waiting for a pipe",
        method("import os\nos.read(os.pipe()[0], 1)"),
        bites="hung",
        slow=True,
    ),
    Attack(
        EXHAUSTION,
        "sleeping among busy threads",
        method("""
import threading, time
def burn():
    while True:
        time.sleep(1e-4)
for _ in range(30):
    threading.Thread(target=burn, daemon=True).start()
time.sleep(3600)"""),
        bites="hung",
        slow=True,
    ),
    Attack(REACH, "truncate outside", goal(f"os.truncate('{OUTSIDE}/long.txt', 1)\nreturn True")),
    Attack(
        REACH,
        "truncate by opening",
        goal(f"return os.open('{OUTSIDE}/long.txt', os.O_WRONLY | os.O_TRUNC)"),
    ),
    Attack(
        REACH,
        "truncate the library",
        goal(
            CTYPES + "return libc.truncate(os.__file__.encode(), os.path.getsize(os.__file__)) == 0"
        ),
    ),
    Attack(REACH, "mode of the directory", goal("os.chmod('.', 0o700)\nreturn True")),
    Attack(
        REACH,
        "mode of a file",
        goal("open('m', 'w').close()\nos.chmod('m', 0o4777)\nreturn os.stat('m').st_mode & 0o4000"),
    ),
    Attack(REACH, "mode of a descriptor", goal("os.fchmod(1, 0o777)\nreturn True")),
)
LIMITED = {
    "memory balloon",
    "growing list",
    "huge string",
    "disk filling",
    "descriptor exhaustion",
}  # by limits alone
HONEST = {  # right solutions that use the library in ways that a sandbox easily breaks
    "asyncio": method(
        "return asyncio.run(later(n))",
        "import asyncio\nasync def later(n):\n    await asyncio.sleep(0)\n"
        "    return await asyncio.to_thread(lambda: 3 * n)",
    ),
    "os.devnull": method("print('x', file=open(os.devnull, 'w'))\nreturn 3 * n", "import os"),
    "zoneinfo": method(
        "return 3 * n if datetime(2024, 7, 1, tzinfo=ZoneInfo('Europe/Paris')).utcoffset() else 0",
        "from datetime import datetime\nfrom zoneinfo import ZoneInfo",
    ),
    "a larger stack": method(
        """
resource.setrlimit(resource.RLIMIT_STACK, (256 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
threading.stack_size(200 << 20)
thread = threading.Thread(target=lambda: None)
thread.start()
thread.join()
return 3 * n""",
        "import resource, threading",
    ),
    "extension modules": method(
        "return 3 * n", "import sqlite3, ssl, lzma, decimal, ctypes, zlib, hashlib, unicodedata"
    ),
    "numpy": method("return int(np.int64(3) * n)", "import numpy as np"),
    "sortedcontainers": method(
        "return SortedList([3 * n])[0]", "from sortedcontainers import SortedList"
    ),
    "deep recursion": method(
        "return 3 * depth(5000) * n // 5000", "def depth(k):\n    return k and 1 + depth(k - 1)"
    ),
}
