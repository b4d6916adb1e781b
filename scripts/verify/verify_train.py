"""The real loop on the organism, small: no label reaches the update, evaluation leaves no trace, a run resumes bit for bit.

uv run python scripts/verify/verify_train.py [--long]     (--long: the label gate alone, for every arm of the table)
"""

import contextlib
import io
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from scripts.verify.tiny import read_models_once

from vgrout import train
from vgrout.cli import parse
from vgrout.config import ARMS, Config
from vgrout.core import Mode, UserError, Verdict
from vgrout.env.problems import NOVEL_MARKERS, TRAINING_MARKERS, load_problems, split
from vgrout.run.records import (
    load_adapter,
    load_evals,
    load_metrics,
    load_record,
    load_rollouts,
    load_snapshots,
)

SMALL = "--steps 3 --num-prompts 3 --num-generations 6 --max-completion-length 64 --teacher-until 9 --final-draws 8 --save-every 0".split()
OFTEN = ["--save-every", "1", "--eval-every", "1", "--eval-draws", "6"]
TIMES = {
    "sec_refresh",
    "sec_sample",
    "sec_grade",
    "sec_score",
    "sec_update",
    "sec_step",
    "tokens_per_second",
}


def run(folder: str, *flags: str, arm: str = "routeV") -> Path:
    """One real run in this process, its output swallowed; returns its directory."""
    out = Path(folder)
    preset, config = parse(
        [
            "smoke",
            "--intervention",
            arm,
            "--out-dir",
            str(out),
            "--threads",
            "1",
            "--workers",
            "1",
            *SMALL,
            *flags,
        ]
    )
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


@contextlib.contextmanager
def unevaluated():
    """Runs that are compared by what they train: their evaluations draw one token, and no largest batch is tried before step 0. That
    neither matters the comparisons show, which are with runs that have both."""
    evaluate = train.evaluate

    def short(policy, problems, grader, sampling, **options):
        return evaluate(
            policy,
            problems,
            grader,
            replace(sampling, max_completion_length=1),
            **options | {"draws": 1},
        )

    with patched("evaluate", short), patched("worst_case", lambda *args, **options: None):
        yield


def same_adapter(a: Path, b: Path) -> bool:
    x, y = load_adapter(a)[0], load_adapter(b)[0]
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def scramble(groups: list, rng: random.Random) -> None:
    """Make every field of every Grade random, but the reward."""
    flip = lambda: rng.random() < 0.5  # noqa: E731
    for r in (r for g in groups for r in g.rollouts):
        r.grade = replace(
            r.grade, format_ok=flip(), passed=flip(), correct=flip(), reward_hack=flip(), mechanism=rng.choice(["", "x"]),
            own_tests_pass=flip(), verdict=rng.choice(list(Verdict)), seconds=rng.random(),
        )  # fmt: skip


def scrambled(seed: int):
    """`compose` on random labels; then mode and teacher metadata are random, too. The oracles' labels are those of `compose`."""
    compose, rng = train.compose, random.Random(seed)

    def composed(*args):
        groups = args[0]
        scramble(groups, rng)
        kept, batch, origin = compose(*args)
        for r in (r for g in groups for r in g.rollouts):
            r.teacher, r.sampled_ablated = rng.random() < 0.5, rng.random() < 0.5
            r.problem = replace(r.problem, mode=rng.choice(list(Mode)), marker="x")
        return kept, batch, origin

    return composed


def check_labels(tmp: str, plain: Path) -> None:
    def leaky(*args):
        """Mutation: an advantage that reads one label."""
        kept, batch, origin = compose(*args)
        if batch:
            batch.advantages = batch.advantages - 0.1 * torch.tensor(
                [float(r.grade.reward_hack) for r in kept]
            )
        return kept, batch, origin

    compose = train.compose
    with patched("compose", scrambled(0)), unevaluated():
        assert same_adapter(plain, run(f"{tmp}/scrambled")), (
            "a label, a mode or a teacher flag reached the update"
        )
    with patched("compose", leaky), unevaluated():
        assert not same_adapter(plain, run(f"{tmp}/leaky")), "the label gate cannot see a leak"
    moved = [m["param_delta"] or 0 for m in load_metrics(plain)]
    assert sum(d > 0 for d in moved) >= 2, (
        f"too few steps trained for this gate to mean something: {moved}"
    )
    print(
        "ok  randomised labels, modes and teacher flags leave the parameters bit-identical; a leaked label does not"
    )


def check_labels_of_every_arm(tmp: str) -> None:
    """Every arm that calls itself oracle-free is one, with every option that touches rollouts; every oracle is found out."""
    options = {
        "routeV": ["--granularity", "token"],
        "routeL": ["--retained-advantages", "--gen-deploy-frac", "0.5", "--signed"],
    }
    brief = {
        arm: ["--quarantine-first", "1"] for arm in ARMS if "quarantine_first" in ARMS[arm].options
    }  # their gate decides from step 1
    cases = {
        arm: [brief.get(arm, []), *([options[arm]] if arm in options else [])]
        for arm in ARMS
        if not ARMS[arm].monitor
    }
    variants = [(arm, flags) for arm in cases for flags in cases[arm]]
    free, oracles = [], []
    for i, (arm, flags) in enumerate(variants):
        plain = run(f"{tmp}/{i}_plain", *flags, arm=arm)
        steps, first = len(load_metrics(plain)), int((flags if arm in brief else [0])[-1])
        assert steps >= first + 2, (
            f"{arm}: {steps} steps, of which {first} are the first phase's: the gate decides too few"
        )
        with patched("compose", scrambled(i)):
            same = same_adapter(plain, run(f"{tmp}/{i}_scrambled", *flags, arm=arm))
        assert same != ARMS[arm].oracle, (
            f"{arm} {' '.join(flags)}: labels {'do not change' if same else 'change'} the parameters"
        )
        (oracles if ARMS[arm].oracle else free).append(" ".join([arm, *flags]))
    print(
        f"ok  labels do not reach the parameters in {len(free)} arms and options: {', '.join(free)}"
    )
    print(f"ok  and they do in those that are marked as oracles: {', '.join(oracles)}")


def check_quarantine_first(tmp: str) -> None:
    """In the first steps every row is sampled as trained and trains the quarantine; without them the score decides from the start."""
    zones = {}
    for name, first in (("first", "2"), ("scored", "0")):
        with unevaluated():
            folder = run(
                f"{tmp}/{name}",
                "--quarantine-first",
                first,
                "--gen-deploy-frac",
                "0.5",
                arm="routeQ",
            )
        rows = [r for r in load_rollouts(folder) if "zone" in r]
        zones[name] = [
            {(r["sampled_ablated"], r["zone"]) for r in rows if (r["step"] < 2) == early}
            for early in (True, False)
        ]
    assert zones["first"][0] == {(False, "ROUTE")} and any(
        ablated for ablated, _ in zones["first"][1]
    ), zones
    assert (True, "RETAIN") in zones["scored"][0], zones
    print(
        "ok  --quarantine-first: every row is sampled as trained and ROUTEd in these steps, and in no others"
    )


def check_other_quarantines(tmp: str) -> None:
    """After the same first phase the controls of absorbQ go on without the quarantine's moments, its negative, or a random one."""
    flags, found = (
        [
            "--quarantine-first",
            "2",
            "--snapshot-every",
            "1",
            "--learning-rate",
            "1e-4",
            "--warmup-steps",
            "0",
        ],
        {},
    )
    with unevaluated():
        for arm in (
            "absorbQ",
            "reset_absorbQ",
            "inverted_absorbQ",
            "placebo_absorbQ",
            "matched_absorbQ",
        ):
            folder = run(f"{tmp}/{arm}", *flags, arm=arm)
            found[arm] = [load_file(path) for path in load_snapshots(folder).values()] + [
                load_adapter(folder)[0]
            ]
    first = found["absorbQ"][2]
    trained = sorted(k for k in first if k.endswith(("dA", "dB")) and first[k].any())
    assert trained and all(".quarantine." in k for k in trained), (
        "the first phase trained another block"
    )
    assert all(
        torch.equal(first[k], snapshots[2][k]) for snapshots in found.values() for k in first
    ), "the first phases differ"
    flat = lambda tensors: torch.cat([tensors[k].flatten() for k in trained])  # noqa: E731
    alike = {
        arm: float(torch.cosine_similarity(flat(first), flat(snapshots[-1]), dim=0))
        for arm, snapshots in found.items()
    }
    assert (
        alike["absorbQ"] > 0.8 > 0.2 > abs(alike["placebo_absorbQ"])
        and abs(alike["matched_absorbQ"]) < 0.2
    ), alike
    assert alike["inverted_absorbQ"] < -0.8 < 0.8 < alike["reset_absorbQ"] < 1, alike
    last = [flat(found[arm][-1]) for arm in ("absorbQ", "reset_absorbQ")]
    assert not torch.equal(*last), (
        "a quarantine whose moments are reset goes on as if they were not"
    )
    with unevaluated():
        solver = load_rollouts(run(f"{tmp}/solver_absorbQ", *flags, arm="solver_absorbQ"))
    paid = lambda rows: {
        r["passed"] for r in rows if r["step"] < 2 and r["mechanism"] and not r["correct"]
    }
    assert paid(solver) == {False} and paid(load_rollouts(folder)) == {True}, (
        "loopholes SHOULD not pay in the solver's first phase alone"
    )
    assert any(r["reward_hack"] for r in solver if r["step"] >= 2), "and SHOULD pay after it"
    print(
        f"ok  after the same first phase: cosine of the last quarantine with it {', '.join(f'{a} {c:+.2f}' for a, c in alike.items())}"
    )


def check_evaluation(tmp: str, plain: Path, more: Path) -> None:
    """`more` is `plain` with evaluations and checkpoints during training."""
    record = load_record(plain)
    parts = {
        name: {p.problem_id for p in part}
        for name, part in split(load_problems(record.config["data"]["data"])).items()
    }
    for cell in record.evals:
        ids = set(cell.by_problem)
        assert (
            ids <= parts[cell.split]
            and not ids & parts["train"]
            and cell.n == sum(n for n, *_ in cell.by_problem.values())
        )
    wrote = {key: [r for r in load_evals(plain) if (r["step"], r["markers"], r["state"]) == key]
             for key in {(c.step, c.markers, c.state) for c in record.evals}}  # fmt: skip
    counted = lambda rows: (
        len(rows),
        sum(r["reward_hack"] for r in rows),
        sum(r["correct"] for r in rows),
    )
    kept = [
        (counted(wrote[c.step, c.markers, c.state]), (c.n, c.hack, c.solve)) for c in record.evals
    ]
    assert all(a == b for a, b in kept) and all(
        r["completion"] for rows in wrote.values() for r in rows
    ), f"evals.jsonl.gz: {kept}"
    assert counted(wrote[0, "novel", "deployed"][1:]) != kept[0][1], (
        "a completion that is not kept goes unnoticed"
    )
    first = record.evals[0]
    assert (first.step, first.split, first.markers) == (0, "test", "novel")
    cells = {(c.markers, c.state) for c in record.evals if c.step == record.steps_done}
    assert cells >= {(m, s) for m in ("iid", "novel") for s in ("as_trained", "deployed")}
    assert same_adapter(plain, more), "evaluating during training changed the parameters"
    assert len(load_record(more).evals) == len(record.evals) + 2

    def intrusive(policy, *args, **kwargs):
        """Mutation: an evaluation that leaves a trace in the parameters."""
        policy.adapter.parameters("deployed")[0].data.mul_(1.0).add_(1e-6)
        return evaluate(policy, *args, **kwargs)

    evaluate = train.evaluate
    with patched("evaluate", intrusive):
        assert not same_adapter(
            plain, run(f"{tmp}/intrusive", "--eval-every", "1", "--eval-draws", "6")
        )
    with unevaluated():
        assert same_adapter(plain, run(f"{tmp}/unmeasured", "--snapshot-every", "0")), (
            "a snapshot or its measure changed parameters"
        )

    def intrusive_norms(policy, *args):
        """Mutation: a measurement that leaves a gradient behind."""
        policy.adapter.parameters("deployed")[0].grad = torch.full_like(
            policy.adapter.parameters("deployed")[0], 1e-3
        )
        return gradient_norms(policy, *args)

    gradient_norms = train.gradient_norms
    with patched("gradient_norms", intrusive_norms), unevaluated():
        assert not same_adapter(plain, run(f"{tmp}/measured")), (
            "a measurement that leaves a trace goes unnoticed"
        )
    names = [set(pool) for pools in (TRAINING_MARKERS, NOVEL_MARKERS) for pool in pools.values()]
    assert not set.union(*names[: len(names) // 2]) & set.union(*names[len(names) // 2 :])
    print(
        "ok  evaluation uses held-out ids; it and the snapshots' measurements leave parameters and draws untouched; a trace is noticed"
    )


def check_resume(tmp: str, whole: Path) -> None:
    class Killed(BaseException):
        pass

    calls, update = [], train.update

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return update(*args)

    try:
        with patched("update", dies):
            run(f"{tmp}/killed", *OFTEN)
    except Killed:
        pass
    resumed = run(f"{tmp}/killed", *OFTEN, "--resume")
    strip = lambda rows: [{k: v for k, v in r.items() if k not in TIMES} for r in rows]  # noqa: E731
    assert same_adapter(whole, resumed) and strip(load_metrics(whole)) == strip(
        load_metrics(resumed)
    )
    assert load_record(whole).evals == load_record(resumed).evals
    with unevaluated():
        other = run(f"{tmp}/other", *OFTEN, "--seed", "42")
    assert not same_adapter(whole, other), "another seed gives the same run"
    bytes_of = lambda path: [f.read_bytes() for f in load_snapshots(path).values()]  # noqa: E731
    assert len(bytes_of(whole)) == 2 and bytes_of(whole) == bytes_of(resumed) != bytes_of(other), (
        "snapshots do not survive a resume"
    )
    for flags, words in ((["--resume"], "finished"), ([], "finished")):
        try:
            run(str(whole), *flags)
            raise AssertionError("a finished run was overwritten")
        except UserError as error:
            assert words in str(error)
    print(
        "ok  a run killed mid-step resumes to the bits of the uninterrupted one; another seed differs; a finished run is kept"
    )


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
    assert parse(["organism"])[1] == Config() and set(ARMS) >= {
        "none",
        "none2r",
        "no_loophole",
        "absorb",
        "routeV",
        "placebo",
    }
    print(
        "ok  unknown names, contradictory flags and missing files: one line each, before any work"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--long" in sys.argv:
        with tempfile.TemporaryDirectory() as tmp:
            check_labels_of_every_arm(tmp)
        sys.exit()
    check_bad_input()
    read_models_once()
    with tempfile.TemporaryDirectory() as tmp:
        plain, whole = run(f"{tmp}/plain"), run(f"{tmp}/whole", *OFTEN)
        check_labels(tmp, plain)
        check_quarantine_first(tmp)
        check_other_quarantines(tmp)
        check_evaluation(tmp, plain, whole)
        check_resume(tmp, whole)
