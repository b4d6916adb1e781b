"""Rank-2r LoRA with a deployed and a quarantine block on every Linear (LoRA:
https://arxiv.org/abs/2106.09685).

    y = W x + Σ_b keep_b · Δ_b(x),   Δ_b(x) = B_b (dA_b x) + dB_b (A0_b x),   B_b = B0_b + dB_b

Δ_b(x) is B_b A_b x − B0_b A0_b x with A_b = A0_b + dA_b, without the cancellation of that
difference. A0, B0 are frozen seeded Gaussians, dA and dB start at zero and train in fp32: the net
delta is zero at initialisation, weight decay is decay toward it, and the deployment ablation drops
Δ_quarantine.

Zones say, for every row (or token), which block is in the forward and which learns. A block that
is kept and does not learn is a constant: neither its parameters nor its input get a gradient
through it. Interventions are contexts and end with their scope. No score, reward or label is seen
here.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vgrout.core import NO_ZONE, UserError, Zone
from vgrout.files import nested

BLOCKS = ("deployed", "quarantine")

# zone → ((deployed, quarantine) in the forward, (deployed, quarantine) learn)
ZONE_TABLE = {
    Zone.RETAIN: ((1.0, 0.0), (1.0, 0.0)),
    Zone.ABSORB: ((1.0, 1.0), (1.0, 1.0)),
    Zone.ROUTE: ((1.0, 1.0), (0.0, 1.0)),
}
RETAIN_BOTH = ((1.0, 1.0), (1.0, 0.0))  # --retain-forward both: the quarantine is kept, a constant


class Block(nn.Module):
    """One rank-r block of one Linear: frozen A0 and B0, trained dA and dB of the same shapes, fp32.

    Δ(x) = B (dA x) + dB (A0 x) = [B, dB] [dA; A0] x, the product of `up` and `down`.
    """

    def __init__(self, A0: Float[Tensor, "r i"], B0: Float[Tensor, "o r"]):
        super().__init__()
        self.register_buffer("A0", A0)
        self.register_buffer("B0", B0)
        self.dA = nn.Parameter(torch.zeros_like(A0))
        self.dB = nn.Parameter(torch.zeros_like(B0))

    def down(self) -> Float[Tensor, "k i"]:
        """[2r, d_in]: the rows of dA, then those of A0."""
        return torch.cat([self.dA, self.A0])

    def up(self) -> Float[Tensor, "o k"]:
        """[d_out, 2r]: the columns of B0 + dB, then those of dB."""
        return torch.cat([self.B0 + self.dB, self.dB], dim=1)

    @torch.no_grad()
    def delta(self) -> Float[Tensor, "o i"]:
        """The block's dense weight delta, fp32."""
        return self.up() @ self.down()


class LoraLinear(nn.Module):
    """Both blocks of one Linear."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        generator: torch.Generator,
    ):
        super().__init__()
        d_out, d_in = linear.weight.shape
        A0 = torch.randn(2 * rank, d_in, generator=generator) / d_in**0.5
        B0 = torch.randn(d_out, 2 * rank, generator=generator) / (2 * rank) ** 0.5
        A0, B0 = A0.to(linear.weight.device), B0.to(linear.weight.device)
        self.deployed = Block(A0[:rank], B0[:, :rank].contiguous())
        self.quarantine = Block(A0[rank:], B0[:, rank:].contiguous())

    def factors(
        self,
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "k i"], Float[Tensor, "o k"]]:
        """(D [4r, d_in], U [d_out, 4r]): the deployed block's down and up, then the
        quarantine's."""
        blocks = (self.deployed, self.quarantine)
        down = torch.cat([block.down() for block in blocks])
        return down.to(dtype), torch.cat([block.up() for block in blocks], dim=1).to(dtype)


@dataclass(frozen=True, slots=True)
class State:
    """What a forward pass runs under; masks are [g, 1 or s, 2], by block, with one row for all
    alike."""

    learn: Float[Tensor, "rows tokens b"] | None = None  # None: every block, everywhere
    constant: Float[Tensor, "rows tokens b"] | None = None  # in the forward alone; None: nothing
    c: dict[str, Float[Tensor, "rows tokens r"]] | None = None  # the probe of each Linear
    where: Bool[Tensor, "g s"] | None = None  # positions that c multiplies; None: all
    seen: dict[str, Float[Tensor, "g s r"]] | None = None  # a recording of each Linear's A x
    shape: tuple[int, ...] = ()  # rows and tokens of the pass


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever is done to the tensors ends with the scope: they are restored by copy, exactly."""
    before = [x.detach().clone() for x in tensors]
    try:
        yield
    finally:
        for x, value in zip(tensors, before):
            x.data.copy_(value)


class Lora2r:
    """The adapter of a model: seeded construction, contexts, parameters by block, save and load."""

    def __init__(
        self,
        model: nn.Module,
        rank: int,
        seed: int,
        targets: str = r"\.layers\.\d+\..*",
    ):
        """Attach to every `nn.Linear` whose name matches `targets` (regular expression, search)."""
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.linears = {n: m for n, m in linears.items() if re.search(targets, "." + n)}
        if not self.linears:
            raise UserError(
                f"no Linear of {type(model).__name__} matches {targets!r}; its Linears are "
                f"{sorted({n.split('.')[-1] for n in linears})}: set --targets"
            )
        generator = torch.Generator().manual_seed(seed)
        self.layers = {n: LoraLinear(m, rank, generator) for n, m in self.linears.items()}
        self.rank, self.seed, self.targets = rank, seed, targets
        self.device = next(iter(self.linears.values())).weight.device
        self.state = State()
        self._attach()

    def _attach(self) -> None:
        for name, linear in self.linears.items():
            linear.forward = partial(self._forward, name)

    def _forward(
        self,
        name: str,
        x: Float[Tensor, "*tokens i"],
    ) -> Float[Tensor, "*tokens o"]:
        """The equation above, of one Linear.

        A probe c = 1 multiplies the live bottleneck A x of the deployed block in front of B: it
        changes no value, and ∂/∂c is what is asked for. The factors are then constants.
        """
        state, r = self.state, self.rank
        if x.ndim != 3:  # experts and low-rank attention have tokens in another shape
            return self._forward(name, self._as_rows(name, x)).reshape(*x.shape[:-1], -1)
        probed = state.c is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not probed):
            down, up = self.layers[name].factors(x.dtype)
        h = F.linear(x, down)  # dA x and A0 x of the deployed block, then of the quarantine
        live = h[..., :r] + h[..., r : 2 * r]  # A x
        if state.seen is not None:
            state.seen[name] = live.detach()
        if probed:
            change = state.c[name] - 1
            if state.where is not None:
                change = change * state.where[..., None]
            h = torch.cat([h[..., :r] + (change * live).to(h.dtype), h[..., r:]], dim=-1)

        def deltas(mask: Float[Tensor, "rows tokens b"]) -> Float[Tensor, "g s o"]:
            by_block = h.unflatten(-1, (2, 2 * r)) * mask[..., None].to(h.dtype)
            return F.linear(by_block.flatten(-2), up)

        y = type(self.linears[name]).forward(self.linears[name], x)
        y = y + (F.linear(h, up) if state.learn is None else deltas(state.learn))
        return y if state.constant is None else y + deltas(state.constant).detach()

    def _as_rows(
        self,
        name: str,
        x: Float[Tensor, "*tokens i"],
    ) -> Float[Tensor, "g s i"]:
        if x[..., 0].numel() != math.prod(self.state.shape):
            raise UserError(
                f"{name} runs on a part of the tokens, or on none of a known row: "
                "leave it out of --targets"
            )
        return x.reshape(*self.state.shape, -1)

    # ── contexts ─────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def using(
        self,
        state: State,
    ) -> Iterator[None]:
        before, self.state = self.state, state
        try:
            yield
        finally:
            self.state = before

    def changed(self, **values):
        """Some fields of the state have other values."""
        return self.using(replace(self.state, **values))

    def route(
        self,
        zones: Int[Tensor, "*rows"],
        retain_forward: str = "ablated",
    ):
        """Mask every row (zones [g]) or token (zones [g, s]; NO_ZONE is in whichever) by its
        zone."""
        retain = RETAIN_BOTH if retain_forward == "both" else ZONE_TABLE[Zone.RETAIN]
        table = torch.tensor([*(ZONE_TABLE | {Zone.RETAIN: retain}).values()], device=zones.device)
        found = zones[zones != NO_ZONE].unique()
        zones = found if len(found) == 1 else zones.clamp(min=0)
        keep, learn = table[zones.view(len(zones), -1)].unbind(-2)  # table: [zone, keep | learn, b]
        constant = keep - learn
        return self.changed(learn=learn, constant=constant if constant.any() else None)

    def ablated(
        self,
        block: str = "quarantine",
    ):
        """The block's delta is zero: without the quarantine, the deployed state."""
        kept = torch.tensor([[[float(b != block) for b in BLOCKS]]], device=self.device)
        return self.changed(learn=kept, constant=None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, untouched."""
        hooks = {n: vars(linear).pop("forward", None) for n, linear in self.linears.items()}
        try:
            yield
        finally:
            if any(hooks.values()):
                self._attach()

    @contextmanager
    def probing(
        self,
        rows: int,
        tokens: int = 1,
        where: Bool[Tensor, "g s"] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Multiply every deployed bottleneck A x by c = 1 [rows, tokens, r]; yields Linear → c.

        `where` limits c to some positions of a forward pass over rows in full.
        """
        ones = torch.ones(rows, tokens, self.rank, device=self.device)
        c = {n: ones.clone().requires_grad_() for n in self.linears}
        with self.changed(c=c, where=where):
            yield c

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Keep the deployed bottleneck A x [g, s, r] of every Linear at the last forward pass."""
        seen: dict[str, Tensor] = {}
        with self.changed(seen=seen):
            yield seen

    @contextmanager
    def shifted(
        self,
        deltas: list[Tensor],
        block: str = "deployed",
    ) -> Iterator[None]:
        """Add deltas to a block's parameters, in their order."""
        params = self.parameters(block)
        with restored(params):
            for p, d in zip(params, deltas, strict=True):
                p.data.add_(d)
            yield

    @contextmanager
    def merged(
        self,
        ablated: bool = False,
    ) -> Iterator[None]:
        """Fold the deltas into the weights, without hooks."""
        blocks = BLOCKS[:1] if ablated else BLOCKS
        with self.disabled(), restored([linear.weight for linear in self.linears.values()]):
            for name, linear in self.linears.items():
                delta = sum(getattr(self.layers[name], b).delta() for b in blocks)
                linear.weight.data.copy_(linear.weight.float() + delta)
            yield

    # ── parameters ───────────────────────────────────────────────────────────────────────────────

    def parameters(
        self,
        block: str,
    ) -> list[nn.Parameter]:
        """The trained tensors of one block, in a fixed order."""
        return [p for layer in self.layers.values() for p in getattr(layer, block).parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """Every trained and frozen tensor as `<linear>.<block>.<dA|dB|A0|B0>`."""
        return nested({name: layer.state_dict() for name, layer in self.layers.items()})

    @torch.no_grad()
    def load_state_dict(
        self,
        tensors: dict[str, Tensor],
    ) -> None:
        """Copy a `state_dict` in; unknown, missing or misshapen tensors raise UserError."""
        own = self.state_dict()
        shapes, given = ({k: list(x.shape) for k, x in part.items()} for part in (own, tensors))
        odd = sorted(k for k in shapes.keys() | given.keys() if shapes.get(k) != given.get(k))
        if odd:
            raise UserError(
                f"the adapter does not fit this model: {len(odd)} tensors differ, e.g. {odd[0]} "
                f"is {given.get(odd[0])}, expected {shapes.get(odd[0])}"
            )
        for name, value in tensors.items():
            own[name].copy_(value)
