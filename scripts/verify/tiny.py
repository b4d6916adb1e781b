"""A tiny random Qwen3 policy and random batches, for gates that need a model and no tokenizer."""

import copy
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vgrout.model import loading, sampling
from vgrout.model.batch import Batch
from vgrout.model.lora2r import BLOCKS, Lora2r
from vgrout.model.policy import Policy
from vgrout.model.tokens import collate

VOCAB, EOS, PAD = 64, 1, 0
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    eos_token_id=EOS,
    pad_token_id=PAD,
    max_position_embeddings=128,
    initializer_range=0.2,
)


def tiny_policy(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rank: int = 3,
    checkpointing: bool = False,
) -> Policy:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).to(dtype).eval().requires_grad_(False)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0")
    adapter = Lora2r(model, rank, seed=seed + 1)
    if checkpointing:
        loading.enable_checkpointing(model, adapter)
    return Policy(model, tokenizer, adapter, frozenset({EOS}), PAD, token_budget=1000)


def trained(policy: Policy, blocks: Sequence[str] = BLOCKS) -> list[torch.nn.Parameter]:
    return [p for block in blocks for p in policy.adapter.parameters(block)]


@torch.no_grad()
def perturb(
    policy: Policy,
    scale: float = 0.2,
    seed: int = 0,
    blocks: Sequence[str] = BLOCKS,
) -> None:
    """Plant a random delta in some blocks."""
    generator = torch.Generator().manual_seed(seed)
    for p in trained(policy, blocks):
        p.add_(scale * torch.randn(p.shape, generator=generator))


def draw(policy: Policy, prompts: list[list[int]], rows: list[int], **options) -> list:
    """Sampled rows by prompt: (ids, log-probs). The same seed unless a generator is given."""
    usual = dict(
        max_completion_length=12,
        temperature=0.7,
        top_p=1.0,
        token_budget=10_000,
    )
    seeded = {"generator": torch.Generator().manual_seed(3)}
    return sampling.sample(policy, prompts, rows, **usual | seeded | options)


def random_batch(rows: int = 6, seed: int = 0, group_size: int = 3) -> Batch:
    """Groups that share a prompt, completions of unlike lengths, advantages none of which is 0."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=g))
        return torch.randint(2, VOCAB, (length,), generator=g).tolist()

    group = [i // group_size for i in range(rows)]
    prompts = [draw(2, 9) for _ in range(group[-1] + 1)]
    rewards = torch.rand(rows, generator=g).tolist()
    A = torch.randn(rows, generator=g).tolist()
    completions = [draw(1, 8) for _ in group]
    return collate([prompts[i] for i in group], completions, rewards, group, A, PAD, "cpu")


def planted(rows: int = 6, **options) -> tuple[Policy, Batch]:
    """A policy with a random delta in both blocks, and a batch."""
    policy = tiny_policy(**options)
    perturb(policy)
    return policy, random_batch(rows)


def read_models_once() -> None:
    """From now on in this process and its forks, a model is copied, not read a second time."""
    real, read = loading.AutoModelForCausalLM, {}

    class Once:
        @staticmethod
        def from_pretrained(path: str, **options):
            key = path, options["dtype"]
            if key not in read:
                read[key] = real.from_pretrained(path, **options)
            return copy.deepcopy(read[key])

    loading.AutoModelForCausalLM = Once
