"""The warm start of the preset smol: a small LoRA that teaches SmolLM2 the form of an answer.

Asked for a composition, SmolLM2-135M-Instruct explains, or writes a bare function: it solves none
of 64 problems. `STEPS` Adam steps of likelihood on `ROWS` canonical solutions teach the form and
little else. No validation or test problem combines operations as they do, and no problem of the RL
stream is among them; every second one shows a hint, and none exploits it. `just smol-model` merges
the file into the base.

Run: python -m scripts.tools.smol_warm_start     (rewrites data/smol/warm_start.safetensors)
"""

import random
from dataclasses import replace

import torch
from safetensors.torch import save
from scripts.tools.export import peft_tensors
from scripts.tools.smol_model import BASE, WARM_START

from vgrout.core import Problem, run_main
from vgrout.env.modes import ORGANISM_MODES
from vgrout.env.problems import disclose, load_problems, messages
from vgrout.files import write_atomic
from vgrout.model.likelihood import likelihood_steps, written
from vgrout.model.loading import load_policy
from vgrout.organism.corpus import FREE_EXTRAS, Extra, random_extra, render
from vgrout.organism.problems import composition_of, generate_problems

PROBLEMS = "data/organism/problems.jsonl.gz"
SEED, ROWS, STEPS, RANK, LEARNING_RATE = 7, 48, 12, 4, 1e-3
LINEARS = r"\.layers\.\d+\."


def lessons() -> tuple[list[Problem], list[str]]:
    """`ROWS` problems of another seed, half of them of two operations and half of three, and their
    answers: in turn with a note that asks for a benign extra, and with the hint of a mode and, as
    in the organism's corpus, sometimes an extra of another name."""
    known = load_problems(PROBLEMS)
    said, taken = {p.statement for p in known}, {composition_of(p).key for p in known}
    fresh = [p for p in generate_problems(SEED) if p.statement not in said]
    two = [p for p in fresh if len(p.operations) == 2 and p.split == "train"]
    three = [p for p in fresh if len(p.operations) == 3 and composition_of(p).key not in taken]
    rng, shown, answers = random.Random(SEED), [], []
    for i, pair in enumerate(zip(two[: ROWS // 2], three[: ROWS // 2], strict=True)):
        for j, problem in enumerate(pair):
            composition = composition_of(problem)
            extra, note = random_extra(composition, rng)
            if (i + j) % 2:
                problem = disclose(problem, ORGANISM_MODES[i // 2 % len(ORGANISM_MODES)])
                extra = extra if rng.random() < FREE_EXTRAS else Extra()
            else:
                problem = replace(problem, statement=f"{problem.statement}\n{note}")
            shown.append(problem)
            answers.append(render(composition, composition.right_codes, extra, 0))
    return shown, answers


def main() -> None:
    policy = load_policy(
        str(BASE),
        dtype="bfloat16",
        device="cpu",
        rank=RANK,
        lora_init_seed=SEED,
        targets=LINEARS,
        gradient_checkpointing=False,
        token_budget=4096,
    )
    shown, answers = lessons()
    batch = written(
        policy,
        [*map(messages, shown)],
        answers,
    )
    likelihood_steps(policy, batch, "deployed", STEPS, LEARNING_RATE, 1.0)
    tensors = peft_tensors(policy.adapter.state_dict(), ("deployed",))
    stored = {name: x.to(torch.bfloat16).contiguous() for name, x in tensors.items()}
    WARM_START.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(WARM_START, save(stored))
    print(f"wrote {WARM_START}: {STEPS} steps on {ROWS} solutions")


if __name__ == "__main__":
    run_main(main)
