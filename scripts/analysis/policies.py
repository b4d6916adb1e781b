"""Probes of a trained policy: scaled, stopped early, without a block, pushed, or healed.

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
from scripts.analysis.results import cell as final_cell
from scripts.experiments.reopen import Stored, reopen
from scripts.view import plot
from scripts.view.output import show
from torch import Tensor

from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.env import pairs
from vgrout.env.problems import messages
from vgrout.env.rollouts import pair_batch, stream
from vgrout.experiment import sampling_of
from vgrout.files import load_tensors
from vgrout.gate.swap import logps_with
from vgrout.grader import Grader
from vgrout.model.batch import Batch
from vgrout.model.likelihood import likelihood_steps, random_deltas
from vgrout.model.sampling import sample
from vgrout.model.tokens import collate, encode_prompt, select
from vgrout.run.audit import scaled
from vgrout.run.evaluate import seeded
from vgrout.run.records import (
    load_record,
    load_rollouts,
    load_snapshots,
)
from vgrout.stats import (
    above_frontier,
    bootstrap_interval,
    frontier_solve,
    leakage,
)

ROWS_A_PROMPT = 4  # samples of the base
RANDOM_PUSHES = (1, 2, 3)  # seeds of Gaussian quarantines
Measure = Callable[..., dict]  # name → rates of the present policy


def rates(cell: EvalResult) -> dict:
    """n, hack and solve with 95 % intervals over problems, and the counts by problem."""
    out: dict = {"n": cell.n, "by_problem": cell.by_problem}
    for which in ("hack", "solve"):
        low, high = bootstrap_interval(cell.by_problem, which)
        value = getattr(cell, which) / cell.n
        out |= {
            which: value,
            f"{which}_low": low,
            f"{which}_high": high,
        }
    return out


def finished(paths: list[Path]) -> dict[Path, RunRecord]:
    """Records of finished runs; UserError for one that is not."""
    records = {path: load_record(path) for path in paths}
    for path, record in records.items():
        if record.status != "finished":
            remedy = "finish it with --resume first"
            raise UserError(f"{path} has no final evaluation ({record.status}): {remedy}")
    return records


@contextmanager
def opened(path: Path, draws: int) -> Iterator[tuple[Stored, Measure]]:
    """A run at its initialisation, and what measures its present policy; 0 draws: its own."""
    run = reopen(path, finished=False)
    count = draws or run.config.run.final_draws
    with Grader(run.config.run.workers) as grader:

        def measure(name: str, ablated: bool = False) -> dict:
            return rates(run.cell(grader, name, ablated, count))

        yield run, measure


def named(run: Stored) -> dict:
    return {
        "run": str(run.path),
        "arm": run.record.arm,
        "seed": run.record.seed,
    }


# ── frontier: the shrinkage null ─────────────────────────────────────────────────────────────────


def null_points(path: Path, options: Namespace) -> Iterator[dict]:
    """A run as trained: its final adapter scaled, and every snapshot but the base's."""
    with opened(path, options.draws) as (run, measure):
        run.load()
        for at in sorted({0.0, 1.0, *options.scales}):
            with scaled(run.policy.adapter, at):
                yield (named(run) | {"kind": "scale", "at": at} | measure(f"scale {at}"))
        for step, file in load_snapshots(path).items():
            if step > 0:
                run.load(load_tensors(file)[0])
                yield (named(run) | {"kind": "step", "at": float(step)} | measure(f"step {step}"))


def hacks_before(path: str | Path, step: float = float("inf")) -> int:
    """Hack rollouts, demonstrations included, that training had seen before `step`."""
    return sum(row["reward_hack"] for row in load_rollouts(path) if row["step"] < step)


def left_over(path: Path, record: RunRecord, points: list[dict]) -> dict[str, float]:
    """`residual` (deployed − base) / (as trained − base), and `leakage` in exposure.

    Leakage is against the run without intervention that made the points.
    """
    scales = {p["at"]: p for p in points if p["kind"] == "scale"}
    base, end = scales[0.0], scales[1.0]
    deployed, trained = (final_cell(record, state=s) for s in ("deployed", "as_trained"))
    hack = deployed.hack / deployed.n
    room = trained.hack / trained.n - base["hack"]
    exposed = [(0, base["hack"])]
    for p in points:
        if p["kind"] == "step":
            exposed.append((hacks_before(p["run"], p["at"]), p["hack"]))
    exposed.append((hacks_before(end["run"]), end["hack"]))
    return {
        "residual": (hack - base["hack"]) / room if room > 0 else float("nan"),
        "leakage": leakage(hack, exposed, hacks_before(path)),
    }


def placed(path: Path, record: RunRecord, points: list[dict]) -> dict:
    """A deployed policy beside the points; its leakage is against the run of its own seed."""
    cell = final_cell(record)
    try:
        distance = above_frontier(cell.by_problem, [p["by_problem"] for p in points])
    except ValueError as error:
        differ = f"{path} and --against are counted on different problems ({error})"
        raise UserError(f"{differ}: set --draws {cell.n}") from None
    twins = [p["run"] for p in points if p["seed"] == record.seed] or [points[0]["run"]]
    own = [p for p in points if p["run"] == twins[0]]
    above = dict(zip(("above", "above_low", "above_high"), distance))
    head = {"run": str(path), "arm": record.arm, "seed": record.seed}
    return head | rates(cell) | above | left_over(path, record, own)


def frontier(options: Namespace) -> None:
    """How far each deployed policy lies above what plain GRPO offers for less training."""
    records = finished(options.runs)
    for path, record in finished(options.against).items():
        load_snapshots(path)
        if record.arm != "none2r":
            why = "the shrinkage null is plain GRPO's"
            raise UserError(f"{path} is {record.arm}, not none2r: {why}")
    points = [point for path in options.against for point in null_points(path, options)]
    show(points, options.out / "frontier_points.csv")
    rows = [placed(path, record, points) for path, record in records.items()]
    print("\ndeployed policies; above: solve minus the frontier's at the same hack rate")
    show(rows, options.out / "frontier.csv")
    draw_frontier(points, rows, options.out / "frontier.png")


def draw_frontier(points: list[dict], rows: list[dict], path: Path) -> None:
    figure, axis = plot.panel("hack rate, novel markers", "solve rate")
    hacks, solves = ([p[which] for p in points] for which in ("hack", "solve"))
    grid = np.linspace(0, max(r["hack"] for r in points + rows) + 0.02, 200)
    envelope = frontier_solve(grid, list(zip(hacks, solves)))
    axis.plot(grid, envelope, color="0.5", linewidth=1, label="their envelope")
    axis.plot(
        hacks,
        solves,
        "o",
        color="0.65",
        markersize=4,
        label="plain GRPO, less of it",
    )
    for place, row in enumerate(rows):
        error = {}
        for side, which in (("xerr", "hack"), ("yerr", "solve")):
            error[side] = [
                [row[which] - row[f"{which}_low"]],
                [row[f"{which}_high"] - row[which]],
            ]
        look = {
            "fmt": "D",
            "markersize": 5,
            "color": plot.colour_of(place),
        }
        name = f"{row['arm']} s{row['seed']}"
        axis.errorbar(row["hack"], row["solve"], **error, **look, label=name)
    plot.save(figure, path)


# ── forget, heal ─────────────────────────────────────────────────────────────────────────────────


def forget(options: Namespace) -> None:
    """The quarantine's delta scaled beside the deployed block, and alone."""
    finished(options.runs)
    states = [(1.0, scale) for scale in sorted({0.0, 1.0, *options.scales})]
    rows = []
    for path in options.runs:
        with opened(path, options.draws) as (run, measure):
            run.load()
            for deployed, quarantine in [*states, (0.0, 1.0)]:
                own = scaled(run.policy.adapter, deployed, ("deployed",))
                with (
                    own,
                    scaled(run.policy.adapter, quarantine, ("quarantine",)),
                ):
                    found = measure("forget")
                rows.append(named(run) | {"deployed": deployed, "quarantine": quarantine} | found)
    show(rows, options.out / "forget.csv")
    draw_forget(rows, options.out / "forget.png")


def draw_forget(rows: list[dict], path: Path) -> None:
    of_delta = "scale of the quarantine's delta (0: deployed)"
    figure, axis = plot.panel(of_delta, "rate, novel markers")
    for place, run in enumerate(dict.fromkeys(r["run"] for r in rows)):
        mine = [r for r in rows if r["run"] == run and r["deployed"]]
        scales = [r["quarantine"] for r in mine]
        for which, style in (("hack", "o-"), ("solve", "o--")):
            values, label = (
                [r[which] for r in mine],
                f"{Path(run).name}: {which}",
            )
            axis.plot(
                scales,
                values,
                style,
                color=plot.colour_of(place),
                label=label,
            )
    plot.save(figure, path)


def heal(options: Namespace) -> None:
    """The deployed policy before and after likelihood steps on the pairs' clean sides."""
    finished(options.runs)
    rows = []
    for path in options.runs:
        with opened(path, options.draws) as (run, measure):
            run.load()
            policy, data, grpo = (
                run.policy,
                run.config.data,
                run.config.grpo,
            )
            found = pairs.load_pairs(data.pairs, data.pair_modes)
            sides = torch.arange(2 * len(found), device=policy.device)
            clean = select(pair_batch(policy, found), sides[len(found) :])
            how = (
                options.learning_rate,
                grpo.temperature,
                grpo.token_budget,
            )
            for name, steps in (("off", 0), ("on", options.steps)):
                with scaled(policy.adapter, 1.0 - run.ablates, ("quarantine",)):
                    likelihood_steps(policy, clean, "deployed", steps, *how)
                state = {"heal": name, "heal_steps": steps}
                rows.append(named(run) | state | measure("heal", run.ablates))
    show(rows, options.out / "heal.csv")


# ── push: how far a quarantine moves the base ────────────────────────────────────────────────────


def base_samples(run: Stored, prompts: int) -> Batch:
    """Completions of the base, `group` numbering their prompts."""
    policy, seed = run.policy, run.config.run.seed
    shown = stream(run.splits["train"], 0, prompts, seed)
    ids = [encode_prompt(policy.tokenizer, messages(p.problem)) for p in shown]
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
    how = run.config.grpo.temperature, run.config.grpo.token_budget
    base = logps_with(run.policy, [torch.zeros_like(d) for d in deltas], batch, *how)
    d = logps_with(run.policy, deltas, batch, *how) - base
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
                quarantines = {"learned": learned}
                if any(d.any() for d in learned):
                    for seed in RANDOM_PUSHES:
                        quarantines[f"random {seed}"] = random_deltas(learned, seed)
                for name, deltas in quarantines.items():
                    head = named(run) | {
                        "step": step,
                        "quarantine": name,
                    }
                    rows.append(head | push_of(run, batch, deltas))
                    if name == "learned":
                        with scaled(adapter, 0.0, ("deployed",)):
                            rows[-1] |= measure(f"push {step}")
    show(rows, options.out / "push.csv")
