"""An exported adapter, loaded by plain peft and transformers, is our policy: the logits agree to 1e-5 in fp32.

uv run python scripts/verify/verify_export.py
"""

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scripts.tools.export import CHOICES, export
from scripts.verify.tiny import perturb
from torch import Tensor
from transformers import AutoModelForCausalLM

from vgrout.core import EvalResult, RunRecord, UserError
from vgrout.model.loading import load_policy
from vgrout.model.policy import Policy
from vgrout.run.provenance import provenance
from vgrout.run.records import Run

BASE, TOLERANCE = "data/organism/base", 5e-6  # of the largest logit


def planted_run(folder: Path, policy: Policy, deployed: str) -> Path:
    """A finished run directory with a planted adapter and one evaluation cell."""
    cell = EvalResult(
        "test",
        "novel",
        "deployed",
        6,
        4,
        1,
        2,
        {"sentinel": {"n": 4, "hack": 1, "solve": 2}},
        {"p": [4, 1, 2]},
    )
    record = RunRecord(
        schema_version=1, arm="routeV", preset="organism", seed=41, config={}, data_hashes={}, pair_hash="", split_hashes={},
        sandbox_layers={}, status="running", steps_done=6, evals=[cell],
        notes={"oracle": False, "deployed": deployed, "pairs_cover": ["sentinel"]},
        **provenance(),
    )  # fmt: skip
    run = Run.create(folder, record, resume=False)
    run.save_adapter(
        policy.adapter.state_dict(), {"rank": str(policy.adapter.rank), "seed": "0", "model": BASE}
    )
    run.finish("finished")
    run.close()
    return folder


@torch.no_grad()
def ours(policy: Policy, block: str, ids: Tensor) -> Tensor:
    """Logits of our policy with one block, or both, in the forward."""
    without = {"deployed": "quarantine", "quarantine": "deployed"}
    with policy.adapter.ablated(without[block]) if block in without else nullcontext():
        return policy.model(ids).logits


@torch.no_grad()
def theirs(folder: Path, ids: Tensor, merge: bool = False) -> Tensor:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), folder
    ).eval()
    return (model.merge_and_unload() if merge else model)(ids).logits


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest logit: fp32 rounding grows with the logits, which depend on the base."""
    return float((a - b).abs().max() / b.abs().max())


def main() -> None:
    policy = load_policy(
        BASE,
        dtype="float32",
        device="cpu",
        rank=4,
        lora_init_seed=0,
        targets=r"\.layers\.",
        gradient_checkpointing=False,
    )
    perturb(policy, 0.02)
    ids = torch.randint(
        3, policy.model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0)
    )
    with tempfile.TemporaryDirectory() as tmp:
        run = planted_run(Path(tmp) / "run", policy, "ablated")
        with policy.adapter.disabled(), torch.no_grad():
            base = policy.model(ids).logits
        folders = {block: export(run, block, None) for block in CHOICES}
        for block, folder in folders.items():
            want = ours(policy, block, ids)
            assert gap(want, base) > 0.1, (
                "the planted delta must matter for this check to mean something"
            )
            got = {merge: theirs(folder, ids, merge) for merge in (False, True)}
            for merge, logits in got.items():
                assert (off := gap(logits, want)) < TOLERANCE, (
                    f"{block}, merged {merge}: logits differ by {off}"
                )
            others = [
                gap(got[False], ours(policy, other, ids)) for other in CHOICES if other != block
            ]
            assert min(others) > 100 * TOLERANCE, (
                f"{block} cannot be told from another block: {others}"
            )
        print(
            f"ok  plain peft gives our logits to {TOLERANCE:g} for {', '.join(CHOICES)}, merged too; another block's differ"
        )

        path = folders["deployed"] / "adapter_model.safetensors"
        whole, want = load_file(path), ours(policy, "deployed", ids)
        rank, mutated = policy.adapter.rank, {}
        for name, x in whole.items():  # mutation: ΔW without dB A0
            mutated[name] = (
                torch.cat([x[:, :rank], torch.zeros_like(x[:, rank:])], 1)
                if "lora_B" in name
                else x
            )
        save_file(mutated, path)
        assert gap(theirs(folders["deployed"], ids), want) > 100 * TOLERANCE, (
            "the check misses a lost term dB A0"
        )
        save_file(whole, path)
        config = folders["deployed"] / "adapter_config.json"
        text = config.read_text()
        config.write_text(json.dumps(json.loads(text) | {"lora_alpha": 4 * rank}))
        assert gap(theirs(folders["deployed"], ids), want) > 100 * TOLERANCE, (
            "the check misses a wrong scaling"
        )
        config.write_text(text)
        print("ok  a lost term dB·A0 and a wrong lora_alpha are noticed")

        card = (folders["deployed"] / "README.md").read_text()
        for words in (
            BASE,
            "routeV",
            "41",
            "1 = 0.25",
            "2 = 0.50",
            "PeftModel",
            provenance()["commit"],
        ):
            assert words in card, f"the model card lacks {words!r}"
        assert export(run, None, None).name == "peft_deployed"
        other = planted_run(Path(tmp) / "as_trained", policy, "as_trained")
        assert export(other, None, None).name == "peft_both", (
            "an arm that deploys as trained exports both blocks"
        )
        (other / "adapter.safetensors").unlink()
        for bad, word in ((other, "no adapter"), (Path(tmp) / "nowhere", "no run record")):
            try:
                export(bad, None, None)
                raise AssertionError(f"{bad} was exported")
            except UserError as error:
                assert word in str(error), error
        print(
            "ok  the card names base, arm, seed, commit and counts; the default is what the arm deploys; no adapter, one line"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
