"""Parts c and d of `scripts/analysis/bench.py`: synthetic work of fixed size through the real sampler, gate and update.

Weights are random, completions run to their full length (no EOS), advantages are ±1 and zones are dealt in turn, so that every row
trains. No file is read but the organism's base and the pairs, whose tokens are replaced by random ones of the wanted lengths.

Bounds, for parts of a model with W bytes of weights and κ bytes of KV cache a token, N weights in its Linears, L layers of heads × head
dimension = a, hidden size d, vocabulary v, on a device of B bytes/s and F FLOP/s:

    decoding    Σ_steps (W + κ · tokens in the cache) / B
    update      passes · (2 N T + 4 L a Σ visible tokens + 2 d v T_completion) / F, where T counts a prompt once for its group;
                passes: reference, policy, its input gradients, and with gradient checkpointing the policy once more
"""

import gc
import math
import random
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    Qwen3Config,
)

from vgrout import train
from vgrout.cli import load_splits
from vgrout.config import ARMS, PRESETS, Config
from vgrout.core import Zone
from vgrout.env.problems import messages
from vgrout.env.rollouts import Sampling, stream
from vgrout.model import tokens
from vgrout.model.batch import Batch, GateOutput, Origin
from vgrout.model.lora2r import Lora2r
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.policy import Policy
from vgrout.model.sampling import decoding_batches, sample

BASE = "data/organism/base"
FLOPS, BANDWIDTH = (
    7.9e14,
    4.8e12,
)  # of an H200: bf16 FLOP/s as measured on matrix products, bytes/s as specified
QWEN3_4B = dict(
    vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
)  # fmt: skip
TINY = QWEN3_4B | dict(vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=16)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A step's work: prompts × generations rows of prompt + completion tokens; `pairs` rows a side for the gate."""

    prompts: int
    generations: int
    prompt: int  # tokens
    completion: int  # tokens
    pairs: int = 24
    pair_prompt: int = 45  # tokens
    pair_completion: int = 60  # tokens


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────


def random_policy(
    config: PretrainedConfig,
    device: str,
    dtype: torch.dtype,
    rank: int,
    gradient_checkpointing: bool,
) -> Policy:
    """A model of this configuration with random weights, built on the device, the adapter attached; nothing ends a completion."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = Lora2r(model, rank, 0, r"\.layers\.\d+\.")
    return Policy(model, AutoTokenizer.from_pretrained(BASE), adapter, frozenset(), 0)


def random_batch(
    policy: Policy, lengths: Sequence[tuple[int, int]], group: Sequence[int]
) -> tuple[Batch, Origin]:
    """Rows of (prompt, completion) tokens at random, a prompt for each group, with advantages +1 and −1 in turn."""
    rng, vocabulary = random.Random(0), policy.model.config.vocab_size
    draw = lambda n: [rng.randrange(4, vocabulary) for _ in range(n)]  # noqa: E731
    prompts = {g: draw(prompt) for g, (prompt, _) in zip(group, lengths)}
    A = [(-1.0) ** i for i in range(len(lengths))]
    completions = [draw(completion) for _, completion in lengths]
    batch = tokens.collate(
        [prompts[g] for g in group], completions, A, group, A, policy.pad_id, policy.device
    )
    no = torch.zeros(len(lengths), dtype=torch.bool, device=policy.device)
    stratum = 2 * batch.advantages.sign().long() + 1
    uniform = torch.full(batch.completion_ids.shape, -math.log(vocabulary), device=policy.device)
    return batch, Origin(student=~no, ablated=no, sampler_logps=uniform, stratum=stratum)


class Work:
    """The phases of one step at one size: `sample`, `refresh`, `score`, `update`, each a function without arguments."""

    def __init__(self, policy: Policy, config: Config, arm: str, size: Size):
        self.policy, self.size = policy, size
        cfg = replace(
            config.grpo,
            num_prompts=size.prompts,
            num_generations=size.generations,
            max_completion_length=size.completion,
        )
        self.config = replace(config, grpo=cfg)
        self.sampling = Sampling(
            size.completion, cfg.temperature, cfg.top_p, config.model.sample_token_budget
        )
        group = [i for i in range(size.prompts) for _ in range(size.generations)]
        self.batch, self.origin = random_batch(
            policy, [(size.prompt, size.completion)] * len(group), group
        )
        self.optimizer = BlockOptimizer(
            policy.adapter, cfg.learning_rate, cfg.weight_decay, cfg.max_grad_norm
        )
        self.gate, _ = train.make_gate(ARMS[arm], policy, self.config)
        if hasattr(self.gate, "score"):
            sides = [*range(size.pairs)] * 2  # hack sides, then clean sides on the same prompts
            self.gate.score.pairs, _ = random_batch(
                policy, [(size.pair_prompt, size.pair_completion)] * len(sides), sides
            )
            self.gate.score.pairs.advantages.fill_(1.0)
            self.gate.score.pairs_hack = self.gate.score.pairs_clean = torch.full(
                (size.pairs,), float("nan"), device=policy.device
            )
        zones = torch.arange(len(self.batch.group), device=policy.device) % len(Zone)
        nan = torch.full_like(self.batch.rewards, float("nan"))
        self.out = (
            GateOutput(zones, nan, 0.0, 0.0)
            if hasattr(self.gate, "score")
            else self.gate(policy, self.batch, self.origin)
        )

    def sample(self) -> None:
        rows = self.batch.input_ids[:: self.size.generations, : self.size.prompt].tolist()
        generator = torch.Generator(self.policy.device).manual_seed(0)
        drawn = sample(
            self.policy,
            rows,
            [self.size.generations] * len(rows),
            generator=generator,
            **asdict(self.sampling),
        )
        assert all(len(ids) == self.size.completion for group in drawn for ids, _ in group)

    def refresh(self) -> None:
        self.gate.refresh(self.policy)

    def score(self) -> None:
        self.out = replace(self.gate(self.policy, self.batch, self.origin), zones=self.out.zones)

    def update(self) -> None:
        figures = train.update(
            self.policy, self.batch, self.origin, self.out, self.optimizer, self.config
        )
        assert figures["param_delta"] > 0, "the update moved nothing"


def seconds(phase: Callable[[], None], device: str = "cpu") -> float:
    """Wall seconds of one call, the device's queue included."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    phase()
    synchronize()
    return time.perf_counter() - start


def figure(values: Iterable[float]) -> dict[str, float | int]:
    """Median and range over repeats."""
    values = sorted(values)
    n = len(values)
    return {
        "median": (values[(n - 1) // 2] + values[n // 2]) / 2,
        "low": values[0],
        "high": values[-1],
        "n": n,
    }


# ── c: growth, padding, token budget ─────────────────────────────────────────────────────────────────────────────


def exponent(before: float, after: float, factor: float) -> float:
    """log(t2 / t1) / log(factor): 1 where the time grows as the work does."""
    return math.log(after / before) / math.log(factor)


def linear_weights(model: nn.Module) -> int:
    return sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and ".layers." in name
    )


def scaled(config: PretrainedConfig, factor: int) -> PretrainedConfig:
    """All widths times `factor`: the Linears' weights grow by its square."""
    wide = {
        k: factor * getattr(config, k)
        for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    }
    return type(config)(**(config.to_dict() | wide))


def growth(repeats: int, size: Size, config: Config) -> list[dict]:
    """Exponents of sampling, scoring, update and refresh; the two sizes of a row are timed in turn."""
    base = AutoConfig.from_pretrained(BASE)
    small, large = (
        random_policy(c, "cpu", torch.float32, 8, False) for c in (base, scaled(base, 2))
    )
    weights = linear_weights(large.model) / linear_weights(small.model)
    step = ("sample", "score", "update")
    cases = [
        (
            "group size × 2",
            2.0,
            "routeV",
            small,
            replace(size, generations=2 * size.generations),
            step,
        ),
        (
            "completion length × 2",
            2.0,
            "routeV",
            small,
            replace(size, completion=2 * size.completion),
            step,
        ),
        (f"model × {weights:.1f}", weights, "routeV", large, size, step),
        (
            "pairs × 4, v_grad",
            4.0,
            "routeV",
            small,
            replace(size, pairs=4 * size.pairs),
            ("refresh",),
        ),
        (
            "pairs × 4, likelihood ratio",
            4.0,
            "routeL",
            small,
            replace(size, pairs=4 * size.pairs),
            ("refresh",),
        ),
    ]
    rows = []
    for name, factor, arm, policy, larger, phases in cases:
        before, after = Work(small, config, arm, size), Work(policy, config, arm, larger)
        for work in (before, after):
            work.refresh()
        for phase in phases:
            times = [
                (seconds(getattr(before, phase)), seconds(getattr(after, phase)))
                for _ in range(repeats)
            ]
            rows.append({"what": name, "phase": phase, "before": figure(a for a, _ in times), "after": figure(b for _, b in times),
                         "exponent": figure(exponent(a, b, factor) for a, b in times)})  # fmt: skip
    return rows


def padding(
    rows: list[tuple[int, int]], group_size: int, token_budget: int, by_prompt: bool
) -> tuple[float, int]:
    """(share of padded tokens that are padding, micro-batches) of rows of (prompt, completion) tokens, whole rows."""
    lengths, completions = (
        torch.tensor([p + c for p, c in rows]),
        torch.tensor([c for _, c in rows]),
    )
    mask, scored = (torch.arange(int(n.max())) < n[:, None] for n in (lengths, completions))
    ones, group = torch.ones(len(rows)), torch.arange(len(rows)) // group_size
    batch = Batch(
        mask.long(), mask.long(), scored.long(), scored, lengths - completions, ones, group, ones
    )
    parts = tokens.micro_batches(batch, token_budget, by_prompt)
    return 1 - int(lengths.sum()) / sum(len(p) * int(lengths[p].max()) for p in parts), len(parts)


def token_budgets(repeats: int, budgets: tuple[int, ...], config: Config) -> list[dict]:
    """The organism's update and v_grad scoring by token budget, on rows that its base samples; padding for the benchmark's lengths too."""
    splits = load_splits(config)
    policy = train.build_policy(config, splits)
    cfg, g = config.grpo, torch.Generator().manual_seed(config.run.seed)
    shown = [
        tokens.encode_prompt(policy.tokenizer, messages(p))
        for p in stream(splits["train"], 0, cfg.num_prompts, config.run.seed)
    ]
    sampling = Sampling(
        cfg.max_completion_length, cfg.temperature, cfg.top_p, config.model.sample_token_budget
    )
    drawn = sample(
        policy, shown, [cfg.num_generations] * len(shown), generator=g, **asdict(sampling)
    )
    lengths = [(len(p), len(ids)) for p, group in zip(shown, drawn) for ids, _ in group]
    group, long = (
        [i for i, drawn_group in enumerate(drawn) for _ in drawn_group],
        benchmark_lengths(16, 16),
    )
    size = Size(cfg.num_prompts, cfg.num_generations, 1, cfg.max_completion_length)
    works = {}
    for budget in budgets:
        work = works[budget] = Work(
            policy, replace(config, grpo=replace(cfg, token_budget=budget)), "routeV", size
        )
        work.batch, work.origin = random_batch(policy, lengths, group)
        work.refresh()
    times = [
        {b: (seconds(w.update), seconds(w.score)) for b, w in works.items()} for _ in range(repeats)
    ]
    rows = []
    for budget in budgets:
        share, parts = padding(lengths, cfg.num_generations, budget, policy.share_prompts)
        by_prompt, by_length = (
            padding(long, 16, budget, by_prompt)[0] for by_prompt in (True, False)
        )
        row = {
            "budget": budget,
            "micro_batches": parts,
            "padding": share,
            "padding_by_prompt": by_prompt,
            "padding_by_length": by_length,
        }
        for i, phase in enumerate(("update", "score")):
            row |= {
                phase: figure(t[budget][i] for t in times),
                f"{phase}_ratio": figure(t[budget][i] / t[budgets[-1]][i] for t in times),
            }
        rows.append(row)
    return rows


def benchmark_lengths(prompts: int, generations: int) -> list[tuple[int, int]]:
    """(prompt, completion) tokens like the benchmark's, an assumption: 460 ± 100, and log-normal around 365, at most 1,536."""
    rng, out = random.Random(0), []
    for _ in range(prompts):
        prompt = round(min(900, max(300, rng.gauss(460, 100))))
        out += [
            (prompt, round(min(1536, max(80, rng.lognormvariate(5.9, 0.6)))))
            for _ in range(generations)
        ]
    return out


# ── d: one large GPU ─────────────────────────────────────────────────────────────────────────────────────────────


WORKLOADS = {  # prompts of the benchmark's median length (1,634 characters), and of its longest (3,211), at 3.6 characters a token
    "8x8": Size(8, 8, 460, 512, 24, 230, 130),
    "16x16": Size(16, 16, 460, 512, 24, 230, 130),
    "worst": Size(16, 16, 900, 1536, 24, 230, 130),
}


def bound(phase: str, model: nn.Module, size: Size, config: Config) -> float | None:
    """The least seconds that the phase can take on an H200, None where there is no formula."""
    if phase == "sample":
        return decoding_bound(model, size, config.model.sample_token_budget)
    return (
        update_bound(model, size, config.model.gradient_checkpointing)
        if phase == "update"
        else None
    )


def decoding_bound(model: nn.Module, size: Size, token_budget: int) -> float:
    """Seconds to read weights and cache once a decoding step, at the device's bandwidth."""
    c, width = model.config, next(model.parameters()).element_size()
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width
    weights = width * (linear_weights(model) + c.vocab_size * c.hidden_size)
    total = 0
    for part in decoding_batches(
        [size.prompt] * size.prompts,
        [size.generations] * size.prompts,
        size.completion,
        token_budget,
    ):
        cached = sum(n for _, n in part) * sum(size.prompt + t for t in range(size.completion))
        total += size.completion * weights + kv * cached
    return total / BANDWIDTH


def update_bound(model: nn.Module, size: Size, gradient_checkpointing: bool) -> float:
    """Seconds of the update's matrix products at the device's rate: reference, policy, input gradients, recomputation."""
    c, rows = model.config, size.prompts * size.generations
    all_tokens, completions = (
        size.prompts * size.prompt + rows * size.completion,
        rows * size.completion,
    )
    visible = size.prompts * size.prompt**2 / 2 + rows * (
        size.prompt * size.completion + size.completion**2 / 2
    )  # causal
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * visible
    head = 2 * c.hidden_size * c.vocab_size * completions
    return (
        (3 + gradient_checkpointing)
        * (2 * linear_weights(model) * all_tokens + attention + head)
        / FLOPS
    )


def large(device: str, name: str, workloads: tuple[str, ...], repeats: int) -> list[dict]:
    """Sampling, scoring, refresh and update of `full` on its architecture with random weights: seconds, bounds, peak memory."""
    config, cuda = PRESETS["full"], device.startswith("cuda")
    shape = {"qwen3-4b": QWEN3_4B, "tiny": TINY}[name]
    policy = random_policy(
        Qwen3Config(**shape),
        device,
        torch.bfloat16,
        config.model.lora_rank,
        config.model.gradient_checkpointing,
    )
    rows = []
    for workload in workloads:
        size = WORKLOADS[workload] if name != "tiny" else Size(2, 4, 24, 16, 4, 12, 8)
        for arm in ("none2r", "routeV", "routeL") if workload != "worst" else ("routeV",):
            work = Work(policy, config, arm, size)
            phases = [*(["sample"] if arm == "none2r" or workload == "worst" else []),
                      *(["refresh", "score"] if hasattr(work.gate, "score") else []), "update"]  # fmt: skip
            for phase in phases:
                run = getattr(work, phase)
                peaks, times = [], []
                for _ in range(1 if workload == "worst" else repeats + 1):
                    if cuda:
                        gc.collect()
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    times.append(seconds(run, device))
                    peaks.append(memory(cuda))
                timed = times[1:] or times  # the first call also warms up
                rows.append({
                    "workload": workload, "arm": arm, "phase": phase, "seconds": figure(timed), "peak_gib": max(p[0] for p in peaks),
                    "reserved_gib": max(p[1] for p in peaks), "bound": bound(phase, policy.model, size, config), **asdict(size),
                })  # fmt: skip
            del work
    return rows


def memory(cuda: bool) -> tuple[float, float]:
    """(peak allocated, peak reserved) in GiB; on a CPU twice the process' peak resident size."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return resident, resident
