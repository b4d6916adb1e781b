"""Kill training runs at random moments of every phase, resume, compare: equal to the bit.

Each arm is run once to its end, then again with kill -9 in sampling, grading, update, checkpoint
and evaluation. Then a full and a read-only disk, and sandbox workers killed under way. As root the
disks are small tmpfs mounts; otherwise a file size limit stands in for the full one.
verify_faults.py is the short form.

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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from scripts.verify import trainer
from scripts.verify.trainer import LIBC, PHASES, Trainer, differences, kill_in

from vgrout.arms import ARMS, FLAGS
from vgrout.run.records import load_metrics, load_record, load_rollouts

TINY = (
    "--steps 5 --num-prompts 3 --num-generations 5 --max-completion-length 64 --teacher-until 9 "
    "--final-draws 8 --save-every 2 --eval-every 2 --eval-draws 4 --threads 1 --workers 1"
).split()
UNMONITORED = [name for name, arm in ARMS.items() if arm.phases[-1].score not in FLAGS]
MOUNT, READ_ONLY, REMOUNT, DETACH = 0, 1, 32, 2  # flags of mount(2) and umount2(2)


def start(out: Path, **options) -> Trainer:
    return trainer.start(out, *TINY, **options)


def equals(reference: Path, out: Path) -> None:
    assert not (found := differences(reference, out)), f"{out} differs in {found}"


def check_kills(root: Path, arms: list[str], kills: int, rng: random.Random) -> None:
    """Every arm has its share of the kills."""
    hit: Counter[str] = Counter()
    for i, arm in enumerate(arms):
        whole, out = root / f"whole_{arm}", root / f"killed_{arm}"
        start(whole, arm=arm).ends(0)
        for _ in range(kills * i // len(arms), kills * (i + 1) // len(arms)):
            name = rng.choice([*PHASES])
            run = start(out, arm=arm)
            if not kill_in(run, name, rng, rng.randint(1, 4)):
                run.ends(0)
                break
            hit[name] += 1
            for load in (load_metrics, load_rollouts):
                load(out)  # readable at once, whatever the moment
        if not (out / "record.json").exists() or load_record(out).status != "finished":
            start(out, arm=arm).ends(0)
        equals(whole, out)
        shutil.rmtree(out)
        print(f"    {arm}: {hit.total()} kills so far, {dict(hit)}", flush=True)
    print(f"ok  {hit.total()} kills in {len(arms)} arms resumed to the bits of the whole run")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A tmpfs at `folder`; yields False where mounting is not permitted."""
    folder.mkdir()
    mounted = mount(folder, f"size={size}", MOUNT)
    try:
        yield mounted
    finally:
        if mounted:
            LIBC.umount2(bytes(folder), DETACH)


def mount(folder: Path, options: str, flags: int) -> bool:
    return LIBC.mount(b"tmpfs", bytes(folder), b"tmpfs", flags, options.encode()) == 0


def small_files(size: int = 1_500_000) -> None:
    """Stands in for a full disk: no file of this process may grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def check_full_disk(root: Path, reference: Path) -> None:
    with small_disk(root / "disk", "4m") as mounted:
        out = root / "disk" / "run"
        run = start(out, log=root / "full.log", within=(lambda: None) if mounted else small_files)
        assert run.ends(2).startswith("error: cannot write")
        status = load_record(out).status
        assert status.startswith("failed: cannot write") and "add --resume" in status, status
        if mounted:
            assert mount(root / "disk", "size=200m", REMOUNT)
        start(out).ends(0)
        equals(reference, out)
    print(f"ok  a full disk (tmpfs: {mounted}): one line, a true status, and it resumes exactly")


def check_read_only(root: Path, reference: Path) -> None:
    with small_disk(root / "fixed", "200m") as mounted:
        if not mounted:
            print("--  a read-only disk was not tried: mounting needs root")
            return
        out, log = root / "fixed" / "run", root / "fixed.log"
        run = start(out, log=log)
        run.wait_until((out / "checkpoints" / "latest.json").exists)
        run.kill()  # a disk with files open for writing does not turn read-only by mount(2)
        assert mount(root / "fixed", "size=200m", REMOUNT | READ_ONLY)
        assert start(out, log=log).ends(2).startswith("error: cannot write")
        assert mount(root / "fixed", "size=200m", REMOUNT)
        start(out).ends(0)
        equals(reference, out)
    print("ok  a read-only disk is refused in one line, and the run goes on once it is writable")


def check_workers(root: Path, reference: Path, rng: random.Random) -> None:
    """Sandbox workers killed once a grading are replaced, their job is repeated.

    Two kills of one job are a SandboxError by design.
    """
    run, killed = start(root / "workers"), 0
    while run.enters("grade"):
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(rng.choice(sorted(trainer.descendants(run.pid))), signal.SIGKILL)
            killed += 1
    run.ends(0)
    assert killed >= 2, killed
    equals(reference, root / "workers")
    print(f"ok  {killed} sandbox processes killed under way, and the run equals the whole one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="*", default=UNMONITORED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer.adopt_orphans()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="chaos_") as folder:
        root = Path(folder)
        check_kills(root, options.arms, options.kills, rng)
        reference = root / "whole_routeV"
        if not reference.exists():
            start(reference).ends(0)
        check_full_disk(root, reference)
        check_read_only(root, reference)
        check_workers(root, reference, rng)


if __name__ == "__main__":
    main()
