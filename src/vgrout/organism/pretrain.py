"""The organism's tokenizer and its base: a small Qwen3 trained from scratch on the generated
corpus.
"""

import random
import time
from pathlib import Path
from statistics import mean

import torch
from loguru import logger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vgrout.model import tokens

END, START, PAD = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE, CONTEXT = 1024, 1024
EMBEDDING_OFFSET = 0.1  # standard deviation of its components; the embeddings themselves have 0.02
DRILLS, DOCUMENTS, BATCH, LEARNING_RATE, WARM_UP = 15_000, 34_000, 48, 3e-3, 50
POOL = 32  # batches are cut from pools of this many batches, sorted by length, to limit padding


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text round-trips) with a Qwen-style chat template; EOS is
    `<|im_end|>`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=[START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """About 1.3 M parameters, randomly initialised.

    All embeddings share one random offset: queries and keys then have a constant part from the
    start, which lets a head attend by position (to the previous token) at once, and induction heads
    form in hundreds of steps instead of thousands.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=480,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        offset = EMBEDDING_OFFSET * torch.randn(config.hidden_size)
        model.get_input_embeddings().weight.add_(offset)
    return model


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[tuple[str, str]],
    seed: int,
) -> float:
    """One pass over (user message, completion) documents; the loss is on the completions and their
    EOS alone.

    The learning rate warms up, stays, and falls linearly in the second half; the gradient norm is
    clipped at 1. Returns the mean loss (nats per token) of the last 50 steps.
    """
    examples = [_encode(tokenizer, prompt, completion) for prompt, completion in documents]
    batches = _batches(examples, random.Random(seed))
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda i: min((i + 1) / WARM_UP, 1.0, 0.02 + 1.96 * (1 - i / len(batches)))
        )
        for o in optimizers
    ]
    model.train()
    losses, started = [], time.monotonic()
    for i, rows in enumerate(batches):
        ids, labels = _pad([examples[row] for row in rows], tokenizer.pad_token_id)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        scored = labels[:, 1:] >= 0
        loss = F.cross_entropy(model.lm_head(hidden[scored]), labels[:, 1:][scored])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        if i % 100 == 0 or i == len(batches) - 1:
            seconds = time.monotonic() - started
            logger.info(
                f"step {i:5d} of {len(batches)}  loss {mean(losses[-50:]):.4f}  {seconds:.0f} s"
            )
    model.eval()
    return mean(losses[-50:])


def _optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (steps scaled to AdamW's size), AdamW for the embedding
    and the norms.
    """
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.ndim == 2 and "layers" in name}
    others = [p for name, p in named.items() if name not in matrices]
    scaled = {"weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
    return [
        torch.optim.Muon(matrices.values(), lr=LEARNING_RATE, **scaled),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _encode(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> tuple[list[int], int]:
    """(token ids of prompt, completion and EOS; length of the prompt)."""
    ids = tokens.encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
    return ids + tokens.encode_completion(tokenizer, completion), len(ids)


def _batches(examples: list[tuple[list[int], int]], rng: random.Random) -> list[list[int]]:
    """Row numbers in batches of similar length; the order of the documents is kept from pool to
    pool.
    """
    batches = []
    for start in range(0, len(examples), BATCH * POOL):
        pool = sorted(
            range(start, min(start + BATCH * POOL, len(examples))),
            key=lambda row: len(examples[row][0]),
        )
        cut = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        batches += rng.sample(cut, len(cut))
    return batches


def _pad(rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids [b, s] and labels [b, s], −100 on prompt and padding. Causal attention needs
    no mask here.
    """
    ids, mask = tokens.padded([ids for ids, _ in rows], pad)
    starts = torch.tensor([n for _, n in rows])
    completion = mask & (torch.arange(ids.shape[1]) >= starts[:, None])
    return ids, ids.masked_fill(~completion, -100)


def save_base(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bf16 safetensors and tokenizer files, loadable by the Auto classes."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
