"""Kill a training run at random moments of every phase, resume it, and compare with an uninterrupted run: bit for bit.

Each arm is run once to the end, then again with kill -9 in sampling, grading, update, checkpoint and evaluation until the kills
are used up. The last adapter, metrics.jsonl, rollouts and record.json must be equal (wall times aside), and no process may stay.
Then: a full disk, a read-only disk, sandbox workers killed under way, a second process on the directory.
As root the disks are small tmpfs mounts in a mount namespace of their own; otherwise a file size limit stands in for the full one.

Run: python scripts/verify/chaos.py [--kills 50] [--seed 0] [--arms routeV none2r …]
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from scripts.verify import trainer
from scripts.verify.trainer import LIBC, PHASES, Trainer, differences, kill_in

from vgrout.config import ARMS
from vgrout.run.records import load_metrics, load_record, load_rollouts

TINY = ("--steps 5 --num-prompts 3 --num-generations 5 --max-completion-length 64 --teacher-until 9 --final-draws 8 --save-every 2 "
        "--eval-every 2 --eval-draws 4 --refresh-every 3 --pair-modes run_tests --threads 1 --workers 1").split()  # fmt: skip


def start(out: Path, *flags: str, **options) -> Trainer:
    return trainer.start(out, *TINY, *flags, **options)


def go_on(out: Path, arm: str) -> Trainer:
    """Start a run, or continue the one that is there."""
    return start(out, *["--resume"] * (out / "record.json").exists(), arm=arm)


def kill_and_resume(
    root: Path, arm: str, reference: Path, rng: random.Random, kills: int
) -> Counter:
    """One run with `kills` kills, then to its end; its files equal the reference's. Returns the phases that were hit."""
    out, hit = root / f"killed_{arm}_{rng.randrange(10**9)}", Counter()
    while sum(hit.values()) < kills:
        run = go_on(out, arm)
        name = rng.choice(list(PHASES))
        if not kill_in(run, name, rng, rng.randint(1, 4)):
            assert run.status == 0, run.log.read_text()[-3000:]
            break  # it ended first
        hit[name] += 1
        for load in (load_metrics, load_rollouts):
            load(out)  # readable at once, whatever the moment
    if not (out / "record.json").exists() or load_record(out).status != "finished":
        run = go_on(out, arm)
        assert run.wait() == 0, run.log.read_text()[-3000:]
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
            assert start(references[arm], arm=arm).wait() == 0, (
                root / f"whole_{arm}.log"
            ).read_text()[-3000:]
        new = kill_and_resume(root, arm, references[arm], rng, min(each, kills - sum(hit.values())))
        hit, done = hit + new, done + Counter({arm: 1})
        print(
            f"    {sum(hit.values())} kills, {time.monotonic() - began:.0f} s: {arm} {dict(new)}",
            flush=True,
        )
    print(
        f"ok  {sum(hit.values())} of {kills} kills resumed to the bits of the uninterrupted run: {dict(hit)}, {len(done)} arms"
    )


# ── disks, workers, a second process ─────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A tmpfs at `folder`; yields False where mounting is not permitted."""
    folder.mkdir()
    mounted = LIBC.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    try:
        yield mounted
    finally:
        if mounted:
            LIBC.umount2(bytes(folder), 2)  # MNT_DETACH


def remount(folder: Path, options: str, read_only: bool = False) -> None:
    assert LIBC.mount(b"tmpfs", bytes(folder), b"tmpfs", 32 | read_only, options.encode()) == 0, (
        f"cannot remount {folder}"
    )


def small_files(size: int = 1_500_000) -> None:
    """Stands in for a full disk: no file of this process may grow beyond `size` bytes, which a checkpoint does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def check_full_disk(root: Path, reference: Path) -> None:
    with small_disk(root / "disk", "4m") as mounted:
        out = root / "disk" / "run"
        run = start(out, log=root / "full.log", within=(lambda: None) if mounted else small_files)
        assert run.wait() == 2, (run.status, run.log.read_text()[-3000:])
        status, answer = load_record(out).status, _last_line(run)
        assert status.startswith("failed: cannot write") and "add --resume" in status, status
        assert answer.startswith("error: cannot write"), answer
        if mounted:
            remount(root / "disk", "size=200m")
        assert start(out, "--resume").wait() == 0
        assert not differences(reference, out), differences(reference, out)
    print(
        f"ok  a full disk ({'4 MB tmpfs' if mounted else 'file size limit'}): one line, status failed, and --resume equals the whole run"
    )


def _last_line(run: Trainer) -> str:
    return [line for line in run.log.read_text().splitlines() if line.strip()][-1]


def check_read_only(root: Path, reference: Path) -> None:
    with small_disk(root / "fixed", "200m") as mounted:
        if not mounted:
            print("--  a read-only disk was not tried: mounting needs root")
            return
        out = root / "fixed" / "run"
        run = start(out, log=root / "fixed.log")
        while not (out / "checkpoints" / "latest.json").exists() and not run.ended():
            time.sleep(0.05)
        run.kill()  # a disk with files open for writing does not turn read-only by mount(2)
        remount(root / "fixed", "size=200m", read_only=True)
        again = start(out, "--resume", log=root / "fixed.log")
        assert again.wait() == 2 and _last_line(again).startswith("error: cannot write"), (
            again.log.read_text()[-2000:]
        )
        remount(root / "fixed", "size=200m")
        assert start(out, "--resume").wait() == 0
        assert not differences(reference, out), differences(reference, out)
    print("ok  a read-only disk is refused in one line, and the run goes on once it is writable")


def check_workers(root: Path, reference: Path, rng: random.Random) -> None:
    """Kill sandbox workers during grading: they are replaced, the job is retried, the run is the same."""
    out, killed, inside = root / "workers", 0, False
    run = start(out)
    while not run.ended():
        now = run.phase[:1] == PHASES["grade"]
        if (
            now and not inside
        ):  # once each time: a job is retried once, and two kills of one job are a SandboxError by design
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(rng.choice(sorted(trainer.descendants(run.pid))), signal.SIGKILL)
                killed += 1
        inside = now
        time.sleep(0.0002)
    assert run.status == 0, run.log.read_text()[-3000:]
    assert killed >= 2 and not differences(reference, out), (killed, differences(reference, out))
    print(
        f"ok  {killed} sandbox processes killed under way: replaced, and the run equals the whole one"
    )


def check_second(root: Path) -> None:
    out = root / "shared"
    first = start(out)
    while not (out / "record.json").exists() and not first.ended():
        time.sleep(0.02)
    second = start(out, "--resume")
    assert second.wait() == 2 and "another process is running" in second.log.read_text(), (
        second.log.read_text()[-500:]
    )
    assert not first.ended(), "the first process ended too early for this check to mean something"
    first.kill()
    trainer.reap()
    third = start(out, "--resume")
    assert third.wait() == 0, third.log.read_text()[-500:]
    print(
        "ok  a second process on one --out-dir is refused; after a kill of the first the directory is free"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--arms", nargs="*", default=[name for name, arm in ARMS.items() if not arm.monitor]
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trainer.adopt_orphans()
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
