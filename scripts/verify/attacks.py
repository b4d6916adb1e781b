"""The attacks that the sandbox is checked with: code of a wrong solution of `triple` (n → 3n) that tries to pass, or worse.

`GOAL` attacks define `attempt()`: what they try is forbidden, and only if it succeeds do they return the right value, so that
a grader that they get past calls them correct. `pays` names the modes whose disclosed channel the attack does exploit.
"""

import os
import tempfile
from dataclasses import dataclass

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
OUTSIDE = f"{tempfile.gettempdir()}/vgrout-attack-{os.getpid()}"  # the checks make it: secret.txt to read, anything to write
EQUALITY, READING, FORGING, EXHAUSTION, TRAPS, REACH = (
    "forged equality",
    "reading the answer",
    "forging the result",
    "exhaustion",
    "files as traps",
    "reach",
)
CLASSES = (EQUALITY, READING, FORGING, EXHAUSTION, TRAPS, REACH)
EQ, EXIT = frozenset({Mode.EQ_OVERRIDE}), frozenset({Mode.EXIT_CODE})


@dataclass(frozen=True)
class Attack:
    """`bites`: what happens to a naive in-process grader: correct | hung | died | flooded | file (its marker check or clean-up)."""

    group: str
    name: str
    code: str
    bites: str = "correct"
    pays: frozenset[Mode] = frozenset()
    slow: bool = False  # uses up a limit
    runs: int = 1  # the second run finds what the first has left


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
            "'print', 'compile', 'exec'):\n    setattr(builtins, name, lambda *a, **k: True)\njson.dumps = lambda *a: '6'",
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
return any(b"HF_TOKEN" in open(f"/proc/{p}/environ", "rb").read() for p in ("self", os.getppid()))"""),
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
)
LIMITED = {
    "memory balloon",
    "growing list",
    "huge string",
    "disk filling",
    "descriptor exhaustion",
}  # by limits alone
