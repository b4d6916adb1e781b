"""Many causal LMs that transformers loads: small random Qwen2, Qwen3, Llama, Gemma 2 and Gemma 3 models run the whole path.

For each: which Linears are adapted, the sampler's log-probs are the learner's, packed rows are rows in full (a sliding window
included), merged weights are the adapter, one routed update moves the zones' blocks and no other, every EOS id of the generation
config ends a completion. Families whose attention or experts are built otherwise: packed rows are rows in full, gradients and probe
included. What `loading.check` refuses: logits that the model scales, an adapted output layer, Linears that text never reaches.

    uv run python scripts/verify/verify_models.py
"""

import io
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from loguru import logger
from scripts.verify.tiny import perturb
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SiglipVisionConfig,
)  # fmt: skip
from transformers.utils import logging as transformers_logging
from vgrout.gate.direction import probe_gradients

from vgrout.core import UserError, Zone
from vgrout.model.batch import Batch
from vgrout.model.fast import Packing
from vgrout.model.grpo import grpo_loss
from vgrout.model.loading import load_policy
from vgrout.model.lora2r import BLOCKS
from vgrout.model.optimizer import BlockOptimizer, trained_blocks
from vgrout.model.policy import Policy, logps
from vgrout.model.sampling import sample
from vgrout.model.tokens import collate, encode_prompt

TOKENIZER = Path("data/organism/base")
SIZES = dict(
    vocab_size=1024, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=12, max_position_embeddings=512, eos_token_id=2, pad_token_id=0, bos_token_id=None, initializer_range=0.2,
)  # fmt: skip
SMALL_WINDOW = dict(
    sliding_window=16, query_pre_attn_scalar=12
)  # shorter than the prompts: the window matters
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, **SMALL_WINDOW),
    "gemma3": Gemma3TextConfig(
        **SIZES, **SMALL_WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
}
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
OTHERS: dict[str, PretrainedConfig] = {  # two attentions a module; tokens without their rows; keys wider than values, and dropout
    "diffllama": DiffLlamaConfig(**SIZES),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=16),
    "deepseek_v3": DeepseekV3Config(**SIZES | dict(num_key_value_heads=4, head_dim=4), n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                                    topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
                                    moe_intermediate_size=16, first_k_dense_replace=1, attention_dropout=0.5),
}  # fmt: skip
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PROMPTS = [
    "Return the sum of nums.",
    "Return the largest of the doubles of the odd numbers in nums.",
    "Return 1.",
]


def saved(folder: Path, config: PretrainedConfig, eos: int | list[int] = 2) -> Path:
    """A random model with the organism's tokenizer, as a folder that transformers loads."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


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


def draw(policy: Policy, ablated: bool = False, length: int = 12) -> tuple[Batch, torch.Tensor]:
    """Nine sampled rows as a batch, and the sampler's mean log-prob of each."""
    prompts = [
        encode_prompt(policy.tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS
    ]
    groups = sample(policy, prompts, [3] * 3, max_completion_length=length, temperature=0.7, top_p=0.95, ablated=ablated,
                    token_budget=4096, generator=torch.Generator().manual_seed(1))  # fmt: skip
    rows = [(p, ids, lp) for p, group in zip(prompts, groups) for ids, lp in group]
    A = [(-1.0) ** i for i in range(len(rows))]
    batch = collate(
        [r[0] for r in rows],
        [r[1] for r in rows],
        A,
        [i // 3 for i in range(9)],
        A,
        policy.pad_id,
        "cpu",
    )
    return batch, torch.tensor([sum(r[2]) / len(r[2]) for r in rows])


def mean_logps(policy: Policy, batch: Batch) -> torch.Tensor:
    return logps(policy, batch, 0.7).sum(1) / batch.completion_mask.sum(1)


@torch.no_grad()
def check_log_probs(name: str, policy: Policy) -> tuple[float, float]:
    """(mismatch of sampler and learner, gap of merged and hooked logits); the policy with both blocks on, and ablated."""
    gaps, merged = [], []
    for ablated in (False, True):
        batch, sampled = draw(policy, ablated)
        with policy.adapter.ablated() if ablated else nullcontext():
            gaps.append(float((mean_logps(policy, batch) - sampled).abs().max()))
            in_full = logps(policy, batch, 0.7, share=False)
            gaps.append(float((logps(policy, batch, 0.7) - in_full).abs().max()))
            hooked = policy.model(batch.input_ids, attention_mask=batch.attention_mask).logits
        with nullcontext() if ablated else policy.adapter.ablated():
            other = mean_logps(policy, batch)
        assert float((other - sampled).abs().max()) > 1e-2, (
            f"{name}: the other policy state has the same log-probs"
        )
        with policy.adapter.merged(ablated):
            logits = policy.model(batch.input_ids, attention_mask=batch.attention_mask).logits
        merged.append(float((logits - hooked)[batch.attention_mask.bool()].abs().max()))
    assert max(gaps) < 1e-3, f"{name}: sampler and learner differ by {max(gaps)} nats a token"
    assert max(merged) < 1e-3, f"{name}: merged weights and hooks differ by {max(merged)}"
    return max(gaps), max(merged)


@torch.no_grad()
def check_window(name: str, policy: Policy) -> None:
    """Packed rows see as far as the window, behind their prompt too; without it the log-probs are others."""
    batch, _ = draw(policy)
    full, mask = logps(policy, batch, 0.7, share=False), Packing.mask
    Packing.mask = lambda self, window, like: mask(self, None, like)
    wrong = logps(policy, batch, 0.7)
    Packing.mask = mask
    assert float((wrong - full).abs().max()) > 1e-2, (
        f"{name}: a window that packed rows ignore goes unnoticed"
    )


def check_update(name: str, policy: Policy) -> None:
    """One routed update: ROUTE rows alone move the quarantine and leave the deployed block and the base as they are."""
    batch, _ = draw(policy)
    optimizer = BlockOptimizer(policy.adapter, 1e-3, 0.0, 1.0)
    base = [p.detach().clone() for p in policy.model.parameters()]
    for zone, moves in (
        (Zone.ROUTE, {"quarantine"}),
        (Zone.RETAIN, {"deployed"}),
        (Zone.ABSORB, set(BLOCKS)),
    ):
        before = {b: [p.detach().clone() for p in policy.adapter.parameters(b)] for b in BLOCKS}
        zones = torch.full((len(batch.advantages),), int(zone))
        with policy.training(), policy.adapter.route(zones):
            new = logps(policy, batch, 0.7)
            given = new, new.detach(), None, batch.completion_mask, batch.advantages
            grpo_loss(*given, epsilon=0.2, beta=0.0, normaliser=9.0)[0].backward()
        optimizer.step(trained_blocks(zones))
        moved = {
            b
            for b in BLOCKS
            if any(not torch.equal(p, q) for p, q in zip(before[b], policy.adapter.parameters(b)))
        }
        assert moved == moves, f"{name}: {zone.name} moved {moved}, SHOULD move {moves}"
    assert all(torch.equal(p, q) for p, q in zip(base, policy.model.parameters())), (
        f"{name}: the base moved"
    )


def check_other(kind: str, policy: Policy) -> float:
    """Packed rows in mixed zones are rows in full, gradients and probe too; returns the largest gap, in shares of the gradient's size."""
    batch, _ = draw(policy)
    assert policy.share_prompts, f"{kind}: its rows are not packed"
    params, gaps = [p for b in BLOCKS for p in policy.adapter.parameters(b)], []

    def passes() -> list[torch.Tensor]:
        with policy.training(), policy.adapter.route(torch.arange(9) % 3):
            grads = torch.autograd.grad(logps(policy, batch, 0.7).sum(), params, allow_unused=True)
        probe = probe_gradients(
            policy, batch, max_completion_length=12, temperature=0.7, token_budget=4096
        )
        return [torch.cat([g.flatten() for g in grads if g is not None]), probe]

    packed, policy.share_prompts = passes(), False
    for mine, full in zip(packed, passes()):
        gaps.append(float((mine - full).abs().max() / full.abs().max()))
    assert max(gaps) < 1e-3, f"{kind}: packed rows and rows in full differ by {gaps}"
    return max(gaps)


def check_loading(tmp: Path) -> None:
    """What `loading.check` finds; mutation of packing: only a module's first keys and values are read."""
    behind = Packing.behind_prompts

    def first(self, attention, *new):
        self.calls[attention] = 0
        return behind(self, attention, *new)

    Packing.behind_prompts = first
    said = io.StringIO()
    sink = logger.add(said, level="WARNING")
    policy = load(tmp / "diffllama")
    logger.remove(sink)
    Packing.behind_prompts = behind
    assert not policy.share_prompts, "rows that are packed wrongly go unnoticed"
    assert "every row runs in full" in said.getvalue(), said.getvalue()
    assert load(tmp / "diffllama").share_prompts
    print("ok  a model whose rows are packed wrongly runs them in full, with a warning")


def check_eos(tmp: Path) -> None:
    """Every EOS id ends a completion: make two common tokens EOS, and no completion goes on after either."""
    plain = load(tmp / "qwen3")
    plain.eos_ids = frozenset()
    batch, _ = draw(plain, length=40)
    common = (
        batch.completion_ids.flatten()
        .bincount(minlength=1024)
        .argsort(descending=True)[:2]
        .tolist()
    )
    several = load(saved(tmp / "several", CONFIGS["qwen3"], [2, *common]))
    assert several.eos_ids == {2, *common}, several.eos_ids
    batch, _ = draw(several, length=40)
    for ids, mask in zip(batch.completion_ids, batch.completion_mask):
        ids = ids[mask].tolist()
        assert not set(ids[:-1]) & several.eos_ids and (
            ids[-1] in several.eos_ids or len(ids) == 40
        ), ids
    last = {ids[mask][-1].item() for ids, mask in zip(batch.completion_ids, batch.completion_mask)}
    assert set(common) & last, "the check saw no completion that the further EOS ids ended"
    several.eos_ids = frozenset({2})  # mutation: the tokenizer's EOS alone
    batch, _ = draw(several, length=40)
    assert any(
        set(ids[mask][:-1].tolist()) & set(common)
        for ids, mask in zip(batch.completion_ids, batch.completion_mask)
    )
    print(
        "ok  every EOS id of the generation config ends a completion; with the tokenizer's alone, completions run on"
    )


def check_refused(tmp: Path) -> None:
    gpt2 = saved(
        tmp / "gpt2",
        GPT2Config(vocab_size=1024, n_embd=48, n_layer=2, n_head=4, n_positions=64, eos_token_id=2),
    )
    scaled = saved(tmp / "granite", GraniteConfig(**SIZES, logits_scaling=8.0))
    small = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = CONFIGS["gemma3"].to_dict() | dict(vocab_size=1027)
    special = dict(
        mm_tokens_per_image=4, image_token_index=1026, boi_token_index=1025, eoi_token_index=1024
    )
    sees = saved(
        tmp / "sees",
        Gemma3Config(
            text_config=text, vision_config=SiglipVisionConfig(**small).to_dict(), **special
        ),
    )
    bare = saved(tmp / "bare", CONFIGS["llama"])
    (bare / "chat_template.jinja").unlink()
    for folder, targets, words in (
        (gpt2, r"\.layers\.\d+\.", "lm_head"), (tmp / "llama", "no_such_name", "q_proj"), (bare, r"\.layers\.", "chat template"),
        (tmp / "nowhere", r"\.layers\.", "no such folder"), (scaled, r"\.layers\.", "does more to its logits"),
        (sees, r"\.layers\.", "take no part in reading text"), (tmp / "llama", "lm_head|layers", "matches the output layer"),
    ):  # fmt: skip
        try:
            load(folder, targets)
            raise AssertionError(f"{folder.name} was accepted")
        except UserError as error:
            assert words in str(error) and "\n" not in str(error), error
    assert len(load(sees, r"language_model\.layers\.").adapter.linears) == 14, (
        "the text half of a model that sees images is adapted"
    )
    print("ok  no Linear that matches (GPT-2's Conv1D), no chat template, no model, logits that are scaled, Linears that text never "
          "reaches, an output layer: one line each")  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        for kind, config in CONFIGS.items():
            policy = load(saved(tmp / kind, config))
            linears = {name.rsplit(".", 1)[-1] for name in policy.adapter.linears}
            assert linears == LINEARS and len(policy.adapter.linears) == 14, (
                f"{kind} adapts {sorted(policy.adapter.linears)}"
            )
            perturb(policy, 0.1)
            gap, merged = check_log_probs(kind, policy)
            if getattr(config, "sliding_window", None):
                check_window(kind, policy)
            check_update(kind, policy)
            print(
                f"ok  {kind}: 7 Linears a layer, sampler = learner to {gap:.0e}, "
                f"merged = hooked to {merged:.0e}, zones hold"
            )
        for kind, config in OTHERS.items():
            policy = load(saved(tmp / kind, config))
            perturb(policy, 0.1)
            print(
                f"ok  {kind}: packed = in full to {check_other(kind, policy):.0e} of a gradient, in mixed zones and probed"
            )
        check_loading(tmp)
        check_eos(tmp)
        check_refused(tmp)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    main()
