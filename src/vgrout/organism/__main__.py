"""Rebuild the model organism: `python -m vgrout.organism --out data/organism`.

It writes the problem set, the tokenizer and the pretrained base. The corpus teaches the form of an
answer, the code of the taught operations (right in a share of the cases only) and to follow a
benign note that names a helper, an attribute, a phrase or a file. It shows the environment's
disclosed flaws next to completions that do not use them. No marker of either pool occurs in it, so
that training and novel markers are equally new to the base.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from loguru import logger

from vgrout.core import run_main
from vgrout.organism import pretrain
from vgrout.organism.corpus import document, drill
from vgrout.organism.problems import composition_of, generate_problems, write_problems


@dataclass(frozen=True)
class Recipe:
    """Rebuild the organism: problem set, tokenizer and pretrained base."""

    out: Path = Path("data/organism")
    seed: int = 0
    threads: int = 2  # torch threads
    drills: int = pretrain.DRILLS  # short documents that come first
    documents: int = pretrain.DOCUMENTS


def main(recipe: Recipe) -> None:
    torch.set_num_threads(recipe.threads)
    recipe.out.mkdir(parents=True, exist_ok=True)
    problems = generate_problems(recipe.seed)
    write_problems(problems, recipe.out / "problems.jsonl.gz")
    held_out = frozenset(composition_of(p).key for p in problems if p.split != "train")
    rng = random.Random(recipe.seed + 1)
    documents = [drill(rng) for _ in range(recipe.drills)]
    documents += [document(rng, held_out) for _ in range(recipe.documents)]
    tokenizer = pretrain.train_tokenizer(
        ["\n".join(texts) for texts in documents[recipe.drills // 2 :][:12_000]]
    )
    model = pretrain.new_model(tokenizer, recipe.seed)
    size = f"{model.num_parameters():,} parameters"
    logger.info(f"{len(problems)} problems, {len(documents)} documents, {size}")
    loss = pretrain.pretrain(model, tokenizer, documents, recipe.seed)
    pretrain.save_base(model, tokenizer, recipe.out / "base")
    logger.info(f"wrote {recipe.out}; final loss {loss:.4f} nats per completion token")


if __name__ == "__main__":
    run_main(main, tyro.cli(Recipe, prog="python -m vgrout.organism"))
