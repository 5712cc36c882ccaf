"""Triton kernels of `selective_scan`, forward and backward, parallel over sequences, channels and chunks of time.

A program takes a chunk and a block of channels, and runs through its steps one after another with the states
``[channels, state]`` in registers. So it is done twice in each direction: from an empty state, which tells what the
chunk adds to the state behind it; and from the real one, after a small kernel that goes from chunk to chunk.
"""

# Triton kernels are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlreviews_kernels.backends import is_hopper
from mlreviews_kernels.selective_scan.reference import CHUNK, Inputs, border_rows
from mlreviews_kernels.static import Launch, chips

# of a program: steps whose inputs are loaded at once, of which each chunk has a whole number, channels and warps
ROWS, COLUMNS, WARPS = 8, 32, 1
# the same in the last kernel of the backward, where each block of channels has its own copy of the gradients of B and C
GRAD_ROWS, GRAD_COLUMNS, GRAD_WARPS = 4, 32, 4
WIDTH = 128  # numbers of a state that a program carries from chunk to chunk
WIDEST = 16  # states of a kernel; more would not fit the registers, and are taken in slices
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + e) with e = exp(-|x|), without cancellation: 2 artanh(s) with s = e / (2 + e)."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    p = 0.11612164
    p = p * q + 0.10853288
    p = p * q + 0.14296179
    p = p * q + 0.19999853
    p = p * q + 0.33333334
    return tl.maximum(x, 0.0) + 2.0 * s + 2.0 * s * q * p


@triton.jit
def _slope(softplus):
    """The derivative of the softplus, 1 - exp(-softplus), without cancellation."""
    half, third, quarter, fifth = softplus * 0.5, softplus * 0.33333334, softplus * 0.25, softplus * 0.2
    series = softplus * (1.0 - half * (1.0 - third * (1.0 - quarter * (1.0 - fifth))))
    return tl.where(softplus < 0.125, series, 1.0 - tl.exp(-softplus))


@triton.jit
def _chunk_in(row, offsets, sequences, CHUNK: tl.constexpr):
    """The first token and the length of the chunk that has this row, as `border_rows` lays them out; 0 for no chunk."""
    low, high = row * 0, row * 0 + sequences - 1
    while low < high:  # the first rows of the sequences rise
        middle = (low + high + 1) // 2
        behind = tl.load(offsets + middle) // CHUNK + middle > row
        low, high = tl.where(behind, low, middle), tl.where(behind, middle - 1, high)
    begin, end = tl.load(offsets + low), tl.load(offsets + low + 1)
    start = begin + (row - begin // CHUNK - low) * CHUNK
    return start, tl.maximum(0, tl.minimum(CHUNK, end - start)).to(tl.int32)


@triton.jit
def _channels_of(block, channels, groups, states, blocks, COLUMNS: tl.constexpr, STATES: tl.constexpr):
    """Group, channels and places in a state ``[channels, state]`` of this block; masks of the last two."""
    group = block // blocks
    within = block % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = within < channels // groups
    channel = group * (channels // groups) + within
    n = tl.arange(0, STATES)
    return group, channel, inside, channel[:, None] * states + n[None, :], inside[:, None] & (n < states)[None, :]


@triton.jit
def _load_channels(pointer, channel, inside):
    """``[channels]``, zeros where the argument is None."""
    found = tl.zeros(channel.shape, tl.float32)
    if pointer is not None:
        found = tl.load(pointer + channel, mask=inside, other=0.0)
    return found


@triton.jit
def _load_steps(pointer, first, length, channel, inside, channels, ROWS: tl.constexpr):
    """A tuple of ``[channels]``, one for each of so many steps of a chunk from the first on; zeros past the end."""
    rows = ()
    for t in tl.static_range(ROWS):
        known = tl.full(inside.shape, first + t, tl.int32) < length  # the interpreter can't broadcast truth values
        found = tl.load(pointer + (first + t) * channels + channel, mask=inside & known, other=0.0)
        rows += (found.to(tl.float32),)
    return rows


@triton.jit
def _load_matrices(pointer, first, length, group, groups, states, ROWS: tl.constexpr, STATES: tl.constexpr):
    """The B or C of so many steps, a tuple of ``[1, state]``; zeros past the end."""
    n = tl.arange(0, STATES)
    rows = ()
    for t in tl.static_range(ROWS):
        known = (n < states) & (tl.full(n.shape, first + t, tl.int32) < length)
        found = tl.load(pointer + ((first + t) * groups + group) * states + n, mask=known, other=0.0)
        rows += (found.to(tl.float32)[None, :],)
    return rows


@triton.jit
def _step_sizes(raw, first, length, bias, SOFTPLUS: tl.constexpr, ROWS: tl.constexpr):
    """The step sizes after bias and softplus; 0 past the end, where a decay is 1."""
    rows = ()
    for t in tl.static_range(ROWS):
        delta = raw[t] + bias
        if SOFTPLUS:
            delta = _softplus(delta)
        rows += (tl.where(first + t < length, delta, 0.0),)
    return rows


@triton.jit
def _gated(grads, gates, ROWS: tl.constexpr):
    """The gradients of what the gates multiply."""
    rows = ()
    for t in tl.static_range(ROWS):
        rows += (grads[t] * gates[t] * _sigmoid(gates[t]),)
    return rows


@triton.jit
def end_kernel(
    u_in,
    delta_in,
    A_in,
    B_in,
    bias_in,
    offsets,
    ends,
    spans,
    sequences,
    channels,
    groups,
    states,
    blocks,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATES: tl.constexpr,
):
    """The state at the end of each chunk if it were empty before, and the sum of its step sizes."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = _chunk_in(row, offsets, sequences, CHUNK)
    size = channels * states
    u_in += start * channels
    delta_in += start * channels
    B_in += start * groups * states
    group, channel, inside, at_state, in_state = _channels_of(block, channels, groups, states, blocks, COLUMNS, STATES)
    rate = tl.load(A_in + at_state, mask=in_state, other=0.0) * LOG2E
    bias = _load_channels(bias_in, channel, inside)
    state = tl.zeros([COLUMNS, STATES], tl.float32)
    span = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, length, ROWS):
        raw = _load_steps(delta_in, first, length, channel, inside, channels, ROWS)
        u = _load_steps(u_in, first, length, channel, inside, channels, ROWS)
        delta = _step_sizes(raw, first, length, bias, SOFTPLUS, ROWS)
        B = _load_matrices(B_in, first, length, group, groups, states, ROWS, STATES)
        for t in tl.static_range(ROWS):
            state = tl.exp2(delta[t][:, None] * rate) * state + (delta[t] * u[t])[:, None] * B[t]
            span += delta[t]
    tl.store(ends + row * size + at_state, state, mask=in_state)
    tl.store(spans + row * channels + channel, span, mask=inside)


@triton.jit
def carry_kernel(
    A_in,
    initial,
    ends,
    spans,
    offsets,
    borders,
    final,
    channels,
    states,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The states before each chunk, and behind the last one; of gradients those behind each, and before the first."""
    sequence = tl.program_id(0).to(tl.int64)
    size = channels.to(tl.int64) * states
    at = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < size
    rate = tl.load(A_in + at, mask=inside, other=0.0) * LOG2E
    state = tl.load(initial + sequence * size + at, mask=inside, other=0.0)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    row = begin // CHUNK + sequence
    chunks = ((end - begin + CHUNK - 1) // CHUNK).to(tl.int32)
    for first in range(0, chunks, ROWS):
        added, decays = (), ()
        for k in tl.static_range(ROWS):
            chunk = (chunks - 1 - first - k) if REVERSE else (first + k)
            mask = inside & (tl.full(inside.shape, first + k, tl.int32) < chunks)
            added += (tl.load(ends + (row + chunk) * size + at, mask=mask, other=0.0),)
            span = tl.load(spans + (row + chunk) * channels + at // states, mask=mask, other=0.0)
            decays += (tl.exp2(span * rate),)
        for k in tl.static_range(ROWS):
            chunk = (chunks - 1 - first - k) if REVERSE else (first + k)
            mask = inside & (tl.full(inside.shape, first + k, tl.int32) < chunks)
            tl.store(borders + (row + chunk) * size + at, state, mask=mask)
            state = decays[k] * state + added[k]
    tl.store(final + sequence * size + at, state, mask=inside)


@triton.jit
def output_kernel(
    u_in,
    delta_in,
    A_in,
    B_in,
    C_in,
    D_in,
    z_in,
    bias_in,
    offsets,
    borders,
    y_out,
    sequences,
    channels,
    groups,
    states,
    blocks,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATES: tl.constexpr,
):
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = C_t . h_t, from the state before the chunk."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = _chunk_in(row, offsets, sequences, CHUNK)
    size = channels * states
    u_in += start * channels
    delta_in += start * channels
    y_out += start * channels
    B_in += start * groups * states
    C_in += start * groups * states
    if z_in is not None:
        z_in += start * channels
    group, channel, inside, at_state, in_state = _channels_of(block, channels, groups, states, blocks, COLUMNS, STATES)
    rate = tl.load(A_in + at_state, mask=in_state, other=0.0) * LOG2E
    bias, skip = _load_channels(bias_in, channel, inside), _load_channels(D_in, channel, inside)
    state = tl.load(borders + row * size + at_state, mask=in_state, other=0.0)
    for first in range(0, length, ROWS):
        raw = _load_steps(delta_in, first, length, channel, inside, channels, ROWS)
        u = _load_steps(u_in, first, length, channel, inside, channels, ROWS)
        if z_in is not None:
            z = _load_steps(z_in, first, length, channel, inside, channels, ROWS)
        delta = _step_sizes(raw, first, length, bias, SOFTPLUS, ROWS)
        B = _load_matrices(B_in, first, length, group, groups, states, ROWS, STATES)
        C = _load_matrices(C_in, first, length, group, groups, states, ROWS, STATES)
        outputs = ()
        for t in tl.static_range(ROWS):
            state = tl.exp2(delta[t][:, None] * rate) * state + (delta[t] * u[t])[:, None] * B[t]
            outputs += (tl.sum(state * C[t], axis=1) + skip * u[t],)
        if z_in is not None:
            outputs = _gated(outputs, z, ROWS)
        for t in tl.static_range(ROWS):
            at = (first + t) * channels + channel
            mask = inside & (tl.full(inside.shape, first + t, tl.int32) < length)
            tl.store(y_out + at, outputs[t].to(y_out.dtype.element_ty), mask=mask)


@triton.jit
def flow_kernel(
    grad_y,
    delta_in,
    A_in,
    C_in,
    z_in,
    bias_in,
    offsets,
    ends,
    spans,
    sequences,
    channels,
    groups,
    states,
    blocks,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATES: tl.constexpr,
):
    """The gradient of the state before each chunk through this chunk's outputs only, and the sum of its step sizes."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = _chunk_in(row, offsets, sequences, CHUNK)
    size = channels * states
    grad_y += start * channels
    delta_in += start * channels
    C_in += start * groups * states
    if z_in is not None:
        z_in += start * channels
    group, channel, inside, at_state, in_state = _channels_of(block, channels, groups, states, blocks, COLUMNS, STATES)
    rate = tl.load(A_in + at_state, mask=in_state, other=0.0) * LOG2E
    bias = _load_channels(bias_in, channel, inside)
    grad = tl.zeros([COLUMNS, STATES], tl.float32)
    span = tl.zeros([COLUMNS], tl.float32)
    tiles = (length + ROWS - 1) // ROWS
    for k in range(0, tiles):
        first = (tiles - 1 - k) * ROWS
        raw = _load_steps(delta_in, first, length, channel, inside, channels, ROWS)
        gy = _load_steps(grad_y, first, length, channel, inside, channels, ROWS)
        if z_in is not None:
            gy = _gated(gy, _load_steps(z_in, first, length, channel, inside, channels, ROWS), ROWS)
        delta = _step_sizes(raw, first, length, bias, SOFTPLUS, ROWS)
        C = _load_matrices(C_in, first, length, group, groups, states, ROWS, STATES)
        for back in tl.static_range(ROWS):
            grad = tl.exp2(delta[ROWS - 1 - back][:, None] * rate) * (
                grad + gy[ROWS - 1 - back][:, None] * C[ROWS - 1 - back]
            )
            span += delta[ROWS - 1 - back]
    tl.store(ends + row * size + at_state, grad, mask=in_state)
    tl.store(spans + row * channels + channel, span, mask=inside)


@triton.jit
def grad_kernel(
    grad_y,
    u_in,
    delta_in,
    A_in,
    B_in,
    C_in,
    D_in,
    z_in,
    bias_in,
    offsets,
    borders,
    flows,
    of_u,
    of_delta,
    of_A,
    of_B,
    of_C,
    of_D,
    of_z,
    of_bias,
    sequences,
    channels,
    groups,
    states,
    blocks,
    tokens,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATES: tl.constexpr,
):
    """g_t = C_t gy_t + exp(delta_{t+1} A) g_{t+1} and all gradients of a chunk, from the state before and g behind it.

    It runs through the chunk once for the states before its tiles of so many rows, then through the tiles from the
    last one on: forwards for the state before each step, and backwards. Sums over time and over channels are those of
    this chunk, and of this block of channels.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = _chunk_in(row, offsets, sequences, CHUNK)
    size = channels * states
    grad_y += start * channels
    u_in += start * channels
    delta_in += start * channels
    of_u += start * channels
    of_delta += start * channels
    B_in += start * groups * states
    C_in += start * groups * states
    of_B += (block.to(tl.int64) * tokens + start) * states
    of_C += (block.to(tl.int64) * tokens + start) * states
    if z_in is not None:
        z_in += start * channels
        of_z += start * channels
    group, channel, inside, at_state, in_state = _channels_of(block, channels, groups, states, blocks, COLUMNS, STATES)
    n = tl.arange(0, STATES)
    rate = tl.load(A_in + at_state, mask=in_state, other=0.0) * LOG2E
    bias, skip = _load_channels(bias_in, channel, inside), _load_channels(D_in, channel, inside)
    state = tl.load(borders + row * size + at_state, mask=in_state, other=0.0)
    flow = tl.load(flows + row * size + at_state, mask=in_state, other=0.0)
    tiles = (length + ROWS - 1) // ROWS
    number = tl.arange(0, CHUNK // ROWS)[:, None, None]
    kept = tl.zeros([CHUNK // ROWS, COLUMNS, STATES], tl.float32) + state[None, :, :]
    for tile in range(1, tiles):
        first = (tile - 1) * ROWS
        raw = _load_steps(delta_in, first, length, channel, inside, channels, ROWS)
        u = _load_steps(u_in, first, length, channel, inside, channels, ROWS)
        delta = _step_sizes(raw, first, length, bias, SOFTPLUS, ROWS)
        B = _load_matrices(B_in, first, length, group, groups, states, ROWS, STATES)
        for t in tl.static_range(ROWS):
            state = tl.exp2(delta[t][:, None] * rate) * state + (delta[t] * u[t])[:, None] * B[t]
        kept = tl.where(number == tile, state[None, :, :], kept)
    sum_A = tl.zeros([COLUMNS, STATES], tl.float32)
    sum_D = tl.zeros([COLUMNS], tl.float32)
    sum_bias = tl.zeros([COLUMNS], tl.float32)
    for k in range(0, tiles):
        first = (tiles - 1 - k) * ROWS
        raw = _load_steps(delta_in, first, length, channel, inside, channels, ROWS)
        u = _load_steps(u_in, first, length, channel, inside, channels, ROWS)
        gy = _load_steps(grad_y, first, length, channel, inside, channels, ROWS)
        delta = _step_sizes(raw, first, length, bias, SOFTPLUS, ROWS)
        state = tl.sum(tl.where(number == tiles - 1 - k, kept, 0.0), axis=0)
        B = _load_matrices(B_in, first, length, group, groups, states, ROWS, STATES)
        before = ()
        for t in tl.static_range(ROWS):
            before += (state,)
            state = tl.exp2(delta[t][:, None] * rate) * state + (delta[t] * u[t])[:, None] * B[t]
        tl.debug_barrier()  # B is loaded again, out of the cache: there are no registers to keep it in
        B = _load_matrices(B_in, first, length, group, groups, states, ROWS, STATES)
        C = _load_matrices(C_in, first, length, group, groups, states, ROWS, STATES)
        if z_in is not None:
            z = _load_steps(z_in, first, length, channel, inside, channels, ROWS)
        # what is stored of the steps waits in columns and rows of tiles, for one exchange between threads
        columns = tl.zeros([COLUMNS, STATES], tl.float32)  # of u, then of delta, then of z
        rows_B = tl.zeros([COLUMNS // ROWS, ROWS, STATES], tl.float32)
        rows_C = tl.zeros([COLUMNS // ROWS, ROWS, STATES], tl.float32)
        for back in tl.static_range(ROWS):
            one, grad_out, step = u[ROWS - 1 - back], gy[ROWS - 1 - back], delta[ROWS - 1 - back]
            B_now, C_now = B[ROWS - 1 - back], C[ROWS - 1 - back]
            decay = tl.exp2(step[:, None] * rate)
            old = decay * before[ROWS - 1 - back]
            h = old + (step * one)[:, None] * B_now
            column = n[None, :] - (ROWS - 1 - back)
            if z_in is not None:
                gate = z[ROWS - 1 - back]
                share = _sigmoid(gate)
                y = tl.sum(h * C_now, axis=1) + skip * one
                of_gate = grad_out * y * share * (1.0 + gate * (1.0 - share))
                columns = tl.where(column == 2 * ROWS, of_gate[:, None], columns)
                grad_out *= gate * share
            g = flow + grad_out[:, None] * C_now
            x = g * old  # the gradient of delta A
            entering = tl.sum(g * B_now, axis=1)
            of_step = tl.sum(x * rate, axis=1) * LN2 + entering * one
            if SOFTPLUS:
                of_step *= _slope(step)
            of_step = tl.where(first + ROWS - 1 - back < length, of_step, 0.0)
            columns = tl.where(column == ROWS, of_step[:, None], columns)
            columns = tl.where(column == 0, (entering * step + skip * grad_out)[:, None], columns)
            # sums over so many neighbouring channels as there are rows
            own = tl.arange(0, ROWS)[None, :, None] == ROWS - 1 - back
            few_B = tl.reshape(g * (step * one)[:, None], [COLUMNS // ROWS, ROWS, STATES])
            few_C = tl.reshape(h * grad_out[:, None], [COLUMNS // ROWS, ROWS, STATES])
            rows_B = tl.where(own, tl.sum(few_B, axis=1)[:, None, :], rows_B)
            rows_C = tl.where(own, tl.sum(few_C, axis=1)[:, None, :], rows_C)
            sum_A += x * step[:, None]
            sum_D += grad_out * one
            sum_bias += of_step
            flow = g * decay
        step = n % ROWS + first
        at = step[None, :] * channels + channel[:, None]
        mask = inside[:, None] & (step < length)[None, :]
        part = n[None, :] // ROWS
        tl.store(of_u + at, columns.to(of_u.dtype.element_ty), mask=mask & (part == 0))
        tl.store(of_delta + at, columns.to(of_delta.dtype.element_ty), mask=mask & (part == 1))
        if z_in is not None:
            tl.store(of_z + at, columns.to(of_z.dtype.element_ty), mask=mask & (part == 2))
        step = first + tl.arange(0, ROWS)
        at = step[:, None] * states + n[None, :]
        mask = (step < length)[:, None] & (n < states)[None, :]
        tl.store(of_B + at, tl.sum(rows_B, axis=0), mask=mask)
        tl.store(of_C + at, tl.sum(rows_C, axis=0), mask=mask)
    tl.store(of_A + row * size + at_state, sum_A, mask=in_state)
    if D_in is not None:
        tl.store(of_D + row * channels + channel, sum_D, mask=inside)
    if bias_in is not None:
        tl.store(of_bias + row * channels + channel, sum_bias, mask=inside)


def selective_scan(given: Inputs, offsets: Tensor, delta_softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward; shapes as in `reference`, the states before each chunk in the rows that `border_rows` tells."""
    if given.A.shape[1] <= WIDEST:
        return _scan(given, offsets, delta_softplus)
    ys, finals, borders = zip(*(_scan(part, offsets, delta_softplus) for part in _slices(given)), strict=True)
    y = sum(ys) if given.D is None else sum(ys) + given.D * given.u.float()
    y = y if given.z is None else y * torch.nn.functional.silu(given.z.float())
    return y.to(given.u.dtype).contiguous(), torch.cat(finals, -1), torch.cat(borders, -1)


def selective_scan_backward(
    grad_y: Tensor, grad_final: Tensor, given: Inputs, borders: Tensor, offsets: Tensor, delta_softplus: bool
) -> list[Tensor | None]:
    """Gradients of what is given."""
    if given.A.shape[1] <= WIDEST:
        return _scan_backward(grad_y, grad_final, given, borders, offsets, delta_softplus)
    grad_out, of_z = grad_y.float(), None
    if given.z is not None:
        wide = given._replace(u=given.u.float(), delta=given.delta.float(), z=None)
        ungated, _, _ = selective_scan(wide, offsets, delta_softplus)
        z = given.z.float()
        gate = z.sigmoid()
        of_z = grad_out * ungated * gate * (1 + z * (1 - gate))
        grad_out = grad_out * z * gate
    parts = []
    for i, part in enumerate(_slices(given)):
        own = slice(i * WIDEST, (i + 1) * WIDEST)
        states = grad_final[..., own], part, borders[..., own]
        parts.append(_scan_backward(grad_out, *states, offsets, delta_softplus))
    of_u, of_delta, of_A, of_B, of_C, of_state, _, _, of_bias = zip(*parts, strict=True)
    found: list[Any] = [
        sum(of_u) if given.D is None else sum(of_u) + grad_out * given.D,
        sum(of_delta),
        *(torch.cat(each, -1) for each in (of_A, of_B, of_C, of_state)),
        None if given.D is None else (grad_out * given.u.float()).sum(0),
        of_z,
        None if given.delta_bias is None else sum(of_bias),
    ]
    return [None if x is None else grad.to(x.dtype) for grad, x in zip(found, given, strict=True)]


def _slices(given: Inputs) -> list[Inputs]:
    """At most `WIDEST` states each, in float32, without what comes after the sum over states."""
    u, delta, A, B, C, initial, _, _, bias = given
    wide, slices = (u.float(), delta.float()), [slice(n, n + WIDEST) for n in range(0, A.shape[1], WIDEST)]
    return [
        Inputs(*wide, A[:, n], B[..., n].float(), C[..., n].float(), initial[..., n], delta_bias=bias) for n in slices
    ]


def _scan(given: Inputs, offsets: Tensor, delta_softplus: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward for at most `WIDEST` states."""
    u, delta, A, B, C, initial, D, z, delta_bias = _contiguous(*given)
    (sequences, channels, states), groups = initial.shape, B.shape[1]
    rows = border_rows(u.shape[0], sequences, CHUNK)
    y, final = torch.empty_like(u), torch.empty_like(initial)
    borders, ends = (initial.new_empty(rows, channels, states) for _ in range(2))
    spans = initial.new_empty(rows, channels)
    constants = constants_for(channels // groups, states, delta_softplus)
    blocks = triton.cdiv(channels // groups, constants["COLUMNS"])
    sizes = (sequences, channels, groups, states, blocks)
    grid = rows, groups * blocks
    end_kernel[grid](u, delta, A, B, delta_bias, offsets, ends, spans, *sizes, **constants, num_warps=WARPS)
    _carry(A, initial, ends, spans, offsets, borders, final, reverse=False)
    output_kernel[grid](
        u, delta, A, B, C, D, z, delta_bias, offsets, borders, y, *sizes, **constants, num_warps=WARPS
    )  # fmt: skip
    return y, final, borders


def _scan_backward(
    grad_y: Tensor, grad_final: Tensor, given: Inputs, borders: Tensor, offsets: Tensor, delta_softplus: bool
) -> list[Tensor | None]:
    """The op's backward for at most `WIDEST` states."""
    u, delta, A, B, C, initial, D, z, delta_bias, grad_y, grad_final, borders = _contiguous(
        *given, grad_y, grad_final, borders
    )
    (sequences, channels, states), tokens, groups = initial.shape, u.shape[0], B.shape[1]
    rows = borders.shape[0]
    ends, flows, of_A = (torch.empty_like(borders) for _ in range(3))
    spans = initial.new_empty(rows, channels)
    of_state = torch.empty_like(initial)
    constants = constants_for(channels // groups, states, delta_softplus)
    blocks = triton.cdiv(channels // groups, constants["COLUMNS"])
    flow_kernel[rows, groups * blocks](
        grad_y, delta, A, C, z, delta_bias, offsets, ends, spans,
        sequences, channels, groups, states, blocks, **constants,
        num_warps=_flow_warps(u.dtype, z is not None, is_hopper(u.device)),
    )  # fmt: skip
    _carry(A, grad_final, ends, spans, offsets, flows, of_state, reverse=True)
    constants = constants_for(channels // groups, states, delta_softplus, grad=True)
    blocks = triton.cdiv(channels // groups, constants["COLUMNS"])
    of_u, of_delta = torch.empty_like(u), torch.empty_like(delta)
    of_B, of_C = (initial.new_empty(groups, blocks, tokens, states) for _ in range(2))
    of_D, of_bias = (None if x is None else initial.new_empty(rows, channels) for x in (D, delta_bias))
    of_z = None if z is None else torch.empty_like(z)
    grad_kernel[rows, groups * blocks](
        grad_y, u, delta, A, B, C, D, z, delta_bias, offsets, borders, flows,
        of_u, of_delta, of_A, of_B, of_C, of_D, of_z, of_bias,
        sequences, channels, groups, states, blocks, tokens, **constants, num_warps=GRAD_WARPS,
    )  # fmt: skip
    of_B, of_C = (blocks.sum(1).transpose(0, 1).to(u.dtype).contiguous() for blocks in (of_B, of_C))
    of_D, of_bias = (None if x is None else x.sum(0) for x in (of_D, of_bias))
    return [of_u, of_delta, of_A.sum(0), of_B, of_C, of_state, of_D, of_z, of_bias]


def _carry(
    A: Tensor,
    initial: Tensor,
    ends: Tensor,
    spans: Tensor,
    offsets: Tensor,
    borders: Tensor,
    final: Tensor,
    *,
    reverse: bool,
) -> None:
    """From chunk to chunk of every sequence."""
    sequences, channels, states = initial.shape
    carry_kernel[sequences, triton.cdiv(channels * states, WIDTH)](
        A, initial, ends, spans, offsets, borders, final, channels, states,
        REVERSE=reverse, CHUNK=CHUNK, ROWS=ROWS, WIDTH=WIDTH, num_warps=WARPS,
    )  # fmt: skip


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def constants_for(channels: int, states: int, softplus: bool, *, grad: bool = False) -> dict[str, Any]:
    """Compile-time arguments for this many channels in a group.

    In `grad_kernel` a program's tile of channels and states must have a row, and three columns, for each of the steps.
    """
    rows, columns = (GRAD_ROWS, GRAD_COLUMNS) if grad else (ROWS, COLUMNS)
    columns, wide = min(triton.next_power_of_2(channels), columns), triton.next_power_of_2(states)
    if grad:
        columns, wide = max(columns, rows), max(wide, 4 * rows)
    return {"SOFTPLUS": softplus, "CHUNK": CHUNK, "ROWS": rows, "COLUMNS": columns, "STATES": wide}


def _flow_warps(dtype: torch.dtype, gated: bool, hopper: bool) -> int:
    """Of `flow_kernel`; with one, ptxas stops at 128 registers on sm_80 in half precision without gates, and spills."""
    return WARPS if hopper or gated or dtype.itemsize > 2 else 2


def launches() -> list[Launch]:
    """Every configuration at the largest number of states, for the static analysis."""
    scalars = ("sequences", "channels", "groups", "states", "blocks", "tokens")
    fixed = ("A_in", "D_in", "bias_in", "initial", "final", "borders", "ends", "spans", "flows")
    sums = ("of_A", "of_B", "of_C", "of_D", "of_bias")
    one, grad = (constants_for(1536, WIDEST, True, grad=grad) for grad in (False, True))
    carry = {"REVERSE": True, "CHUNK": CHUNK, "ROWS": ROWS, "WIDTH": WIDTH}
    found = [
        Launch(
            kernel,
            constants,
            dtype,
            states=(*fixed, *sums),
            scalars=scalars,
            absent=() if gated else tuple(name for name in kernel.arg_names if name in ("z_in", "of_z")),
            warps=warps,
            label="gated" if gated else "",
        )
        for kernel, constants, warps in (
            (output_kernel, one, WARPS),
            (grad_kernel, grad, GRAD_WARPS),
        )
        for dtype in (torch.float32, torch.bfloat16)
        for gated in (True, False)
    ]
    for dtype, gated, hopper in product((torch.float32, torch.bfloat16), (True, False), (False, True)):
        found.append(
            Launch(
                flow_kernel,
                one,
                dtype,
                states=fixed,
                scalars=scalars,
                absent=() if gated else ("z_in",),
                warps=_flow_warps(dtype, gated, hopper),
                chips=chips(hopper, measured=True),
                label="gated" if gated else "",
            )
        )
    for kernel, constants, dtype in ((end_kernel, one, torch.bfloat16), (carry_kernel, carry, torch.float32)):
        found.append(Launch(kernel, constants, dtype, states=fixed, scalars=scalars, warps=WARPS))
    return found
