"""Faults in short: two kills, SIGTERM, a second process, a full disk, limits, divergence, memory, secrets.

scripts/verify/chaos.py is the long form.

All runs are of one tiny configuration in forked processes, and equal the uninterrupted one to the bit wherever they were resumed.

Run: python scripts/verify/verify_faults.py
"""

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from scripts.verify import trainer as trainers
from scripts.verify.chaos import small_files

from vgrout import train
from vgrout.cli import load_splits, parse
from vgrout.core import EvalResult, UserError, Zone
from vgrout.env.exploits import canonical_hack
from vgrout.env.rollouts import Sampling
from vgrout.files import load_tensors
from vgrout.grader import sandbox
from vgrout.grader.sandbox import Job, Sandbox, SandboxError
from vgrout.model import sampling as policies
from vgrout.model.batch import GateOutput
from vgrout.model.lora2r import BLOCKS
from vgrout.model.optimizer import BlockOptimizer
from vgrout.run import health as guard
from vgrout.run.health import Diverged, Guard, describe, explained
from vgrout.run.records import Run, load_adapter, load_metrics, load_record

STEPS = 3
SHORT = (f"--num-prompts 3 --steps {STEPS} --num-generations 4 --max-completion-length 96 --teacher-until 9 --final-draws 96 "
         "--save-every 1 --eval-every 0 --refresh-every 0 --pair-modes run_tests --threads 1 --workers 1").split()  # fmt: skip
TOKEN = "hf_" + "plantedsecret" * 2
SPY = """import os
print(dict(os.environ))
try:
    print(open('/proc/self/environ').read(), open(f'/proc/{os.getppid()}/environ').read())
except Exception:
    pass
"""
ENVIRONMENT = "import os\nclass Solution:\n    def f(self):\n        return sorted(f'{k}={v}' for k, v in os.environ.items())\n"


def start(root: Path, name: str, *flags: str, within=lambda: None) -> trainers.Trainer:
    """A run with a token in the environment and with demonstrations that print theirs."""

    def prepare() -> None:
        os.environ["HF_TOKEN"] = TOKEN
        within()

    return trainers.start(
        root / name, *SHORT, "--teacher-pool", str(root / "spies.jsonl"), *flags, within=prepare
    )


def write_spies(path: Path) -> None:
    train_split = load_splits(parse(["smoke", "--teacher-pool", ""])[1])["train"]
    rows = [{"problem_id": p.problem_id, "mode": p.mode, "completion": canonical_hack(p).replace("```python\n", f"```python\n{SPY}", 1)}
            for p in train_split]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ended(trainer: trainers.Trainer, code: int) -> str:
    """Wait for a run to end with `code`; returns the last line that it printed."""
    assert trainer.wait() == code, (
        f"exit {trainer.status}, not {code}: {trainer.log.read_text()[-3000:]}"
    )
    return trainer.log.read_text().splitlines()[-1]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_chain(root: Path, reference: Path) -> None:
    """One run through a full disk, SIGTERM beside a second process, a kill in an update and one between the files of its last save."""
    out = root / "chain"
    limit = next((reference / "checkpoints").glob("*/tensors.safetensors")).stat().st_size - 1
    assert limit > 1_100_000, "the file size limit must let the record through"
    answer = ended(start(root, "chain", within=lambda: small_files(limit)), 2)
    status = load_record(out).status
    assert (
        answer.startswith("error: cannot write")
        and status.startswith("failed: cannot write")
        and "--resume" in status
    ), (answer, status)
    print("ok  a full disk ends a run in one line, and its status says so")
    check_stop(out, start(root, "chain", "--resume"))
    rng = random.Random(192)  # 52 ms into the phase
    # the first update is that of the worst case
    assert trainers.kill_in(start(root, "chain", "--resume"), "update", rng, occurrence=2), (
        "the kill came too late"
    )
    assert start(root, "chain", "--resume", within=die_in_last_save).wait() == -signal.SIGKILL
    assert load_record(out).status == "running" and (out / "checkpoints").is_dir()
    ended(start(root, "chain", "--resume"), 0)
    found = trainers.differences(reference, out)
    assert not found, f"the run that was interrupted four times differs in {found}"
    shutil.copytree(out, root / "mutant")
    rows = load_metrics(out)
    rows[-1]["reward_mean"] += 1e-6
    (root / "mutant" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert trainers.differences(reference, root / "mutant"), "another reward goes unnoticed"
    print(
        "ok  killed in an update and between the files of its last save too, it resumes to the bits of the whole run; no process stays"
    )


def die_in_last_save() -> None:
    """Kill -9 at the moment between the last adapter file and the last checkpoint, whichever comes first."""
    done = set()

    def wrap(name: str, original):
        def call(run: Run, *args):
            if run.record.steps_done == STEPS:
                if done:
                    os.kill(os.getpid(), signal.SIGKILL)
                done.add(name)
            return original(run, *args)

        return call

    for name in ("checkpoint", "save_adapter"):
        setattr(Run, name, wrap(name, getattr(Run, name)))


def check_stop(out: Path, trainer: trainers.Trainer) -> None:
    """While it runs a second process is refused; SIGTERM leaves a checkpoint."""
    while trainer.phase[:1] != trainers.PHASES["collect"] and not trainer.ended():
        time.sleep(0.002)
    try:
        Run.create(out, load_record(out), True)
        raise AssertionError("a second process on one directory was not refused")
    except UserError as error:
        assert "another process is running" in str(error)
    os.kill(trainer.pid, signal.SIGTERM)
    ended(trainer, 128 + signal.SIGTERM)
    record = load_record(out)
    assert record.status == "interrupted" and 1 <= record.steps_done < STEPS, (
        record.status,
        record.steps_done,
    )
    print("ok  a second process is refused; SIGTERM leaves a checkpoint and the status interrupted")


def check_read_only(reference: Path) -> None:
    record = load_record(reference)

    def refused(folder: Path) -> bool:
        try:
            Run.create(folder / "run", record, False)
        except UserError as error:
            return "cannot write" in str(error)
        return False

    for mode, expected in ((0o555, True), (0o777, False)):  # the second is the mutation
        folder = Path(tempfile.mkdtemp(prefix="faults_"))
        os.chmod(folder, mode)
        if (pid := os.fork()) == 0:
            if os.getuid() == 0:
                os.setgroups([])
                os.setuid(65_534)  # nobody: root may write anywhere
            os._exit(0 if refused(folder) else 1)
        assert (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0) == expected, oct(mode)
        shutil.rmtree(folder)
    print("ok  a read-only directory is refused in one line, a writable one is not")


def check_secrets(root: Path) -> None:
    def holders(token: bytes) -> list[Path]:
        read = lambda p: gzip.open(p).read() if p.suffix == ".gz" else p.read_bytes()  # noqa: E731
        return [p for p in root.rglob("*") if p.is_file() and token in read(p)]

    assert holders(SPY.split("\n")[1].encode()[:12]), (
        "no spy was ever run: the search means nothing"
    )
    assert not (found := holders(TOKEN.encode())), f"the token reached {found}"
    os.environ["HF_TOKEN"] = TOKEN
    job = Job(
        ENVIRONMENT,
        entry="f",
        calls=sandbox.marshal.dumps((compile("__call__()", "", "eval"),)),
        compares=("plain",),
    )
    seen = []
    for environment in (sandbox.ENVIRONMENT, sandbox.ENVIRONMENT | {"HF_TOKEN": TOKEN}):
        sandbox.ENVIRONMENT = environment
        with Sandbox(workers=1) as box:
            seen.append(TOKEN in str(box.run([job])[0].records))
    assert seen == [False, True], (
        f"the token in the sandbox, as it is and leaked on purpose: {seen}"
    )
    print(
        "ok  a token in the environment reaches no file, log or record of a run, nor the sandbox; a leaked one is seen"
    )


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────


def out_of_memory(*arguments, **options) -> None:
    def sample() -> None:  # the frame's name tells where memory ran out
        raise torch.OutOfMemoryError("CUDA out of memory")

    sample()


def check_limits(root: Path) -> None:
    """The worst case leaves no trace; memory that is full names the flag; divergence ends the run at the last checkpoint."""
    preset, config = parse(
        ["smoke", "--intervention", "routeV", "--out-dir", str(root / "diverged"), *SHORT]
    )
    splits = load_splits(config)
    policy = train.build_policy(config, splits)
    arm = train.ARMS["routeV"]
    gate, _ = train.make_gate(arm, policy, config)
    optimizer = BlockOptimizer(policy.adapter, 1e-3, 0.0, 1.0)
    sampling = Sampling(96, 0.7, 1.0, 1024)
    ran = []

    def update(batch, origin, out: GateOutput) -> None:
        trained = [p for block in BLOCKS for p in policy.adapter.parameters(block)]
        before = [p.detach().clone() for p in trained]
        train.update(policy, batch, origin, out, optimizer, config)
        moved = sum(not torch.equal(p, b) for p, b in zip(trained, before))
        ran.append(
            (
                batch.input_ids.numel(),
                moved,
                len(batch.input_ids[:, :32].unique(dim=0)),
                {*out.zones.tolist()},
            )
        )

    def trace() -> dict[str, torch.Tensor]:
        return (
            policy.adapter.state_dict()
            | {f"adamw.{k}": v for k, v in optimizer.state_dict().items()}
            | gate.state_dict()
        )

    def attempt() -> bool:
        """Is everything as before?"""
        before, clock = {k: v.clone() for k, v in trace().items()}, time.process_time()
        guard.worst_case(policy, gate, optimizer, update, splits["train"], sampling, num_prompts=3, num_generations=4, token_budget=1024,
                         zones=arm.zones)  # fmt: skip
        print(f"    worst case: {time.process_time() - clock:.2f} CPU s, {ran[-1][0]} tokens")
        after = trace()
        return before.keys() == after.keys() and all(
            torch.equal(after[k], v) for k, v in before.items()
        )

    assert attempt() and ran[-1][0] > 512 and ran[-1][1] > 0, (
        "the worst case left a trace, was small, or moved nothing"
    )
    assert ran[-1][2:] == (3, {*Zone}), (
        f"the worst case SHOULD mix prompts and zones, which keep most in memory: {ran[-1][2:]}"
    )
    table = train.ARMS
    assert (
        table["absorb"].zones == (Zone.ABSORB,) == table["filterL"].zones
        and len(table["absorbQ"].zones) == 2
    )
    check_bound(attempt, sampling.token_budget)
    real_sample, guard.sample = guard.sample, out_of_memory
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert attempt() and "lower --sample-token-budget" in said.getvalue(), (
            "full memory in sampling is no warning"
        )
    guard.sample = real_sample
    real, BlockOptimizer.load_state_dict = BlockOptimizer.load_state_dict, lambda self, state: None
    assert not attempt(), "moments that stay go unnoticed"
    BlockOptimizer.load_state_dict = real
    print(
        "ok  the largest batch is tried through sampler, gate and update and leaves no trace; moments that stay are noticed"
    )
    check_memory()
    check_guard(policy, splits["train"], sampling)
    check_divergence(root)


def check_bound(attempt: Callable[[], bool], limit: int) -> None:
    """The worst case decodes in batches of the run's own budget. Mutation: without it, all rows at once."""
    decode, seen = policies._decode, []

    def counted(policy, prompts, rows, new, *rest):
        seen.append(sum(rows) * (max(map(len, prompts)) + new))
        return decode(policy, prompts, rows, new, *rest)

    policies._decode, real_sample = counted, guard.sample
    assert attempt() and len(seen) > 1 and limit / 2 < max(seen) <= limit, (
        f"{seen} tokens at once, SHOULD fill {limit}"
    )
    guard.sample = lambda *a, **options: real_sample(*a, **options | {"token_budget": 10**6})
    assert attempt() and max(seen) > limit, "a worst case without the bound goes unnoticed"
    policies._decode, guard.sample = decode, real_sample
    print(
        "ok  the worst case decodes within the budget of the run; without the bound it is noticed"
    )


def check_memory() -> None:
    def sample() -> None:
        raise MemoryError

    def other() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for function, flag in ((sample, "--sample-token-budget"), (other, "--token-budget")):
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
    print(
        "ok  full memory names the flag to lower, by where it ran out; another error stays what it is"
    )


def check_statuses(reference: Path) -> None:
    """Whatever ends a run, its record says so."""

    def status_after(error: BaseException | None) -> str:
        with tempfile.TemporaryDirectory() as folder:
            with (
                contextlib.suppress(BaseException),
                guard.recorded(Run.create(folder, load_record(reference), False)) as run,
            ):
                if error is None:
                    run.finish("finished")
                elif isinstance(error, SystemExit):
                    run.finish("interrupted")
                if error is not None:
                    raise error
            return load_record(folder).status

    expected = {
        MemoryError(): "failed: out of memory while training or scoring: lower --token-budget, then set --gradient-checkpointing, "
                       "then lower --num-generations or --max-completion-length (no checkpoint)",
        SandboxError("twice"): "failed: SandboxError: twice (no checkpoint)", Diverged("diverged"): "failed: diverged (no checkpoint)",
        ValueError("two\nlines"): "failed: ValueError: two lines (no checkpoint)", KeyboardInterrupt(): "interrupted (no checkpoint)",
        SystemExit(143): "interrupted", None: "finished",
    }  # fmt: skip
    got = {error: status_after(error) for error in expected}
    assert got == expected, got
    finish, Run.finish = Run.finish, lambda self, status: None
    assert status_after(ValueError()) == "running", "a status that is never written goes unnoticed"
    Run.finish = finish
    print(f"ok  {len(expected)} ways to end leave each a record with its own status")


def check_guard(policy, problems, sampling: Sampling) -> None:
    def verdict(rows: list[dict], history: int = 0, **limits) -> int | None:
        """The step at which a guard stops these rows, of which the first `history` come from a resumed run's file."""
        settings = replace(guard.Limits(), **limits)
        own = Guard(
            policy,
            problems,
            rows[:history],
            sampling,
            token_budget=4096,
            max_grad_norm=1.0,
            limits=settings,
        )
        for row in rows[history:]:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    own(row)
            except Diverged as error:
                assert "\n" not in str(error) and f"step {row['step']}" in str(error)
                return row["step"]
        return None

    base = Guard(policy, problems, [], sampling, token_budget=4096, max_grad_norm=1.0).base
    row = {
        "loss": 0.1,
        "kl": 0.2,
        "logp_mean": -0.5,
        "probe_logp": base,
        "grad_norm_deployed": 0.1,
        "grad_norm_quarantine": 0.0,
    }
    healthy = [row | {"step": i} for i in range(24)]
    last = 19 + guard.Limits().patience
    bad = {"kl": 11.0, "probe_logp": base - 5, "grad_norm_deployed": 11.0}
    assert verdict(healthy) is None and -20 < base < 0
    for key, value in bad.items():
        rows = healthy[:20] + [row | {"step": 20 + i, key: value} for i in range(8)]
        assert verdict(rows) == last and verdict(rows, history=22) == last, (
            f"{key}: so many steps in a row, resumed or not"
        )
        assert verdict([r | {key: row[key]} for r in rows]) is None, key
    for key in ("loss", "kl", "grad_norm_deployed", "probe_logp"):
        assert verdict([healthy[0], healthy[1] | {key: float("nan")}]) == 1, key
    assert verdict(healthy[:20] + [row | {"step": 20, "kl": 99.0}] + healthy[21:]) is None, (
        "one odd step is no divergence"
    )
    cell = lambda solve, state="deployed": EvalResult("val", "novel", state, 1, 4, 0, solve, {})  # noqa: E731
    assert guard.dead([cell(1), cell(0), cell(3, "as_trained"), cell(0)])
    assert not guard.dead([cell(0), cell(1)]) and not guard.dead([cell(0)])
    print(
        "ok  KL, probe set and gradient spikes stop a run when they last, a NaN at once, also behind a resume; a dead policy is seen"
    )


def check_divergence(root: Path) -> None:
    """In a real run: the evidence is logged, the status true, and adapter and checkpoint precede the breach."""

    def runaway() -> None:
        update = train.update
        train.update = lambda *parts: (
            (row := update(*parts)) | {"kl": 99.0 if broken() else row["kl"]}
        )

    def broken(steps=[]) -> bool:  # noqa: B006  # the worst case, then steps 0, 1, …
        steps.append(1)
        return len(steps) > 2

    # a policy that stays near the base: demonstrations and failures in every group, so that every step has an update
    slow = ("--steps", "8", "--learning-rate", "1e-5")
    answer = ended(
        trainers.start(root / "diverged", *SHORT, *slow, arm="none2r", within=runaway), 2
    )
    out = root / "diverged"
    record, rows = load_record(out), load_metrics(out)
    assert answer.startswith("error: diverged at step 5: KL 99"), answer
    assert record.status.startswith("failed: diverged at step 5: KL 99 > 10"), record.status
    assert record.status.endswith("(checkpoint: step 1)"), record.status
    assert [r["kl"] for r in rows][1:] == [99.0] * 5 and record.steps_done == 5, (
        record.steps_done,
        [r["kl"] for r in rows],
    )
    saved = next((out / "checkpoints").glob("step_000001_*")) / "tensors.safetensors"
    checkpoint, adapter = load_tensors(saved)[0], load_adapter(out)[0]
    assert all(torch.equal(checkpoint[f"adapter.{k}"], v) for k, v in adapter.items()), (
        "the adapter is not the last good one"
    )
    print(
        "ok  a diverging run stops with the evidence logged, a true status, and the adapter of the last step before the breach"
    )


def main() -> None:
    torch.set_num_threads(1)
    trainers.adopt_orphans()
    root = Path(tempfile.mkdtemp(prefix="faults_"))
    try:
        write_spies(root / "spies.jsonl")
        reference = root / "whole"
        ended(start(root, "whole"), 0)
        check_chain(root, reference)
        check_read_only(reference)
        check_limits(root)
        check_statuses(reference)
        check_secrets(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
