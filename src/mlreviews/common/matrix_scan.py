r"""The linear recurrence with a matrix at every step, h_t = A_t h_{t-1} + b_t, in logarithmic depth.

Steps compose, and composition is associative, so that a tree of matrix products gives all states:

$$ (A_2, b_2) \circ (A_1, b_1) = (A_2 A_1,\; A_2 b_1 + b_2) \tag{1} $$
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mlreviews_kernels.arguments import check_floating, check_same, check_shape

__all__ = ["matrix_scan"]

# Up to this many steps a loop of matrix-vector products is quicker than the tree, whose products are of matrices.
_LOOP = 16


def matrix_scan(
    A: Float[Tensor, "batch time d d"],
    b: Float[Tensor, "batch time d *columns"] | None = None,
    initial_state: Float[Tensor, "batch d *columns"] | None = None,
) -> tuple[Float[Tensor, "batch time d *columns"], Float[Tensor, "batch d *columns"]]:
    """All states of h_t = A_t h_{t-1} + b_t by the associative scan (1).

    Neighbouring steps are composed until 16 are left, and the states between are filled in on the way back: less than
    one product of matrices and two of a matrix and a vector for each step, in about log2(time) rounds.

    Args:
        A: [batch, time, d, d], any matrices.
        b: [batch, time, d], or [batch, time, d, k] for k columns under the same transitions; None is 0.
        initial_state: [batch, d] or [batch, d, k]; None is 0. With the identity (k = d) and without b the states are
            the prefix products A_t ... A_1.

    Returns:
        ``(states, final_state)``, [batch, time, d] and [batch, d], or with k columns each. States have the dtype of A;
        the final one, as all that is computed, float32 for half precision. Gradients flow through both.

    Raises:
        ValueError: shapes don't fit, an axis is empty, or neither b nor an initial state is given.
        TypeError: b has another dtype than A, or one is not floating point.
    """
    check_floating("A", A)
    if A.ndim != 4 or A.shape[2] != A.shape[3] or A.numel() == 0:
        raise ValueError(f"A: expected [batch, time, d, d] with no empty axis, got shape {tuple(A.shape)}")
    batch, time, d = A.shape[:3]
    if b is not None:
        columns = tuple(b.shape[3:])
        check_shape("b", b, (batch, time, d, *columns), "[batch, time, d, ...]")
        check_same("b", b, A)
    elif initial_state is not None:
        columns = tuple(initial_state.shape[2:])
        b = A.new_zeros(batch, time, d, *columns)
    else:
        raise ValueError("b, initial_state: expected at least one of them, got neither: all states would be 0")
    if initial_state is None:
        initial_state = A.new_zeros(batch, d, *columns)
    check_floating("initial_state", initial_state)
    check_shape("initial_state", initial_state, (batch, d, *columns), "[batch, d, ...]")
    wide = torch.promote_types(A.dtype, torch.float32)
    flat = b.to(wide).reshape(batch, time, d, -1), initial_state.to(wide).reshape(batch, d, -1)
    states = _tree(A.to(wide), *flat).reshape(batch, time, d, *columns)
    return states.to(A.dtype), states[:, -1]


def _tree(A: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """States [batch, time, d, k] after each step, from the one before the first."""
    time = A.shape[1]
    if time <= _LOOP:
        states = [before]
        for transition, inflow in zip(A.unbind(1), b.unbind(1), strict=True):
            states.append(torch.baddbmm(inflow, transition, states[-1]))
        return torch.stack(states[1:], dim=1)
    pairs = time // 2
    A_first, A_second, b_first, b_second = A[:, : 2 * pairs : 2], A[:, 1::2], b[:, : 2 * pairs : 2], b[:, 1::2]
    second = _tree(A_second @ A_first, A_second @ b_first + b_second, before)  # eq. (1)
    starts = torch.cat([before[:, None], second], dim=1)[:, : time - pairs]
    first = A[:, ::2] @ starts + b[:, ::2]
    both = torch.stack([first[:, :pairs], second], dim=2).flatten(1, 2)
    return torch.cat([both, first[:, pairs:]], dim=1)
