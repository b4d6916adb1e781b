"""The real loop: no label reaches the update, measuring leaves no trace, phases do what they say.

    python scripts/verify/verify_train.py [--long]     (--long: the label gate alone, for every arm)

What is random in the label gate, and what may remain, says `loop.label_blind`. That no file of the
gate or the model names a label but those that may is checked in verify_budget; that a run resumes
bit for bit, in verify_faults.
"""

import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from scripts.verify.loop import label_blind, run, same_adapter, same_tensors
from scripts.verify.tiny import read_models_once

from vgrout import experiment, train
from vgrout.arms import ARMS, FLAGS
from vgrout.core import Grade, Group, Problem, Rollout
from vgrout.env.problems import load_problems, split
from vgrout.env.rollouts import Composed
from vgrout.files import load_tensors
from vgrout.gate.actions import ACTIONS
from vgrout.gate.controls import Control, ControlScore
from vgrout.gate.gate import Gate, Gated, PinnedGate
from vgrout.gate.phases import LivePhase
from vgrout.gate.scores import Score, Scored
from vgrout.model.batch import Batch, Behaviour, Trained
from vgrout.model.grpo import grpo_loss
from vgrout.model.update import update
from vgrout.run.records import (
    load_adapter,
    load_evals,
    load_metrics,
    load_record,
    load_rollouts,
    load_snapshots,
)

# step 0 trains the quarantine, 1 has demonstrations and a score, 2 no demonstrations
TWO_PHASES = (
    "routeV --steps 3 --quarantine-first 1 --centred --teacher-until 2 --warmup-steps 0 "
    "--pairs data/pairs/organism.md#mechanism:2"
)
QUIET = "--snapshot-every 0"
ONE_STEP = "none2r --steps 1 --warmup-steps 0 --snapshot-every 1 --final-draws 4"
OFTEN = "--save-every 1 --eval-every 2 --eval-draws 6"
BRIEF = "--steps 2 --warmup-steps 0"
UNPAID = f"filterQ {BRIEF} --quarantine-first 1 --no-phase-pays"
LINES = (
    UNPAID,
    f"matched_absorbQ {BRIEF} --quarantine-first 1",
    f"oracle {BRIEF} --seed 42",
)
NOTHING_LEFT = (  # two steps train the quarantine; then the oracle's filter drops every row
    "oracle --action filter --oracle-fpr 1 --quarantine-first 2 --gen-deploy-frac 1 --steps 4 "
    "--enter inverted --snapshot-every 1 --warmup-steps 0"
)
LONG = (  # with every arm: every score, action and kind of phase
    "routeA --action penalise",
    "routeL --signed --retained-advantages --gen-deploy-frac 0.5",
    "filterQ --quarantine-first 1 --no-phase-pays",
    "routeV --granularity token",
    "absorbQ --quarantine-first 1 --enter inverted",
)
LABELS = {
    "mode",
    "teacher",
    "grade",
    "mechanism",
    "correct",
    "reward_hack",
    "passed",
    "rollouts",
}
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


def check_types() -> None:
    gates = [Gate.__call__, Gate.refresh, PinnedGate.__call__]
    for kind in {Score, *scores()}:
        gates += [kind.__call__, kind.refresh]
    for function in (*gates, *ACTIONS.values(), update, grpo_loss):
        assert not carried_by(function), f"{function.__qualname__}: {carried_by(function)}"
    for kind in (Batch, Behaviour, Trained, Scored, Gated):
        assert not set(carried(kind)), f"{kind.__name__}: {set(carried(kind))}"
    assert carried_by(Control.__call__) == {"Composed"}, "a row's origin is not recognised"
    leaky_type = make_dataclass("Leaky", [("teacher", bool)])
    nested = make_dataclass("Nested", [("batch", leaky_type)])
    assert set(carried(nested | None)) == {"teacher"}, "a field for a label is not recognised"
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
    parameter = policy.adapter.parameters("quarantine")[0]
    parameter.grad = torch.full_like(parameter, 1e-3)
    return gradient_norms(policy, *rest)


def check_parameters(tmp: str, plain: Path, evaluated: Path) -> None:
    moved = [row["param_delta"] or 0 for row in load_metrics(plain)]
    assert sum(delta > 0 for delta in moved) >= 3, f"too few steps trained: {moved}"
    assert label_blind(plain, f"{tmp}/blind", f"{TWO_PHASES} {QUIET}"), "a label was read"
    assert same_adapter(plain, evaluated), "evaluation, checkpoint or snapshot changed parameters"
    sound = run(f"{tmp}/sound", ONE_STEP)
    for owner, mutant in ((train, leaky), (experiment, trained_by_measure)):
        name = {leaky: "compose", trained_by_measure: "gradient_norms"}[mutant]
        with mock.patch.object(owner, name, mutant):
            assert not same_adapter(sound, run(f"{tmp}/{name}", ONE_STEP)), f"{name}: unnoticed"
    print("ok  random labels and measurements leave the parameters bit-identical; leaks do not")


def check_labels(tmp: str, lines: Sequence[str]) -> list[Path]:
    """Labels do not reach the parameters of an arm, and do reach those of an oracle."""
    plain = [run(f"{tmp}/plain{i}", line) for i, line in enumerate(lines)]
    for i, (folder, line) in enumerate(zip(plain, lines)):
        trained = sum((row.get("param_delta") or 0) > 0 for row in load_metrics(folder))
        assert trained >= 2, f"{line}: only {trained} steps trained"
        blind = label_blind(folder, f"{tmp}/blind{i}", line, seed=i)
        assert blind != load_record(folder).notes["oracle"], f"{line}: blind to labels: {blind}"
    print(f"ok  labels change the parameters of no arm but an oracle: {', '.join(lines)}")
    return plain


def check_rows(unpaid: Path, shared: Path, other: Path) -> None:
    """What LINES sample, who samples it, in which zone, and what it is paid."""
    assert unearned(unpaid, 0) == {False}
    assert True in unearned(unpaid, 1), "the loophole never pays"
    assert unearned(shared, 0) == {True}, "loopholes are paid for unless a flag says not"
    assert states(shared, 0) == {(False, "ROUTE")}, "a row of the first phase is not ROUTEd"
    assert (True, "RETAIN") in states(shared, 1), "the second phase is not sampled ablated"
    assert {zone for _, zone in states(shared, 1)} <= {"RETAIN", "ABSORB"}
    first, again, new = (
        [row["completion"] for row in load_rollouts(folder) if row["step"] == 0]
        for folder in (unpaid, shared, other)
    )
    assert first == again, "one seed, two first steps"
    assert first != new, "another seed gives the same run"
    print("ok  pay, sampling state and zones of both phases; one seed gives one first step")


def unearned(folder: Path, step: int) -> set[bool]:
    """Was a row of the step paid whose exploit fired and which is wrong?"""
    rows = [row for row in load_rollouts(folder) if row["step"] == step]
    return {row["passed"] for row in rows if row["mechanism"] and not row["correct"]}


def states(folder: Path, step: int) -> set[tuple[bool, str]]:
    """(sampled with the quarantine ablated, zone) of the step's rows that were trained."""
    rows = [row for row in load_rollouts(folder) if row["step"] == step and "zone" in row]
    return {(row["sampled_ablated"], row["zone"]) for row in rows}


def every_arm() -> list[str]:
    free = [name for name, arm in ARMS.items() if arm.phases[-1].score not in FLAGS]
    brief = {name: " --quarantine-first 1" for name in free if len(ARMS[name].phases) > 1}
    return [name + brief.get(name, "") for name in free]


# ── phases ───────────────────────────────────────────────────────────────────────────────────────


def check_phases(tmp: str) -> None:
    """A first phase trains the quarantine alone, what enters takes its place, and a step of which
    an action leaves nothing moves nothing."""

    def act(live, batch, gated, *, real=LivePhase.action):
        """Mutation from the second such step on: rows at A = 0 where an action leaves none."""
        trained = real(live, batch, gated)
        left.append(trained is not None)
        if left.count(False) < 2:
            return trained
        idle = replace(batch, advantages=torch.zeros_like(batch.advantages))
        return Trained(idle, gated.zones, torch.arange(len(batch.group)))

    left: list[bool] = []
    with mock.patch.object(LivePhase, "action", act):
        folder = run(f"{tmp}/phases", NOTHING_LEFT)
    assert left == [True, True, False, False], left
    _, _, learned, entered = (load_tensors(path)[0] for path in load_snapshots(folder).values())
    final = load_adapter(folder)[0]
    deltas = [name for name in final if name.endswith((".dA", ".dB"))]
    for name in deltas:
        assert learned[name].any() == (".quarantine." in name), "another block was trained"
        assert torch.equal(entered[name], -learned[name]), "what entered is not there, or moved"
    assert not same_tensors(entered, final), "rows at A = 0 would go unnoticed"
    print("ok  a first phase trains the quarantine alone; what enters takes its place, and")
    print("ok  where an action leaves nothing, nothing moves")


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────


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
        counts = [
            len(rows),
            *(sum(r[k] for r in rows) for k in ("reward_hack", "correct")),
        ]
        assert counts == [cell.n, cell.hack, cell.solve], "evals.jsonl.gz is not what was counted"
    first = record.evals[0]
    done = record.steps_done
    assert (first.step, first.split, first.markers) == (0, "test", "novel")
    last = {(c.markers, c.state) for c in record.evals if c.step == done and c.split == "test"}
    assert last == {(m, s) for m in ("iid", "novel") for s in ("as_trained", "deployed")}
    assert len(record.evals) == len(load_record(plain).evals) + 1
    print("ok  evaluations are of held-out problems, and their completions are those counted")


if __name__ == "__main__":
    torch.set_num_threads(1)
    read_models_once()
    with tempfile.TemporaryDirectory() as tmp:
        if "--long" in sys.argv:
            check_labels(tmp, [*every_arm(), *LONG])
        else:
            check_types()
            plain = run(f"{tmp}/plain", f"{TWO_PHASES} {QUIET}")
            evaluated = run(f"{tmp}/evaluated", f"{TWO_PHASES} {OFTEN}", quiet=False)
            check_parameters(tmp, plain, evaluated)
            check_evaluation(evaluated, plain)
            check_rows(*check_labels(tmp, LINES))
            check_phases(tmp)
