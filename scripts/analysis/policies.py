"""Probes of a trained policy: scaled, stopped early, without a block, or pushed.

All rates are of held-out test problems with novel markers; `scripts.analysis.after` has the
commands.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from scripts.experiments.records import BOTH, cell, share
from scripts.experiments.reopen import Stored, finished, reopen
from scripts.view import plot
from scripts.view.output import show
from torch import Tensor

from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.env.problems import messages
from vgrout.env.rollouts import stream
from vgrout.experiment import sampling_of
from vgrout.files import load_tensors
from vgrout.gate.swap import logps_with
from vgrout.grader import Grader
from vgrout.model.batch import Batch
from vgrout.model.likelihood import random_deltas
from vgrout.model.sampling import sample
from vgrout.model.tokens import collate, encode_prompt
from vgrout.run.audit import scaled
from vgrout.run.evaluate import seeded
from vgrout.run.records import load_snapshots
from vgrout.stats import above_frontier, bootstrap_interval, frontier_solve

ROWS_A_PROMPT = 4  # samples of the base
RANDOM_PUSHES = (1, 2, 3)  # seeds of Gaussian quarantines
Row = dict[str, object]
Measure = Callable[..., Row]  # name → the run's names and the rates of its present policy


def rates(result: EvalResult) -> Row:
    """n, hack and solve with 95 % intervals over problems, and the counts by problem."""
    row: Row = {"n": result.n, "by_problem": result.by_problem}
    for which in BOTH:
        low, high = bootstrap_interval(result.by_problem, which)
        row[which] = share(result, which)
        row |= {f"{which}_low": low, f"{which}_high": high}
    return row


def named(path: Path, record: RunRecord) -> Row:
    return {"run": str(path), "arm": record.arm, "seed": record.seed}


@contextmanager
def opened(path: Path, draws: int) -> Iterator[tuple[Stored, Measure]]:
    """A run at its initialisation, and what measures its present policy; 0 draws: its own."""
    run = reopen(path, ended=False)
    count = draws or run.config.run.final_draws
    with Grader(run.config.run.workers) as grader:

        def measure(name: str, ablated: bool = False, **columns: object) -> Row:
            result = run.cell(grader, name, ablated, count)
            return named(path, run.record) | columns | rates(result)

        yield run, measure


def each(options: Namespace) -> Iterator[tuple[Stored, Measure]]:
    """The finished runs in turn, as trained."""
    for path in options.runs:
        finished(path)
    for path in options.runs:
        with opened(path, options.draws) as (run, measure):
            run.load()
            yield run, measure


# ── frontier: the shrinkage null ─────────────────────────────────────────────────────────────────


def null_points(path: Path, options: Namespace) -> Iterator[Row]:
    """A run as trained: its final adapter scaled, and every snapshot but the base's."""
    with opened(path, options.draws) as (run, measure):
        run.load()
        for at in sorted({0.0, 1.0, *options.scales}):
            with scaled(run.policy.adapter, at):
                yield measure(f"scale {at}", kind="scale", at=at)
        for step, file in load_snapshots(path).items():
            if step > 0:
                run.load(load_tensors(file)[0])
                yield measure(f"step {step}", kind="step", at=float(step))


def placed(path: Path, record: RunRecord, points: list[Row]) -> Row:
    """A deployed policy beside the points."""
    result = cell(record)
    try:
        distance = above_frontier(result.by_problem, [p["by_problem"] for p in points])
    except ValueError as error:
        differ = f"{path} and --against are counted on different problems ({error})"
        raise UserError(f"{differ}: set --draws {result.n}") from None
    row = named(path, record) | rates(result)
    row |= dict(zip(("above", "above_low", "above_high"), distance))
    return row


def frontier(options: Namespace) -> None:
    """How far each deployed policy lies above what plain GRPO offers for less training."""
    records = {path: finished(path) for path in options.runs}
    for path in options.against:
        arm = finished(path).arm
        load_snapshots(path)
        if arm != "none2r":
            raise UserError(f"{path} is {arm}, not none2r: the shrinkage null is plain GRPO's")
    points = [point for path in options.against for point in null_points(path, options)]
    show(points, options.out / "frontier_points.csv")
    rows = [placed(path, record, points) for path, record in records.items()]
    print("\ndeployed policies; above: solve minus the frontier's at the same hack rate")
    show(rows, options.out / "frontier.csv")
    draw_frontier(points, rows, options.out / "frontier.png")


def draw_frontier(points: list[Row], rows: list[Row], path: Path) -> None:
    figure, axis = plot.panel("hack rate, novel markers", "solve rate")
    offered = [(point["hack"], point["solve"]) for point in points]
    most = max(row["hack"] for row in points + rows)
    grid = np.linspace(0, most + 0.02, 200)
    axis.plot(grid, frontier_solve(grid, offered), color="0.5", label="their envelope")
    axis.plot(
        *zip(*offered),
        "o",
        color="0.65",
        markersize=4,
        label="plain GRPO, less of it",
    )
    for place, row in enumerate(rows):
        name = f"{row['arm']} s{row['seed']}"
        axis.plot(
            row["hack"],
            row["solve"],
            "D",
            color=plot.colour_of(place),
            label=name,
        )
    plot.save(figure, path)


# ── forget ───────────────────────────────────────────────────────────────────────────────────────


def forget(options: Namespace) -> None:
    """The quarantine's delta scaled beside the deployed block, and alone."""
    states = [(1.0, scale) for scale in sorted({0.0, 1.0, *options.scales})]
    rows = []
    for run, measure in each(options):
        adapter = run.policy.adapter
        for own, beside in [*states, (0.0, 1.0)]:
            with scaled(adapter, own, ("deployed",)), scaled(adapter, beside, ("quarantine",)):
                rows.append(measure("forget", deployed=own, quarantine=beside))
    show(rows, options.out / "forget.csv")


# ── push: how far a quarantine moves the base ────────────────────────────────────────────────────


def base_samples(run: Stored, prompts: int) -> Batch:
    """Completions of the base, `group` numbering their prompts."""
    policy, seed = run.policy, run.config.run.seed
    shown = stream(run.splits["train"], 0, prompts, seed)
    ids = [encode_prompt(policy.tokenizer, messages(prompt.problem)) for prompt in shown]
    how = asdict(replace(sampling_of(run.config), top_p=1.0))
    generator = seeded(policy, "push", seed)
    with scaled(policy.adapter, 0.0):
        drawn = sample(
            policy,
            ids,
            [ROWS_A_PROMPT] * prompts,
            generator=generator,
            **how,
        )
    group = [i for i, rows in enumerate(drawn) for _ in rows]
    completions = [completion for rows in drawn for completion, _ in rows]
    zeros, repeated = [0.0] * len(group), [ids[i] for i in group]
    return collate(
        repeated,
        completions,
        zeros,
        group,
        zeros,
        policy.pad_id,
        policy.device,
    )


def push_of(run: Stored, batch: Batch, deltas: list[Tensor]) -> dict[str, float]:
    """`push` and `push_error` of a quarantine of these deltas, in nats a token.

    The mean over tokens of exp(d) − 1 − d, d = log p_quarantine − log p_base (k3,
    http://joschu.net/blog/kl-approx.html), on the base's own samples; ± the standard error over
    prompts. The deployed block plays no part.
    """
    T = run.config.grpo.temperature
    base = logps_with(run.policy, [torch.zeros_like(d) for d in deltas], batch, T)
    d = logps_with(run.policy, deltas, batch, T) - base
    k3 = (d.expm1() - d) * batch.completion_mask
    empty = torch.zeros(int(batch.group.max()) + 1)
    group = batch.group.cpu()
    by_row = (x.sum(1).float().cpu() for x in (k3, batch.completion_mask))
    total, tokens = (empty.index_add(0, group, x) for x in by_row)
    mean = total.sum() / tokens.sum()
    spread = (total - mean * tokens).std() / len(tokens) ** 0.5  # of a ratio of sums
    return {
        "push": float(mean),
        "push_error": float(spread / tokens.mean()),
    }


def push(options: Namespace) -> None:
    """At every snapshot: the push of the quarantine, of Gaussian ones of its norm, and its rates.

    The norms are those of every tensor, as `placebo_absorbQ` trains with one; hack and solve are
    of the quarantine alone.
    """
    snapshots = {path: load_snapshots(path) for path in options.runs}
    rows = []
    for path, files in snapshots.items():
        with opened(path, options.draws) as (run, measure):
            batch, adapter = (
                base_samples(run, options.prompts),
                run.policy.adapter,
            )
            for step, file in files.items():
                run.load(load_tensors(file)[0])
                learned = [p.detach().clone() for p in adapter.parameters("quarantine")]
                place = {"step": step, "quarantine": "learned"}
                with scaled(adapter, 0.0, ("deployed",)):
                    alone = measure(f"push {step}", **place)
                rows.append(alone | push_of(run, batch, learned))
                for seed in RANDOM_PUSHES if any(d.any() for d in learned) else ():
                    place = {
                        "step": step,
                        "quarantine": f"random {seed}",
                    }
                    pushed = push_of(run, batch, random_deltas(learned, seed))
                    rows.append(named(path, run.record) | place | pushed)
    show(rows, options.out / "push.csv")
