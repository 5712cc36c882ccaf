r"""Adaptive-temperature softmax: attention is sharpened where its entropy says that it has dispersed.

Paper: softmax is not enough (for sharp size generalisation) (arXiv:2410.01104).

A softmax over n items whose logits stay within fixed bounds gives each of them a coefficient of order 1/n: a head that
picks out one item among the 16 it was trained on spreads over thousands. This softmax divides its logits by a
temperature that is a function of its own entropy, fitted beforehand to what would have helped. It is applied to a
trained model, at inference.

Equation:
    $$ H = -\sum_i p_i \log p_i, \quad p = \operatorname{softmax}(s), \qquad
       \operatorname{adaptive}(s) = \operatorname{softmax}(\beta(H)\, s) \tag{1} $$
    $$ \beta(H) = \begin{cases} \max(P(H), 1) & H > 0.5 \\ 1 & \text{else} \end{cases}, \qquad
       P(H) = -0.037 H^4 + 0.481 H^3 - 2.3 H^2 + 4.917 H - 1.791 \tag{2} $$
    $$ m \le s_i \le M \;\Rightarrow\;
       \tfrac{1}{n} e^{(m - M) / \theta} \le \operatorname{softmax}(s / \theta)_i \le \tfrac{1}{n} e^{(M - m) / \theta}
       \tag{3} $$

Symbols:
    s: [..., n], logits.
    H: [...], entropy of the plain softmax (nats).
    beta: [...], inverse temperature, at least 1.
    theta: temperature, 1 / beta.

Defaults:
    coefficients: -0.037, 0.481, -2.3, 4.917, -1.791 (figure 4).
    entropy_threshold: 0.5 nats (figure 4).

Deviations:
    1. The entropy is exact, with 0 log 0 = 0; the paper's listing adds 1e-9 to p inside the logarithm.
    2. None, but worth knowing: between 0.5 and 0.85 nats, and above 5.94, P is below 1 and nothing is sharpened. More
       than about exp(5.94) = 380 items that share the attention evenly are left alone.

Reduces to:
    torch.nn.Softmax: coefficients (1,), or every entropy at most the threshold.
    torch.nn.functional.scaled_dot_product_attention: the layer, under the same conditions or while training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_number, check_same_length
from mlreviews.models.attention import CausalAttention, KVCache
from mlreviews_kernels.adaptive_temperature_attention import COEFFICIENTS, adaptive_temperature_attention, reference

__all__ = [
    "AdaptiveTemperatureAttention",
    "adaptive_softmax",
    "dispersion_bounds",
    "fit_temperature_polynomial",
    "inverse_temperature",
    "softmax_entropy",
]


def softmax_entropy(
    logits: Float[Tensor, "*batch"], dim: int = -1, *, mask: Bool[Tensor, "*#batch"] | None = None
) -> Float[Tensor, "*kept"]:
    """Entropy H of a softmax in nats, eq. (1), in float32 at least.

    Args:
        logits: any shape; -inf for what takes no part.
        dim: over which axis.
        mask: broadcast against the logits, False for what takes no part.

    Returns:
        without that axis; 0 where nothing takes part.
    """
    log_p, hidden = _log_softmax(logits, dim, mask)
    return -(log_p.exp() * log_p).masked_fill(hidden, 0.0).sum(dim)


def inverse_temperature(
    entropy: Float[Tensor, "*batch"],
    coefficients: Sequence[float] = COEFFICIENTS,
    entropy_threshold: float = 0.5,
) -> Float[Tensor, "*batch"]:
    """beta of eq. (2).

    Args:
        entropy: H, in nats.
        coefficients: of the polynomial P, the highest power first.
        entropy_threshold: up to which beta is 1.

    Raises:
        ValueError: no coefficients.
    """
    if not coefficients:
        raise ValueError("coefficients: expected at least one, got none")
    return reference.inverse_temperature(entropy, coefficients, entropy_threshold)[0]


def adaptive_softmax(
    logits: Float[Tensor, "*batch"],
    dim: int = -1,
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    entropy_threshold: float = 0.5,
    mask: Bool[Tensor, "*#batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Softmax of eq. (1), instead of `torch.softmax`.

    Args:
        logits: any shape; -inf for what takes no part.
        dim: over which axis.
        coefficients: of the polynomial P, the highest power first.
        entropy_threshold: entropy in nats up to which nothing is changed.
        mask: broadcast against the logits, False for what takes no part.

    Returns:
        of the logits' shape and dtype; rows sum to 1, those where nothing takes part are 0.
    """
    entropy = softmax_entropy(logits, dim, mask=mask).unsqueeze(dim)
    beta = inverse_temperature(entropy, coefficients, entropy_threshold)
    log_p, hidden = _log_softmax(beta * logits.to(entropy.dtype), dim, mask)
    return log_p.exp().masked_fill(hidden, 0.0).to(logits.dtype)


def dispersion_bounds(items: int, spread: float, temperature: float = 1.0) -> tuple[float, float]:
    """Smallest and largest coefficient that a softmax can give, eq. (3).

    Args:
        items: n.
        spread: M - m, how far the logits can lie apart.
        temperature: theta.

    Raises:
        ValueError: n below 1, a negative spread, or a temperature that is not positive.
    """
    check_count("items", items)
    check_number("spread", spread, least=0.0)
    check_number("temperature", temperature, above=0.0)
    reach = torch.tensor(spread / temperature, dtype=torch.float64).exp().item()
    return 1 / (items * reach), reach / items


def fit_temperature_polynomial(
    entropies: Float[Tensor, " rows"], betas: Float[Tensor, " rows"], degree: int = 4
) -> tuple[float, ...]:
    """Coefficients of a polynomial of one's own: least squares of the best inverse temperature on the entropy.

    Args:
        entropies: [rows], H of softmaxes that were not sharp enough, in nats.
        betas: [rows], the inverse temperature that would have been best for each.
        degree: of the polynomial.

    Returns:
        degree + 1 coefficients, the highest power first, for `adaptive_softmax`.

    Raises:
        ValueError: fewer rows than coefficients, or lengths that differ.
    """
    check_count("degree", degree, least=0)
    check_same_length(entropies=entropies, betas=betas)
    if len(entropies) <= degree:
        raise ValueError(f"entropies: expected at least {degree + 1} for degree {degree}, got {len(entropies)}")
    powers = entropies.double()[:, None] ** torch.arange(degree, -1, -1, device=entropies.device)
    found = torch.linalg.lstsq(powers, betas.double()[:, None], driver="gelsd" if not powers.is_cuda else None)
    return tuple(found.solution[:, 0].tolist())


def _log_softmax(logits: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities, 0 where something takes no part; and where that is."""
    hidden = torch.isneginf(logits) if mask is None else torch.isneginf(logits) | ~mask
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # A row with nothing in it is taken as full for a moment: its softmax, and its gradient, would be NaN.
    empty = hidden.all(dim, keepdim=True)
    wide = wide.masked_fill(hidden, float("-inf")).masked_fill(empty, 0.0)
    return wide.log_softmax(dim).masked_fill(hidden, 0.0), hidden


class AdaptiveTemperatureAttention(CausalAttention):
    """Causal attention with the adaptive softmax in evaluation mode, and the plain one in training.

    Its weights are those of `mlreviews.models.CausalAttention`: a trained model's can be loaded. The polynomial of the
    paper, or one's own, is set by ``coefficients`` and ``entropy_threshold``, which are plain attributes.

    Args:
        d_model: size of a token's vector.
        heads: of the queries; their size is d_model / heads.
        kv_heads: of keys and values; `heads` is a multiple of it. None is `heads`.
        layer: which block of a model this is.
        rope_base: of the rotary embedding; None leaves positions out.
        generator: draws the weights; None is the global one.
    """

    coefficients: Sequence[float] = COEFFICIENTS
    entropy_threshold: float = 0.5

    def mix(
        self, q: Float[Tensor, "batch time heads dim"], cache: KVCache
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """Attention with the temperature of eq. (2) for each query and head; see `CausalAttention.mix`."""
        if self.training:
            return super().mix(q, cache)
        options = {"coefficients": self.coefficients, "entropy_threshold": self.entropy_threshold}
        return adaptive_temperature_attention(q, cache.keys, cache.values, mask=cache.mask, **options)[0]  # type: ignore[arg-type]
