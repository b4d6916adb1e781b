"""GRPO with vector gradient routing: sample, grade, score, route, step.

    python -m vgrout.train organism --intervention routeV --seed 41 --out-dir out/runs/mine

The loop is `docs/pseudocode.md` in Python. It differs from textbook GRPO in five ways: no standard deviation in the advantage
and no completion length in the loss (Dr. GRPO), groups without variance are skipped, every row's update is masked by its zone,
the two LoRA blocks clip and step apart, and the old log-probs are those of the policy state that sampled the row.
No label of a training rollout reaches the update: `compose` reads the reward of a grade and nothing else.
"""

import sys

from vgrout.cli import endpoint, load_probe_data, load_splits, parse_or_exit
from vgrout.config import ARMS, Arm, Config
from vgrout.entry import run_main

if __name__ == "__main__":
    PRESET, CONFIG = parse_or_exit(sys.argv[1:])  # bad input is answered before torch loads

import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from vgrout.core import NO_ZONE, EvalResult, Problem, RunRecord, UserError, Zone
from vgrout.env import pairs, problems
from vgrout.env.demos import TeacherPool
from vgrout.env.rollouts import Sampling, collect, compose, pair_batch, stream
from vgrout.gate.actions import ACTIONS, Options
from vgrout.gate.controls import build_control, build_score
from vgrout.gate.gate import Gate, PinnedGate
from vgrout.gate.monitors.scores import Judge, labelled_probe
from vgrout.gate.ratio import replaced_quarantine
from vgrout.grader import Grader
from vgrout.model import grpo, tokens
from vgrout.model.batch import Batch, GateOutput, Origin
from vgrout.model.likelihood import likelihood_steps
from vgrout.model.loading import load_policy
from vgrout.model.lora2r import BLOCKS
from vgrout.model.optimizer import BlockOptimizer, trained_blocks
from vgrout.model.policy import Policy, logps
from vgrout.run import runlog
from vgrout.run.advice import advice
from vgrout.run.diagnose import gradient_norms
from vgrout.run.evaluate import evaluate, monitor, rollout_rows, sampled_tokens, zone_figures
from vgrout.run.health import Guard, StopSignal, explained, recorded, warn_if_dead, worst_case
from vgrout.run.provenance import provenance
from vgrout.run.records import SCHEMA_VERSION, Run, load_deployed, load_metrics, sha256_file
from vgrout.run.tracking import tracker


def main(preset: str, config: Config) -> None:
    """Everything random is a function of (seed, step), so that a resumed run needs no generator state."""
    cfg, arm = (
        config.grpo,
        ARMS[
            "placebo" if config.route.routeV_random_v_seed is not None else config.run.intervention
        ],
    )
    sampling, stop = (
        Sampling(
            cfg.max_completion_length, cfg.temperature, cfg.top_p, config.model.sample_token_budget
        ),
        StopSignal(),
    )
    with (
        explained(),
        Grader(config.run.workers, config.run.sandbox, config.run.cpu_seconds) as grader,
    ):
        splits = load_splits(config)
        policy = build_policy(config, splits)
        config = settled(policy, config)
        gate, pair_hash = make_gate(arm, policy, config)
        d = config.data
        teacher = (
            TeacherPool(d.teacher_pool, d.teacher_modes, d.teacher_per_group, d.teacher_until)
            if d.teacher_pool
            else None
        )
        how = cfg.temperature, cfg.token_budget
        options = Options(
            config.route.retained_advantages,
            config.route.penalty_alpha,
            config.monitor.penalty,
            arm.trains,
        )
        optimizer = BlockOptimizer(
            policy.adapter, cfg.learning_rate, cfg.weight_decay, cfg.max_grad_norm
        )
        schedule = get_scheduler(cfg.lr_schedule, optimizer.adamw, cfg.warmup_steps, cfg.steps)
        sizes = dict(
            num_prompts=cfg.num_prompts,
            num_generations=cfg.num_generations,
            token_budget=cfg.token_budget,
            zones=arm.zones,
        )
        worst_case(
            policy,
            gate,
            optimizer,
            lambda *parts: update(policy, *parts, optimizer, config),
            splits["train"],
            sampling,
            **sizes,
        )
        with recorded(make_run(preset, config, arm, splits, pair_hash, grader)) as run:
            start, log = restore(run, policy, gate, optimizer, schedule), runlog.StepLog(cfg.steps)
            track, history = tracker(config.run.track, run.record, run.dir), load_metrics(run.dir)
            guard = Guard(policy, splits["train"], history, sampling,
                          token_budget=cfg.token_budget, max_grad_norm=cfg.max_grad_norm)  # fmt: skip
            assess = Assess(run, policy, splits, grader, sampling, arm, config)
            if start == 0:
                assess.base()
                seed_quarantine(policy, config)
            for step in range(start, cfg.steps):
                clock = time.perf_counter()
                row = {"step": step, "lr": schedule.get_last_lr()[0]}
                if (
                    snapshot := bool(config.run.snapshot_every)
                    and step % config.run.snapshot_every == 0
                ):
                    run.snapshot(step, *adapter_file(policy))
                if step == 0 or (
                    config.score.refresh_every and step % config.score.refresh_every == 0
                ):
                    row |= gate.refresh(policy) | {"sec_refresh": time.perf_counter() - clock}
                quarantine_first, shown = (
                    step < config.route.quarantine_first,
                    (config.data.unhackable_frac, arm.inoculate),
                )
                prompts = stream(splits["train"], step, cfg.num_prompts, config.run.seed, *shown)
                groups, seconds = collect(
                    policy, prompts, grader, sampling,
                    num_generations=cfg.num_generations,
                    demonstrations=teacher.draw(prompts, step) if teacher else [[] for _ in prompts],
                    deployed_share=0.0 if quarantine_first else config.route.gen_deploy_frac, step=step,
                    loophole_pays=arm.loophole_pays and (arm.phase_pays or not quarantine_first),
                    generator=seeded(policy, "sample", config.run.seed, step),
                )  # fmt: skip
                kept, batch, origin = compose(
                    groups,
                    policy,
                    config.route.oracle_modes if arm.oracle else None,
                    arm.action == "deduct",
                )
                if (
                    arm.quarantine != "learned" and step == config.route.quarantine_first
                ):  # sampled as deployed, demonstrations aside
                    drawn = compose(groups, policy, None, True)[1]
                    optimizer.put(
                        "quarantine",
                        replaced_quarantine(
                            arm.quarantine, policy, drawn, *how, config.route.placebo_seed
                        ),
                    )
                scored = time.perf_counter()
                out = (
                    (PinnedGate(Zone.ROUTE) if quarantine_first else gate)(policy, batch, origin)
                    if batch
                    else None
                )
                updated = time.perf_counter()
                if batch:
                    acted = ACTIONS["route" if quarantine_first else arm.action](
                        batch, origin, out, options
                    )
                    if snapshot:
                        row |= gradient_norms(
                            policy, *acted, kept, cfg, config.route.retain_forward
                        )
                    row |= update(policy, *acted, optimizer, config)
                schedule.step()
                seconds |= {
                    "sec_score": updated - scored,
                    "sec_update": time.perf_counter() - updated,
                }
                row |= (
                    monitor(groups, kept, batch, out, policy.eos_ids)
                    | zone_figures(out, origin)
                    | seconds
                    | guard.probe(policy)
                )
                row |= {
                    "tokens_per_second": sampled_tokens(groups) / seconds["sec_sample"],
                    "sec_step": time.perf_counter() - clock,
                }
                if step == 0:
                    runlog.sample(
                        policy.tokenizer.decode(groups[0].rollouts[0].prompt_ids),
                        groups[0].rollouts[0],
                    )
                run.log_metrics(row)
                track(row)
                run.log_rollouts(rollout_rows(step, groups, kept, batch, out))
                log.row(row)
                guard(row)
                history.append(row)
                log.advise(advice(history, run.record.evals))
                run.record.steps_done = step + 1
                run.spend(seconds)
                last = step + 1 == cfg.steps
                if config.run.eval_every and (step + 1) % config.run.eval_every == 0 and not last:
                    assess.validate(step + 1)
                due = (
                    config.run.save_every and (step + 1) % config.run.save_every == 0 and guard.calm
                )
                if stop.asked or last or due:
                    save(run, policy, gate, optimizer, schedule)
                if stop.asked and not last:
                    run.finish("interrupted")
                    raise SystemExit(128 + stop.asked)
            assess.final(cfg.steps)
            run.finish("finished")
            runlog.final_table(run.record)


def update(
    policy: Policy,
    batch: Batch,
    origin: Origin,
    out: GateOutput,
    optimizer: BlockOptimizer,
    config: Config,
) -> dict[str, float]:
    """Pass 2: masked forward and backward in micro-batches, then one step of every block that some row trains."""
    cfg, adapter, flat = config.grpo, policy.adapter, out.zones.reshape(len(origin.student), -1)
    ablated = (flat == Zone.RETAIN) & (config.route.retain_forward == "ablated")
    # the ratio is 1 where nothing sampled the row, or where this very state did, at every position
    on_policy = ~origin.student | ((origin.ablated[:, None] == ablated) | (flat == NO_ZONE)).all(1)
    normaliser = float(cfg.num_generations * cfg.max_completion_length * cfg.num_prompts)
    total, gaps, stats, zone = 0.0, [], [], out.by_row()[1]
    for rows in tokens.micro_batches(
        batch, cfg.token_budget, by_prompt=policy.share_prompts
    ):
        part, ref = tokens.select(batch, rows), None
        t, mask, zones = part.completion_ids.shape[1], part.completion_mask, out.zones[rows]
        sampled = origin.sampler_logps[rows, :t]
        zones = zones if zones.ndim == 1 else zones[:, : part.input_ids.shape[1]]
        if cfg.beta and out.ref_logps is not None:
            ref = out.ref_logps[rows, :t]
        elif cfg.beta:
            with torch.no_grad(), adapter.disabled():
                ref = logps(policy, part, cfg.temperature)
        with policy.training(), adapter.route(zones, config.route.retain_forward):
            new = logps(policy, part, cfg.temperature)
            old = torch.where(on_policy[rows, None], new.detach(), sampled)
            loss, by_token = grpo.grpo_loss(
                new,
                old,
                ref,
                mask,
                part.advantages,
                epsilon=cfg.epsilon,
                beta=cfg.beta,
                normaliser=normaliser,
            )
            loss.backward()  # inside the context: gradient checkpointing runs the forward again
        total += float(loss.detach())
        gap = (new.detach().sum(1) - sampled.sum(1)).abs() / mask.sum(1)
        gaps.append(gap[on_policy[rows] & origin.student[rows]])
        by_token |= {"logp": new.detach(), "zone": zone[rows, None].expand_as(mask)}
        stats.append({k: v[mask] for k, v in by_token.items()})
    before = [p.detach().clone() for b in BLOCKS for p in adapter.parameters(b)]
    norms = optimizer.step(trained_blocks(out.zones))
    after = [p.detach() for b in BLOCKS for p in adapter.parameters(b)]
    figures = {k: torch.cat([s[k] for s in stats]) for k in stats[0]}
    ratios = {
        f"ratio_mean_{z.name.lower()}": float(figures["ratio"][figures["zone"] == z].mean())
        for z in Zone
    }
    return ratios | {
        "loss": total,
        "kl": float(figures["kl"].mean()),
        "clip_share": float(figures["clipped"].mean()),
        "logp_mean": float(figures["logp"].mean()),
        "sampler_mismatch": float(torch.cat(gaps).nanmean()),
        "param_delta": float(torch.stack([(a - b).norm() for a, b in zip(after, before)]).norm()),
        "grad_norm_deployed": norms["deployed"],
        "grad_norm_quarantine": norms["quarantine"],
        "quarantine_grad_share": norms["quarantine"] / (sum(norms.values()) or 1.0),
    }


# ── what the loop is given ───────────────────────────────────────────────────────────────────────────────────────


def build_policy(config: Config, splits: dict[str, list[Problem]]) -> Policy:
    """Model and adapter on their device; refuses a prompt over the limit, by id."""
    m = config.model
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = m.device if m.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees no CUDA GPU here; use --device cpu or install a CUDA build"
        )
    policy = load_policy(
        m.model, dtype=m.dtype, device=device, rank=m.lora_rank, lora_init_seed=m.lora_init_seed, targets=m.targets,
        gradient_checkpointing=m.gradient_checkpointing, share_prompts=m.share_prompts,
    )  # fmt: skip
    if m.init_from:
        policy.adapter.load_state_dict(
            policy.adapter.state_dict() | load_deployed(m.init_from, m.model)
        )
    shown = [p for part in splits.values() for p in part]
    lengths = {
        p.problem_id: tokens.encode_prompt(policy.tokenizer, problems.messages(p)) for p in shown
    }
    tokens.check_prompt_lengths(
        lengths, m.max_prompt_length, config.grpo.max_completion_length, policy.context
    )
    return policy


def settled(policy: Policy, config: Config) -> Config:
    """The configuration with what `auto` means on this machine, so that a record says what ran."""
    if config.model.score_dtype != "auto":
        return config
    half = config.model.dtype == "bfloat16" or policy.multiplies_bfloat16
    return replace(
        config, model=replace(config.model, score_dtype="bfloat16" if half else "float32")
    )


def make_gate(arm: Arm, policy: Policy, config: Config) -> tuple[PinnedGate | Gate, str]:
    """The arm's gate, and the hash of the pairs that it reads ("" for none)."""
    if arm.score == "pinned":
        return PinnedGate(arm.zone, config.route.absorb_share, config.run.seed), ""
    cfg, s, r = config.grpo, config.score, config.route
    if arm.monitor:
        how = dict(
            space=s.act_space,
            layer=s.act_layer,
            token_budget=cfg.token_budget,
            l2=config.monitor.probe_l2,
        )
        probed = lambda: labelled_probe(
            policy, load_probe_data(config), cfg.max_completion_length, **how
        )
        return Gate(
            Judge(endpoint(config)) if arm.monitor == "judge" else probed(),
            signed=r.signed,
            cut="flag",
        ), ""
    probe = dict(
        max_completion_length=cfg.max_completion_length,
        temperature=cfg.temperature,
        token_budget=cfg.token_budget,
        state=s.probe_state,
        positions=s.probe_positions,
        dtype=getattr(torch, settled(policy, config).model.score_dtype),
    )
    seed = r.placebo_seed if r.routeV_random_v_seed is None else r.routeV_random_v_seed
    unread = arm.oracle or (arm.score, r.cut) == ("quarantine_ratio", "zero")
    found = [] if unread else pairs.load_pairs(config.data.pairs, config.data.pair_modes)
    other = {"semantic": s.placebo_pairs, "framing": s.framing_pairs}.get(arm.control)
    build = lambda ps: build_score(  # noqa: E731
        arm.score,
        pair_batch(policy, ps) if ps else None,
        probe,
        s,
        (r.oracle_recall, r.oracle_fpr, config.run.seed),
    )
    score = build(found)
    control = build_control(
        arm.control, score, build(pairs.load_pairs(other)) if other else None, s, seed
    )
    gate = Gate(
        score,
        control,
        signed=r.signed,
        cut="flag" if arm.oracle else r.cut,
        every=arm.action == "deduct",
    )
    return gate, pairs.content_hash(found) if found else ""


def seed_quarantine(policy: Policy, config: Config) -> None:
    """Before RL: likelihood steps on one side of the pairs into the quarantine block alone (side "placebo": empty pairs)."""
    r, cfg = config.route, config.grpo
    if not r.seed_quarantine:
        return
    placebo = r.seed_side == "placebo"
    found = (
        pairs.load_pairs(config.score.placebo_pairs)
        if placebo
        else pairs.load_pairs(config.data.pairs, config.data.pair_modes)
    )
    rows = torch.arange(len(found), device=policy.device) + (
        len(found) if r.seed_side == "clean" else 0
    )
    batch = tokens.select(pair_batch(policy, found), rows)
    likelihood_steps(
        policy,
        batch,
        "quarantine",
        r.seed_quarantine,
        cfg.learning_rate,
        cfg.temperature,
        cfg.token_budget,
    )


def make_run(
    preset: str,
    config: Config,
    arm: Arm,
    splits: dict[str, list[Problem]],
    pair_hash: str,
    grader: Grader,
) -> Run:
    """A fresh run directory, or with --resume the one that is there."""
    name, data, stamp = (
        config.run.intervention,
        config.data,
        datetime.now(UTC).strftime("%Y%m%dT%H%M%S"),
    )
    base = [
        str(f) for f in sorted(Path(config.model.model).glob("*.safetensors"))
    ]  # none for a hub id
    start = config.model.init_from and f"{config.model.init_from}/adapter.safetensors"
    files = [
        f for f in (data.data, data.teacher_pool, config.monitor.probe_data, *base, start) if f
    ]
    record = RunRecord(
        schema_version=SCHEMA_VERSION, arm=name, preset=preset, seed=config.run.seed, config=asdict(config),
        data_hashes={f: sha256_file(f) for f in files}, pair_hash=pair_hash,
        split_hashes={k: problems.ids_hash(v) for k, v in splits.items()}, sandbox_layers=grader.layers, status="running",
        notes={"oracle": arm.oracle, "monitor": arm.monitor, "deployed": arm.deployed,
               "pairs_cover": [*map(str, data.pair_modes)] if pair_hash else []},
        **provenance(),
    )  # fmt: skip
    return Run.create(
        config.run.out_dir or f"out/runs/{stamp}_{name}_s{config.run.seed}",
        record,
        config.run.resume,
    )


def seeded(policy: Policy, *what: object) -> torch.Generator:
    return torch.Generator(policy.device).manual_seed(problems.stable_hash(*map(str, what)) >> 1)


# ── what the loop leaves behind ──────────────────────────────────────────────────────────────────────────────────


class Assess:
    """Evaluations of one run, on their schedule."""

    def __init__(self, run, policy, splits, grader, sampling, arm, config):
        self.run, self.policy, self.splits, self.grader = run, policy, splits, grader
        self.sampling, self.arm, self.config = sampling, arm, config

    def cell(
        self, split: str, markers: str, state: str, ablated: bool, step: int, draws: int
    ) -> EvalResult:
        clock = time.perf_counter()
        result = evaluate(
            self.policy, self.splits[split], self.grader, self.sampling,
            split=split, markers=markers, state=state, ablated=ablated, step=step, draws=draws,
            generator=seeded(self.policy, "eval", self.config.run.seed, step, split, markers, ablated), log=self.run.log_evals,
        )  # fmt: skip
        self.run.spend({"sec_eval": time.perf_counter() - clock})
        self.run.record.evals.append(result)
        self.run.save()
        return result

    def base(self) -> None:
        """Step 0: the net delta is zero, so one cell speaks for both states; with --init-from it is the policy started from."""
        ablated = self.arm.deployed == "ablated" or not self.config.model.init_from
        self.cell("test", "novel", "deployed", ablated, 0, self.config.run.final_draws)

    def validate(self, step: int) -> None:
        self.cell(
            "val",
            "novel",
            "deployed",
            self.arm.deployed == "ablated",
            step,
            self.config.run.eval_draws,
        )
        warn_if_dead(self.run)

    def final(self, step: int) -> None:
        """The 2×2 table. Where the arm deploys as trained, its ablated cells are those of `absorb`: train once, evaluate twice."""
        for markers in ("iid", "novel"):
            trained = self.cell(
                "test", markers, "as_trained", False, step, self.config.run.final_draws
            )
            if self.arm.deployed == "as_trained":
                self.run.record.evals.append(replace(trained, state="deployed"))
            state = "deployed" if self.arm.deployed == "ablated" else "ablated"
            self.cell("test", markers, state, True, step, self.config.run.final_draws)
        warn_if_dead(self.run)


def save(
    run: Run,
    policy: Policy,
    gate: PinnedGate | Gate,
    optimizer: BlockOptimizer,
    schedule: LRScheduler,
) -> None:
    """The adapter by itself, then a checkpoint from which the run continues bit for bit.

    In this order a kill between the two is made good: a resumed run repeats the steps after its checkpoint and writes the adapter anew.
    """
    run.save_adapter(*adapter_file(policy))
    parts = {
        "adapter": policy.adapter.state_dict(),
        "adamw": optimizer.state_dict(),
        "gate": gate.state_dict(),
    }
    tensors = {
        f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()
    }
    run.checkpoint(run.record.steps_done, tensors, {"schedule": schedule.state_dict()})


def adapter_file(policy: Policy) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of adapter.safetensors."""
    adapter = policy.adapter
    return adapter.state_dict(), {
        "rank": str(adapter.rank),
        "seed": str(adapter.seed),
        "model": policy.model.name_or_path,
    }


def restore(
    run: Run,
    policy: Policy,
    gate: PinnedGate | Gate,
    optimizer: BlockOptimizer,
    schedule: LRScheduler,
) -> int:
    """Load the newest checkpoint, if there is one; returns the step to continue with."""
    if (saved := run.load_checkpoint()) is None:
        return 0
    step, tensors, state = saved
    for name, owner in (("adapter.", policy.adapter), ("adamw.", optimizer), ("gate.", gate)):
        owner.load_state_dict(
            {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
        )
    schedule.load_state_dict(schedule.state_dict() | state["schedule"])
    for group, lr in zip(optimizer.adamw.param_groups, schedule.get_last_lr()):
        group["lr"] = lr
    return step


if __name__ == "__main__":
    run_main(main, PRESET, CONFIG)  # a second signal interrupts; the record says so
