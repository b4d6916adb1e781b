"""A step of the sampler is the same in place, as a graph and with transformers' own cache.

The graph's bookkeeping (whole buffers, numbers of rows, finished rows that stay a while) runs here
without CUDA: in place of a captured graph the step itself is called again. `gpu_check.py` runs the
real one. The nucleus without a sort is the sort's.

Run: python -m scripts.verify.verify_decoding
"""

from functools import partial
from unittest.mock import patch

import torch
from scripts.verify.tiny import VOCAB, draw, perturb, tiny_policy
from torch import Tensor

from vgrout.model import decoding, sampling
from vgrout.model.decoding import Growing, InPlace
from vgrout.model.policy import Policy

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [20]]
COUNTS = [5, 3, 4, 1]
GREEDY = 1e-4  # a temperature at which the likeliest token is drawn


def drawn(policy: Policy, temperature: float = GREEDY) -> list[list[list[int]]]:
    groups = draw(
        policy, PROMPTS, COUNTS, temperature=temperature, max_completion_length=64
    )
    return [[ids for ids, _ in group] for group in groups]


def as_graphs(policy: Policy) -> list[list[list[int]]]:
    """Drawn by the bookkeeping of graphs, twice, so that the second finds buffers in use."""
    with (
        patch.object(decoding, "uses_graphs", lambda policy: True),
        patch.object(InPlace, "capture", lambda self, n: partial(self.forward, n)),
    ):
        drawn(policy, 1.0)
        return drawn(policy)


def check_graphs(policy: Policy) -> None:
    plain = drawn(policy)
    assert as_graphs(policy) == plain, "graphs draw other tokens"
    assert len(policy.decoder.graphs) > 1, "SHOULD step down to fewer rows"
    with patch.object(decoding.Buffers, "keep", lambda self, order: None):
        assert as_graphs(policy) != plain, (
            "rows that keep another row's cache go unnoticed"
        )
    print(
        "ok  in whole buffers, stepping down late, the likeliest tokens are drawn all the same"
    )


def check_own_cache(policy: Policy) -> None:
    with patch.object(
        sampling, "decoder", lambda policy, rows, length: Growing(policy)
    ):
        grown = drawn(policy, 0.7)
    assert grown == drawn(policy, 0.7), "transformers' own cache draws other tokens"
    print("ok  transformers' cache and attention draw the same tokens at T = 0.7")


def by_sort(probs: Tensor, top_p: float) -> Tensor:
    """Holtzman et al. 2020, by sorting."""
    ordered, order = probs.sort(dim=-1, descending=True)
    drop = ordered.cumsum(-1) - ordered >= top_p
    return probs.masked_fill(drop.scatter(-1, order, drop), 0.0)


def check_nucleus() -> None:
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 5.0):
        probs = (spread * torch.randn(64, 5000, generator=generator)).softmax(-1)
        for top_p in (0.3, 0.5, 0.95):
            kept = sampling.nucleus(probs, top_p)
            assert torch.equal(kept, by_sort(probs, top_p)), (
                "another set than the sort's"
            )
            assert not torch.equal(kept, by_sort(probs, top_p + 0.02)), (
                "a wider set goes unnoticed"
            )
    print("ok  the nucleus without a sort is the sort's")


if __name__ == "__main__":
    policy = tiny_policy()
    perturb(policy, 0.5)
    policy.eos_ids = frozenset(
        range(1, VOCAB, 16)
    )  # so that greedy rows end, at unlike times
    check_graphs(policy)
    check_own_cache(policy)
    check_nucleus()
