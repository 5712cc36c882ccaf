"""Triton kernels of `delta_rule`, forward and backward.

What depends on a chunk alone is done for all chunks at once: the inverse of its triangular system and its scores
(`chunk_kernel`), and in the backward the gradients that follow from the states (`grad_kernel`). Between them, one
program for each sequence, head and block of value columns walks along the chunks with its part of the state in
registers (`forward_kernel`), and back with the state's gradient (`state_grad_kernel`). The formulas are those of
``README.md``; every matrix product is a `tl.dot`. In float32 it is exact unless `torch.set_float32_matmul_precision`
asks for less.
"""

# Triton kernels are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlreviews_kernels.backends import is_hopper
from mlreviews_kernels.chunks_gpu import chunk_at, first_row, rows
from mlreviews_kernels.delta_rule.reference import Inputs
from mlreviews_kernels.static import MEASURED_SPILLS, Launch, chips

TIME = 16  # steps of a chunk: the inverse is found row by row
VALUES = 32  # columns of the state that one program carries; half of it in float32
KEYS = (16, 64, 128)  # rows of the state are one tile: the first of these that is enough
BLOCK = 64  # keys of one program of grad_kernel, which keeps three tiles of so many
THIN = 16  # columns of a tile of grad_kernel


@triton.jit
def _rows(pointer, begin, row, heads, head, width, columns, inside):
    """A chunk of ``[tokens, heads, width]``, zeros outside."""
    at = pointer + (begin * heads + head) * width + row[:, None] * (heads * width) + columns[None, :]
    return tl.load(at, mask=inside[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def _bounds(begin, end, within, span, shares, TIME: tl.constexpr):
    """Where a sequence's chunk of this number begins, and its steps: each span of time has so many shares."""
    start = begin + within // shares * span
    first = start + within % shares * TIME
    return first, tl.minimum(tl.minimum(start + span, end) - first, TIME).to(tl.int32)


@triton.jit
def _place(chunk, heads, offsets, sequences, span, shares, TIME: tl.constexpr):
    """Where a program's chunk begins, and its steps; none or fewer, where there are not so many chunks."""
    most = tl.num_programs(0) // heads // shares
    _, begin, end, start = chunk_at(chunk // shares, most, offsets, sequences, span)
    return _bounds(begin + start, end, chunk % shares, span, shares, TIME)


@triton.jit
def _chunks_of(sequence, offsets, span, shares, TIME: tl.constexpr):
    """Where a sequence begins and ends, its first chunk, and how many it has."""
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    count = (end - begin) // span * shares + tl.cdiv((end - begin) % span, TIME)
    return begin, end, first_row(sequence, begin, span) * shares, count


@triton.jit
def chunk_kernel(
    q, k, beta, offsets, inverses, scores, sequences, heads, dim_k, mini_batch, span, shares,
    PRECISION: tl.constexpr, TIME: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """(I + A)^-1 and P = tril(Q K^T) of a chunk; A_sj = beta_s k_s . k_j where j's mini-batch is before s's."""
    program = tl.program_id(0).to(tl.int64)
    chunk, head = program // heads, program % heads
    begin, steps = _place(chunk, heads, offsets, sequences, span, shares, TIME)
    row = tl.arange(0, TIME)
    inside = row < steps
    keys = _rows(k, begin, row, heads, head, dim_k, tl.arange(0, KEYS), inside)
    rate = tl.load(beta + begin * heads + head + row * heads, mask=inside, other=0.0)
    products = tl.dot(keys, tl.trans(keys), input_precision=PRECISION) * rate[:, None]
    number = row // mini_batch
    A = tl.where(number[:, None] > number[None, :], products, 0.0)
    inverse = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for i in range(1, TIME):
        # row i of the inverse is that of I less A's row times the rows found so far
        factor = tl.sum(tl.where((row == i)[:, None], A, 0.0), axis=0)
        change = tl.sum(factor[:, None] * inverse, axis=0)
        inverse = tl.where((row == i)[:, None], inverse - change[None, :], inverse)
    at = program * TIME * TIME + row[:, None] * TIME + row[None, :]
    tl.store(inverses + at, inverse)
    queries = _rows(q, begin, row, heads, head, dim_k, tl.arange(0, KEYS), inside)
    products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    tl.store(scores + at, tl.where(row[:, None] >= row[None, :], products, 0.0).to(scores.dtype.element_ty))


@triton.jit
def forward_kernel(
    q, k, v, beta, inverses, scores, initial, offsets, out, final, states, bases, updates,
    heads, dim_k, dim_v, span, shares,
    STORE: tl.constexpr, PRECISION: tl.constexpr, TIME: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """U = (I + A)^-1 beta (V - K W_base), O = Q W + P U, W' = W + K^T U along the chunks of a sequence.

    STORE keeps what the backward needs, the states at the chunks' beginnings, W_base and U, in place of O.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // heads, program % heads
    origin, behind, first, count = _chunks_of(sequence, offsets, span, shares, TIME)
    row, key = tl.arange(0, TIME), tl.arange(0, KEYS)
    value = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    state_mask = (key < dim_k)[:, None] & (value < dim_v)[None, :]
    in_state = key[:, None] * dim_v + value[None, :]
    state = tl.load(initial + program * dim_k * dim_v + in_state, mask=state_mask, other=0.0)
    base = state
    for within in range(0, count):
        begin, steps = _bounds(origin, behind, within, span, shares, TIME)
        inside = row < steps
        base = tl.where(within % shares == 0, state, base)
        keys = _rows(k, begin, row, heads, head, dim_k, key, inside)
        values = _rows(v, begin, row, heads, head, dim_v, value, inside).to(tl.float32)
        rate = tl.load(beta + begin * heads + head + row * heads, mask=inside, other=0.0)
        number = (first + within) * heads + head  # int64, as the bounds of the loop are
        in_chunk = number * TIME * TIME + row[:, None] * TIME + row[None, :]
        inverse = tl.load(inverses + in_chunk)
        errors = values - tl.dot(keys, base.to(k.dtype.element_ty), input_precision=PRECISION)
        update = tl.dot(inverse, rate[:, None] * errors, input_precision=PRECISION)
        rounded = update.to(k.dtype.element_ty)
        if STORE:
            tl.store(states + number * dim_k * dim_v + in_state, state, mask=state_mask)
            tl.store(bases + number * dim_k * dim_v + in_state, base, mask=state_mask)
            at = updates + (begin * heads + head) * dim_v + row[:, None] * (heads * dim_v) + value[None, :]
            tl.store(at, update, mask=inside[:, None] & (value < dim_v)[None, :])
        else:
            queries = _rows(q, begin, row, heads, head, dim_k, key, inside)
            found = tl.dot(queries, state.to(k.dtype.element_ty), input_precision=PRECISION)
            found += tl.dot(tl.load(scores + in_chunk), rounded, input_precision=PRECISION)
            at = out + (begin * heads + head) * dim_v + row[:, None] * (heads * dim_v) + value[None, :]
            tl.store(at, found.to(out.dtype.element_ty), mask=inside[:, None] & (value < dim_v)[None, :])
        state += tl.dot(tl.trans(keys), rounded, input_precision=PRECISION)
    tl.store(final + program * dim_k * dim_v + in_state, state, mask=state_mask)


@triton.jit
def state_grad_kernel(
    grad_out, grad_final, q, k, beta, inverses, scores, offsets, grad_states, rights, grad_initial,
    heads, dim_k, dim_v, span, shares,
    PRECISION: tl.constexpr, TIME: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """R = (I + A)^-T (P^T dO + K dW'), dW = dW' + Q^T dO, dW_base -= K^T (beta R), from the last chunk on."""
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // heads, program % heads
    origin, behind, first, count = _chunks_of(sequence, offsets, span, shares, TIME)
    row, key = tl.arange(0, TIME), tl.arange(0, KEYS)
    value = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    state_mask = (key < dim_k)[:, None] & (value < dim_v)[None, :]
    in_state = key[:, None] * dim_v + value[None, :]
    grad = tl.load(grad_final + program * dim_k * dim_v + in_state, mask=state_mask, other=0.0)
    grad_base = tl.zeros((KEYS, VALUES), dtype=tl.float32)
    for step in range(0, count):
        within = count - 1 - step
        begin, steps = _bounds(origin, behind, within, span, shares, TIME)
        inside = row < steps
        keys = _rows(k, begin, row, heads, head, dim_k, key, inside)
        grads = _rows(grad_out, begin, row, heads, head, dim_v, value, inside)
        number = (first + within) * heads + head  # int64, as the bounds of the loop are
        in_chunk = number * TIME * TIME + row[:, None] * TIME + row[None, :]
        tl.store(grad_states + number * dim_k * dim_v + in_state, grad, mask=state_mask)
        into = tl.dot(tl.trans(tl.load(scores + in_chunk)), grads, input_precision=PRECISION)
        into += tl.dot(keys, grad.to(k.dtype.element_ty), input_precision=PRECISION)
        right = tl.dot(tl.trans(tl.load(inverses + in_chunk)), into, input_precision=PRECISION)
        at = rights + (begin * heads + head) * dim_v + row[:, None] * (heads * dim_v) + value[None, :]
        tl.store(at, right, mask=inside[:, None] & (value < dim_v)[None, :])
        queries = _rows(q, begin, row, heads, head, dim_k, key, inside)
        grad += tl.dot(tl.trans(queries), grads, input_precision=PRECISION)
        rate = tl.load(beta + begin * heads + head + row * heads, mask=inside, other=0.0)
        scaled = (rate[:, None] * right).to(k.dtype.element_ty)
        grad_base -= tl.dot(tl.trans(keys), scaled, input_precision=PRECISION)
        opened = within % shares == 0
        grad = tl.where(opened, grad + grad_base, grad)
        grad_base = tl.where(opened, 0.0, grad_base)
    tl.store(grad_initial + program * dim_k * dim_v + in_state, grad, mask=state_mask)


@triton.jit
def grad_kernel(
    grad_out, q, k, v, beta, offsets, states, bases, updates, grad_states, rights,
    grad_q, grad_k, grad_v, grad_beta, tokens, sequences, heads, dim_k, dim_v, mini_batch, span, shares,
    PRECISION: tl.constexpr, TIME: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's inputs from its states, their gradients, U and R, for one block of keys.

    dbeta is a sum over keys, of which each block stores its part: with R W_base^T in place of K W_base, keys of other
    blocks are not needed. What has no axis of keys is for the first block.
    """
    chunk, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    program = tl.program_id(0).to(tl.int64)
    begin, steps = _place(chunk, heads, offsets, sequences, span, shares, TIME)
    block = tl.program_id(1).to(tl.int64)
    row, key = tl.arange(0, TIME), block * KEYS + tl.arange(0, KEYS)
    inside = row < steps
    first = row < tl.where(block == 0, steps, 0)
    rate = tl.load(beta + begin * heads + head + row * heads, mask=inside, other=0.0)
    dq = tl.zeros((TIME, KEYS), dtype=tl.float32)
    dk = tl.zeros((TIME, KEYS), dtype=tl.float32)
    through = tl.zeros((TIME, KEYS), dtype=tl.float32)  # R W_base^T
    dscores = tl.zeros((TIME, TIME), dtype=tl.float32)
    dsystem = tl.zeros((TIME, TIME), dtype=tl.float32)
    drate = tl.zeros((TIME,), dtype=tl.float32)
    for start in range(0, dim_v, VALUES):
        value = start + tl.arange(0, VALUES)
        # nothing was stored for the chunks that are too many
        mask = (key < tl.where(steps > 0, dim_k, 0))[:, None] & (value < dim_v)[None, :]
        in_state = program * dim_k * dim_v + key[:, None] * dim_v + value[None, :]
        grads = _rows(grad_out, begin, row, heads, head, dim_v, value, inside)
        values = _rows(v, begin, row, heads, head, dim_v, value, first).to(tl.float32)
        update = _rows(updates, begin, row, heads, head, dim_v, value, inside).to(k.dtype.element_ty)
        right = _rows(rights, begin, row, heads, head, dim_v, value, inside)
        drate += tl.sum(right * values, axis=1)
        at = grad_v + (begin * heads + head) * dim_v + row[:, None] * (heads * dim_v) + value[None, :]
        scaled = (rate[:, None] * right).to(grad_v.dtype.element_ty)
        tl.store(at, scaled, mask=first[:, None] & (value < dim_v)[None, :])
        right = right.to(k.dtype.element_ty)
        dscores += tl.dot(grads, tl.trans(update), input_precision=PRECISION)
        dsystem -= tl.dot(right, tl.trans(update), input_precision=PRECISION)
        state = tl.load(states + in_state, mask=mask, other=0.0).to(k.dtype.element_ty)
        dq += tl.dot(grads, tl.trans(state), input_precision=PRECISION)
        dstate = tl.load(grad_states + in_state, mask=mask, other=0.0).to(k.dtype.element_ty)
        dk += tl.dot(update, tl.trans(dstate), input_precision=PRECISION)
        base = tl.load(bases + in_state, mask=mask, other=0.0).to(k.dtype.element_ty)
        through += tl.dot(right, tl.trans(base), input_precision=PRECISION)
    keys = _rows(k, begin, row, heads, head, dim_k, key, inside)
    number = row // mini_batch
    dsystem = tl.where(number[:, None] > number[None, :], dsystem, 0.0)
    drate += tl.sum(dsystem * tl.dot(keys, tl.trans(keys), input_precision=PRECISION), axis=1)
    drate -= tl.sum(keys.to(tl.float32) * through, axis=1)
    tl.store(grad_beta + (block * tokens + begin) * heads + head + row * heads, drate, mask=inside)
    dscores = tl.where(row[:, None] >= row[None, :], dscores, 0.0).to(k.dtype.element_ty)
    mask = inside[:, None] & (key < dim_k)[None, :]
    at = (begin * heads + head) * dim_k + row[:, None] * (heads * dim_k) + key[None, :]
    dq += tl.dot(dscores, keys, input_precision=PRECISION)
    tl.store(grad_q + at, dq.to(grad_q.dtype.element_ty), mask=mask)
    dproducts = rate[:, None] * dsystem
    dproducts = (dproducts + tl.trans(dproducts)).to(k.dtype.element_ty)
    dk += tl.dot(dproducts, keys, input_precision=PRECISION) - rate[:, None] * through
    queries = _rows(q, begin, row, heads, head, dim_k, key, inside)
    dk += tl.dot(tl.trans(dscores), queries, input_precision=PRECISION)
    tl.store(grad_k + at, dk.to(grad_k.dtype.element_ty), mask=mask)


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _keys(dim_k: int) -> int:
    for size in KEYS:
        if dim_k <= size:
            return size
    raise ValueError(f"q: the Triton kernels take keys of up to {KEYS[-1]} numbers, got {dim_k}")


def _values(dtype: torch.dtype) -> int:
    return VALUES if dtype.itemsize == 2 else VALUES // 2


# in half precision on Hopper, with 4 warps: the fastest on an H100
STAGES = {chunk_kernel: 1, forward_kernel: 3, state_grad_kernel: 3, grad_kernel: 3}


def _options(kernel: Any, dtype: torch.dtype, keys: int, hopper: bool) -> dict[str, int]:
    """Warps and stages; elsewhere as few warps as spill nothing."""
    if dtype.itemsize == 2 and hopper:
        return {"num_warps": 4, "num_stages": STAGES[kernel]}
    return {"num_warps": 4 if keys == KEYS[0] or kernel is grad_kernel else 8, "num_stages": 1}


def _sizes(kernel: Any, q: Tensor) -> dict[str, Any]:
    keys = _keys(q.shape[2])
    sizes = {"PRECISION": _precision(), "TIME": TIME, "KEYS": min(keys, BLOCK) if kernel is grad_kernel else keys}
    return {**sizes, **_options(kernel, q.dtype, keys, is_hopper(q.device))}


def _cut(mini_batch: int) -> tuple[int, int]:
    """Steps of a span and the chunks in it: one of whole mini-batches, or equal shares of one mini-batch."""
    return (TIME // mini_batch * mini_batch, 1) if mini_batch <= TIME else (mini_batch, triton.cdiv(mini_batch, TIME))


def _per_chunk(
    q: Tensor, k: Tensor, beta: Tensor, offsets: Tensor, sequences: int, mini_batch: int
) -> tuple[Tensor, Tensor]:
    """(I + A)^-1 and P of every chunk and head."""
    tokens, heads, dim_k = k.shape
    span, shares = _cut(mini_batch)
    most = rows(tokens, sequences, span) * shares
    inverses = torch.empty((most, heads, TIME, TIME), dtype=torch.float32, device=k.device)
    scores = torch.empty_like(inverses, dtype=k.dtype)
    chunk_kernel[(most * heads,)](
        q, k, beta, offsets, inverses, scores, sequences, heads, dim_k, min(mini_batch, TIME), span, shares,
        **_sizes(chunk_kernel, k),
    )  # fmt: skip
    return inverses, scores


def delta_rule(given: Inputs, offsets: Tensor, mini_batch: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    q, k, v, beta, initial = (tensor.contiguous() for tensor in given._replace(beta=given.beta.float()))
    (heads, dim_k), dim_v, width = q.shape[1:], v.shape[2], _values(q.dtype)
    systems = _per_chunk(q, k, beta, offsets, len(initial), mini_batch)
    out, final = torch.empty_like(v), torch.empty_like(initial)
    forward_kernel[(initial.shape[0] * heads, triton.cdiv(dim_v, width))](
        q, k, v, beta, *systems, initial, offsets, out, final, None, None, None, heads, dim_k, dim_v,
        *_cut(mini_batch), STORE=False, VALUES=width, **_sizes(forward_kernel, q),
    )  # fmt: skip
    return out, final


def delta_rule_backward(
    grad_out: Tensor, grad_final: Tensor, given: Inputs, offsets: Tensor, mini_batch: int, chunk_size: int
) -> list[Tensor]:
    """Gradients of what is given; states are computed again."""
    q, k, v, beta, initial = (tensor.contiguous() for tensor in given._replace(beta=given.beta.float()))
    grad_out, grad_final = grad_out.contiguous(), grad_final.contiguous()
    (tokens, heads, dim_k), dim_v, width = q.shape, v.shape[2], _values(q.dtype)
    systems = _per_chunk(q, k, beta, offsets, len(initial), mini_batch)
    most = len(systems[0])
    states, bases, grad_states = torch.empty((3, most, heads, dim_k, dim_v), dtype=torch.float32, device=q.device)
    updates, rights = torch.empty((2, *v.shape), dtype=torch.float32, device=q.device)
    block = min(_keys(dim_k), BLOCK)
    blocks = triton.cdiv(dim_k, block)
    grads = [torch.empty_like(x) for x in (q, k, v, beta, initial)]
    grads[3] = beta.new_empty((blocks, tokens, heads))
    grid = (initial.shape[0] * heads, triton.cdiv(dim_v, width))
    forward_kernel[grid](
        q, k, v, beta, *systems, initial, offsets, None, torch.empty_like(initial), states, bases, updates,
        heads, dim_k, dim_v, *_cut(mini_batch), STORE=True, VALUES=width, **_sizes(forward_kernel, q),
    )  # fmt: skip
    state_grad_kernel[grid](
        grad_out, grad_final, q, k, beta, *systems, offsets, grad_states, rights, grads[4],
        heads, dim_k, dim_v, *_cut(mini_batch), VALUES=width, **_sizes(state_grad_kernel, q),
    )  # fmt: skip
    grad_kernel[(most * heads, blocks)](
        grad_out, q, k, v, beta, offsets, states, bases, updates, grad_states, rights,
        *grads[:4], tokens, len(initial), heads, dim_k, dim_v, min(mini_batch, TIME), *_cut(mini_batch), VALUES=THIN,
        **_sizes(grad_kernel, q),
    )  # fmt: skip
    grads[3] = grads[3].sum(0)
    return [grad.to(tensor.dtype) for grad, tensor in zip(grads, given, strict=True)]


def launches() -> list[Launch]:
    """Every configuration that can be chosen, for the static analysis."""
    found = []
    states = (
        "beta", "inverses", "initial", "final", "states", "bases", "updates", "grad_final", "grad_states", "rights",
        "grad_initial", "grad_beta",
    )  # fmt: skip
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        for keys in KEYS:
            shape = {"PRECISION": precision, "TIME": TIME, "KEYS": keys}
            kernels: tuple[tuple[Any, dict[str, Any], tuple[str, ...]], ...] = (
                (chunk_kernel, {}, ()),
                (forward_kernel, {"STORE": False, "VALUES": _values(dtype)}, ("states", "bases", "updates")),
                (forward_kernel, {"STORE": True, "VALUES": _values(dtype)}, ("out",)),
                (state_grad_kernel, {"VALUES": _values(dtype)}, ()),
                (grad_kernel, {"KEYS": min(keys, BLOCK), "VALUES": THIN}, ()),
            )
            half = dtype.itemsize == 2
            for (kernel, constants, absent), hopper in product(kernels, (False, True) if half else (False,)):
                options = _options(kernel, dtype, keys, hopper)
                launch = Launch(
                    kernel,
                    {**shape, **constants},
                    dtype,
                    states=states,
                    scalars=("tokens", "sequences", "heads", "dim_k", "dim_v", "mini_batch", "span", "shares"),
                    absent=absent,
                    warps=options["num_warps"],
                    stages=options["num_stages"],
                    label=f"{keys} {precision}" + (" states" if constants.get("STORE") else ""),
                    matmul=dtype != torch.float32,
                    chips=chips(hopper, half),
                    spills=MEASURED_SPILLS if hopper else 0,
                )
                found.append(launch)
    return found
