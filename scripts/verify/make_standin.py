"""Save a small random Qwen3 with the organism's tokenizer and a Qwen3-style template.

    python scripts/verify/make_standin.py OUT [--hidden-size 256] [--num-layers 4] [--seed 0]

It stands in for Qwen3-4B where the code path of the `full` preset is to be run without the real
weights. It has learned nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

ORGANISM = Path(__file__).resolve().parents[2] / "data/organism/base"
TEMPLATE = """{%- for m in messages -%}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\n\n</think>\n\n' }}
{%- endif -%}
{%- endif -%}
"""  # with thinking switched off, the assistant's turn opens with an empty thought


@dataclass(frozen=True)
class Args:
    """Save a stand-in model."""

    out: Annotated[Path, tyro.conf.Positional]
    hidden_size: int = 256
    num_layers: int = 4
    context: int = 8192  # tokens
    seed: int = 0


def main(args: Args) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, args.context
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=max(1, args.hidden_size // 128),
        head_dim=64,
        intermediate_size=3 * args.hidden_size,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, randomly initialised")


if __name__ == "__main__":
    main(tyro.cli(Args))
