"""The parameters of the adapter: the two blocks of one Linear. What they compute is in `lora2r.py`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Block(nn.Module):
    """One rank-r block of one Linear: frozen A0 [r, d_in] and B0 [d_out, r], trained dA and dB of the same shapes, fp32."""

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

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        d_out, d_in = linear.weight.shape
        A0 = torch.randn(2 * rank, d_in, generator=generator) / d_in**0.5
        B0 = torch.randn(d_out, 2 * rank, generator=generator) / (2 * rank) ** 0.5
        device = linear.weight.device
        self.deployed = Block(A0[:rank].to(device), B0[:, :rank].contiguous().to(device))
        self.quarantine = Block(A0[rank:].to(device), B0[:, rank:].contiguous().to(device))

    def factors(
        self, dtype: torch.dtype, learned: bool
    ) -> tuple[Float[Tensor, "k i"], Float[Tensor, "o k"]]:
        """(D [4r, d_in], U [d_out, 4r]): the deployed block's down and up, then the quarantine's; constants unless `learned`."""
        d, q = self.deployed, self.quarantine
        with torch.set_grad_enabled(learned):
            down, up = (
                torch.cat([d.dA, d.A0, q.dA, q.A0]),
                torch.cat([d.B0 + d.dB, d.dB, q.B0 + q.dB, q.dB], dim=1),
            )
            return down.to(dtype), up.to(dtype)
