"""Load a model and attach its adapter; then see that this code computes what the model itself
does."""

import ctypes
import os
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from loguru import logger
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from vgrout.core import UserError
from vgrout.model import tokens
from vgrout.model.batch import Batch
from vgrout.model.fast import can_pack, checkpoint_contexts
from vgrout.model.likelihood import written
from vgrout.model.lora2r import Lora2r
from vgrout.model.policy import Policy, logps, predicting

CHATS = (
    ("Return the sum of nums.", "return sum(nums)"),
    ("Return the sum of nums.", "return 0"),
    ("Return 1.", "return 1"),
)
BROUGHT_BY = {"out/smol": "uv sync --extra smol && just smol-model"}  # base → its command
# nats a token by which two ways to a log-prob may differ, in the mean
GAP = 1e-3
ROUNDED_GAP = 0.25  # in a dtype of less precision: one step of a bf16 logit beyond 32


def quickest_dtype(device: str) -> str:
    """bfloat16 where the device multiplies it, else float32: emulated it is many times slower."""
    if device.startswith("cuda"):
        return "bfloat16"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


def load_policy(
    path: str,
    *,
    dtype: str,
    device: str,
    rank: int,
    lora_init_seed: int,
    targets: str,
    gradient_checkpointing: bool,
    share_prompts: bool = True,
    token_budget: int = 8192,
) -> Policy:
    """Load a causal LM from a folder or the hub (safetensors only, no remote code), without
    dropout, and attach the adapter.

    Raises UserError where the model cannot be read, has no chat template, has no Linear that
    `targets` matches, or is one of those that `check` refuses.
    """
    if path in BROUGHT_BY and not Path(path).is_dir():
        raise UserError(f"the model {path} is not there: {BROUGHT_BY[path]}")
    transformers_logging.disable_progress_bar()
    keep_freed_memory()
    try:
        config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = "no such folder, and the hub did not give it"
        if Path(path).exists():
            why = "the folder does not hold a causal LM"
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"cannot load model {path!r}: {why} ({reason})") from error
    if tokenizer.chat_template is None:
        raise UserError(f"model {path!r} has no chat template: use an instruction-tuned model")
    model.to(device).eval().requires_grad_(False)
    eos = end_tokens(tokenizer, model.generation_config)
    pad = (
        tokens.end_of_turn(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    adapter = Lora2r(model, rank, lora_init_seed, targets)
    if gradient_checkpointing:
        enable_checkpointing(model, adapter)
    policy = Policy(model, tokenizer, adapter, eos, pad, share_prompts, token_budget)
    check(policy)
    return policy


def end_tokens(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> frozenset[int]:
    """The ids that end a sampled completion: those of the generation config, EOS, and the token
    that the chat template puts behind an answer. A tokenizer without EOS gets the config's first.

    A warning where the last is none of the others; UserError where there is none at all.
    """
    ends = config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_token_id is None and ends:
        tokenizer.eos_token_id = ends[0]
    known, end = {tokenizer.eos_token_id, *ends} - {None}, tokens.end_of_turn(tokenizer)
    if end not in known:
        logger.warning(
            f"neither EOS nor the generation config is {tokenizer.convert_ids_to_tokens(end)!r}, "
            "which the chat template puts behind an answer: sampled completions end there, too"
        )
    return frozenset({*known, end})


@torch.no_grad()
def check(policy: Policy) -> None:
    """Log-probs of the chats by the model's own forward pass, by `logps` on rows in full, and on
    packed rows, agree (the delta is zero).

    UserError where the output layer is adapted, where the model does more to its logits than
    `policy.logits` knows (some families scale them), or where `targets` match Linears that text
    never reaches (an encoder of images). A model whose rows cannot be packed, or would be packed
    wrongly, runs every row in full, and says so.
    """
    model, adapter, name = policy.model, policy.adapter, type(policy.model).__name__
    if model.get_output_embeddings() in adapter.linears.values():
        raise UserError(
            f"{adapter.targets!r} matches the output layer of {name}, which is not adapted: "
            "narrow --targets"
        )
    batch = chats(policy)
    with adapter.recording() as seen:
        full = logps(policy, batch, 1.0, share=False)
    if not full.isfinite().all():
        raise UserError(f"{name} gives log-probs that are not finite: fetch its weights again")
    if unseen := sorted(adapter.linears.keys() - seen.keys()):
        raise UserError(
            f"{len(unseen)} Linears that --targets {adapter.targets!r} matches in {name} take no "
            f"part in reading text, e.g. {unseen[0]}: narrow --targets, for instance to "
            "'language_model.*layers'"
        )

    def gap(other: Float[Tensor, "g t"]) -> float:
        return float((other - full).abs().sum() / batch.completion_mask.sum())

    limit = GAP if model.dtype == torch.float32 else ROUNDED_GAP
    if (own := gap(own_logps(policy, batch))) > limit:
        raise UserError(
            f"{name} does more to its logits than this code knows (log-probs differ by {own:.2g} "
            "nats a token): its family is not supported, use another --model"
        )
    if not tokens.has_system_role(policy.tokenizer):
        logger.warning(
            f"{name}: its chat template has no system role: a system text heads the user's"
        )
    if not policy.share_prompts:
        return
    policy.share_prompts, why = can_pack(model), "its attention cannot see packed rows"
    if policy.share_prompts:
        packed = gap(logps(policy, batch, 1.0))
        policy.share_prompts = packed <= limit
        why = f"packed rows differ from rows in full by {packed:.2g} nats a token"
    if not policy.share_prompts:
        logger.warning(
            f"{name}: every row runs in full, prompts are not shared ({why}): "
            "slower, and otherwise the same"
        )


def chats(policy: Policy) -> Batch:
    """The chats as a batch, of which two share a prompt."""
    system = {"role": "system", "content": tokens.SYSTEM}
    prompts = [[system, {"role": "user", "content": question}] for question, _ in CHATS]
    return written(policy, prompts, [answer for _, answer in CHATS])


def own_logps(policy: Policy, batch: Batch) -> Float[Tensor, "g t"]:
    """Log-probs of the completions by the model's own forward pass to logits, without the
    adapter."""
    with policy.adapter.disabled():
        out = policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    scores = predicting(batch, out.logits.float().log_softmax(-1))
    return scores.gather(2, batch.completion_ids[..., None])[..., 0] * batch.completion_mask


def enable_checkpointing(model: nn.Module, adapter: Lora2r) -> None:
    """Layers run again in the backward pass, under the adapter's state of their first run."""
    contexts = partial(checkpoint_contexts, model, adapter)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Every dropout rate set to 0: the log-probs of an update are those of the policy that
    sampled."""
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)
    return config


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, by mallopt(3); another C library is left alone. On a GPU
    segments grow, unless the environment says otherwise.

    An update's activations would else go back to the kernel, which hands them out page by page.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes; the largest that it takes
