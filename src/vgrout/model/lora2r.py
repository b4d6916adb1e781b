"""Rank-2r LoRA with a deployed and a quarantine block on every Linear (LoRA: https://arxiv.org/abs/2106.09685).

    y = W x + keep_dep · Δ_dep(x) + keep_quar · Δ_quar(x),   Δ_b(x) = B_b (dA_b x) + dB_b (A0_b x),   B_b = B0_b + dB_b

which equals B_b A_b x − B0_b A0_b x with A_b = A0_b + dA_b, without the cancellation of evaluating that difference. A0, B0 are
frozen seeded Gaussians, dA and dB start at zero and train in fp32; so the net delta is zero at initialisation, weight decay is
decay toward the initialisation, and the deployment ablation drops Δ_quar.

Zones say, for every row (or every token), which block is in the forward and which block learns. A block that is kept but
does not learn is a constant of the backward pass: neither its parameters nor its input get a gradient through it.

Everything is a context, so that no intervention outlives its scope: `route`, `ablated`, `disabled`, `probing`, `merged`.
A backward pass belongs inside the context of its forward pass: gradient checkpointing runs the forward again.
What this file does not do: it never sees a score, a reward or a label.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vgrout.core import NO_ZONE, UserError, Zone
from vgrout.model.blocks import LoraLinear
from vgrout.model.packing import Packing
from vgrout.model.products import Columns, MaskedUp, Merged, Run

BLOCKS = ("deployed", "quarantine")

# zone → ((deployed, quarantine) in the forward, (deployed, quarantine) learn)
ZONE_TABLE = {
    Zone.RETAIN: ((1.0, 0.0), (1.0, 0.0)),
    Zone.ABSORB: ((1.0, 1.0), (1.0, 1.0)),
    Zone.ROUTE: ((1.0, 1.0), (0.0, 1.0)),
}
Mask = tuple[float, float]  # (deployed, quarantine)
Masks = tuple[Mask, Mask]  # (in the forward, learn)
UNMASKED: Masks = ((1.0, 1.0), (1.0, 1.0))
RETAIN_BOTH = (
    (1.0, 1.0),
    (1.0, 0.0),
)  # --retain-forward both: the quarantine is kept, and is a constant


class Lora2r:
    """The adapter of a whole model: seeded construction, contexts, parameters by block, save and load."""

    def __init__(self, model: nn.Module, rank: int, seed: int, targets: str = r"\.layers\.\d+\..*"):
        """Attach to every `nn.Linear` whose qualified name matches `targets` (regular expression, search)."""
        found = {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and re.search(targets, "." + n)
        }
        if not found:
            names = sorted(
                {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            )
            raise UserError(
                f"no Linear of {type(model).__name__} matches {targets!r}; its Linears are {names}: set --targets"
            )
        generator = torch.Generator().manual_seed(seed)
        self.linears: dict[str, nn.Linear] = found
        self.layers = {n: LoraLinear(m, rank, generator) for n, m in found.items()}
        self.rank, self.seed, self.targets = rank, seed, targets
        self._keep: Tensor | None = (
            None  # [g, 1 or s, 2] forward mask by block; None: both on, unmasked
        )
        self._learn: Tensor | None = None
        self._runs: list[tuple[Masks, int]] | None = [
            (UNMASKED, 0)
        ]  # masks of neighbouring tokens and their number; one run is all
        self._c: dict[str, Tensor] | None = None  # probe: module → ones [g, 1 or s, r]
        self._where: Tensor | None = None  # [g, s] positions that c multiplies; None: all
        self._seen: dict[str, Tensor] | None = (
            None  # recording: module → deployed bottleneck A x [g, s, r]
        )
        self._packing: Packing | None = None  # None: rows are rows
        self._shape: tuple[int, ...] = ()  # rows and tokens of a pass over rows in full
        self.products = (
            torch.float32
        )  # the dtype that factors of the one product, and of the output layer's, are rounded to
        self._made: dict | None = (
            None  # within `unchanged`: factors and weights that were made already
        )
        self._base: dict[str, Tensor] = {}  # pristine weights, copied at the first merge
        self._attach()

    # ── forward ──────────────────────────────────────────────────────────────────────────────────────────────

    def _attach(self) -> None:
        for name, linear in self.linears.items():
            linear.forward = partial(self._forward, name)

    def _detach(self) -> None:
        for linear in self.linears.values():
            vars(linear).pop("forward", None)

    def _forward(self, name: str, x: Float[Tensor, "*tokens i"]) -> Float[Tensor, "*tokens o"]:
        """W x and both deltas: in fp32 one product for each run of tokens with the same masks, else by block and mask.

        Experts and low-rank attention run on tokens in another shape, which is led back to the rows'.
        """
        linear, packing, r = self.linears[name], self._packing, self.rank
        if x.ndim != 3:
            shape = self._shape if packing is None else (1, len(packing.row))
            if x[..., 0].numel() != math.prod(shape):
                raise UserError(
                    f"{name} runs on a part of the tokens, or on none of a known row: leave it out of --targets"
                )
            return self._forward(name, x.reshape(*shape, -1)).reshape(*x.shape[:-1], -1)
        c, where = self._c and self._c[name], self._where if packing is None else packing.row
        down, up = self._factors(name, x.dtype)
        one = self._runs and self._seen is None and (c is None or len(self._runs) == 1)
        if one and linear.weight.dtype == x.dtype == torch.float32:
            grad = (
                torch.is_grad_enabled()
            )  # without it nothing learns, and W + U D is needed of what is kept alone
            runs = [
                Run(self._columns(keep), self._columns(learn if grad else keep), n)
                for (keep, learn), n in self._runs
            ]
            weights = {
                columns: self._weight(name, columns, down, up)
                for columns in {c for run in runs for c in run[:2]}
            }
            return Merged.apply(x, linear.bias, down, up, c, where, weights, runs, self.products)
        h = F.linear(x, down)  # [g, s, 4r]: dA_dep x, A0_dep x, dA_quar x, A0_quar x
        if self._seen is not None:
            seen = (h[..., :r] + h[..., r : 2 * r]).detach()  # A x, deployed
            self._seen[name] = seen if packing is None else seen[0, packing.spread]
        rows = lambda m: (
            m if m is None or packing is None or len(m) == 1 else m[packing.row, 0][None]
        )
        return type(linear).forward(linear, x) + MaskedUp.apply(
            h, up, rows(self._keep), rows(self._learn), c, where
        )

    def _factors(
        self, name: str, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "k i"], Float[Tensor, "o k"]]:
        """(D, U) of both blocks; constants where c is probed, and in bf16 training copies that autograd leads back."""
        layer, learned = self.layers[name], torch.is_grad_enabled() and self._c is None
        if learned and dtype != torch.float32:  # gradients of copies of their own are added in fp32
            return layer.factors(dtype, learned)
        return self._once((name, dtype, learned), lambda: layer.factors(dtype, learned))

    @torch.no_grad()
    def _weight(
        self, name: str, columns: Columns, down: Tensor, up: Tensor
    ) -> Float[Tensor, "o i"]:
        """W + U D of these columns."""
        k = slice(*columns)
        return self._once(
            (name, columns), lambda: torch.addmm(self.linears[name].weight, up[:, k], down[k])
        )

    def _columns(self, mask: Mask) -> Columns:
        """Where a mask's blocks lie in (D, U)."""
        return 0 if mask[0] else 2 * self.rank, 4 * self.rank if mask[1] else 2 * self.rank

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` gives; within `unchanged` the first result for this key."""
        if self._made is None:
            return make()
        return self._made[key] if key in self._made else self._made.setdefault(key, make())

    # ── contexts ─────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _state(self, **values) -> Iterator[None]:
        before = {k: getattr(self, k) for k in values}
        self.__dict__.update(values)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def route(self, zones: Int[Tensor, "*rows"], retain_forward: str = "ablated"):
        """Mask every row (zones [g]) or token (zones [g, s]; those in NO_ZONE are in whichever) by its zone."""
        table = dict(ZONE_TABLE) | ({Zone.RETAIN: RETAIN_BOTH} if retain_forward == "both" else {})
        found = zones[zones != NO_ZONE].unique().tolist()
        if len(found) == 1:
            return self._masked(*table[Zone(found[0])])
        masks = torch.tensor(
            [table[z] for z in Zone], device=zones.device
        )  # [zone, forward | learn, block]
        keep, learn = masks[zones.clamp(min=0)].unbind(-2)
        if zones.ndim == 1:
            keep, learn = keep[:, None], learn[:, None]
        return self._state(_keep=keep, _learn=learn, _runs=None)

    def ablated(self, block: str = "quarantine"):
        """The block's delta is zero: without the quarantine, the deployed state; without the deployed block, the quarantine alone."""
        kept = tuple(float(b != block) for b in BLOCKS)
        return self._masked(kept, kept)

    def _masked(self, keep: Mask, learn: Mask):
        """The same masks for all rows."""
        masks = torch.tensor([keep, learn], device=next(iter(self.linears.values())).weight.device)
        return self._state(
            _keep=masks[None, None, 0], _learn=masks[None, None, 1], _runs=[((keep, learn), 0)]
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, untouched."""
        attached = any("forward" in vars(linear) for linear in self.linears.values())
        self._detach()
        try:
            yield
        finally:
            if attached:
                self._attach()

    @property
    def by_token(self) -> bool:
        """The masks differ from token to token."""
        return self._keep is not None and self._keep.shape[1] > 1

    def _by_row(self) -> Float[Tensor, "g 4"] | None:
        """Each row's masks, forward and learn; None where all rows have the same."""
        if self._keep is None or len(self._keep) == 1:
            return None
        return torch.cat([self._keep[:, 0], self._learn[:, 0]], dim=1)

    def unchanged(self):
        """For passes between which no parameter changes: factors and weights are made once for all of them."""
        return self._state(_made={})

    def ordered(self, rows: int) -> Int[Tensor, " g"]:
        """The numbers 0 … rows − 1, rows with the same masks next to each other; in order where nothing is masked, or all recorded."""
        masks = self._by_row() if self._seen is None else None
        kind = torch.zeros(rows) if masks is None else masks.unique(dim=0, return_inverse=True)[1]
        return kind.argsort(stable=True)

    def distinct(self, key: Int[Tensor, "g k"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " g"]]:
        """(one row of each distinct pair of masks and key, for every row the number of its pair), those with the same masks together.

        Example, unmasked: key [[4], [4], [7]] → ([0, 2], [0, 0, 1]).
        """
        if (masks := self._by_row()) is not None:
            key = torch.cat([masks.long(), key], dim=1)
        _, number = key.unique(dim=0, return_inverse=True)
        first = torch.full((int(number.max()) + 1,), len(key), device=key.device)
        return first.scatter_reduce(
            0, number, torch.arange(len(key), device=key.device), "amin"
        ), number

    def whole(self, input_ids: Int[Tensor, "g s"]):
        """For a forward pass over rows in full."""
        return self._state(_shape=tuple(input_ids.shape))

    def packed(self, packing: Packing):
        """For a forward pass over packed rows: every token has its row's masks and probe; a prompt has neither probe nor recording."""
        values = {"_c": None, "_seen": None} if packing.prompts is None else {}
        if (masks := self._by_row()) is not None:
            found, counts = masks[packing.row].unique_consecutive(dim=0, return_counts=True)
            runs = [
                (((a, b), (c, d)), n) for (a, b, c, d), n in zip(found.tolist(), counts.tolist())
            ]
            values["_runs"] = runs if len(runs) <= len(Zone) else None
        return self._state(_packing=packing, **values)

    @contextmanager
    def probing(
        self, rows: int, tokens: int = 1, where: Bool[Tensor, "g s"] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Multiply every deployed bottleneck A x by c = 1 [rows, tokens, r]; yields module → c.

        `where` limits c to some positions of a forward pass over whole rows.
        """
        device = next(iter(self.linears.values())).weight.device
        c = {
            n: torch.ones(rows, tokens, self.rank, device=device, requires_grad=True)
            for n in self.linears
        }
        with self._state(_c=c, _where=where):
            yield c

    def rounded(self, dtype: torch.dtype):
        """Round the factors of an fp32 model's adapted products and of its output layer's to `dtype`; all between them stays in fp32."""
        return self._state(products=dtype)

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Keep the deployed bottleneck A x [g, s, r] of every Linear at the last forward pass."""
        seen: dict[str, Tensor] = {}
        with self._state(_seen=seen):
            yield seen

    @contextmanager
    def shifted(
        self, deltas: list[Tensor], scale: float = 1.0, block: str = "deployed"
    ) -> Iterator[None]:
        """Add `scale · deltas` to one block's parameters (in their order) for a while; restored by copy, exactly."""
        params = self.parameters(block)
        before = [p.detach().clone() for p in params]
        try:
            for p, d in zip(params, deltas, strict=True):
                p.data.add_(d, alpha=scale)
            yield
        finally:
            for p, b in zip(params, before):
                p.data.copy_(b)

    @contextmanager
    def merged(self, ablated: bool = False) -> Iterator[None]:
        """Fold the deltas into the weights for sampling, without hooks; restored by copy from the pristine base."""
        blocks = BLOCKS[:1] if ablated else BLOCKS
        with self.disabled():
            try:
                for name, linear in self.linears.items():
                    if name not in self._base:
                        self._base[name] = linear.weight.detach().clone()
                    delta = sum(getattr(self.layers[name], b).delta() for b in blocks)
                    linear.weight.data.copy_(self._base[name].float() + delta)
                yield
            finally:
                for name, base in self._base.items():
                    self.linears[name].weight.data.copy_(base)

    # ── parameters ───────────────────────────────────────────────────────────────────────────────────────────

    def parameters(self, block: str) -> list[nn.Parameter]:
        """The trained tensors of one block, in a fixed order."""
        return [p for layer in self.layers.values() for p in getattr(layer, block).parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """Every trained and frozen tensor as `<linear>.<block>.<dA|dB|A0|B0>`."""
        return {
            f"{n}.{k}": v.detach()
            for n, layer in self.layers.items()
            for k, v in layer.state_dict().items()
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy a `state_dict` in; unknown, missing or misshapen tensors raise UserError."""
        own = self.state_dict()
        if odd := own.keys() ^ tensors.keys():
            raise UserError(
                f"the adapter does not fit this model: {len(odd)} tensors differ, e.g. {sorted(odd)[0]}"
            )
        for name, value in tensors.items():
            if own[name].shape != value.shape:
                raise UserError(
                    f"the adapter does not fit: {name} is {list(value.shape)}, expected {list(own[name].shape)}"
                )
            own[name].copy_(value)
