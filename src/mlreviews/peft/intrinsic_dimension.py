r"""Intrinsic dimension: fine-tuning all weights along a few random directions (Fastfood, DID and SAID).

Paper: Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning (arXiv:2012.13255).
Paper: Measuring the Intrinsic Dimension of Objective Landscapes (arXiv:1804.08838).
Paper: Fastfood: Approximate Kernel Expansions in Loglinear Time (arXiv:1408.3060).

Only a vector of d numbers is trained; a fixed random projection spreads it over all D weights. The smallest d that
reaches 90 % of what full fine-tuning reaches is the intrinsic dimension of the task for the model. A dense projection
would have D d entries; Fastfood multiplies by a random matrix with three vectors of about D entries and two fast
Walsh-Hadamard transforms. SAID spends one of the d numbers on a learned scale of each parameter tensor.

Equation:
    $$ \theta^D = \theta_0^D + P(\theta^d) \tag{1} $$
    $$ \theta_i^D = \theta_{0,i}^D + \lambda_i\, P(\theta^{d-m})_i \tag{2} $$
    $$ P(v) = \Bigl[\frac{1}{\lVert G \rVert \sqrt{n}}\, H\, G\, \Pi\, H\, B\, v\Bigr]_{1..D} \tag{3} $$
    $$ d_{90} = \min \{ d : \mathrm{score}(d) \ge 0.9 \cdot \mathrm{score}(\text{full}) \} \tag{4} $$

Symbols:
    theta^D: all weights of the model, one after another.
    theta^d: [d], what is trained; starts at 0.
    lambda: [m], one scale for each of the model's m parameter tensors; starts at 1.
    n: the smallest power of two that is at least D.
    H: [n, n], Walsh-Hadamard matrix with entries 1 and -1 (natural order).
    B: [n], random signs.
    Pi: [n], a random permutation.
    G: [n], standard normal.

Defaults:
    fraction: 0.9 (section 3).
    projection: Fastfood (section 3).

Deviations:
    1. The scale in eq. (3) is that of the authors' code. It keeps the norm of v up to the cut to D of n entries, which
       leaves D / n of the squared norm on average.
    2. One projection runs over all weights, as eq. (1) has it; the authors' code draws one for each tensor.

Reduces to:
    full fine-tuning: P the identity, d = D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number

__all__ = [
    "DenseProjection",
    "FastfoodProjection",
    "IntrinsicWrapper",
    "fastfood",
    "intrinsic_dimension",
    "walsh_hadamard",
]

# Of a factor of H, applied by one matrix product. On a CPU 16 is five times as quick as 2, the butterfly, at n = 2^22.
_RADIX = 16


def walsh_hadamard(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """H x along the last axis in O(n log n), without the factor that would make H orthogonal: H(H(x)) = n x.

    Args:
        x: [..., n], n a power of two.

    Raises:
        ValueError: n isn't a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"x: expected a power of two along the last axis, got shape {tuple(x.shape)}")
    y, after = x, 1
    while after < n:
        radix = min(_RADIX, n // after)
        h = _hadamard(radix, x)
        # H of 16^k entries is a Kronecker product of factors of 16, each applied along an axis of its own.
        y = y.reshape(-1, radix) @ h if after == 1 else h @ y.reshape(-1, radix, after)
        after *= radix
    return y.reshape(x.shape)


def _hadamard(n: int, like: Tensor) -> Tensor:
    h = like.new_ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def fastfood(
    v: Float[Tensor, " d"],
    signs: Float[Tensor, " n"],
    permutation: Tensor,
    gaussian: Float[Tensor, " n"],
    out_dim: int,
) -> Float[Tensor, " out_dim"]:
    """The random projection of eq. (3).

    Args:
        v: [d], at most n numbers.
        signs: [n], B, entries 1 and -1; n a power of two.
        permutation: int64 [n], Pi.
        gaussian: [n], G.
        out_dim: D, at most n.

    Returns:
        [out_dim], linear in v.

    Raises:
        ValueError: d or out_dim is larger than n.
    """
    n = signs.shape[0]
    if v.shape[0] > n or not 1 <= out_dim <= n:
        raise ValueError(f"out_dim: expected v and out_dim within 1 and {n}, got {v.shape[0]} and {out_dim}")
    mixed = walsh_hadamard(signs * nn.functional.pad(v, (0, n - v.shape[0])))
    spread = walsh_hadamard(gaussian * mixed[permutation])
    return spread[:out_dim] / (gaussian.norm() * n**0.5)


class FastfoodProjection(nn.Module):
    """`fastfood` with its three random vectors: memory of O(D), time of O(D log D).

    Args:
        dim: d.
        out_dim: D.
        generator: draws the vectors; None is the global one.

    Raises:
        ValueError: a size below 1, or dim larger than the power of two that follows out_dim.
    """

    signs: Tensor
    permutation: Tensor
    gaussian: Tensor

    def __init__(self, dim: int, out_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("out_dim", out_dim)
        n = 1 << (out_dim - 1).bit_length()
        if dim > n:
            raise ValueError(f"dim: expected at most {n} for out_dim {out_dim}, got {dim}")
        self.out_dim = out_dim
        self.register_buffer("signs", torch.randint(2, (n,), generator=generator).float() * 2 - 1)
        self.register_buffer("permutation", torch.randperm(n, generator=generator))
        self.register_buffer("gaussian", torch.randn(n, generator=generator))

    def forward(self, v: Float[Tensor, " d"]) -> Float[Tensor, " out_dim"]:
        """[dim] -> [out_dim], computed in float32 at least, in the dtype of v."""
        wide = torch.promote_types(v.dtype, torch.float32)
        vectors = self.signs.to(wide), self.permutation, self.gaussian.to(wide)
        return fastfood(v.to(wide), *vectors, self.out_dim).to(v.dtype)


class DenseProjection(nn.Module):
    """A matrix whose entries are normal with variance 1 / D, so that its columns have about unit norm.

    Args:
        dim: d.
        out_dim: D.
        generator: draws the matrix; None is the global one.

    Raises:
        ValueError: a size below 1.
    """

    matrix: Tensor

    def __init__(self, dim: int, out_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("out_dim", out_dim)
        self.register_buffer("matrix", torch.randn(out_dim, dim, generator=generator) / out_dim**0.5)

    def forward(self, v: Float[Tensor, " d"]) -> Float[Tensor, " out_dim"]:
        """[dim] -> [out_dim], computed in float32 at least, in the dtype of v."""
        wide = torch.promote_types(v.dtype, torch.float32)
        return (self.matrix.to(wide) @ v.to(wide)).to(v.dtype)


class IntrinsicWrapper(nn.Module):
    """A model that is trained along d random directions, eq. (1) or (2); called as the model is.

    Args:
        model: its parameters are frozen.
        dim: d, all trained numbers together.
        structure_aware: SAID, eq. (2): `dim` then counts the scales as well.
        projection: called as ``projection(dim, out_dim, generator=generator)``.
        generator: draws the projection; None is the global one.

    Raises:
        ValueError: dim is below 1, or leaves nothing beside the scales, or the model has no floating-point parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int,
        *,
        structure_aware: bool = False,
        projection: Callable[..., nn.Module] = FastfoodProjection,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        self.model = model.requires_grad_(False)
        self._sizes = {name: p.numel() for name, p in model.named_parameters() if p.is_floating_point()}
        if not self._sizes:
            raise ValueError(f"model: expected floating-point parameters, found none in {type(model).__name__}")
        scales = len(self._sizes) if structure_aware else 0
        if dim <= scales:
            raise ValueError(f"dim: expected more than the {scales} scales of the model's tensors, got {dim}")
        self.projection = projection(dim - scales, sum(self._sizes.values()), generator=generator)
        self.theta = nn.Parameter(torch.zeros(dim - scales))
        self.scales = nn.Parameter(torch.ones(scales)) if structure_aware else None

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters by name, moved along the directions; each in its own dtype."""
        moved = {}
        parts = self.projection(self.theta).split(list(self._sizes.values()))
        for i, (name, part) in enumerate(zip(self._sizes, parts, strict=True)):
            start = self.model.get_parameter(name)
            step = part.view(start.shape) if self.scales is None else self.scales[i] * part.view(start.shape)
            moved[name] = start + step.to(start.dtype)
        return moved

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output, with the moved weights."""
        return torch.func.functional_call(self.model, self.weights(), args, kwargs)


def intrinsic_dimension(
    train: Callable[[int], float], dims: Iterable[int], full_score: float, fraction: float = 0.9
) -> int | None:
    """The smallest number of directions that comes close to full fine-tuning, eq. (4).

    Args:
        train: fine-tunes along d directions, and returns the score, higher is better.
        dims: tried in this order until one is enough, so give them in ascending order.
        full_score: of full fine-tuning, in the same units; more than 0.
        fraction: of it that is enough.

    Returns:
        d, or None when none is enough.

    Raises:
        ValueError: a score or fraction that isn't positive and finite.
    """
    check_number("full_score", full_score, above=0.0)
    check_number("fraction", fraction, above=0.0)
    # Scores are often fractions of a test set: rounding must not decide when exactly 90 % are reached.
    enough = fraction * full_score * (1 - 1e-9)
    return next((d for d in dims if train(d) >= enough), None)
