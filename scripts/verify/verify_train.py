"""The real loop: no label reaches the update, measuring leaves no trace, a run resumes bit for bit.

    python scripts/verify/verify_train.py [--long]     (--long: the label gate alone, for every arm)

What is random in the label gate, and what may remain, says `loop.label_blind`.
"""

import ast
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from scripts.verify.loop import label_blind, run, same_adapter, untimed
from scripts.verify.tiny import read_models_once

import vgrout
from vgrout import experiment, train
from vgrout.arms import ARMS, FLAGS
from vgrout.core import Grade, Group, Problem, Rollout, UserError
from vgrout.env.problems import load_problems, split
from vgrout.env.rollouts import Composed
from vgrout.gate.actions import ACTIONS
from vgrout.gate.controls import Control, ControlScore
from vgrout.gate.gate import Gate, Gated, PinnedGate
from vgrout.gate.phases import LivePhase
from vgrout.gate.scores import Score, Scored
from vgrout.model.batch import Batch, Behaviour, Trained
from vgrout.model.grpo import grpo_loss
from vgrout.model.lora2r import BLOCKS
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.update import update
from vgrout.run import evaluate as evaluation
from vgrout.run.records import (
    load_evals,
    load_metrics,
    load_record,
    load_rollouts,
    load_snapshots,
)

# steps 0 and 1 train the quarantine, 2 has demonstrations and a score, 3 no demonstrations
TWO_PHASES = (
    "routeV --steps 4 --quarantine-first 2 --enter reset --centred --teacher-until 3 "
    "--warmup-steps 0"
)
OFTEN = "--save-every 1 --eval-every 1 --eval-draws 6"
UNPAID = "filterQ --quarantine-first 1 --no-phase-pays"
LINES = [  # with TWO_PHASES, and a judge's in verify_monitors: every score, action, kind of phase
    "routeA --action penalise",
    "routeL --signed --retained-advantages --gen-deploy-frac 0.5",
    UNPAID,
    "matched_absorbQ --quarantine-first 1",
    "oracle",
]
LONG = ["routeV --granularity token", "absorbQ --quarantine-first 1 --enter inverted"]
LABELS = {"mode", "teacher", "grade", "mechanism", "correct", "reward_hack", "passed", "rollouts"}
LABELLED = (Composed, Rollout, Group, Grade, Problem)


# ── types ────────────────────────────────────────────────────────────────────────────────────────


def carried(kind: object) -> Iterator[str]:
    """What of an annotated type has labels: classes by name, fields by name, all the way down."""
    for part in kind if isinstance(kind, list) else typing.get_args(kind):
        yield from carried(part)
    if kind in LABELLED:
        yield kind.__name__
    elif isinstance(kind, type) and is_dataclass(kind):
        yield from LABELS & {field.name for field in fields(kind)}
        for inner in typing.get_type_hints(kind).values():
            yield from carried(inner)


def carried_by(function: Callable) -> set[str]:
    return {name for kind in typing.get_type_hints(function).values() for name in carried(kind)}


def scores(base: type = Score) -> Iterator[type]:
    for kind in base.__subclasses__():
        if kind is not ControlScore:
            yield from (kind, *scores(kind))


def labels_named(folder: Path) -> dict[str, set[str]]:
    """The files below a folder that name an attribute of LABELS."""
    found = {}
    for path in folder.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        if names := LABELS & {node.attr for node in nodes if isinstance(node, ast.Attribute)}:
            found[path.name] = names
    return found


def check_types(tmp: str) -> None:
    gates = [Gate.__call__, Gate.refresh, PinnedGate.__call__]
    for kind in {Score, *scores()}:
        gates += [kind.__call__, kind.refresh]
    for function in (*gates, *ACTIONS.values(), update, grpo_loss):
        assert not carried_by(function), f"{function.__qualname__}: {carried_by(function)}"
    for kind in (Batch, Behaviour, Trained, Scored, Gated):
        assert not set(carried(kind)), f"{kind.__name__}: {set(carried(kind))}"
    assert carried_by(Control.__call__) == {"Composed"}, "a row's origin is not recognised"
    nested = make_dataclass(
        "Nested",
        [("batch", make_dataclass("Leaky", [("teacher", bool)]))],
    )
    assert set(carried(nested | None)) == {"teacher"}, "a field for a label is not recognised"
    source = Path(vgrout.__file__).parent
    readers = labels_named(source / "gate") | labels_named(source / "model")
    readers.pop("audit.py", None)
    controls = {"rollouts", "teacher"}
    oracle = {"rollouts", "grade", "mechanism", "mode"}
    assert readers == {"controls.py": controls, "oracle.py": oracle}, readers
    planted = Path(tmp, "planted.py")
    planted.write_text("score = rows[0].grade.correct\n")
    assert labels_named(Path(tmp)) == {"planted.py": {"grade", "correct"}}
    print(f"ok  {len(gates)} signatures of gates and scores, actions, update: no type has a label")


# ── parameters ───────────────────────────────────────────────────────────────────────────────────


def leaky(groups, *rest, compose=train.compose):
    """Mutation: an advantage that reads one label."""
    composed = compose(groups, *rest)
    hacks = [float(row.grade.reward_hack) for row in composed.rollouts]
    composed.batch.advantages -= 0.1 * torch.tensor(hacks)
    return composed


def trained_by_measure(policy, *rest, gradient_norms=experiment.gradient_norms):
    """Mutation: a measurement that leaves a gradient behind."""
    parameter = policy.adapter.parameters("deployed")[0]
    parameter.grad = torch.full_like(parameter, 1e-3)
    return gradient_norms(policy, *rest)


def moved_by_evaluation(policy, *rest, evaluate=evaluation.evaluate, **options):
    """Mutation: an evaluation that moves a parameter."""
    policy.adapter.parameters("deployed")[0].data.add_(1e-6)
    return evaluate(policy, *rest, **options)


def check_parameters(tmp: str, plain: Path, evaluated: Path) -> None:
    moved = [row["param_delta"] or 0 for row in load_metrics(plain)]
    assert sum(delta > 0 for delta in moved) >= 3, f"too few steps trained: {moved}"
    assert label_blind(plain, f"{tmp}/blind", TWO_PHASES), "a label reached the update"
    assert same_adapter(plain, evaluated), "evaluations or checkpoints changed parameters"
    unmeasured = run(f"{tmp}/unmeasured", f"{TWO_PHASES} --snapshot-every 0")
    assert same_adapter(plain, unmeasured), "a snapshot or its measure changed parameters"
    for owner, name, mutant in (
        (train, "compose", leaky),
        (experiment, "gradient_norms", trained_by_measure),
        (evaluation, "evaluate", moved_by_evaluation),
    ):
        with mock.patch.object(owner, name, mutant):
            quiet = owner is not evaluation
            changed = run(f"{tmp}/{mutant.__name__}", TWO_PHASES, quiet=quiet)
        assert not same_adapter(plain, changed), f"{mutant.__name__} goes unnoticed"
    print("ok  random labels, evaluations, snapshots leave the parameters bit-identical;", end=" ")
    print("a leaked label, and a measurement that leaves a trace, do not")


def check_labels(tmp: str, lines: list[str]) -> None:
    """Labels do not reach the parameters of an arm, and do reach those of an oracle."""
    for i, line in enumerate(lines):
        plain = run(f"{tmp}/plain{i}", line)
        trained = sum((row["param_delta"] or 0) > 0 for row in load_metrics(plain))
        assert trained >= 2, f"{line}: only {trained} steps trained"
        blind = label_blind(
            plain,
            f"{tmp}/blind{i}",
            line,
            seed=i,
        )
        assert blind != load_record(plain).notes["oracle"], f"{line}: blind to labels: {blind}"
        if line == UNPAID:
            assert unearned(plain, 0) == {False}
            assert True in unearned(plain, 1)
    print(f"ok  labels change the parameters of no arm but an oracle: {', '.join(lines)}")


def unearned(folder: Path, step: int) -> set[bool]:
    """Was a row of the step paid whose exploit fired and which is wrong?"""
    rows = [row for row in load_rollouts(folder) if row["step"] == step]
    return {row["passed"] for row in rows if row["mechanism"] and not row["correct"]}


def every_arm() -> list[str]:
    free = [name for name, arm in ARMS.items() if arm.phases[-1].score not in FLAGS]
    brief = {name: " --quarantine-first 1" for name in free if len(ARMS[name].phases) > 1}
    return [name + brief.get(name, "") for name in free]


# ── phases ───────────────────────────────────────────────────────────────────────────────────────


def check_phases(tmp: str) -> None:
    """A first phase trains the quarantine alone; then every --enter takes its place as it says."""
    found: dict[str, torch.Tensor] = {}

    def every(live, policy, optimizer, groups, *, enter=LivePhase.enter):
        if not live.start:
            return
        blocks = {b: policy.adapter.parameters(b) for b in BLOCKS}
        assert not any(p.any() for p in blocks["deployed"]), "the first phase trained another block"
        found["learned"] = torch.cat([p.detach().flatten() for p in blocks["quarantine"]])
        values = [p.detach().clone() for p in blocks["quarantine"]]
        assert len(optimizer.adamw.state) == len(values)
        for name in ("reset", "norm", "effect", "inverted"):
            enter(
                replace(
                    live,
                    phase=replace(live.phase, enter=name),
                ),
                policy,
                optimizer,
                groups,
            )
            found[name] = torch.cat([p.detach().flatten() for p in blocks["quarantine"]])
            assert not optimizer.adamw.state, "moments outlive the quarantine that had them"
            optimizer.put("quarantine", values)

    with mock.patch.object(LivePhase, "enter", every):
        folder = run(f"{tmp}/phases", "absorbQ --quarantine-first 2")
    rows = [row for row in load_rollouts(folder) if "zone" in row]
    states = [{(r["sampled_ablated"], r["zone"]) for r in rows if r["step"] == s} for s in range(3)]
    assert states[0] == states[1] == {(False, "ROUTE")}, "a row of the first phase is not ROUTEd"
    assert {zone for _, zone in states[2]} <= {"RETAIN", "ABSORB"}
    assert (True, "RETAIN") in states[2], "the second phase is not sampled ablated"
    assert unearned(folder, 0) == {True}, "loopholes are paid for unless a flag says not"
    learned = found.pop("learned")
    cosine = {k: float(torch.cosine_similarity(v, learned, dim=0)) for k, v in found.items()}
    assert cosine["reset"] > 0.999 and cosine["inverted"] < -0.999, cosine
    assert (
        max(
            abs(cosine["norm"]),
            abs(cosine["effect"]),
        )
        < 0.2
    ), cosine
    words = ", ".join(f"{name} {value:+.2f}" for name, value in cosine.items())
    print(f"ok  the first phase trains the quarantine; its cosine with what enters: {words}")


# ── evaluation and resume ────────────────────────────────────────────────────────────────────────


def check_evaluation(evaluated: Path, plain: Path) -> None:
    """Held-out problems alone, every completion kept, every cell there."""
    record, kept = load_record(evaluated), load_evals(evaluated)
    parts = split(load_problems(record.config["data"]["data"]))
    ids = {name: {p.problem_id for p in part} for name, part in parts.items()}
    for cell in record.evals:
        assert set(cell.by_problem) <= ids[cell.split] - ids["train"], "a training problem"
        assert cell.n == sum(n for n, *_ in cell.by_problem.values())
        key = (cell.step, cell.split, cell.markers, cell.state)
        rows = [r for r in kept if (r["step"], r["split"], r["markers"], r["state"]) == key]
        counts = [len(rows), *(sum(r[k] for r in rows) for k in ("reward_hack", "correct"))]
        assert counts == [cell.n, cell.hack, cell.solve], "evals.jsonl.gz is not what was counted"
    first = record.evals[0]
    done = record.steps_done
    assert (first.step, first.split, first.markers) == (0, "test", "novel")
    last = {(c.markers, c.state) for c in record.evals if c.step == done and c.split == "test"}
    assert last == {(m, s) for m in ("iid", "novel") for s in ("as_trained", "deployed")}
    assert len(record.evals) == len(load_record(plain).evals) + done - 1
    print("ok  evaluations are of held-out problems, and their completions are those counted")


class Killed(BaseException):
    pass


def dies_at_the_second() -> Callable:
    calls = []

    def killed(*rest):
        calls.append(rest)
        if len(calls) == 2:
            raise Killed
        return update(*rest)

    return killed


def check_resume(tmp: str, whole: Path) -> None:
    """Killed in mid-phase, at the phases' boundary and where demonstrations end."""
    line = f"{TWO_PHASES} {OFTEN}"
    folder = Path(tmp, "killed")
    forgetful = Path(tmp, "forgetful")
    for deaths in (1, 2, 3):
        with mock.patch.object(
            train,
            "update",
            dies_at_the_second(),
        ):
            try:
                run(folder, f"{line} --resume", quiet=False)
                raise AssertionError("the run was not killed")
            except Killed:
                assert load_record(folder).steps_done == deaths
        if deaths == 1:
            shutil.copytree(folder, forgetful, symlinks=True)
    run(folder, f"{line} --resume", quiet=False)
    assert same_run(whole, folder)
    with mock.patch.object(
        BlockOptimizer,
        "load_state_dict",
        lambda *_: None,
    ):
        run(forgetful, f"{line} --resume")
    assert not same_adapter(whole, forgetful), "moments that are not restored go unnoticed"
    other = run(f"{tmp}/other", f"{TWO_PHASES} --steps 3 --seed 42")
    texts = [[row["completion"] for row in load_rollouts(f)][:9] for f in (whole, other)]
    assert texts[0] != texts[1], "another seed gives the same run"
    for flags in ("", " --resume"):
        try:
            run(whole, line + flags)
            raise AssertionError("a finished run was overwritten")
        except UserError as error:
            assert "finished" in str(error)
    print("ok  a run killed thrice resumes to the bits of the uninterrupted one, at each boundary")


def same_run(a: Path, b: Path) -> bool:
    metrics = [untimed(load_metrics(folder)) for folder in (a, b)]
    files = [[f.read_bytes() for f in load_snapshots(folder).values()] for folder in (a, b)]
    evals = [load_record(folder).evals for folder in (a, b)]
    rows = [load_rollouts(folder) for folder in (a, b)]
    return same_adapter(a, b) and all(x == y for x, y in (metrics, files, evals, rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    read_models_once()
    with tempfile.TemporaryDirectory() as tmp:
        if "--long" in sys.argv:
            check_labels(tmp, every_arm() + LINES + LONG)
        else:
            check_types(tmp)
            plain = run(f"{tmp}/plain", TWO_PHASES)
            evaluated = run(f"{tmp}/evaluated", f"{TWO_PHASES} {OFTEN}", quiet=False)
            check_parameters(tmp, plain, evaluated)
            check_evaluation(evaluated, plain)
            check_resume(tmp, evaluated)
            check_labels(tmp, LINES)
            check_phases(tmp)
