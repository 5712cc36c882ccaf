"""Triton kernels of `tree_masked_attention`: stretches of the cache side by side, then the tree and all of it merged.

The rows of a program are the tokens of the tree times the heads of a group: all of them share the loads of K and V.
There is no backward here: that of ``cpu.py``, in PyTorch, serves on a GPU, too. In float32 products are exact unless
`torch.set_float32_matmul_precision` asks for less.
"""

# Triton kernels are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlreviews_kernels.static import Launch

ROWS = (16, 32, 64)  # of a program
SIDE = 64  # keys of a tile in half precision; half as many in float32, a quarter in tf32
STRETCH = 256  # keys of a program, at least, in whole tiles
PROGRAMS = 264  # as many stretches as give that many programs, two for each multiprocessor of an H100
WIDTHS = (32, 64, 128)  # heads that there are kernels for, filled up with zeros


@triton.jit
def _load(pointer, start, stride, row, dim, inside, DIM: tl.constexpr):
    """Some rows of a matrix, with zeros around them."""
    column = tl.arange(0, DIM)
    at = pointer + start + row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(at, mask=inside[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def _load_queries(q, batch, kv, row, tree, heads, kv_heads, dim, DIM: tl.constexpr):
    """Rows of one head of keys: token row / group, head row % group of the group."""
    group = heads // kv_heads
    at = (batch * tree + row // group) * heads + kv * group + row % group
    return _load(q, 0, dim, at, dim, row < tree * group, DIM)


@triton.jit
def _finite(x):
    """0 for -inf: a row that sees nothing."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _step(qs, ks, vs, seen, highest, total, outs, scale, PRECISION: tl.constexpr):
    """A tile of keys more: running maximum, sum and result."""
    scores = tl.where(seen, tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * scale, float("-inf"))
    most = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp(scores - _finite(most)[:, None])
    kept = tl.exp(highest - _finite(most))
    outs = tl.dot(weights.to(vs.dtype), vs, outs * kept[:, None], input_precision=PRECISION)
    return most, kept * total + tl.sum(weights, 1), outs


@triton.jit
def stretch_kernel(
    q, k_cache, v_cache, lengths, part_out, part_lse,
    k_batch, k_token, k_head, v_batch, v_token, v_head, batches, tree, heads, kv_heads, dim, value_dim, stretch, scale,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Attention to one stretch of the cache, of all tokens and heads that share a head of keys."""
    program, all_rows = tl.program_id(0), tree * (heads // kv_heads)
    kv, program = program % kv_heads, program // kv_heads
    block, program = program % tl.cdiv(all_rows, ROWS), program // tl.cdiv(all_rows, ROWS)
    batch, part = (program % batches).to(tl.int64), (program // batches).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    qs = _load_queries(q, batch, kv, row, tree, heads, kv_heads, dim, DIM)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    outs = tl.zeros((ROWS, DIM), tl.float32)
    begin = part.to(tl.int32) * stretch
    end = tl.minimum(begin + stretch, tl.load(lengths + batch)).to(tl.int32)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        ks = _load(k_cache, batch * k_batch + kv * k_head, k_token, key, dim, key < end, DIM)
        vs = _load(v_cache, batch * v_batch + kv * v_head, v_token, key, value_dim, key < end, DIM)
        highest, total, outs = _step(qs, ks, vs, (key < end)[None, :], highest, total, outs, scale, PRECISION)
    safe = tl.where(total > 0, total, 1.0)
    at = ((part * batches + batch) * kv_heads + kv) * all_rows + row
    column = tl.arange(0, DIM)
    inside = (row < all_rows)[:, None] & (column < value_dim)[None, :]
    tl.store(part_out + at[:, None] * value_dim + column[None, :], outs / safe[:, None], mask=inside)
    tl.store(part_lse + at, highest + tl.log(safe), mask=row < all_rows)


@triton.jit
def merge_kernel(
    q, k, v, tree_mask, part_out, part_lse, out, lse, parts, batches, tree, heads, kv_heads, dim, value_dim, scale,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Attention to the tree, and to the stretches of the cache on top of it."""
    program, group = tl.program_id(0), heads // kv_heads
    all_rows = tree * group
    kv, program = program % kv_heads, program // kv_heads
    blocks = tl.cdiv(all_rows, ROWS)
    block, batch = program % blocks, (program // blocks).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    token, inside = row // group, row < all_rows
    qs = _load_queries(q, batch, kv, row, tree, heads, kv_heads, dim, DIM)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    outs = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(0, tree, KEYS):
        key = first + tl.arange(0, KEYS)
        ks = _load(k, (batch * tree * kv_heads + kv) * dim, kv_heads * dim, key, dim, key < tree, DIM)
        vs = _load(v, (batch * tree * kv_heads + kv) * value_dim, kv_heads * value_dim, key, value_dim, key < tree, DIM)
        at = tree_mask + (batch * tree + token[:, None]) * tree + key[None, :]
        seen = tl.load(at, mask=inside[:, None] & (key < tree)[None, :], other=0) != 0
        highest, total, outs = _step(qs, ks, vs, seen, highest, total, outs, scale, PRECISION)
    column = tl.arange(0, DIM)
    wanted = inside[:, None] & (column < value_dim)[None, :]
    for part in range(0, parts):
        at = ((batches * part + batch) * kv_heads + kv) * all_rows + row
        other = tl.load(part_lse + at, mask=inside, other=float("-inf"))
        most = tl.maximum(highest, other)
        kept, share = tl.exp(highest - _finite(most)), tl.exp(other - _finite(most))
        theirs = tl.load(part_out + at[:, None] * value_dim + column[None, :], mask=wanted, other=0.0)
        outs = outs * kept[:, None] + theirs * share[:, None]
        total = total * kept + share
        highest = most
    safe = tl.where(total > 0, total, 1.0)
    head = kv * group + row % group
    to = out + ((batch * tree + token) * heads + head)[:, None] * value_dim + column[None, :]
    tl.store(to, (outs / safe[:, None]).to(out.dtype.element_ty), mask=wanted)
    tl.store(lse + (batch * heads + head) * tree + token, highest + tl.log(safe), mask=inside)


def _heights(dtype: torch.dtype, precision: str) -> tuple[int, ...]:
    """Rows of a program that there are kernels for; exact products take registers for both factors."""
    return ROWS if dtype.itemsize == 2 else (32 if precision == "ieee" else 64,)


def _options(dtype: torch.dtype, precision: str, rows: int, width: int) -> dict[str, Any]:
    """Compile-time constants, and warps."""
    exact = dtype == torch.float32 and precision == "ieee"
    # with more keys, or fewer warps for 32 rows, one chip or another spills
    if dtype.itemsize == 2:
        keys = SIDE // 2 if rows == 32 and width == 128 else SIDE
    else:
        keys = max(16, SIDE // 2 if exact else SIDE // 4)
    sizes = {"ROWS": rows, "KEYS": keys, "DIM": width, "PRECISION": precision}
    many = width >= 64 if exact else width == 128 or rows == 32
    return {**sizes, "num_warps": 8 if many else 4, "num_stages": 2}


def tree_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    (batch, tree, heads, dim), (context, kv_heads, value_dim) = q.shape, v_cache.shape[1:]
    out = q.new_empty((batch, tree, heads, value_dim))
    lse = torch.empty((batch, heads, tree), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    rows = tree * (heads // kv_heads)
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    heights = _heights(q.dtype, precision)
    width = next(width for width in WIDTHS if max(dim, value_dim) <= width)
    options = _options(q.dtype, precision, next((r for r in heights if rows <= r), heights[-1]), width)
    q, k, v = (x.contiguous() for x in (q, k, v))
    k_cache, v_cache = (x if x.stride(3) == 1 else x.contiguous() for x in (k_cache, v_cache))
    programs = batch * kv_heads * triton.cdiv(rows, options["ROWS"])
    stretch, parts = _stretches(context, programs, options["KEYS"])
    part_out = torch.empty((parts, batch, kv_heads, rows, value_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part_out.shape[:4], dtype=torch.float32, device=q.device)
    sizes = (batch, tree, heads, kv_heads, dim, value_dim)
    if parts:
        stretch_kernel[(parts * programs,)](
            q, k_cache, v_cache, lengths, part_out, part_lse, *k_cache.stride()[:3], *v_cache.stride()[:3], *sizes,
            stretch, scale, **options,
        )  # fmt: skip
    merge_kernel[(programs,)](
        q, k, v, tree_mask.contiguous().view(torch.uint8), part_out, part_lse, out, lse, parts, *sizes, scale, **options
    )  # fmt: skip
    return out, lse


def _stretches(context: int, programs: int, keys: int) -> tuple[int, int]:
    """Keys of a stretch, and how many stretches there are.

    The context is that of the buffer: the lengths are only known on the GPU, which isn't waited for.
    """
    parts = min(triton.cdiv(context, STRETCH), triton.cdiv(PROGRAMS, programs))
    stretch = triton.cdiv(triton.cdiv(context, max(parts, 1)), keys) * keys
    return stretch, triton.cdiv(context, max(stretch, 1))


def launches() -> list[Launch]:
    """Every configuration that can be chosen, for the static analysis."""
    found = []
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        for width in WIDTHS:
            for rows in _heights(dtype, precision):
                for kernel in (stretch_kernel, merge_kernel):
                    options = _options(dtype, precision, rows, width)
                    warps, stages = options.pop("num_warps"), options.pop("num_stages")
                    launch = Launch(
                        kernel, options, dtype,
                        states=("part_out", "part_lse", "lse"), integers=("lengths",), bytes=("tree_mask",),
                        scalars=("k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head", "parts", "batches",
                                 "tree", "heads", "kv_heads", "dim", "value_dim", "stretch"),
                        floats=("scale",), warps=warps, stages=stages, label=f"{rows}x{width} {precision}",
                        matmul=dtype != torch.float32,
                    )  # fmt: skip
                    found.append(launch)
    return found
