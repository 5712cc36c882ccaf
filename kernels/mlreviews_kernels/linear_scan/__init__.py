r"""First-order linear recurrences: $h_t = a_t h_{t-1} + b_t$, and the same for positive numbers in log space.

Any length, any sign, any cut with the state carried over. See ``README.md`` for the derivation of the backward.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_floating, check_same, check_shape, check_sizes, offsets_of
from mlreviews_kernels.backends import Core
from mlreviews_kernels.linear_scan.reference import Inputs
from mlreviews_kernels.ops import register_scan

__all__ = ["linear_scan", "linear_scan_step", "log_linear_scan"]

CORE = Core.read(Path(__file__).parent)


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All states of ``h_t = a_t * h_{t-1} + b_t``, element by element.

    Args:
        a: ``[batch, time, ...]``, the factors: any sign, zeros included.
        b: the inputs, of a's shape and dtype.
        initial_state: ``[batch, ...]``, h before the first step (after the last one with ``reverse``); zeros if None.
            Packed: ``[sequences, ...]``.
        reverse: run from the last time to the first: ``h_t = a_t * h_{t+1} + b_t``.
        cu_seqlens: ``[sequences + 1]``, int32 or int64: where packed sequences begin and end in the one row (batch 1).
            Its numbers are checked on the CPU only: a GPU would have to be waited for.

    Returns:
        ``h`` of a's shape and dtype, and the final state ``[batch or sequences, ...]``, float32 for half-precision
        inputs. Gradients flow through both.

    Raises:
        ValueError: shapes or devices don't go together.
        TypeError: a dtype is none of float32, float64, bfloat16, float16, or they differ.
        BackendError: the backend asked for by name can't be used; Triton not for float64.
    """
    return _call(
        torch.ops.mlreviews.linear_scan, ("a", "b", "initial_state"), a, b, initial_state, 0.0, reverse, cu_seqlens
    )


def log_linear_scan(
    log_a: Tensor,
    log_b: Tensor,
    log_initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_scan` of positive numbers given by their logarithms: neither overflow nor cancellation.

    Args:
        log_a: ``[batch, time, ...]``; -inf for a factor 0.
        log_b: of log_a's shape and dtype; -inf for an input 0.
        log_initial_state: ``[batch, ...]``; all -inf, an empty state, if None.
        reverse: as in `linear_scan`.
        cu_seqlens: as in `linear_scan`.

    Returns:
        ``log h`` and the logarithm of the final state; dtypes and errors as in `linear_scan`.
    """
    names = ("log_a", "log_b", "log_initial_state")
    op = torch.ops.mlreviews.log_linear_scan
    return _call(op, names, log_a, log_b, log_initial_state, float("-inf"), reverse, cu_seqlens)


def linear_scan_step(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step, for decoding: ``(h, state)`` from ``a, b [batch, ...]`` and the state before.

    Args:
        a: the factor.
        b: the input.
        state: of the last step, or the final state of `linear_scan`.

    Returns:
        ``h`` in b's dtype and the new state in the old one's.

    Raises:
        ValueError: shapes or devices don't go together.
        TypeError: a dtype is none of float32, float64, bfloat16, float16; they may differ.
    """
    for name, tensor in (("a", a), ("b", b), ("state", state)):
        check_shape(name, tensor, tuple(a.shape), "[batch, ...]")
        check_floating(name, tensor)
        check_same(name, tensor, a, dtype=False)
    state = torch.addcmul(b.to(state.dtype), a.to(state.dtype), state)
    return state.to(b.dtype), state


def _call(
    op: torch._ops.OpOverloadPacket,
    names: tuple[str, str, str],
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    empty: float,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Checks the arguments, lays the sequences out one after another, and puts the axes back."""
    check_floating(names[0], a)
    if a.ndim < 2:
        raise ValueError(f"{names[0]}: expected [batch, time, ...], got {tuple(a.shape)}")
    check_shape(names[1], b, tuple(a.shape), f"{names[0]}'s shape")
    check_same(names[1], b, a)
    check_sizes(names[0], a)
    batch, time, *rest = a.shape
    offsets = offsets_of(batch, time, cu_seqlens, a.device)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    if initial_state is None:
        initial_state = a.new_full((sequences, *rest), empty, dtype=dtype)
    check_shape(names[2], initial_state, (sequences, *rest), "[sequences, ...]")
    check_floating(names[2], initial_state)
    check_same(names[2], initial_state, a, dtype=False)
    channels = initial_state[0].numel()
    flat = (batch * time, channels)
    h, final, _ = op(
        a.reshape(flat), b.reshape(flat), initial_state.to(dtype).reshape(sequences, channels), offsets, reverse
    )
    return h.to(a.dtype).reshape(a.shape), final.reshape(initial_state.shape)


def _results(given: Inputs) -> tuple[Tensor, Tensor]:
    return torch.empty_like(given.b), torch.empty_like(given.initial)


def _log_results(given: Inputs) -> tuple[Tensor, Tensor]:
    return torch.empty_like(given.b, dtype=given.initial.dtype), torch.empty_like(given.initial)


register_scan(CORE, "linear_scan", Inputs, "bool reverse", _results, kept=slice(1))
register_scan(CORE, "log_linear_scan", Inputs, "bool reverse", _log_results, kept=slice(1))
