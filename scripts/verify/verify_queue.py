"""The real model's wave, and its queue on pueue (against a recording shim).

Run: python -m scripts.verify.verify_queue
"""

import argparse
import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

from scripts.experiments import run, waves
from scripts.experiments.waves import Job

from vgrout.config import PRESETS
from vgrout.core import UserError

ARMS = "none2r no_loophole routeV placebo absorb routeQ absorbQ no_gateQ".split()
SHIM = f"""#!{sys.executable}
import json, os, sys
log = os.environ["SHIM_LOG"]
open(log, "a").write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(len(open(log).readlines()) > int(os.environ["SHIM_FAILS_AFTER"]))
"""


def check_wave(tmp: Path) -> None:
    """Eight arms on Qwen3-4B, with demonstrations where there is a pool, and without."""
    assert PRESETS["full"].model.model == "Qwen/Qwen3-4B", "the decision run is on Qwen3-4B"
    pool = tmp / waves.POOL
    with patch.object(waves, "ROOT", tmp):
        alone = {job.row.name for job in jobs("real")}
        pool.parent.mkdir(parents=True)
        pool.touch()
        every = jobs("real")
    assert alone == {f"{arm}_alone" for arm in ARMS} and len(every) == 48
    for job in every:
        assert (waves.POOL in job.options) != (job.row.name in alone)
        assert job.row.why and job.row.resolve
        try:  # training's own parser: it may miss the data, and nothing else
            waves.check([job])
        except UserError as error:
            assert "no file 'data/leetcode" in str(error), error
    print("ok ", check_wave.__doc__)


def jobs(*words: str) -> list[Job]:
    parser = argparse.ArgumentParser()
    waves.add_arguments(parser)
    return waves.jobs_of(parser.parse_args(words))


def queue(*words: str, log: Path, path: Path | str = "", fails_after: int = 99) -> str:
    """What `run.py … --on pueue` says, with `path` as the search path."""
    settings = {"PATH": str(path), "SHIM_LOG": str(log), "SHIM_FAILS_AFTER": str(fails_after)}
    argv, said = ["run.py", *words, "--on", "pueue"], io.StringIO()
    with patch.dict(os.environ, settings), patch.object(sys, "argv", argv), redirect_stdout(said):
        try:
            run.main()
        except UserError as error:
            print("refused:", error)
    return said.getvalue()


def check_queue(tmp: Path) -> None:
    shim, log = tmp / "bin" / "pueue", tmp / "log"
    shim.parent.mkdir()
    shim.write_text(SHIM)
    shim.chmod(0o755)
    here = {"path": shim.parent, "log": log}
    wave = ("01_label_free", "--only", "none2r", "no_loophole", "--seeds", "41", "42")
    said = queue(*wave, **here)
    calls = [json.loads(line) for line in lines(log)]
    assert len(calls) == 4 and "pueue follow" in said, said
    assert all(call[0] == "add" and "" in call and "--resume" == call[-1] for call in calls)
    log.unlink()
    said = queue("real", "--dry-run", log=log)
    assert said.count("pueue add") == len(jobs("real")) >= 24
    assert "why: " in said and "resolve: " in said
    assert "refused: pueue is not installed" in queue(*wave, log=log)
    said = queue(*wave, "--flags", "--steps 0", **here)
    assert said.startswith("refused: ") and "--steps" in said, said
    assert not log.exists(), "a dry run, or a refused row, queued something"
    assert "after 2 jobs" in queue(*wave, **here, fails_after=2)
    assert len(lines(log)) == 3, "the queue goes on behind a job that pueue refused"
    print("ok  pueue gets every job whole; no pueue, a refused job and a dry run queue nothing")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def main() -> None:
    for check in (check_wave, check_queue):
        with tempfile.TemporaryDirectory() as tmp:
            check(Path(tmp))


if __name__ == "__main__":
    main()
