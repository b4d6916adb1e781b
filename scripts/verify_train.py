"""The real loop on the organism, small: no label reaches the update, evaluation leaves no trace, a run resumes bit for bit.

    uv run python scripts/verify_train.py
"""

import contextlib
import io
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from vgrout import train
from vgrout.cli import parse
from vgrout.config import ARMS, Config
from vgrout.problems import NOVEL_MARKERS, TRAINING_MARKERS, load_problems, split
from vgrout.records import load_adapter, load_metrics, load_record
from vgrout.types import Mode, UserError, Verdict

SMALL = "--steps 3 --num-prompts 3 --num-generations 6 --max-completion-length 64 --teacher-until 9 --final-draws 8 --save-every 0".split()
TIMES = {"sec_refresh", "sec_sample", "sec_grade", "sec_score", "sec_update", "sec_step", "tokens_per_second"}


def run(folder: str, *flags: str, arm: str = "routeV") -> Path:
    """One real run in this process, its output swallowed; returns its directory."""
    out = Path(folder)
    preset, config = parse(["smoke", "--intervention", arm, "--out-dir", str(out), "--threads", "1", "--workers", "1", *SMALL, *flags])
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(preset, config)
    return out


@contextlib.contextmanager
def patched(name: str, value):
    before = getattr(train, name)
    setattr(train, name, value)
    try:
        yield
    finally:
        setattr(train, name, before)


def same_adapter(a: Path, b: Path) -> bool:
    x, y = load_adapter(a)[0], load_adapter(b)[0]
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def check_labels(tmp: str, plain: Path) -> None:
    rng = random.Random(0)

    def scrambled(groups, policy, *rest):
        """The real `compose`; then every field of every Grade but the reward, and mode and teacher metadata, are random."""
        kept, batch, origin = compose(groups, policy, *rest)
        for r in (r for g in groups for r in g.rollouts):
            flip = lambda: rng.random() < 0.5  # noqa: E731
            r.grade = replace(
                r.grade, format_ok=flip(), passed=flip(), correct=flip(), reward_hack=flip(), mechanism=rng.choice(["", "x"]),
                own_tests_pass=flip(), verdict=rng.choice(list(Verdict)), seconds=rng.random(),
            )  # fmt: skip
            r.teacher, r.sampled_ablated = flip(), flip()
            r.problem = replace(r.problem, mode=rng.choice(list(Mode)), marker="x")
        return kept, batch, origin

    def leaky(groups, policy, *rest):
        """Mutation: an advantage that reads one label."""
        kept, batch, origin = compose(groups, policy, *rest)
        if batch:
            batch.advantages = batch.advantages - 0.1 * torch.tensor([float(r.grade.reward_hack) for r in kept])
        return kept, batch, origin

    compose = train.compose
    with patched("compose", scrambled):
        assert same_adapter(plain, run(f"{tmp}/scrambled")), "a label, a mode or a teacher flag reached the update"
    with patched("compose", leaky):
        assert not same_adapter(plain, run(f"{tmp}/leaky")), "the label gate cannot see a leak"
    moved = [m["param_delta"] or 0 for m in load_metrics(plain)]
    assert sum(d > 0 for d in moved) >= 2, f"too few steps trained for this gate to mean something: {moved}"
    print("ok  randomised labels, modes and teacher flags leave the parameters bit-identical; a leaked label does not")


def check_evaluation(tmp: str, plain: Path) -> None:
    record = load_record(plain)
    parts = {name: {p.problem_id for p in part} for name, part in split(load_problems(record.config["data"]["data"])).items()}
    for cell in record.evals:
        ids = set(cell.by_problem)
        assert ids <= parts[cell.split] and not ids & parts["train"] and cell.n == sum(n for n, *_ in cell.by_problem.values())
    first = record.evals[0]
    assert (first.step, first.split, first.markers) == (0, "test", "novel")
    cells = {(c.markers, c.state) for c in record.evals if c.step == record.steps_done}
    assert cells >= {(m, s) for m in ("iid", "novel") for s in ("as_trained", "deployed")}
    more = run(f"{tmp}/evaluated", "--eval-every", "1", "--eval-draws", "6")
    assert same_adapter(plain, more), "evaluating during training changed the parameters"
    assert len(load_record(more).evals) == len(record.evals) + 2

    def intrusive(policy, *args, **kwargs):
        """Mutation: an evaluation that leaves a trace in the parameters."""
        policy.adapter.parameters("deployed")[0].data.mul_(1.0).add_(1e-6)
        return evaluate(policy, *args, **kwargs)

    evaluate = train.evaluate
    with patched("evaluate", intrusive):
        assert not same_adapter(plain, run(f"{tmp}/intrusive", "--eval-every", "1", "--eval-draws", "6"))
    names = [set(pool) for pools in (TRAINING_MARKERS, NOVEL_MARKERS) for pool in pools.values()]
    assert not set.union(*names[: len(names) // 2]) & set.union(*names[len(names) // 2 :])
    print("ok  evaluation uses held-out ids and leaves parameters and training draws untouched; one that writes is noticed")


def check_resume(tmp: str, plain: Path) -> None:
    class Killed(BaseException):
        pass

    calls, update = [], train.update

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return update(*args)

    flags = ["--save-every", "1", "--eval-every", "1", "--eval-draws", "6"]
    whole = run(f"{tmp}/whole", *flags)
    try:
        with patched("update", dies):
            run(f"{tmp}/killed", *flags)
    except Killed:
        pass
    resumed = run(f"{tmp}/killed", *flags, "--resume")
    strip = lambda rows: [{k: v for k, v in r.items() if k not in TIMES} for r in rows]  # noqa: E731
    assert same_adapter(whole, resumed) and strip(load_metrics(whole)) == strip(load_metrics(resumed))
    assert load_record(whole).evals == load_record(resumed).evals
    other = run(f"{tmp}/other", *flags, "--seed", "42")
    assert not same_adapter(whole, other), "another seed gives the same run"
    for flags, words in ((["--resume"], "finished"), ([], "finished")):
        try:
            run(f"{tmp}/whole", *flags)
            raise AssertionError("a finished run was overwritten")
        except UserError as error:
            assert words in str(error)
    print("ok  a run killed mid-step resumes to the bits of the uninterrupted one; another seed differs; a finished run is kept")


def check_bad_input() -> None:
    for argv, word in (
        (["nope"], "preset"), (["organism", "--intervention", "zap"], "arm"), (["organism", "--modes", "zap"], "zap"),
        (["organism", "--intervention", "none2r", "--routeV-random-v-seed", "3"], "routeV"),
        (["organism", "--teacher-pool", "", "--teacher-modes", "run_tests"], "teacher-pool"),
        (["organism", "--data", "no.jsonl"], "no.jsonl"), (["organism", "--pairs", "no.md#mechanism"], "no.md"),
        (["organism", "--resume"], "out-dir"), (["organism", "--steps", "0"], "steps"), (["organism", "--steps", "many"], "steps"),
    ):  # fmt: skip
        try:
            parse(argv)
            raise AssertionError(f"{argv} was accepted")
        except UserError as error:
            assert word in str(error) and "\n" not in str(error), error
    assert parse(["organism"])[1] == Config() and set(ARMS) >= {"none", "none2r", "no_loophole", "absorb", "routeV", "placebo"}
    print("ok  unknown names, contradictory flags and missing files: one line each, before any work")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_bad_input()
    with tempfile.TemporaryDirectory() as tmp:
        plain = run(f"{tmp}/plain")
        check_labels(tmp, plain)
        check_evaluation(tmp, plain)
        check_resume(tmp, plain)
