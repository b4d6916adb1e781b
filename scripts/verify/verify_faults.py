"""Faults in short: kills, signals, a full disk, full memory, divergence, secrets.

All runs are of one tiny configuration in forked processes, and equal the whole one to the bit
wherever they were resumed.

Run: python scripts/verify/verify_faults.py [--long]     (--long: every arm killed in every phase at
random moments, and sandbox workers killed under way)
"""

import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from scripts.verify import trainer

from vgrout import arms, experiment, train
from vgrout.cli import parse
from vgrout.config import with_options
from vgrout.core import NO_ZONE, Problem, RunRecord, UserError, Zone
from vgrout.env.exploits import canonical_hack
from vgrout.experiment import Experiment, load_splits
from vgrout.files import load_tensors, read_json_lines
from vgrout.gate.gate import Gate
from vgrout.gate.monitors.judge import Endpoint
from vgrout.gate.monitors.scores import Judge
from vgrout.grader import Grader, sandbox
from vgrout.grader.sandbox import Job, Sandbox, SandboxError
from vgrout.model.optimizer import BlockOptimizer
from vgrout.run import dry_run
from vgrout.run.faults import Stopped, describe, explained, recorded
from vgrout.run.health import Diverged
from vgrout.run.records import (
    Run,
    _differences,
    load_adapter,
    load_metrics,
    load_record,
    load_rollouts,
)

STEPS = 3
DATA = parse(["smoke"])[1].data.data
SPLITS, FEW = ("train", "val", "test"), 8  # problems of each
SHORT = (
    f"--num-prompts 3 --steps {STEPS} --num-generations 4 --max-completion-length 128 "
    "--teacher-until 9 --final-draws 64 --token-budget 2048 --save-every 1 --threads 1 --workers 1"
).split()
LONG = "--steps 5 --save-every 2 --eval-every 2 --eval-draws 4 --final-draws 8".split()
UNMONITORED = [name for name, arm in arms.ARMS.items() if arm.phases[-1].score not in arms.FLAGS]
TOKEN = "hf_" + "plantedsecret" * 2
SPY = """import os
print(os.environ)
try:
    for p in 'self', os.getppid():
        print(open(f'/proc/{p}/environ').read())
except Exception:
    pass
"""
ENVIRONMENT = """import os
class Solution:
    def f(self):
        return sorted(f'{k}={v}' for k, v in os.environ.items())
"""


def nothing() -> None:
    pass


def start(out: Path, within: Callable[[], object] = nothing, *flags: str, **options):
    """A run with a token in its environment and demonstrations that print theirs."""

    def prepare() -> None:
        os.environ["HF_TOKEN"] = TOKEN
        within()

    return trainer.start(out, *SHORT, *inputs(out.parent), *flags, within=prepare, **options)


def inputs(root: Path) -> list[str]:
    """Flags that name few problems of each split and, for them, demonstrations that spy."""
    problems, pool = root / "problems.jsonl", root / "spies.jsonl"
    flags = ["--data", str(problems), "--teacher-pool", str(pool)]
    if not pool.exists():
        rows = [row for row, _ in read_json_lines(DATA)]
        parts = [[row for row in rows if row["split"] == split] for split in SPLITS]
        problems.write_text("".join(json.dumps(r) + "\n" for part in parts for r in part[:FEW]))
        pool.touch()
        pool.write_text("".join(map(spy, load_splits(parse(["smoke", *flags])[1])["train"])))
    return flags


def spy(problem: Problem) -> str:
    text = canonical_hack(problem).replace("```python\n", f"```python\n{SPY}", 1)
    row = {"problem_id": problem.problem_id, "mode": problem.mode, "completion": text}
    return json.dumps(row) + "\n"


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def check_chain(root: Path, whole: Path) -> None:
    """One run through a full disk, SIGTERM in two phases and kills in two more."""
    out, rng = root / "chain", random.Random(192)
    limit = next((whole / "checkpoints").glob("*/tensors.safetensors")).stat().st_size - 1
    assert limit > 1_100_000, "the file size limit must let the record through"
    answer = start(out, lambda: small_files(limit)).ends(2)
    status = load_record(out).status
    assert answer.startswith("error: cannot write"), answer
    assert status.startswith("failed: cannot write") and "--resume" in status, status
    print("ok  a full disk ends a run in one line, and its status says so")

    run = start(out)
    assert run.enters("sample", 1)
    assert refused(out, "another process is running"), "a second process was not refused"
    stop(run, out, "interrupted (checkpoint: step 1)")
    print("ok  a second process is refused; SIGTERM leaves a checkpoint and a true status")

    assert trainer.kill_in(start(out), "update", rng), "the kill came too late"
    start(out, die_in_last_save).ends(-signal.SIGKILL)
    assert load_record(out).status == "running" and (out / "checkpoints").is_dir()
    run = start(out)
    assert run.enters("evaluate", 2)
    stop(run, out, f"interrupted (checkpoint: step {STEPS})")
    cells = len(load_record(out).evals)
    assert cells in (3, 4), f"SIGTERM in the second of four final cells left {cells - 1}"
    start(out).ends(0)
    assert not (found := trainer.differences(whole, out)), f"interrupted, it differs in {found}"
    mutant = shutil.copytree(out, root / "mutant")
    rows = load_metrics(out)
    rows[-1]["reward_mean"] += 1e-6
    (mutant / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert trainer.differences(whole, mutant), "another reward goes unnoticed"
    print(
        "ok  killed in an update and in its last save, stopped in the final evaluation: same bits"
    )


def small_files(size: int) -> None:
    """Stands in for a full disk: from the first checkpoint, no file exceeds `size` bytes."""
    checkpoint = Run.checkpoint

    def limited(*arguments) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        checkpoint(*arguments)

    Run.checkpoint = limited


def stop(run: trainer.Trainer, out: Path, status: str) -> None:
    os.kill(run.pid, signal.SIGTERM)
    run.ends(128 + signal.SIGTERM)
    assert load_record(out).status == status, load_record(out).status


def refused(out: Path, words: str) -> bool:
    record = load_record(out)
    try:
        Run.create(out, record, True).close()
    except UserError as error:
        return words in str(error)
    return False


def die_in_last_save() -> None:
    """Kill -9 between the last adapter file and the last checkpoint, whichever comes first."""
    done = set()

    def wrap(name: str, original: Callable) -> Callable:
        def call(run: Run, *args):
            if run.record.steps_done == STEPS:
                if done:
                    os.kill(os.getpid(), signal.SIGKILL)
                done.add(name)
            return original(run, *args)

        return call

    for name in ("checkpoint", "save_adapter"):
        setattr(Run, name, wrap(name, getattr(Run, name)))


def check_divergence(root: Path) -> None:
    """The evidence is logged, the status true; adapter and checkpoint precede the breach."""

    def runaway() -> None:
        update, steps = train.update, []

        def broken(*parts) -> dict:
            steps.append(1)
            return update(*parts) | ({"kl": 99.0} if len(steps) > 1 else {})

        train.update = broken

    # near the base: demonstrations and failures in every group, so that every step has an update
    slow = ("--steps", "8", "--learning-rate", "1e-5")
    out = root / "diverged"
    answer = start(out, runaway, *slow, arm="none2r").ends(2)
    record, rows = load_record(out), load_metrics(out)
    assert answer.startswith("error: diverged at step 5: KL 99"), answer
    assert record.status.startswith("failed: diverged at step 5: KL 99 > 10"), record.status
    assert record.status.endswith("(checkpoint: step 1)"), record.status
    assert [r["kl"] for r in rows][1:] == [99.0] * 5 and record.steps_done == 5, rows
    saved = next((out / "checkpoints").glob("step_000001_*")) / "tensors.safetensors"
    checkpoint, adapter = load_tensors(saved)[0], load_adapter(out)[0]
    same = [torch.equal(checkpoint[f"adapter.{k}"], v) for k, v in adapter.items()]
    assert same and all(same), "the adapter is not the last good one"
    print("ok  a diverging run stops with its evidence and the adapter from before the breach")


def check_secrets(root: Path) -> None:
    def holders(token: bytes) -> list[Path]:
        files = [p for p in root.rglob("*") if p.is_file()]
        return [
            p for p in files if token in (gzip.open if p.suffix == ".gz" else open)(p, "rb").read()
        ]

    assert holders(SPY.encode()[10:22]), "no spy was ever run: the search means nothing"
    assert not (found := holders(TOKEN.encode())), f"the token reached {found}"
    os.environ["HF_TOKEN"] = TOKEN
    calls = sandbox.marshal.dumps((compile("__call__()", "", "eval"),))
    job = Job(ENVIRONMENT, entry="f", calls=calls, compares=("plain",))
    seen = []
    for environment in (sandbox.ENVIRONMENT, sandbox.ENVIRONMENT | {"HF_TOKEN": TOKEN}):
        sandbox.ENVIRONMENT = environment
        with Sandbox(workers=1) as box:
            seen.append(TOKEN in str(box.run([job])[0].records))
    assert seen == [False, True], f"the token in the sandbox, and leaked on purpose: {seen}"
    print("ok  a token in the environment reaches no file of a run, nor the sandbox")


def check_identity(root: Path) -> None:
    """Every file of a model that shapes prompts or completions belongs to a run's identity."""
    folder = root / "model"
    config = parse(["smoke"])[1]
    shutil.copytree(config.model.model, folder)
    config = with_options(config, {"model": str(folder)})
    grader = object.__new__(Grader)
    grader.layers = {}

    def unnoticed() -> list[str]:
        def record() -> RunRecord:
            return experiment.new_record("smoke", config, {}, [], grader)

        same = []
        for file in sorted(folder.iterdir()):
            before, whole = record(), file.read_bytes()
            file.write_bytes(whole + b" ")
            same += [] if _differences(before, record()) else [file.name]
            file.write_bytes(whole)
        return same

    assert (folder / "chat_template.jinja").exists() and not (odd := unnoticed()), odd
    with mock.patch.object(experiment, "MODEL_FILES", (".safetensors",)):
        assert "tokenizer.json" in unnoticed(), "weights alone pass for the whole model"
    print("ok  a run's identity holds its model's weights, tokenizer, template and settings")


def check_kills(root: Path, rng: random.Random) -> None:
    """Every arm, killed in every phase; its files can be read at once, whatever the moment."""
    kills = 0
    for arm in UNMONITORED:
        whole, out = root / f"whole_{arm}", root / f"killed_{arm}"
        start(whole, nothing, *LONG, arm=arm).ends(0)
        for name in trainer.PHASES:
            run = start(out, nothing, *LONG, arm=arm)
            if not trainer.kill_in(run, name, rng, rng.randint(1, 2)):
                run.ends(0)
                break
            kills += 1
            load_metrics(out)
            load_rollouts(out)
        if load_record(out).status != "finished":
            start(out, nothing, *LONG, arm=arm).ends(0)
        assert not (found := trainer.differences(whole, out)), f"{arm} differs in {found}"
    print(f"ok  {kills} kills in {len(UNMONITORED)} arms resumed to the bits of the whole run")


def check_workers(root: Path, rng: random.Random) -> None:
    """Sandbox workers killed once a grading are replaced, and their jobs repeated.

    Two kills of one job are a SandboxError by design.
    """
    run, killed = start(root / "workers", nothing, *LONG), 0
    while run.enters("grade"):
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(rng.choice(sorted(trainer.descendants(run.pid))), signal.SIGKILL)
            killed += 1
    run.ends(0)
    found = trainer.differences(root / "whole_routeV", root / "workers")
    assert killed >= 2 and not found, (killed, found)
    print(f"ok  {killed} sandbox processes killed under way, and the run equals the whole one")


# ── without a run ────────────────────────────────────────────────────────────────────────────────


def check_read_only(whole: Path) -> None:
    record = load_record(whole)
    for mode, expected in ((0o555, True), (0o777, False)):  # the second is the mutation
        folder = Path(tempfile.mkdtemp(prefix="faults_"))
        os.chmod(folder, mode)
        if (pid := os.fork()) == 0:
            if os.getuid() == 0:
                os.setgroups([])
                os.setuid(65_534)  # nobody: root may write anywhere
            try:
                Run.create(folder / "run", record, False)
                os._exit(1)
            except UserError as error:
                os._exit(0 if "cannot write" in str(error) else 2)
        assert (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0) == expected, oct(mode)
        shutil.rmtree(folder)
    print("ok  a read-only directory is refused in one line, a writable one is not")


def out_of_memory(*arguments: object, **options: object) -> None:
    def sample() -> None:  # the frame's name tells where memory ran out
        raise torch.OutOfMemoryError("CUDA out of memory")

    sample()


class Tried(Exception):
    """The dry run was checked; the run need not go on."""


def check_dry_run(policy, gate, optimizer, update, problems, sampling, config, zones) -> None:
    """Stands in a run for its dry run: sampler, gate and update are tried, and leave no trace."""
    updates, budgets, real = [], [], dry_run.sample

    def counted(trained, behaviour) -> dict:
        updates.append(trained)
        return update(trained, behaviour)

    def sampled(policy, prompts, rows, **options):
        budgets.append((sum(rows), options["token_budget"]))
        return real(policy, prompts, rows, **options)

    def trace() -> dict[str, torch.Tensor]:
        state = policy.adapter.state_dict() | optimizer.state_dict() | gate.state_dict()
        return {k: v.clone() for k, v in state.items()}

    def leaves_nothing(gate=gate) -> bool:
        before = trace()
        parts = (counted, problems, sampling, config, zones)
        dry_run.dry_run(policy, gate, optimizer, *parts)
        after = trace()
        equal = [torch.equal(after[k], v) for k, v in before.items()]
        return before.keys() == after.keys() and all(equal)

    dry_run.sample = sampled
    assert leaves_nothing() and policy.adapter.state_dict(), "the dry run leaves a trace"
    batch, mixed = updates[-1].batch, updates[-1].zones
    assert batch.input_ids.numel() > config.token_budget / 2, batch.input_ids.shape
    assert len(batch.input_ids[:, :32].unique(dim=0)) == config.num_prompts
    assert {*mixed.unique().tolist()} - {NO_ZONE} == {*Zone}, "it SHOULD mix the zones"
    assert budgets == [(config.num_prompts * config.num_generations, sampling.token_budget)]
    dry_run.sample = out_of_memory
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert leaves_nothing(), "full memory in sampling leaves a trace"
    assert "lower --sample-token-budget" in said.getvalue(), "and is no warning"
    Judge.__call__ = out_of_memory
    asked = Gate(Judge(Endpoint("http://localhost:9", "m")), cut="flag")
    assert leaves_nothing(asked), "a judge's run leaves a trace"
    BlockOptimizer.load_state_dict = lambda self, state: None
    assert not leaves_nothing(), "moments that stay go unnoticed"
    raise Tried


def check_largest(root: Path) -> None:
    experiment.dry_run = check_dry_run
    flags = (*inputs(root), "--out-dir", str(root / "never"), "--token-budget", "1024")
    put_back = BlockOptimizer.load_state_dict, Judge.__call__
    with contextlib.suppress(Tried), Experiment(*parse(["smoke", *SHORT, *flags])):
        raise AssertionError("the dry run was not called")
    BlockOptimizer.load_state_dict, Judge.__call__ = put_back
    for arm, zones in (("absorb", 1), ("penaltyQ", 1), ("absorbQ", 2), ("routeV", 3)):
        config = parse(["organism", "--intervention", arm])[1]
        assert len(arms.mixed_zones(config)) == zones, arm
    print("ok  the largest batch is tried through sampler, gate and update, and leaves no trace")


def check_memory() -> None:
    def other() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for function, flag in ((out_of_memory, "--sample-token-budget"), (other, "--token-budget")):
        try:
            with explained():
                function()
            raise AssertionError("memory errors pass")
        except UserError as error:
            assert "out of memory" in str(error) and f"lower {flag}" in str(error), error
    try:
        with explained():
            raise RuntimeError("another error")
    except RuntimeError as error:
        assert not isinstance(error, UserError) and "lower" not in describe(error)
    print("ok  full memory names the flag to lower; another error stays what it is")


def check_statuses(whole: Path) -> None:
    """Whatever ends a run, its record says so."""

    def status_after(error: BaseException | None) -> str:
        with tempfile.TemporaryDirectory() as folder:
            run = Run.create(folder, load_record(whole), False)
            with contextlib.suppress(BaseException), recorded(run):
                if error is not None:
                    raise error
                run.finish("finished")
            return load_record(folder).status

    memory = describe(MemoryError())
    expected = {
        MemoryError(): f"failed: {memory}",
        SandboxError("twice"): "failed: SandboxError: twice",
        Diverged("diverged"): "failed: diverged",
        ValueError("two\nlines"): "failed: ValueError: two lines",
        KeyboardInterrupt(): "interrupted",
        Stopped(143): "interrupted",
    }
    expected = {error: f"{status} (no checkpoint)" for error, status in expected.items()}
    expected[None] = "finished"
    got = {error: status_after(error) for error in expected}
    assert got == expected, got
    finish, Run.finish = Run.finish, lambda self, status: None
    assert status_after(ValueError()) == "running", "a status that is never written goes unnoticed"
    Run.finish = finish
    print(f"ok  {len(expected)} ways to end leave each a record with its own status")


def main() -> None:
    torch.set_num_threads(1)
    trainer.adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        root = Path(folder)
        if "--long" in sys.argv:
            check_kills(root, random.Random(0))
            check_workers(root, random.Random(0))
            return
        whole = root / "whole"
        start(whole).ends(0)
        check_chain(root, whole)
        check_divergence(root)
        check_read_only(whole)
        check_identity(root)
        check_memory()
        check_statuses(whole)
        check_secrets(root)
        check_largest(root)


if __name__ == "__main__":
    main()
