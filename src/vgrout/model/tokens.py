"""The only place that renders, tokenises, pads and slices: one path for all rows."""

from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vgrout.core import UserError
from vgrout.model.batch import Batch, Trained

Messages = list[dict[str, str]]
ASKED: Messages = [{"role": "user", "content": "Is it?"}]
SYSTEM, ANSWER = "Answer briefly.", "Yes, it is."


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Chat messages → prompt ids that end where the assistant begins; Qwen's thinking switch is
    off.

    A system text heads the user's where the template has no system role. UserError where the
    template refuses that, too.
    """
    if messages[0]["role"] == "system" and not has_system_role(tokenizer):
        system, user, *others = messages
        text = f"{system['content']}\n\n{user['content']}"
        messages = [user | {"content": text}, *others]
    text = rendered(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False
) -> str:
    """The messages as the chat template writes them. UserError where it refuses or hides them."""
    what = "the model's chat template"
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        why = " ".join(str(error).split())[:160]
        what += f" refuses messages of {roles} ({why})"
        raise UserError(f"{what}: use another --model") from error
    if messages[-1]["content"].strip() not in text:
        role = messages[-1]["role"]
        raise UserError(f"{what} does not show the {role}'s text: use another --model")
    return text


def has_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template takes a system message and shows its text."""
    try:
        return SYSTEM in rendered(tokenizer, [{"role": "system", "content": SYSTEM}, *ASKED])
    except UserError:
        return False


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an answer: the token that the chat template puts behind one, EOS where it
    puts none. UserError where there is neither.
    """
    end = _token_behind_answer(tokenizer, tokenizer.chat_template)
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise UserError(
            "neither the chat template nor the tokenizer nor the generation config of the model "
            "names a token that ends an answer: set eos_token in its tokenizer_config.json"
        )
    return end


@lru_cache(maxsize=8)
def _token_behind_answer(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int | None:
    if template is None:
        return None
    text = rendered(tokenizer, [*ASKED, {"role": "assistant", "content": ANSWER}])
    tail = text.partition(ANSWER)[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in tokenizer.added_tokens_decoder), None)


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A written completion → ids that end with the end of a turn, as a sampled one does."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, end_of_turn(tokenizer)]


def decode_completion(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Completion ids → text, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_prompt_lengths(
    prompts: dict[str, list[int]], limit: int, completion: int, context: int | None
) -> None:
    """Refuse a prompt (by id) over the limit, or one behind which a completion would leave the
    model's `context`; all in tokens."""
    lengths = {i: len(ids) for i, ids in prompts.items()}
    worst = max(lengths, key=lengths.get, default=None)
    longest = lengths.get(worst, 0)
    if longest > limit:
        count = sum(n > limit for n in lengths.values())
        what = f"{count} prompts exceed --max-prompt-length {limit}"
        where = f"the longest is problem {worst} with {longest} tokens"
        raise UserError(f"{what}, {where}: raise the limit or remove the problem")
    if context is not None and longest + completion > context:
        what = f"--max-completion-length {completion} behind the longest prompt"
        raise UserError(
            f"{what} of {longest} tokens exceeds the model's context of {context}: lower it"
        )


def collate(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    rewards: Sequence[float],
    group: Sequence[int],
    advantages: Sequence[float],
    pad_id: int,
    device: torch.device | str,
) -> Batch:
    """Right-pad prompt + completion; see `Batch` for a literal example. No padding token is
    attended to or scored."""
    both = [p + c for p, c in zip(prompts, completions, strict=True)]
    input_ids, attention_mask = padded(both, pad_id)
    completion_ids, completion_mask = padded(completions, pad_id)
    columns = (
        input_ids,
        attention_mask.long(),
        completion_ids,
        completion_mask,
        torch.tensor([len(p) for p in prompts]),
        torch.tensor(rewards, dtype=torch.float32),
        torch.tensor(group),
        torch.tensor(advantages, dtype=torch.float32),
    )
    return Batch(*(x.to(device) for x in columns))


def padded(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, mask). Example, pad_id 0: [[5, 6], [7]] → [[5, 6], [7, 0]], [[1, 1], [1, 0]]."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(mask.shape, pad_id)
    ids[mask] = torch.tensor([i for row in rows for i in row])
    return ids, mask


def select(batch: Batch, rows: Int[Tensor, " n"]) -> Batch:
    """Some rows of a batch, with the padding that they do not need cut off.

    Example: rows with prompts of 3 and 2 and completions of 1 and 1, taken from a batch of s = 9,
    t = 4, come out as s = 4, t = 1.
    """
    s, t = (int(m[rows].sum(1).max()) for m in (batch.attention_mask, batch.completion_mask))
    width = dict(input_ids=s, attention_mask=s, completion_ids=t, completion_mask=t)
    columns = {field.name: getattr(batch, field.name)[rows] for field in fields(batch)}
    return Batch(**columns | {name: columns[name][:, :n] for name, n in width.items()})


def part(trained: Trained, rows: Int[Tensor, " n"]) -> Trained:
    """Some rows of what trains, cut as `select` cuts them."""
    batch = select(trained.batch, rows)
    zones, ref = trained.zones[rows], trained.ref_logps
    return Trained(
        batch,
        zones if zones.ndim == 1 else zones[:, : batch.input_ids.shape[1]],
        trained.rows[rows],
        None if ref is None else ref[rows, : batch.completion_ids.shape[1]],
    )


def micro_batches(
    batch: Batch, token_budget: int, by_prompt: bool = False
) -> list[Int[Tensor, " n"]]:
    """Row indices of length-sorted micro-batches whose padded size stays within `token_budget`
    tokens (at least one row each).

    With `by_prompt` rows of one prompt stay together, so that they can share it; each prompt's
    rows are sorted by length.
    Example: lengths [5, 9, 4], budget 10 → [[2, 0], [1]] (4 and 5 padded to 2 × 5 = 10, then 9
    alone).
    """
    lengths = batch.attention_mask.sum(1).tolist()
    groups = batch.group.tolist() if by_prompt else [0] * len(lengths)
    parts: list[list[int]] = [[]]
    widest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (groups[i], lengths[i])):
        widest = max(widest, lengths[i])
        if parts[-1] and (len(parts[-1]) + 1) * widest > token_budget:
            parts.append([])
            widest = lengths[i]
        parts[-1].append(i)
    return [torch.tensor(part, device=batch.input_ids.device) for part in parts]
