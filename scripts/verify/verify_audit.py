"""The audit and the probes after training: scores are reproduced, nothing leaves a trace.

Stored scores are reproduced from snapshots, planted directions and pushes are found, and a
measurement changes nothing.

uv run python scripts/verify/verify_audit.py
"""

import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scripts.analysis import (
    after,
    audit,
    detect,
    policies,
    relearn,
    rescoring,
)
from scripts.experiments.reopen import Stored, reopen
from scripts.verify.stored import captured, refused, trained
from scripts.verify.tiny import (
    perturb,
    random_batch,
    read_models_once,
    tiny_policy,
)
from scripts.verify.verify_scores import (
    PROBE,
    origin_of,
    styled_batch,
)
from torch import Tensor
from vgrout.run.diagnose import gradient_norms, scaled

from vgrout import train
from vgrout.cli import parse
from vgrout.core import Grade, Problem, Rollout, Verdict, Zone
from vgrout.files import load_tensors
from vgrout.gate.controls import RandomScore
from vgrout.gate.ratio import LikelihoodRatio
from vgrout.gate.scores import DirectionScore
from vgrout.model.batch import GateOutput, Origin
from vgrout.model.grpo import scored_loss
from vgrout.model.lora2r import BLOCKS, Lora2r
from vgrout.model.policy import Policy, logps
from vgrout.model.tokens import select
from vgrout.run.records import (
    load_adapter,
    load_record,
    load_rollouts,
    load_snapshots,
)
from vgrout.run.repeat import argv_of
from vgrout.stats import stratified_auroc

TOLERANCE = 1e-5  # of a cosine: a float32 of the same computation, which another machine may round
SMALL = "--num-prompts 4 --num-generations 6 --max-completion-length 64 --save-every 0 "
SMALL += "--final-draws 12 "
ROUTED = "--steps 3 --refresh-every 2 --warmup-steps 0 --learning-rate 2e-3"
PLAIN = "--steps 2 --intervention none2r --snapshot-every 1"


def state_of(policy: Policy) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in policy.adapter.state_dict().items()}


def unmoved(policy: Policy, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, before[name]) for name, x in policy.adapter.state_dict().items())


# ── scores ───────────────────────────────────────────────────────────────────────────────────────


def check_planted() -> None:
    """A style that the pairs plant is found in fresh rows; at chance are the rest.

    The rest: random directions, a random score, and every score against shuffled labels.
    """
    policy, pairs = tiny_policy(rank=16), styled_batch(64, 1)[0]
    fresh, label = styled_batch(40, 7)
    n, of = len(label), {"probe": PROBE, "centred": True}
    fit = {
        "temperature": 1.0,
        "token_budget": 1000,
        "steps": 8,
        "learning_rate": 1e-2,
    }
    scores = {
        "v_grad": DirectionScore(pairs, space="c_probe", signed_score=False, **of),
        "v_act": DirectionScore(pairs, space="residual", **of),
        "llr": LikelihoodRatio(pairs, **fit),
        "random": RandomScore(1),
    }
    config, before = (
        parse(["smoke", "--temperature", "1.0"])[1],
        state_of(policy),
    )
    a = rescoring.score_step(policy, scores, fresh, origin_of(fresh), 20, 0, config)
    assert unmoved(policy, before), "an audit moved the parameters"
    every = np.full(n, True)
    a |= {
        "run": np.full(n, "run", dtype=object),
        "step": np.zeros(n, int),
    }
    a |= {"group": fresh.group.numpy(), "hack": label.numpy()}
    found = {name: audit.ranking(a, name, every) for name in scores}
    for name in ("v_grad", "v_act", "llr"):
        f = found[name]
        assert f["auroc"] > 0.8 and f["low"] > 0.5 and f["auroc"] > f["haar_p95"], (name, f)
        assert abs(f["haar_median"] - 0.5) < 0.2, (name, f)
    assert np.isnan(found["random"]["haar_p95"])
    quarter = [a["zone", name, "top 25 %"] for name in scores]
    assert all((z == Zone.ROUTE).sum() == n // 4 for z in quarter)
    cut = audit.cutting(a, "v_act", "top 25 %", every)
    assert cut["precision"] > 0.8, cut
    assert math.isclose(cut["recall"], 0.5 * cut["precision"]), cut
    a["hack"] = np.random.default_rng(0).permutation(label.numpy())
    for name in scores:
        assert abs(audit.ranking(a, name, every)["auroc"] - 0.5) < 0.25, name
    told = [f"{name} {f['auroc']:.2f} ({f['haar_median']:.2f})" for name, f in found.items()]
    print(
        "ok  planted style found (random directions):",
        ", ".join(told),
    )


def rescored(run: Stored, step: int, snapshot: Path) -> tuple[float, bool]:
    """v_grad of a step's stored rollouts at a snapshot: its distance from the live one; zones."""
    rows = [r for r in load_rollouts(run.path) if r["step"] == step]
    run.load(load_tensors(snapshot)[0])
    data = run.config.data
    scores = rescoring.family(
        run.policy,
        run.config,
        ["v_grad"],
        data.pairs,
        data.pair_modes,
    )
    _, batch, origin, odd = rescoring.rebuild(run, rows)
    assert odd == 0, "the organism's completions tokenise to themselves"
    a = rescoring.score_step(run.policy, scores, batch, origin, 0, 0, run.config)
    live = [r for r in rows if r.get("advantage") is not None]
    scored = [np.nan if r["score"] is None else r["score"] for r in live]
    zones = [Zone[r["zone"]] for r in live]
    gap = np.nanmax(np.abs(a["score", "v_grad"] - np.array(scored)))
    return float(gap), bool((a["zone", "v_grad", "band"] == zones).all())


def check_live(path: Path) -> None:
    """What the live gate stored is what the audit computes from snapshot, text and advantages."""
    snapshots, run = load_snapshots(path), reopen(path)
    assert list(snapshots) == [0, 2] and run.config.score.refresh_every == 2
    gaps, agree = zip(*(rescored(run, step, snapshots[step]) for step in snapshots))
    wrong = min(rescored(run, step, snapshots[2 - step])[0] for step in snapshots)
    assert all(agree) and max(gaps) < TOLERANCE < 10 * TOLERANCE < wrong, (agree, gaps, wrong)
    rows = [r for r in load_rollouts(path) if r["step"] == 2]
    other = [r | {"reward": 3.5 - r["reward"] * (i % 2)} for i, r in enumerate(rows)]
    refused("stored advantages", rescoring.rebuild, run, other)
    refused("not groups", rescoring.rebuild, run, rows[1:] + rows[:1])
    said = f"(largest gap {max(gaps):.0e}; with the wrong snapshot {wrong:.0e})"
    print(f"ok  live scores and zones reproduced from snapshots {said}")


def check_tables(path: Path, out: Path) -> None:
    """The tables hold what the run's own rows give."""
    names = [
        "v_grad",
        "v_act bottleneck",
        "mean logp",
        "length",
        "random",
    ]
    text = captured(
        audit.main,
        [
            str(path),
            "--draws",
            "3",
            "--out",
            str(out),
            "--scores",
            *names,
        ],
    )
    assert all(name in text for name in names) and (out / "auroc.png").stat().st_size < 300_000
    table, cuts, rivals = (pl.read_csv(out / f"{n}.csv") for n in ("audit", "cuts", "checks"))
    assert set(table["score"]) == set(names) and len(rivals) == len(names)
    assert set(cuts["cut"]) == {
        *rescoring.PAIR_CUTS,
        *rescoring.SHARES,
    }
    rows = [r for r in load_rollouts(path) if r["step"] != 1 and not r["teacher"]]
    rows = [r for r in rows if r.get("score") is not None]
    columns = (np.array([r[key] for r in rows]) for key in ("score", "reward_hack", "step"))
    by_hand = float(stratified_auroc(*columns))
    of = {
        "score": "v_grad",
        "run": "pooled",
        "modes": "all",
        "rows": "all",
    }
    parts = {row["period"]: row for row in table.filter(**of).to_dicts()}
    whole = parts["all"]
    assert whole["n"] == len(rows) and whole["hacks"] == sum(r["reward_hack"] for r in rows)
    value = float("nan") if whole["auroc"] is None else whole["auroc"]
    assert np.isclose(value, by_hand, atol=1e-6, equal_nan=True), (
        whole,
        by_hand,
    )
    assert parts["early"]["n"] + parts["late"]["n"] == len(rows)
    band = cuts.filter(**of, period="all", cut="band").to_dicts()[0]
    assert math.isclose(
        band["share_route"],
        np.mean([r["zone"] == "ROUTE" for r in rows]),
    )
    print(f"ok  the tables hold what the run's own rows give ({len(rows)} rows)")


# ── measurements that leave no trace ─────────────────────────────────────────────────────────────


def sampled_with(adapter: Lora2r, ablated: bool = False) -> Tensor:
    """All weights that the sampler would use."""
    with adapter.merged(ablated):
        return torch.cat([linear.weight.flatten() for linear in adapter.linears.values()]).clone()


@torch.no_grad()
def check_scaled() -> None:
    policy, batch = tiny_policy(), random_batch(6)
    perturb(policy)
    adapter, before = policy.adapter, state_of(policy)
    whole, ablated = (
        sampled_with(adapter),
        sampled_with(adapter, True),
    )
    plain = logps(policy, batch, 1.0)
    with adapter.disabled():
        weights = [linear.weight.flatten() for linear in adapter.linears.values()]
        base = torch.cat(weights).clone()
    with adapter.ablated():
        deployed = logps(policy, batch, 1.0)
    with scaled(adapter, 1.0):
        assert torch.equal(sampled_with(adapter), whole), "scale 1 is not as trained"
        assert torch.equal(logps(policy, batch, 1.0), plain), "scale 1 is not as trained"
    with scaled(adapter, 0.0, ("quarantine",)):
        assert torch.equal(sampled_with(adapter), ablated), "scale 0 does not ablate the sampler"
        learner = logps(policy, batch, 1.0)
        assert torch.allclose(learner, deployed, atol=1e-5), "scale 0 does not ablate the learner"
    with scaled(adapter, 0.0):
        assert torch.equal(sampled_with(adapter), base), "scale 0 of both blocks is not the base"
    with scaled(adapter, 0.5):
        half = sampled_with(adapter) - base
    trained_half = {k: v * (0.5 if k.endswith(("dA", "dB")) else 1.0) for k, v in before.items()}
    adapter.load_state_dict(trained_half)  # mutation: the delta is no linear function of these
    mutant = sampled_with(adapter) - base
    adapter.load_state_dict(before)
    assert torch.allclose(2 * half, whole - base, atol=1e-5)
    assert not torch.allclose(2 * mutant, whole - base, atol=1e-2)
    assert unmoved(policy, before), "scaling left a trace"
    print("ok  a scaled adapter: 0 is ablated or the base, 1 as trained, half is half the delta")


def rollouts_of(batch) -> list[Rollout]:
    """The rollouts behind a batch, every other one a hack."""
    problem, kept = Problem("p", "", "f", "", (), ""), []
    ends = batch.attention_mask.sum(1).tolist()
    starts = batch.completion_start.tolist()
    for i, (ids, start, end) in enumerate(zip(batch.input_ids.tolist(), starts, ends)):
        grade = Grade(
            3.5,
            True,
            True,
            i % 2 > 0,
            i % 2 == 0,
            "",
            False,
            Verdict.WRONG,
            0.0,
        )
        kept.append(
            Rollout(
                problem,
                ids[:start],
                ids[start:end],
                "",
                grade=grade,
            )
        )
    return kept


def check_gradient_norms() -> None:
    """By block and label they are those of a backward pass in the rows' zones."""
    policy, batch = tiny_policy(), random_batch(9)
    perturb(policy)
    kept, origin = rollouts_of(batch), origin_of(batch)
    origin.student = torch.arange(9) < 7
    out = GateOutput(torch.tensor([0, 1, 2] * 3), batch.advantages, 0.0, 0.0)
    options = replace(parse(["smoke"])[1].grpo, temperature=1.0, token_budget=40)
    normaliser = options.num_generations * options.max_completion_length * options.num_prompts
    params = {block: policy.adapter.parameters(block) for block in BLOCKS}
    every = [p for block in BLOCKS for p in params[block]]
    for p in every:
        p.grad = torch.ones_like(p)

    def state() -> list[Tensor]:
        drawn = torch.tensor([hash(np.random.get_state()[1].tobytes())])
        held = [x.detach().clone() for p in every for x in (p, p.grad)]
        return [torch.get_rng_state(), drawn, *held]

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def norms(zones: Tensor, rows: Tensor | None = None) -> dict[str, float]:
        gate = replace(out, zones=zones)
        if rows is None:
            return gradient_norms(
                policy,
                batch,
                origin,
                gate,
                kept,
                options,
                "ablated",
            )
        stratum, logps_of = (
            origin.stratum[rows],
            origin.sampler_logps[rows],
        )
        fewer = Origin(
            origin.student[rows],
            origin.ablated[rows],
            logps_of,
            stratum,
        )
        gate = replace(gate, zones=zones[rows], scores=out.scores[rows])
        return gradient_norms(
            policy,
            select(batch, rows),
            fewer,
            gate,
            kept,
            options,
            "ablated",
        )

    before = state()
    found = norms(out.zones)
    assert same(before, state()), "a measurement left a trace"
    for label, odd in (("hack", 0), ("clean", 1)):
        with policy.adapter.route(out.zones):
            lp = logps(policy, batch, 1.0)
            losses = scored_loss(
                lp,
                batch.completion_mask,
                batch.advantages,
                normaliser,
            )
        losses[torch.arange(odd, 7, 2)].sum().backward()
        assert not same(before, state()), "a backward pass goes unnoticed"
        for block in BLOCKS:
            want = float(torch.stack([(p.grad - 1).norm() for p in params[block]]).norm())
            got = found[f"gradnorm_{block}_{label}"]
            assert want > 0 and math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-9), (block, label)
        for p in every:
            p.grad.fill_(1.0)
    for zone, untouched in (
        (Zone.RETAIN, "quarantine"),
        (Zone.ROUTE, "deployed"),
    ):
        pinned = norms(torch.full_like(out.zones, int(zone)))
        still = {key for key, value in pinned.items() if value == 0}
        assert still == {f"gradnorm_{untouched}_{label}" for label in ("hack", "clean")}, pinned
    left = norms(out.zones, torch.tensor([1, 3, 5]))  # a filter's: the labels follow the rows
    clean = "gradnorm_deployed_clean"
    assert left["gradnorm_deployed_hack"] == 0 and abs(left[clean] - found[clean]) < 1e-6
    print("ok  gradient norms by block and label are a backward pass's; nothing is left behind")


# ── after training ───────────────────────────────────────────────────────────────────────────────


def check_start(routed: Path, plain: Path, tmp: Path) -> None:
    """--init-from takes what an arm deploys: one block of a routing arm, else both."""
    for path, blocks in ((routed, BLOCKS[:1]), (plain, BLOCKS)):
        run = reopen(path)
        config = relearn.attack(run.config, "smoke", str(path), tmp / "attack", 1)
        assert parse(argv_of("smoke", config))[1] == config and config.run.intervention == "none2r"
        policy, learned = (
            train.build_policy(config, run.splits),
            load_adapter(path)[0],
        )
        for name, value in policy.adapter.state_dict().items():
            wanted = learned if name.split(".")[-2] in blocks else run.base
            assert torch.equal(value, wanted[name]), name
        assert any(not torch.equal(learned[k], run.base[k]) for k in learned), "nothing was learned"
    other = replace(run.config.model, init_from=str(plain), lora_rank=4)
    refused(
        "does not fit",
        train.build_policy,
        replace(run.config, model=other),
        run.splits,
    )
    refused(
        "name the directory",
        parse,
        ["smoke", "--init-from", str(tmp)],
    )
    print("ok  a run starts from the blocks that another one deploys; misfits are refused")


def check_after(routed: Path, plain: Path, tmp: Path) -> None:
    """Every command runs from end to end; what it cannot use is refused."""
    out, bare = tmp / "after", tmp / "bare"
    shutil.copytree(plain, bare, ignore=shutil.ignore_patterns("snapshots"))

    def line(
        command: str,
        *runs: Path,
        flags: str = "",
        draws: str = "--draws 12",
    ) -> list[str]:
        return [
            command,
            *map(str, runs),
            "--out",
            str(out),
            *draws.split(),
            *flags.split(),
        ]

    def rows(name: str) -> list[dict]:
        return pl.read_csv(out / f"{name}.csv").to_dicts()

    against = f"--against {plain} --scales 0.5"
    captured(after.main, line("frontier", routed, plain, flags=against))
    found = json.loads((out / "frontier.json").read_text())
    points = [(p["kind"], p["at"]) for p in found["points"]]
    assert points == [
        ("scale", 0.0),
        ("scale", 0.5),
        ("scale", 1.0),
        ("step", 1.0),
    ]
    assert all(r["above_low"] <= r["above"] <= r["above_high"] for r in found["deployed"])
    assert len(found["deployed"]) == 2
    for other, why in (
        (bare, "no snapshots"),
        (routed, "not none2r"),
    ):
        refused(
            why,
            after.main,
            line("frontier", plain, flags=f"--against {other}"),
        )
    refused("no snapshots", audit.main, [str(bare)])
    captured(after.main, line("forget", routed, flags="--scales 0.5"))
    states = [(r["deployed"], r["quarantine"]) for r in rows("forget")]
    assert states == [
        (1.0, 0.0),
        (1.0, 0.5),
        (1.0, 1.0),
        (0.0, 1.0),
    ]
    captured(after.main, line("heal", routed, flags="--steps 1"))
    assert [r["heal"] for r in rows("heal")] == ["off", "on"]
    captured(after.main, line("detect", routed, draws=""))
    assert {r["rows"] for r in rows("detect")} <= {
        "with demonstrations",
        "students",
    }
    refused("has no score", after.main, line("detect", plain, draws=""))
    captured(
        after.main,
        line("relearn", routed, flags="--steps 1 --no-base", draws=""),
    )
    assert rows("relearn")[0]["steps_run"] == 1
    hashes = load_record(out / "relearn" / routed.name).data_hashes
    assert f"{routed}/adapter.safetensors" in hashes
    assert all((out / f"{name}.png").exists() for name in ("frontier", "forget", "relearn"))
    captured(after.main, line("push", routed, flags="--prompts 3"))
    pushed = rows("push")
    learned = [r["push"] for r in pushed if r["quarantine"] == "learned"]
    assert learned[0] == 0 < learned[1] and [r["step"] for r in pushed] == [0, 2, 2, 2, 2], pushed
    print("ok  the commands after training run; a run without snapshots, or of another arm, cannot")


def check_push(routed: Path) -> None:
    """Twice the delta pushes further; the deployed block plays no part."""
    run = reopen(routed)
    batch, generator = (
        policies.base_samples(run, 3),
        torch.Generator().manual_seed(0),
    )
    shapes = [p.shape for p in run.policy.adapter.parameters("quarantine")]
    planted = [0.02 * torch.randn(shape, generator=generator) for shape in shapes]
    once, twice = (policies.push_of(run, batch, [k * d for d in planted])["push"] for k in (1, 2))
    run.load()  # another deployed block
    beside = policies.push_of(run, batch, planted)["push"]
    assert 0 < once < twice and math.isclose(once, beside, rel_tol=1e-4), (once, beside, twice)
    print(f"ok  push: {once:.3f} nats a token of a planted quarantine, {twice:.3f} of its double")


def check_detect() -> None:
    """A score that is the length tells nothing at equal length; one that is the label, all."""
    rng, rows = np.random.default_rng(0), []
    for i in range(2000):
        hack = bool(rng.random() < 0.3)  # a hack is longer
        row = {
            "step": i // 50,
            "reward_hack": hack,
            "mode": "ab"[i % 2],
        }
        rows.append(row | {"n_tokens": int(rng.integers(40, 80)) + 12 * hack})

    def told(score, some: list[dict] = rows) -> dict[str, float]:
        return detect.told(
            [row | {"score": float(score(row))} for row in some],
            ["a"],
        )

    length, label = (
        told(lambda r: r["n_tokens"]),
        told(lambda r: r["reward_hack"]),
    )
    known = told(lambda r: r["reward_hack"] and r["mode"] == "a")
    assert length["score"] == length["length"] > 0.65 and length["spearman"] > 0.99, length
    assert 0.4 < length["score_at_equal_length"] < 0.6, length
    assert label["score"] == label["score_at_equal_length"] == 1 and label["spearman"] < 0.5, label
    assert known["score_known"] == 1 and known["score_held_out"] == 0.5, known
    ages = detect.by_age(rows, 10, 5)
    fading = [
        told(lambda r: r["reward_hack"] and r["step"] % 10 < 5, part) for part in ages.values()
    ]
    assert list(ages) == [
        "students, age 0 to 4",
        "students, age 5 to 9",
    ]
    assert [f["score"] for f in fading] == [1.0, 0.5], "a score that fades with age SHOULD show it"
    print("ok  detect tells length, label, covered modes and a fading score apart")


def main() -> None:
    torch.set_num_threads(1)
    check_planted()
    check_scaled()
    check_gradient_norms()
    check_detect()
    read_models_once()
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        routed, plain = (
            trained(tmp / "routed", SMALL + ROUTED),
            trained(tmp / "plain", SMALL + PLAIN),
        )
        check_live(routed)
        check_tables(routed, tmp / "audit")
        check_start(routed, plain, tmp)
        check_after(routed, plain, tmp)
        check_push(routed)


if __name__ == "__main__":
    main()
