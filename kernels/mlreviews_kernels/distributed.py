"""Scans of a sequence whose time is split over processes: rank r holds the r-th piece, states pass between ranks.

Each rank first finds how its piece acts on whatever state comes in, as a factor and an offset, all ranks exchange
these (a state's size each, whatever the length), and each then scans its piece from the right state. Two passes over
the piece and one exchange, forward and backward; no rank waits for another one's scan.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlreviews_kernels.linear_scan import linear_scan
from mlreviews_kernels.ssd import ssd

__all__ = ["distributed_linear_scan", "distributed_ssd"]


def distributed_linear_scan(
    a: Tensor, b: Tensor, initial_state: Tensor | None = None, *, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_scan` of a sequence that is split over the ranks of a group, in the ranks' order.

    All ranks of the group must call it, and must call the backward of what they got.

    Args:
        a: ``[batch, time, ...]``, this rank's piece; the lengths may differ between ranks.
        b: of a's shape and dtype.
        initial_state: ``[batch, ...]``, the state before the whole sequence: on the first rank only; zeros if None.
        group: the processes; all if None.

    Returns:
        ``h`` of this piece, and the state after it: on the last rank the final state of the whole. Gradients reach
        every rank's inputs.

    Raises:
        ValueError: an initial state was given on another rank than the first, or as in `linear_scan`.
    """
    _check_state(initial_state, group)
    _, final = linear_scan(a, b, initial_state)
    before = _state_before(a.to(final.dtype).prod(1), final, group)
    return linear_scan(a, b, before if initial_state is None else before + initial_state)


def distributed_ssd(
    x: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd` of a sequence that is split over the ranks of a group; arguments and results as there.

    The state before, given on the first rank only, the returned state and the errors are as in
    `distributed_linear_scan`. The first of the two passes is one matrix product.
    """
    _check_state(initial_state, group)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = log_a.to(dtype).sum(1)
    # what input t adds to the state at the end: B_t x_t decayed by all the steps after it
    after = torch.cat([log_a.to(dtype)[:, 1:], torch.zeros_like(log_a[:, :1], dtype=dtype)], 1)
    decay = after.flip(1).cumsum(1).flip(1).exp()
    heads_B = B.to(dtype).repeat_interleave(x.shape[2] // B.shape[2], 2)
    final = torch.einsum("bthn,bthp->bhnp", heads_B * decay[..., None], x.to(dtype))
    factor = total.exp()[..., None, None]
    if initial_state is not None:
        final = final + factor * initial_state
    before = _state_before(factor.expand_as(final), final, group)
    state = before if initial_state is None else before + initial_state
    return ssd(x, log_a, B, C, D, chunk_size=chunk_size, initial_state=state)


def _check_state(initial_state: Tensor | None, group: dist.ProcessGroup | None) -> None:
    if initial_state is not None and dist.get_rank(group):
        raise ValueError(f"initial_state: expected None on rank {dist.get_rank(group)}: it belongs to the first rank")


def _state_before(factor: Tensor, offset: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The state before this rank's piece, when piece k takes a state s to ``factor_k s + offset_k``; zeros first."""
    pieces = _AllGather.apply(torch.stack([factor, offset]), group)
    # an empty sum: zeros that keep the exchange in rank 0's graph, since its backward is a call of all ranks together
    state: Tensor = pieces[:0].sum(0)[1]
    for factor_k, offset_k in pieces[: dist.get_rank(group)]:
        state = torch.addcmul(offset_k, factor_k, state)
    return state


class _AllGather(torch.autograd.Function):
    """All ranks' tensors; backward, each rank gets the sum of what all ranks have to say about its own."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, mine.contiguous(), group=group)
        return torch.stack(found)  # [ranks, 2, ...]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None
