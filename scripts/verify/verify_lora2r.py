"""The adapter: zero delta at init, zones, isolated blocks, probe, packing, ablation, merging; each with a mutation."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
from scripts.verify.tiny import perturb, random_batch, tiny_policy
from torch import Tensor, nn
from vgrout.gate.direction import activations, probe_gradients

from vgrout.core import Zone
from vgrout.model import fast, loading, lora2r
from vgrout.model.batch import Batch
from vgrout.model.fast import Packing
from vgrout.model.grpo import scored_loss
from vgrout.model.lora2r import BLOCKS, LoraLinear, State
from vgrout.model.optimizer import BlockOptimizer, trained_blocks
from vgrout.model.policy import Policy, logps
from vgrout.model.sampling import sample
from vgrout.model.tokens import collate, select

PROBE = dict(max_completion_length=8, temperature=1.0, token_budget=1000)


def differs(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() > tolerance)


def gap(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference of two tensors, in shares of the wanted one's largest entry."""
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-6))
        for a, b in zip(got, want, strict=True)
    )


def planted(**options) -> tuple[Policy, Batch]:
    policy, batch = tiny_policy(**options), random_batch(9)
    perturb(policy)
    return policy, batch


def loss(policy: Policy, batch: Batch) -> Tensor:
    scored = logps(policy, batch, 1.0)
    return scored_loss(scored, batch.completion_mask, batch.advantages, 8).sum()


def all_in(zone: Zone, rows: int) -> Tensor:
    return torch.full((rows,), int(zone))


def check_zero_delta() -> None:
    policy, batch = tiny_policy(), random_batch()
    with policy.adapter.disabled():
        base = logps(policy, batch, 1.0)
    assert torch.equal(logps(policy, batch, 1.0), base), "the net delta is not zero at init"
    for layer in policy.adapter.layers.values():  # mutation: B0 A0 is not subtracted
        layer.deployed.dA.data.copy_(layer.deployed.A0)
    assert differs(logps(policy, batch, 1.0), base)
    print("ok  net delta is zero at init; a delta that keeps B0 A0 is noticed")


def reference(layer: LoraLinear, W: Tensor, x: Tensor, zones: list[Zone]) -> Tensor:
    """The definition, row by row: y = W x + (1−d) dep + d stopgrad(dep) + m quar, Δ = B A x − B0 A0 x."""
    rows = []
    for row, zone in zip(x, zones):
        dep, quar = (
            row @ (b.A0 + b.dA).T @ (b.B0 + b.dB).T - row @ b.A0.T @ b.B0.T
            for b in (layer.deployed, layer.quarantine)
        )
        m, d = {Zone.RETAIN: (0, 0), Zone.ABSORB: (1, 0), Zone.ROUTE: (1, 1)}[zone]
        rows.append(row @ W.T + (1 - d) * dep + d * dep.detach() + m * quar)
    return torch.stack(rows)


def check_definition() -> None:
    policy, _ = planted()
    name, linear = next(iter(policy.adapter.linears.items()))
    layer = policy.adapter.layers[name]
    x = torch.randn(3, 5, linear.in_features, requires_grad=True)
    weight = torch.randn(3, 5, linear.out_features)

    def with_grads(y: Tensor) -> list[Tensor]:
        leaves = [x, *layer.parameters()]
        grads = torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True)
        return [y, *grads]

    mixed = list(Zone)
    for zones in (mixed, *([zone] * 3 for zone in Zone)):
        with policy.adapter.route(torch.tensor(zones)):
            got = with_grads(linear(x))
        assert gap(got, with_grads(reference(layer, linear.weight, x, zones))) < 1e-4, zones
        swapped = with_grads(
            reference(layer, linear.weight, x, zones[1:] + [Zone((zones[0] + 1) % 3)])
        )
        assert gap(got, swapped) > 1e-2, "the comparison cannot tell zones apart"
    print("ok  forward and all gradients equal the definition written out; other zones do not")


def block_gradients(policy: Policy, batch: Batch, zones: Tensor, forward: str = "ablated") -> dict:
    size = {}
    with policy.adapter.route(zones, forward):
        value = loss(policy, batch)
        for b in BLOCKS:
            params = policy.adapter.parameters(b)
            grads = torch.autograd.grad(
                value, params, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            size[b] = float(sum(g.abs().sum() for g in grads))
    return size


def check_zone_table() -> None:
    policy, batch = planted()
    moves = {Zone.RETAIN: (True, False), Zone.ABSORB: (True, True), Zone.ROUTE: (False, True)}
    for zone, want in moves.items():
        got = block_gradients(policy, batch, all_in(zone, 9))
        assert tuple(v > 0 for v in got.values()) == want, (zone, got)
    both = block_gradients(policy, batch, all_in(Zone.RETAIN, 9), "both")
    assert both["deployed"] > 0 and both["quarantine"] == 0
    batch.advantages[8] = 0  # the row that trains the deployed block asks for nothing
    mixed = torch.tensor([Zone.ROUTE] * 8 + [Zone.RETAIN])
    learns = lora2r.ZONE_TABLE | {Zone.ROUTE: ((1.0, 1.0), (1.0, 1.0))}
    for policy.share_prompts in (False, True):
        assert block_gradients(policy, batch, mixed)["deployed"] == 0
        with patch.object(lora2r, "ZONE_TABLE", learns):  # mutation: all that is kept learns
            assert block_gradients(policy, batch, mixed)["deployed"] > 0
    print(
        "ok  zone × block gradients are exactly zero where a block does not learn; else a leak shows"
    )


def check_optimizer_isolation() -> None:
    for zone, frozen in ((Zone.RETAIN, "quarantine"), (Zone.ROUTE, "deployed")):
        moved = {}
        for leaky in (False, True):  # mutation: zero gradients instead of a skipped step
            policy, batch = tiny_policy(), random_batch()
            optimizer = BlockOptimizer(policy.adapter, 1e-2, 0.1, 1.0)
            params = policy.adapter.parameters(frozen)
            for step in range(5):  # momentum builds up, then the mask falls
                if step == 2:
                    before = [p.detach().clone() for p in params]
                zones = all_in(Zone.ABSORB if step < 2 else zone, 6)
                with policy.adapter.route(zones):
                    loss(policy, batch).backward()
                optimizer.step(dict.fromkeys(BLOCKS, True) if leaky else trained_blocks(zones))
            moved[leaky] = any(not torch.equal(p, b) for p, b in zip(params, before))
        assert moved == {False: False, True: True}, (zone, moved)
    print("ok  momentum and decay do not move a masked block; with zero gradients they do")


def check_put() -> None:
    """A block that is given other values goes on as one that never trained."""
    ended = {}
    for name, trained in (("fresh", 0), ("put", 3), ("kept moments", 3)):
        policy, batch = tiny_policy(), random_batch()
        optimizer = BlockOptimizer(policy.adapter, 1e-2, 0.0, 1.0)
        params = policy.adapter.parameters("quarantine")
        for step in range(trained + 1):
            values = [torch.full_like(p, 1e-3) for p in params]
            if step == trained and name != "kept moments":
                optimizer.put("quarantine", values)
            elif step == trained:  # mutation
                [p.data.copy_(v) for p, v in zip(params, values)]
            with policy.adapter.route(all_in(Zone.ROUTE, 6)):
                loss(policy, batch).backward()
            optimizer.step({"deployed": False, "quarantine": True})
        ended[name] = torch.cat([p.detach().flatten() for p in params])
    assert torch.equal(ended["put"], ended["fresh"])
    assert not torch.equal(ended["kept moments"], ended["fresh"])
    print("ok  a block that is given other values goes on without moments; kept ones would show")


def check_mixed_batch_and_probe() -> None:
    policy, batch = tiny_policy(), random_batch()
    perturb(policy)
    zones = torch.tensor([0, 1, 2, 0, 1, 2])
    with policy.adapter.route(zones):
        together = logps(policy, batch, 1.0)
    mixed, whole = probe_gradients(policy, batch, **PROBE), logps(policy, batch, 1.0)
    for i in range(6):
        one, alone = select(batch, torch.tensor([i])), {}
        for shift in range(2):  # mutation: another zone
            with policy.adapter.route((zones[i : i + 1] + shift) % 3):
                alone[shift] = logps(policy, one, 1.0)[0]
        row = together[i, : one.completion_ids.shape[1]]
        assert not differs(row, alone[0])
        assert zones[i] > 0 or differs(row, alone[1])
        assert not differs(mixed[i], probe_gradients(policy, one, **PROBE)[0]), (
            "batched is not solo"
        )
    rolled = probe_gradients(policy, select(batch, torch.arange(6).roll(1)), **PROBE)
    assert differs(mixed, rolled) and not differs(mixed.roll(1, 0), rolled)
    with policy.adapter.probing(6):
        assert not differs(logps(policy, batch, 1.0), whole), "probing changed the value"
    params = [p for b in BLOCKS for p in policy.adapter.parameters(b)]
    assert all(p.grad is None for p in params), "the probe touched .grad"
    assert not differs(mixed, probe_gradients(policy, batch, **PROBE | {"token_budget": 16}))
    by_token = probe_gradients(policy, batch, by_token=True, **PROBE)
    everywhere = probe_gradients(policy, batch, positions="all", **PROBE)
    assert not differs(by_token.sum(1), everywhere[:, 0]), "not the sum of its tokens'"
    column = torch.arange(by_token.shape[1])[None, :, None, None]
    for late in (0, 1):  # mutation: one position off
        inside = column >= batch.completion_start[:, None, None, None] - 1 + late
        assert differs((by_token * inside).sum(1), mixed[:, 0]) == bool(late)
    print(
        "ok  mixed batch = rows alone; probe batched = solo = by token, padding-invariant, no .grad"
    )


def passes(policy: Policy, batch: Batch) -> list[Tensor]:
    """Log-probs, gradients, probes and activations in mixed zones."""
    params = [p for b in BLOCKS for p in policy.adapter.parameters(b)]
    with policy.training(), policy.adapter.route(torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 0])):
        scored = logps(policy, batch, 1.0)
        value = (scored * batch.advantages[:, None]).sum()
        grads = torch.autograd.grad(value, params, materialize_grads=True)
    spaces = ("bottleneck", "residual")
    acts = [activations(policy, batch, space=s, token_budget=1000) for s in spaces]
    whole = torch.cat([g.flatten() for g in grads])
    return [scored.detach(), whole, probe_gradients(policy, batch, **PROBE), *acts]


def check_shared_prompts() -> None:
    """Packed rows behind a prompt that runs once give what rows in full give, checkpointed too."""
    policy, batch = planted()
    policy.share_prompts = False
    full = passes(policy, batch)
    policy.share_prompts = True
    checkpointed, _ = planted(checkpointing=True)
    packs, pack = [], fast.pack
    with patch.object(fast, "pack", lambda *a: packs.append(pack(*a)) or packs[-1]):
        assert gap(passes(policy, batch), full) < 1e-5
        assert gap(passes(checkpointed, batch), full) < 1e-5, "checkpointed"
    prompts = {len(p.places) for p in packs if p.prompts is None}
    assert min(prompts) == 3 and max(prompts) < 9, "nothing is shared"
    half, _ = planted(dtype=torch.bfloat16, checkpointing=True)
    rounded = passes(half, batch)
    half.share_prompts = False
    assert gap(rounded, passes(half, batch)) < 0.1, "bf16"

    mask, state = Packing.mask, Packing.state

    def sees_padding(self, *args) -> Tensor:
        seen = mask(self, *args)
        return torch.zeros_like(seen) if self.prompts is None else seen

    def first_row(self, run: State) -> State:
        masks = {name: getattr(run, name) for name in ("learn", "constant")}
        return state(self, replace(run, **{k: m if m is None else m[:1] for k, m in masks.items()}))

    def popped(self, attention: nn.Module, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.prompts is None:
            self.kept[attention].append((key, value))
            return [key, value]
        before = self.prompts.kept[attention].pop(0)
        return [torch.cat([p[self.prompt], x], dim=2) for p, x in zip(before, (key, value))]

    for owner, name, wrong, who in (
        (Packing, "mask", sees_padding, policy),
        (Packing, "state", first_row, policy),
        (Packing, "behind_prompts", popped, checkpointed),
    ):
        with patch.object(owner, name, wrong):
            try:
                noticed = gap(passes(who, batch), full) > 1e-3
            except (IndexError, RuntimeError):
                noticed = True
        assert noticed, name
    with patch.object(loading, "checkpoint_contexts", lambda *_: (nullcontext(), nullcontext())):
        loading.enable_checkpointing(checkpointed.model, checkpointed.adapter)
        try:
            assert gap(passes(checkpointed, batch), full) > 1e-3, (
                "layers run again in another state"
            )
        except (TypeError, RuntimeError):
            pass
    print(
        "ok  packed rows behind a shared prompt = rows in full, checkpointed too, bf16 within 0.1"
    )


def check_probe_meaning() -> None:
    policy, batch = tiny_policy(), random_batch(1)
    perturb(policy)
    got = probe_gradients(policy, batch, **PROBE)[0, 0, 0]
    layer, want, eps = next(iter(policy.adapter.layers.values())).deployed, [], 1e-2
    batch.advantages = torch.ones(1)

    def loss_at(k: int, factor: float) -> float:
        """Row k of the live A is scaled through dA: B0 A0 x, which is subtracted, does not move."""
        before = layer.dA.data.clone()
        layer.dA.data[k] += (factor - 1) * (layer.A0[k] + layer.dA[k].data)
        value = float(loss(policy, batch).detach())
        layer.dA.data.copy_(before)
        return value

    for k in range(policy.adapter.rank):
        want.append((loss_at(k, 1 + eps) - loss_at(k, 1 - eps)) / (2 * eps))
    assert torch.allclose(got, torch.tensor(want), rtol=2e-2, atol=1e-3), (got, want)
    assert not torch.allclose(got.roll(1), torch.tensor(want), rtol=2e-2, atol=1e-3)
    print("ok  ∂L/∂c is the finite difference of scaling the live bottleneck, rank by rank")


def draw(policy: Policy, ablated: bool = False, temperature: float = 1.0) -> list:
    options = dict(max_completion_length=12, top_p=1.0, token_budget=512, ablated=ablated)
    generator = torch.Generator().manual_seed(0)
    return sample(
        policy, [[5, 6, 7], [8, 9]], [4, 4], temperature=temperature, generator=generator, **options
    )


def check_ablation_and_sampler() -> None:
    policy, batch = tiny_policy(), random_batch()
    perturb(policy, 0.3, blocks=("quarantine",))
    with policy.adapter.disabled():
        base = logps(policy, batch, 1.0)
    full = logps(policy, batch, 1.0)
    with policy.adapter.ablated():
        assert not differs(logps(policy, batch, 1.0), base, 1e-6)
    assert differs(full, base)
    assert torch.equal(logps(policy, batch, 1.0), full), "ablation is not undone"
    weights = {n: linear.weight.clone() for n, linear in policy.adapter.linears.items()}
    trained, deployed, again = draw(policy), draw(policy, ablated=True), draw(policy)
    with policy.adapter.disabled():
        hookless = draw(policy, ablated=True)
    assert trained != deployed and trained == again and deployed == hookless
    for name, weight in weights.items():
        assert torch.equal(weight, policy.adapter.linears[name].weight), "merging left a trace"
    print("ok  ablation removes a planted quarantine, is undone exactly, and changes what is drawn")


def check_merged_equals_hooked() -> None:
    policy, batch = planted()
    for ablated in (False, True):
        with policy.adapter.ablated() if ablated else nullcontext():
            hooked = logps(policy, batch, 1.0)
        for other in (False, True):  # mutation: the other state
            with policy.adapter.merged(ablated ^ other):
                merged = logps(policy, batch, 1.0)
            assert differs(hooked, merged, 1e-3 if other else 1e-4) == other
    prompts, groups = [[5, 6, 7]] * 4 + [[8, 9]] * 4, draw(policy, temperature=0.7)
    rows = [row for group in groups for row in group]
    drawn = collate(prompts, [ids for ids, _ in rows], [0.0] * 8, [0] * 8, [1.0] * 8, 0, "cpu")
    learner = logps(policy, drawn, 0.7)[drawn.completion_mask]
    sampler = torch.tensor([x for _, scores in rows for x in scores])
    assert not differs(learner, sampler, 1e-4), "sampler and learner disagree"
    assert differs(learner, sampler.roll(1), 1e-2), "log-probs of other tokens go unnoticed"
    print("ok  merged weights = hooks, in both states; the sampler's log-probs are the learner's")


def check_bf16() -> None:
    """Ten small steps' delta in bf16: the difference form loses it, the delta form keeps it."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    b = LoraLinear(linear, 8, torch.Generator().manual_seed(0)).deployed
    b.dA.data.normal_(std=1e-3 / 16)
    b.dB.data.normal_(std=1e-3 / 4)
    x = torch.randn(64, 256)
    exact = x.double() @ b.delta().double().T

    def chain(down: Tensor, up: Tensor) -> Tensor:
        return (x.bfloat16() @ down.bfloat16().T) @ up.bfloat16().T

    def error(y: Tensor) -> float:
        return float((y.double() - exact).norm() / exact.norm())

    ours = error(chain(b.down(), b.up()))
    naive = error(chain(b.A0 + b.dA, b.B0 + b.dB) - chain(b.A0, b.B0))
    assert ours < 0.02 < 0.2 < naive, (ours, naive)
    print(f"ok  bf16 error of a small delta: {ours:.4f} in delta form, {naive:.2f} as a difference")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
