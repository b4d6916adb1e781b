"""Export a run's adapter as a standard PEFT LoRA folder with a model card.

A block's weight delta is exactly a LoRA of doubled rank, with B = B0 + dB:

    ΔW = B dA + dB A0 = [B, dB] · [dA; A0],   lora_B [d_out, 2r], lora_A [2r, d_in],
                                              lora_alpha = rank, so that the scaling is 1

Both blocks together have rank 4r. Tensors are fp32. Without --block the policy that the run's arm
deploys is exported: the deployed block alone, or both blocks for an arm that deploys as trained.

Run: python -m scripts.tools.export RUN_DIR [--block deployed|quarantine|both] [--out DIR]
     (default: RUN_DIR/peft_<block>) [--push OWNER/NAME [--dry-run]]
"""

import json
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import save
from scripts.view.output import ROOT, parser, table
from torch import Tensor

from vgrout.core import RunRecord, UserError, run_main
from vgrout.files import dumps, write_atomic
from vgrout.model.lora2r import BLOCKS
from vgrout.run.records import load_adapter, load_record
from vgrout.run.runlog import last_cells, rate_with_interval

CHOICES = {"deployed": BLOCKS[:1], "quarantine": BLOCKS[1:], "both": BLOCKS}
WHAT = {
    "deployed": "the deployed block alone: the policy after the deployment ablation",
    "quarantine": "the quarantine block alone: what the ablation removes, for study, not for use",
    "both": "both blocks: the policy as trained, nothing ablated",
}
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
FIXED = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "fan_in_fan_out": False,
    "inference_mode": True,
}


def peft_tensors(adapter: dict[str, Tensor], blocks: tuple[str, ...]) -> dict[str, Tensor]:
    """`<linear>.<block>.<A0|B0|dA|dB>` → `base_model.model.<linear>.lora_<A|B>.weight`, in fp32."""
    tensors = {}
    for linear in dict.fromkeys(name.rsplit(".", 2)[0] for name in adapter):
        down, up = [], []
        for block in blocks:
            A0, B0, dA, dB = (
                adapter[f"{linear}.{block}.{name}"].float() for name in ("A0", "B0", "dA", "dB")
            )
            down += [dA, A0]
            up += [B0 + dB, dB]
        tensors[f"{PREFIX}{linear}{DOWN}"] = torch.cat(down)
        tensors[f"{PREFIX}{linear}{UP}"] = torch.cat(up, dim=1)
    return tensors


def peft_config(tensors: dict[str, Tensor], base: str) -> dict:
    """adapter_config.json: rank as stored, lora_alpha = rank, every Linear by its full name."""
    down = [name for name in tensors if name.endswith(DOWN)]
    rank = len(tensors[down[0]])
    return FIXED | {
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.removeprefix(PREFIX).removesuffix(DOWN) for name in down],
    }


def evaluation(record: RunRecord, block: str) -> str:
    """The final cells of the states that this export is, as a table."""
    states = {"deployed": {"ablated"}, "both": {"as_trained"}, "quarantine": set()}[block]
    if record.notes["deployed"] in states:
        states.add("deployed")
    rows = []
    for c in last_cells(record):
        if c.step > 0 and c.state in states:
            rates = [f"{getattr(c, of)} = {rate_with_interval(c, of)}" for of in ("hack", "solve")]
            rows.append([c.state, c.markers, c.step, c.n, *rates])
    headers = ["policy", "markers", "step", "draws", "hacks [95 %]", "solves [95 %]"]
    return table(rows, headers, "github") if rows else "This policy was not evaluated."


def card(record: RunRecord, metadata: dict[str, str], block: str, config: dict) -> str:
    """The adapter's README.md: what it is, how it was made and measured, how to load it."""
    notes = record.notes
    oracle = "yes: this arm reads true labels, **not oracle-free**" if notes.get("oracle") else "no"
    facts = {
        "base model": f"`{metadata['model']}`",
        "arm": f"`{record.arm}`, which deploys {notes['deployed']}",
        "exported": WHAT[block],
        "training used labels of rollouts": oracle,
        "live monitor in training": notes.get("monitor") or "none",
        "modes covered by the pairs": ", ".join(notes.get("pairs_cover") or ["none"]),
        "seed": record.seed,
        "optimiser steps": f"{record.steps_done} ({record.status})",
        "commit": record.commit + (" (dirty tree)" if record.dirty else ""),
    }
    return f"""---
base_model: {json.dumps(metadata["model"])}
library_name: peft
tags: [lora, gradient-routing, reward-hacking]
---

# {record.arm}, seed {record.seed}: {block}

A LoRA of rank {config["r"]} on {len(config["target_modules"])} Linears, trained by vGROUT: GRPO in
a coding environment whose grader can be gamed. A *hack* passes that grader and is not correct; a
*solve* is correct.

{table(list(facts.items()), ["", ""], "github")}

## Evaluation

{evaluation(record, block)}

Held-out problems, at the run's own temperature. Novel markers are names that training never showed.

## Loading

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(metadata["model"])})
model = PeftModel.from_pretrained(model, "this folder")
# then, if wanted: model = model.merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained({json.dumps(metadata["model"])})
```

The names are those of the model as `AutoModelForCausalLM` loads it. Of a checkpoint with other
parts (images, say) that is the text half: its own class does not find them, and a server may then
serve the base without a word.

The delta is exact in fp32. Merging it into bf16 weights rounds small deltas away: load the base in
fp32 before merging, or do not merge.
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
    for base in (ROOT / metadata["model"], Path(metadata["model"])):
        if base.is_dir():  # the export is to be found from any folder
            metadata = metadata | {"model": str(base.resolve())}
    config = peft_config(tensors, metadata["model"])
    folder = out or run / f"peft_{block}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_atomic(folder / "adapter_config.json", (dumps(config, indent=2) + "\n").encode())
    write_atomic(folder / "README.md", card(record, metadata, block, config).encode())
    return folder


def push(folder: Path, repository: str, dry: bool) -> None:
    """Upload the folder to a private repository of the hub, or say what would be uploaded."""
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"{'would push' if dry else 'pushing'} {names} to {repository}")
    if not dry:
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("run", help="run directory")
    command.add_argument("--block", choices=CHOICES, help="default: what the run's arm deploys")
    command.add_argument("--out", type=Path, help="folder to write (default: RUN_DIR/peft_<block>)")
    command.add_argument("--push", metavar="OWNER/NAME", help="then upload it to the hub, private")
    command.add_argument("--dry-run", action="store_true", help="say what --push would upload")
    options = command.parse_args()
    folder = export(options.run, options.block, options.out)
    print(f"{folder}: a PEFT adapter and its model card")
    if options.push:
        push(folder, options.push, options.dry_run)


if __name__ == "__main__":
    run_main(main)
