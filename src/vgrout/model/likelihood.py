"""A few optimiser steps of likelihood on written completions, and the deltas that they make."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.core import Zone
from vgrout.model import tokens
from vgrout.model.batch import Batch
from vgrout.model.lora2r import restored
from vgrout.model.policy import Policy, logps
from vgrout.model.tokens import select


def written(
    policy: Policy,
    prompts: Sequence[tokens.Messages],
    texts: Sequence[str],
    limit: int | None = None,
) -> Batch:
    """Written completions, cut at `limit` tokens, behind their prompts: a batch at A = +1.

    `group` numbers the distinct prompts.
    """
    ids = [tokens.encode_prompt(policy.tokenizer, messages) for messages in prompts]
    completions = [tokens.encode_completion(policy.tokenizer, text)[:limit] for text in texts]
    distinct = list(dict.fromkeys(map(tuple, ids)))
    group = [distinct.index(tuple(p)) for p in ids]
    ones = [1.0] * len(texts)
    return tokens.collate(ids, completions, ones, group, ones, policy.pad_id, policy.device)


@torch.no_grad()
def batch_logps(policy: Policy, batch: Batch, temperature: float) -> Float[Tensor, "g t"]:
    """Log-probs of each row's completion tokens, both blocks on, unmasked; 0 outside the mask."""
    scored = torch.zeros(batch.completion_mask.shape, device=policy.device)
    for rows in policy.micro_batches(batch):
        part = select(batch, rows)
        scored[rows, : part.completion_ids.shape[1]] = logps(policy, part, temperature)
    return scored


def mean_logps(
    policy: Policy,
    batch: Batch,
    temperature: float,
) -> Float[Tensor, " g"]:
    """Their mean over each row's tokens."""
    scored = batch_logps(policy, batch, temperature)
    return scored.sum(1) / batch.completion_mask.sum(1)


def likelihood_steps(
    policy: Policy,
    batch: Batch,
    block: str,
    steps: int,
    learning_rate: float,
    temperature: float,
) -> None:
    """`steps` Adam steps on the mean over rows of −mean logp, into one block alone; the other is
    in the forward, as a constant."""
    params = policy.adapter.parameters(block)
    zone, forward = (Zone.ROUTE, "ablated") if block == "quarantine" else (Zone.RETAIN, "both")
    adam = torch.optim.Adam(params, lr=learning_rate)
    for _ in range(steps):
        adam.zero_grad(set_to_none=True)
        for rows in policy.micro_batches(batch):
            part, zones = select(batch, rows), torch.full_like(rows, int(zone))
            with torch.enable_grad(), policy.training(), policy.adapter.route(zones, forward):
                means = logps(policy, part, temperature).sum(1) / part.completion_mask.sum(1)
                loss = -(means.sum() / len(batch.advantages))
                loss.backward(inputs=params)
        adam.step()
    adam.zero_grad(set_to_none=True)


def likelihood_deltas(
    policy: Policy,
    batch: Batch,
    steps: int,
    learning_rate: float,
    temperature: float,
) -> list[Tensor]:
    """How the deployed block would move under `likelihood_steps`; its parameters are restored
    exactly."""
    params = policy.adapter.parameters("deployed")
    with restored(params):
        before = [p.detach().clone() for p in params]
        likelihood_steps(policy, batch, "deployed", steps, learning_rate, temperature)
        return [p.detach() - b for p, b in zip(params, before)]


@torch.no_grad()
def random_deltas(
    deltas: list[Float[Tensor, "..."]],
    seed: int,
) -> list[Float[Tensor, "..."]]:
    """Gaussian deltas with the norm of each given tensor."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(d.shape, generator=generator).to(d) for d in deltas]
    return [n * (d.norm() / n.norm()) for n, d in zip(noise, deltas)]
