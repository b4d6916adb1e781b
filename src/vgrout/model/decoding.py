"""One more token for every row of a batch: what a sampler does most, and what is slow in Python.

`InPlace` keeps keys and values in buffers of their final length, so that nothing is concatenated,
and reads those of grouped heads where they are. On CUDA its step is captured as a graph for a few
numbers of rows (`ROWS`) and replayed; elsewhere the same code runs without one. `Growing` serves
the other models (windows of attention, soft-capped scores), with transformers' own cache.

Both take the prompts' cache, one row a prompt, and repeat it over each group.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from vgrout.model.fast import attention, can_pack
from vgrout.model.policy import Policy, logits

NAME = "vgrout_grouped"
ROWS = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
)  # that a graph is captured for
LENGTHS = 256  # tokens: the buffers' length is a multiple, so that graphs serve many batches
Step = Callable[[], Tensor]  # logits behind the tokens that the buffers hold
LOOK_EVERY = 8  # tokens between two looks at which rows are finished, where a look waits for CUDA


def grouped_attention(
    module: nn.Module,
    query: Float[Tensor, "n h 1 d"],
    key: Float[Tensor, "n k l d"],
    value: Float[Tensor, "n k l d"],
    mask: Float[Tensor, "n 1 1 l"],
    scaling: float | None = None,
    **kwargs,
) -> tuple[Float[Tensor, "n 1 h d"], None]:
    """Attention of one query a head: the heads of a group are the queries of its one key head."""
    grouped = rearrange(query, "n (k q) 1 d -> n k q d", k=key.shape[1])
    out = F.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return rearrange(out, "n k q d -> n 1 (k q) d"), None


AttentionInterface.register(NAME, grouped_attention)


class Buffers(DynamicLayer):
    """Keys and values of one layer; a token's are written at `slot`, the first `seen` are read."""

    def __init__(self, slot: Int[Tensor, "1"], rows: int, length: int):
        super().__init__()
        self.slot, self.shape, self.seen = slot, (rows, length), 0
        self.buffers: list[Tensor] = []

    def start(self, prompts: DynamicLayer, repeats: Int[Tensor, " p"]) -> None:
        rows, length = self.shape
        self.seen = prompts.keys.shape[2]
        for i, x in enumerate((prompts.keys, prompts.values)):
            if len(self.buffers) <= i:
                self.buffers.append(
                    x.new_zeros(rows, x.shape[1], length, x.shape[3])
                )
            repeated = x.repeat_interleave(repeats, 0)
            self.buffers[i][: len(repeated), :, : self.seen] = repeated

    def keep(self, order: Int[Tensor, " n"]) -> None:
        for buffer in self.buffers:
            buffer[: len(order), :, : self.seen] = buffer[:, :, : self.seen][order]

    def update(
        self, keys: Tensor, values: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        rows = [buffer[: len(keys)] for buffer in self.buffers]
        for row, new in zip(rows, (keys, values)):
            row.index_copy_(2, self.slot, new)
        return rows[0][:, :, : self.seen], rows[1][:, :, : self.seen]

    def get_seq_length(self) -> int:
        return self.seen


class InPlace:
    """Buffers for at most `rows` rows of at most `length` tokens, to be used again.

    With `graphs` a step is captured once for each number of rows, and reads the whole buffers.
    """

    def __init__(
        self, policy: Policy, rows: int, length: int, graphs: bool = False
    ):
        self.policy, self.rows, self.length = policy, rows, length
        device, dtype = policy.device, policy.model.dtype
        self.look_every = LOOK_EVERY if graphs else 1
        self.filled = 0
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.token, self.position = (
            torch.zeros(rows, 1, dtype=torch.long, device=device) for _ in range(2)
        )
        self.hidden = torch.finfo(dtype).min
        self.mask = torch.full(
            (rows, 1, 1, length), self.hidden, dtype=dtype, device=device
        )
        layers = policy.model.config.get_text_config().num_hidden_layers
        self.layers = [Buffers(self.slot, rows, length) for _ in range(layers)]
        self.cache = DynamicCache()
        self.cache.layers = self.layers
        self.graphs: dict[int, Step] | None = {} if graphs else None

    def start(
        self,
        cache: DynamicCache,
        seen: Bool[Tensor, "p w"],
        repeats: Int[Tensor, " p"],
    ) -> None:
        """Take over the prompts' cache; `seen` says which of its positions are no padding."""
        self.filled = seen.shape[1]
        for mine, prompts in zip(self.layers, cache.layers, strict=True):
            mine.start(prompts, repeats)
        seen = seen.repeat_interleave(repeats, 0)
        self.mask[:] = self.hidden
        self.mask[: len(seen), 0, 0, : self.filled].masked_fill_(seen, 0.0)
        self.position[: len(seen), 0] = seen.sum(1) - 1

    def room(self, live: int) -> int:
        """For how many rows the next steps run."""
        sizes = (live,) if self.graphs is None else (*ROWS, self.rows)
        return min(n for n in sizes if n >= live)

    def keep(self, order: Int[Tensor, " n"]) -> None:
        """Go on with these rows, in this order."""
        for layer in self.layers:
            layer.keep(order)
        for x in (self.mask, self.position):
            x[: len(order)] = x[order]

    def step(self, token: Int[Tensor, "n 1"]) -> Float[Tensor, "n v"]:
        """Logits behind one more token of each row."""
        n = len(token)
        self.token[:n] = token
        self.position[:n] += 1
        self.slot.fill_(self.filled)
        self.mask[:n, :, :, self.filled] = 0.0
        self.filled += 1
        self.see(self.filled if self.graphs is None else self.length)
        if self.graphs is None:
            return self.forward(n)
        if n not in self.graphs:
            self.graphs[n] = self.capture(n)
        scores = self.graphs[n]()
        self.see(self.filled)
        return scores

    def see(self, length: int) -> None:
        for layer in self.layers:
            layer.seen = length

    def forward(self, n: int) -> Float[Tensor, "n v"]:
        with attention(self.policy.model, NAME):
            out = self.policy.model.base_model(
                input_ids=self.token[:n],
                attention_mask=self.mask[:n, :, :, : self.layers[0].seen],
                position_ids=self.position[:n],
                past_key_values=self.cache,
                use_cache=True,
            )
        return logits(self.policy, out.last_hidden_state[:, -1])

    def capture(self, n: int) -> Step:
        """https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: warm up on a side
        stream, then record. Running a step twice writes the same keys at the same slot."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.forward(n)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scores = self.forward(n)

        def replay() -> Tensor:
            graph.replay()
            return scores

        return replay


class Growing:
    """The same by transformers' cache and the model's own attention; nothing is kept."""

    def __init__(self, policy: Policy):
        self.policy, self.look_every = policy, 1

    def start(
        self,
        cache: DynamicCache,
        seen: Bool[Tensor, "p w"],
        repeats: Int[Tensor, " p"],
    ) -> None:
        cache.batch_repeat_interleave(repeats)
        self.cache, self.mask = cache, seen.long().repeat_interleave(repeats, 0)

    def room(self, live: int) -> int:
        return live

    def keep(self, order: Int[Tensor, " n"]) -> None:
        self.cache.batch_select_indices(order)
        self.mask = self.mask[order]

    def step(self, token: Int[Tensor, "n 1"]) -> Float[Tensor, "n v"]:
        self.mask = F.pad(self.mask, (0, 1), value=1)
        out = self.policy.model.base_model(
            input_ids=token,
            attention_mask=self.mask,
            position_ids=self.mask.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits(self.policy, out.last_hidden_state[:, -1])


def prefill(
    policy: Policy, prompts: Sequence[list[int]]
) -> tuple[DynamicCache, Bool[Tensor, "p w"], Float[Tensor, "p v"]]:
    """Each prompt once, left-padded: its cache, which positions are no padding, its logits."""
    width = max(map(len, prompts))
    pads = [[policy.pad_id] * (width - len(p)) for p in prompts]
    ids = torch.tensor(
        [pad + p for pad, p in zip(pads, prompts)], device=policy.device
    )
    lengths = torch.tensor([len(p) for p in prompts], device=policy.device)
    seen = torch.arange(width, device=policy.device) >= width - lengths[:, None]
    cache = DynamicCache(config=policy.model.config)
    out = policy.model.base_model(
        input_ids=ids,
        attention_mask=seen.long(),
        position_ids=(seen.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    return cache, seen, logits(policy, out.last_hidden_state[:, -1])


def decoder(policy: Policy, rows: int, length: int) -> InPlace | Growing:
    """One for `rows` rows of `length` tokens; on CUDA the policy's last one, where it is large
    enough, with the graphs that it has."""
    config = policy.model.config.get_text_config()
    windows = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    capped = getattr(config, "attn_logit_softcapping", None)
    if windows or capped or not can_pack(policy.model):
        return Growing(policy)
    if not uses_graphs(policy):
        return InPlace(policy, rows, length)
    length = -(-length // LENGTHS) * LENGTHS
    last = policy.decoder
    if last is None or last.rows < rows or last.length != length:
        policy.decoder = last = (
            None  # its memory is free before the next one's is taken
        )
        policy.decoder = InPlace(policy, rows, length, graphs=True)
    return policy.decoder


def uses_graphs(policy: Policy) -> bool:
    return policy.device.type == "cuda"
