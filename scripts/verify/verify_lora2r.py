"""The adapter: zero delta, zones, isolated blocks, probe, packing, ablation; each broken once."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from unittest.mock import patch

import torch
from scripts.verify.stored import in_fork
from scripts.verify.styled import PROBE
from scripts.verify.tiny import (
    perturb,
    planted,
    random_batch,
    tiny_policy,
    trained,
)
from torch import Tensor, nn
from torch.autograd import grad

from vgrout.core import UserError, Zone
from vgrout.gate.v_grad import activations, probe_gradients
from vgrout.model import loading, lora2r
from vgrout.model.batch import Batch
from vgrout.model.fast import Packing
from vgrout.model.grpo import scored_loss
from vgrout.model.lora2r import BLOCKS, LoraLinear, State
from vgrout.model.optimizer import BlockOptimizer, trained_blocks
from vgrout.model.policy import Policy, logps
from vgrout.model.tokens import select


def gap(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """The largest difference of two tensors or rows, relative to the wanted largest entry."""
    differences = [
        (a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-6)
        for a, b in zip(got, want, strict=True)
    ]
    return float(max(differences))


def loss(policy: Policy, batch: Batch) -> Tensor:
    scored = logps(policy, batch, 1.0)
    return scored_loss(scored, batch.completion_mask, batch.advantages, 8).sum()


def all_in(zone: Zone, rows: int) -> Tensor:
    return torch.full((rows,), int(zone))


# ── zones ────────────────────────────────────────────────────────────────────────────────────────


def reference(layer: LoraLinear, W: Tensor, x: Tensor, zones: list[int]) -> Tensor:
    """By the definition: y = W x + (1−d) dep + d stopgrad(dep) + m quar, Δ = B A x − B0 A0 x."""
    rows = []
    for row, zone in zip(x, zones):
        deployed, quarantine = (
            row @ (b.A0 + b.dA).T @ (b.B0 + b.dB).T - row @ b.A0.T @ b.B0.T
            for b in (layer.deployed, layer.quarantine)
        )
        if zone == Zone.ROUTE:
            deployed = deployed.detach()
        rows.append(row @ W.T + deployed + (zone != Zone.RETAIN) * quarantine)
    return torch.stack(rows)


def check_definition() -> None:
    policy, _ = planted()
    name, linear = next(iter(policy.adapter.linears.items()))
    layer = policy.adapter.layers[name]
    x = torch.randn(3, 5, linear.in_features, requires_grad=True)
    weight = torch.randn(3, 5, linear.out_features)

    def with_grads(y: Tensor) -> list[Tensor]:
        leaves = [x, *layer.parameters()]
        return [
            y,
            *grad((y * weight).sum(), leaves, materialize_grads=True),
        ]

    for zones in ([0, 1, 2], [0, 0, 0], [1, 1, 1], [2, 2, 2]):
        with policy.adapter.route(torch.tensor(zones)):
            found = with_grads(linear(x))
        assert (
            gap(
                found,
                with_grads(reference(layer, linear.weight, x, zones)),
            )
            < 1e-4
        ), zones
        others = [(zone + 1) % 3 for zone in zones]
        assert (
            gap(
                found,
                with_grads(reference(layer, linear.weight, x, others)),
            )
            > 1e-2
        ), zones
    print("ok  forward and all gradients equal the definition written out; other zones do not")


def learns(
    policy: Policy,
    batch: Batch,
    zones: Tensor,
    forward: str = "ablated",
) -> list[bool]:
    """Whether each block has any gradient."""
    options = {
        "materialize_grads": True,
        "allow_unused": True,
        "retain_graph": True,
    }
    with policy.adapter.route(zones, forward):
        value = loss(policy, batch)
    gradients = [grad(value, trained(policy, [block]), **options) for block in BLOCKS]
    return [any(bool(g.any()) for g in of_block) for of_block in gradients]


def check_zone_table() -> None:
    """A block's gradients are exactly zero in zones where it does not learn."""
    policy, batch = planted(9)
    batch.advantages[8] = 0  # the row that trains the deployed block asks for nothing
    mixed = torch.tensor([Zone.ROUTE] * 8 + [Zone.RETAIN])
    leaky = {Zone.ROUTE: ((1.0, 1.0), (1.0, 1.0))}  # mutation: all that is kept learns
    for zones, forward, wanted in (
        (all_in(Zone.RETAIN, 9), "ablated", [True, False]),
        (all_in(Zone.RETAIN, 9), "both", [True, False]),
        (all_in(Zone.ABSORB, 9), "ablated", [True, True]),
        (all_in(Zone.ROUTE, 9), "ablated", [False, True]),
        (mixed, "ablated", [False, True]),
    ):
        assert learns(policy, batch, zones, forward) == wanted, (
            zones,
            forward,
        )
    with patch.dict(lora2r.ZONE_TABLE, leaky):
        assert learns(policy, batch, mixed) == [True, True]
    print("ok  a block's gradients are exactly zero in zones where it does not learn; a leak shows")


# ── the optimizer ────────────────────────────────────────────────────────────────────────────────


def new_optimizer() -> tuple[Policy, BlockOptimizer]:
    policy = tiny_policy()
    return policy, BlockOptimizer(policy.adapter, 1e-2, 0.1, 1.0)


def train(
    policy: Policy,
    optimizer: BlockOptimizer,
    zone: Zone,
    steps: int,
    blocks: Callable[[Tensor], dict[str, bool]] = trained_blocks,
) -> None:
    zones = all_in(zone, 6)
    for _ in range(steps):
        with policy.adapter.route(zones):
            loss(policy, random_batch()).backward()
        optimizer.step(blocks(zones))


def flat(policy: Policy, block: str) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trained(policy, [block])])


def check_isolation() -> None:
    """Mutation: a masked block takes a step with gradients of zero, where it should take none."""
    for zone, masked in (
        (Zone.RETAIN, "quarantine"),
        (Zone.ROUTE, "deployed"),
    ):
        for blocks in (
            trained_blocks,
            lambda zones: dict.fromkeys(BLOCKS, True),
        ):
            policy, optimizer = new_optimizer()
            train(policy, optimizer, Zone.ABSORB, 2)  # momentum builds up, then the mask falls
            before = flat(policy, masked)
            train(policy, optimizer, zone, 2, blocks)
            assert torch.equal(flat(policy, masked), before) == (blocks is trained_blocks), zone
    print("ok  momentum and decay do not move a masked block; with zero gradients they do")


def check_put() -> None:
    """A block that is given other values goes on as one that never trained."""
    ended = []
    for steps, put in ((0, True), (3, True), (3, False)):
        policy, optimizer = new_optimizer()
        train(policy, optimizer, Zone.ROUTE, steps)
        values = [torch.full_like(p, 1e-3) for p in trained(policy, ["quarantine"])]
        if put:
            optimizer.put("quarantine", values)
        else:  # mutation: its moments stay
            for p, value in zip(trained(policy, ["quarantine"]), values):
                p.data.copy_(value)
        train(policy, optimizer, Zone.ROUTE, 1)
        ended.append(flat(policy, "quarantine"))
    fresh, again, kept = ended
    assert torch.equal(again, fresh) and not torch.equal(kept, fresh)
    print("ok  a block that is given other values goes on without moments; kept ones would show")


# ── passes ───────────────────────────────────────────────────────────────────────────────────────


def check_mixed_batch() -> None:
    policy, batch = planted()
    zones = torch.tensor([0, 1, 2, 0, 1, 2])
    with policy.adapter.route(zones):
        together = logps(policy, batch, 1.0)
    probes = probe_gradients(policy, batch, PROBE)
    for i in range(6):
        one = select(batch, torch.tensor([i]))
        row = together[i : i + 1, : one.completion_ids.shape[1]]
        with policy.adapter.route(zones[i : i + 1]):
            assert gap(row, logps(policy, one, 1.0)) < 1e-4
        assert gap(probes[i : i + 1], probe_gradients(policy, one, PROBE)) < 1e-4
    with policy.adapter.route(zones.roll(1)):  # mutation
        assert gap(logps(policy, batch, 1.0), together) > 1e-2
    assert all(p.grad is None for p in trained(policy)), "the probe touched .grad"
    by_token = probe_gradients(policy, batch, PROBE, by_token=True)
    column = torch.arange(by_token.shape[1])
    for late in (0, 1):  # mutation: one position off
        inside = column >= batch.completion_start[:, None] - 1 + late
        summed = torch.einsum("gsmr,gs->gmr", by_token, inside.float())
        assert (gap(summed, probes[:, 0]) < 1e-4) == (late == 0)
    print("ok  mixed batch = rows alone; probe batched = solo = by token, and touches no .grad")


def check_probe_meaning() -> None:
    policy, batch = planted(1)
    found = probe_gradients(policy, batch, PROBE)[0, 0, 0]
    layer, eps = (
        next(iter(policy.adapter.layers.values())).deployed,
        1e-2,
    )
    batch.advantages = torch.ones(1)

    def loss_at(k: int, change: float) -> float:
        """Row k of the live A is scaled through dA: B0 A0 x, which is subtracted, does not move."""
        before = layer.dA.data.clone()
        layer.dA.data[k] += change * (layer.A0[k] + layer.dA[k].data)
        value = float(loss(policy, batch).detach())
        layer.dA.data.copy_(before)
        return value

    wanted = torch.tensor([loss_at(k, eps) - loss_at(k, -eps) for k in range(3)]) / (2 * eps)
    assert torch.allclose(found, wanted, rtol=2e-2, atol=1e-3), (
        found,
        wanted,
    )
    assert not torch.allclose(found.roll(1), wanted, rtol=2e-2, atol=1e-3)
    print("ok  ∂L/∂c is the finite difference of scaling the live bottleneck, rank by rank")


def passes(policy: Policy, batch: Batch) -> list[Tensor]:
    """Log-probs, gradients, probes and activations in mixed zones."""
    with (
        policy.training(),
        policy.adapter.route(torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 0])),
    ):
        scored = logps(policy, batch, 1.0)
        value = (scored * batch.advantages[:, None]).sum()
        gradients = grad(value, trained(policy), materialize_grads=True)
    whole = torch.cat([g.flatten() for g in gradients])
    found = [
        scored.detach(),
        whole,
        probe_gradients(policy, batch, PROBE),
    ]
    for space in ("bottleneck", "residual"):
        found.append(activations(policy, batch, space))
    return found


def check_shared_prompts() -> None:
    """Packed rows behind a prompt that runs once give what rows in full give, checkpointed too."""
    policy, batch = planted(9)
    checkpointed, _ = planted(checkpointing=True)
    policy.share_prompts = False
    full = passes(policy, batch)
    policy.share_prompts = True
    assert gap(passes(policy, batch), full) < 1e-5
    assert gap(passes(checkpointed, batch), full) < 1e-5, "checkpointed"
    half, _ = planted(dtype=torch.bfloat16, checkpointing=True)
    assert gap(passes(half, batch), full) < 0.3, "bf16"

    state = Packing.state

    def first_row(self, run: State) -> State:
        """Mutation: every row has the first one's masks."""
        one = {
            k: m[:1]
            for k, m in (
                ("learn", run.learn),
                ("constant", run.constant),
            )
            if m is not None
        }
        return state(self, replace(run, **one))

    with patch.object(Packing, "state", first_row):
        assert gap(passes(policy, batch), full) > 1e-3

    def run_again_in_another_state() -> None:
        contexts = nullcontext(), nullcontext()
        with patch.object(loading, "checkpoint_contexts", lambda *_: contexts):
            loading.enable_checkpointing(checkpointed.model, checkpointed.adapter)
        with suppress(TypeError, RuntimeError):
            if gap(passes(checkpointed, batch), full) < 1e-3:
                return
        raise UserError("noticed")

    # in a fork: torch does not survive the end of a process whose recomputation failed
    assert in_fork(run_again_in_another_state) == 2, "another state goes unnoticed"
    print("ok  packed rows behind a shared prompt = rows in full, checkpointed and in bf16, too")


def check_base() -> None:
    """A new adapter changes nothing, an ablated or a disabled one neither; both are undone."""
    policy, batch = tiny_policy(), random_batch()
    weights = [linear.weight.clone() for linear in policy.adapter.linears.values()]
    with policy.adapter.disabled():
        base = logps(policy, batch, 1.0)
    assert torch.equal(logps(policy, batch, 1.0), base), "the net delta is not zero at init"
    perturb(policy, 0.3, blocks=["quarantine"])
    full = logps(policy, batch, 1.0)
    with policy.adapter.merged():
        pass
    with policy.adapter.ablated():
        assert gap(logps(policy, batch, 1.0), base) < 1e-6
    assert gap(full, base) > 1e-2 and torch.equal(logps(policy, batch, 1.0), full)
    for weight, linear in zip(weights, policy.adapter.linears.values()):
        assert torch.equal(weight, linear.weight), "merging left a trace"
    print(
        "ok  net delta zero at init; ablation removes a planted quarantine, and is undone exactly"
    )


def check_bf16() -> None:
    """Ten small steps' delta in bf16: the difference form loses it, the delta form keeps it."""
    torch.manual_seed(0)
    b = LoraLinear(nn.Linear(256, 256), 8, torch.Generator().manual_seed(0)).deployed
    b.dA.data.normal_(std=1e-3 / 16)
    b.dB.data.normal_(std=1e-3 / 4)
    x = torch.randn(64, 256)
    exact = x.double() @ b.delta().double().T

    def chain(down: Tensor, up: Tensor) -> Tensor:
        return (x.bfloat16() @ down.bfloat16().T) @ up.bfloat16().T

    def error(y: Tensor) -> float:
        return float((y.double() - exact).detach().norm() / exact.norm())

    ours = error(chain(b.down(), b.up()))
    naive = error(chain(b.A0 + b.dA, b.B0 + b.dB) - chain(b.A0, b.B0))
    assert ours < 0.02 < 0.2 < naive, (ours, naive)
    print(f"ok  bf16 error of a small delta: {ours:.4f} in delta form, {naive:.2f} as a difference")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_definition()
    check_zone_table()
    check_isolation()
    check_put()
    check_mixed_batch()
    check_probe_meaning()
    check_shared_prompts()
    check_base()
    check_bf16()
