"""The CPU path of `selective_scan`: compiled loops for float32 and below, vectorised PyTorch for the rest.

The vectorised form takes neighbouring sequences of one length together and walks along time in pieces that fit into
the cache. All that doesn't depend on the state before is one operation for a whole piece, with channels innermost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets
from mlreviews_kernels.compiled import load, pointer
from mlreviews_kernels.selective_scan.reference import CHUNK, Inputs, border_rows

SOURCE = Path(__file__).with_name("cpu.cpp")

# of the vectorised form: numbers in the state of the sequences that run together, and in a piece of the forward
TOGETHER, PIECE = 2**16, 2**19


def selective_scan(given: Inputs, offsets: Tensor, delta_softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward; shapes as in `reference`, the states before each chunk in the rows that `border_rows` tells."""
    bounds = check_offsets(offsets, given.u.shape[0])
    inputs = given.to(given.initial.dtype)
    u, initial = inputs.u, inputs.initial
    borders = initial.new_zeros(border_rows(u.shape[0], initial.shape[0]), *initial.shape[1:])
    y, final = torch.empty_like(u), torch.empty_like(initial)
    library = None if initial.dtype == torch.float64 else load(SOURCE)
    if library is None:
        _forward(inputs, delta_softplus, bounds, y, final, borders)
    else:
        arrays = (*_without_states(inputs), initial, offsets.contiguous(), y, final, borders)
        sizes = (*initial.shape[:2], *given.B.shape[1:], CHUNK)
        library.selective_scan(*map(pointer, arrays), *map(ctypes.c_int64, sizes), *_flags(delta_softplus))
    return y.to(given.u.dtype), final, borders


def selective_scan_backward(
    grad_y: Tensor, grad_final: Tensor, given: Inputs, borders: Tensor, offsets: Tensor, delta_softplus: bool
) -> list[Tensor | None]:
    """Gradients of what is given."""
    inputs = given.to(given.initial.dtype)
    grad_y, grad_final = (x.to(given.initial.dtype).contiguous() for x in (grad_y, grad_final))
    library = None if given.initial.dtype == torch.float64 else load(SOURCE)
    if library is None:
        grads = _backward(inputs, delta_softplus, grad_y, grad_final, borders, offsets.tolist())
    else:
        grads = _compiled_backward(library, inputs, delta_softplus, grad_y, grad_final, borders, offsets)
    found = zip(grads, given, strict=True)
    return [None if grad is None or x is None else grad.to(x.dtype).contiguous() for grad, x in found]


def task_width(states: int) -> int:
    """Channels of a task of the compiled backward: at 4 states, the least that a row of memory is read well with.

    Each task has its own copy of the gradients of B and C, ``tokens x states``: all copies of one of them take a
    quarter of u's memory or less. A multiple of 32, and so of the channels that the loops take at once; independent
    of the number of threads, because it says in which order the gradients are added up.
    """
    return max(64, -(-states // 8) * 32)


def _compiled_backward(
    library: ctypes.CDLL,
    inputs: Inputs,
    delta_softplus: bool,
    grad_y: Tensor,
    grad_final: Tensor,
    borders: Tensor,
    offsets: Tensor,
) -> tuple[Tensor | None, ...]:
    u, _, _, B, _, _, D, z, delta_bias = inputs
    (sequences, channels, states), tokens, groups = grad_final.shape, u.shape[0], B.shape[1]
    span = task_width(states)
    blocks = -(-(channels // groups) // span)
    of_u, of_delta = torch.empty_like(u), torch.empty_like(u)
    of_A, of_initial = torch.empty_like(grad_final), torch.empty_like(grad_final)
    of_B, of_C = (u.new_empty(groups, blocks, tokens, states) for _ in range(2))
    of_D, of_bias = (None if x is None else u.new_empty(sequences, channels) for x in (D, delta_bias))
    of_z = None if z is None else torch.empty_like(z)
    arrays = (*_without_states(inputs), offsets.contiguous(), borders)
    outputs = (of_u, of_delta, of_A, of_B, of_C, of_initial, of_D, of_z, of_bias)
    library.selective_scan_backward(
        *map(pointer, (grad_y, grad_final, *arrays, *outputs)),
        *map(ctypes.c_int64, (sequences, channels, groups, states, CHUNK, span, tokens)),
        *_flags(delta_softplus),
    )
    of_B, of_C = (blocks.sum(1).transpose(0, 1) for blocks in (of_B, of_C))
    of_D, of_bias = (None if x is None else x.sum(0) for x in (of_D, of_bias))
    return of_u, of_delta, of_A.sum(0), of_B, of_C, of_initial, of_D, of_z, of_bias


def _without_states(inputs: Inputs) -> tuple[Tensor | None, ...]:
    return *inputs[:5], *inputs[6:]


def _flags(delta_softplus: bool) -> tuple[ctypes.c_int, ctypes.c_int]:
    return ctypes.c_int(delta_softplus), ctypes.c_int(torch.get_num_threads())


class Batch(NamedTuple):
    """Neighbouring sequences of one length: their numbers, tokens and length, and the rows of their first borders."""

    sequences: slice
    tokens: slice
    time: int
    rows: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor of tokens as ``[batch, time, ...]``."""
        return tensor[self.tokens].view(self.sequences.stop - self.sequences.start, self.time, *tensor.shape[1:])


def _batches(bounds: list[int], most: int) -> Iterator[Batch]:
    """All sequences, at most this many together."""
    first = 0
    while first < len(bounds) - 1:
        last, time = first + 1, bounds[first + 1] - bounds[first]
        while last < len(bounds) - 1 and last - first < most and bounds[last + 1] - bounds[last] == time:
            last += 1
        rows = torch.tensor([bounds[i] // CHUNK + i for i in range(first, last)])
        yield Batch(slice(first, last), slice(bounds[first], bounds[last]), time, rows)
        first = last


class Piece(NamedTuple):
    """Consecutive steps of a batch: step sizes before and after the softplus, their products with u, B, C, and u.

    ``[batch, steps, channels]``, B and C ``[batch, steps, groups, state]``.
    """

    raw: Tensor
    delta: Tensor
    entering: Tensor
    B: Tensor
    C: Tensor
    u: Tensor


def _piece(inputs: Inputs, delta_softplus: bool, batch: Batch, steps: slice) -> Piece:
    u, raw, B, C = (batch.of(x)[:, steps] for x in (inputs.u, inputs.delta, inputs.B, inputs.C))
    if inputs.delta_bias is not None:
        raw = raw + inputs.delta_bias
    delta = torch.logaddexp(raw, torch.zeros_like(raw)) if delta_softplus else raw
    return Piece(raw, delta, delta * u, B, C, u)


def _spread(channels: Tensor, states: Tensor) -> Tensor:
    """``[..., channels]`` times ``[..., groups, state]``, as ``[..., state, channels]``."""
    grouped = channels.unflatten(-1, (states.shape[-2], -1))
    return (states.transpose(-1, -2)[..., None] * grouped[..., None, :, :]).flatten(-2)


def _over_states(h: Tensor, states: Tensor) -> Tensor:
    """``[..., state, channels]`` with ``[..., groups, state]``, summed over the states: ``[..., channels]``."""
    if states.shape[-2] == 1:
        return (states @ h).squeeze(-2)
    return torch.einsum("btngc,btgn->btgc", h.unflatten(-1, (states.shape[-2], -1)), states).flatten(-2)


def _over_channels(h: Tensor, channels: Tensor, groups: int) -> Tensor:
    """``[..., state, channels]`` with ``[..., channels]``, summed over a group's channels: ``[..., groups, state]``."""
    if groups == 1:
        return channels[..., None, :] @ h.mT  # ten times as fast as h @ channels
    return torch.einsum("btngc,btgc->btgn", h.unflatten(-1, (groups, -1)), channels.unflatten(-1, (groups, -1)))


def _states(piece: Piece, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of a piece, ``[batch, steps, state, channels]``, from the state before it."""
    decay = (piece.delta[..., None, :] * A).exp_()
    h = _spread(piece.entering, piece.B)
    for t in range(h.shape[1]):
        state = h[:, t].addcmul_(decay[:, t], state)
    return decay, h


def _forward(
    inputs: Inputs, delta_softplus: bool, bounds: list[int], y: Tensor, final: Tensor, borders: Tensor
) -> None:
    """Fills the last three."""
    A = inputs.A.T.contiguous()
    for batch in _batches(bounds, max(1, TOGETHER // A.numel())):
        state = inputs.initial[batch.sequences].mT.contiguous()
        steps = CHUNK
        while steps > 1 and steps * state.numel() > PIECE:
            steps //= 2
        for start in range(0, batch.time, steps):
            now = slice(start, start + steps)
            if start % CHUNK == 0:
                borders[batch.rows + start // CHUNK] = state.mT
            piece = _piece(inputs, delta_softplus, batch, now)
            _, h = _states(piece, A, state)
            out = _over_states(h, piece.C)
            if inputs.D is not None:
                out.addcmul_(inputs.D, piece.u)
            if inputs.z is not None:
                out *= torch.nn.functional.silu(batch.of(inputs.z)[:, now])
            batch.of(y)[:, now] = out
            state = h[:, -1]
        final[batch.sequences] = state.mT


def _backward(
    inputs: Inputs, delta_softplus: bool, grad_y: Tensor, grad_final: Tensor, borders: Tensor, bounds: list[int]
) -> tuple[Tensor | None, ...]:
    """Chunk by chunk, the last one first; the states of a chunk come from the one at its border."""
    A, D, z = inputs.A.T.contiguous(), inputs.D, inputs.z
    of_u, of_delta, of_B, of_C = (torch.empty_like(x) for x in (inputs.u, inputs.delta, inputs.B, inputs.C))
    of_A, of_initial = torch.zeros_like(A), torch.empty_like(grad_final)
    of_D, of_bias = (None if x is None else torch.zeros_like(x) for x in (D, inputs.delta_bias))
    of_z = None if z is None else torch.empty_like(z)
    for batch in _batches(bounds, max(1, TOGETHER // A.numel())):
        carry = grad_final[batch.sequences].mT.contiguous()
        for start in reversed(range(0, batch.time, CHUNK)):
            now = slice(start, start + CHUNK)
            piece = _piece(inputs, delta_softplus, batch, now)
            before = borders[batch.rows + start // CHUNK].mT
            decay, h = _states(piece, A, before)
            gy = batch.of(grad_y)[:, now]
            if z is not None and of_z is not None:
                gate = batch.of(z)[:, now]
                share = torch.sigmoid(gate)
                out = _over_states(h, piece.C)
                if D is not None:
                    out.addcmul_(D, piece.u)
                batch.of(of_z)[:, now] = gy * out * share * (1 + gate * (1 - share))
                gy = gy * gate * share
            g = _spread(gy, piece.C)  # becomes the gradient of h, step by step
            for t in reversed(range(g.shape[1])):
                carry = g[:, t].add_(carry) * decay[:, t]
            batch.of(of_B)[:, now] = _over_channels(g, piece.entering, piece.B.shape[2])
            batch.of(of_C)[:, now] = _over_channels(h, gy, piece.B.shape[2])
            entering = _over_states(g, piece.B)
            x = decay.mul_(g)  # becomes the gradient of delta A
            x[:, 1:] *= h[:, :-1]
            x[:, 0] *= before
            of_step = (x * A).sum(2).addcmul_(entering, piece.u)
            of_A += x.mul_(piece.delta[..., None, :]).sum((0, 1))
            batch.of(of_u)[:, now] = entering * piece.delta + (0 if D is None else D * gy)
            if delta_softplus:
                of_step *= torch.sigmoid(piece.raw)
            batch.of(of_delta)[:, now] = of_step
            if of_D is not None:
                of_D += (gy * piece.u).sum((0, 1))
            if of_bias is not None:
                of_bias += of_step.sum((0, 1))
        of_initial[batch.sequences] = carry.mT
    return of_u, of_delta, of_A.T, of_B, of_C, of_initial, of_D, of_z, of_bias
