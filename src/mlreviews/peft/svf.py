r"""SVF: only the singular values of a weight are scaled, and experts are such scales (Transformer squared).

Paper: Transformer-Squared: Self-adaptive LLMs (arXiv:2501.06252).

A weight is taken apart by its singular value decomposition, and one number for each singular value is trained:
min(m, n) of them for a matrix. What a model was trained for is thought to be in its weights already, so that a new task
only has to strengthen some components and weaken others. Trained vectors, one for each task, are experts: at inference
one is chosen by a classifier, or several are mixed with weights that a few examples decide.

Equation:
    $$ W = U \operatorname{diag}(\sigma) V^\top, \qquad
       W' = U \operatorname{diag}(\sigma \odot z) V^\top, \qquad
       y = \sum_i z_i \sigma_i u_i \langle v_i, x \rangle \tag{1} $$
    $$ J(z) = \mathbb{E}\bigl[\log \pi_{W'}(\hat y \mid x)\, r(\hat y, y)\bigr]
       - \lambda\, D_{\mathrm{KL}}(\pi_{W'} \,\|\, \pi_W) \tag{2} $$
    $$ z' = \sum_k \alpha_k z_k \tag{3} $$
    The weights alpha of eq. (3) are searched for by the cross-entropy method on a few examples of the new task.

Symbols:
    x: [*batch, in_features]; y: [*batch, out_features].
    W: [out_features, in_features], with singular values sigma and singular vectors u_i, v_i.
    z: [min(in_features, out_features)], trained; 1 at first.
    pi: distributions of the adapted and of the base model over answers; r: reward, 1 for a right answer and -1 else.
    lambda: weight of the divergence.
    alpha: [experts].

Defaults:
    population: 32 (authors' code).
    elite: 6 (authors' code: a fifth of the population).
    kl_weight: 0 (authors' code; the paper tries 0 to 0.3).
    learning rate: 2e-3 with batches of 256 answers and gradients of norm 1e-3 at most (authors' code).

Deviations:
    1. z is trained itself. The authors' code trains p with z = sigmoid(p), begins near p = 0.1, and rescales W' so that
       its singular values keep their sum; their adapter so begins near W, and not at it.
    2. Any linear layer can be adapted; the authors' code adapts the matrices of the MLPs.
    3. The divergence is that of the paper, expectation over the adapted model; the authors' code has the other one.
    4. The authors' code cuts the candidates of the cross-entropy method to [0, 1]; here they may be any numbers.

Reduces to:
    torch.nn.Linear: z = 1, exactly: what is added to the layer's output is U diag(sigma (z - 1)) V^T x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.adapter import Adapter, adapters, features, is_transposed
from mlreviews.common.checks import check_count, check_finite, check_number

__all__ = ["SVFLinear", "cem_search", "compose_experts", "expert", "load_expert", "svf_policy_loss"]


class SVFLinear(Adapter):
    """A linear layer whose singular values are scaled, eq. (1).

    Args:
        base: torch.nn.Linear, or what has its attributes, or transformers' Conv1D.

    Raises:
        TypeError: another kind of layer.
        ValueError: the weight has NaN or infinity.
    """

    u: Tensor
    sigma: Tensor
    vh: Tensor

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        rank = min(features(base))
        weight: Tensor = self.base.weight
        check_finite("base.weight", weight)
        # They follow from the weight: with it, a checkpoint needs z alone.
        for name, part in zip(("u", "sigma", "vh"), self._decomposed(), strict=True):
            self.register_buffer(name, part, persistent=False)
        self.z = nn.Parameter(torch.ones(rank, dtype=self.sigma.dtype, device=weight.device))
        self.register_load_state_dict_post_hook(_decompose_again)

    def delta_weight(self) -> Tensor:
        """U diag(sigma (z - 1)) V^T in the layout of the layer's weight."""
        u, scale, vh = self._parts()
        delta = (u * scale) @ vh
        return delta.mT if is_transposed(self.base) else delta

    def change(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """U diag(sigma (z - 1)) V^T x, by two products with thin matrices, whatever z is."""
        u, scale, vh = self._parts()
        return nn.functional.linear(nn.functional.linear(x.to(vh.dtype), vh) * scale, u)

    @torch.no_grad()
    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.unmerged_weight if self.merged else self.base.weight
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, sigma, vh = torch.linalg.svd(wide.mT if is_transposed(self.base) else wide, full_matrices=False)
        return u.contiguous(), sigma, vh.contiguous()

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(self.z.dtype, torch.float32)
        u, sigma, vh, z = (part.to(wide) for part in (self.u, self.sigma, self.vh, self.z))
        return u, sigma * (z - 1), vh


def _decompose_again(layer: nn.Module, _: object) -> None:
    """After a state has been loaded: its weight may be another."""
    assert isinstance(layer, SVFLinear)
    layer.u, layer.sigma, layer.vh = layer._decomposed()


def expert(model: nn.Module) -> dict[str, Tensor]:
    """The scales of a model, copied: what one task has taught it.

    Args:
        model: with `SVFLinear` layers.

    Returns:
        Path of a layer -> z.

    Raises:
        ValueError: there is no such layer.
    """
    found = {path: layer for path, layer in adapters(model).items() if isinstance(layer, SVFLinear)}
    if not found:
        raise ValueError("model: expected layers of SVFLinear, found none")
    return {path: layer.z.detach().clone() for path, layer in found.items()}


def load_expert(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Puts the scales of an expert, or of several composed, into a model.

    Args:
        model: with `SVFLinear` layers at the same paths; changed in place.
        scales: path of a layer -> z.

    Raises:
        ValueError: other paths or shapes than the model's; nothing has changed.
        RuntimeError: a layer is merged; nothing has changed.
    """
    own = expert(model)
    layers = adapters(model)
    if {path: z.shape for path, z in own.items()} != {path: z.shape for path, z in scales.items()}:
        raise ValueError(f"scales: expected the paths and shapes of the model's {len(own)} layers, got {list(scales)}")
    if any(layers[path].merged for path in own):
        raise RuntimeError("model: expected layers that are not merged; unmerge them first")
    with torch.no_grad():
        for path, z in scales.items():
            layers[path].get_parameter("z").copy_(z)


def compose_experts(experts: Sequence[Mapping[str, Tensor]], alpha: Float[Tensor, " experts"]) -> dict[str, Tensor]:
    """The scales of eq. (3), with the same weights in each layer.

    Args:
        experts: scales by the path of a layer, each over the same layers.
        alpha: [experts]; they need not sum to 1.

    Returns:
        Path of a layer -> z'.

    Raises:
        ValueError: no experts, experts of different layers, or another number of weights.
    """
    if not experts or any(other.keys() != experts[0].keys() for other in experts):
        raise ValueError(f"experts: expected at least one, all of the same layers, got {len(experts)}")
    if alpha.shape != (len(experts),):
        raise ValueError(f"alpha: expected one weight for each of {len(experts)} experts, got {tuple(alpha.shape)}")
    return {
        path: torch.stack([z[path] for z in experts], dim=-1) @ alpha.to(first.dtype)
        for path, first in experts[0].items()
    }


@torch.no_grad()
def cem_search(
    score: Callable[[Tensor], float],
    experts: int,
    *,
    population: int = 32,
    elite: int = 6,
    iterations: int = 20,
    deviation: float = 0.5,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " experts"]:
    """Searches for the weights of eq. (3) by the cross-entropy method.

    Candidates are drawn from independent normal distributions, which are then fitted to the best of them; the best so
    far is a candidate again.

    Args:
        score: from weights [experts] to how good they are on the examples, higher is better.
        experts: how many.
        population: candidates of an iteration.
        elite: how many the distributions are fitted to.
        iterations: how many.
        deviation: of the distributions at first; their mean is 1 / experts.
        generator: draws the candidates; None is the global one.

    Returns:
        The best candidate of the last iteration, in float32.

    Raises:
        ValueError: a number out of range, an elite larger than the population, or a score of NaN.
    """
    for name, value, least in (("experts", experts, 1), ("elite", elite, 2), ("iterations", iterations, 1)):
        check_count(name, value, least=least)
    check_count("population", population, least=elite)
    check_number("deviation", deviation, above=0.0)
    mean = torch.full((experts,), 1 / experts)
    spread = torch.full((experts,), deviation)
    best = mean
    for _ in range(iterations):
        candidates = mean + spread * torch.randn(population, experts, generator=generator)
        candidates[0] = best
        scores = torch.tensor([float(score(candidate)) for candidate in candidates], dtype=torch.float64)
        if scores.isnan().any():
            raise ValueError("score: expected numbers, got NaN")
        order = scores.argsort(descending=True, stable=True)
        chosen = candidates[order[:elite]]
        mean, spread = chosen.mean(0), chosen.std(0)
        best = candidates[order[0]]
    return best


def svf_policy_loss(
    logits: Float[Tensor, "batch time vocab"],
    reference_logits: Float[Tensor, "batch time vocab"],
    answers: Int[Tensor, "batch time"],
    rewards: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch time"],
    kl_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Minus the objective of eq. (2), with the divergence summed over the vocabulary at each token of an answer.

    Args:
        logits: [batch, time, vocab] of the adapted model at each token of the answers that it drew.
        reference_logits: [batch, time, vocab] of the base model there.
        answers: [batch, time], the tokens.
        rewards: [batch], of the whole answers.
        mask: [batch, time], False where an answer has ended, or not begun.
        kl_weight: lambda, at least 0.

    Returns:
        The mean over the batch of sums over tokens, in nats.

    Raises:
        ValueError: shapes that don't fit, or a negative weight.
    """
    check_number("kl_weight", kl_weight, least=0.0)
    rows = logits.shape[:2]
    if reference_logits.shape != logits.shape or not rows == answers.shape == mask.shape or rewards.shape != rows[:1]:
        got = [tuple(x.shape) for x in (logits, reference_logits, answers, rewards, mask)]
        raise ValueError(f"logits: expected shapes that fit each other, got {got}")
    log_probs, reference = (
        x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (logits, reference_logits)
    )
    chosen = log_probs.gather(-1, answers[..., None].long()).squeeze(-1)
    divergence = (log_probs.exp() * (log_probs - reference)).sum(-1)
    per_token = kl_weight * divergence - rewards[:, None] * chosen
    return torch.where(mask, per_token, 0.0).sum(1).mean()
