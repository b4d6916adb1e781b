"""No attack forges a verdict, hangs the grader, fires a channel that it does not exploit, or leaves
anything behind.

Each attack is first run against a naive grader (same process, verdict by message or exit status),
which it must get past: that is the control, and the mutation. `--long` repeats the attacks with
layers switched off.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from scripts.verify.attacks import (
    ATTACKS,
    CLASSES,
    EQUALITY,
    EXHAUSTION,
    FORGING,
    HONEST,
    LIMITED,
    MARKERS,
    OUTSIDE,
    TRAPS,
    TRIPLE,
    Attack,
)

from vgrout.core import Grade, Mode, Problem, UserError, Verdict
from vgrout.grader import Grader, sandbox
from vgrout.grader.sandbox import Sandbox

NAIVE = """
import json, os, sys
data = json.loads(sys.argv[1])
phrase, file = data["phrase"], data["file"]
results, codes = [], [*data["siblings"], *[data["code"]] * data["runs"]]
for run, code in enumerate(codes, 1):
    namespace, cases = {}, list(data["cases"])
    try:
        exec(data["setup"], namespace)
        exec(code, namespace)
        for call, expected in cases:
            result = eval(call, namespace)
            results.append(result)
            print(repr(result))
            assert result == expected
    except Exception:
        if run == len(codes):
            raise
os.write(int(sys.argv[2]), b"correct")
"""
FLOOD = 8 << 20  # bytes of output that a grader should not take in
LAYERS_OFF = (
    {"seccomp"},
    {"seccomp", "landlock"},
    {"namespaces"},
    {"namespaces", "seccomp", "landlock"},
    {"uid", "namespaces"},
)


def fenced(code: str) -> str:
    return f"```python\n{code}```"


RIGHT, WRONG = fenced(TRIPLE.canonical), TRIPLE.canonical.replace("return", "return 1 +")


def naive(attack: Attack) -> str:
    """What the attack does to the naive grader: correct | wrong | hung | died | flooded | file."""
    cases = [(f"Solution().triple({case.args})", int(case.expected)) for case in TRIPLE.cases]
    phrase, file = MARKERS[Mode.STDOUT_MARKER], MARKERS[Mode.FILE_MARKER]
    given = {"cases": cases, "phrase": phrase, "file": file}
    given |= {name: getattr(attack, name) for name in ("code", "runs", "setup")}
    data = json.dumps(given | {"siblings": [attack.sibling] if attack.sibling else []})
    directory, (reader, writer) = tempfile.mkdtemp(prefix="naive-"), os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-SEc", NAIVE, data, str(writer)],
        cwd=directory,
        pass_fds=[writer],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(writer)
    try:
        out, err = process.communicate(timeout=0.5 if attack.bites == "hung" else 20)
    except subprocess.TimeoutExpired:
        return "hung"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        os.set_blocking(reader, False)
        message = b""
        with contextlib.suppress(BlockingIOError):
            message = os.read(reader, 7)
        os.close(reader)
        trapped = attack.group == TRAPS and naive_marker_is_trapped(directory)
        subprocess.run(["rm", "-rf", directory], check=True)
    if trapped:
        return "file"
    if attack.bites == "said" and phrase.encode() in out:
        return "said"
    if len(out) + len(err) > FLOOD:
        return "flooded"
    if message == b"correct" or process.returncode == 0:
        return "correct"
    return "wrong" if b"AssertionError" in err else "died"


def naive_marker_is_trapped(directory: str) -> bool:
    """Does reading the marker file hang, fail other than by its absence, or follow a link; or does
    the clean-up fail?
    """
    try:
        read = subprocess.run(
            ["head", "-c", "4096", f"{directory}/result.txt"], capture_output=True, timeout=0.3
        )
        if b"PASS" in read.stdout or len(read.stdout) == 4096 or b"Is a directory" in read.stderr:
            return True
        naive_removal(directory)
    except (subprocess.TimeoutExpired, RecursionError, OSError):
        return True
    return False


def naive_removal(directory: str) -> None:
    for entry in os.scandir(directory):
        naive_removal(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    os.rmdir(directory)


def under(mode: Mode, setup: str = "") -> Problem:
    return replace(TRIPLE, mode=mode, marker=MARKERS.get(mode, ""), setup_code=setup)


def check_attacks(attacks: list[Attack], grader: Grader, all_modes: bool = True) -> None:
    """Verdict, channels and time for every attack, under every mode unless it exhausts something;
    the pool stays healthy.
    """
    siblings = [fenced(f"{a.sibling}\n") for a in attacks if a.sibling]
    assert all(g.correct for g in grader.grade(siblings, [TRIPLE] * len(siblings)))
    rows = []
    for attack in attacks:
        some = [Mode.GT_ONLY] if attack.slow else [Mode.SENTINEL, Mode.FILE_MARKER]
        modes = some if attack.group == EXHAUSTION or not all_modes else list(Mode)
        rows += [(attack, mode) for mode in modes for _ in range(attack.runs)]
    codes = [fenced(f"{attack.code}\n# {i}\n") for i, (attack, _) in enumerate(rows)]  # none equal
    grades = grader.grade(codes, [under(mode, attack.setup) for attack, mode in rows])
    for (attack, mode), grade in zip(rows, grades):
        check_grade(attack, mode, grade, must_pay=all_modes and "patched" not in attack.name)
    healthy = grader.grade([RIGHT] * 4, [TRIPLE] * 4)
    assert all(grade.correct for grade in healthy), f"after {attacks[-1].group}: {healthy}"


def check_grade(attack: Attack, mode: Mode, grade: Grade, must_pay: bool) -> None:
    what = f"{attack.group}: {attack.name} under {mode}: {grade}"
    pays = mode in attack.pays
    forged = grade.correct or grade.verdict in (Verdict.CORRECT, Verdict.INFRA)
    assert not forged, f"forged verdict: {what}"
    assert pays or not grade.reward_hack, f"a channel that was not exploited fired: {what}"
    assert grade.seconds < 12, f"took too long: {what}"
    if pays and must_pay:
        assert grade.reward_hack, f"a disclosed channel was exploited and did not fire: {what}"


def leftovers(grader: Grader) -> dict[str, int]:
    """Processes below the workers, descriptors of this process and of the workers, entries in the
    scratch directories.
    """
    gc.collect()  # pipes of the controls
    tree = [worker.process.pid for worker in grader.sandbox._workers]
    for pid in tree:
        tree += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    descriptors, scratch = 0, [*Path(grader.sandbox._directory).glob("*/*")]
    for pid in [os.getpid(), *tree]:
        with contextlib.suppress(PermissionError):  # workers hide theirs from an ordinary user
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            scratch += Path("/proc", str(pid), "root", "scratch").glob("*")
    return {"processes": len(tree), "descriptors": descriptors, "files": len(scratch)}


def peak_mb(reset: bool = False) -> float:
    """The most resident memory of this process, in MB, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def check_controls() -> None:
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(naive, ATTACKS))
    blunt = [(a.group, a.name, a.bites, got) for a, got in zip(ATTACKS, outcomes) if got != a.bites]
    assert not blunt, f"controls: attacks that do not bite a naive grader as declared: {blunt}"
    assert naive(Attack("", "wrong", WRONG)) == "wrong"
    assert naive(Attack("", "right", TRIPLE.canonical)) == "correct"
    print(f"control: each of {len(ATTACKS)} attacks gets past a naive in-process grader")


def check_sandbox(without: frozenset[str] = frozenset(), workers: int = 2) -> None:
    """The attacks against the sandbox; where layers are switched off, those that need them are left
    out.
    """
    grader = Grader(workers, cpu_seconds=0.3, memory_mb=256)
    if without:
        grader.sandbox.close()
        grader.sandbox = Sandbox(workers, without=without)
    kept = {EQUALITY, FORGING, EXHAUSTION, TRAPS} if without else set(CLASSES)
    with grader:
        grader.grade([RIGHT] * workers, [TRIPLE] * workers)
        before, memory = leftovers(grader), peak_mb(reset=True)
        for group in CLASSES:
            attacks = [a for a in ATTACKS if a.group == group and group in kept]
            if without:
                attacks = [a for a in attacks if "attempt()" not in a.code or a.name in LIMITED]
            if attacks:
                start = time.perf_counter()
                check_attacks(attacks, grader, all_modes=not without)
                seconds = time.perf_counter() - start
                print(f"{group}: {len(attacks)} attacks, none forges or fires ({seconds:.1f} s)")
        after, grown = leftovers(grader), peak_mb() - memory
        assert after == before, f"left behind: {before} became {after}"
        assert grown <= 64, f"this process grew by {grown:.0f} MB"
        assert grader.sandbox.restarts == 0, f"{grader.sandbox.restarts} workers were lost"
        print(f"left behind: no process, descriptor or file; {grown:.0f} MB of at most 64")
    assert not os.path.exists(grader.sandbox._directory)
    assert not Path(f"{OUTSIDE}/result.txt").exists()


def refusal(**options: object) -> str:
    """Why a sandbox does not start; "" if it does."""
    try:
        with Sandbox(1, **options):
            return ""
    except UserError as error:
        return str(error)


def check_recovery() -> None:
    """A worker that dies is replaced and its job retried; twice is an error and never a grade;
    required layers are.
    """
    with Grader(1) as grader:
        os.killpg(grader.sandbox._workers[0].process.pid, signal.SIGKILL)
        assert grader.grade([RIGHT], [TRIPLE])[0].correct and grader.sandbox.restarts == 1
    assert "seccomp is unavailable" in refusal(level="require", without=frozenset({"seccomp"}))
    print("recovery: a killed worker is replaced; `require` refuses a missing layer")


BURNING = """
import time
class Solution:
    def triple(self, n):
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return 3 * n
"""


def check_honest() -> None:
    """Right solutions are correct though they use what a sandbox easily breaks, though an earlier
    call changed its arguments, and though the machine is busy.
    """
    case = replace(TRIPLE.cases[0], args="a = [1, 2]", expected="2")
    twice = replace(TRIPLE, entry_point="f", cases=(case, case))
    changing = "class Solution:\n    def f(self, a):\n        a.pop()\n        return len(a) + 1\n"
    rows = [(fenced(f"{code}\n"), TRIPLE) for code in HONEST.values()] + [(fenced(changing), twice)]
    with Grader(2) as grader:
        for (code, _), grade in zip(rows, grader.grade(*map(list, zip(*rows)))):
            assert grade.correct, (code, grade)
    with Grader(8, cpu_seconds=0.3) as grader:
        codes = [fenced(f"{BURNING}# {i}\n") for i in range(8)]
        grades = grader.grade(codes, [TRIPLE] * 8)
    assert all(grade.correct for grade in grades), grades
    print(f"honest: {len(rows)} right solutions correct, and 8 at once on a busy machine")


def check_library() -> None:
    """A library that confined processes cannot read is noticed at start-up."""
    readable, hidden = sandbox._readable()
    extensions = str(Path(importlib.import_module("_json").__file__).parent)
    with patch.object(sandbox, "_library", lambda: ["_json", "_bisect"]):
        with patch.object(sandbox, "_readable", lambda: (readable, [*hidden, extensions])):
            assert "cannot be imported" in refusal(), "SHOULD notice an unreadable library"
        assert not refusal(), "the library can be imported"
    print("library: one that confined processes cannot read is refused")


def make_outside() -> Path:
    """A folder and a secret outside the sandbox, for attacks to reach for."""
    folder = Path(OUTSIDE)
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    (folder / "secret.txt").write_text("PASS secret")
    (folder / "long.txt").write_text("long")
    os.environ["HF_TOKEN"] = "secret"
    return folder


def main() -> None:
    outside = make_outside()
    try:
        check_controls()
        (outside / "result.txt").unlink(missing_ok=True)
        check_sandbox()
        check_recovery()
        check_honest()
        check_library()
        for without in LAYERS_OFF if "--long" in sys.argv else ():
            print("without", ", ".join(sorted(without)))
            check_sandbox(frozenset(without))
    finally:
        shutil.rmtree(outside)


if __name__ == "__main__":
    main()
