"""AdamW over the adapter's two blocks, through which no mask leaks."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vgrout.core import Zone
from vgrout.files import nested, part
from vgrout.model.lora2r import BLOCKS, ZONE_TABLE, Lora2r


class BlockOptimizer:
    """A block that no row of the step trains skips the step entirely (moments, decay, step count:
    its gradients are None, which torch's AdamW passes over); the gradient norm is clipped for each
    block by itself.
    """

    def __init__(
        self,
        adapter: Lora2r,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
    ):
        self.adapter, self.max_grad_norm = adapter, max_grad_norm
        groups = [{"params": adapter.parameters(b), "name": b} for b in BLOCKS]
        self.adamw = torch.optim.AdamW(
            groups, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
        )

    def step(self, trained: dict[str, bool]) -> dict[str, float]:
        """One step of the blocks that `trained` names; returns each block's gradient norm before
        clipping."""
        norms = {}
        for block in BLOCKS:
            params = self.adapter.parameters(block)
            if not trained[block]:
                for p in params:
                    p.grad = None
            clipped = nn.utils.clip_grad_norm_(params, self.max_grad_norm)
            norms[block] = float(clipped) if trained[block] else 0.0
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norms

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for block in BLOCKS for p in self.adapter.parameters(block)]

    def put(
        self,
        block: str,
        values: list[Tensor],
    ) -> None:
        """Other values for a block's parameters, as if it had never been trained: its moments and
        step count go."""
        for p, value in zip(self.adapter.parameters(block), values, strict=True):
            p.data.copy_(value)
            self.adamw.state.pop(p, None)

    def state_dict(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts as `<parameter index>.<name>`; a block that never
        trained has none."""
        return nested(self.adamw.state_dict()["state"])

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        indices = {key.partition(".")[0] for key in tensors}
        state = {int(index): part(tensors, index) for index in indices}
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state})


def trained_blocks(zones: Int[Tensor, "*rows"]) -> dict[str, bool]:
    """Which blocks some row of the step trains."""
    return {
        b: any(ZONE_TABLE[z][1][i] > 0 and bool((zones == z).any()) for z in Zone)
        for i, b in enumerate(BLOCKS)
    }
