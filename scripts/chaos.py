"""Kill a training run at random moments of every phase, resume it, and compare with an uninterrupted run: bit for bit.

Each arm is run once to the end, then again with kill -9 in sampling, grading, update, checkpoint and evaluation until the kills
are used up. The last adapter, metrics.jsonl, rollouts and record.json must be equal (wall times aside), and no process may stay.
Then: a full disk, a read-only disk, sandbox workers killed under way, a second process on the directory.
As root the disks are small tmpfs mounts in a mount namespace of their own; otherwise a file size limit stands in for the full one.

Run: python scripts/chaos.py [--kills 50] [--seed 0] [--arms routeV none2r …]
"""

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vgrout import records, train
from vgrout.cli import parse
from vgrout.config import ARMS
from vgrout.grader import Grader
from vgrout.records import load_adapter, load_metrics, load_record, load_rollouts
from vgrout.types import UserError

TINY = ("--steps 5 --num-prompts 3 --num-generations 5 --max-completion-length 64 --teacher-until 9 --final-draws 8 --save-every 2 "
        "--eval-every 2 --eval-draws 4 --refresh-every 3 --pair-modes run_tests --threads 1 --workers 1").split()  # fmt: skip
PHASES = {"collect": b"s", "grade": b"g", "update": b"u", "save": b"c", "evaluate": b"e"}  # name → its mark while it runs
TIMES = {"sec_refresh", "sec_sample", "sec_grade", "sec_score", "sec_update", "sec_step", "tokens_per_second"}
AMBIENT = {"started", "commit", "dirty", "config.run.out_dir"}  # of the record; the work tree may move on under a long check
PATIENCE = 600.0  # seconds for one process; the machine may be busy
libc = ctypes.CDLL(None, use_errno=True)


# ── a run in a forked process ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Trainer:
    """A run in a process of its own, forked from this one so that torch is imported once."""

    pid: int
    phase: mmap.mmap  # the mark of the phase that it is in, "-" between them
    log: Path
    status: int | None = None

    def wait(self, patience: float = PATIENCE) -> int:
        """The exit status, negative for a signal; TimeoutError, after a kill, if it does not end."""
        end = time.monotonic() + patience
        while not self.ended():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"a run did not end within {patience:.0f} s: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)
        return self.status

    def ended(self) -> bool:
        if self.status is None and (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(done[1])
        return self.status is not None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()


def start(
    out: Path, *flags: str, arm: str = "routeV", log: Path | None = None, within: Callable[[], object] = lambda: None
) -> Trainer:
    """Fork a run of the smoke preset into `out`; `within` is called in the child first. It ends as `python -m vgrout.train` does."""
    phase = mmap.mmap(-1, 1)
    phase[:1] = b"-"
    log = log or out.parent / f"{out.name}.log"
    sys.stdout.flush()
    if pid := os.fork():
        return Trainer(pid, phase, log)
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        _mark_phases(phase)
        within()
        code = _main(["smoke", "--intervention", arm, "--out-dir", str(out), *TINY, *flags])
    finally:
        sys.stdout.flush()
        os._exit(code)


def _main(argv: list[str]) -> int:
    """What the command line does with the same arguments; returns its exit status."""
    try:
        train.main(*parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except SystemExit as stop:
        return stop.code
    except KeyboardInterrupt:
        return 130
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def _mark_phases(phase: mmap.mmap) -> None:
    """Let the functions of the phases leave their mark in `phase` while they run."""

    def marked(function: Callable, mark: bytes) -> Callable:
        def wrapper(*args, **kwargs):
            before, phase[:1] = phase[:1], mark
            try:
                return function(*args, **kwargs)
            finally:
                phase[:1] = before

        return wrapper

    for name, mark in PHASES.items():
        owner = Grader if name == "grade" else train
        setattr(owner, name, marked(getattr(owner, name), mark))


# ── what must be equal, and what must be gone ────────────────────────────────────────────────────────────────────


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not have in common: adapter, metrics, rollouts, record; wall times and out_dir aside."""
    found = []
    x, y = load_adapter(a)[0], load_adapter(b)[0]
    if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x):
        found.append("adapter.safetensors")
    for name, load, times in (("metrics.jsonl", load_metrics, TIMES), ("rollouts.jsonl.gz", load_rollouts, {"seconds"})):
        rows = [[{k: v for k, v in row.items() if k not in times} for row in load(folder)] for folder in (a, b)]
        if rows[0] != rows[1]:
            odd = {k for p, q in zip(*rows) for k in p.keys() | q.keys() if p.get(k) != q.get(k)}
            found.append(f"{name} ({len(rows[0])} and {len(rows[1])} rows, {sorted(odd)[:5]})")
    one, two = (_timeless(folder) for folder in (a, b))
    return found + [f"record.json: {k}" for k in sorted(one.keys() | two.keys()) if one.get(k) != two.get(k)]


def _timeless(folder: Path) -> dict:
    record = records.flatten(json.loads((folder / "record.json").read_text()))
    argv = record.pop("argv")
    record["argv"] = [word for i, word in enumerate(argv) if "--out-dir" not in (word, argv[i - 1])]
    return {k: v for k, v in record.items() if k not in AMBIENT and not k.startswith("seconds.")}


def descendants(pid: int) -> set[int]:
    """All processes below one, by /proc."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return set(found[1:])


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    left = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                left.add(pid)
    return left


def orphans(pids: set[int], patience: float = 10.0) -> set[int]:
    """Those of `pids` that have not ended within `patience` seconds."""
    end = time.monotonic() + patience
    while (left := alive(pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def adopt_orphans() -> None:
    """Become the parent of what a killed trainer leaves behind, so that a zombie is reaped here (prctl(2), child subreaper)."""
    libc.prctl(36, 1, 0, 0, 0)


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


# ── kills ────────────────────────────────────────────────────────────────────────────────────────────────────────


def kill_in(trainer: Trainer, name: str, rng: random.Random, most: int = 4) -> bool:
    """Kill -9 at a random moment of a random occurrence of a phase. False if the run ended first."""
    mark, seen, target, inside = PHASES[name], 0, rng.randint(1, most), False
    while not trainer.ended():
        now = trainer.phase[:1] == mark
        seen, inside = seen + (now and not inside), now
        if now and seen >= target:
            time.sleep(rng.random() ** 3)  # seconds: mostly within the phase, sometimes in what follows it
            below = descendants(trainer.pid)
            if trainer.ended():
                return False
            trainer.kill()
            assert below, "the trainer had no sandbox worker: the check for orphans means nothing"
            assert not (left := orphans(below)), f"{len(left)} processes outlived a killed trainer: {left}"
            reap()
            return True
        time.sleep(0.001)
    return False


def go_on(out: Path, arm: str) -> Trainer:
    """Start a run, or continue the one that is there."""
    return start(out, *["--resume"] * (out / "record.json").exists(), arm=arm)


def kill_and_resume(root: Path, arm: str, reference: Path, rng: random.Random, kills: int) -> Counter:
    """One run with `kills` kills, then to its end; its files equal the reference's. Returns the phases that were hit."""
    out, hit = root / f"killed_{arm}_{rng.randrange(10**9)}", Counter()
    while sum(hit.values()) < kills:
        trainer = go_on(out, arm)
        name = rng.choice(list(PHASES))
        if not kill_in(trainer, name, rng):
            assert trainer.status == 0, trainer.log.read_text()[-3000:]
            break  # it ended first
        hit[name] += 1
        for load in (load_metrics, load_rollouts):
            load(out)  # readable at once, whatever the moment
    if not (out / "record.json").exists() or load_record(out).status != "finished":
        trainer = go_on(out, arm)
        assert trainer.wait() == 0, trainer.log.read_text()[-3000:]
    found = differences(reference, out)
    assert not found, f"{arm}, killed in {dict(hit)}: differs in {found}; see {out}"
    shutil.rmtree(out)
    return hit


def check_kills(root: Path, arms: list[str], kills: int, seed: int) -> None:
    rng, hit, done, began = random.Random(seed), Counter(), Counter(), time.monotonic()
    references: dict[str, Path] = {}
    each = max(1, kills // len(arms))  # kills of one run, so that every arm has its turn
    while sum(hit.values()) < kills:
        arm = arms[sum(done.values()) % len(arms)]
        if arm not in references:
            references[arm] = root / f"whole_{arm}"
            assert start(references[arm], arm=arm).wait() == 0, (root / f"whole_{arm}.log").read_text()[-3000:]
        new = kill_and_resume(root, arm, references[arm], rng, min(each, kills - sum(hit.values())))
        hit, done = hit + new, done + Counter({arm: 1})
        print(f"    {sum(hit.values())} kills, {time.monotonic() - began:.0f} s: {arm} {dict(new)}", flush=True)
    print(f"ok  {sum(hit.values())} of {kills} kills resumed to the bits of the uninterrupted run: {dict(hit)}, {len(done)} arms")


# ── disks, workers, a second process ─────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A tmpfs at `folder`; yields False where mounting is not permitted."""
    folder.mkdir()
    mounted = libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    try:
        yield mounted
    finally:
        if mounted:
            libc.umount2(bytes(folder), 2)  # MNT_DETACH


def remount(folder: Path, options: str, read_only: bool = False) -> None:
    assert libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 32 | read_only, options.encode()) == 0, f"cannot remount {folder}"


def small_files(size: int = 1_500_000) -> None:
    """Stands in for a full disk: no file of this process may grow beyond `size` bytes, which a checkpoint does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def check_full_disk(root: Path, reference: Path) -> None:
    with small_disk(root / "disk", "4m") as mounted:
        out = root / "disk" / "run"
        trainer = start(out, log=root / "full.log", within=(lambda: None) if mounted else small_files)
        assert trainer.wait() == 2, (trainer.status, trainer.log.read_text()[-3000:])
        status, answer = load_record(out).status, _last_line(trainer)
        assert status.startswith("failed: cannot write") and "add --resume" in status, status
        assert answer.startswith("error: cannot write"), answer
        if mounted:
            remount(root / "disk", "size=200m")
        assert start(out, "--resume").wait() == 0
        assert not differences(reference, out), differences(reference, out)
    print(f"ok  a full disk ({'4 MB tmpfs' if mounted else 'file size limit'}): one line, status failed, and --resume equals the whole run")


def _last_line(trainer: Trainer) -> str:
    return [line for line in trainer.log.read_text().splitlines() if line.strip()][-1]


def check_read_only(root: Path, reference: Path) -> None:
    with small_disk(root / "fixed", "200m") as mounted:
        if not mounted:
            print("--  a read-only disk was not tried: mounting needs root")
            return
        out = root / "fixed" / "run"
        trainer = start(out, log=root / "fixed.log")
        while not (out / "checkpoints" / "latest.json").exists() and not trainer.ended():
            time.sleep(0.05)
        trainer.kill()  # a disk with files open for writing does not turn read-only by mount(2)
        remount(root / "fixed", "size=200m", read_only=True)
        again = start(out, "--resume", log=root / "fixed.log")
        assert again.wait() == 2 and _last_line(again).startswith("error: cannot write"), again.log.read_text()[-2000:]
        remount(root / "fixed", "size=200m")
        assert start(out, "--resume").wait() == 0
        assert not differences(reference, out), differences(reference, out)
    print("ok  a read-only disk is refused in one line, and the run goes on once it is writable")


def check_workers(root: Path, reference: Path, rng: random.Random) -> None:
    """Kill sandbox workers during grading: they are replaced, the job is retried, the run is the same."""
    out, killed, inside = root / "workers", 0, False
    trainer = start(out)
    while not trainer.ended():
        now = trainer.phase[:1] == PHASES["grade"]
        if now and not inside:  # once each time: a job is retried once, and two kills of one job are a SandboxError by design
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(rng.choice(sorted(descendants(trainer.pid))), signal.SIGKILL)
                killed += 1
        inside = now
        time.sleep(0.0005)
    assert trainer.status == 0, trainer.log.read_text()[-3000:]
    assert killed >= 2 and not differences(reference, out), (killed, differences(reference, out))
    print(f"ok  {killed} sandbox processes killed under way: replaced, and the run equals the whole one")


def check_second(root: Path) -> None:
    out = root / "shared"
    first = start(out)
    while not (out / "record.json").exists() and not first.ended():
        time.sleep(0.02)
    second = start(out, "--resume")
    assert second.wait() == 2 and "another process is running" in second.log.read_text(), second.log.read_text()[-500:]
    assert not first.ended(), "the first process ended too early for this check to mean something"
    first.kill()
    reap()
    third = start(out, "--resume")
    assert third.wait() == 0, third.log.read_text()[-500:]
    print("ok  a second process on one --out-dir is refused; after a kill of the first the directory is free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adopt_orphans()
    root = Path(tempfile.mkdtemp(prefix="chaos_"))
    rng = random.Random(arguments.seed)
    check_kills(root, arguments.arms, arguments.kills, arguments.seed)
    reference = root / "whole_routeV"
    if not reference.exists():
        assert start(reference).wait() == 0
    for check in (check_full_disk, check_read_only):
        check(root, reference)
    check_workers(root, reference, rng)
    check_second(root)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
