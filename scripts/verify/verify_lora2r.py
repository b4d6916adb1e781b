"""The adapter: zero delta at init, zones, isolation of the blocks, probing, ablation, merging. Each check with its mutation."""

import torch
from scripts.verify.tiny import perturb, random_batch, tiny_policy
from torch import nn

from vgrout.core import Zone
from vgrout.gate.direction import activations, probe_gradients
from vgrout.model.blocks import LoraLinear
from vgrout.model.grpo import scored_loss
from vgrout.model.lora2r import BLOCKS, Lora2r
from vgrout.model.optimizer import BlockOptimizer, trained_blocks
from vgrout.model.packing import Packing
from vgrout.model.policy import logps
from vgrout.model.products import MaskedUp, Merged
from vgrout.model.sampling import sample
from vgrout.model.tokens import select

ALL = (Zone.RETAIN, Zone.ABSORB, Zone.ROUTE)
PROBE = dict(max_completion_length=8, temperature=1.0, token_budget=1000)


def differs(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() > tolerance)


def check_zero_delta() -> None:
    policy, batch = tiny_policy(), random_batch()
    with policy.adapter.disabled():
        base = logps(policy, batch, 1.0)
    assert torch.equal(logps(policy, batch, 1.0), base), "the net delta is not zero at init"
    for layer in policy.adapter.layers.values():  # mutation: forget that B0 A0 is subtracted
        layer.deployed.dA.data.copy_(layer.deployed.A0)
    assert differs(logps(policy, batch, 1.0), base)
    print("ok  net delta is zero at init; a delta that keeps B0 A0 is noticed")


def reference(
    layer: LoraLinear, W: torch.Tensor, x: torch.Tensor, zones: list[Zone]
) -> torch.Tensor:
    """The definition, row by row, with A and B written out: y = W x + (1−d) dep + d stopgrad(dep) + m quar."""
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
    policy = tiny_policy()
    perturb(policy)
    adapter = policy.adapter
    name, linear = next(iter(adapter.linears.items()))
    layer = adapter.layers[name]
    x = torch.randn(3, 5, linear.in_features, requires_grad=True)
    weight = torch.randn(3, 5, linear.out_features)
    leaves = [x, *layer.parameters()]

    def grads(y: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((y * weight).sum(), leaves))

    with adapter.route(torch.tensor(ALL)):
        got = linear(x)
        mine = grads(got)
    want = reference(layer, linear.weight, x, list(ALL))
    theirs = grads(want)
    assert not differs(got, want, 1e-4) and not any(
        differs(a, b, 1e-3) for a, b in zip(mine, theirs)
    ), "not the definition"
    swapped = grads(reference(layer, linear.weight, x, [Zone.ABSORB, Zone.RETAIN, Zone.ROUTE]))
    assert any(differs(a, b, 1e-3) for a, b in zip(mine, swapped)), (
        "the comparison cannot tell zones apart"
    )
    print(
        "ok  forward and all gradients (x included) equal the written-out definition; swapped zones do not"
    )


def check_merged_product() -> None:
    """Rows that share their masks go through W + U D: the values and gradients of the masked form, the probe's included."""
    policy = tiny_policy()
    perturb(policy)
    adapter = policy.adapter
    name, linear = next(iter(adapter.linears.items()))
    x = torch.randn(3, 5, linear.in_features, requires_grad=True)
    weight = torch.randn(3, 5, linear.out_features)
    used, apply = [], Merged.apply

    def everything(state, probed: bool) -> list[torch.Tensor]:
        with state:
            y = linear(x)
            grads = torch.autograd.grad((y * weight).sum(), [x, *adapter.layers[name].parameters()])
            with adapter.probing(3) as c:
                return [
                    y,
                    *grads,
                    *(
                        torch.autograd.grad((linear(x) * weight).sum(), [x, c[name]])
                        if probed
                        else ()
                    ),
                ]

    def wrong(weight):  # mutation: the gradient of x goes through other weights
        return lambda ctx, grad: (
            grad @ weight,
            None,
            *map(torch.zeros_like, ctx.saved_tensors[1:3]),
            *[None] * 5,
        )

    layer = adapter.layers[name]
    bare, dense = (
        linear.weight,
        linear.weight + layer.deployed.delta() + layer.quarantine.delta(),
    )  # no delta; a constant's delta too
    Merged.apply = staticmethod(lambda *args: used.append(args[7]) or apply(*args))
    for zone, forward, blocks, other in ((Zone.ABSORB, "ablated", 2, bare), (Zone.RETAIN, "ablated", 1, bare),
                                         (Zone.RETAIN, "both", 1, dense), (Zone.ROUTE, "ablated", 1, dense)):  # fmt: skip
        with adapter.route(
            torch.full((3,), int(zone)), forward
        ):  # the same masks as by rows: the general form
            masks = adapter._state(
                _runs=None,
                _keep=adapter._keep.expand(3, 1, 2),
                _learn=adapter._learn.expand(3, 1, 2),
            )
        want, before, probed = everything(masks, zone != Zone.ROUTE), len(used), zone != Zone.ROUTE
        got = everything(adapter.route(torch.full((3,), int(zone)), forward), probed)
        learned = [sum(b - a for a, b in [run.learn for run in runs]) for runs in used[before:]]
        assert learned == [2 * adapter.rank * blocks] * (1 + probed), (
            "not the merged form, or not the smaller one"
        )
        assert not any(differs(a, b, 1e-4) for a, b in zip(got, want, strict=True)), zone
        right, Merged.backward = Merged.backward, staticmethod(wrong(other))
        with adapter.route(torch.full((3,), int(zone)), forward):
            (mutant,) = torch.autograd.grad((linear(x) * weight).sum(), [x])
        Merged.backward = right
        assert differs(mutant, want[1], 1e-2), (
            zone,
            "a gradient of x through other weights goes unnoticed",
        )
    Merged.apply = apply
    print(
        "ok  rows masked alike: one product with W + U D = the masked form; x's gradient without U D, or through a constant, is not"
    )


def block_gradients(policy, batch, zones, retain_forward="ablated") -> dict[str, float]:
    params = {b: policy.adapter.parameters(b) for b in BLOCKS}
    with policy.adapter.route(zones, retain_forward):
        loss = scored_loss(
            logps(policy, batch, 1.0), batch.completion_mask, batch.advantages, 8
        ).sum()
        grads = {b: torch.autograd.grad(loss, params[b], retain_graph=True) for b in BLOCKS}
    return {b: float(sum(g.abs().sum() for g in grads[b])) for b in BLOCKS}


def check_zone_table() -> None:
    policy, batch = tiny_policy(), random_batch()
    perturb(policy)
    for zone, want in zip(ALL, ((True, False), (True, True), (False, True))):
        got = block_gradients(policy, batch, torch.full((6,), int(zone)))
        assert tuple(v > 0 for v in got.values()) == want, (zone, got)
    both = block_gradients(policy, batch, torch.full((6,), int(Zone.RETAIN)), "both")
    assert both["deployed"] > 0 and both["quarantine"] == 0
    mixed = torch.tensor([Zone.ROUTE] * 5 + [Zone.RETAIN])
    batch.advantages[5] = 0  # the row that trains the deployed block asks for nothing

    def unmasked(
        ctx, grad
    ):  # mutation of the masked form: a backward that forgets what does not learn
        h, U, *_ = ctx.saved_tensors
        return grad @ U, torch.einsum("gso,gsk->ok", grad, h), None, None, None, None

    def learning(
        x, b, D, U, c, where, weights, runs, dtype
    ):  # mutation of the one product: all that is kept learns
        return product(
            x, b, D, U, c, where, weights, [run._replace(learn=run.keep) for run in runs], dtype
        )

    masked, product = MaskedUp.backward, Merged.apply
    for packed in (False, True):
        policy.share_prompts = packed
        assert block_gradients(policy, batch, mixed)["deployed"] == 0
        MaskedUp.backward, Merged.apply = staticmethod(unmasked), staticmethod(learning)
        leak = block_gradients(policy, batch, mixed)
        MaskedUp.backward, Merged.apply = masked, product
        assert leak["deployed"] > 0
    print(
        "ok  zone × block gradients: RETAIN (1,0), ABSORB (1,1), ROUTE (0,1), exactly zero elsewhere; an unmasked backward leaks"
    )


def check_optimizer_isolation() -> None:
    for zone, frozen in ((Zone.RETAIN, "quarantine"), (Zone.ROUTE, "deployed")):
        moved = {}
        for leaky in (False, True):
            policy, batch = tiny_policy(), random_batch()
            optimizer = BlockOptimizer(policy.adapter, 1e-2, 0.1, 1.0)
            for step in range(5):
                zones = torch.full(
                    (6,), int(Zone.ABSORB if step < 2 else zone)
                )  # momentum builds up, then the mask falls
                if step == 2:
                    before = [p.detach().clone() for p in policy.adapter.parameters(frozen)]
                with policy.adapter.route(zones):
                    scored_loss(
                        logps(policy, batch, 1.0), batch.completion_mask, batch.advantages, 8
                    ).sum().backward()
                optimizer.step(dict.fromkeys(BLOCKS, True) if leaky else trained_blocks(zones))
            moved[leaky] = sum(
                float((a.detach() - b).abs().sum())
                for a, b in zip(policy.adapter.parameters(frozen), before)
            )
        assert moved[False] == 0 and moved[True] > 0, (zone, moved)
    print(
        "ok  a masked block does not move through momentum and decay; with zero gradients instead of a skipped step it does"
    )


def check_put() -> None:
    """A block that is given other values goes on as one that never trained; moments that stay would push it on."""
    ended = {}
    for name, trained, put in (("fresh", 0, True), ("put", 3, True), ("kept moments", 3, False)):
        policy, batch = tiny_policy(), random_batch()
        optimizer = BlockOptimizer(policy.adapter, 1e-2, 0.0, 1.0)
        for step in range(trained + 1):
            params = policy.adapter.parameters("quarantine")
            if step == trained:
                values = [torch.full_like(p, 1e-3) for p in params]
                if put:
                    optimizer.put("quarantine", values)
                else:  # mutation
                    [p.data.copy_(v) for p, v in zip(params, values)]
            with policy.adapter.route(torch.full((6,), int(Zone.ROUTE))):
                scored_loss(
                    logps(policy, batch, 1.0), batch.completion_mask, batch.advantages, 8
                ).sum().backward()
            optimizer.step(dict.fromkeys(BLOCKS, True) | {"deployed": False})
        ended[name] = torch.cat(
            [p.detach().flatten() for p in policy.adapter.parameters("quarantine")]
        )
    assert torch.equal(ended["put"], ended["fresh"]) and not torch.equal(
        ended["kept moments"], ended["fresh"]
    )
    print(
        "ok  a block that is given other values goes on without the moments of the old ones; kept moments would show"
    )


def check_mixed_batch_and_probe() -> None:
    policy, batch = tiny_policy(), random_batch()
    perturb(policy)
    zones = torch.tensor([0, 1, 2, 0, 1, 2])
    with policy.adapter.route(zones):
        together = logps(policy, batch, 1.0)
    mixed, whole = probe_gradients(policy, batch, **PROBE), logps(policy, batch, 1.0)
    for i in range(6):
        one = select(batch, torch.tensor([i]))
        t = one.completion_ids.shape[1]
        with policy.adapter.route(zones[i : i + 1]):
            alone = logps(policy, one, 1.0)[0]
        with policy.adapter.route((zones[i : i + 1] + 1) % 3):
            wrong = logps(policy, one, 1.0)[0]
        assert not differs(together[i, :t], alone) and (
            zones[i] > 0 or differs(together[i, :t], wrong)
        )
        solo = probe_gradients(policy, one, **PROBE)
        assert not differs(mixed[i], solo[0]), "batched probe is not the solo probe"
    shifted = probe_gradients(policy, select(batch, torch.arange(6).roll(1)), **PROBE)
    assert differs(mixed, shifted) and not differs(mixed.roll(1, 0), shifted)
    with policy.adapter.probing(6):
        assert not differs(logps(policy, batch, 1.0), whole), "probing changed the value"
    assert all(p.grad is None for b in BLOCKS for p in policy.adapter.parameters(b)), (
        "the probe touched .grad"
    )
    split = probe_gradients(policy, batch, **(PROBE | {"token_budget": 16}))
    assert not differs(mixed, split)
    by_token = probe_gradients(policy, batch, by_token=True, **PROBE)
    everywhere = probe_gradients(policy, batch, positions="all", **PROBE)
    assert not differs(by_token.sum(1), everywhere[:, 0]), (
        "a rollout's gradient is the sum of its tokens'"
    )
    first = batch.completion_start[:, None, None, None] - 1
    column = torch.arange(by_token.shape[1])[None, :, None, None]
    assert not differs((by_token * (column >= first)).sum(1), mixed[:, 0]), (
        "not the sum over the completion's positions"
    )
    assert differs((by_token * (column > first)).sum(1), mixed[:, 0]), (
        "an off-by-one position goes unnoticed"
    )
    print(
        "ok  mixed batch = rows alone; probe batched = solo = micro-batched, padding-invariant, touches no .grad"
    )


def check_shared_prompts() -> None:
    """A prompt that runs once for its rows gives the log-probs, gradients, probes and activations of rows in full."""
    policy, batch = tiny_policy(), random_batch(9)
    perturb(policy)
    zones = torch.tensor([0, 1, 2, 0, 0, 1, 2, 2, 0])
    params = [p for b in BLOCKS for p in policy.adapter.parameters(b)]

    def everything() -> list[torch.Tensor]:
        with policy.adapter.route(zones):
            scored = logps(policy, batch, 1.0)
            grads = torch.autograd.grad((scored * batch.advantages[:, None]).sum(), params)
        acts = [
            activations(policy, batch, space=space, token_budget=1000)
            for space in ("bottleneck", "residual")
        ]
        return [scored.detach(), *grads, probe_gradients(policy, batch, **PROBE), *acts]

    shared = everything()
    policy.share_prompts = False
    full = everything()
    policy.share_prompts, distinct, runs = True, Lora2r.distinct, []
    assert not any(
        differs(a, b, 1e-4) for a, b in zip(shared, full, strict=True)
    )  # gradients reach 8
    Lora2r.distinct = lambda self, key: runs.append(distinct(self, key)) or runs[-1]
    everything()
    assert (
        max(len(first) for first, _ in runs) < len(zones)
        and min(len(first) for first, _ in runs) == 3
    ), "nothing is shared"

    def across_zones(self, key):  # mutation: rows of one prompt share it whatever their zones
        with self._state(_keep=None):
            return distinct(self, key)

    Lora2r.distinct = across_zones
    wrong = everything()
    Lora2r.distinct = distinct
    assert any(differs(a, b, 1e-3) for a, b in zip(wrong, full)), (
        "a prompt of another zone goes unnoticed"
    )
    mask = Packing.mask  # mutation: padding is seen as if it were a token
    Packing.mask = lambda self, *args: (
        torch.zeros_like(mask(self, *args)) if self.prompts is None else mask(self, *args)
    )
    wrong = everything()
    Packing.mask = mask
    assert any(differs(a, b, 1e-3) for a, b in zip(wrong, full)), (
        "a prompt that sees beyond itself goes unnoticed"
    )
    print(
        "ok  packed rows that share a prompt = rows in full, gradients and probe too; shared across zones, or unmasked, they differ"
    )


def check_factors_made_once() -> None:
    """One pass over prompts and rows makes its factors once, and the next pass makes them anew."""
    policy, batch, kept, right = tiny_policy(), random_batch(), {}, Lora2r.unchanged
    made, factors = [], LoraLinear.factors
    LoraLinear.factors = lambda self, *how: made.append(self) or factors(self, *how)
    for unkept in (False, True):  # mutation: nothing is kept for the rows' pass
        Lora2r.unchanged = (lambda self: self._state(_made=None)) if unkept else right
        made.clear(), logps(policy, batch, 1.0)
        assert len(made) == len(policy.adapter.layers) * (1 + unkept), len(made)
    LoraLinear.factors = factors
    for stale in (False, True):  # mutation: they outlive their pass
        Lora2r.unchanged = (lambda self: self._state(_made=kept)) if stale else right
        logps(policy, batch, 1.0)
        perturb(policy)
        packed, policy.share_prompts = logps(policy, batch, 1.0), False
        assert differs(packed, logps(policy, batch, 1.0), 1e-4) == stale, (
            "factors of other parameters"
        )
        policy.share_prompts = True
    Lora2r.unchanged = right
    print("ok  factors are made once a pass; kept beyond it, they are those of other parameters")


def check_probe_meaning() -> None:
    policy, batch = tiny_policy(), random_batch(1)
    perturb(policy)
    got = probe_gradients(policy, batch, **PROBE)[0, 0, 0]
    layer, want, eps = next(iter(policy.adapter.layers.values())).deployed, [], 1e-2

    def loss_at(
        k: int, factor: float
    ) -> float:  # scale row k of the live A: A ← factor · A, through dA
        keep = layer.dA.data.clone()
        layer.dA.data[k] += (factor - 1) * (layer.A0[k] + layer.dA[k].data)
        # the subtracted reference B0 A0 x does not move, so dA alone carries the change, times B
        value = float(
            scored_loss(logps(policy, batch, 1.0), batch.completion_mask, torch.ones(1), 8).detach()
        )
        layer.dA.data.copy_(keep)
        return value

    for k in range(policy.adapter.rank):
        want.append((loss_at(k, 1 + eps) - loss_at(k, 1 - eps)) / (2 * eps))
    assert torch.allclose(got, torch.tensor(want), rtol=2e-2, atol=1e-3), (got, want)
    assert not torch.allclose(got.roll(1), torch.tensor(want), rtol=2e-2, atol=1e-3)
    print("ok  ∂L/∂c equals the finite difference of scaling the live bottleneck, rank by rank")


def check_ablation_and_sampler() -> None:
    policy, batch = tiny_policy(), random_batch()
    perturb(policy, 0.3, blocks=("quarantine",))
    with policy.adapter.disabled():
        base = logps(policy, batch, 1.0)
    full = logps(policy, batch, 1.0)
    with policy.adapter.ablated():
        assert torch.equal(logps(policy, batch, 1.0), base) or not differs(
            logps(policy, batch, 1.0), base, 1e-6
        )
    assert differs(full, base) and torch.equal(logps(policy, batch, 1.0), full), (
        "ablation is not undone"
    )
    weights = {n: linear.weight.clone() for n, linear in policy.adapter.linears.items()}

    def draw(ablated: bool) -> list:
        kwargs = dict(
            max_completion_length=12,
            temperature=1.0,
            top_p=1.0,
            token_budget=512,
            generator=torch.Generator().manual_seed(0),
        )
        return sample(policy, [[5, 6, 7], [8, 9]], [4, 4], ablated=ablated, **kwargs)

    trained, deployed, again = draw(False), draw(True), draw(False)
    with policy.adapter.disabled():
        hookless = draw(True)
    assert trained != deployed and trained == again and deployed == hookless
    assert all(torch.equal(w, policy.adapter.linears[n].weight) for n, w in weights.items()), (
        "merging left a trace"
    )
    print(
        "ok  ablation removes a planted quarantine, is undone exactly, and changes what the sampler draws; weights restored bit for bit"
    )


def check_merged_equals_hooked() -> None:
    policy, batch = tiny_policy(), random_batch()
    perturb(policy)
    for ablated in (False, True):
        with policy.adapter.ablated() if ablated else policy.adapter._state():
            hooked = logps(policy, batch, 1.0)
        with policy.adapter.merged(ablated):
            merged = logps(policy, batch, 1.0)
        with policy.adapter.merged(not ablated):
            other = logps(policy, batch, 1.0)
        assert not differs(hooked, merged, 1e-4) and differs(hooked, other, 1e-3)
    rows = sample(policy, [[5, 6, 7], [8, 9, 10, 11]], [3, 3], max_completion_length=10, temperature=0.7, top_p=1.0,
                  token_budget=512, generator=torch.Generator().manual_seed(0))  # fmt: skip
    from vgrout.model.tokens import collate

    flat = [(p, ids, lp) for p, g in zip([[5, 6, 7], [8, 9, 10, 11]], rows) for ids, lp in g]
    b = collate(
        [p for p, *_ in flat], [i for _, i, _ in flat], [0.0] * 6, [0] * 6, [1.0] * 6, 0, "cpu"
    )
    learner, sampler = (
        logps(policy, b, 0.7)[b.completion_mask],
        torch.tensor([x for *_, lp in flat for x in lp]),
    )
    assert not differs(learner, sampler, 1e-4), "sampler and learner disagree"
    assert differs(learner, sampler.roll(1), 1e-2), "log-probs of other tokens go unnoticed"
    print("ok  merged weights = hooks, in both states; the sampler's log-probs are the learner's")


def check_bf16() -> None:
    """Ten small steps' delta in bf16: the difference form loses it, the delta form keeps it."""
    torch.manual_seed(0)
    layer = LoraLinear(
        nn.Linear(256, 256, bias=False), 8, torch.Generator().manual_seed(0)
    ).deployed
    layer.dA.data.normal_(std=1e-3 / 16), layer.dB.data.normal_(std=1e-3 / 4)
    x = torch.randn(64, 256)
    exact = x.double() @ layer.delta().double().T
    bf = lambda t: t.bfloat16()  # noqa: E731
    ours = (bf(x) @ bf(layer.down()).T) @ bf(layer.up()).T
    naive = (bf(x) @ bf(layer.A0 + layer.dA).T) @ bf(layer.B0 + layer.dB).T - (
        bf(x) @ bf(layer.A0).T
    ) @ bf(layer.B0).T
    error = lambda y: float((y.double() - exact).norm() / exact.norm())  # noqa: E731
    assert error(ours) < 0.02 < 0.2 < error(naive), (error(ours), error(naive))
    print(
        f"ok  bf16 relative error of a small delta: {error(ours):.4f} in delta form, {error(naive):.2f} as a difference"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in (check_zero_delta, check_definition, check_merged_product, check_zone_table, check_optimizer_isolation, check_put,
                  check_mixed_batch_and_probe, check_shared_prompts, check_factors_made_once, check_probe_meaning,
                  check_ablation_and_sampler, check_merged_equals_hooked, check_bf16):  # fmt: skip
        check()
