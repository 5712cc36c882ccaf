"""Triton kernels of `linear_scan` and `log_linear_scan`, forward and backward.

A program takes one sequence and one block of channels, and walks along its time in tiles: an associative scan inside
a tile, the last row carried to the next. Every input is read once and every output written once.
"""

# Triton kernels are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlreviews_kernels.linear_scan.reference import Inputs
from mlreviews_kernels.static import Launch

# rows of time and channels of a tile: wide enough for whole cache lines, small enough to stay in registers
ROWS, COLUMNS, WARPS = 32, 32, 4


@triton.jit
def _compose(a, b, next_a, next_b):
    return next_a * a, next_a * b + next_b


@triton.jit
def _logaddexp(x, y):
    high = tl.maximum(x, y)
    # both -inf: the sum is empty, and the gap would be NaN
    gap = tl.where(high == float("-inf"), 0.0, tl.minimum(x, y)) - tl.where(high == float("-inf"), 0.0, high)
    return high + tl.log(1.0 + tl.exp(gap))


@triton.jit
def _log_compose(a, b, next_a, next_b):
    return next_a + a, _logaddexp(next_a + b, next_b)


@triton.jit
def _at(begin, end, position, channels, column, REVERSE: tl.constexpr):
    """Offsets of the elements at these positions, counted in the order in which the recurrence runs."""
    token = (end - 1 - position) if REVERSE else (begin + position)
    return token[:, None] * channels + column[None, :]


@triton.jit
def _last(tile, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    return tl.sum(tl.where(row == ROWS - 1, tile, 0.0), axis=0)


@triton.jit
def scan_kernel(
    a_in,
    b_in,
    initial,
    offsets,
    h_out,
    final,
    channels,
    LOG: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """h_t = a_t h_{t-1} + b_t, or the same in log space."""
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    inside = column < channels
    state = tl.load(initial + sequence * channels + column, mask=inside, other=0.0)
    for start in range(0, end - begin, ROWS):
        position = start + tl.arange(0, ROWS)
        at = _at(begin, end, position, channels, column, REVERSE)
        mask = (position < end - begin)[:, None] & inside[None, :]
        # steps past the end keep the state: the last row of the tile is what goes on
        if LOG:
            a = tl.load(a_in + at, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(b_in + at, mask=mask, other=float("-inf")).to(tl.float32)
            decay, h = tl.associative_scan((a, b), 0, _log_compose)
            h = _logaddexp(decay + state[None, :], h)
        else:
            a = tl.load(a_in + at, mask=mask, other=1.0).to(tl.float32)
            b = tl.load(b_in + at, mask=mask, other=0.0).to(tl.float32)
            decay, h = tl.associative_scan((a, b), 0, _compose)
            h = decay * state[None, :] + h
        tl.store(h_out + at, h.to(h_out.dtype.element_ty), mask=mask)
        state = _last(h, ROWS)
    tl.store(final + sequence * channels + column, state, mask=inside)


@triton.jit
def backward_kernel(
    grad_h,
    grad_final,
    a_in,
    b_in,
    h_in,
    initial,
    offsets,
    grad_a,
    grad_b,
    grad_initial,
    channels,
    LOG: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """g_t = grad_t + a_{t+1} g_{t+1}, backwards; in log space with the old state's share instead of a."""
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    inside = column < channels
    first = tl.load(initial + sequence * channels + column, mask=inside, other=0.0)[None, :]
    carry = tl.load(grad_final + sequence * channels + column, mask=inside, other=0.0)
    time = end - begin
    for start in range(0, time, ROWS):
        position = time - 1 - (start + tl.arange(0, ROWS))
        known = position >= 0
        at = _at(begin, end, position, channels, column, REVERSE)
        at_before = _at(begin, end, position - 1, channels, column, REVERSE)
        at_next = _at(begin, end, position + 1, channels, column, REVERSE)
        mask = known[:, None] & inside[None, :]
        has_before = (position >= 1)[:, None] & inside[None, :]
        has_next = (known & (position + 1 < time))[:, None] & inside[None, :]
        grad = tl.load(grad_h + at, mask=mask, other=0.0).to(tl.float32)
        next_a = tl.load(a_in + at_next, mask=has_next, other=0.0).to(tl.float32)
        before = tl.load(h_in + at_before, mask=has_before, other=0.0).to(tl.float32)
        before = tl.where((position == 0)[:, None], first, before)
        if LOG:
            h = tl.load(h_in + at, mask=mask, other=0.0).to(tl.float32)
            next_h = tl.load(h_in + at_next, mask=has_next, other=0.0).to(tl.float32)
            a = tl.load(a_in + at, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(b_in + at, mask=mask, other=0.0).to(tl.float32)
            empty, next_empty = h == float("-inf"), next_h == float("-inf")
            own = tl.where(empty, 0.0, tl.exp(b - tl.where(empty, 0.0, h)))
            old = tl.where(empty, 0.0, tl.exp(a + before - tl.where(empty, 0.0, h)))
            factor = tl.where(next_empty, 0.0, tl.exp(next_a + h - tl.where(next_empty, 0.0, next_h)))
        else:
            own, old, factor = 1.0, before, next_a
        # the last step's factor is 1: what comes from behind it is the final state's gradient
        factor = tl.where(has_next, factor, 1.0)
        product, g = tl.associative_scan((factor, grad), 0, _compose)
        g = product * carry[None, :] + g
        tl.store(grad_b + at, (own * g).to(grad_b.dtype.element_ty), mask=mask)
        tl.store(grad_a + at, (old * g).to(grad_a.dtype.element_ty), mask=mask)
        carry = _last(g, ROWS)
        if start + ROWS >= time:
            if LOG:  # noqa: SIM108 - a branch at compile time
                share = old
            else:
                share = tl.load(a_in + at, mask=mask & (position == 0)[:, None], other=0.0).to(tl.float32)
            carry = tl.sum(tl.where((position == 0)[:, None] & inside[None, :], share * g, 0.0), axis=0)
    tl.store(grad_initial + sequence * channels + column, carry, mask=inside)


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


def _grid(initial: Tensor) -> tuple[int, int]:
    sequences, channels = initial.shape
    return sequences, triton.cdiv(channels, COLUMNS)


def _forward(given: Inputs, offsets: Tensor, reverse: bool, *, log: bool) -> tuple[Tensor, Tensor]:
    a, b, initial = (x.contiguous() for x in given)
    h, final = torch.empty_like(b, dtype=initial.dtype if log else b.dtype), torch.empty_like(initial)
    scan_kernel[_grid(initial)](
        a, b, initial, offsets, h, final, initial.shape[1],
        LOG=log, REVERSE=reverse, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return h, final


def _backward(
    grad_h: Tensor, grad_final: Tensor, given: Inputs, h: Tensor, offsets: Tensor, reverse: bool, *, log: bool
) -> list[Tensor]:
    grad_h, grad_final, a, b, initial, h = (x.contiguous() for x in (grad_h, grad_final, *given, h))
    grads = [torch.empty_like(x) for x in (a, b, initial)]
    backward_kernel[_grid(initial)](
        grad_h, grad_final, a, b, h, initial, offsets, *grads, initial.shape[1],
        LOG=log, REVERSE=reverse, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return grads


def launches() -> list[Launch]:
    """Every configuration that can be chosen, for the static analysis."""
    kernels = {scan_kernel: ("initial", "final"), backward_kernel: ("grad_final", "initial", "grad_initial")}
    return [
        Launch(
            kernel,
            _constants(log),
            dtype,
            states=(*states, "h_in", "h_out") if log else states,
            warps=WARPS,
            label="log" if log else "",
        )
        for dtype in (torch.float32, torch.bfloat16)
        for log in (False, True)
        for kernel, states in kernels.items()
    ]


def _constants(log: bool) -> dict[str, Any]:
    return {"LOG": log, "REVERSE": False, "ROWS": ROWS, "COLUMNS": COLUMNS}
