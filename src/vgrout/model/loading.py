"""Load a model and attach its adapter; then see, on two short chats, that this code computes what the model itself does."""

import ctypes
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from vgrout.core import UserError, warn
from vgrout.model import tokens
from vgrout.model.fused import fuse_norms
from vgrout.model.lora2r import Lora2r
from vgrout.model.packing import can_pack
from vgrout.model.policy import Policy, logps, predicting

CHATS = (
    ("Return the sum of nums.", "return sum(nums)"),
    ("Return the sum of nums.", "return 0"),
    ("Return 1.", "return 1"),
)
GAP = {torch.float32: 1e-3}  # nats a token by which two ways to a log-prob may differ, in the mean
ROUNDED_GAP = 0.25  # in a dtype of less precision: one step of a bf16 logit beyond 32


def load_policy(
    path: str, *, dtype: str, device: str, rank: int, lora_init_seed: int, targets: str, gradient_checkpointing: bool,
    share_prompts: bool = True,
) -> Policy:  # fmt: skip
    """Load a causal LM from a folder or the hub (safetensors only, no remote code), without dropout, and attach the adapter.

    Raises UserError where the model cannot be read, has no chat template, has no Linear that `targets` matches, or is one of those
    that `check` refuses.
    """
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
        where = (
            "the folder does not hold a causal LM"
            if Path(path).exists()
            else "no such folder, and the hub did not give it"
        )
        raise UserError(
            f"cannot load model {path!r}: {where} ({str(error).splitlines()[0][:160]})"
        ) from error
    if tokenizer.chat_template is None:
        raise UserError(f"model {path!r} has no chat template: use an instruction-tuned model")
    model.to(device).eval().requires_grad_(False)
    fuse_norms(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    generation_eos = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id} | set(
        generation_eos if isinstance(generation_eos, list) else [generation_eos]
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    adapter = Lora2r(model, rank, lora_init_seed, targets)
    policy = Policy(model, tokenizer, adapter, frozenset(eos - {None}), pad, share_prompts)
    check(policy)
    return policy


@torch.no_grad()
def check(policy: Policy) -> None:
    """Log-probs of two chats by the model's own forward pass, by `logps` on rows in full, and on packed rows, agree (the delta is zero).

    UserError where the output layer is adapted, where the model does more to its logits than `_logits` knows (some families scale
    them), or where `targets` match Linears that text never reaches (an encoder of images). A model whose rows cannot be packed, or
    would be packed wrongly, runs every row in full, and says so.
    """
    model, adapter, name = policy.model, policy.adapter, type(policy.model).__name__
    if model.get_output_embeddings() in adapter.linears.values():
        raise UserError(
            f"{adapter.targets!r} matches the output layer of {name}, which is not adapted: narrow --targets"
        )
    prompts = [
        tokens.encode_prompt(policy.tokenizer, [{"role": "user", "content": text}])
        for text, _ in CHATS
    ]
    completions = [tokens.encode_completion(policy.tokenizer, text) for _, text in CHATS]
    ones = [1.0] * len(CHATS)
    batch = tokens.collate(
        prompts, completions, ones, [0, 0, 1], ones, policy.pad_id, policy.device
    )
    with adapter.recording() as seen:
        full = logps(policy, batch, 1.0, share=False)
    if unseen := sorted(adapter.linears.keys() - seen.keys()):
        raise UserError(f"{len(unseen)} Linears that --targets {adapter.targets!r} matches in {name} take no part in reading text, "
                        f"e.g. {unseen[0]}: narrow --targets, for instance to 'language_model.*layers'")  # fmt: skip
    with adapter.disabled():
        own = (
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            .logits.float()
            .log_softmax(-1)
        )
    own = (
        predicting(batch, own).gather(2, batch.completion_ids[..., None])[..., 0]
        * batch.completion_mask
    )
    limit, mean_gap = (
        GAP.get(model.dtype, ROUNDED_GAP),
        lambda lp: float((lp - full).abs().sum() / batch.completion_mask.sum()),
    )
    if (gap := mean_gap(own)) > limit:
        raise UserError(f"{name} does more to its logits than this code knows (log-probs differ by {gap:.2g} nats a token): its family "
                        "is not supported, use another --model")  # fmt: skip
    if not policy.share_prompts:
        return
    policy.share_prompts = can_pack(model)
    gap = mean_gap(logps(policy, batch, 1.0)) if policy.share_prompts else 0.0
    if gap > limit or not policy.share_prompts:
        policy.share_prompts = False
        why = (
            f"packed rows differ from rows in full by {gap:.2g} nats a token"
            if gap
            else "its attention cannot see packed rows"
        )
        runlog.warn(
            f"{name}: every row runs in full, prompts are not shared ({why})",
            "slower, and otherwise the same",
        )


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Every dropout rate of the configuration set to 0: the log-probs of an update are those of the policy that sampled."""
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)
    return config


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, by mallopt(3). An update's activations would else go back to the kernel, which hands them out
    again page by page. Another C library is left alone."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes; the largest that it takes
