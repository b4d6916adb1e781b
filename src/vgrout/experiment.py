"""One run, ready to be trained: what the loop is given, and what it leaves behind.

Everything random is a function of (seed, step), so that a resumed run needs no generator state.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from vgrout import arms
from vgrout.arms import Phase
from vgrout.config import Config, ModelConfig, with_options
from vgrout.core import Group, Problem, RunRecord, UserError, warn
from vgrout.env import pairs, problems
from vgrout.env.demos import TeacherPool
from vgrout.env.rollouts import Composed, Prompt, Sampling, pair_batch, stream
from vgrout.files import nested, part, sha256_file, write_atomic
from vgrout.gate.gate import Gated
from vgrout.gate.monitors.judge import Endpoint, check_endpoint
from vgrout.gate.phases import Phases
from vgrout.gate.scores import Materials
from vgrout.grader import Grader
from vgrout.model import tokens
from vgrout.model.batch import Trained
from vgrout.model.likelihood import likelihood_steps
from vgrout.model.loading import enable_checkpointing, load_policy, quickest_dtype
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.policy import Policy
from vgrout.model.update import update
from vgrout.run import runlog
from vgrout.run.audit import gradient_norms, rollout_rows, sampled_tokens
from vgrout.run.dry_run import dry_run, memory_plans
from vgrout.run.evaluate import Evaluations, seeded
from vgrout.run.faults import StopSignal, explained, memory_is_full, recorded
from vgrout.run.health import DEAD, Health, History
from vgrout.run.provenance import provenance, uncommitted
from vgrout.run.records import SCHEMA_VERSION, Run, load_deployed, load_metrics
from vgrout.run.repeat import argv_of

# weights, tokenizer, chat template and generation settings: what shapes prompts and completions
MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")
STEP_SECONDS = ("sec_sample", "sec_grade", "sec_score", "sec_update", "sec_refresh")


class Experiment:
    """A context: inputs checked, sandbox and model up, the largest batch tried, the record open."""

    def __init__(self, preset: str, config: Config):
        self.preset, self.config = preset, with_dtype(config)
        self.stop = StopSignal()
        self.stack = ExitStack()

    def __enter__(self) -> "Experiment":
        try:
            self.stack.enter_context(explained())
            self._build()
        except BaseException as error:
            if not self.stack.__exit__(type(error), error, error.__traceback__):
                raise
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self.stack.__exit__(*exception)

    def _build(self) -> None:
        config = self.config
        self.splits = load_splits(config)
        self.inputs = inputs = Inputs(config, self.splits)
        run, grpo = config.run, config.grpo
        self.grader = self.stack.enter_context(Grader(run.workers, run.sandbox, run.cpu_seconds))
        every = [p for part in self.splits.values() for p in part]
        problems.check_tests(config.data.data, every, self.grader)
        self.policy = build_policy(config, self.splits)
        inputs.leave_out_long(self.policy, self.splits["train"], grpo.max_completion_length)
        self.sampling = sampling_of(config)
        materials = Materials(self.policy, config, inputs.pairs, every)
        self.phases = Phases(arms.phases_of(config), materials, inputs.placebo)
        how = grpo.learning_rate, grpo.weight_decay, grpo.max_grad_norm
        self.optimizer = BlockOptimizer(self.policy.adapter, *how)
        self.schedule = get_scheduler(
            grpo.lr_schedule, self.optimizer.adamw, grpo.warmup_steps, grpo.steps
        )
        self.dry_run()
        record = new_record(self.preset, config, self.splits, inputs.pairs, self.grader)
        self.files = self.stack.enter_context(recorded(open_run(config, record)))
        self.timed = self.files.timed  # wall seconds of what is inside, for row and record
        self.start = self.restore()
        runlog.anchor(self.files.record, argv_of(self.preset, config))
        self.printed = runlog.StepLog(grpo.steps)
        self.evaluations = Evaluations(
            self.files,
            self.policy,
            self.splits,
            self.grader,
            self.sampling,
            run,
            arms.deployed_state(config),
            self.stop.check,
        )
        rows = load_metrics(self.files.dir)
        history = History(rows, self.files.record.evals, max_grad_norm=grpo.max_grad_norm)
        self.health = Health(self.policy, self.splits["train"], self.sampling, history)

    def dry_run(self) -> None:
        """The memory plan: the largest batch under less and less, until it fits."""
        policy, grpo, phase = self.policy, self.config.grpo, self.config.phase
        parts = (
            policy,
            self.phases.phases[-1].gate,
            self.optimizer,
            lambda *rows: update(policy, self.optimizer, *rows, grpo, phase),
            self.splits["train"],
            self.sampling,
            grpo,
            arms.mixed_zones(self.config),
        )
        checkpointing = self.config.model.gradient_checkpointing
        plans = memory_plans(policy.token_budget, checkpointing, grpo.max_completion_length)
        for policy.token_budget, checkpointing in plans:
            if checkpointing:
                enable_checkpointing(policy.model, policy.adapter)
            try:
                dry_run(*parts)
            except (MemoryError, RuntimeError) as error:
                if not memory_is_full(error) or (policy.token_budget, checkpointing) == plans[-1]:
                    raise
            else:
                return
            tried = f"--token-budget {policy.token_budget}, checkpointing {checkpointing}"
            warn(f"the largest micro-batch does not fit into memory ({tried})", "less is tried")

    # ── what the loop asks for ───────────────────────────────────────────────────────────────────

    def steps(self) -> Iterator[int]:
        """The steps that are left; before the first of all the base is evaluated."""
        if self.start == 0:
            self.evaluations.base(moved=bool(self.config.model.init_from))
            self.seed_quarantine()
        for step in range(self.start, self.config.grpo.steps):
            self.began = time.perf_counter()
            if self.snapshot_due(step):  # the adapter that samples the step
                self.files.snapshot(step, *adapter_file(self.policy))
            yield step

    def snapshot_due(self, step: int) -> bool:
        return due(step, self.config.run.snapshot_every)

    def prompts(self, step: int, phase: Phase) -> list[Prompt]:
        pool = self.inputs.pool if phase.demonstrations else None
        return stream(
            self.splits["train"],
            step,
            self.config.grpo.num_prompts,
            self.config.run.seed,
            unhackable_frac=self.config.data.unhackable_frac,
            inoculate=phase.inoculate,
            pool=pool,
        )

    def generator(self, what: str, step: int) -> torch.Generator:
        return seeded(self.policy, what, self.config.run.seed, step)

    def label_norms(
        self, step: int, composed: Composed | None, trained: Trained | None
    ) -> dict[str, float]:
        """At the snapshots' cadence: gradient norms by block and ground-truth label."""
        if trained is None or not self.snapshot_due(step):
            return {}
        how = self.config.grpo, self.config.phase.retain_forward
        return gradient_norms(self.policy, trained, composed.rollouts, *how)

    def log(
        self,
        step: int,
        figures: dict[str, float],
        groups: Sequence[Group],
        composed: Composed | None,
        gated: Gated | None,
    ) -> None:
        """Files, table; then the run's health, which may stop it."""
        if step == 0:
            first = groups[0].rollouts[0]
            runlog.sample(self.policy.tokenizer.decode(first.prompt_ids), first)
        figures = figures | {"reference_logp": self.health.reference_logp(self.policy)}
        seconds = {k: self.files.step_seconds.pop(k, 0.0) for k in STEP_SECONDS}
        seconds["sec_step"] = time.perf_counter() - self.began
        rate = sampled_tokens(groups) / max(seconds["sec_sample"], 1e-9)
        row = {"step": step} | figures | seconds | {"tokens_per_second": rate}
        self.files.log_rollouts(rollout_rows(step, groups, composed, gated))
        self.files.log_metrics(row)
        self.printed.row(row)
        self.health(row)
        self.files.record.steps_done = step + 1

    def evaluate_and_save(self, step: int) -> None:
        """Validate and save at their cadences; stop here where a signal asked for it."""
        run, done = self.config.run, step + 1
        last = done == self.config.grpo.steps
        if due(done, run.eval_every) and not last:
            self.evaluations.validate(done)
            self.advise()
        if self.stop.asked or last or (due(done, run.save_every) and self.health.calm):
            self.save()
        self.stop.check()

    def evaluate_final(self) -> None:
        self.evaluations.final(self.config.grpo.steps)
        self.advise()
        self.files.finish("finished")
        runlog.final_table(self.files.record)

    def advise(self) -> None:
        """What evaluations say of the run's health; a policy that solves nothing is noted."""
        if DEAD in self.health.advise():
            self.files.record.notes.setdefault("dead_policy", self.files.record.evals[-1].step)

    def seed_quarantine(self) -> None:
        """Before RL: likelihood steps on one side of the pairs into the quarantine block alone."""
        phase, grpo, inputs = self.config.phase, self.config.grpo, self.inputs
        if not phase.seed_quarantine:
            return
        chosen = inputs.placebo if phase.seed_side == "placebo" else inputs.pairs
        hack, clean = torch.arange(2 * len(chosen), device=self.policy.device).chunk(2)
        side = clean if phase.seed_side == "clean" else hack
        batch = tokens.select(pair_batch(self.policy, chosen), side)
        how = phase.seed_quarantine, grpo.learning_rate, grpo.temperature
        likelihood_steps(self.policy, batch, "quarantine", *how)

    # ── state ────────────────────────────────────────────────────────────────────────────────────

    def save(self) -> None:
        """The adapter by itself, then a checkpoint from which the run continues bit for bit.

        In this order a kill between the two is made good: a resumed run repeats the steps after its
        checkpoint and writes the adapter anew.
        """
        self.files.save_adapter(*adapter_file(self.policy))
        tensors = nested({name: owner.state_dict() for name, owner in self._owners().items()})
        schedule = {"schedule": self.schedule.state_dict()}
        self.files.checkpoint(self.files.record.steps_done, tensors, schedule)

    def restore(self) -> int:
        """Load the newest checkpoint, if there is one; returns the step to continue with."""
        if (saved := self.files.load_checkpoint()) is None:
            return 0
        step, tensors, state = saved
        for name, owner in self._owners().items():
            owner.load_state_dict(part(tensors, name))
        self.schedule.load_state_dict(self.schedule.state_dict() | state["schedule"])
        for group, lr in zip(self.optimizer.adamw.param_groups, self.schedule.get_last_lr()):
            group["lr"] = lr
        return step

    def _owners(self) -> dict[str, Any]:
        return {"adapter": self.policy.adapter, "adamw": self.optimizer, "gates": self.phases}


def due(step: int, every: int) -> bool:
    """At a cadence of so many steps; never where it is 0."""
    return every > 0 and step % every == 0


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────


def load_splits(config: Config) -> dict[str, list[Problem]]:
    """train | val | test, each partitioned evenly over the modes."""
    data = config.data
    splits = problems.split(problems.load_problems(data.data))
    if empty := [name for name, part in splits.items() if len(part) < len(data.modes)]:
        raise UserError(
            f"{data.data}: split {empty[0]} has fewer problems than modes: use more problems"
        )
    return {name: problems.partition(part, data.modes) for name, part in splits.items()}


def sampling_of(config: Config) -> Sampling:
    """How the run draws completions, in training and in evaluations."""
    grpo, budget = config.grpo, config.model.sample_token_budget
    return Sampling(grpo.max_completion_length, grpo.temperature, grpo.top_p, budget)


class Inputs:
    """The data files that the arm reads, read and checked before any work; a judge answers once."""

    def __init__(self, config: Config, splits: dict[str, list[Problem]]):
        data, phase = config.data, config.phase
        seeds = phase.seed_side if phase.seed_quarantine else ""
        reads, semantic = arms.reads_pairs(config), phase.control == "semantic"
        self.pairs: list[pairs.Pair] = []
        if reads or seeds in ("hack", "clean"):
            self.pairs = pairs.load_pairs(data.pairs, data.pair_modes)
        if reads and len({p.problem.statement for p in self.pairs}) < 2:
            raise UserError(
                f"--pairs {data.pairs} holds pairs on one prompt alone: a pair is scored by "
                "those of the others, add some"
            )
        self.placebo: list[pairs.Pair] = []
        if semantic or seeds == "placebo":
            self.placebo = pairs.load_pairs(data.placebo_pairs)
        self.pool: TeacherPool | None = None
        if data.teacher_pool:
            per_group, until = data.teacher_per_group, data.teacher_until
            self.pool = TeacherPool(data.teacher_pool, data.teacher_modes, per_group, until)
            self.pool.check_covers(splits["train"])
        if phase.score == "judge":
            check_endpoint(Endpoint.of(config.monitor))

    def leave_out_long(self, policy: Policy, train: Sequence[Problem], limit: int) -> None:
        """Demonstrations over the limit on completions are left out, counted, and never cut."""
        if self.pool is not None:
            encode = tokens.encode_completion
            self.pool.leave_out_long(lambda t: len(encode(policy.tokenizer, t)) <= limit)
            self.pool.check_covers(train)


# ── model ────────────────────────────────────────────────────────────────────────────────────────


def device_of(model: ModelConfig) -> str:
    """The device that "auto" stands for here; UserError for a GPU that is not there."""
    there = torch.cuda.is_available()
    device = {"auto": "cuda" if there else "cpu"}.get(model.device, model.device)
    if device.startswith("cuda") and not there:
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees no CUDA GPU here; use --device "
            "cpu or install a CUDA build"
        )
    return device


def with_dtype(config: Config) -> Config:
    """The config with the dtype that "auto" stands for here, so that the record names it."""
    if config.model.dtype != "auto":
        return config
    return with_options(config, {"dtype": quickest_dtype(device_of(config.model))})


def build_policy(config: Config, splits: dict[str, list[Problem]]) -> Policy:
    """Model and adapter on their device; refuses a prompt over the limit, by id."""
    model = with_dtype(config).model
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    policy = load_policy(
        model.model,
        dtype=model.dtype,
        device=device_of(model),
        rank=model.lora_rank,
        lora_init_seed=config.run.seed if model.lora_init_seed is None else model.lora_init_seed,
        targets=model.targets,
        gradient_checkpointing=model.gradient_checkpointing,
        share_prompts=model.share_prompts,
        token_budget=model.token_budget,
    )
    if model.init_from:
        started = load_deployed(model.init_from, model.model)
        policy.adapter.load_state_dict(policy.adapter.state_dict() | started)
    shown = [p for part in splits.values() for p in part]
    encoded = {
        p.problem_id: tokens.encode_prompt(policy.tokenizer, problems.messages(p)) for p in shown
    }
    limit = config.grpo.max_completion_length
    tokens.check_prompt_lengths(encoded, model.max_prompt_length, limit, policy.context)
    return policy


def adapter_file(policy: Policy) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of adapter.safetensors."""
    adapter, model = policy.adapter, policy.model.name_or_path
    metadata = {"rank": str(adapter.rank), "seed": str(adapter.seed), "model": model}
    return adapter.state_dict(), metadata


# ── record ───────────────────────────────────────────────────────────────────────────────────────


def new_record(
    preset: str,
    config: Config,
    splits: dict[str, list[Problem]],
    used_pairs: Sequence[pairs.Pair],
    grader: Grader,
) -> RunRecord:
    data, start = config.data, config.model.init_from
    folder = Path(config.model.model)  # a hub id names none
    base = sorted(str(file) for suffix in MODEL_FILES for file in folder.glob(f"*{suffix}"))
    files = [data.data, data.teacher_pool, config.monitor.probe_data, *base]
    files += [f"{start}/adapter.safetensors"] if start else []
    monitor = config.phase.score if config.phase.score in arms.FLAGS else ""
    covered = [*map(str, data.pair_modes)] if used_pairs else []
    return RunRecord(
        schema_version=SCHEMA_VERSION,
        arm=arms.label(config),
        preset=preset,
        seed=config.run.seed,
        config=asdict(config),
        data_hashes={f: sha256_file(f) for f in files if f},
        pair_hash=pairs.content_hash(list(used_pairs)) if used_pairs else "",
        split_hashes={k: problems.ids_hash(v) for k, v in splits.items()},
        sandbox_layers=grader.layers,
        status="running",
        notes={
            "oracle": config.phase.control == "oracle",
            "monitor": monitor,
            "deployed": arms.deployed_state(config),
            "pairs_cover": covered,
            "phases": [asdict(phase) for phase in arms.phases_of(config)],
        },
        **provenance(),
    )


def open_run(
    config: Config,
    record: RunRecord,
) -> Run:
    """A fresh run directory, or with --resume the old one; changed code leaves a patch there."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    out_dir = config.run.out_dir or f"out/runs/{stamp}_{record.arm}_s{record.seed}"
    run = Run.create(out_dir, record, config.run.resume, config.run.accept_changed_data)
    if patch := uncommitted():
        write_atomic(run.dir / "uncommitted.patch", patch.encode())
    return run
