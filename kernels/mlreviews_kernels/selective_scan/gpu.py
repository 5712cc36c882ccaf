"""Triton kernels of `selective_scan`, forward and backward.

A program takes one sequence and a block of channels and walks along time in tiles ``[steps, channels, state]`` that
only ever exist in registers: an associative scan inside a tile, its last state carried to the next.
"""

# Triton kernels are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlreviews_kernels.selective_scan.reference import CHUNK, Inputs, border_rows
from mlreviews_kernels.static import Launch

ROWS = 8  # steps in a tile, of which each chunk has a whole number
WARPS = 4
WIDEST = 16  # states of a kernel; more would not fit the registers, and are taken in slices
SPAN = 64  # channels of a program of the backward: each program has its own copy of the gradients of B and C


@triton.jit
def _compose(a, b, next_a, next_b):
    return next_a * a, next_a * b + next_b


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1 without cancellation: 2 artanh(s) with s = e / (2 + e)."""
    s = e / (2.0 + e)
    q = s * s
    p = 0.11612164
    p = p * q + 0.10853288
    p = p * q + 0.14296179
    p = p * q + 0.19999853
    p = p * q + 0.33333334
    return 2.0 * s + 2.0 * s * q * p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load_steps(delta_in, at, mask, bias, SOFTPLUS: tl.constexpr):
    """Step sizes before and after the softplus, both ``[steps, channels]``; 0 outside the mask, where a decay is 1."""
    raw = tl.load(delta_in + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    delta = raw
    if SOFTPLUS:
        delta = tl.maximum(raw, 0.0) + _log1p_unit(tl.exp(-tl.abs(raw)))
    return raw, tl.where(mask, delta, 0.0)


@triton.jit
def _load_channels(pointer, channel, inside):
    """``[channels]``, zeros where the argument is None."""
    found = tl.zeros(channel.shape, tl.float32)
    if pointer is not None:
        found = tl.load(pointer + channel, mask=inside, other=0.0)
    return found


@triton.jit
def forward_kernel(
    u_in,
    delta_in,
    A_in,
    B_in,
    C_in,
    D_in,
    z_in,
    bias_in,
    initial,
    offsets,
    y_out,
    final,
    borders,
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
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = C_t . h_t; keeps the state before each chunk."""
    sequence = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64) // blocks
    within = tl.program_id(1).to(tl.int64) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = within < channels // groups
    channel = group * (channels // groups) + within
    n = tl.arange(0, STATES)
    known = n < states
    at_state = channel[:, None] * states + n[None, :]
    in_state = inside[:, None] & known[None, :]
    rate = tl.load(A_in + at_state, mask=in_state, other=0.0)
    state = tl.load(initial + sequence * channels * states + at_state, mask=in_state, other=0.0)
    bias, skip = _load_channels(bias_in, channel, inside), _load_channels(D_in, channel, inside)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    row = begin // CHUNK + sequence
    last = (tl.arange(0, ROWS) == ROWS - 1)[:, None, None]
    for start in range(0, end - begin, ROWS):
        if start % CHUNK == 0:
            tl.store(borders + (row + start // CHUNK) * channels * states + at_state, state, mask=in_state)
        token = begin + start + tl.arange(0, ROWS)
        at = token[:, None] * channels + channel[None, :]
        mask = (token < end)[:, None] & inside[None, :]
        at_B = (token[:, None] * groups + group) * states + n[None, :]
        mask_B = (token < end)[:, None] & known[None, :]
        u = tl.load(u_in + at, mask=mask, other=0.0).to(tl.float32)
        B = tl.load(B_in + at_B, mask=mask_B, other=0.0).to(tl.float32)
        C = tl.load(C_in + at_B, mask=mask_B, other=0.0).to(tl.float32)
        _, delta = _load_steps(delta_in, at, mask, bias, SOFTPLUS)
        factor, h = tl.associative_scan(
            (tl.exp(delta[:, :, None] * rate[None, :, :]), (delta * u)[:, :, None] * B[:, None, :]), 0, _compose
        )
        h = factor * state[None, :, :] + h
        y = tl.sum(h * C[:, None, :], axis=2) + skip[None, :] * u
        if z_in is not None:
            z = tl.load(z_in + at, mask=mask, other=0.0).to(tl.float32)
            y *= z * _sigmoid(z)
        tl.store(y_out + at, y.to(y_out.dtype.element_ty), mask=mask)
        # steps past the end keep the state
        state = tl.sum(tl.where(last, h, 0.0), axis=0)
    tl.store(final + sequence * channels * states + at_state, state, mask=in_state)


@triton.jit
def backward_kernel(
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
    tile_states,
    of_u,
    of_delta,
    of_A,
    of_B,
    of_C,
    of_state,
    of_D,
    of_z,
    of_bias,
    channels,
    groups,
    states,
    blocks,
    tokens,
    span,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATES: tl.constexpr,
):
    """g_t = C_t gy_t + exp(delta_{t+1} A) g_{t+1}, tile by tile from the last, and all gradients from g and h.

    A program goes through its channels a few at a time, for each tile anew: what it keeps for them from tile to tile
    lies in memory that only it touches (of_state holds the gradient that goes on; of_A, of_D, of_bias sums; tile_states
    the states before the tiles of one chunk).
    """
    sequence = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64) // blocks
    block = tl.program_id(1).to(tl.int64) % blocks * span
    n = tl.arange(0, STATES)
    known = n < states
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    border = begin // CHUNK + sequence
    step = tl.arange(0, ROWS)
    first, last = (step == 0)[:, None, None], (step == ROWS - 1)[:, None, None]
    chunks = (end - begin + CHUNK - 1) // CHUNK
    for i in range(0, chunks):
        chunk = chunks - 1 - i
        start = begin + chunk * CHUNK
        tiles = (tl.minimum(CHUNK, end - start) + ROWS - 1) // ROWS
        for sub in range(0, span // COLUMNS):
            within = block + sub * COLUMNS + tl.arange(0, COLUMNS)
            inside = within < channels // groups
            channel = group * (channels // groups) + within
            at_state = channel[:, None] * states + n[None, :]
            in_state = inside[:, None] & known[None, :]
            rate = tl.load(A_in + at_state, mask=in_state, other=0.0)
            bias = _load_channels(bias_in, channel, inside)
            state = tl.load(borders + (border + chunk) * channels * states + at_state, mask=in_state, other=0.0)
            for tile in range(0, tiles):
                slot = (sequence * (CHUNK // ROWS) + tile) * channels * states
                tl.store(tile_states + slot + at_state, state, mask=in_state)
                token = start + tile * ROWS + step
                at = token[:, None] * channels + channel[None, :]
                mask = (token < end)[:, None] & inside[None, :]
                at_B = (token[:, None] * groups + group) * states + n[None, :]
                B = tl.load(B_in + at_B, mask=(token < end)[:, None] & known[None, :], other=0.0).to(tl.float32)
                u = tl.load(u_in + at, mask=mask, other=0.0).to(tl.float32)
                _, delta = _load_steps(delta_in, at, mask, bias, SOFTPLUS)
                factor, h = tl.associative_scan(
                    (tl.exp(delta[:, :, None] * rate[None, :, :]), (delta * u)[:, :, None] * B[:, None, :]), 0, _compose
                )
                state = tl.sum(tl.where(last, factor * state[None, :, :] + h, 0.0), axis=0)
        tl.debug_barrier()  # another thread may read in a tile what this one has written
        for k in range(0, tiles):
            tile = tiles - 1 - k
            token = start + tile * ROWS + step
            inner = token < end
            at_B = (token[:, None] * groups + group) * states + n[None, :]
            mask_B = inner[:, None] & known[None, :]
            B = tl.load(B_in + at_B, mask=mask_B, other=0.0).to(tl.float32)
            C = tl.load(C_in + at_B, mask=mask_B, other=0.0).to(tl.float32)
            has_before = (step > 0) & inner
            has_next = (step < ROWS - 1) & (token + 1 < end)
            before_B = has_before[:, None] & known[None, :]
            B_before = tl.load(B_in + at_B - groups * states, mask=before_B, other=0.0).to(tl.float32)
            sum_B = tl.zeros([ROWS, STATES], tl.float32)
            sum_C = tl.zeros([ROWS, STATES], tl.float32)
            for sub in range(0, span // COLUMNS):
                within = block + sub * COLUMNS + tl.arange(0, COLUMNS)
                inside = within < channels // groups
                channel = group * (channels // groups) + within
                at = token[:, None] * channels + channel[None, :]
                mask = inner[:, None] & inside[None, :]
                at_state = channel[:, None] * states + n[None, :]
                in_state = inside[:, None] & known[None, :]
                own_state = sequence * channels * states + at_state
                rate = tl.load(A_in + at_state, mask=in_state, other=0.0)
                bias, skip = _load_channels(bias_in, channel, inside), _load_channels(D_in, channel, inside)
                # the state before each step, from the inputs one step earlier
                before_mask = has_before[:, None] & inside[None, :]
                u_before = tl.load(u_in + at - channels, mask=before_mask, other=0.0).to(tl.float32)
                _, delta_before = _load_steps(delta_in, at - channels, before_mask, bias, SOFTPLUS)
                slot = (sequence * (CHUNK // ROWS) + tile) * channels * states
                state = tl.load(tile_states + slot + at_state, mask=in_state, other=0.0)
                factor, old = tl.associative_scan(
                    (
                        tl.exp(delta_before[:, :, None] * rate[None, :, :]),
                        (delta_before * u_before)[:, :, None] * B_before[:, None, :],
                    ),
                    0,
                    _compose,
                )
                old = factor * state[None, :, :] + old
                u = tl.load(u_in + at, mask=mask, other=0.0).to(tl.float32)
                raw, delta = _load_steps(delta_in, at, mask, bias, SOFTPLUS)
                gy = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
                old *= tl.exp(delta[:, :, None] * rate[None, :, :])
                h = old + (delta * u)[:, :, None] * B[:, None, :]
                if z_in is not None:
                    z = tl.load(z_in + at, mask=mask, other=0.0).to(tl.float32)
                    share = _sigmoid(z)
                    y = tl.sum(h * C[:, None, :], axis=2) + skip[None, :] * u
                    grad = gy * y * share * (1.0 + z * (1.0 - share))
                    tl.store(of_z + at, grad.to(of_z.dtype.element_ty), mask=mask)
                    gy *= z * share
                sum_C += tl.sum(h * gy[:, :, None], axis=1)
                # the gradients of the states; a last step's factor is 1, what comes from behind it has been decayed
                _, delta_next = _load_steps(
                    delta_in, at + channels, has_next[:, None] & inside[None, :], bias, SOFTPLUS
                )
                carry = tl.load(of_state + own_state, mask=in_state, other=0.0)
                factor, g = tl.associative_scan(
                    (tl.exp(delta_next[:, :, None] * rate[None, :, :]), gy[:, :, None] * C[:, None, :]),
                    0,
                    _compose,
                    reverse=True,
                )
                g = factor * carry[None, :, :] + g
                # loaded again, out of the cache: there are no registers to keep them in
                u = tl.load(u_in + at, mask=mask, other=0.0).to(tl.float32)
                raw, delta = _load_steps(delta_in, at, mask, bias, SOFTPLUS)
                sum_B += tl.sum(g * (delta * u)[:, :, None], axis=1)
                entering = tl.sum(g * B[:, None, :], axis=2)
                x = g * old  # the gradient of delta A
                grad = tl.sum(x * rate[None, :, :], axis=2) + entering * u
                if SOFTPLUS:
                    grad *= _sigmoid(raw)
                tl.store(of_delta + at, grad.to(of_delta.dtype.element_ty), mask=mask)
                of_input = entering * delta + skip[None, :] * gy
                tl.store(of_u + at, of_input.to(of_u.dtype.element_ty), mask=mask)
                sum_A = tl.load(of_A + own_state, mask=in_state, other=0.0)
                tl.store(of_A + own_state, sum_A + tl.sum(x * delta[:, :, None], axis=0), mask=in_state)
                carry = tl.sum(tl.where(first, g * tl.exp(delta[:, :, None] * rate[None, :, :]), 0.0), axis=0)
                tl.store(of_state + own_state, carry, mask=in_state)
                own = sequence * channels + channel
                if D_in is not None:
                    so_far = tl.load(of_D + own, mask=inside, other=0.0)
                    tl.store(of_D + own, so_far + tl.sum(gy * u, axis=0), mask=inside)
                if bias_in is not None:
                    so_far = tl.load(of_bias + own, mask=inside, other=0.0)
                    tl.store(of_bias + own, so_far + tl.sum(tl.where(mask, grad, 0.0), axis=0), mask=inside)
            at_sum = (tl.program_id(1).to(tl.int64) * tokens + token[:, None]) * states + n[None, :]
            tl.store(of_B + at_sum, sum_B, mask=mask_B)
            tl.store(of_C + at_sum, sum_C, mask=mask_B)
            tl.debug_barrier()  # as above, in the next tile


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
    y, final = torch.empty_like(u), torch.empty_like(initial)
    borders = initial.new_zeros(border_rows(u.shape[0], sequences), channels, states)
    constants = constants_for(channels // groups, states, delta_softplus)
    blocks = triton.cdiv(channels // groups, constants["COLUMNS"])
    forward_kernel[sequences, groups * blocks](
        u, delta, A, B, C, D, z, delta_bias, initial, offsets, y, final, borders,
        channels, groups, states, blocks, **constants, num_warps=WARPS,
    )  # fmt: skip
    return y, final, borders


def _scan_backward(
    grad_y: Tensor, grad_final: Tensor, given: Inputs, borders: Tensor, offsets: Tensor, delta_softplus: bool
) -> list[Tensor | None]:
    """The op's backward for at most `WIDEST` states."""
    u, delta, A, B, C, initial, D, z, delta_bias = _contiguous(*given)
    (sequences, channels, states), tokens, groups = initial.shape, u.shape[0], B.shape[1]
    constants = constants_for(channels // groups, states, delta_softplus)
    tile_states = initial.new_empty(sequences, CHUNK // ROWS, channels, states)
    span = max(constants["COLUMNS"], min(SPAN, triton.next_power_of_2(channels // groups)))
    blocks = triton.cdiv(channels // groups, span)
    of_u, of_delta = torch.empty_like(u), torch.empty_like(delta)
    of_A, of_state = torch.zeros_like(initial), grad_final.clone(memory_format=torch.contiguous_format)
    of_B, of_C = (initial.new_empty(groups, blocks, tokens, states) for _ in range(2))
    of_D, of_bias = (None if x is None else initial.new_zeros(sequences, channels) for x in (D, delta_bias))
    of_z = None if z is None else torch.empty_like(z)
    backward_kernel[sequences, groups * blocks](
        grad_y.contiguous(), u, delta, A, B, C, D, z, delta_bias, offsets, borders.contiguous(), tile_states,
        of_u, of_delta, of_A, of_B, of_C, of_state, of_D, of_z, of_bias,
        channels, groups, states, blocks, tokens, span, **constants, num_warps=WARPS,
    )  # fmt: skip
    of_B, of_C = (blocks.sum(1).transpose(0, 1).to(u.dtype).contiguous() for blocks in (of_B, of_C))
    of_D, of_bias = (None if x is None else x.sum(0) for x in (of_D, of_bias))
    return [of_u, of_delta, of_A.sum(0), of_B, of_C, of_state, of_D, of_z, of_bias]


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def constants_for(channels: int, states: int, softplus: bool) -> dict[str, Any]:
    """Compile-time arguments for this many channels in a group: a tile of 2,048 numbers."""
    wide = triton.next_power_of_2(states)
    columns = min(triton.next_power_of_2(channels), max(1, 2048 // ROWS // wide), 16)
    return {"SOFTPLUS": softplus, "CHUNK": CHUNK, "ROWS": ROWS, "COLUMNS": columns, "STATES": wide}


def launches() -> list[Launch]:
    """Every configuration at the largest number of states, for the static analysis; fewer take no more registers."""
    scalars = ("channels", "groups", "states", "blocks", "tokens", "span")
    fixed = ("A_in", "D_in", "bias_in", "initial", "final", "borders", "tile_states")
    sums = ("of_A", "of_B", "of_C", "of_state", "of_D", "of_bias")
    return [
        Launch(
            kernel,
            constants_for(1536, WIDEST, True),
            dtype,
            states=(*fixed, *sums),
            scalars=scalars,
            absent=() if gated else ("z_in", "of_z") if kernel is backward_kernel else ("z_in",),
            warps=WARPS,
            label="gated" if gated else "",
        )
        for dtype in (torch.float32, torch.bfloat16)
        for gated in (True, False)
        for kernel in (forward_kernel, backward_kernel)
    ]
