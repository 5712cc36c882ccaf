"""Rotary position embedding (Su et al., arXiv:2104.09864), in both of the layouts that are in use."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["apply_rotary", "rotary_angles", "rotary_factors", "rotate"]


def rotary_angles(
    positions: Int[Tensor, "*batch time"], dim: int, *, base: float = 10000.0
) -> Float[Tensor, "*batch time half"]:
    r"""The angles $t\,\theta_i$ with $\theta_i = b^{-2i/d}$, in radians.

    Args:
        positions: [..., time], any integers.
        dim: d, how many entries of a head are rotated; even.
        base: b.

    Returns:
        [..., time, d / 2], float32.

    Raises:
        ValueError: dim is odd or below 2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: expected an even number of at least 2, got {dim}")
    frequencies = base ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    return positions[..., None].float() * frequencies


def apply_rotary(
    x: Float[Tensor, "batch time heads dim"], angles: Float[Tensor, "*batch time half"], *, interleaved: bool = False
) -> Float[Tensor, "batch time heads dim"]:
    r"""Rotates pairs of entries of each head by the angles, so that scores depend on differences of positions only.

    Args:
        x: [batch, time, heads, dim], queries or keys.
        angles: of `rotary_angles`, [time, half] or [batch, time, half]; 2 half <= dim, and entries from 2 half on stay
            as they are.
        interleaved: whether entry 2i is paired with 2i + 1 (as in the paper) or i with i + half (as in Llama and most
            checkpoints). The two differ by a permutation of the entries, which the projections' weights have to share.

    Returns:
        of x's shape and dtype; computed in the angles' dtype at least.

    Raises:
        ValueError: the angles are for more entries than a head has.
    """
    half = angles.shape[-1]
    if 2 * half > x.shape[3]:
        raise ValueError(f"angles: expected at most {x.shape[3] // 2} a token, half of a head, got {half}")
    if 2 * half == x.shape[3] and not interleaved:
        return rotate(x, *rotary_factors(angles))
    wide = x[..., : 2 * half].to(torch.promote_types(x.dtype, angles.dtype))
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    one, other = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    rotated = (one * cos - other * sin, one * sin + other * cos)
    found = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return torch.cat([found.to(x.dtype), x[..., 2 * half :]], dim=-1)


def rotary_factors(
    angles: Float[Tensor, "*batch time half"],
) -> tuple[Float[Tensor, "*batch time 1 dim"], Float[Tensor, "*batch time 1 dim"]]:
    """What `rotate` multiplies with: they are the same for all layers of a model, and for queries and keys.

    Args:
        angles: of `rotary_angles`, [time, half] or [batch, time, half].

    Returns:
        ``(cos, sin)``, [..., time, 1, 2 half]; the first half of the sines is negative.
    """
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2)


def rotate(
    x: Float[Tensor, "batch time heads dim"],
    cos: Float[Tensor, "*batch time 1 dim"],
    sin: Float[Tensor, "*batch time 1 dim"],
) -> Float[Tensor, "batch time heads dim"]:
    """`apply_rotary` of whole heads, entry i paired with i + half, in three operations.

    Args:
        x: [batch, time, heads, dim], queries or keys.
        cos: of `rotary_factors`.
        sin: of `rotary_factors`.
    """
    return (x * cos).addcmul(x.roll(x.shape[3] // 2, -1), sin).to(x.dtype)
