"""The owner's path on one GPU, in at most four minutes: decoding, update, scoring, memory.

Qwen3-4B's architecture with random weights in bf16, an adapter of rank 32 a block, random prompts
of the benchmark's lengths, completions of 512 tokens without an end. Every row goes into the file
as it is done, and a rerun does what is missing. Bounds: decoding reads the weights once and each
row's keys and values; an update costs 2 FLOP a parameter and token forward and 2 backward.

On a CPU the same rows run at a tiny size: the rehearsal, whose figures mean nothing.

Run: PYTHONPATH=src:. python scripts/analysis/gpu_check.py [out/gpu_check.json]
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config

from vgrout.config import GRPOConfig, PhaseConfig
from vgrout.gate.scores import ProbeOptions
from vgrout.gate.v_grad import probe_gradients
from vgrout.model import sampling, tokens
from vgrout.model.batch import Batch, Behaviour, Trained
from vgrout.model.decoding import Growing
from vgrout.model.loading import enable_checkpointing
from vgrout.model.lora2r import Lora2r
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.policy import Policy
from vgrout.model.sampling import sample
from vgrout.model.update import update

CUDA = torch.cuda.is_available()
DEVICE = torch.cuda.get_device_name() if CUDA else "CPU: a rehearsal"
BANDWIDTH = {
    "H100": 3.35e12,
    "H200": 4.8e12,
    "B200": 8.0e12,
}  # bytes a second, data sheets
FLOPS = 790e12  # a second: what large bf16 products reach on an H100 or H200
NAMES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim"
).split()
QWEN3_4B, TINY = (
    (151936, 2560, 9728, 36, 32, 8, 128),
    (512, 64, 96, 2, 4, 2, 16),
)
Figures = dict[str, float]
OWN_CACHE = patch.object(sampling, "decoder", lambda policy, rows, length: Growing(policy))
TARGETS = r"\.layers\.\d+\."
ZONES = {
    "none2r": [1],
    "absorbQ": [1, 0, 0],
    "routeV": [0, 1, 2],
}  # of an arm's rows, in turn


@dataclass(frozen=True)
class Size:
    """Prompt and completion in tokens; prompts and rollouts of each."""

    prompt: int = 600
    completion: int = 512
    prompts: int = 8
    rollouts: int = 8


SMALL = Size() if CUDA else Size(24, 16, 2, 4)
LARGE = replace(SMALL, prompts=2 * SMALL.prompts, rollouts=2 * SMALL.rollouts)
WORST = Size(2048, 1536, 2, 2) if CUDA else Size(48, 32, 2, 2)  # a micro-batch of `full`


def build() -> Policy:
    torch.manual_seed(0)
    device = "cuda" if CUDA else "cpu"
    sizes = zip(NAMES, QWEN3_4B if CUDA else TINY)
    config = Qwen3Config(**dict(sizes), tie_word_embeddings=True)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval().requires_grad_(False)
    adapter = Lora2r(model, 32 if CUDA else 4, 0, TARGETS)
    never = frozenset({config.vocab_size})  # no token ends a completion
    return Policy(model, None, adapter, never, 0, token_budget=16384)


def prompts_of(size: Size) -> list[list[int]]:
    """Random ids, of lengths between half and all of `size.prompt`."""
    generator = torch.Generator().manual_seed(1)
    lengths = [size.prompt - i * size.prompt // (2 * size.prompts) for i in range(size.prompts)]
    return [torch.randint(1, 500, (n,), generator=generator).tolist() for n in lengths]


def clocked(work: Callable[[], object]) -> Figures:
    """Seconds of the second call, which finds graphs captured, and the peak memory in GiB."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    return {"seconds": seconds[-1], "peak_gib": peak}


def draw(
    policy: Policy,
    size: Size,
    temperature: float = 0.7,
) -> list:
    return sample(
        policy,
        prompts_of(size),
        [size.rollouts] * size.prompts,
        max_completion_length=size.completion,
        temperature=temperature,
        top_p=0.95,
        token_budget=2**20,
        generator=torch.Generator(policy.device).manual_seed(2),
    )


def decoding(policy: Policy, size: Size, how: AbstractContextManager | None = None) -> Figures:
    with how or nullcontext():
        figures = clocked(lambda: draw(policy, size))
    rows, config = size.prompts * size.rollouts, policy.model.config
    rate = rows * size.completion / figures["seconds"]
    weights = 2 * sum(p.numel() for p in policy.model.parameters())
    a_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    read = weights + rows * a_token * (0.75 * size.prompt + size.completion / 2)
    bandwidth = next((b for card, b in BANDWIDTH.items() if card in DEVICE), float("nan"))
    return figures | {
        "tokens_per_second": rate,
        "of_bound": rate * read / rows / bandwidth,
    }


def agreement(policy: Policy) -> Figures:
    """Share of greedy tokens that the graph and transformers' cache have in common; bf16 ties part
    rows sooner or later, so the first 32 are compared."""
    with OWN_CACHE:
        plain = torch.tensor(greedy(policy))
    return {"share": float((torch.tensor(greedy(policy)) == plain).float().mean())}


def greedy(policy: Policy) -> list[list[int]]:
    return [ids[:32] for group in draw(policy, SMALL, 1e-4) for ids, _ in group]


def batch_of(policy: Policy, size: Size) -> Batch:
    prompts = prompts_of(size)
    rows = size.prompts * size.rollouts
    generator = torch.Generator().manual_seed(3)
    written = torch.randint(1, 500, (rows, size.completion), generator=generator).tolist()
    group = [i // size.rollouts for i in range(rows)]
    rewards = [float(i % 2) for i in range(rows)]
    advantages = [reward - 0.5 for reward in rewards]
    shown = [prompts[i] for i in group]
    return tokens.collate(shown, written, rewards, group, advantages, 0, policy.device)


def updating(policy: Policy, size: Size, arm: str, checkpointing: bool = False) -> Figures:
    if checkpointing:
        enable_checkpointing(policy.model, policy.adapter)
    batch = batch_of(policy, size)
    config = GRPOConfig(
        max_completion_length=size.completion,
        num_prompts=size.prompts,
        num_generations=size.rollouts,
        beta=1e-3,
    )
    n = len(batch.group)
    zones = torch.tensor(ZONES[arm], device=policy.device).repeat(n)[:n]
    rows = torch.arange(n, device=policy.device)
    trained = Trained(batch, zones, rows, None)
    sampled = torch.zeros_like(batch.completion_mask, dtype=torch.float32)
    behaviour = Behaviour(torch.zeros_like(batch.group, dtype=torch.bool), sampled)
    optimizer = BlockOptimizer(policy.adapter, 7e-5, 0.1, 1.0)
    figures = clocked(lambda: update(policy, optimizer, trained, behaviour, config, PhaseConfig()))
    policy.model.gradient_checkpointing_disable()
    count = size.prompts * (0.75 * size.prompt) + n * size.completion
    parameters = sum(p.numel() for p in policy.model.parameters())
    return figures | {"of_bound": 4 * parameters * count / FLOPS / figures["seconds"]}


def scoring(policy: Policy, size: Size) -> Figures:
    batch = batch_of(policy, size)
    options = ProbeOptions(size.completion, 0.7, 16384)
    return clocked(lambda: probe_gradients(policy, batch, options))


ROWS = {  # name of a row → what measures it, and its arguments
    "greedy tokens, graph and plain": (agreement,),
    "decoding 64, graphs": (decoding, SMALL),
    "decoding 64, transformers' cache": (decoding, SMALL, OWN_CACHE),
    "decoding 256, graphs": (decoding, LARGE),
    "update 64, none2r": (updating, SMALL, "none2r"),
    "update 64, none2r, checkpointing": (updating, SMALL, "none2r", True),
    "update 64, absorbQ": (updating, SMALL, "absorbQ"),
    "update 64, routeV": (updating, SMALL, "routeV"),
    "scoring 64, routeV": (scoring, SMALL),
    "worst micro-batch of full": (updating, WORST, "routeV", True),
}


def main(path: Path) -> None:
    done = json.loads(path.read_text()) if path.exists() else {}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    done["machine"] = {"device": DEVICE} | versions
    path.parent.mkdir(parents=True, exist_ok=True)
    policy = build()
    for name, (measure, *arguments) in ROWS.items():
        if name not in done:
            try:
                done[name] = measure(policy, *arguments)
            except torch.OutOfMemoryError as error:
                done[name] = {"out_of_memory": str(error)[:120]}
                policy.decoder = None
                torch.cuda.empty_cache()
            path.write_text(json.dumps(done, indent=1))
        figures = [f"{key} {value:.4g}" for key, value in done[name].items() if value == value]
        print(f"{name:36}", *figures, flush=True)
    parts = [f"{kind} 64, {of}" for kind, of in (("decoding", "graphs"), ("update", "routeV"))]
    plain = sum(done[part]["seconds"] for part in parts)
    scored = done["scoring 64, routeV"]["seconds"]
    print(f"{DEVICE}: a step of 64 rows takes {plain:.2f} s, {scored:.2f} s more with a score")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/gpu_check.json"))
