"""Triton kernels of `linear_scan` and `log_linear_scan`, forward and backward.

A program takes a chunk of a sequence's time and one block of channels, and walks along it row by row with the states in
registers; the loads of some rows are under way before the first of them is needed. Where there are few sequences and
channels, time is cut into many chunks: `chunk_kernel` finds what each of them does to the state that enters it,
`pass_kernel` the states that enter them, `scan_kernel` the results; the backward is the same in the other direction.
Otherwise a sequence is one chunk, and `scan_kernel` or `backward_kernel` alone does it all.
"""

# Triton kernels are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlreviews_kernels.chunks_gpu import chunk_at, first_row, rows
from mlreviews_kernels.linear_scan.reference import Inputs
from mlreviews_kernels.static import Launch

COLUMNS, WARPS = 128, 1  # channels of a program: 4 in each thread
AHEAD = 16  # rows that are loaded before the first of them is needed
AHEAD_BACK = 8  # the same in the backward, which loads three or four numbers an element
PASS_COLUMNS = 32  # channels of a program that goes through the chunks
PASS_AHEAD = 16
PROGRAMS = 1024  # that keep a large GPU busy: so many chunks are made
ENOUGH = 256  # programs that have no need of chunks: those cost 5 numbers an element in place of 3
SHORTEST = 64  # steps of a chunk; two of them are not worth the launches


@triton.jit
def _logaddexp(x, y):
    high = tl.maximum(x, y)
    # both -inf: the sum is empty, and the gap would be NaN
    gap = tl.where(high == float("-inf"), 0.0, tl.minimum(x, y)) - tl.where(high == float("-inf"), 0.0, high)
    return high + tl.log(1.0 + tl.exp(gap))


@triton.jit
def _step(a, b, state, LOG: tl.constexpr):
    a, b = a.to(tl.float32), b.to(tl.float32)
    return _logaddexp(a + state, b) if LOG else a * state + b


@triton.jit
def _factor(a, before, h, LOG: tl.constexpr):
    """The derivative of a state by the one before it: in log space the old state's share in it, 0 in an empty one."""
    a = a.to(tl.float32)
    if LOG:
        empty = h == float("-inf")
        a = tl.where(empty, 0.0, tl.exp(a + before - tl.where(empty, 0.0, h)))
    return a


@triton.jit
def _mask(column, channels, holds):
    """The channels that there are, and none unless something holds."""
    return column < tl.where(holds, channels, 0)


@triton.jit
def _rows(at, stride, known, column, channels, other, ROWS: tl.constexpr):
    """The rows at these pointers and behind them, all loads under way at once; ``other`` for those not known."""
    found = ()
    for i in tl.static_range(ROWS):
        row = tl.load(at + column + i * stride, mask=_mask(column, channels, i < known), other=other)
        found += (row,)  # type: ignore[assignment]
    return found


@triton.jit
def _place(offsets, sequences, channels, size, REVERSE: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's row and channels, and of its chunk the sequence, the positions where it starts and stops, the length.

    Positions count in the order in which the recurrence runs. Then the offset of position 0, and from one to the next.
    """
    blocks = tl.cdiv(channels, COLUMNS)
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    sequence, begin, end, start = chunk_at(row, tl.num_programs(0) // blocks, offsets, sequences, size)
    time = end - begin
    stop = tl.minimum(start + size, time)
    stride = tl.full((), channels, tl.int64)
    if REVERSE:
        origin, stride = (end - 1) * stride, -stride
    else:
        origin = begin * stride
    return row.to(tl.int64), column, sequence, start, stop, time, origin, stride


@triton.jit
def chunk_kernel(
    a_in, b_in, offsets, products, ends, channels, sequences, size,
    LOG: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The product of a chunk's factors, and its last state if it began with none."""
    row, column, _, start, stop, _, origin, stride = _place(offsets, sequences, channels, size, REVERSE, COLUMNS)
    product = tl.full((COLUMNS,), 0.0 if LOG else 1.0, tl.float32)
    state = tl.full((COLUMNS,), float("-inf") if LOG else 0.0, tl.float32)
    for first in range(start, stop, ROWS):
        at = origin + first * stride
        a = _rows(a_in + at, stride, stop - first, column, channels, 0.0 if LOG else 1.0, ROWS)
        b = _rows(b_in + at, stride, stop - first, column, channels, float("-inf") if LOG else 0.0, ROWS)
        for i in tl.static_range(ROWS):
            state = _step(a[i], b[i], state, LOG)
            product = product + a[i].to(tl.float32) if LOG else product * a[i].to(tl.float32)
    tl.store(products + row * channels + column, product, mask=column < channels)
    tl.store(ends + row * channels + column, state, mask=column < channels)


@triton.jit
def pass_kernel(
    products, ends, initial, offsets, channels, size,
    LOG: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk, in place of the chunk's own end; BACK: from the last chunk on."""
    blocks = tl.cdiv(channels, COLUMNS)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    # an empty sequence has one empty chunk
    count = tl.maximum((end - begin + size - 1) // size, 1)
    row, stride = first_row(sequence, begin, size), tl.full((), channels, tl.int64)
    if BACK:
        row, stride = row + count - 1, -stride
    state = tl.load(initial + sequence * channels + column, mask=column < channels, other=0.0)
    for first in range(0, count, ROWS):
        at = row * channels + first * stride
        a = _rows(products + at, stride, count - first, column, channels, 0.0, ROWS)
        b = _rows(ends + at, stride, count - first, column, channels, 0.0, ROWS)
        for i in tl.static_range(ROWS):
            tl.store(ends + at + i * stride + column, state, mask=_mask(column, channels, i < count - first))
            state = _step(a[i], b[i], state, LOG)


@triton.jit
def scan_kernel(
    a_in, b_in, states, offsets, h_out, final, channels, sequences, size,
    LOG: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h_t = a_t h_{t-1} + b_t, or the same in log space, from the state that enters the chunk."""
    row, column, sequence, start, stop, time, origin, stride = _place(
        offsets, sequences, channels, size, REVERSE, COLUMNS
    )
    state = tl.load(states + row * channels + column, mask=column < channels, other=0.0)
    for first in range(start, stop, ROWS):
        known = stop - first
        at = origin + first * stride
        # steps past the end keep the state
        a = _rows(a_in + at, stride, known, column, channels, 0.0 if LOG else 1.0, ROWS)
        b = _rows(b_in + at, stride, known, column, channels, float("-inf") if LOG else 0.0, ROWS)
        for i in tl.static_range(ROWS):
            state = _step(a[i], b[i], state, LOG)
            mask = _mask(column, channels, i < known)
            tl.store(h_out + at + i * stride + column, state.to(h_out.dtype.element_ty), mask=mask)
    last = (stop == time) & ((start < time) | (start == 0))
    tl.store(final + sequence * channels + column, state, mask=_mask(column, channels, last))


@triton.jit
def _before(h_in, initial, sequence, start, stop, origin, stride, channels, column):
    """The state before a chunk, and its last one."""
    first = tl.load(initial + sequence * channels + column, mask=column < channels, other=0.0)
    at, some = h_in + origin + column, start < stop
    entering = tl.load(at + (start - 1) * stride, mask=_mask(column, channels, some & (start > 0)), other=0.0)
    last = tl.load(at + (stop - 1) * stride, mask=_mask(column, channels, some), other=0.0)
    return tl.where(start == 0, first, entering.to(tl.float32)), last.to(tl.float32)


@triton.jit
def backward_chunk_kernel(
    grad_h, a_in, h_in, initial, offsets, products, ends, channels, sequences, size,
    LOG: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What a chunk makes of the gradient that comes from behind: a product of factors, and what it adds."""
    row, column, sequence, start, stop, _, origin, stride = _place(offsets, sequences, channels, size, REVERSE, COLUMNS)
    product = tl.full((COLUMNS,), 1.0, tl.float32)
    carry = tl.full((COLUMNS,), 0.0, tl.float32)
    entering, h = product, product
    if LOG:
        entering, h = _before(h_in, initial, sequence, start, stop, origin, stride, channels, column)
    for first in range(0, stop - start, ROWS):
        known = stop - start - first
        at = origin + (stop - 1 - first) * stride
        a = _rows(a_in + at, -stride, known, column, channels, 1.0, ROWS)
        grad = _rows(grad_h + at, -stride, known, column, channels, 0.0, ROWS)
        if LOG:
            earlier = _rows(h_in + at - stride, -stride, known - 1, column, channels, 0.0, ROWS)
        for i in tl.static_range(ROWS):
            before = h
            if LOG:
                before = tl.where(i == known - 1, entering, earlier[i].to(tl.float32))
            factor = _factor(a[i], before, h, LOG)
            if LOG:
                factor = tl.where(i < known, factor, 1.0)
            carry = factor * (grad[i].to(tl.float32) + carry)
            product *= factor
            h = before
    tl.store(products + row * channels + column, product, mask=column < channels)
    tl.store(ends + row * channels + column, carry, mask=column < channels)


@triton.jit
def backward_kernel(
    grad_h, carries, a_in, b_in, h_in, initial, offsets, grad_a, grad_b, grad_initial, channels, sequences, size,
    LOG: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g_t = grad_t + a_{t+1} g_{t+1}, backwards; in log space with the old state's share instead of a.

    What is carried is a_t g_t: the gradient of the state before, so far as it comes from this step and those behind.
    """
    row, column, sequence, start, stop, _, origin, stride = _place(offsets, sequences, channels, size, REVERSE, COLUMNS)
    carry = tl.load(carries + row * channels + column, mask=column < channels, other=0.0)
    entering, h = _before(h_in, initial, sequence, start, stop, origin, stride, channels, column)
    for first in range(0, stop - start, ROWS):
        known = stop - start - first
        at = origin + (stop - 1 - first) * stride
        a = _rows(a_in + at, -stride, known, column, channels, 1.0, ROWS)
        grad = _rows(grad_h + at, -stride, known, column, channels, 0.0, ROWS)
        earlier = _rows(h_in + at - stride, -stride, known - 1, column, channels, 0.0, ROWS)
        if LOG:
            b = _rows(b_in + at, -stride, known, column, channels, 0.0, ROWS)
        for i in tl.static_range(ROWS):
            mask = _mask(column, channels, i < known)
            before = tl.where(i == known - 1, entering, earlier[i].to(tl.float32))
            factor = _factor(a[i], before, h, LOG)
            g = grad[i].to(tl.float32) + carry
            if LOG:
                of_a, of_b = factor * g, _factor(b[i], 0.0, h, LOG) * g
                carry = tl.where(i < known, of_a, carry)
            else:
                of_a, of_b = before * g, g
                carry = factor * g
            tl.store(grad_b + at - i * stride + column, of_b.to(grad_b.dtype.element_ty), mask=mask)
            tl.store(grad_a + at - i * stride + column, of_a.to(grad_a.dtype.element_ty), mask=mask)
            h = before
    # an unused row starts behind the end of its sequence, and not at 0
    tl.store(grad_initial + sequence * channels + column, carry, mask=_mask(column, channels, start == 0))


def linear_scan(given: Inputs, offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    return _forward(given, offsets, reverse, log=False)


def log_linear_scan(given: Inputs, offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The op's forward in log space."""
    return _forward(given, offsets, reverse, log=True)


def linear_scan_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of what is given; arguments as in `cpu`."""
    return _backward(*arguments, log=False)


def log_linear_scan_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of what is given; arguments as in `cpu`."""
    return _backward(*arguments, log=True)


def _chunk_size(tokens: int, sequences: int, channels: int) -> int:
    """Steps of a chunk, a multiple of 16 (so one compiled kernel does for all); more than there are tokens for one."""
    blocks = triton.cdiv(channels, COLUMNS)
    if sequences * blocks >= ENOUGH or tokens <= 2 * SHORTEST:
        return (tokens // 16 + 1) * 16
    return max(SHORTEST, triton.cdiv(tokens * blocks, PROGRAMS * 16) * 16)


def _entering(
    kernel: Any, tensors: tuple[Tensor, ...], edge: Tensor, offsets: Tensor, size: int, flags: dict[str, bool]
) -> Tensor:
    """What enters each chunk: ``edge`` the first one of a sequence, or in the backward the last."""
    (sequences, channels), tokens = edge.shape, tensors[0].shape[0]
    if size > tokens:
        return edge
    back = kernel is backward_chunk_kernel
    products, ends = edge.new_empty(2, rows(tokens, sequences, size), channels)
    kernel[_grid(len(ends), channels, COLUMNS)](
        *tensors, offsets, products, ends, channels, sequences, size,
        **flags, ROWS=AHEAD_BACK if back else AHEAD, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    pass_kernel[_grid(sequences, channels, PASS_COLUMNS)](
        products, ends, edge, offsets, channels, size,
        LOG=flags["LOG"] and not back, BACK=back, ROWS=PASS_AHEAD, COLUMNS=PASS_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return ends


def _grid(programs: int, channels: int, columns: int) -> tuple[int]:
    return (programs * triton.cdiv(channels, columns),)


def _forward(given: Inputs, offsets: Tensor, reverse: bool, *, log: bool) -> tuple[Tensor, Tensor]:
    a, b, initial = (x.contiguous() for x in given)
    (sequences, channels), tokens = initial.shape, a.shape[0]
    h, final = torch.empty_like(b, dtype=initial.dtype if log else b.dtype), torch.empty_like(initial)
    size, flags = _chunk_size(tokens, sequences, channels), {"LOG": log, "REVERSE": reverse}
    states = _entering(chunk_kernel, (a, b), initial, offsets, size, flags)
    scan_kernel[_grid(len(states), channels, COLUMNS)](
        a, b, states, offsets, h, final, channels, sequences, size,
        **flags, ROWS=AHEAD, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return h, final


def _backward(
    grad_h: Tensor, grad_final: Tensor, given: Inputs, h: Tensor, offsets: Tensor, reverse: bool, *, log: bool
) -> list[Tensor]:
    grad_h, grad_final, a, b, initial, h = (x.contiguous() for x in (grad_h, grad_final, *given, h))
    (sequences, channels), tokens = initial.shape, a.shape[0]
    grads = [torch.empty_like(x) for x in (a, b, initial)]
    size, flags = _chunk_size(tokens, sequences, channels), {"LOG": log, "REVERSE": reverse}
    carries = _entering(backward_chunk_kernel, (grad_h, a, h, initial), grad_final, offsets, size, flags)
    backward_kernel[_grid(len(carries), channels, COLUMNS)](
        grad_h, carries, a, b, h, initial, offsets, *grads, channels, sequences, size,
        **flags, ROWS=AHEAD_BACK, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return grads


def launches() -> list[Launch]:
    """Every configuration that can be chosen, for the static analysis."""
    found = []
    states = ("initial", "final", "states", "products", "ends", "carries", "grad_initial")
    rows_of = {
        chunk_kernel: AHEAD,
        scan_kernel: AHEAD,
        backward_chunk_kernel: AHEAD_BACK,
        backward_kernel: AHEAD_BACK,
        pass_kernel: PASS_AHEAD,
    }
    for dtype in (torch.float32, torch.bfloat16):
        for log in (False, True):
            for kernel, ahead in rows_of.items():
                constants: dict[str, Any] = {"LOG": log, "REVERSE": False, "ROWS": ahead, "COLUMNS": COLUMNS}
                if kernel is pass_kernel:
                    constants = {"LOG": log, "BACK": False, "ROWS": ahead, "COLUMNS": PASS_COLUMNS}
                found.append(
                    Launch(
                        kernel,
                        constants,
                        dtype,
                        states=(*states, "h_in", "h_out") if log else states,
                        scalars=("channels", "sequences", "size"),
                        warps=WARPS,
                        label="log" if log else "",
                    )
                )
    return found
