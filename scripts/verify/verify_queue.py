"""The decision run's manifest, the pueue queue (against a recording shim) and, with --long, the Ray pool on a real two-node cluster
of which one node is killed while it works (needs the extra ray).

    uv run python scripts/verify/verify_queue.py [--long]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from scripts.experiments import pool_ray
from scripts.experiments.manifest import ROOT, WHY, TrainJob, check, decision
from scripts.experiments.queue_decision import command

from vgrout.config import ARMS, PRESETS
from vgrout.core import UserError

SHIM = f"""#!{sys.executable}
import json, os, sys
log = os.environ["SHIM_LOG"]
open(log, "a").write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(len(open(log).readlines()) > int(os.environ["SHIM_FAILS_AFTER"]))
"""
WORK = """
import json, os, sys, time
from pathlib import Path
out = Path(sys.argv[1]); saved = out / "saved"
done = int(saved.read_text()) if saved.exists() else 0
with open(out / "starts", "a") as f: f.write(f"{done}\\n")
for i in range(done, 40):
    time.sleep(0.1)
    with open(out / "ticks", "a") as f: f.write(f"{os.getpid()}\\n")
    saved.write_text(str(i + 1))
(out / "record.json").write_text(json.dumps({"status": "finished"}))
"""


def refused(jobs: list[TrainJob], word: str) -> None:
    try:
        check(jobs)
    except UserError as error:
        assert word in str(error), error
    else:
        raise AssertionError(f"accepted, SHOULD be refused for {word!r}")


def check_manifest() -> None:
    jobs = decision(list(WHY), [51, 52])
    assert {"routeV", "placebo", "none", "absorb", "routeL"} == set(WHY) <= ARMS.keys()
    assert PRESETS["full"].model.model == "Qwen/Qwen3-4B", "the decision run is on Qwen3-4B"
    assert (
        len(jobs) == 10
        and len({j.out_dir for j in jobs}) == 10
        and len({j.label for j in jobs}) == 5
    )
    assert all(
        j.label.startswith("why: ") and " resolve: " in j.label and "--resume" in j.argv
        for j in jobs
    )
    assert {j.argv[j.argv.index("--seed") + 1] for j in jobs[:5]} == {"51"}, (
        "a first comparison of all arms comes first"
    )
    small = decision(list(WHY), [51], "organism", ("--steps", "3"))
    check(small)
    refused([*small, replace(small[0], argv=(*small[0].argv, "--top-p", "7"))], "--top-p")
    refused([replace(small[0], argv=(*small[0].argv[:-1], "--data", "no.jsonl"))], "no.jsonl")
    try:
        decision(["zap"], [51])
        raise AssertionError("an unknown arm was accepted")
    except UserError as error:
        assert "zap" in str(error)
    print(
        "ok  the manifest: five arms on Qwen3-4B, a directory each, why and resolve; what training refuses is not queued"
    )


def queue(*flags: str, path: str, log: Path, fails_after: int = 99) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PATH": path,
        "SHIM_LOG": str(log),
        "SHIM_FAILS_AFTER": str(fails_after),
    }
    script = [
        sys.executable,
        str(ROOT / "scripts/experiments/queue_decision.py"),
        "--preset",
        "organism",
        *flags,
    ]
    return subprocess.run(script, capture_output=True, text=True, env=environment, cwd=ROOT)


def check_queue(tmp: Path) -> None:
    shim, log = tmp / "bin" / "pueue", tmp / "log"
    shim.parent.mkdir()
    shim.write_text(SHIM)
    shim.chmod(0o755)
    done = queue("--seeds", "51", "--group", "gpu", path=str(shim.parent), log=log)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    want = [command(job, "gpu")[1:] for job in decision(list(WHY), [51], "organism")]
    assert done.returncode == 0 and calls == want, (
        f"pueue was given {calls}, SHOULD be {want}: {done.stderr}"
    )
    log.unlink()
    done = queue("--dry-run", path="", log=log)
    assert done.returncode == 0 and not log.exists() and done.stdout.count("pueue add") == 15, (
        "a dry run queued something"
    )
    done = queue(path="", log=log)
    assert (
        done.returncode == 2 and "not installed" in done.stderr and done.stderr.count("\n") == 1
    ), done.stderr
    done = queue("--flags", "--steps 0", path=str(shim.parent), log=log)
    assert done.returncode == 2 and "--steps" in done.stderr and not log.exists(), (
        "jobs were queued that training would refuse"
    )
    done = queue(path=str(shim.parent), log=log, fails_after=2)
    assert (
        done.returncode == 2
        and "after 2 jobs" in done.stderr
        and len(log.read_text().splitlines()) == 3
    )
    print(
        "ok  pueue gets every job whole, label included; no pueue, a refused job and a dry run queue nothing"
    )


def started(folders: list[Path], ticks: int) -> bool:
    return all(
        (f / "ticks").exists() and len((f / "ticks").read_text().splitlines()) >= ticks
        for f in folders
    )


def lose_a_node(tmp: Path, retries: int) -> tuple[dict, list[Path]]:
    """Two jobs on two nodes of one GPU each; the second node is killed while both work. A third job fails by itself."""
    import threading

    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    second = cluster.add_node(num_cpus=1, num_gpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        cluster.wait_for_nodes()
        argv = (sys.executable, "-c", WORK)
        jobs = [TrainJob(name, (*argv, str(tmp / name)), name, "", "") for name in ("a", "b")]
        broken = "open(sys.argv[1] + '/starts', 'a').write('x\\n'); sys.exit(3)"
        jobs.append(
            TrainJob(
                "c", (sys.executable, "-c", f"import sys; {broken}", str(tmp / "c")), "c", "", ""
            )
        )
        folders, result = [tmp / job.name for job in jobs], {}
        thread = threading.Thread(target=lambda: result.update(pool_ray.run(jobs, tmp, 1, retries)))
        thread.start()
        limit = time.monotonic() + 120
        while not started(folders[:2], 5):
            assert time.monotonic() < limit, "the two jobs never ran at once"
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        thread.join(180)
        assert not thread.is_alive(), "the pool hangs after the loss of a node"
        return result, folders
    finally:
        ray.shutdown()
        cluster.shutdown()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def check_ray() -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with tempfile.TemporaryDirectory() as name:
        result, folders = lose_a_node(Path(name), retries=2)
        assert result == {"a": 0, "b": 0, "c": 3}, result
        starts = [lines(f / "starts") for f in folders]
        assert sorted(map(len, starts)) == [1, 1, 2], (
            f"one job, and only that one, is started again: {starts}"
        )
        lost = next(f for f, s in zip(folders, starts) if len(s) == 2)
        assert int(lines(lost / "starts")[1]) >= 5, (
            "the second start did not continue from what was saved"
        )
        owners = lines(lost / "ticks")
        assert len(owners) == 40 and owners == sorted(owners, key=owners.index), (
            "an orphan of the lost node went on writing"
        )
        print(
            "ok  Ray: a node dies, its run continues elsewhere from what was saved, none is lost; a failing run is not repeated"
        )
    with tempfile.TemporaryDirectory() as name:
        result, _ = lose_a_node(Path(name), retries=0)
        assert sorted(type(status).__name__ for status in result.values()) == [
            "int",
            "int",
            "str",
        ], result
        print("ok  Ray: without retries the lost run is reported as lost")


def main() -> None:
    check_manifest()
    with tempfile.TemporaryDirectory() as tmp:
        check_queue(Path(tmp))
    if "--long" in sys.argv:
        if find_spec("ray") is None:
            print("not checked: the Ray pool (uv sync --extra ray)")
        else:
            check_ray()


if __name__ == "__main__":
    main()
