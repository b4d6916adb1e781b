"""Runs that take turns, a step at a time: A B C A B C …, so that all meet the same busy machine.

A child calls `wait_for_turn` at the end of every step, outside its timers; the parent lets one
child go on and waits until it is done. As a program it is one vGROUT run that does so:

    python scripts/analysis/bench_turns.py organism --intervention routeV …      (a child of
    scripts/analysis/bench.py)
"""

import os
import runpy
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU = struct.Struct("d")  # seconds


def wait_for_turn() -> None:
    """Tell the parent that a step is done, and the CPU time so far; wait until it says go on.

    Ends the run where the parent hangs up.
    """
    go, done = map(int, os.environ["BENCH_TURN"].split())
    os.write(done, CPU.pack(time.process_time()))
    if not os.read(go, 1):
        raise SystemExit(0)


class Child:
    """A run in a process of its own, at rest after its first step when the constructor returns."""

    def __init__(self, command: list[str], threads: int):
        (child_go, self._go), (self._done, child_done) = os.pipe(), os.pipe()
        self.command, self.log = command, tempfile.TemporaryFile("w+")
        turn = {"OMP_NUM_THREADS": str(threads), "BENCH_TURN": f"{child_go} {child_done}"}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | turn,
            stdout=self.log,
            stderr=self.log,
            stdin=subprocess.DEVNULL,
            pass_fds=(child_go, child_done),
        )
        os.close(child_go)
        os.close(child_done)
        self._wait()

    def step(self) -> float:
        """One step; returns the CPU seconds of the process, its sandbox left out."""
        before = self._cpu
        os.write(self._go, b".")
        self._wait()
        return self._cpu - before

    def _wait(self) -> None:
        if not (message := os.read(self._done, CPU.size)):
            self.log.seek(0)
            command = " ".join(self.command)
            raise RuntimeError(f"{command} ended before its time:\n{self.log.read()[-3000:]}")
        (self._cpu,) = CPU.unpack(message)

    def end(self) -> float:
        """Hang up and wait for the end; returns the peak resident size in GiB."""
        os.close(self._go)
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        os.close(self._done)
        self.log.close()
        return usage.ru_maxrss / 2**20


def take_turns(
    commands: dict[str, list[str]], rounds: int, threads: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Every run's first step, one run after the other, then `rounds` rounds of one step each.

    Returns each run's peak resident size in GiB, and its CPU seconds by round.
    """
    children: dict[str, Child] = {}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    try:
        for name, command in commands.items():
            children[name] = Child(command, threads)
        for _ in range(rounds):
            for name, child in children.items():
                cpu[name].append(child.step())
    finally:
        resident = {name: child.end() for name, child in children.items()}
    return resident, cpu


if __name__ == "__main__":
    from vgrout.run import tracking

    tracking.tracker = lambda *_: lambda row: wait_for_turn()  # called when a row is complete
    runpy.run_module("vgrout.train", run_name="__main__", alter_sys=True)
