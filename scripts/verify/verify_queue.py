"""The real model's wave, its queue on pueue (against a recording shim) and, with --long, Ray on a
two-node cluster of which one node is killed while it works (needs the extra ray).

Run: python -m scripts.verify.verify_queue [--long]
"""

import argparse
import io
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from scripts.experiments import ray_pool, run, waves
from scripts.experiments.waves import Job, Row

from vgrout.config import PRESETS
from vgrout.core import UserError

ARMS = "none2r no_loophole routeV placebo absorb routeQ absorbQ no_gateQ".split()
SHIM = f"""#!{sys.executable}
import json, os, sys
log = os.environ["SHIM_LOG"]
open(log, "a").write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(len(open(log).readlines()) > int(os.environ["SHIM_FAILS_AFTER"]))
"""
WORK = """
import json, os, sys, time
from pathlib import Path
out = Path(sys.argv[2]); saved = out / "saved"
done = int(saved.read_text()) if saved.exists() else 0
with open(out / "starts", "a") as f: f.write(f"{done}\\n")
for i in range(done, 40):
    time.sleep(0.1)
    with open(out / "ticks", "a") as f: f.write(f"{os.getpid()}\\n")
    saved.write_text(str(i + 1))
(out / "record.json").write_text(json.dumps({"status": "finished"}))
"""
BROKEN = "import sys; open(sys.argv[2] + '/starts', 'a').write('x\\n'); sys.exit(3)"


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


def started(folders: list[Path], ticks: int) -> bool:
    return all((f / "ticks").exists() and len(lines(f / "ticks")) >= ticks for f in folders)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def lose_a_node(tmp: Path, retries: int) -> tuple[dict, list[Path]]:
    """Two jobs on two nodes of one GPU each; the second node is killed while both work. A third
    job fails by itself."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    second = cluster.add_node(num_cpus=1, num_gpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        cluster.wait_for_nodes()
        made, result = [], {}
        for name, code in (("a", WORK), ("b", WORK), ("c", BROKEN)):
            program = (sys.executable, "-c", code)
            made.append(Job(Row(name, name), 1, (), tmp / name, program=program))
        folders = [job.out_dir for job in made]
        pool = threading.Thread(target=lambda: result.update(ray_pool.run(made, 1, retries)))
        pool.start()
        limit = time.monotonic() + 120
        while not started(folders[:2], 5):
            assert time.monotonic() < limit, "the two jobs never ran at once"
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        pool.join(180)
        assert not pool.is_alive(), "the pool hangs after the loss of a node"
        return result, folders
    finally:
        ray.shutdown()
        cluster.shutdown()


def check_ray() -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with tempfile.TemporaryDirectory() as name:
        result, folders = lose_a_node(Path(name), retries=2)
        assert result == {"a_s1": 0, "b_s1": 0, "c_s1": 3}, result
        starts = [lines(folder / "starts") for folder in folders]
        assert sorted(map(len, starts)) == [1, 1, 2], f"one job alone is started again: {starts}"
        lost = next(f for f, s in zip(folders, starts, strict=True) if len(s) == 2)
        assert int(lines(lost / "starts")[1]) >= 5, "the second start began anew"
        owners = lines(lost / "ticks")
        in_turn = sorted(owners, key=owners.index)
        assert len(owners) == 40 and owners == in_turn, "an orphan of the lost node went on writing"
        print("ok  Ray: a node dies, its run goes on elsewhere; a failing run is not repeated")
    with tempfile.TemporaryDirectory() as name:
        result, _ = lose_a_node(Path(name), retries=0)
        kinds = sorted(type(status).__name__ for status in result.values())
        assert kinds == ["int", "int", "str"], result
        print("ok  Ray: without retries the lost run is reported as lost")


def main() -> None:
    for check in (check_wave, check_queue):
        with tempfile.TemporaryDirectory() as tmp:
            check(Path(tmp))
    if "--long" in sys.argv and find_spec("ray") is None:
        print("not checked: the Ray pool (uv sync --extra ray)")
    elif "--long" in sys.argv:
        check_ray()


if __name__ == "__main__":
    main()
