"""Triton kernels of the attention cores: one softmax over v, or the difference of two that share v.

Forward: a program takes a block of queries of one head and walks over the keys, with a running maximum, sum and result
for each softmax. Backward: the scores are computed again from the log-sum-exps, once by blocks of queries for q and
once by blocks of keys for k and v; both softmaxes share one dP and one dV. Where there are two, a sweep before that
gives ``delta_s = rowsum(P_s dP)``, which their difference doesn't tell. The formulas are those of the cores'
``README.md``. In float32 products are exact unless `torch.set_float32_matmul_precision` asks for less.
"""

# Triton kernels are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlreviews_kernels.backends import is_hopper
from mlreviews_kernels.softmaxes import WIDEST
from mlreviews_kernels.static import MEASURED_SPILLS, Launch, chips

LOG2_E = tl.constexpr(1.4426950408889634)
MANY = tl.constexpr(32)  # sequences that a program looks through at a time
SIDE = 64  # queries or keys of a block in half precision; half as many in float32
WAVEFRONTS = 4  # of two softmaxes on AMD: of 64 lanes each, and a lane has registers enough only with few of them


@triton.jit
def _rows(pointer, token, heads, head, dim, inside, DIM: tl.constexpr):
    """Some tokens of one head of ``[tokens, heads, dim]``, with zeros around them."""
    column = tl.arange(0, DIM)
    at = pointer + (token[:, None] * heads + head) * dim + column[None, :]
    return tl.load(at, mask=inside[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, token, heads, head, dim, inside, values, DIM: tl.constexpr):
    column = tl.arange(0, DIM)
    at = pointer + (token[:, None] * heads + head) * dim + column[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=inside[:, None] & (column < dim)[None, :])


@triton.jit
def _find(program, offsets, sequences, SIZE: tl.constexpr):
    """A program's sequence and the block of it, the last block first; the sequence is -1 if there is none.

    The lengths are only known here: to find them before, the GPU would have to be waited for.
    """
    found, within, before = -1, 0, 0
    for first in range(0, sequences, MANY):
        number = first + tl.arange(0, MANY)
        known = number < sequences
        length = tl.load(offsets + number + 1, mask=known, other=0) - tl.load(offsets + number, mask=known, other=0)
        count = tl.cdiv(length.to(tl.int32), SIZE)
        end = before + tl.cumsum(count, 0)
        own = (end > program) & (end - count <= program)
        found = tl.maximum(found, tl.max(tl.where(own, number, -1), 0))
        within += tl.sum(tl.where(own, end - 1 - program, 0), 0)
        before += tl.sum(count, 0)
    return found, within


@triton.jit
def _place(sequence, q_offsets, k_offsets, MASK: tl.constexpr):
    """Where a sequence's queries and keys begin, how many there are, and where its mask begins."""
    q_begin, k_begin = tl.load(q_offsets + sequence), tl.load(k_offsets + sequence)
    queries = (tl.load(q_offsets + sequence + 1) - q_begin).to(tl.int32)
    keys = (tl.load(k_offsets + sequence + 1) - k_begin).to(tl.int32)
    mask_begin = k_begin if MASK == 1 else sequence * queries * keys
    return q_begin, k_begin, queries, keys, mask_begin


@triton.jit
def _seen(
    row, key, queries, keys, window, mask, mask_begin, EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """Which keys a query sees; row and key have two axes, in either order. All of them in a tile that is no edge."""
    seen = (row < queries) & (key < keys)
    if EDGE:
        gap = row + (keys - queries) - key
        if CAUSAL:
            seen = seen & (gap >= 0)
        if window > 0:
            seen = seen & (gap < window) & (gap > -window)
        if MASK == 1:
            seen = seen & (tl.load(mask + mask_begin + key, mask=key < keys, other=0) != 0)
        if MASK == 2:
            seen = seen & (tl.load(mask + mask_begin + row.to(tl.int64) * keys + key, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _keys_of(
    start, queries, keys, window,
    CAUSAL: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The first key, of a whole tile, that some query of a block sees; where tiles begin that not all see; the end."""
    shift = keys - queries
    low, high, full = 0, keys, keys
    if window > 0:
        low = tl.maximum(start + shift - window + 1, 0) // KEYS * KEYS
        high = tl.minimum(high, start + ROWS + shift + window - 1)
    if CAUSAL:
        high = tl.minimum(high, start + ROWS + shift)
        full = tl.minimum(full, tl.maximum(start + shift + 1, 0))
    full = full // KEYS * KEYS
    if not SPLIT:
        full = low
    return low, tl.where(window > 0, low, full), high


@triton.jit
def _finite(x):
    """0 for -inf: a row that sees nothing."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _products(rows, columns, seen, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """q k, not scaled yet: a positive scale and the difference to the maximum are one instruction in `exp2`."""
    products = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
    if EDGE:
        products = tl.where(seen, products, float("-inf"))
    return products


@triton.jit
def _softmax(rows, columns, seen, base, scale, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of P, or of its transpose, from its log-sum-exps."""
    return tl.exp2(_products(rows, columns, seen, EDGE, PRECISION) * (scale * LOG2_E) - base)


@triton.jit
def _statistics(lse, delta, at, inside):
    base = _finite(tl.load(lse + at, mask=inside, other=0.0)) * LOG2_E
    return base, tl.load(delta + at, mask=inside, other=0.0)


@triton.jit
def _step(qs, ks, vs, seen, highest, total, result, scale, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of keys more: running maximum, in powers of 2, sum and result of one softmax."""
    products = _products(qs, ks, seen, EDGE, PRECISION)
    most = tl.maximum(highest, tl.max(products, 1) * (scale * LOG2_E))
    shift = _finite(most) if EDGE else most
    p = tl.exp2(products * (scale * LOG2_E) - shift[:, None])
    kept = tl.exp2(highest - shift)
    result = result * kept[:, None] + tl.dot(p.to(vs.dtype), vs, input_precision=PRECISION)
    return most, total * kept + tl.sum(p, 1), result


@triton.jit
def forward_kernel(
    q1, k1, q2, k2, v, lam, mask, q_offsets, k_offsets, sequences, out, lse1, lse2,
    heads, kv_heads, dim, value_dim, window, scale,
    DOUBLE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Both softmaxes of a block of queries, tile by tile."""
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, block = _find(program, q_offsets, sequences, ROWS)
    if sequence < 0:
        return
    q_begin, k_begin, queries, keys, mask_begin = _place(sequence, q_offsets, k_offsets, MASK)
    kv = head // (heads // kv_heads)
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < queries
    token = q_begin + row
    qs1 = _rows(q1, token, heads, head, dim, inside, DIM)
    highest1 = tl.full((ROWS,), float("-inf"), tl.float32)
    sum1 = tl.zeros((ROWS,), tl.float32)
    result1 = tl.zeros((ROWS, VALUE), tl.float32)
    if DOUBLE:
        qs2 = _rows(q2, token, heads, head, dim, inside, DIM)
        highest2 = tl.full((ROWS,), float("-inf"), tl.float32)
        sum2 = tl.zeros((ROWS,), tl.float32)
        result2 = tl.zeros((ROWS, VALUE), tl.float32)
    low, full, stop = _keys_of(block * ROWS, queries, keys, window, CAUSAL, SPLIT, ROWS, KEYS)
    for EDGE in tl.static_range(1 - SPLIT, 2):
        for at in range(full if EDGE else low, stop if EDGE else full, KEYS):
            key = at + tl.arange(0, KEYS)
            known = key < keys
            # all tiles are loaded before the products: ptxas spills where they take turns
            ks1 = _rows(k1, k_begin + key, kv_heads, kv, dim, known, DIM)
            if DOUBLE:
                ks2 = _rows(k2, k_begin + key, kv_heads, kv, dim, known, DIM)
            vs = _rows(v, k_begin + key, kv_heads, kv, value_dim, known, VALUE)
            seen = _seen(row[:, None], key[None, :], queries, keys, window, mask, mask_begin, EDGE, CAUSAL, MASK)
            highest1, sum1, result1 = _step(qs1, ks1, vs, seen, highest1, sum1, result1, scale, EDGE, PRECISION)
            if DOUBLE:
                highest2, sum2, result2 = _step(qs2, ks2, vs, seen, highest2, sum2, result2, scale, EDGE, PRECISION)
    safe = tl.where(sum1 > 0, sum1, 1.0)
    tl.store(lse1 + token * heads + head, highest1 / LOG2_E + tl.log(safe), mask=inside)
    result1 *= (1.0 / safe)[:, None]
    if DOUBLE:
        safe = tl.where(sum2 > 0, sum2, 1.0)
        tl.store(lse2 + token * heads + head, highest2 / LOG2_E + tl.log(safe), mask=inside)
        result1 -= result2 * (tl.load(lam + head) / safe)[:, None]
    _store_rows(out, token, heads, head, value_dim, inside, result1, VALUE)


@triton.jit
def delta_kernel(
    q1, k1, q2, k2, v, mask, q_offsets, k_offsets, sequences, grad_out, lse1, lse2, delta1, delta2,
    heads, kv_heads, dim, value_dim, window, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """rowsum(P_s dP) of both softmaxes."""
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, block = _find(program, q_offsets, sequences, ROWS)
    if sequence < 0:
        return
    q_begin, k_begin, queries, keys, mask_begin = _place(sequence, q_offsets, k_offsets, MASK)
    kv = head // (heads // kv_heads)
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < queries
    token = q_begin + row
    qs1 = _rows(q1, token, heads, head, dim, inside, DIM)
    qs2 = _rows(q2, token, heads, head, dim, inside, DIM)
    dos = _rows(grad_out, token, heads, head, value_dim, inside, VALUE)
    base1 = _finite(tl.load(lse1 + token * heads + head, mask=inside, other=0.0)) * LOG2_E
    base2 = _finite(tl.load(lse2 + token * heads + head, mask=inside, other=0.0)) * LOG2_E
    total1 = tl.zeros((ROWS,), tl.float32)
    total2 = tl.zeros((ROWS,), tl.float32)
    low, full, stop = _keys_of(block * ROWS, queries, keys, window, CAUSAL, SPLIT, ROWS, KEYS)
    for EDGE in tl.static_range(1 - SPLIT, 2):
        for at in range(full if EDGE else low, stop if EDGE else full, KEYS):
            key = at + tl.arange(0, KEYS)
            known = key < keys
            ks1 = _rows(k1, k_begin + key, kv_heads, kv, dim, known, DIM)
            ks2 = _rows(k2, k_begin + key, kv_heads, kv, dim, known, DIM)
            vs = _rows(v, k_begin + key, kv_heads, kv, value_dim, known, VALUE)
            seen = _seen(row[:, None], key[None, :], queries, keys, window, mask, mask_begin, EDGE, CAUSAL, MASK)
            P1 = _softmax(qs1, ks1, seen, base1[:, None], scale, EDGE, PRECISION)
            P2 = _softmax(qs2, ks2, seen, base2[:, None], scale, EDGE, PRECISION)
            dP = tl.dot(dos, tl.trans(vs), input_precision=PRECISION)
            total1 += tl.sum(P1 * dP, 1)
            total2 += tl.sum(P2 * dP, 1)
    tl.store(delta1 + token * heads + head, total1, mask=inside)
    tl.store(delta2 + token * heads + head, total2, mask=inside)


@triton.jit
def grad_q_kernel(
    q1, k1, q2, k2, v, lam, mask, q_offsets, k_offsets, sequences, grad_out, lse1, lse2, delta1, delta2,
    grad_q1, grad_q2, heads, kv_heads, dim, value_dim, window, scale,
    DOUBLE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """dQ_s = scale dS_s K_s with dS_s = w_s P_s (dP - delta_s), of a block of queries."""
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, block = _find(program, q_offsets, sequences, ROWS)
    if sequence < 0:
        return
    q_begin, k_begin, queries, keys, mask_begin = _place(sequence, q_offsets, k_offsets, MASK)
    kv = head // (heads // kv_heads)
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < queries
    token = q_begin + row
    dos = _rows(grad_out, token, heads, head, value_dim, inside, VALUE)
    qs1 = _rows(q1, token, heads, head, dim, inside, DIM)
    base1, mean1 = _statistics(lse1, delta1, token * heads + head, inside)
    dqs1 = tl.zeros((ROWS, DIM), tl.float32)
    if DOUBLE:
        qs2 = _rows(q2, token, heads, head, dim, inside, DIM)
        base2, mean2 = _statistics(lse2, delta2, token * heads + head, inside)
        dqs2 = tl.zeros((ROWS, DIM), tl.float32)
    low, full, stop = _keys_of(block * ROWS, queries, keys, window, CAUSAL, SPLIT, ROWS, KEYS)
    for EDGE in tl.static_range(1 - SPLIT, 2):
        for at in range(full if EDGE else low, stop if EDGE else full, KEYS):
            key = at + tl.arange(0, KEYS)
            known = key < keys
            ks1 = _rows(k1, k_begin + key, kv_heads, kv, dim, known, DIM)
            if DOUBLE:
                ks2 = _rows(k2, k_begin + key, kv_heads, kv, dim, known, DIM)
            vs = _rows(v, k_begin + key, kv_heads, kv, value_dim, known, VALUE)
            seen = _seen(row[:, None], key[None, :], queries, keys, window, mask, mask_begin, EDGE, CAUSAL, MASK)
            P = _softmax(qs1, ks1, seen, base1[:, None], scale, EDGE, PRECISION)
            if DOUBLE:
                other = _softmax(qs2, ks2, seen, base2[:, None], scale, EDGE, PRECISION)
            dP = tl.dot(dos, tl.trans(vs), input_precision=PRECISION)
            dS = P * (dP - mean1[:, None])
            dqs1 += tl.dot(dS.to(ks1.dtype), ks1, input_precision=PRECISION)
            if DOUBLE:
                dS = other * (dP - mean2[:, None])
                dqs2 += tl.dot(dS.to(ks2.dtype), ks2, input_precision=PRECISION)
    _store_rows(grad_q1, token, heads, head, dim, inside, dqs1 * scale, DIM)
    if DOUBLE:
        _store_rows(grad_q2, token, heads, head, dim, inside, dqs2 * (-scale * tl.load(lam + head)), DIM)


@triton.jit
def grad_kv_kernel(
    q1, k1, q2, k2, v, lam, mask, q_offsets, k_offsets, sequences, grad_out, lse1, lse2, delta1, delta2,
    grad_k1, grad_k2, grad_v, heads, kv_heads, dim, value_dim, window, scale,
    DOUBLE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """dK_s = scale dS_s^T Q_s and dV = (P_1 - lambda P_2)^T dO of a block of keys, summed over the heads of a group."""
    program, kv = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    sequence, last = _find(program, k_offsets, sequences, KEYS)
    if sequence < 0:
        return
    q_begin, k_begin, queries, keys, mask_begin = _place(sequence, q_offsets, k_offsets, MASK)
    block = tl.cdiv(keys, KEYS) - 1 - last  # the first keys have most queries
    group, shift, start = heads // kv_heads, keys - queries, block * KEYS
    key = start + tl.arange(0, KEYS)
    known = key < keys
    ks1 = _rows(k1, k_begin + key, kv_heads, kv, dim, known, DIM)
    vs = _rows(v, k_begin + key, kv_heads, kv, value_dim, known, VALUE)
    dks1 = tl.zeros((KEYS, DIM), tl.float32)
    dvs = tl.zeros((KEYS, VALUE), tl.float32)
    if DOUBLE:
        ks2 = _rows(k2, k_begin + key, kv_heads, kv, dim, known, DIM)
        dks2 = tl.zeros((KEYS, DIM), tl.float32)
    low, full, stop = 0, 0, queries
    if CAUSAL:
        low = tl.maximum(start - shift, 0) // ROWS * ROWS
        full = tl.cdiv(tl.maximum(start - shift + KEYS - 1, 0), ROWS) * ROWS
    if window > 0:
        stop = tl.minimum(stop, start + KEYS - shift + window - 1)
        if not CAUSAL:
            low = tl.maximum(start - shift - window + 1, 0) // ROWS * ROWS
    if not SPLIT:
        full = stop
    full = tl.where(window > 0, stop, tl.minimum(full, stop))
    # all tiles are transposed here, [keys, queries]; queries beyond the end are zeros, and so is what they give
    for head in range(kv * group, kv * group + group):
        for FULL in tl.static_range(1 + SPLIT):
            for at in range(full if FULL else low, stop if FULL else full, ROWS):
                row = at + tl.arange(0, ROWS)
                inside = row < queries
                token = q_begin + row
                qs1 = _rows(q1, token, heads, head, dim, inside, DIM)
                if DOUBLE:
                    qs2 = _rows(q2, token, heads, head, dim, inside, DIM)
                dos = _rows(grad_out, token, heads, head, value_dim, inside, VALUE)
                seen = _seen(
                    row[None, :], key[:, None], queries, keys, window, mask, mask_begin, 1 - FULL, CAUSAL, MASK
                )
                base, mean = _statistics(lse1, delta1, token * heads + head, inside)
                P = _softmax(ks1, qs1, seen, base[None, :], scale, 1 - FULL, PRECISION)
                if DOUBLE:
                    other_base, other_mean = _statistics(lse2, delta2, token * heads + head, inside)
                    other = _softmax(ks2, qs2, seen, other_base[None, :], scale, 1 - FULL, PRECISION) * tl.load(
                        lam + head
                    )
                dP = tl.dot(vs, tl.trans(dos), input_precision=PRECISION)
                dS = P * (dP - mean[None, :])
                dks1 += tl.dot(dS.to(qs1.dtype), qs1, input_precision=PRECISION)
                if DOUBLE:
                    P -= other
                    dS = other * (other_mean[None, :] - dP)
                    dks2 += tl.dot(dS.to(qs2.dtype), qs2, input_precision=PRECISION)
                dvs += tl.dot(P.to(dos.dtype), dos, input_precision=PRECISION)
    _store_rows(grad_k1, k_begin + key, kv_heads, kv, dim, known, dks1 * scale, DIM)
    _store_rows(grad_v, k_begin + key, kv_heads, kv, value_dim, known, dvs, VALUE)
    if DOUBLE:
        _store_rows(grad_k2, k_begin + key, kv_heads, kv, dim, known, dks2 * scale, DIM)


# rows, keys, warps and stages in half precision on Hopper, the fastest of a few dozen on an H100: for one softmax with
# heads of up to 64 and of 128, and for two
TILES = (
    {forward_kernel: (128, 64, 4, 3), grad_q_kernel: (64, 64, 4, 3), grad_kv_kernel: (64, 64, 4, 1)},
    {forward_kernel: (128, 64, 8, 3), grad_q_kernel: (128, 64, 8, 3), grad_kv_kernel: (64, 128, 8, 1)},
)
DOUBLE_TILES = {
    forward_kernel: (128, 64, 8, 3),
    delta_kernel: (64, 64, 4, 2),
    grad_q_kernel: (64, 64, 4, 1),
    grad_kv_kernel: (32, 64, 4, 1),
}


def _options(
    kernel: Any, dtype: torch.dtype, precision: str, width: int, double: bool, masked: bool, pairs: bool, hopper: bool
) -> dict[str, Any]:
    """Compile-time constants, warps and stages.

    Args:
        kernel: one of the above.
        dtype: of q, k and v.
        precision: of products in float32.
        width: of the heads: 32, 64 or 128; with two softmaxes v is twice as wide.
        double: whether there are two softmaxes.
        masked: whether there is a mask.
        pairs: whether it is one of queries and keys.
        hopper: whether it is for a chip that this has been measured on; elsewhere it is what doesn't spill.
    """
    shape = {"DIM": width, "VALUE": 2 * width if double else width, "PRECISION": precision}
    shape["SPLIT"] = int(_splits(dtype, masked, hopper))
    if kernel is not delta_kernel:
        shape["DOUBLE"] = double
    if hopper and _has_measured_tiles(dtype, width, double, pairs):
        rows, keys, warps, stages = (DOUBLE_TILES if double else TILES[width == WIDEST])[kernel]
        return {**shape, "ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}
    exact = dtype == torch.float32 and precision == "ieee"
    half = dtype.itemsize == 2
    # float32 products take registers for both factors; two softmaxes fill them with a mask, or when they are wide
    crowded = double and (pairs or width == WIDEST) and kernel is not delta_kernel
    if not hopper:  # there nothing spills without this
        crowded = crowded or (kernel is grad_kv_kernel and width >= (64 if double else WIDEST))
        crowded = crowded or (kernel is delta_kernel and pairs and width == WIDEST)
    side = SIDE if half and not crowded else SIDE // 2
    narrow = kernel is grad_kv_kernel if double else width == WIDEST and kernel in (forward_kernel, grad_kv_kernel)
    narrow = narrow or kernel is delta_kernel or (double and width == WIDEST and kernel is forward_kernel)
    step = max(16, SIDE // 4) if narrow or not half else SIDE // 2
    if double and kernel is grad_q_kernel and width == 64 and not half:
        # with others ptxas stops at 64, 80 or 128 registers, and spills
        side = step = max(16, SIDE // 4) if exact else SIDE // 2
    if double and kernel is grad_kv_kernel and not half and (exact or width == WIDEST):
        side = step
    if not double and kernel is forward_kernel and width == WIDEST and exact:
        side = step
    if kernel is grad_kv_kernel and width == (64 if double else 32) and not half and not exact:
        side, step = step if double else side, side
    by_keys = kernel is grad_kv_kernel or (not half and kernel is delta_kernel)
    sizes = {"ROWS": step, "KEYS": side} if by_keys else {"ROWS": side, "KEYS": step}
    few = not double and ((width == WIDEST and kernel is forward_kernel and not half) or (width == 32 and not exact))
    if half and not hopper and kernel is forward_kernel:
        few = width == 32 and (pairs or not double)
    elif half and not hopper:
        few = width <= 64 and kernel is grad_kv_kernel and not double
    return {**shape, **sizes, "num_warps": 4 if few else 8, "num_stages": 1}


def _spills(kernel: Any, dtype: torch.dtype, precision: str) -> int:
    """On sm_80 ptxas stops at 80 or 128 registers of the 255 that it has, whatever the tiles."""
    return 24 if kernel is grad_kv_kernel and dtype == torch.float32 and precision == "ieee" else 0


def _splits(dtype: torch.dtype, masked: bool, hopper: bool) -> bool:
    """Whether tiles that are seen whole have a loop of their own: faster, but it takes registers."""
    return hopper and dtype.itemsize == 2 and not masked


def _has_measured_tiles(dtype: torch.dtype, width: int, double: bool, pairs: bool) -> bool:
    return dtype.itemsize == 2 and not pairs and not (double and width == WIDEST)


def _width(dim: int, value_dim: int, double: bool) -> int:
    wide = max(dim, -(-value_dim // 2) if double else value_dim)
    return next(width for width in (32, 64, WIDEST) if wide <= width)


class _Call:
    """What all kernels of one call share."""

    def __init__(
        self, qs: Sequence[Tensor], ks: Sequence[Tensor], v: Tensor, lam: Tensor | None, mask: Tensor | None,
        offsets: tuple[Tensor, Tensor], causal: bool, scale: float, window: int,
    ) -> None:  # fmt: skip
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.double = len(qs) == 2
        self.sign = -1.0 if scale < 0 else 1.0  # the kernels take a positive scale
        self.qs, self.ks, self.v = (
            [self.turned(q.contiguous()) for q in qs],
            [k.contiguous() for k in ks],
            v.contiguous(),
        )
        self.offsets = dict(zip(("q_offsets", "k_offsets"), offsets, strict=True))
        (self.queries, self.heads, dim), (self.keys, self.kv_heads, value_dim) = qs[0].shape, v.shape
        pairs = mask is not None and mask.ndim == 3
        width = _width(dim, value_dim, self.double)
        self.shape = (qs[0].dtype, precision, width, self.double, mask is not None, pairs, is_hopper(v.device))
        self.arguments: dict[str, Any] = {
            **_named(q=self.qs, k=self.ks),
            "v": self.v,
            "lam": None if lam is None else lam.contiguous(),
            "mask": None if mask is None else mask.contiguous().view(torch.uint8),
            **self.offsets,
            "heads": self.heads, "kv_heads": self.kv_heads, "dim": dim, "value_dim": value_dim, "window": window,
            "scale": abs(scale) or 1e-30, "CAUSAL": causal, "MASK": 0 if mask is None else mask.ndim // 2 + 1,
        }  # fmt: skip

    def turned(self, x: Tensor) -> Tensor:
        """x with the sign of the scale."""
        return x if self.sign > 0 else -x

    def __call__(self, kernel: Any, **more: Tensor | None) -> None:
        """Runs a kernel for all of its blocks."""
        options = _options(kernel, *self.shape)
        if torch.version.hip:
            options |= {"num_stages": 1, "num_warps": WAVEFRONTS if self.double else options["num_warps"]}
        by_keys = kernel is grad_kv_kernel
        side, size = ("k", options["KEYS"]) if by_keys else ("q", options["ROWS"])
        tokens, heads = (self.keys, self.kv_heads) if by_keys else (self.queries, self.heads)
        sequences = self.offsets[f"{side}_offsets"].shape[0] - 1
        given = {**self.arguments, "sequences": sequences, **more, **options}
        run = {name: x for name, x in given.items() if name in kernel.arg_names or name.startswith("num_")}
        kernel[((tokens // size + sequences) * heads,)](**run)


def _named(**pairs: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Those of the two softmaxes under names with 1 and 2; None for the second of one."""
    return {
        f"{name}{i + 1}": tensors[i] if i < len(tensors) else None for name, tensors in pairs.items() for i in (0, 1)
    }


def forward(
    qs: Sequence[Tensor], ks: Sequence[Tensor], v: Tensor, lam: Tensor | None, mask: Tensor | None,
    offsets: tuple[Tensor, Tensor], *, causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out ``[q_tokens, heads, value_dim]`` in q's dtype and lse ``[softmaxes, q_tokens, heads]``; as in ``softmaxes``.

    Args:
        qs: one ``[q_tokens, heads, dim]`` for each softmax.
        ks: likewise ``[k_tokens, kv_heads, dim]``.
        v: ``[k_tokens, kv_heads, value_dim]``.
        lam: ``[heads]``, float32, of the second softmax; None where there is one.
        mask: ``[k_tokens]`` or ``[sequences, q_time, k_time]``.
        offsets: of the queries' and of the keys' sequences.
        causal: no key after the query's own position.
        scale: of the scores.
        window: positions back (and forth, if not causal) that a query sees; 0: all.
    """
    call = _Call(qs, ks, v, lam, mask, offsets, causal, scale, window)
    out = v.new_empty((call.queries, call.heads, v.shape[2]))
    lse = torch.empty((len(qs), call.queries, call.heads), dtype=torch.float32, device=v.device)
    if call.heads:
        call(forward_kernel, out=out, **_named(lse=list(lse)))
    return out, lse


def backward(
    grad_out: Tensor, deltas: Tensor | None, qs: Sequence[Tensor], ks: Sequence[Tensor], v: Tensor,
    lam: Tensor | None, lse: Tensor, mask: Tensor | None,
    offsets: tuple[Tensor, Tensor], *, causal: bool, scale: float, window: int,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Gradients of all qs, all ks and v, and the deltas ``[softmaxes, q_tokens, heads]``.

    Args:
        grad_out: like out.
        deltas: what is subtracted from dP, rowsum(P dP) less the gradient of lse; None: found by a sweep of its own,
            for two softmaxes.
        qs: as in `forward`, and so are the others.
        ks: likewise.
        v: likewise.
        lam: likewise.
        lse: of `forward`.
        mask: likewise.
        offsets: likewise.
        causal: likewise.
        scale: likewise.
        window: likewise.
    """
    call = _Call(qs, ks, v, lam, mask, offsets, causal, scale, window)
    grad_qs, grad_ks = [torch.empty_like(q) for q in call.qs], [torch.empty_like(k) for k in call.ks]
    grad_v = torch.empty_like(call.v)
    shared = {"grad_out": grad_out.contiguous(), **_named(lse=list(lse.contiguous()))}
    sweep = deltas is None
    deltas = torch.empty_like(lse) if deltas is None else deltas.contiguous()
    shared |= _named(delta=list(deltas))
    if call.heads:
        if sweep:
            call(delta_kernel, **shared)
        call(grad_q_kernel, **shared, **_named(grad_q=grad_qs))
        call(grad_kv_kernel, **shared, grad_v=grad_v, **_named(grad_k=grad_ks))
    return [call.turned(grad) for grad in grad_qs], grad_ks, grad_v, deltas


def launches(*, double: bool) -> list[Launch]:
    """The configurations for the static analysis: causal, and in half precision with a mask of pairs: it takes most."""
    found = []
    kernels = (forward_kernel, *([delta_kernel] if double else []), grad_q_kernel, grad_kv_kernel)
    unused = () if double else ("q2", "k2", "lam", "lse2", "delta2", "grad_q2", "grad_k2")
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        half = dtype.itemsize == 2
        for mask, width, kernel in product((0, 2) if half else (0,), (32, 64, WIDEST), kernels):
            for hopper in (False, True) if half else (False,):
                measured = hopper and _has_measured_tiles(dtype, width, double, mask == 2)
                options = _options(kernel, dtype, precision, width, double, mask > 0, mask == 2, hopper)
                warps, stages = options.pop("num_warps"), options.pop("num_stages")
                absent = (*unused, *(() if mask else ("mask",)))
                found.append(
                    Launch(
                        kernel, {**options, "CAUSAL": True, "MASK": mask}, dtype,
                        states=("lam", "lse1", "lse2", "delta1", "delta2"),
                        integers=("q_offsets", "k_offsets"), bytes=("mask",),
                        scalars=("sequences", "heads", "kv_heads", "dim", "value_dim", "window"), floats=("scale",),
                        absent=tuple(name for name in absent if name in kernel.arg_names),
                        warps=warps, wavefronts=WAVEFRONTS if double else warps, stages=stages,
                        label=f"{width} {precision}" + (" masked" if mask else ""), matmul=dtype != torch.float32,
                        chips=chips(hopper, half),
                        spills=MEASURED_SPILLS if measured else _spills(kernel, dtype, precision),
                    )
                )  # fmt: skip
    return found
