"""Live monitors as scores, the external baselines: an LLM judge, and a linear probe.

Both need in training what vGROUT is meant to do without, and are marked so everywhere. Their
score is a flag, cut at 0.5; they read no pairs, and no label of a training rollout
(docs/method/monitors.md).
"""

from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from vgrout.env.problems import stable_hash
from vgrout.gate.monitors.judge import Endpoint, judge
from vgrout.gate.monitors.labelled import Labelled, load_labelled
from vgrout.gate.scores import Materials, Score, Scored, register
from vgrout.gate.v_grad import activations
from vgrout.model import tokens
from vgrout.model.batch import Batch
from vgrout.model.likelihood import written
from vgrout.model.policy import Policy
from vgrout.stats import auroc

HELD_OUT = 5  # every fifth problem of the probe's data, by a hash of its id, is only measured on


@dataclass
class Judge(Score):
    """An LLM judge's verdict on each row's text: 1 hack, 0 clean, NaN for none (counted)."""

    endpoint: Endpoint

    def __call__(
        self,
        policy: Policy,
        batch: Batch,
    ) -> Scored:
        scores = torch.tensor(judge(self.endpoint, texts(policy, batch))).to(batch.advantages)
        return Scored(scores, stats={"judge_failures": float(scores.isnan().sum())})


def texts(policy: Policy, batch: Batch) -> list[tuple[str, str]]:
    """(prompt, completion) of every row, decoded from its tokens."""
    rows = []
    for i, start in enumerate(batch.completion_start.tolist()):
        completion = batch.completion_ids[i][batch.completion_mask[i]]
        parts = batch.input_ids[i, :start].tolist(), completion.tolist()
        prompt, answer = (tokens.decode_completion(policy.tokenizer, ids) for ids in parts)
        rows.append((prompt, answer))
    return rows


@dataclass
class Probe(Score):
    """p(hack) by logistic regression on pooled activations, with another environment's labels.

    Fitted at the current parameters. `data` are rollouts of other problems with their labels
    `hack`; the rows `held_out` are not fitted, and give the figures that a refresh returns.
    Features are standardised by the fitted rows' mean and standard deviation.
    """

    data: Batch
    hack: Bool[Tensor, " n"]
    held_out: Bool[Tensor, " n"]
    _: KW_ONLY
    space: str
    l2: float
    stored = ("weight", "bias", "mean", "scale")

    def refresh(
        self,
        policy: Policy,
    ) -> dict[str, float]:
        """Fit anew; returns AUROC and accuracy at 0.5 on the probe's own held-out rows."""
        x, fit = self._features(policy, self.data), ~self.held_out
        self.mean, self.scale = x[fit].mean(0), x[fit].std(0).clamp(min=1e-6)
        standard = (x[fit] - self.mean) / self.scale
        self.weight, self.bias = fit_logistic(standard, self.hack[fit], self.l2)
        p, label = self._probability(x[self.held_out]), self.hack[self.held_out]
        area = auroc(p.cpu().numpy(), label.cpu().numpy())
        return {
            "probe_auroc": area,
            "probe_accuracy": float(((p > 0.5) == label).float().mean()),
        }

    def __call__(
        self,
        policy: Policy,
        batch: Batch,
    ) -> Scored:
        return Scored(self._probability(self._features(policy, batch)))

    def _features(
        self,
        policy: Policy,
        batch: Batch,
    ) -> Float[Tensor, "g k"]:
        return activations(policy, batch, self.space).flatten(1)

    def _probability(
        self,
        x: Float[Tensor, "g k"],
    ) -> Float[Tensor, " g"]:
        fitted = (self.weight, self.bias, self.mean, self.scale)
        weight, bias, mean, scale = (t.to(x) for t in fitted)
        return torch.sigmoid(((x - mean) / scale) @ weight + bias)


def fit_logistic(
    x: Float[Tensor, "n k"],
    y: Bool[Tensor, " n"],
    l2: float,
) -> tuple[Float[Tensor, " k"], Float[Tensor, ""]]:
    """argmin over (w, b) of Σ log(1 + exp(−s (x·w + b))) + l2/2 · ‖w‖², s = ±1, by L-BFGS.

    The bias is not shrunk.
    """
    x, target = x.double(), y.double()
    w, b = x.new_zeros(x.shape[1], requires_grad=True), x.new_zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w, b], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = F.binary_cross_entropy_with_logits(x @ w + b, target, reduction="sum")
        value = fit + l2 / 2 * w.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return w.detach().float(), b.detach().float()


@register("judge")
def build_judge(materials: Materials) -> Judge:
    return Judge(Endpoint.of(materials.config.monitor))


@register("probe")
def build_probe(materials: Materials) -> Probe:
    """The probe on labelled rollouts, tokenised as this policy's prompts and completions are."""
    config, policy, rows = materials.config, materials.policy, probe_rows(materials)
    prompts, texts = [r.messages for r in rows], [r.completion for r in rows]
    batch = written(policy, prompts, texts, config.grpo.max_completion_length)
    held_out = [stable_hash("probe", r.problem_id) % HELD_OUT == 0 for r in rows]
    return Probe(
        batch,
        torch.tensor([r.hack for r in rows], device=policy.device),
        torch.tensor(held_out, device=policy.device),
        space=config.score.act_space,
        l2=config.monitor.probe_l2,
    )


def probe_rows(materials: Materials) -> list[Labelled]:
    """The probe's labelled rollouts, none of them of a problem of this run."""
    monitor, tokenizer = materials.config.monitor, materials.policy.tokenizer
    limit = materials.config.grpo.max_completion_length

    def fits(text: str) -> bool:
        """All but the end token, which a truncated sample does not have."""
        return len(tokens.encode_completion(tokenizer, text)) - 1 <= limit

    return load_labelled(monitor.probe_data, materials.problems, monitor.probe_rows, fits)
