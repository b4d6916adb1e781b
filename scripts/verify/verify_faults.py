"""Faults in short: kills, signals, a full disk, full memory, divergence, secrets.

All runs are of one tiny configuration in forked processes, and equal the whole one to the bit
wherever they were resumed.

Run: python scripts/verify/verify_faults.py [--long]     (--long: every arm killed in every phase at
random moments)
"""

import contextlib
import gzip
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
from scripts.verify.loop import same_tensors
from scripts.verify.stored import answer, captured, in_fork, refused
from scripts.verify.tiny import read_models_once

from vgrout import arms, experiment, train
from vgrout.cli import parse
from vgrout.config import with_options
from vgrout.core import NO_ZONE, Problem, RunRecord, Zone
from vgrout.env.exploits import canonical_hack
from vgrout.experiment import Experiment, build_policy, load_splits
from vgrout.files import load_tensors, read_json_lines
from vgrout.gate.gate import Gate
from vgrout.gate.monitors.judge import Endpoint
from vgrout.gate.monitors.scores import Judge
from vgrout.grader import Grader
from vgrout.grader.sandbox import SandboxError
from vgrout.model.optimizer import BlockOptimizer
from vgrout.run import dry_run, health
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

STEPS, FEW = 3, 8  # FEW problems of each split
SHORT = (  # the second phase begins with the second step
    f"--num-prompts 3 --steps {STEPS} --num-generations 4 --max-completion-length 80 "
    "--teacher-until 9 --final-draws 16 --token-budget 2048 --save-every 1 --threads 1 --workers 1 "
    "--quarantine-first 1 --warmup-steps 0 --pairs data/pairs/organism.md#mechanism:2"
).split()
LONG = "--steps 5 --save-every 2 --eval-every 2 --eval-draws 4 --final-draws 8".split()
UNMONITORED = [name for name, arm in arms.ARMS.items() if arm.phases[-1].score not in arms.FLAGS]
TOKEN = "hf_" + "plantedsecret" * 2
SPY = "import os\nprint(os.environ)\n"


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
        rows = [row for row, _ in read_json_lines(parse(["smoke"])[1].data.data)]
        parts = [[r for r in rows if r["split"] == split] for split in ("train", "val", "test")]
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
    """One run through a full disk, SIGTERM in two phases and a kill at the phases' boundary."""
    out = root / "chain"
    limit = next((whole / "checkpoints").glob("*/tensors.safetensors")).stat().st_size - 1
    assert limit > 1_100_000, "the file size limit must let the record through"
    line = start(out, lambda: small_files(limit)).ends(2)
    status = load_record(out).status
    assert line.startswith("error: cannot write"), line
    assert status.startswith("failed: cannot write") and "--resume" in status, status
    print("ok  a full disk ends a run in one line, and its status says so")

    run = start(out)
    assert run.enters("sample", 1)
    refused("another process is running", Run.create, out, load_record(out), True)
    assert stop(run, out).steps_done < STEPS
    print("ok  a second process is refused; SIGTERM leaves a checkpoint and a true status")

    assert trainer.kill_in(start(out), "update", random.Random(192)), "the kill came too late"
    assert load_record(out).status == "running"
    forgetful = shutil.copytree(out, root / "forgetful")
    run = start(out)
    assert run.enters("evaluate", 2)
    cells = len(stop(run, out).evals)
    assert cells in (3, 4), f"SIGTERM in the second of four final cells left {cells - 1}"
    start(out).ends(0)
    assert not (found := trainer.differences(whole, out)), f"interrupted, it differs in {found}"
    start(forgetful, without_moments).ends(0)
    assert trainer.differences(whole, forgetful), "moments that are not restored go unnoticed"
    print("ok  killed in an update and stopped in the final evaluation, a run has the same bits")


def small_files(size: int) -> None:
    """Stands in for a full disk: from the first checkpoint, no file exceeds `size` bytes."""
    checkpoint = Run.checkpoint

    def limited(*arguments) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        checkpoint(*arguments)

    Run.checkpoint = limited


def without_moments() -> None:
    BlockOptimizer.load_state_dict = lambda self, state: None


def stop(run: trainer.Trainer, out: Path) -> RunRecord:
    os.kill(run.pid, signal.SIGTERM)
    run.ends(128 + signal.SIGTERM)
    record = load_record(out)
    assert record.status == f"interrupted (checkpoint: step {record.steps_done})", record.status
    return record


def runaway() -> None:
    """A KL without bounds from the second update on, and little patience."""
    update, updates = train.update, []

    def broken(*parts) -> dict:
        updates.append(1)
        return update(*parts) | ({"kl": 99.0} if len(updates) > 1 else {})

    train.update, health.PATIENCE = broken, 2


def check_divergence(root: Path) -> None:
    """The evidence is logged, the status true; adapter and checkpoint precede the breach."""
    out = root / "diverged"
    line = start(out, runaway).ends(2)
    record, rows = load_record(out), load_metrics(out)
    assert line.startswith("error: diverged at step 2: KL 99"), line
    assert record.status.startswith("failed: diverged at step 2: KL 99 > 10"), record.status
    assert record.status.endswith("(checkpoint: step 1)"), record.status
    assert [row["kl"] for row in rows][1:] == [99.0] * 2 and record.steps_done == 2, rows
    saved = next((out / "checkpoints").glob("step_000001_*")) / "tensors.safetensors"
    checkpoint, adapter = load_tensors(saved)[0], load_adapter(out)[0]
    same = [torch.equal(checkpoint[f"adapter.{k}"], v) for k, v in adapter.items()]
    assert same and all(same), "the adapter is not the last good one"
    print("ok  a diverging run stops with its evidence and the adapter from before the breach")


def check_secrets(root: Path) -> None:
    """What a run's processes have in their environment stands in none of its files."""

    def holders(token: str) -> list[Path]:
        files = {p: gzip.open if p.suffix == ".gz" else open for p in root.rglob("*.*")}
        held = {p: read(p, "rb").read() for p, read in files.items() if p.is_file()}
        return [p for p, data in held.items() if token.encode() in data]

    assert holders(SPY.splitlines()[1]), "no spy was ever run: the search means nothing"
    assert not (found := holders(TOKEN)), f"the token reached {found}"
    print("ok  a token in the environment reaches no file of a run")


def check_kills(root: Path, rng: random.Random) -> None:
    """Every arm, killed in every phase; its files can be read at once, whatever the moment."""
    kills = 0
    for arm in UNMONITORED:
        whole, out = root / f"whole_{arm}", root / f"killed_{arm}"
        start(whole, nothing, *LONG, arm=arm).ends(0)
        for phase in trainer.PHASES:
            run = start(out, nothing, *LONG, arm=arm)
            if not trainer.kill_in(run, phase, rng, rng.randint(1, 2)):
                run.ends(0)
                break
            kills += 1
            load_metrics(out)
            load_rollouts(out)
        if load_record(out).status != "finished":
            start(out, nothing, *LONG, arm=arm).ends(0)
        assert not (found := trainer.differences(whole, out)), f"{arm} differs in {found}"
    print(f"ok  {kills} kills in {len(UNMONITORED)} arms resumed to the bits of the whole run")


# ── without a run ────────────────────────────────────────────────────────────────────────────────


def check_identity(root: Path) -> None:
    """Every file of a model that shapes prompts or completions belongs to a run's identity."""
    config = parse(["smoke"])[1]
    folder = Path(shutil.copytree(config.model.model, root / "model"))
    grader = mock.Mock(spec=Grader, layers={})
    given = "smoke", with_options(config, {"model": str(folder)}), {}, [], grader

    def unnoticed() -> list[str]:
        same = []
        for file in sorted(folder.iterdir()):
            before, whole = experiment.new_record(*given), file.read_bytes()
            file.write_bytes(whole + b" ")
            same += [] if _differences(before, experiment.new_record(*given)) else [file.name]
            file.write_bytes(whole)
        return same

    assert (folder / "chat_template.jinja").exists() and not (odd := unnoticed()), odd
    with mock.patch.object(experiment, "MODEL_FILES", (".safetensors",)):
        assert "tokenizer.json" in unnoticed(), "weights alone pass for the whole model"
    print("ok  a run's identity holds its model's weights, tokenizer, template and settings")


def as_nobody(folder: Path, record: RunRecord) -> None:
    """Open a run without the rights of root, who may write anywhere."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setuid(65_534)
    Run.create(folder / "run", record, False)


def check_read_only(whole: Path) -> None:
    codes = []
    for mode in (0o555, 0o777):  # the second is the mutation
        folder = Path(tempfile.mkdtemp(prefix="faults_"))
        os.chmod(folder, mode)
        codes.append(in_fork(as_nobody, folder, load_record(whole)))
        shutil.rmtree(folder)
    assert codes == [2, 0], codes
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
        dry_run.dry_run(policy, gate, optimizer, counted, problems, sampling, config, zones)
        return same_tensors(before, trace())

    dry_run.sample = sampled
    assert leaves_nothing() and policy.adapter.state_dict(), "the dry run leaves a trace"
    batch, mixed = updates[-1].batch, updates[-1].zones
    assert batch.input_ids.numel() > policy.token_budget / 2, batch.input_ids.shape
    assert len(batch.input_ids[:, :32].unique(dim=0)) == config.num_prompts
    assert {*mixed.unique().tolist()} - {NO_ZONE} == {*Zone}, "it SHOULD mix the zones"
    assert budgets == [(config.num_prompts * config.num_generations, sampling.token_budget)]
    dry_run.sample = Judge.__call__ = out_of_memory
    said = captured(leaves_nothing)
    assert "lower --sample-token-budget" in said, "full memory in sampling is no warning"
    asked = Gate(Judge(Endpoint("http://localhost:9", "m")), cut="flag")
    assert leaves_nothing(asked), "a judge's run leaves a trace, or its judge is asked"
    without_moments()
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
    def fails(error: Exception) -> None:
        raise error

    refused("lower --sample-token-budget", explained()(out_of_memory))
    refused("lower --token-budget", explained()(fails), MemoryError())
    with contextlib.suppress(RuntimeError):
        line = answer(explained()(fails), RuntimeError("another error"))
        raise AssertionError(f"another error is answered with {line!r}")
    run, checkpointing = mock.MagicMock(), mock.Mock()
    policy, run.config.grpo.max_completion_length = run.policy, 96
    run.config.model.gradient_checkpointing = False

    def largest(policy, *rest) -> None:
        if policy.token_budget > policy.fitting * (4 if checkpointing.called else 1):
            out_of_memory()

    parts = dict(dry_run=largest, arms=mock.Mock(), enable_checkpointing=checkpointing)
    with mock.patch.multiple(experiment, **parts):
        for policy.fitting, budget, on in ((512, 512, False), (256, 1024, True)):
            policy.token_budget = 2048
            said = captured(Experiment.dry_run, run)
            assert (policy.token_budget, checkpointing.called) == (budget, on), said
            assert f"--token-budget {2 * budget}, checkpointing {on}" in said, said
        policy.fitting = 2
        refused("lower --sample-token-budget", explained()(Experiment.dry_run), run)
    print("ok  full memory: a quarter of the token budget, then checkpointing, then a flag's name")


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

    ends = {
        MemoryError(): f"failed: {describe(MemoryError())}",
        SandboxError("twice"): "failed: SandboxError: twice",
        Diverged("diverged"): "failed: diverged",
        ValueError("two\nlines"): "failed: ValueError: two lines",
        KeyboardInterrupt(): "interrupted",
        Stopped(143): "interrupted",
    }
    expected = {error: f"{status} (no checkpoint)" for error, status in ends.items()}
    expected[None] = "finished"
    got = {error: status_after(error) for error in expected}
    assert got == expected, got
    with mock.patch.object(Run, "finish"):
        assert status_after(ValueError()) == "running", "a status never written goes unnoticed"
    print(f"ok  {len(expected)} ways to end leave each a record with its own status")


def main() -> None:
    torch.set_num_threads(1)
    trainer.adopt_orphans()
    read_models_once()
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        root = Path(folder)
        config = parse(["smoke", *inputs(root)])[1]
        build_policy(config, load_splits(config))  # read before the forks
        if "--long" in sys.argv:
            check_kills(root, random.Random(0))
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
