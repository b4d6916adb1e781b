"""A long run of small organism steps, watched from outside: memory and descriptors stay flat, and no zombie is left.

Memory is the resident size of the training process. From step 50 on it may grow by 50 MB over the run (median of ten samples at
either end, so that one large batch decides nothing); open descriptors may not grow at all, nor may a dead child stay unreaped.

Run: python scripts/verify/soak_train.py [--steps 500] [--intervention routeV]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import trainer as trainers

SMALL = ("--num-prompts 3 --num-generations 6 --max-completion-length 96 --final-draws 24 --eval-every 50 --eval-draws 12 --save-every 25 "
         "--refresh-every 10 --threads 1 --workers 2").split()  # fmt: skip
WARM, GROWTH_MB, ENDS = 50, 50.0, 10


def sample(pid: int) -> dict[str, float]:
    """Resident MB, open descriptors and dead children of a process and all below it (descriptors and MB: of itself)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    family = {pid, *trainers.descendants(pid)}
    dead = {p for p in family - trainers.alive(family) if Path(f"/proc/{p}/stat").exists()}
    return {
        "mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "dead": dead,
    }


def watch(trainer: trainers.Trainer, metrics: Path) -> tuple[list[dict], set[int]]:
    """One sample for each step from WARM on, and the children that were dead at two samples in a row."""
    samples, zombies, last, step = [], set(), set(), 0
    while not trainer.ended():
        time.sleep(0.05)
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if lines == step:
            continue
        step = lines
        try:
            seen = sample(trainer.pid)
        except (FileNotFoundError, ProcessLookupError):
            break  # it has just ended
        if seen["mb"] and step >= WARM:
            samples.append({"step": step, **seen})
        zombies |= last & seen["dead"]
        last = seen["dead"]
        if step % 50 == 0:
            print(
                f"    step {step}: {seen['mb']:.0f} MB, {seen['descriptors']} descriptors",
                flush=True,
            )
    return samples, zombies


def growth(samples: list[dict], key: str) -> float:
    """Median of the last samples minus that of the first."""
    ends = [statistics.median(s[key] for s in part) for part in (samples[:ENDS], samples[-ENDS:])]
    return ends[1] - ends[0]


def faults(samples: list[dict], zombies: set[int]) -> list[str]:
    found = [f"memory grew by {mb:.1f} MB"] if (mb := growth(samples, "mb")) > GROWTH_MB else []
    found += [f"{n:g} more descriptors"] if (n := growth(samples, "descriptors")) > 0 else []
    return found + [f"{len(zombies)} zombies"] * bool(zombies)


def check_the_check() -> None:
    flat = [{"mb": 400.0, "descriptors": 20}] * 40
    leak = [{"mb": 400.0 + 2 * i, "descriptors": 20 + i // 10} for i in range(40)]
    assert not faults(flat, set()) and len(faults(leak, {1})) == 3, "the check cannot see a leak"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--intervention", default="routeV")
    arguments = parser.parse_args()
    assert arguments.steps >= WARM + 2 * ENDS, f"--steps must be at least {WARM + 2 * ENDS}"
    torch.set_num_threads(1)
    check_the_check()
    root, began = Path(tempfile.mkdtemp(prefix="soak_")), time.monotonic()
    trainer = trainers.start(
        root / "run", *SMALL, "--steps", str(arguments.steps), arm=arguments.intervention
    )
    samples, zombies = watch(trainer, root / "run" / "metrics.jsonl")
    assert trainer.wait() == 0, trainer.log.read_text()[-3000:]
    found = faults(samples, zombies)
    assert len(samples) > 2 * ENDS and not found, (len(samples), found)
    print(
        f"ok  {arguments.steps} steps of {arguments.intervention} in {time.monotonic() - began:.0f} s; since step {WARM} "
        f"{growth(samples, 'mb'):+.1f} MB and {growth(samples, 'descriptors'):+g} descriptors; {samples[-1]['mb']:.0f} MB, no zombie"
    )
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
