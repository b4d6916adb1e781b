"""The audit and the probes after training: scores are reproduced, nothing leaves a trace.

Run: python -m scripts.verify.verify_audit [--long]     (--long: also the attack by relearning)
"""

import math
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import torch
from scripts.analysis import (
    after,
    audit,
    detect,
    relearn,
    rescoring,
)
from scripts.experiments.reopen import Stored, reopen
from scripts.verify.loop import few_problems
from scripts.verify.loop import run as train
from scripts.verify.stored import captured, refused
from scripts.verify.styled import PROBE, behind, styled_batch
from scripts.verify.tiny import planted, read_models_once, tiny_policy, trained
from torch import Tensor

from vgrout.cli import parse
from vgrout.config import GRPOConfig, with_options
from vgrout.core import Zone
from vgrout.env import problems
from vgrout.experiment import build_policy
from vgrout.files import load_tensors
from vgrout.gate.gate import Gate
from vgrout.gate.ratio import LikelihoodRatio
from vgrout.gate.v_grad import DirectionScore
from vgrout.model.batch import Trained
from vgrout.model.grpo import normaliser, scored_loss
from vgrout.model.lora2r import BLOCKS
from vgrout.model.policy import Policy, logps
from vgrout.run.audit import gradient_norms, scaled
from vgrout.run.records import (
    load_adapter,
    load_record,
    load_rollouts,
    load_snapshots,
)
from vgrout.run.repeat import argv_of
from vgrout.stats import stratified_auroc

TOLERANCE = 1e-5  # of a cosine: a float32 of the same computation, which another machine may round
ROUTED = "routeV --steps 3 --refresh-every 2 --warmup-steps 0 --learning-rate 2e-3"
PLAIN = "none2r --steps 2 --snapshot-every 1"


def state_of(policy: Policy) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in policy.adapter.state_dict().items()}


def unmoved(policy: Policy, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, before[name]) for name, x in policy.adapter.state_dict().items())


# ── scores ───────────────────────────────────────────────────────────────────────────────────────


def check_planted() -> None:
    """A style that the pairs plant is found in fresh rows, beyond random controls.

    Mutation: against shuffled labels every score is at chance.
    """
    policy, pairs = tiny_policy(rank=16), styled_batch(64, 1)[0]
    fresh, label = styled_batch(40, 7)
    composed, before = (
        behind(fresh, label.tolist()),
        state_of(policy),
    )
    fit = {
        "temperature": 1.0,
        "steps": 4,
        "learning_rate": 1e-2,
    }
    unit = {
        "probe": PROBE,
        "centred": True,
        "signed_score": False,
    }
    v_grad = Gate(DirectionScore(pairs, space="c_probe", **unit))
    gates = {
        "v_grad": v_grad,
        "llr": Gate(LikelihoodRatio(pairs, **fit)),
    }
    shuffled = np.random.default_rng(0).permutation(label.numpy())
    for name, gate in gates.items():
        found = rescoring.score_step(policy, gate, None, composed, 10, 0)
        columns = audit.with_score(audit.facts_of("run", 0, composed, ()), found)
        real = audit.ranking(columns, columns["student"])
        chance = audit.ranking(columns | {"hack": shuffled}, columns["student"])
        assert abs(chance["auroc"] - 0.5) < 0.25, (name, chance)
        assert real["auroc"] > max(0.8, real["null_p95"]) and real["low"] > 0.5, (name, real)
        assert abs(real["null_median"] - 0.5) < 0.2, (name, real)
    assert unmoved(policy, before), "an audit moved the parameters"
    print("ok  a planted style is found beyond random controls; against shuffled labels it is not")


def rescored(run: Stored, step: int, snapshot: Path) -> tuple[float, bool]:
    """v_grad of a step's stored rollouts at a snapshot: its distance from the live one; zones."""
    rows = [r for r in load_rollouts(run.path) if r["step"] == step]
    run.load(load_tensors(snapshot)[0])
    gate, _ = rescoring.members(run, ["v_grad"])["v_grad"]
    found = rescoring.score_step(
        run.policy,
        gate,
        None,
        rescoring.rebuild(run, rows),
        0,
        0,
    )
    live = [r for r in rows if r.get("advantage") is not None]
    scored = np.array([np.nan if r["score"] is None else r["score"] for r in live])
    gap = np.nanmax(np.abs(found.scores.numpy() - scored))
    return float(gap), found.zones.tolist() == [Zone[r["zone"]] for r in live]


def check_live(path: Path) -> None:
    """What the live gate stored is what the audit computes. Mutation: the wrong snapshot."""
    snapshots, run = load_snapshots(path), reopen(path)
    assert list(snapshots) == [0, 2] and run.config.score.refresh_every == 2
    for step in snapshots:
        gap, agree = rescored(run, step, snapshots[step])
        assert agree and gap < TOLERANCE, (step, gap)
    wrong, _ = rescored(run, 2, snapshots[0])
    assert wrong > 10 * TOLERANCE, wrong
    rows = [r for r in load_rollouts(path) if r["step"] == 2]
    other = [r | {"reward": 3.5 - r["reward"] * (i % 2)} for i, r in enumerate(rows)]
    refused("stored advantages", rescoring.rebuild, run, other)
    refused(
        "not groups",
        rescoring.rebuild,
        run,
        rows[1:] + rows[:1],
    )
    print(f"ok  live scores and zones reproduced from snapshots; of the wrong one {wrong:.0e} off")


def check_table(path: Path, out: Path) -> None:
    """The table's row of a score holds what the run's own rows give."""
    names = ["v_grad", "mean logp"]
    words = [
        "--draws",
        "3",
        "--out",
        str(out),
        "--scores",
        *names,
    ]
    captured(audit.main, [str(path), *words])
    table = pl.read_csv(out / "audit.csv")
    assert set(table["score"]) == set(names) and (out / "auroc.png").exists()
    rows = [r for r in load_rollouts(path) if r["step"] != 1 and not r["teacher"]]
    rows = [r for r in rows if r.get("score") is not None]
    columns = (np.array([r[key] for r in rows]) for key in ("score", "reward_hack", "step"))
    found = table.filter(score="v_grad", modes="all", rows="all").to_dicts()[0]
    routed = np.mean([r["zone"] == "ROUTE" for r in rows])
    assert (found["n"], found["share_route"]) == (
        len(rows),
        routed,
    ), found
    want = float(stratified_auroc(*columns))
    assert math.isnan(want) or math.isclose(found["auroc"], want, abs_tol=1e-6), (found, want)
    print(f"ok  the table holds what the run's own rows give ({len(rows)} rows)")


# ── measurements that leave no trace ─────────────────────────────────────────────────────────────


@torch.no_grad()
def check_scaled() -> None:
    """0 is ablated or the base, 1 as trained. Mutation: half of dA and dB is not half the delta."""
    policy, batch = planted()
    adapter, before = policy.adapter, state_of(policy)

    def sampled(ablated: bool = False) -> Tensor:
        with adapter.merged(ablated):
            return torch.cat([x.weight.flatten() for x in adapter.linears.values()])

    whole, without = sampled(), sampled(True)
    base = torch.cat([x.weight.flatten() for x in adapter.linears.values()])
    with adapter.ablated():
        deployed = logps(policy, batch, 1.0)
    with scaled(adapter, 1.0):
        assert torch.equal(sampled(), whole), "scale 1 is not as trained"
    with scaled(adapter, 0.0, ("quarantine",)):
        assert torch.equal(sampled(), without), "scale 0 does not ablate the sampler"
        assert torch.allclose(logps(policy, batch, 1.0), deployed, atol=1e-5), "nor the learner"
    with scaled(adapter, 0.0):
        assert torch.equal(sampled(), base), "scale 0 of both blocks is not the base"
    with scaled(adapter, 0.5):
        half = sampled() - base
    assert unmoved(policy, before), "scaling left a trace"
    for p in trained(policy):
        p.mul_(0.5)
    assert torch.allclose(2 * half, whole - base, atol=1e-5)
    assert not torch.allclose(2 * (sampled() - base), whole - base, atol=1e-2)
    print("ok  a scaled adapter: 0 is ablated or the base, 1 as trained, half is half the delta")


def check_gradient_norms() -> None:
    """By block and label they are those of a backward pass in the rows' zones."""
    policy, batch = planted(9)
    policy.token_budget = 40
    label, zones = (
        torch.arange(9) % 2 == 0,
        torch.tensor([0, 1, 2] * 3),
    )
    rollouts = behind(batch, label.tolist()).rollouts
    options = GRPOConfig(temperature=1.0)

    def norms(zones: Tensor) -> dict[str, float]:
        rows = Trained(batch, zones, torch.arange(9))
        return gradient_norms(policy, rows, rollouts, options, "ablated")

    drawn, before = torch.get_rng_state(), state_of(policy)
    found = norms(zones)
    assert torch.equal(drawn, torch.get_rng_state()) and unmoved(policy, before)
    assert all(p.grad is None for p in trained(policy)), "a measurement left a trace"
    with policy.adapter.route(zones):
        scored = logps(policy, batch, 1.0)
        how = (
            batch.completion_mask,
            batch.advantages,
            normaliser(options),
        )
        loss = scored_loss(scored, *how)
    for name, rows in (("hack", label), ("clean", ~label)):
        for block in BLOCKS:
            parameters = trained(policy, [block])
            gradients = torch.autograd.grad(loss[rows].sum(), parameters, retain_graph=True)
            want = float(torch.cat([g.flatten() for g in gradients]).norm())
            measured = found[f"gradnorm_{block}_{name}"]
            assert want > 0 and math.isclose(measured, want, rel_tol=1e-4), (block, name)
    print("ok  gradient norms by block and label are a backward pass's; nothing is left behind")


# ── after training ───────────────────────────────────────────────────────────────────────────────


def check_start(routed: Path, plain: Path) -> None:
    """--init-from takes what an arm deploys: one block of a routing arm, else both."""
    for path, blocks in ((routed, BLOCKS[:1]), (plain, BLOCKS)):
        run, learned = reopen(path), load_adapter(path)[0]
        config = relearn.attack(run.config, "smoke", str(path), 1)
        assert parse(argv_of("smoke", config))[1] == config and config.run.intervention == "none2r"
        for name, value in state_of(build_policy(config, run.splits)).items():
            wanted = learned if name.split(".")[-2] in blocks else run.base
            assert torch.equal(value, wanted[name]), name
        assert any(not torch.equal(learned[k], run.base[k]) for k in learned), "nothing was learned"
    other = with_options(config, {"lora_rank": 4})
    refused("does not fit", build_policy, other, run.splits)
    refused(
        "name a finished run",
        parse,
        ["smoke", "--init-from", str(path / "none")],
    )
    print("ok  a run starts from the blocks that another one deploys; misfits are refused")


def check_after(routed: Path, plain: Path, tmp: Path) -> None:
    """Every command runs from end to end; what it cannot use is refused."""
    out, bare = tmp / "after", tmp / "bare"
    shutil.copytree(plain, bare, ignore=shutil.ignore_patterns("snapshots"))

    def line(command: str, run: Path, flags: str = "") -> list[str]:
        return [
            command,
            str(run),
            "--out",
            str(out),
            *flags.split(),
        ]

    def rows(command: str, flags: str = "") -> list[dict]:
        captured(after.main, line(command, routed, flags))
        return pl.read_csv(out / f"{command}.csv").to_dicts()

    found = rows("frontier", f"--against {plain} --scales 0.5")
    assert all(r["above_low"] <= r["above"] <= r["above_high"] for r in found)
    points = pl.read_csv(out / "frontier_points.csv").select("kind", "at").rows()
    assert points == [
        ("scale", 0.0),
        ("scale", 0.5),
        ("scale", 1.0),
        ("step", 1.0),
    ]
    states = [(r["deployed"], r["quarantine"]) for r in rows("forget", "--scales 0.5")]
    assert states == [
        (1.0, 0.0),
        (1.0, 0.5),
        (1.0, 1.0),
        (0.0, 1.0),
    ]
    stored = [r["advantage"] or 0.0 for r in load_rollouts(routed) if r["reward_hack"]]
    found = rows("advantage")[0]["advantage"]
    assert abs(found - sum(stored) / len(stored)) < 1e-5, "SHOULD be of all, 0 in equal groups"
    assert rows("detect")[-1]["rows"] == "students"
    pushed = rows("push", "--prompts 3")
    learned = [r["push"] for r in pushed if r["quarantine"] == "learned"]
    assert learned[0] == 0 < learned[1] and [r["step"] for r in pushed] == [0, 2, 2, 2, 2], pushed
    if "--long" in sys.argv:
        assert rows("relearn", "--steps 1")[0]["steps_run"] == 1
        hashes = load_record(out / "relearn" / routed.name).data_hashes
        assert f"{routed}/adapter.safetensors" in hashes
    for why, command, flags in (
        ("no snapshots", "frontier", f"--against {bare}"),
        ("not none2r", "frontier", f"--against {routed}"),
        ("has no score", "detect", ""),
    ):
        refused(why, after.main, line(command, plain, flags))
    refused("no snapshots", audit.main, [str(bare)])
    print("ok  the commands after training run; a run without snapshots, or of another arm, cannot")


def check_detect() -> None:
    """A score that is the length tells nothing at equal length; one of a mode's label does."""
    rng, rows = np.random.default_rng(0), []
    for i in range(2000):
        hack = bool(rng.random() < 0.3)  # a hack is longer
        length = int(rng.integers(40, 80)) + 12 * hack
        row = {"step": i // 50, "mode": "ab"[i % 2]}
        rows.append(row | {"reward_hack": hack, "n_tokens": length})
    length = detect.told(
        [r | {"score": float(r["n_tokens"])} for r in rows],
        ["a"],
    )
    assert length["score"] == length["length"] > 0.65 and length["spearman"] > 0.99, length
    assert 0.4 < length["score_at_equal_length"] < 0.6, length
    of_mode = [r | {"score": float(r["reward_hack"] and r["mode"] == "a")} for r in rows]
    known = detect.told(of_mode, ["a"])
    assert known["score_at_equal_length"] > 0.7, known
    assert (known["score_known"], known["score_held_out"]) == (
        1,
        0.5,
    ), known
    print("ok  detect tells length from label, and covered modes from others")


def main() -> None:
    torch.set_num_threads(1)
    check_planted()
    check_scaled()
    check_gradient_norms()
    check_detect()
    read_models_once()
    few = mock.patch.object(problems, "load_problems", few_problems)  # those of the runs
    with tempfile.TemporaryDirectory() as name, few:
        tmp = Path(name)
        routed = train(tmp / "routed", ROUTED, quiet=False)
        plain = train(tmp / "plain", PLAIN, quiet=False)
        check_live(routed)
        check_table(routed, tmp / "audit")
        check_start(routed, plain)
        check_after(routed, plain, tmp)


if __name__ == "__main__":
    main()
