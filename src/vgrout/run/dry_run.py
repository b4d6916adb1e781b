"""Try the largest batch that the configuration allows, so that memory runs out now or never."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from vgrout.config import GRPOConfig
from vgrout.core import NO_ZONE, Problem, Zone, warn
from vgrout.env.problems import messages
from vgrout.env.rollouts import Sampling
from vgrout.gate.gate import Gate, PinnedGate
from vgrout.gate.monitors.scores import Judge
from vgrout.model import tokens
from vgrout.model.batch import Batch, Behaviour, Trained
from vgrout.model.lora2r import restored
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.policy import Policy
from vgrout.model.sampling import sample
from vgrout.run.faults import describe, memory_is_full

LONGEST = 4  # problems by length of text, of which the longest in tokens is tried


def memory_plans(budget: int, checkpointing: bool, least: int) -> list[tuple[int, bool]]:
    """(token budget of a micro-batch, checkpointing), the quickest first.

    Checkpointing runs every layer once more, which costs more than micro-batches of a quarter.
    `checkpointing`: it is asked for; `least`: tokens of a completion.
    """
    halved = [budget]
    while halved[-1] >= least:
        halved.append(halved[-1] // 2)
    without = [] if checkpointing else [(tokens, False) for tokens in halved[:3]]
    return without + [(tokens, True) for tokens in halved]


def dry_run(
    policy: Policy,
    gate: Gate | PinnedGate,
    optimizer: BlockOptimizer,
    update: Callable[[Trained, Behaviour], Any],
    problems: Sequence[Problem],
    sampling: Sampling,
    config: GRPOConfig,
    zones: Sequence[Zone],
) -> None:
    """The sampler's cache for every decoding batch, then one full micro-batch through gate and
    update.

    Longest prompt and full-length completions; the micro-batch fills the token budget, its rows of
    several prompts and in all `zones` that an update may mix. The gate is copied; parameters and
    optimiser are put back. The sampler's rows leave as they finish and rarely all reach the limit,
    so that there full memory is a warning; in training it ends the run. A live judge is not asked.
    Not covered: the pairs (no flag sets their length), and the features of token granularity.
    """
    limit = sampling.max_completion_length
    longest = sorted(problems, key=lambda p: len(p.system) + len(p.statement))[-LONGEST:]
    prompts = [tokens.encode_prompt(policy.tokenizer, messages(p)) for p in longest]
    prompt = max(prompts, key=len)
    completion = (prompt * (limit // len(prompt) + 1))[:limit]
    _try_sampling(policy, prompt + completion, sampling, config)
    batch = _largest(policy, prompt, completion, config)
    sampled = torch.zeros_like(batch.completion_mask, dtype=torch.float32)
    behaviour = Behaviour(torch.zeros_like(batch.group, dtype=torch.bool), sampled)
    moments = optimizer.state_dict()
    with restored(optimizer.parameters):
        zoned, ref = torch.full_like(batch.group, NO_ZONE), None
        if not isinstance(gate.score, Judge):
            scratch = copy.deepcopy(gate)
            if scratch.score is not None and scratch.score.pairs is not None:
                scratch.score.pairs = _few(scratch.score.pairs)
            scratch.refresh(policy)
            gated = scratch(policy, batch)
            zoned, ref = gated.zones, gated.ref_logps
        cycle = [int(zones[i % len(zones)]) for i in range(len(batch.group))]
        mixed = torch.tensor(cycle, device=policy.device)
        mixed = mixed if zoned.ndim == 1 else mixed[:, None].expand_as(zoned)
        rows = torch.arange(len(batch.group), device=policy.device)
        update(Trained(batch, mixed, rows, ref), behaviour)
    optimizer.load_state_dict(moments)


def _try_sampling(
    policy: Policy,
    tokens_of_row: list[int],
    sampling: Sampling,
    config: GRPOConfig,
) -> None:
    n, draws = config.num_prompts, [config.num_generations] * config.num_prompts
    how = asdict(replace(sampling, max_completion_length=1))
    how["generator"] = torch.Generator(policy.device).manual_seed(0)
    try:
        sample(policy, [tokens_of_row[:-1]] * n, draws, **how)
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):
            raise
        limit = sampling.max_completion_length
        what = f"a decoding batch whose completions all reach {limit} tokens does not fit"
        warn(f"{what}: {describe(error)}", "or go on, if completions are mostly shorter")
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()


def _largest(
    policy: Policy,
    prompt: list[int],
    completion: list[int],
    config: GRPOConfig,
) -> Batch:
    """One micro-batch that fills the token budget, of as many prompts that differ as a step has."""
    fitting = max(1, policy.token_budget // (len(prompt) + len(completion)))
    n = min(fitting, config.num_prompts * config.num_generations)
    group = [i * min(config.num_prompts, n) // n for i in range(n)]
    rewards = [float(i % 2) for i in range(n)]
    return tokens.collate(
        [prompt[i:] + prompt[:i] for i in group],
        [completion] * n,
        rewards,
        group,
        [reward - 0.5 for reward in rewards],
        policy.pad_id,
        policy.device,
    )


def _few(pairs: Batch) -> Batch:
    """Of hack sides, then clean sides, the first pair on each of the first two prompts: enough to
    have a direction."""
    n = len(pairs.group) // 2
    prompts = pairs.group[:n].tolist()
    hack = [prompts.index(prompt) for prompt in dict.fromkeys(sorted(prompts))][:2]
    chosen = [*hack, *(n + i for i in hack)]
    return tokens.select(pairs, torch.tensor(chosen, device=pairs.group.device))
