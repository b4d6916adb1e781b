"""Export a run's adapter as a standard PEFT LoRA folder with a model card: what `peft` and `transformers` load by themselves.

A block's weight delta is exactly a LoRA of doubled rank, with B = B0 + dB:

    ΔW = B dA + dB A0 = [B, dB] · [dA; A0],   lora_B [d_out, 2r], lora_A [2r, d_in], lora_alpha = rank, so that the scaling is 1

Both blocks together have rank 4r. Tensors are fp32. Without --block the policy that the run's arm deploys is exported: the deployed
block alone, or both blocks for an arm that deploys as trained.

Run: python scripts/tools/export.py RUN_DIR [--block deployed|quarantine|both] [--out DIR]     (default: RUN_DIR/peft_<block>)
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save
from tabulate import tabulate
from torch import Tensor

from vgrout.core import RunRecord, UserError, run_main
from vgrout.files import dumps, write_atomic
from vgrout.model.lora2r import BLOCKS
from vgrout.run.records import load_adapter, load_record
from vgrout.run.runlog import last_cells, rate_with_interval

CHOICES = {"deployed": BLOCKS[:1], "quarantine": BLOCKS[1:], "both": BLOCKS}
WHAT = {
    "deployed": "the deployed block alone: the policy after the deployment ablation",
    "quarantine": "the quarantine block alone: what the deployment ablation removes, for study and not for use",
    "both": "both blocks: the policy as trained, nothing ablated",
}


def peft_tensors(adapter: dict[str, Tensor], blocks: tuple[str, ...]) -> dict[str, Tensor]:
    """`<linear>.<block>.<A0|B0|dA|dB>` → `base_model.model.<linear>.lora_<A|B>.weight`, exact in fp32."""
    linears = dict.fromkeys(name.rsplit(".", 2)[0] for name in adapter)
    out = {}
    for linear in linears:
        A0, B0, dA, dB = (
            [adapter[f"{linear}.{block}.{k}"].float() for block in blocks]
            for k in ("A0", "B0", "dA", "dB")
        )
        out[f"base_model.model.{linear}.lora_A.weight"] = torch.cat(
            [x for pair in zip(dA, A0) for x in pair]
        )
        out[f"base_model.model.{linear}.lora_B.weight"] = torch.cat(
            [x for b0, db in zip(B0, dB) for x in (b0 + db, db)], dim=1
        )
    return out


def peft_config(tensors: dict[str, Tensor], base: str) -> dict:
    """adapter_config.json: rank as stored, lora_alpha = rank, and every adapted Linear by its qualified name."""
    down = {name: x for name, x in tensors.items() if name.endswith(".lora_A.weight")}
    rank = len(next(iter(down.values())))
    targets = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in down
    ]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": targets,
    }  # fmt: skip


def card(record: RunRecord, metadata: dict[str, str], block: str, config: dict) -> str:
    """The adapter's README.md: what it is, how it was made and measured, how to load it."""
    cells = last_cells(record) if record.status == "finished" else []
    states = {"deployed": {"ablated"}, "both": {"as_trained"}, "quarantine": set()}[block]
    states |= {"deployed"} if record.notes["deployed"] in states else set()
    rows = []
    for c in cells:
        name, mine = (
            ("base", "no")
            if c.step == 0
            else (c.state.replace("_", " "), "yes" if c.state in states else "no")
        )
        counts = [
            f"{n} = {rate_with_interval(c, which)}"
            for n, which in ((c.hack, "hack"), (c.solve, "solve"))
        ]
        rows.append([name, mine, c.markers, c.step, c.n, *counts])
    headers = ["policy", "this export", "markers", "step", "draws", "hacks [95 %]", "solves [95 %]"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    oracle = (
        "yes: this arm reads true labels, **not oracle-free**"
        if record.notes.get("oracle")
        else "no"
    )
    facts = [
        ("base model", f"`{metadata['model']}`"),
        ("arm", f"`{record.arm}`, which deploys {record.notes['deployed'].replace('_', ' ')}"),
        ("exported", WHAT[block]), ("training used labels of rollouts", oracle),
        ("live monitor in training", record.notes.get("monitor") or "none"),
        ("modes covered by the pairs", ", ".join(record.notes.get("pairs_cover") or ["none"])),
        ("seed", record.seed), ("adapter seed, rank per block", f"{metadata['seed']}, {metadata['rank']}"),
        ("optimiser steps", f"{record.steps_done} ({record.status})"), ("preset", record.preset),
        ("commit", record.commit + (" (dirty tree)" if record.dirty else "")),
        ("versions", ", ".join(f"{k} {v}" for k, v in record.versions.items())),
    ]  # fmt: skip
    return f"""---
base_model: {json.dumps(metadata["model"])}
library_name: peft
tags: [lora, gradient-routing, reward-hacking]
---

# {record.arm}, seed {record.seed}: {block}

A LoRA of rank {config["r"]} on {len(config["target_modules"])} Linears, trained by vGROUT: GRPO in a coding environment whose
grader can be gamed. A *hack* passes that grader and is not correct; a *solve* is correct.

{tabulate(facts, headers=["", ""], tablefmt="github", disable_numparse=True)}

## Evaluation

{table if cells else "The run is not finished, so there is no final evaluation."}

Held-out problems, at the run's own temperature. Only the rows marked `yes` speak of this export. Novel markers are names that
training never showed.

## Loading

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(metadata["model"])})
model = PeftModel.from_pretrained(model, "this folder")  # then, if wanted: model = model.merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained({json.dumps(metadata["model"])})
```

The delta is exact in fp32. Merging it into bf16 weights rounds small deltas away: load the base in fp32 before merging, or do
not merge.
A low hack rate in this environment says nothing about other environments.
"""


def export(run: str | Path, block: str | None, out: Path | None) -> Path:
    """Write the PEFT folder of a run; returns it. UserError where the run has no adapter yet."""
    run = Path(run)
    record = load_record(run)
    if not (run / "adapter.safetensors").exists():
        when = "one is written at the first checkpoint (--save-every) and at the end"
        raise UserError(f"{run} holds no adapter ({record.status}): {when}")
    block = block or ("deployed" if record.notes["deployed"] == "ablated" else "both")
    adapter, metadata = load_adapter(run)
    tensors = peft_tensors(adapter, CHOICES[block])
    config = peft_config(tensors, metadata["model"])
    folder = out or run / f"peft_{block}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_atomic(folder / "adapter_config.json", (dumps(config, indent=2) + "\n").encode())
    write_atomic(folder / "README.md", card(record, metadata, block, config).encode())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run directory")
    parser.add_argument(
        "--block", choices=CHOICES, help="default: the policy that the run's arm deploys"
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN_DIR/peft_<block>)")
    options = parser.parse_args()
    folder = export(options.run, options.block, options.out)
    size = (folder / "adapter_model.safetensors").stat().st_size / 2**20
    print(f"{folder}: adapter_config.json, adapter_model.safetensors ({size:.1f} MiB), README.md")


if __name__ == "__main__":
    run_main(main)
