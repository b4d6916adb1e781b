"""An exported adapter, loaded by plain peft and transformers, is our policy in fp32.

Run: python -m scripts.verify.verify_export
"""

import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scripts.tools import export as export_tool
from scripts.tools.export import CHOICES, export, push
from scripts.verify.stored import captured, novel_cell, planted_record, planted_run, refused
from scripts.verify.tiny import perturb
from torch import Tensor
from transformers import AutoModelForCausalLM

from vgrout.model.loading import load_policy
from vgrout.model.policy import Policy
from vgrout.run.provenance import provenance

BASE, TOLERANCE = "data/organism/base", 5e-6  # of the largest logit
LOST = 100 * TOLERANCE  # beyond it two policies are not the same
POLICY = {
    "dtype": "float32",
    "device": "cpu",
    "rank": 4,
    "lora_init_seed": 0,
    "targets": r"\.layers\.",
    "gradient_checkpointing": False,
}


def planted(folder: Path, policy: Policy, deployed: str) -> Path:
    """A finished run directory with a planted adapter and one evaluation cell."""
    notes = {"oracle": False, "deployed": deployed, "pairs_cover": ["sentinel"]}
    record = planted_record(steps_done=6, evals=[novel_cell(6, 1, 2)], notes=notes)
    metadata = {"rank": str(policy.adapter.rank), "seed": "0", "model": BASE}
    with planted_run(folder, record) as run:
        run.save_adapter(policy.adapter.state_dict(), metadata)
    return folder


@torch.no_grad()
def ours(policy: Policy, block: str, ids: Tensor) -> Tensor:
    """Logits of our policy with one block, or both, in the forward."""
    without = {"deployed": "quarantine", "quarantine": "deployed"}.get(block)
    with policy.adapter.ablated(without) if without else nullcontext():
        return policy.model(ids).logits


@torch.no_grad()
def theirs(folder: Path, ids: Tensor, merge: bool = False) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    return (model.merge_and_unload() if merge else model)(ids).logits


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest logit: fp32 rounding grows with the logits."""
    return float((a - b).abs().max() / b.abs().max())


def check_logits(policy: Policy, folders: dict[str, Path], ids: Tensor) -> None:
    with policy.adapter.disabled(), torch.no_grad():
        base = policy.model(ids).logits
    want = {block: ours(policy, block, ids) for block in CHOICES}
    for block, folder in folders.items():
        assert gap(want[block], base) > 0.1, "the planted delta must matter"
        for merge in (False, True):
            got = theirs(folder, ids, merge)
            off = gap(got, want[block])
            assert off < TOLERANCE, f"{block}, merged {merge}: logits differ by {off}"
            others = [gap(got, want[other]) for other in CHOICES if other != block]
            assert min(others) > LOST, f"{block} cannot be told from another block: {others}"
    print(f"ok  plain peft gives our logits to {TOLERANCE:g}, merged too; another block's differ")


def check_mutation(policy: Policy, folder: Path, ids: Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    tensors, rank = load_file(path), policy.adapter.rank
    for name, x in tensors.items():
        if "lora_B" in name:
            x[:, rank:] = 0  # ΔW without dB A0
    save_file(tensors, path)
    off = gap(theirs(folder, ids), ours(policy, "deployed", ids))
    assert off > LOST, "the check misses a lost term dB A0"
    print("ok  a lost term dB·A0 is noticed")


def check_card(folder: Path, run: Path, other: Path) -> None:
    card, commit = (folder / "README.md").read_text(), provenance()["commit"]
    for words in (
        str(Path(BASE).resolve()),
        "routeV",
        "41",
        "1 = 0.25",
        "2 = 0.50",
        commit,
    ):
        assert words in card, f"the model card lacks {words!r}"
    names = [export(path, None, None).name for path in (run, other)]
    assert names == ["peft_deployed", "peft_both"], "SHOULD be what the run's arm deploys"
    (other / "adapter.safetensors").unlink()
    refused("no adapter", export, other, None, None)
    print("ok  the card names its run; the default is what the arm deploys; no adapter, one line")


def check_push(folder: Path) -> None:
    hub = mock.Mock()
    with mock.patch.object(export_tool, "HfApi", return_value=hub):
        said = captured(push, folder, "me/a", True)
        assert "would push README.md, adapter_config.json" in said and not hub.method_calls, said
        captured(push, folder, "me/a", False)
    hub.upload_folder.assert_called_once_with(repo_id="me/a", folder_path=folder)
    print("ok  --push uploads the folder to a private repository, with --dry-run it says what")


def check_program(run: Path) -> None:
    """`vgrout` works from any folder."""
    program = str(Path(sys.executable).with_name("vgrout"))
    export_it = ["export", str(run)]
    for words, status, said in (
        (["--help"], 0, "usage"),
        (["sow"], 2, "usage"),
        (export_it, 0, "PEFT"),
    ):
        done = subprocess.run([program, *words], cwd="/", text=True, capture_output=True)
        assert done.returncode == status and said in done.stdout, done
    print("ok  vgrout names its commands, and exports a run from another folder")


def main() -> None:
    torch.set_num_threads(1)
    policy = load_policy(BASE, **POLICY)
    perturb(policy, 0.02)
    words, generator = (policy.model.config.vocab_size, torch.Generator().manual_seed(0))
    ids = torch.randint(3, words, (2, 24), generator=generator)
    with tempfile.TemporaryDirectory() as tmp:
        run = planted(Path(tmp) / "run", policy, "ablated")
        other = planted(Path(tmp) / "as_trained", policy, "as_trained")
        folders = {block: export(run, block, None) for block in CHOICES}
        check_logits(policy, folders, ids)
        check_mutation(policy, folders["deployed"], ids)
        check_program(run)
        check_push(folders["deployed"])
        check_card(folders["deployed"], run, other)


if __name__ == "__main__":
    main()
