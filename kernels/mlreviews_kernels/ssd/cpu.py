"""The CPU path of `ssd`: several chunks and all heads at once in matrix products; the state alone goes chunk by chunk.

Within a chunk that begins with the state S, with c the running sum of log_a, L_ij = exp(c_i - c_j) for i >= j,
e_i = exp(c_i), f_j = exp(c_end - c_j) and M = L o (C B^T):

    Y = M X + e o (C S),    S' = e_end S + B^T (f o X)
"""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets
from mlreviews_kernels.compiled import load, pointer
from mlreviews_kernels.sequences import each
from mlreviews_kernels.ssd.reference import Inputs

SOURCE = Path(__file__).with_name("cpu.cpp")
LONGEST = 64  # chunk of the compiled form: longer ones leave the cache
HELD = 2**18  # entries of L that the vectorised form holds at a time: one chunk of 64 heads, or 16 chunks of 4


def ssd(given: Inputs, offsets: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    bounds = check_offsets(offsets, given.x.shape[0])
    x, log_a, B, C, initial, D = given.to(given.initial.dtype)
    library = load(SOURCE) if initial.dtype == torch.float32 else None
    if library is None:
        forward = partial(_forward, chunk_size=chunk_size)
        y, final = each(forward, (x, log_a, B, C), (initial,), bounds, outputs=1)
        if D is not None:
            y = y.addcmul_(x, D[:, None])
    else:
        y, final = torch.empty_like(x), torch.empty_like(initial)
        arrays = (x, log_a, B, C, D, initial, offsets.contiguous(), y, final)
        library.ssd(*map(pointer, arrays), *_sizes(initial, B, chunk_size))
    return y.to(given.x.dtype), final


def ssd_backward(
    grad_y: Tensor, grad_final: Tensor, given: Inputs, offsets: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of what is given."""
    wide = given.to(given.initial.dtype)
    grad_y, grad_final = (tensor.to(wide.x.dtype).contiguous() for tensor in (grad_y, grad_final))
    library = load(SOURCE) if wide.x.dtype == torch.float32 else None
    if library is not None:
        found = _compiled_backward(library, grad_y, grad_final, wide, offsets, chunk_size)
    else:
        x, log_a, B, C, initial, D = wide
        backward = partial(_backward, chunk_size=chunk_size)
        tokens, states = (grad_y, x, log_a, B, C), (grad_final, initial)
        found = *each(backward, tokens, states, offsets.tolist(), outputs=4), None
        if D is not None:
            found[0].addcmul_(grad_y, D[:, None])
            found = *found[:5], (grad_y * x).sum((0, 2))
    return [None if x is None else grad.to(x.dtype) for grad, x in zip(found, given, strict=True)]


def _compiled_backward(
    library: ctypes.CDLL, grad_y: Tensor, grad_final: Tensor, given: Inputs, offsets: Tensor, chunk_size: int
) -> tuple[Any, ...]:
    x, log_a, B, C, initial, D = given
    sizes = _sizes(initial, B, chunk_size)
    library.ssd_blocks.restype = ctypes.c_int64
    of_x, of_log_a, of_initial = (torch.empty_like(tensor) for tensor in (x, log_a, initial))
    of_B, of_C = B.new_empty((2, library.ssd_blocks(*sizes), *B.shape))
    of_D = None if D is None else D.new_empty((initial.shape[0], *D.shape))
    inputs = (grad_y, grad_final, x, log_a, B, C, D, initial, offsets.contiguous())
    library.ssd_backward(*map(pointer, (*inputs, of_x, of_log_a, of_B, of_C, of_D, of_initial)), *sizes)
    return of_x, of_log_a, of_B.sum(0), of_C.sum(0), of_initial, None if of_D is None else of_D.sum(0)


def _sizes(initial: Tensor, B: Tensor, chunk_size: int) -> tuple[ctypes.c_int64 | ctypes.c_int, ...]:
    sequences, heads, state, dim = initial.shape
    numbers = (sequences, heads, B.shape[1], dim, state, min(chunk_size, LONGEST))
    return *map(ctypes.c_int64, numbers), ctypes.c_int(torch.get_num_threads())


class _Decays(NamedTuple):
    """Of one chunk: L ``[batch, heads, to, from]``, e and f ``[batch, time, heads]``, and e_end ``[batch, heads]``."""

    between: Tensor
    since_start: Tensor
    to_end: Tensor
    whole: Tensor


def _decays(log_a: Tensor) -> _Decays:
    """The decays of a chunk ``[batch, time, heads]``.

    -inf would make differences of sums NaN: it counts as 0, and what a reset separates is masked. The sums are taken
    in float64, since what is small behind a large decay would be lost from their differences otherwise.
    """
    dtype = log_a.dtype
    resets = torch.isneginf(log_a)
    total = torch.cumsum(log_a.masked_fill(resets, 0.0), 1, dtype=torch.float64)
    count = resets.cumsum(1)
    nothing = float("-inf")
    rows, columns = total.mT[..., :, None], total.mT[..., None, :]
    apart = (count.mT[..., :, None] != count.mT[..., None, :]) | torch.ones(
        log_a.shape[1], log_a.shape[1], dtype=torch.bool, device=log_a.device
    ).triu(1)
    between = (rows - columns).to(dtype).masked_fill_(apart, nothing).exp_()
    since_start = total.to(dtype).masked_fill(count > 0, nothing).exp_()
    to_end = (total[:, -1:] - total).to(dtype).masked_fill_(count != count[:, -1:], nothing).exp_()
    return _Decays(between, since_start, to_end, since_start[:, -1])


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """``[batch, time, heads, dim]`` as ``[batch, groups, heads of a group, time, dim]``."""
    batch, time, heads, dim = tensor.shape
    return tensor.reshape(batch, time, groups, heads // groups, dim).permute(0, 2, 3, 1, 4)


def _by_token(tensor: Tensor) -> Tensor:
    """The way back."""
    return tensor.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _passed_on(state: Tensor, added: Tensor, whole: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """``S' = whole S + added`` from chunk to chunk: what each of them begins with, and what is left after the last.

    Args:
        state: ``[batch, groups, heads of a group, state, dim]``.
        added: ``[batch * chunks, groups, heads of a group, state, dim]``.
        whole: ``[batch * chunks, heads]``.
        reverse: from the last chunk to the first.
    """
    steps = added.unflatten(0, (len(state), -1)).unbind(1)
    factors = whole.reshape(*added.shape[:3], 1, 1).unflatten(0, (len(state), -1)).unbind(1)
    begins = []
    for step, factor in zip(*(x[::-1] if reverse else x for x in (steps, factors)), strict=True):
        begins.append(state)
        state = torch.addcmul(step, factor, state)
    return torch.stack(begins[::-1] if reverse else begins, 1).flatten(0, 1), state


def _spans(x: Tensor, chunk_size: int) -> list[tuple[int, int]]:
    """Which chunks of ``[batch, time, heads, dim]`` are multiplied together: start and number; a shorter one alone."""
    batch, time, heads, _ = x.shape
    together = max(1, HELD // (batch * heads * chunk_size**2))
    whole = time // chunk_size
    spans = [(i * chunk_size, min(together, whole - i)) for i in range(0, whole, together)]
    return spans + [(whole * chunk_size, 1)] * (time % chunk_size > 0)


def _cut(tensors: tuple[Tensor, ...], start: int, count: int, chunk_size: int) -> list[Tensor]:
    """The chunks of a span as a batch: ``[batch * chunks, time, ...]``."""
    parts = (tensor[:, start : start + count * chunk_size] for tensor in tensors)
    return [part.unflatten(1, (count, -1)).flatten(0, 1) for part in parts]


def _weights(weights: Tensor, like: Tensor) -> Tensor:
    """``[batch, time, heads]`` for a product with tensors by group."""
    return _by_group(weights[..., None], like.shape[1])


def _forward(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    groups = B.shape[2]
    state = initial.unflatten(1, (groups, -1))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start, count in _spans(x, chunk_size):
        part, decay, Bs, Cs = _cut((x, log_a, B, C), start, count, chunk_size)
        decays, xs, Bs, Cs = _decays(decay), _by_group(part, groups), Bs.transpose(1, 2), Cs.transpose(1, 2)
        begins, state = _passed_on(state, _given(xs, Bs, decays), decays.whole)
        scores = torch.matmul(Cs, Bs.mT)[:, :, None] * decays.between.unflatten(1, (groups, -1))
        inside = torch.matmul(scores, xs)
        inside.addcmul_(_weights(decays.since_start, xs), torch.matmul(Cs[:, :, None], begins))
        _put(y, _by_token(inside), start)
    return y, state.flatten(1, 2).clone()


def _given(xs: Tensor, Bs: Tensor, decays: _Decays) -> Tensor:
    """B^T (f o X): what a chunk adds to the state; x by group, B ``[batch, groups, time, state]``."""
    return torch.matmul(Bs.mT[:, :, None], xs * _weights(decays.to_end, xs))


def _put(tensor: Tensor, chunks: Tensor, start: int) -> None:
    """Writes a span ``[batch * chunks, time, ...]`` to where it belongs."""
    found = chunks.unflatten(0, (len(tensor), -1)).flatten(1, 2)
    tensor[:, start : start + found.shape[1]] = found


def _backward(
    grad_y: Tensor,
    x: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    grad_final: Tensor,
    initial: Tensor,
    *,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """Span by span from the last one; states at the chunks' borders are computed again first."""
    groups, spans = B.shape[2], _spans(x, chunk_size)
    state, borders = initial.unflatten(1, (groups, -1)), []
    for start, count in spans:
        part, decay, Bs = _cut((x, log_a, B), start, count, chunk_size)
        decays = _decays(decay)
        added = _given(_by_group(part, groups), Bs.transpose(1, 2), decays)
        begins, state = _passed_on(state, added, decays.whole)
        borders.append(begins)
    grads = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, log_a, B, C))
    grad_state = grad_final.unflatten(1, (groups, -1))
    for (start, count), begins in zip(reversed(spans), reversed(borders), strict=True):
        given = _cut((grad_y, x, log_a, B, C), start, count, chunk_size)
        found = _span_backward(*given, grad_state=grad_state, state=begins)
        for grad, part in zip(grads, found[:4], strict=True):
            _put(grad, part, start)
        grad_state = found[4]
    return *grads, grad_state.flatten(1, 2).clone()


def _span_backward(
    grad_y: Tensor, x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, *, grad_state: Tensor, state: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of x, log_a, B, C of each chunk, and of S of the first one, from those of Y and of the last one's S'.

    Args:
        grad_y: ``[batch * chunks, time, ...]``, like the four after it.
        x: likewise.
        log_a: likewise.
        B: likewise.
        C: likewise.
        grad_state: ``[batch, groups, heads of a group, state, dim]``.
        state: ``[batch * chunks, ...]``, S of each chunk.
    """
    groups = B.shape[2]
    decays = _decays(log_a)
    dy, xs = _by_group(grad_y, groups), _by_group(x, groups)
    Bs, Cs = B.transpose(1, 2), C.transpose(1, 2)
    L = decays.between.unflatten(1, (groups, -1))
    e, f = _weights(decays.since_start, xs), _weights(decays.to_end, xs)
    shared = torch.matmul(Cs, Bs.mT)[:, :, None]

    own = torch.matmul(Cs.mT[:, :, None], dy * e)
    grad_state, first = _passed_on(grad_state, own, decays.whole, reverse=True)

    dM = torch.matmul(dy, xs.mT).mul_(L)  # the gradient of C B^T, head by head
    dG = dM.sum(2)
    dx = torch.matmul((shared * L).mT, dy).addcmul_(f, torch.matmul(Bs[:, :, None], grad_state))
    from_state = torch.matmul(dy, state.mT).mul_(e)
    dC = torch.matmul(dG, Bs).add_(from_state.sum(2))
    dB = torch.matmul(dG.mT, Cs).add_(torch.matmul(xs * f, grad_state.mT).sum(2))

    # c_i multiplies all of y_i, and divides all that comes of x_i; c_end multiplies S'
    rows = (dM * shared).sum(-1) + (from_state * Cs[:, :, None]).sum(-1)
    dc = rows - (xs * dx).sum(-1)
    # <S', dS'> without S': what x gives to it, and what is left of S
    given = (f * xs * torch.matmul(Bs[:, :, None], grad_state)).sum((-2, -1))
    dc[..., -1] += given + (state * grad_state).sum((-2, -1)) * decays.whole.unflatten(1, (groups, -1))
    dlog_a = dc.flip(-1).cumsum(-1).flip(-1).permute(0, 3, 1, 2).flatten(2, 3)
    dlog_a = dlog_a.masked_fill(torch.isneginf(log_a), 0.0)
    return _by_token(dx), dlog_a, dB.transpose(1, 2), dC.transpose(1, 2), first
