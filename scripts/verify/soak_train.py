"""A long run of small steps, watched from outside: memory and descriptors stay flat, no zombies.

From step 50 on the training process may grow by 50 MB (medians of ten samples at either end, so
that one large batch decides nothing); open descriptors may not grow, nor may a dead child stay.

Run: python scripts/verify/soak_train.py [--steps 500] [--intervention routeV]
"""

import argparse
import contextlib
import os
import statistics
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from scripts.verify import trainer

from vgrout.core import at_least

SMALL = (
    "--num-prompts 3 --num-generations 6 --max-completion-length 96 --final-draws 24 "
    "--eval-every 50 --eval-draws 12 --save-every 25 --threads 1"
).split()
WARM = 50  # steps before the first sample
GROWTH_MB = 50.0
ENDS = 10  # samples at either end


@dataclass
class Watch:
    """One sample a step from WARM on; children that were dead at two samples in a row."""

    mb: list[float] = field(default_factory=list)
    descriptors: list[float] = field(default_factory=list)
    zombies: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)

    def sample(self, pid: int) -> None:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        self.mb.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.descriptors.append(len(os.listdir(f"/proc/{pid}/fd")))
        family = trainer.descendants(pid)
        dead = {p for p in family - trainer.alive(family) if Path(f"/proc/{p}/stat").exists()}
        self.zombies |= self.dead & dead
        self.dead = dead

    def faults(self) -> list[str]:
        memory, descriptors = growth(self.mb), growth(self.descriptors)
        faults = {
            f"memory grew by {memory:.1f} MB": memory > GROWTH_MB,
            f"{descriptors:g} more descriptors": descriptors > 0,
            f"{len(self.zombies)} zombies": self.zombies,
        }
        return [fault for fault, found in faults.items() if found]


def longer(file: Path, lines: int) -> bool:
    return file.exists() and file.read_bytes().count(b"\n") > lines


def growth(values: list[float]) -> float:
    """Median of the last samples minus that of the first."""
    start = statistics.median(values[:ENDS])
    return statistics.median(values[-ENDS:]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least(WARM + 2 * ENDS), default=500)
    parser.add_argument("--intervention", default="routeV")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rising = [400.0 + 2 * i for i in range(40)]
    assert not Watch([400.0] * 40, [20.0] * 40).faults(), "a flat run has faults"
    assert len(Watch(rising, rising, zombies={1}).faults()) == 3, "the check cannot see a leak"
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        steps = ("--steps", str(options.steps))
        run = trainer.start(metrics.parent, *SMALL, *steps, arm=options.intervention)
        for step in range(WARM, options.steps):
            if run.wait_until(partial(longer, metrics, step), pause=0.05):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    watch.sample(run.pid)
        run.ends(0)
    assert len(watch.mb) > 2 * ENDS and not watch.faults(), (len(watch.mb), watch.faults())
    grown = f"{growth(watch.mb):+.1f} MB and {growth(watch.descriptors):+g} descriptors"
    print(f"ok  {options.steps} steps of {options.intervention}: {grown} since step {WARM}")


if __name__ == "__main__":
    main()
