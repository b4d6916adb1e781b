"""The only place that renders, tokenises, pads and slices: one tokenising path for prompts, rollouts, teacher rows and pairs."""

from collections.abc import Sequence
from dataclasses import fields

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vgrout.core import UserError
from vgrout.model.batch import Batch


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Chat messages → prompt ids that end where the assistant begins; Qwen's thinking switch is off."""
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A written completion → ids that end with EOS, as a sampled one does."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def decode_completion(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Completion ids → text, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_prompt_lengths(
    prompts: dict[str, list[int]], limit: int, completion: int, context: int | None
) -> None:
    """Refuse a prompt over the limit at load, by id, or one behind which a `completion` would leave the model's `context`; in tokens."""
    long = {i: len(ids) for i, ids in prompts.items() if len(ids) > limit}
    if long:
        worst = max(long, key=long.get)
        raise UserError(
            f"{len(long)} prompts exceed --max-prompt-length {limit}, the longest is problem {worst} with {long[worst]} "
            f"tokens: raise the limit or remove the problem"
        )
    longest = max(map(len, prompts.values()), default=0)
    if context is not None and longest + completion > context:
        reach = (
            f"--max-completion-length {completion} behind the longest prompt of {longest} tokens"
        )
        raise UserError(f"{reach} exceeds the model's context of {context}: lower it")


def collate(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    rewards: Sequence[float],
    group: Sequence[int],
    advantages: Sequence[float],
    pad_id: int,
    device: torch.device | str,
) -> Batch:
    """Right-pad prompt + completion; see `Batch` for a literal example. No padding token is attended to or scored."""
    t = max(map(len, completions))
    s = max(len(p) + len(c) for p, c in zip(prompts, completions))
    input_ids = torch.full((len(prompts), s), pad_id)
    attention_mask = torch.zeros((len(prompts), s), dtype=torch.long)
    completion_ids = torch.full((len(prompts), t), pad_id)
    completion_mask = torch.zeros((len(prompts), t), dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        input_ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        attention_mask[i, : len(p) + len(c)] = 1
        completion_ids[i, : len(c)] = torch.tensor(c)
        completion_mask[i, : len(c)] = True
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        completion_start=torch.tensor([len(p) for p in prompts]),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        group=torch.tensor(group),
        advantages=torch.tensor(advantages, dtype=torch.float32),
    )
    return Batch(**{f.name: getattr(batch, f.name).to(device) for f in fields(batch)})


def select(batch: Batch, rows: Int[Tensor, " n"]) -> Batch:
    """Some rows of a batch, with the padding that they do not need cut off.

    Example: rows with prompts of 3 and 2 and completions of 1 and 1, taken from a batch of s = 9, t = 4, come out as s = 4, t = 1.
    """
    part = {f.name: getattr(batch, f.name)[rows] for f in fields(batch)}
    s, t = int(part["attention_mask"].sum(1).max()), int(part["completion_mask"].sum(1).max())
    for name in ("input_ids", "attention_mask"):
        part[name] = part[name][:, :s]
    for name in ("completion_ids", "completion_mask"):
        part[name] = part[name][:, :t]
    return Batch(**part)


def micro_batches(
    batch: Batch, token_budget: int, by_prompt: bool = False
) -> list[Int[Tensor, " n"]]:
    """Row indices of length-sorted micro-batches whose padded size stays within `token_budget` tokens (at least one row each).

    With `by_prompt` rows of one prompt stay together, so that they can share it; each prompt's rows are sorted by length.
    Example: lengths [5, 9, 4], budget 10 → [[2, 0], [1]] (4 and 5 padded to 2 × 5 = 10, then 9 alone).
    """
    lengths, group = batch.attention_mask.sum(1).tolist(), batch.group.tolist()
    parts: list[list[int]] = [[]]
    widest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (group[i] if by_prompt else 0, lengths[i])):
        widest = max(widest, lengths[i])
        if parts[-1] and (len(parts[-1]) + 1) * widest > token_budget:
            parts.append([])
            widest = lengths[i]
        parts[-1].append(i)
    return [torch.tensor(p, device=batch.input_ids.device) for p in parts]
