r"""The selective scan of Mamba: a diagonal recurrence whose decay, input and output change with every token.

$h_t = \exp(\Delta_t A) h_{t-1} + \Delta_t u_t B_t$ and $y_t = C_t \cdot h_t + D u_t$, gated by $\mathrm{silu}(z_t)$.
No tensor of tokens x channels x state is ever stored. See ``README.md`` for the derivation of the backward.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_floating, check_same, check_shape, check_sizes, offsets_of
from mlreviews_kernels.backends import Core
from mlreviews_kernels.ops import register_scan
from mlreviews_kernels.selective_scan.reference import Inputs, border_rows, step

__all__ = ["selective_scan", "selective_scan_step"]

CORE = Core.read(Path(__file__).parent)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over time and reads out every step.

    Args:
        u: ``[batch, time, channels]``, the inputs.
        delta: ``[batch, time, channels]``, the step sizes before bias and softplus.
        A: ``[channels, state]``, the rates: decays are ``exp(delta * A)``, so negative where the state is to fade.
        B: ``[batch, time, state]`` or ``[batch, time, groups, state]``, how inputs enter the state. Each group serves
            ``channels / groups`` neighbouring channels.
        C: of B's shape, how the state is read.
        D: ``[channels]``, the skip connection; none if None.
        z: ``[batch, time, channels]``, the gate: y is multiplied by ``silu(z)``; none if None.
        delta_bias: ``[channels]``, added to delta; none if None.
        delta_softplus: the step sizes are ``softplus(delta + delta_bias)``.
        initial_state: ``[batch, channels, state]``, the state before the first step; zeros if None. Packed:
            ``[sequences, channels, state]``.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: where packed sequences begin and end in the one row (batch 1).
            Its numbers are checked on the CPU only: a GPU would have to be waited for.

    Returns:
        ``y [batch, time, channels]`` in u's dtype, and the final state ``[batch or sequences, channels, state]``,
        float32 for half-precision inputs. Gradients flow through both, and into every tensor argument.

    Raises:
        ValueError: shapes or devices don't go together.
        TypeError: a dtype is none of float32, float64, bfloat16, float16; or those of u, delta, B, C and z differ.
            A, D, delta_bias and the initial state may have their own; they are used in the state's precision.
        BackendError: the backend asked for by name can't be used; Triton not for float64.
    """
    check_floating("u", u)
    if u.ndim != 3:
        raise ValueError(f"u: expected [batch, time, channels], got {tuple(u.shape)}")
    check_sizes("u", u)
    batch, time, channels = u.shape
    B, C = _check(u, delta, A, B, C, D, z, delta_bias, "[batch, time, channels]")
    offsets = offsets_of(batch, time, cu_seqlens, u.device)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    shape = (sequences, channels, A.shape[1])
    if initial_state is None:
        initial_state = u.new_zeros(shape, dtype=dtype)
    check_floating("initial_state", initial_state)
    check_shape("initial_state", initial_state, shape, "[sequences, channels, state]")
    check_same("initial_state", initial_state, u, dtype=False)
    y, final, _, _ = torch.ops.mlreviews.selective_scan(
        u.flatten(0, 1),
        delta.flatten(0, 1),
        A.to(dtype),
        B.flatten(0, 1),
        C.flatten(0, 1),
        initial_state.to(dtype),
        None if D is None else D.to(dtype),
        None if z is None else z.flatten(0, 1),
        None if delta_bias is None else delta_bias.to(dtype),
        offsets,
        delta_softplus,
    )
    return y.reshape(u.shape), final


def selective_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`, for decoding; the tokens' arguments lack the time axis.

    Args:
        u: ``[batch, channels]``.
        delta: ``[batch, channels]``.
        A: ``[channels, state]``.
        B: ``[batch, state]`` or ``[batch, groups, state]``.
        C: of B's shape.
        D: ``[channels]`` or None.
        z: ``[batch, channels]`` or None.
        delta_bias: ``[channels]`` or None.
        delta_softplus: as in `selective_scan`.
        state: ``[batch, channels, state]``, of the last step, or the final state of `selective_scan`. Not changed.

    Returns:
        ``y [batch, channels]`` in u's dtype and the new state in the old one's.

    Raises:
        ValueError: shapes or devices don't go together.
        TypeError: as for `selective_scan`.
    """
    check_floating("u", u)
    if u.ndim != 2:
        raise ValueError(f"u: expected [batch, channels], got {tuple(u.shape)}")
    B, C = _check(u, delta, A, B, C, D, z, delta_bias, "[batch, channels]")
    check_floating("state", state)
    check_shape("state", state, (*u.shape, A.shape[1]), "[batch, channels, state]")
    check_same("state", state, u, dtype=False)
    return step(Inputs(u, delta, A, B, C, state, D, z, delta_bias), delta_softplus)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    axes: str,
) -> tuple[Tensor, Tensor]:
    """Raises unless all goes together with u; returns B and C with an axis of groups.

    Args:
        u: the inputs, whose floating dtype has been checked.
        delta: the step sizes.
        A: the rates.
        B: with or without groups.
        C: of B's shape.
        D: the skip connection.
        z: the gate.
        delta_bias: the bias.
        axes: of u, for the messages.
    """
    *tokens, channels = u.shape
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None:
            check_shape(name, tensor, tuple(u.shape), axes)
            check_same(name, tensor, u)
    check_floating("A", A)
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A: expected [channels, state] with channels = {channels}, got {tuple(A.shape)}")
    check_same("A", A, u, dtype=False)
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            check_floating(name, tensor)
            check_shape(name, tensor, (channels,), "[channels]")
            check_same(name, tensor, u, dtype=False)
    without = axes.replace("channels]", "")
    groups = B.shape[-2] if B.ndim == u.ndim + 1 else 1
    if groups == 0 or channels % groups:
        raise ValueError(f"B: expected a number of groups that divides the {channels} channels, got {groups}")
    grouped = (groups,) if B.ndim == u.ndim + 1 else ()
    for name, tensor in (("B", B), ("C", C)):
        meaning = f"{without}groups, state]" if grouped else f"{without}state]"
        check_shape(name, tensor, (*tokens, *grouped, A.shape[1]), meaning)
        check_same(name, tensor, u)
    shape = (*tokens, groups, A.shape[1])
    return B.reshape(shape), C.reshape(shape)


def _results(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    u, initial = given.u, given.initial
    borders = initial.new_empty(border_rows(u.shape[0], initial.shape[0]), *initial.shape[1:])
    return u.new_empty(u.shape), initial.new_empty(initial.shape), borders


register_scan(CORE, "selective_scan", Inputs, "bool delta_softplus", _results, kept=slice(2, 3))
