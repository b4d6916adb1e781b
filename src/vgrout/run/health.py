"""What ends a run early, and says why: limits found before step 0, divergence, a dead policy, signals, full memory or disk.

A guard reads figures and reference solutions; it can end a run or warn, and it changes no parameter.
"""

import copy
import errno
import math
import signal
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vgrout.core import EvalResult, Problem, UserError, Zone
from vgrout.env.problems import messages
from vgrout.env.rollouts import Sampling
from vgrout.gate.gate import Gate, PinnedGate
from vgrout.model import tokens
from vgrout.model.batch import Batch, GateOutput, Origin
from vgrout.model.likelihood import mean_logps
from vgrout.model.lora2r import BLOCKS
from vgrout.model.optimizer import BlockOptimizer
from vgrout.model.policy import Policy
from vgrout.model.sampling import sample
from vgrout.run import runlog
from vgrout.run.records import Run

FULL = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
}  # the device, the quota, the file size limit; read-only


@dataclass(frozen=True)
class Limits:
    """When a run has diverged. A breach must last `patience` steps; a figure that is not finite ends the run at once."""

    kl: float = (
        10.0  # nats a token, a step's mean; healthy organism runs stay below 2 but for single steps
    )
    probe_fall: float = 3.0  # nats a token below the base's log-prob of reference solutions, 20 times less likely; healthy: 0.3
    spike: float = (
        30.0  # times the median gradient norm of the window, where it is also beyond `clips`
    )
    clips: float = 10.0  # times max_grad_norm; less is clipped without harm
    window: int = 20  # trained steps that make the median; fewer than half of them judge nothing
    patience: int = 5  # steps in a row: k3 has a heavy tail
    probes: int = 8  # reference solutions in the probe set


class Diverged(UserError):
    """A limit ended the run. Its one line holds the evidence; the newest checkpoint precedes the breach."""


class Guard:
    """Judges every step's figures. Its state is a function of the rows already logged, so that a resumed run judges alike."""

    def __init__(
        self, policy: Policy, problems: Sequence[Problem], history: list[dict[str, Any]], sampling: Sampling,
        *, token_budget: int, max_grad_norm: float, limits: Limits = Limits(),
    ):  # fmt: skip
        """`problems` give the probe set, their reference solutions; `history` is metrics.jsonl so far."""
        self.limits, self.max_grad_norm = limits, max_grad_norm
        self.norms: dict[str, list[float]] = {block: [] for block in BLOCKS}
        self.streak, self.evidence = 0, ""
        shown = problems[: limits.probes]
        prompts = [tokens.encode_prompt(policy.tokenizer, messages(p)) for p in shown]
        texts = [
            tokens.encode_completion(policy.tokenizer, f"```python\n{p.canonical.strip()}\n```")
            for p in shown
        ]
        ones = [1.0] * len(shown)
        self.batch = tokens.collate(prompts, [t[: sampling.max_completion_length] for t in texts], ones, [*range(len(shown))],
                                    ones, policy.pad_id, policy.device)  # fmt: skip
        self.temperature, self.token_budget = sampling.temperature, token_budget
        with policy.adapter.disabled():
            self.base = self.probe(policy)["probe_logp"]
        for row in history:
            self._judge(row)

    def probe(self, policy: Policy) -> dict[str, float]:
        """Mean log-prob of the probe set, nats a token, as trained."""
        return {
            "probe_logp": float(
                mean_logps(policy, self.batch, self.temperature, self.token_budget).mean()
            )
        }

    @property
    def calm(self) -> bool:
        """No breach is under way: the state may become a checkpoint."""
        return self.streak == 0

    def __call__(self, row: dict[str, Any]) -> None:
        """Judge one step, after its row is logged; warns at a breach, raises Diverged when it lasts."""
        broken = [
            k
            for k in ("loss", "kl", "logp_mean", "probe_logp", *_norm_keys())
            if not math.isfinite(row.get(k, 0.0))
        ]
        if broken:
            raise Diverged(self._line(row, f"{', '.join(broken)} not finite"))
        self._judge(row)
        if self.streak >= self.limits.patience:
            raise Diverged(self._line(row, f"{self.evidence}, {self.streak} steps in a row"))
        if self.streak:
            runlog.warn(
                f"step {row['step']}: {self.evidence}",
                "a run that goes on like this is stopped; nothing is saved meanwhile",
            )

    def _judge(self, row: dict[str, Any]) -> None:
        found = []
        if (kl := row.get("kl") or 0.0) > self.limits.kl:
            found.append(f"KL {kl:.3g} > {self.limits.kl:g} nats a token")
        if (fall := self.base - (row.get("probe_logp") or self.base)) > self.limits.probe_fall:
            found.append(
                f"the probe set's log-prob fell by {fall:.3g} > {self.limits.probe_fall:g} nats a token"
            )
        for block, norms in self.norms.items():
            norm = (
                row.get(f"grad_norm_{block}") or 0.0
            )  # absent where no group had variance, 0 where no row trained the block
            usual = statistics.median(norms) if len(norms) >= self.limits.window // 2 else math.inf
            if norm > max(self.limits.spike * usual, self.limits.clips * self.max_grad_norm):
                found.append(
                    f"the {block} gradient norm {norm:.3g} > {self.limits.spike:g} × its median {usual:.3g}"
                )
            elif norm:
                norms[:] = [*norms, norm][-self.limits.window :]
        self.streak, self.evidence = (self.streak + 1 if found else 0), "; ".join(found)

    def _line(self, row: dict[str, Any], evidence: str) -> str:
        return f"diverged at step {row['step']}: {evidence}; lower --learning-rate or raise --beta, in another --out-dir"


def _norm_keys() -> list[str]:
    return [f"grad_norm_{block}" for block in BLOCKS]


def warn_if_dead(run: Run) -> None:
    """The dead-policy tripwire: says loudly, and in the record, that two evaluations in a row saw the deployed policy solve nothing."""
    if dead(run.record.evals):
        run.record.notes["dead_policy"] = run.record.evals[-1].step
        runlog.warn("DEAD POLICY? the deployed policy solved nothing in two evaluations in a row",
                    "compare with the base's rate at step 0; hack 0 with solve 0 is no success")  # fmt: skip


def dead(evals: list[EvalResult]) -> bool:
    cells = [cell for cell in evals if cell.state == "deployed" and cell.markers == "novel"][-2:]
    return len(cells) == 2 and not any(cell.solve for cell in cells)


# ── before step 0 ────────────────────────────────────────────────────────────────────────────────────────────────


def worst_case(
    policy: Policy, gate: PinnedGate | Gate, optimizer: BlockOptimizer, update: Callable[[Batch, Origin, GateOutput], Any],
    problems: Sequence[Problem], sampling: Sampling, *, num_prompts: int, num_generations: int, token_budget: int, zones: Sequence[Zone],
) -> None:  # fmt: skip
    """Try the largest batch that the configuration allows, so that memory runs out now or never; restores everything.

    Longest prompt and full-length completions: the sampler's cache for every decoding batch, then one micro-batch that fills
    `token_budget` through the gate and the update, its rows of several prompts and in all `zones` that an update may mix. `gate` is
    copied, parameters and optimiser are put back. The sampler's rows leave as they finish and rarely all reach the limit, so that
    there full memory is a warning; in training it ends the run. Not covered: the pairs (no flag sets their length), and the features
    that token granularity keeps.
    """
    t = sampling.max_completion_length
    prompt = max(
        (tokens.encode_prompt(policy.tokenizer, messages(p)) for p in _longest(problems)), key=len
    )
    completion = (prompt * (t // len(prompt) + 1))[:t]
    generator = torch.Generator(policy.device).manual_seed(0)
    try:
        sample(policy, [(prompt + completion)[:-1]] * num_prompts, [num_generations] * num_prompts, generator=generator,
               **asdict(replace(sampling, max_completion_length=1)))  # fmt: skip
    except (MemoryError, RuntimeError) as error:
        if not _memory_is_full(error):
            raise
        runlog.warn(f"a decoding batch whose completions all reach {t} tokens does not fit: {describe(error)}",
                    "or go on, if completions are mostly shorter")  # fmt: skip
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
    n = min(max(1, token_budget // (len(prompt) + t)), num_prompts * num_generations)
    rewards, group = (
        [float(i % 2) for i in range(n)],
        [i * min(num_prompts, n) // n for i in range(n)],
    )
    prompts = [prompt[i:] + prompt[:i] for i in group]  # as many that differ as a step has
    batch = tokens.collate(
        prompts,
        [completion] * n,
        rewards,
        group,
        [r - 0.5 for r in rewards],
        policy.pad_id,
        policy.device,
    )
    none = torch.zeros(n, dtype=torch.bool, device=policy.device)
    origin = Origin(student=~none, ablated=none, sampler_logps=torch.zeros_like(batch.completion_mask, dtype=torch.float32),
                    stratum=2 * batch.advantages.sign().long() + 1, label=none)  # fmt: skip
    trained = [p for block in BLOCKS for p in policy.adapter.parameters(block)]
    before, moments = [p.detach().clone() for p in trained], optimizer.state_dict()
    scratch = copy.deepcopy(gate)
    for score in (getattr(scratch, "score", None), getattr(scratch, "control", None)):
        if getattr(score, "pairs", None) is not None:  # two prompts are enough to have a direction
            score.pairs = _few(score.pairs)
    scratch.refresh(policy)
    out = scratch(policy, batch, origin)
    mixed = torch.tensor([int(zones[i % len(zones)]) for i in range(n)], device=policy.device)
    update(
        batch,
        origin,
        replace(out, zones=mixed if out.zones.ndim == 1 else mixed[:, None].expand_as(out.zones)),
    )
    with torch.no_grad():
        for p, value in zip(trained, before):
            p.copy_(value)
    optimizer.load_state_dict(moments)


def _longest(problems: Sequence[Problem], among: int = 4) -> list[Problem]:
    return sorted(problems, key=lambda p: len(p.system) + len(p.statement))[-among:]


def _few(pairs: Batch) -> Batch:
    """Of hack sides followed by clean sides, the first pair on each of the first two prompts."""
    n = len(pairs.group) // 2
    rows = [
        pairs.group[:n].tolist().index(prompt) for prompt in pairs.group[:n].unique()[:2].tolist()
    ]
    return tokens.select(
        pairs, torch.tensor([*rows, *(n + i for i in rows)], device=pairs.group.device)
    )


# ── signals, exceptions and the status that they leave ───────────────────────────────────────────────────────────


class StopSignal:
    """SIGTERM and SIGINT ask for a stop at the end of the step; a second one stops at once."""

    def __init__(self):
        self.asked = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number


@contextmanager
def recorded(run: Run) -> Iterator[Run]:
    """The run's record ends with a truthful status, whatever happens, and says which step the newest checkpoint holds."""
    try:
        yield run
    except BaseException as error:
        if run.record.status == "running":
            last = (
                "no checkpoint" if run.saved_step is None else f"checkpoint: step {run.saved_step}"
            )
            status = (
                "interrupted"
                if isinstance(error, KeyboardInterrupt)
                else f"failed: {describe(error)}"
            )
            run.finish(f"{status} ({last})")
        raise
    finally:
        run.close()


@contextmanager
def explained() -> Iterator[None]:
    """Memory or disk that is full becomes a UserError that says what to lower or free."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not (_memory_is_full(error) or _disk_is_full(error)):
            raise
        raise UserError(describe(error)) from error


def describe(error: BaseException) -> str:
    """One line for an exception: what was full and what mends it, or its type and message."""
    if _memory_is_full(error):
        in_sampling = any(
            frame.name == "sample" for frame in traceback.extract_tb(error.__traceback__)
        )
        flags = "--sample-token-budget" if in_sampling else (
            "--token-budget, then set --gradient-checkpointing, then lower --num-generations or --max-completion-length")  # fmt: skip
        return f"out of memory while {'sampling' if in_sampling else 'training or scoring'}: lower {flags}"
    if _disk_is_full(error):
        return f"cannot write {error.filename or 'the run directory'} ({error.strerror}): make room there, then add --resume"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _memory_is_full(error: BaseException) -> bool:
    """CUDA has a type of its own; on the CPU torch raises a RuntimeError, whose text alone tells."""
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return True
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
    )


def _disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FULL
