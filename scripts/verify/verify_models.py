"""Families of causal LMs: small random models of each run the whole path.

For Qwen2, Qwen3, Llama, Gemma 2 and Gemma 3: which Linears are adapted, the sampler's log-probs are
the learner's, packed rows are rows in full (a sliding window, gradients and probe included), merged
weights are the adapter, every EOS id of the generation config ends a completion. Families whose
attention or experts are built otherwise: packed rows are rows in full, gradients and probe
included. What `loading.check` refuses: logits that the model
scales, an adapted output layer, Linears that text never reaches.

Run: python -m scripts.verify.verify_models
"""

import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from loguru import logger
from scripts.verify import tiny
from scripts.verify.stored import refused
from scripts.verify.tiny import perturb, trained
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from vgrout.gate.scores import ProbeOptions
from vgrout.gate.v_grad import probe_gradients
from vgrout.model.batch import Batch
from vgrout.model.fast import Packing
from vgrout.model.loading import load_policy
from vgrout.model.policy import Policy, logps
from vgrout.model.tokens import collate, encode_prompt

TOKENIZER = Path("data/organism/base")
SIZES = dict(
    vocab_size=1024,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=512,
    eos_token_id=2,
    pad_token_id=0,
    bos_token_id=None,
    initializer_range=0.2,
)
# shorter than the prompts: the window matters
WINDOW = dict(sliding_window=16, query_pre_attn_scalar=12)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"])
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MODELS = {  # class of the config, and what it has besides SIZES
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(tie_word_embeddings=True)),
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", WINDOW),
    "gemma3": ("Gemma3TextConfig", WINDOW | LAYERS),
}
OTHERS = {  # two attentions a module; tokens without their rows
    "diffllama": ("DiffLlamaConfig", {}),
    "qwen2_moe": ("Qwen2MoeConfig", MOE | dict(num_experts=4, shared_expert_intermediate_size=16)),
}
VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
SEES = dict(mm_tokens_per_image=4, image_token_index=1026, boi_token_index=1025)
GPT2 = dict(vocab_size=1024, n_embd=48, n_layer=2, n_head=4, n_positions=64, eos_token_id=2)
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
QUESTIONS = (
    "Return the sum of nums.",
    "Return the largest of the doubles of the odd numbers in nums.",
    "Return 1.",
)
GAP = 1e-3  # nats a token


def saved(folder: Path, name: str, options: dict, eos: int | list[int] = 2) -> Path:
    """A random model with the organism's tokenizer, as a folder that transformers loads."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / file, folder)
    return folder


def family(tmp: Path, kind: str) -> Policy:
    """A random model of a family, with a random adapter."""
    name, options = (MODELS | OTHERS)[kind]
    policy = load(saved(tmp / kind, name, SIZES | options))
    perturb(policy, 0.1)
    return policy


def load(folder: Path, targets: str = r"\.layers\.\d+\.") -> Policy:
    return load_policy(
        str(folder),
        dtype="float32",
        device="cpu",
        rank=3,
        lora_init_seed=0,
        targets=targets,
        gradient_checkpointing=False,
    )


def draw(policy: Policy, ablated: bool = False, length: int = 12) -> tuple[Batch, Tensor]:
    """Nine sampled rows as a batch, and the sampler's mean log-prob of each."""
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [encode_prompt(policy.tokenizer, messages) for messages in chats]
    options = dict(max_completion_length=length, top_p=0.95, ablated=ablated)
    rows = [row for group in tiny.draw(policy, prompts, [3] * 3, **options) for row in group]
    repeated, group = ([p for p in prompts for _ in range(3)], [i // 3 for i in range(9)])
    A = [(-1.0) ** i for i in range(9)]
    batch = collate(repeated, [ids for ids, _ in rows], A, group, A, policy.pad_id, "cpu")
    return batch, torch.tensor([sum(scores) / len(scores) for _, scores in rows])


def mean_logps(policy: Policy, batch: Batch) -> Tensor:
    return logps(policy, batch, 0.7).sum(1) / batch.completion_mask.sum(1)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def check_log_probs(name: str, policy: Policy) -> None:
    """Sampler, learner, packed rows and merged weights agree, in both states of the policy."""
    for ablated in (False, True):
        batch, sampled = draw(policy, ablated)
        states = [nullcontext(), policy.adapter.ablated()]
        tokens = {"attention_mask": batch.attention_mask}
        with states[ablated]:
            full = logps(policy, batch, 0.7, share=False)
            gaps = [gap(mean_logps(policy, batch), sampled), gap(logps(policy, batch, 0.7), full)]
            hooked = policy.model(batch.input_ids, **tokens).logits
        with policy.adapter.merged(ablated):
            merged = policy.model(batch.input_ids, **tokens).logits
        real = batch.attention_mask.bool()
        gaps.append(gap(merged[real], hooked[real]))
        assert max(gaps) < GAP, f"{name}: sampler, packed, merged are off by {gaps}"
        with states[not ablated]:  # mutation: the other state
            assert gap(mean_logps(policy, batch), sampled) > 10 * GAP, f"{name}: states are alike"


@torch.no_grad()
def check_window(name: str, policy: Policy) -> None:
    """Packed rows see as far as the window, behind their prompt too; without it they differ."""
    batch, _ = draw(policy)
    full, mask = logps(policy, batch, 0.7, share=False), Packing.mask

    def everything(self: Packing, window: int, like: Tensor) -> Tensor:
        return mask(self, None, like)

    with patch.object(Packing, "mask", everything):
        wrong = logps(policy, batch, 0.7)
    assert gap(wrong, full) > 10 * GAP, f"{name}: a window that packed rows ignore goes unnoticed"


def check_gradients(kind: str, policy: Policy) -> None:
    """Packed rows in mixed zones are rows in full, gradients and probe too."""
    batch, _ = draw(policy)
    assert policy.share_prompts, f"{kind}: its rows are not packed"
    options = ProbeOptions(max_completion_length=12, temperature=0.7)

    def passes() -> list[Tensor]:
        with policy.training(), policy.adapter.route(torch.arange(9) % 3):
            value = logps(policy, batch, 0.7).sum()
            grads = torch.autograd.grad(value, trained(policy), allow_unused=True)
        whole = torch.cat([g.flatten() for g in grads if g is not None])
        return [whole, probe_gradients(policy, batch, options)]

    packed, policy.share_prompts = passes(), False
    for mine, full in zip(packed, passes(), strict=True):
        assert gap(mine, full) < 1e-3 * float(full.abs().max()), f"{kind}: packed is not in full"


def check_loading(tmp: Path) -> None:
    """What `loading.check` finds. Mutation: only a module's first keys and values are read."""
    behind = Packing.behind_prompts

    def first(self: Packing, attention: torch.nn.Module, *new) -> list:
        self.calls[attention] = 0
        return behind(self, attention, *new)

    said: list[str] = []
    sink = logger.add(said.append, level="WARNING")
    with patch.object(Packing, "behind_prompts", first):
        policy = load(tmp / "diffllama")
    logger.remove(sink)
    assert not policy.share_prompts, "rows that are packed wrongly go unnoticed"
    assert "every row runs in full" in said[0], said
    assert load(tmp / "diffllama").share_prompts
    print("ok  a model whose rows are packed wrongly runs them in full, with a warning")


def check_refused(tmp: Path) -> None:
    gpt2 = saved(tmp / "gpt2", "GPT2Config", GPT2)
    scaled = saved(tmp / "granite", "GraniteConfig", SIZES | dict(logits_scaling=8.0))
    name, options = MODELS["gemma3"]
    text = getattr(transformers, name)(**SIZES | options | dict(vocab_size=1027))
    parts = dict(text_config=text.to_dict(), vision_config=VISION, eoi_token_index=1024)
    sees = saved(tmp / "sees", "Gemma3Config", parts | SEES)
    bare = saved(tmp / "bare", "LlamaConfig", SIZES)
    (bare / "chat_template.jinja").unlink()
    llama, layers = tmp / "llama", r"\.layers\."
    for folder, targets, words in (
        (gpt2, layers, "lm_head"),
        (llama, "no_such_name", "q_proj"),
        (bare, layers, "chat template"),
        (tmp / "nowhere", layers, "no such folder"),
        (scaled, layers, "does more to its logits"),
        (sees, layers, "take no part in reading text"),
        (llama, "lm_head|layers", "matches the output layer"),
    ):
        refused(words, load, folder, targets)
    adapted = load(sees, r"language_model\.layers\.").adapter.linears
    assert len(adapted) == 14, "the text half of a model that sees images is adapted"
    print("ok  models and targets that cannot work are refused, in one line each")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        for kind, (_, options) in MODELS.items():
            policy = family(tmp, kind)
            adapted = [name.rpartition(".")[2] for name in policy.adapter.linears]
            assert {*adapted} == LINEARS and len(adapted) == 14, f"{kind} adapts {adapted}"
            check_log_probs(kind, policy)
            if "sliding_window" in options:
                check_window(kind, policy)
            check_gradients(kind, policy)
            print(f"ok  {kind}: 7 Linears a layer, sampler = learner, merged = hooked")
        for kind in OTHERS:
            check_gradients(kind, family(tmp, kind))
        print("ok  packed = in full, in mixed zones and probed, in all of them and", *OTHERS)
        check_loading(tmp)
        check_refused(tmp)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    main()
