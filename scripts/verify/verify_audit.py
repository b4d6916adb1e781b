"""The audit and the diagnostics after training: stored scores are reproduced, planted directions found, nothing leaves a trace.

uv run python scripts/verify/verify_audit.py
"""

import contextlib
import io
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scripts.analysis import after, audit, diag_pinning, push
from scripts.experiments.reopen import Stored, reopen
from scripts.verify.tiny import perturb, random_batch, read_models_once, tiny_policy
from scripts.verify.verify_scores import PROBE, origin_of, styled_batch

from vgrout import train
from vgrout.cli import parse
from vgrout.core import Grade, Problem, Rollout, UserError, Verdict, Zone
from vgrout.files import load_tensors
from vgrout.gate.controls import RandomScore
from vgrout.gate.ratio import LikelihoodRatio
from vgrout.gate.scores import DirectionScore
from vgrout.model.batch import GateOutput, Origin
from vgrout.model.grpo import scored_loss
from vgrout.model.lora2r import BLOCKS
from vgrout.model.policy import logps
from vgrout.model.tokens import select
from vgrout.run.diagnose import gradient_norms, scaled
from vgrout.run.records import load_adapter, load_record, load_rollouts, load_snapshots
from vgrout.run.repeat import argv_of
from vgrout.stats import stratified_auroc

TOLERANCE = 1e-5  # of a cosine: the stored one is a float32 of the same computation; another machine may round otherwise
SMALL = "--num-prompts 4 --num-generations 6 --max-completion-length 64 --save-every 0 --final-draws 12 --threads 1 --workers 1".split()


def run(folder: str, *flags: str) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(*parse(["smoke", "--out-dir", folder, *SMALL, *flags]))
    return Path(folder)


def captured(work, *arguments) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        work(*arguments)
    return out.getvalue()


def refused(words: str, work, *arguments) -> None:
    try:
        captured(work, *arguments)
    except UserError as error:
        assert words in str(error) and "\n" not in str(error), error
        return
    raise AssertionError(f"accepted what should answer {words!r}")


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────


def check_planted() -> None:
    """A style that the pairs plant is found in fresh rows through the audit; random directions and shuffled labels are at chance."""
    policy, pairs, (fresh, label) = (
        tiny_policy(rank=16),
        styled_batch(64, 1)[0],
        styled_batch(40, 7),
    )
    config = parse(["smoke", "--temperature", "1.0"])[1]
    scores = {
        "v_grad centred": DirectionScore(
            pairs, space="c_probe", probe=PROBE, signed_score=False, centred=True
        ),
        "v_act residual centred": DirectionScore(
            pairs, space="residual", probe=PROBE, centred=True
        ),
        "llr": LikelihoodRatio(
            pairs, temperature=1.0, token_budget=1000, steps=8, learning_rate=1e-2
        ),
        "random": RandomScore(1),
    }
    before = {k: v.clone() for k, v in policy.adapter.state_dict().items()}
    a = audit.score_step(policy, scores, fresh, origin_of(fresh), 20, 0, config)
    assert all(torch.equal(v, before[k]) for k, v in policy.adapter.state_dict().items()), (
        "an audit moved the parameters"
    )
    n = len(label)
    a.rows = {
        "run": np.full(n, "run", dtype=object),
        "step": np.zeros(n, int),
        "group": fresh.group.numpy(),
        "hack": label.numpy(),
    }
    found = {name: diag_pinning.ranking(a, name, np.full(n, True)) for name in scores}
    real = [found[name] for name in scores if name != "random"]
    assert all(
        f["auroc"] > 0.8 and f["low"] > 0.5 and abs(f["haar_median"] - 0.5) < 0.2 for f in real
    ), found
    assert all(f["auroc"] > f["haar_p95"] for f in real) and np.isnan(
        found["random"]["haar_p95"]
    ), found
    routed = [a.zones[name, "top 25 %"] for name in scores] + [
        z[:, 0] for (_, share), z in a.haar_zones.items() if share == "top 25 %"
    ]
    assert len(routed) == 7 and all((zones == Zone.ROUTE).sum() == n // 4 for zones in routed)
    cut = diag_pinning.cutting(a, "v_act residual centred", "top 25 %", np.full(n, True))
    assert (
        cut["precision"] > cut["haar_precision_p95"]
        and abs(cut["recall"] - 0.5 * cut["precision"]) < 1e-9
    ), cut
    a.rows["hack"] = np.random.default_rng(0).permutation(label.numpy())
    shuffled = [diag_pinning.ranking(a, name, np.full(n, True))["auroc"] for name in scores]
    assert all(abs(x - 0.5) < 0.25 for x in shuffled), shuffled
    print(
        "ok  planted style found:",
        ", ".join(
            f"{k} {f['auroc']:.2f} (random {f['haar_median']:.2f})" for k, f in found.items()
        ),
    )


def rescored(stored: Stored, step: int, snapshot: Path) -> tuple[float, bool]:
    """v_grad of the stored rollouts of a step at a snapshot: its largest distance from what the live run stored, and if zones agree."""
    rows = [r for r in load_rollouts(stored.path) if r["step"] == step]
    stored.load(load_tensors(snapshot)[0])
    data = stored.config.data
    scores = audit.family(stored.policy, stored.config, ["v_grad"], data.pairs, data.pair_modes)
    _, batch, origin, odd = audit.rebuild(stored, rows)
    assert odd == 0, "the organism's completions tokenise to themselves"
    a = audit.score_step(stored.policy, scores, batch, origin, 0, 0, stored.config)
    live = [r for r in rows if r.get("advantage") is not None]
    zones = [Zone[r["zone"]] for r in live]
    gap = a.scores["v_grad"] - np.array(
        [np.nan if r["score"] is None else r["score"] for r in live]
    )
    return float(np.nanmax(np.abs(gap))), bool((a.zones["v_grad", "band"] == zones).all())


def check_live(path: Path) -> None:
    """The strongest check: what the live gate stored is what the audit computes from snapshot, text and advantages."""
    snapshots, stored = load_snapshots(path), reopen(path)
    assert list(snapshots) == [0, 2] and stored.config.score.refresh_every == 2
    gaps, agree = zip(*(rescored(stored, step, snapshots[step]) for step in snapshots))
    own, wrong = max(gaps), min(rescored(stored, a, snapshots[b])[0] for a, b in ((0, 2), (2, 0)))
    assert all(agree) and own < TOLERANCE < 10 * TOLERANCE < wrong, (agree, own, wrong)
    mine = [r for r in load_rollouts(path) if r["step"] == 2]
    refused(
        "stored advantages",
        audit.rebuild,
        stored,
        [r | {"reward": 3.5 - r["reward"] * (i % 2)} for i, r in enumerate(mine)],
    )
    refused("not groups", audit.rebuild, stored, mine[1:] + mine[:1])
    print(
        f"ok  live scores and zones reproduced from snapshots (largest gap {own:.0e}; with the wrong snapshot {wrong:.0e})"
    )


def check_tables(path: Path, tmp: str) -> None:
    out = Path(tmp) / "audit"
    names = ["v_grad", "v_act bottleneck", "mean logp", "length", "random"]
    text = captured(
        diag_pinning.main, [str(path), "--draws", "3", "--out", str(out), "--scores", *names]
    )
    assert all(name in text for name in names) and (out / "auroc.png").stat().st_size < 300_000
    table, cuts = pl.read_csv(out / "audit.csv"), pl.read_csv(out / "cuts.csv")
    assert (
        set(table["score"]) == set(names)
        and set(cuts["cut"]) == set(audit.CUTS)
        and len(pl.read_csv(out / "checks.csv")) == len(names)
    )
    rows = [
        r
        for r in load_rollouts(path)
        if r["step"] in (0, 2) and r.get("score") is not None and not r["teacher"]
    ]
    arrays = (np.array([r[k] for r in rows]) for k in ("score", "reward_hack", "step"))
    by_hand = float(stratified_auroc(*arrays))
    cell = {"score": "v_grad", "run": "pooled", "modes": "all", "rows": "all", "period": "all"}
    row = table.filter(*(pl.col(k) == v for k, v in cell.items())).to_dicts()[0]
    assert row["n"] == len(rows) and row["hacks"] == sum(r["reward_hack"] for r in rows)
    assert np.isclose(
        float("nan") if row["auroc"] is None else row["auroc"], by_hand, atol=1e-6, equal_nan=True
    ), (row, by_hand)
    parts = table.filter(
        pl.col("score") == "v_grad", pl.col("rows") == "all", pl.col("modes") == "all"
    ).sort("period")
    assert sum(parts.filter(pl.col("period").is_in(["early", "late"]))["n"]) == len(rows)
    band = cuts.filter(*(pl.col(k) == v for k, v in (cell | {"cut": "band"}).items())).to_dicts()[0]
    assert abs(band["share_route"] - np.mean([r["zone"] == "ROUTE" for r in rows])) < 1e-9
    print(
        f"ok  the tables hold what the run's own rows give ({len(rows)} rows, {row['hacks']} hacks)"
    )


# ── measurements that leave no trace ─────────────────────────────────────────────────────────────────────────────


def check_scaled() -> None:
    policy, batch = tiny_policy(), random_batch(6)
    perturb(policy)
    adapter, before = policy.adapter, {k: v.clone() for k, v in policy.adapter.state_dict().items()}

    def weights(ablated: bool = False) -> torch.Tensor:
        with adapter.merged(ablated):
            return torch.cat(
                [linear.weight.flatten().clone() for linear in adapter.linears.values()]
            )

    with torch.no_grad():
        whole, ablated, plain = weights(), weights(True), logps(policy, batch, 1.0)
        with adapter.disabled():
            base = torch.cat(
                [linear.weight.flatten().clone() for linear in adapter.linears.values()]
            )
        with adapter.ablated():
            deployed = logps(policy, batch, 1.0)
        with scaled(adapter, 1.0):
            assert torch.equal(weights(), whole) and torch.equal(
                logps(policy, batch, 1.0), plain
            ), "scale 1 is not as trained"
        with scaled(adapter, 0.0, ("quarantine",)):
            assert torch.equal(weights(), ablated), "scale 0 does not ablate the sampler's weights"
            assert torch.allclose(logps(policy, batch, 1.0), deployed, atol=1e-5), (
                "scale 0 does not ablate the learner's forward"
            )
        with scaled(adapter, 0.0):
            assert torch.equal(weights(), base), "scale 0 of both blocks is not the base"
        with scaled(adapter, 0.5):
            half = weights() - base
        adapter.load_state_dict(
            {k: v * (0.5 if k.split(".")[-1] in ("dA", "dB") else 1.0) for k, v in before.items()}
        )
        mutant = (
            weights() - base
        )  # scales the trained tensors, of which the delta is no linear function
        adapter.load_state_dict(before)
        assert torch.allclose(2 * half, whole - base, atol=1e-5) and not torch.allclose(
            2 * mutant, whole - base, atol=1e-2
        )
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items()), (
        "scaling left a trace"
    )
    print(
        "ok  a scaled adapter: 0 is ablated or the base, 1 as trained, one half half of the delta; restored exactly"
    )


def measured_batch() -> tuple:
    """A policy, a batch in mixed zones with two demonstrations, and the rollouts behind it, every other one a hack."""
    policy, batch = tiny_policy(), random_batch(9)
    perturb(policy)
    rows = zip(
        batch.input_ids.tolist(),
        batch.completion_start.tolist(),
        batch.attention_mask.sum(1).tolist(),
    )
    problem, wrong = (
        Problem("p", "", "f", "", (), ""),
        dict(mechanism="", own_tests_pass=False, verdict=Verdict.WRONG, seconds=0.0),
    )
    grades = [Grade(3.5, True, True, i % 2 > 0, i % 2 == 0, **wrong) for i in range(9)]
    kept = [
        Rollout(problem, ids[:start], ids[start:end], "", grade=g)
        for g, (ids, start, end) in zip(grades, rows)
    ]
    origin = origin_of(batch)
    origin.student = torch.arange(9) < 7
    zones = torch.tensor([0, 1, 2] * 3)
    return policy, batch, origin, GateOutput(zones, batch.advantages, 0.0, 0.0), kept


def check_gradient_norms() -> None:
    policy, batch, origin, out, kept = measured_batch()
    options = replace(parse(["smoke"])[1].grpo, temperature=1.0, token_budget=40)
    normaliser = options.num_generations * options.max_completion_length * options.num_prompts
    params = {b: policy.adapter.parameters(b) for b in BLOCKS}
    every = [p for b in BLOCKS for p in params[b]]
    for p in every:
        p.grad = torch.ones_like(p)

    def state() -> list[torch.Tensor]:
        numpy = torch.tensor(
            [hash(np.random.get_state()[1].tobytes())]
        )  # beartype draws from `random`, which nothing here does
        return [
            torch.get_rng_state(),
            numpy,
            *(x.detach().clone() for p in every for x in (p, p.grad)),
        ]

    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))  # noqa: E731
    before = state()
    found = gradient_norms(policy, batch, origin, out, kept, options, "ablated")
    assert same(before, state()), "a measurement left a trace"
    for label, odd in (("hack", 0), ("clean", 1)):
        rows = torch.tensor([i for i in range(7) if i % 2 == odd])
        with policy.adapter.route(out.zones):
            row_losses = scored_loss(
                logps(policy, batch, 1.0), batch.completion_mask, batch.advantages, normaliser
            )
        row_losses[rows].sum().backward()
        assert not same(before, state()), "a backward pass goes unnoticed"
        for block in BLOCKS:
            want = float(torch.stack([(p.grad - 1).norm() for p in params[block]]).norm())
            assert (
                want > 0 and abs(found[f"gradnorm_{block}_{label}"] - want) < 1e-4 * want + 1e-9
            ), (block, label, found, want)
        for p in every:
            p.grad.fill_(1.0)
    for zone, untouched in ((Zone.RETAIN, "quarantine"), (Zone.ROUTE, "deployed")):
        pinned = replace(out, zones=torch.full_like(out.zones, int(zone)))
        norms = gradient_norms(policy, batch, origin, pinned, kept, options, "ablated")
        assert {k for k, v in norms.items() if v == 0} == {
            f"gradnorm_{untouched}_{label}" for label in ("hack", "clean")
        }, norms
    few = torch.tensor([1, 3, 5])  # what a filter may leave: the labels follow the rows
    fewer = Origin(
        origin.student[few], origin.ablated[few], origin.sampler_logps[few], origin.stratum[few]
    )
    rest = select(batch, few), fewer, replace(out, zones=out.zones[few], scores=out.scores[few])
    left = gradient_norms(policy, *rest, kept, options, "ablated")
    assert (
        left["gradnorm_deployed_hack"] == 0
        and abs(left["gradnorm_deployed_clean"] - found["gradnorm_deployed_clean"]) < 1e-6
    )
    print(
        "ok  gradient norms by block and label are those of a backward pass in the zones; parameters, gradients and generators untouched"
    )


# ── after training ───────────────────────────────────────────────────────────────────────────────────────────────


def check_start(routed: Path, plain: Path, tmp: str) -> None:
    """--init-from takes the deployed block of a routing arm, and both blocks of an arm that deploys as trained."""
    for path, blocks in ((routed, BLOCKS[:1]), (plain, BLOCKS)):
        stored = reopen(path)
        config = after.attack(stored.config, "smoke", str(path), Path(tmp) / "attack", 1)
        assert parse(argv_of("smoke", config))[1] == config and config.run.intervention == "none2r"
        policy, trained = train.build_policy(config, stored.splits), load_adapter(path)[0]
        for name, value in policy.adapter.state_dict().items():
            wanted = trained if name.split(".")[-2] in blocks else stored.base
            assert torch.equal(value, wanted[name]), name
        assert any(not torch.equal(trained[k], stored.base[k]) for k in trained), (
            "the run has not trained: the check means nothing"
        )
    other = replace(
        stored.config, model=replace(stored.config.model, init_from=str(plain), lora_rank=4)
    )
    refused("does not fit", train.build_policy, other, stored.splits)
    refused("name the directory", parse, ["smoke", "--init-from", tmp])
    print("ok  a run starts from the blocks that another one deploys; misfits are refused")


def check_after(routed: Path, plain: Path, tmp: str) -> None:
    out = Path(tmp) / "after"
    common = ["--out", str(out), "--draws", "12"]
    captured(
        after.main,
        ["frontier", str(routed), str(plain), "--against", str(plain), *common, "--scales", "0.5"],
    )
    found = json.loads((out / "frontier.json").read_text())
    assert [(p["kind"], p["at"]) for p in found["points"]] == [
        ("scale", 0.0),
        ("scale", 0.5),
        ("scale", 1.0),
        ("step", 1.0),
    ]
    assert len(found["deployed"]) == 2 and all(
        r["above_low"] <= r["above"] <= r["above_high"] for r in found["deployed"]
    )
    refused(
        "no snapshots",
        after.main,
        ["frontier", str(plain), "--against", str(bare(plain, tmp)), *common],
    )
    refused("not none2r", after.main, ["frontier", str(plain), "--against", str(routed), *common])
    captured(after.main, ["forget", str(routed), *common, "--scales", "0.5"])
    captured(after.main, ["heal", str(routed), *common, "--steps", "1"])
    assert pl.read_csv(out / "forget.csv").select("deployed", "quarantine").rows() == [
        (1.0, 0.0),
        (1.0, 0.5),
        (1.0, 1.0),
        (0.0, 1.0),
    ]
    assert pl.read_csv(out / "heal.csv")["heal"].to_list() == ["off", "on"]
    captured(after.main, ["detect", str(routed), "--out", str(out)])
    assert {r["rows"] for r in pl.read_csv(out / "detect.csv").to_dicts()} <= {
        "with demonstrations",
        "students",
    }
    refused("has no score", after.main, ["detect", str(plain), "--out", str(out)])
    captured(after.main, ["relearn", str(routed), *common, "--steps", "1", "--no-base"])
    relearned = pl.read_csv(out / "relearn.csv").to_dicts()[0]
    assert (
        relearned["steps_run"] == 1
        and f"{routed}/adapter.safetensors"
        in load_record(out / "relearn" / routed.name).data_hashes
    )
    assert all((out / f"{name}.png").exists() for name in ("frontier", "forget", "relearn"))
    check_push(routed, common)
    print(
        "ok  frontier, forget, heal and relearn run from end to end; a run without snapshots, or of another arm, is refused"
    )


def check_push(routed: Path, common: list[str]) -> None:
    """Nothing learned pushes nowhere; twice the delta pushes further; the deployed block plays no part."""
    captured(push.main, [str(routed), *common, "--prompts", "3"])
    table = pl.read_csv(Path(common[1]) / "push.csv").to_dicts()
    learned = [r["push"] for r in table if r["quarantine"] == "learned"]
    assert learned[0] == 0 < learned[1] and [r["step"] for r in table] == [0, 2, 2, 2, 2], table
    run = reopen(routed)
    batch, quarantine = (
        push.base_samples(run, 3),
        [0.02 * torch.randn_like(p) for p in run.policy.adapter.parameters("quarantine")],
    )
    once, twice = (push.push(run, batch, [k * d for d in quarantine])["push"] for k in (1, 2))
    run.load()  # another deployed block
    beside = push.push(run, batch, quarantine)["push"]
    assert 0 < once < twice and math.isclose(once, beside, rel_tol=1e-4), (once, beside, twice)
    print(
        f"ok  push: 0 of nothing learned, {once:.3f} nats a token of a planted quarantine, {twice:.3f} of its double"
    )


def check_detect() -> None:
    """A score that is the length tells no more at equal length; one that is the label does; held-out modes are told apart."""
    rng, rows = np.random.default_rng(0), []
    for i in range(2000):
        hack = bool(rng.random() < 0.3)  # a hack is longer
        rows.append(
            {
                "step": i // 50,
                "reward_hack": hack,
                "n_tokens": int(rng.integers(40, 80)) + 12 * hack,
                "mode": "ab"[i % 2],
            }
        )
    scored = lambda of: after.told([r | {"score": float(of(r))} for r in rows], ["a"])  # noqa: E731
    length, label = scored(lambda r: r["n_tokens"]), scored(lambda r: r["reward_hack"])
    known = scored(lambda r: r["reward_hack"] and r["mode"] == "a")
    assert (
        length["score"] == length["length"] > 0.65 > 0.6 > length["score_at_equal_length"] > 0.4
        and length["spearman"] > 0.99
    ), length
    assert label["score"] == label["score_at_equal_length"] == 1 and label["spearman"] < 0.5, label
    assert known["score_known"] == 1 and known["score_held_out"] == 0.5, known
    fades = [r | {"score": float(r["reward_hack"] and r["step"] % 10 < 5)} for r in rows]
    ages = {
        name: after.told(part, ["a"])["score"] for name, part in after.by_age(fades, 10, 5).items()
    }
    assert ages == {"students, age 0 to 4": 1.0, "students, age 5 to 9": 0.5}, (
        f"a score that fades with age SHOULD show it: {ages}"
    )
    print(
        "ok  detect: length as a score tells nothing at equal length, the label all; a score of the pairs' modes nothing of the others'; "
        "one that fades is seen to"
    )


def bare(path: Path, tmp: str) -> Path:
    """The same run without its snapshots."""
    copy = Path(tmp) / "bare"
    copy.mkdir()
    for name in ("record.json", "adapter.safetensors", "rollouts.jsonl.gz", "metrics.jsonl"):
        (copy / name).write_bytes((path / name).read_bytes())
    return copy


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_planted()
    check_scaled()
    check_gradient_norms()
    read_models_once()
    with tempfile.TemporaryDirectory() as tmp:
        routed = run(
            f"{tmp}/routed",
            "--steps",
            "3",
            "--refresh-every",
            "2",
            "--warmup-steps",
            "0",
            "--learning-rate",
            "2e-3",
        )
        plain = run(
            f"{tmp}/plain", "--steps", "2", "--intervention", "none2r", "--snapshot-every", "1"
        )
        check_live(routed)
        check_tables(routed, tmp)
        check_start(routed, plain, tmp)
        check_after(routed, plain, tmp)
        check_detect()
        refused("has no snapshots", diag_pinning.main, [str(Path(tmp) / "bare")])
