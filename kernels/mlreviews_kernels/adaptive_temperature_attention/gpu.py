"""Triton kernels of `adaptive_temperature_attention`: the entropy from one sweep, the result from another.

Between them the entropy becomes the temperature, in PyTorch. Backward: what the scores get through the entropy depends
on a sum over all keys, which is not known before the end of a sweep; so the kernel for q keeps two sums of keys, which
that number combines, and writes it down for the kernel for k and v. Nothing is added atomically. In float32 products
are exact unless `torch.set_float32_matmul_precision` asks for less.
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

from mlreviews_kernels.adaptive_temperature_attention.reference import inverse_temperature
from mlreviews_kernels.backends import is_hopper
from mlreviews_kernels.static import MEASURED_SPILLS, Launch, chips

SIDE = 64  # queries or keys of a block in half precision; half as many in float32
WIDTHS = (32, 64, 128)  # heads that there are kernels for, filled up with zeros
HIDDEN = tl.constexpr(-1e4)  # its exponential is 0, and 0 times it is 0


@triton.jit
def _rows(pointer, batch, time, heads, head, row, dim, inside, DIM: tl.constexpr):
    """Some rows of one head of ``[batch, time, heads, dim]``, with zeros around them."""
    column = tl.arange(0, DIM)
    at = pointer + ((batch * time + row[:, None]) * heads + head) * dim + column[None, :]
    return tl.load(at, mask=inside[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, batch, time, heads, head, row, dim, inside, values, DIM: tl.constexpr):
    column = tl.arange(0, DIM)
    at = pointer + ((batch * time + row[:, None]) * heads + head) * dim + column[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=inside[:, None] & (column < dim)[None, :])


@triton.jit
def _seen(batch, row, key, queries, keys, mask, CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """Which keys a query sees; row and key have two axes, in either order."""
    seen = (row < queries) & (key < keys)
    if CAUSAL:
        seen = seen & (key <= row + (keys - queries))
    if MASK == 1:
        seen = seen & (tl.load(mask + batch * keys + key, mask=key < keys, other=0) != 0)
    if MASK == 2:
        seen = seen & (tl.load(mask + (batch * queries + row) * keys + key, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _finite(x):
    """0 for -inf: a row that sees nothing."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _place(heads, queries, ROWS: tl.constexpr):
    """The batch row, head and block of queries of a program; the long ones first."""
    program, blocks = tl.program_id(0), tl.cdiv(queries, ROWS)
    rest = program // heads
    return (rest // blocks).to(tl.int64), program % heads, blocks - 1 - rest % blocks


@triton.jit
def entropy_kernel(
    q, k, mask, lse, entropy, queries, keys, heads, kv_heads, dim, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp and entropy of the scores of one head and a block of queries."""
    batch, head, block = _place(heads, queries, ROWS)
    row = block * ROWS + tl.arange(0, ROWS)
    qs = _rows(q, batch, queries, heads, head, row, dim, row < queries, DIM)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)  # sum of e^x x with x = score - highest
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, keys - queries + (block + 1) * ROWS)
    for first in range(0, stop, KEYS):
        key = first + tl.arange(0, KEYS)
        ks = _rows(k, batch, keys, kv_heads, head // (heads // kv_heads), key, dim, key < keys, DIM)
        seen = _seen(batch, row[:, None], key[None, :], queries, keys, mask, CAUSAL, MASK)
        scores = tl.where(seen, tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * scale, float("-inf"))
        most = tl.maximum(highest, tl.max(scores, 1))
        x = tl.where(seen, scores - _finite(most)[:, None], 0.0)
        e = tl.where(seen, tl.exp(x), 0.0)
        kept = tl.exp(highest - _finite(most))
        down = _finite(highest) - _finite(most)
        weighted = kept * (weighted + down * total) + tl.sum(e * x, 1)
        total = kept * total + tl.sum(e, 1)
        highest = most
    safe = tl.where(total > 0, total, 1.0)
    at = (batch * heads + head) * queries + row
    tl.store(lse + at, highest + tl.log(safe), mask=row < queries)
    tl.store(entropy + at, tl.log(safe) - weighted / safe, mask=row < queries)


@triton.jit
def forward_kernel(
    q, k, v, mask, beta, out, sharp, queries, keys, heads, kv_heads, dim, value_dim, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """softmax(beta s) V of one head and a block of queries."""
    batch, head, block = _place(heads, queries, ROWS)
    row = block * ROWS + tl.arange(0, ROWS)
    inside, kv = row < queries, head // (heads // kv_heads)
    at = (batch * heads + head) * queries + row
    factor = scale * tl.load(beta + at, mask=inside, other=1.0)
    qs = _rows(q, batch, queries, heads, head, row, dim, inside, DIM)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    outs = tl.zeros((ROWS, DIM), tl.float32)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, keys - queries + (block + 1) * ROWS)
    for first in range(0, stop, KEYS):
        key = first + tl.arange(0, KEYS)
        ks = _rows(k, batch, keys, kv_heads, kv, key, dim, key < keys, DIM)
        seen = _seen(batch, row[:, None], key[None, :], queries, keys, mask, CAUSAL, MASK)
        scores = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * factor[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        most = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - _finite(most)[:, None])
        kept = tl.exp(highest - _finite(most))
        total = kept * total + tl.sum(weights, 1)
        vs = _rows(v, batch, keys, kv_heads, kv, key, value_dim, key < keys, DIM)
        outs = tl.dot(weights.to(vs.dtype), vs, outs * kept[:, None], input_precision=PRECISION)
        highest = most
    safe = tl.where(total > 0, total, 1.0)
    _store_rows(out, batch, queries, heads, head, row, value_dim, inside, outs / safe[:, None], DIM)
    tl.store(sharp + at, highest + tl.log(safe), mask=inside)


@triton.jit
def grad_q_kernel(
    q, k, v, mask, grad_out, grad_entropy, entropy, lse, sharp, beta, slope, delta, grad_q, through,
    queries, keys, heads, kv_heads, dim, value_dim, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dQ of one head and a block of queries, and the whole gradient of the entropy."""
    batch, head, block = _place(heads, queries, ROWS)
    row = block * ROWS + tl.arange(0, ROWS)
    inside, kv = row < queries, head // (heads // kv_heads)
    at = (batch * heads + head) * queries + row
    base = _finite(tl.load(lse + at, mask=inside, other=0.0))
    sharp_base = _finite(tl.load(sharp + at, mask=inside, other=0.0))
    H = tl.load(entropy + at, mask=inside, other=0.0)
    inverse = tl.load(beta + at, mask=inside, other=1.0)
    mean = tl.load(delta + at, mask=inside, other=0.0)
    qs = _rows(q, batch, queries, heads, head, row, dim, inside, DIM)
    dos = _rows(grad_out, batch, queries, heads, head, row, value_dim, inside, DIM)
    direct = tl.zeros((ROWS, DIM), tl.float32)
    entropic = tl.zeros((ROWS, DIM), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, keys - queries + (block + 1) * ROWS)
    for first in range(0, stop, KEYS):
        key = first + tl.arange(0, KEYS)
        ks = _rows(k, batch, keys, kv_heads, kv, key, dim, key < keys, DIM)
        vs = _rows(v, batch, keys, kv_heads, kv, key, value_dim, key < keys, DIM)
        seen = _seen(batch, row[:, None], key[None, :], queries, keys, mask, CAUSAL, MASK)
        scores = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * scale
        dP = tl.dot(dos, tl.trans(vs), input_precision=PRECISION)
        log_r = tl.where(seen, scores * inverse[:, None] - sharp_base[:, None], HIDDEN)
        dT = tl.exp(log_r) * (dP - mean[:, None])
        total += tl.sum(dT * log_r, 1)
        direct = tl.dot(dT.to(ks.dtype), ks, direct, input_precision=PRECISION)
        log_p = tl.where(seen, scores - base[:, None], HIDDEN)
        dH = tl.exp(log_p) * (log_p + H[:, None])
        entropic = tl.dot(dH.to(ks.dtype), ks, entropic, input_precision=PRECISION)
    grad = tl.load(grad_entropy + at, mask=inside, other=0.0)
    grad += tl.load(slope + at, mask=inside, other=0.0) * total / inverse
    tl.store(through + at, grad, mask=inside)
    found = (direct * inverse[:, None] - entropic * grad[:, None]) * scale
    _store_rows(grad_q, batch, queries, heads, head, row, dim, inside, found, DIM)


@triton.jit
def grad_kv_kernel(
    q, k, v, mask, grad_out, entropy, lse, sharp, beta, delta, through, grad_k, grad_v,
    queries, keys, heads, kv_heads, dim, value_dim, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dK and dV of one kv head and a block of keys, summed over the heads of its group."""
    program, blocks = tl.program_id(0), tl.cdiv(keys, KEYS)
    kv, rest = program % kv_heads, program // kv_heads
    batch, block = (rest // blocks).to(tl.int64), rest % blocks
    key = block * KEYS + tl.arange(0, KEYS)
    known, group = key < keys, heads // kv_heads
    ks = _rows(k, batch, keys, kv_heads, kv, key, dim, known, DIM)
    vs = _rows(v, batch, keys, kv_heads, kv, key, value_dim, known, DIM)
    dks = tl.zeros((KEYS, DIM), tl.float32)
    dvs = tl.zeros((KEYS, DIM), tl.float32)
    above = 0
    if CAUSAL:
        above = tl.maximum(block * KEYS - (keys - queries), 0) // ROWS  # blocks of queries that see none of them
    steps = tl.maximum(tl.cdiv(queries, ROWS) - above, 0)
    # all tiles are transposed here, [keys, queries]
    for turn in range(0, group * steps):
        head = kv * group + turn // steps
        row = (above + turn % steps) * ROWS + tl.arange(0, ROWS)
        inside, at = row < queries, (batch * heads + head) * queries + row
        qs = _rows(q, batch, queries, heads, head, row, dim, inside, DIM)
        seen = _seen(batch, row[None, :], key[:, None], queries, keys, mask, CAUSAL, MASK)
        scores = tl.dot(ks, tl.trans(qs), input_precision=PRECISION) * scale
        inverse = tl.load(beta + at, mask=inside, other=1.0)
        sharp_base = _finite(tl.load(sharp + at, mask=inside, other=0.0))
        r = tl.exp(tl.where(seen, scores * inverse[None, :] - sharp_base[None, :], HIDDEN))
        dos = _rows(grad_out, batch, queries, heads, head, row, value_dim, inside, DIM)
        dvs = tl.dot(r.to(dos.dtype), dos, dvs, input_precision=PRECISION)
        mean = tl.load(delta + at, mask=inside, other=0.0)
        dS = inverse[None, :] * r * (tl.dot(vs, tl.trans(dos), input_precision=PRECISION) - mean[None, :])
        log_p = tl.where(seen, scores - _finite(tl.load(lse + at, mask=inside, other=0.0))[None, :], HIDDEN)
        H = tl.load(entropy + at, mask=inside, other=0.0)
        grad = tl.load(through + at, mask=inside, other=0.0)
        dS -= tl.exp(log_p) * (log_p + H[None, :]) * grad[None, :]
        dks = tl.dot(dS.to(qs.dtype), qs, dks, input_precision=PRECISION)
    _store_rows(grad_k, batch, keys, kv_heads, kv, key, dim, known, dks * scale, DIM)
    _store_rows(grad_v, batch, keys, kv_heads, kv, key, value_dim, known, dvs, DIM)


KERNELS = (entropy_kernel, forward_kernel, grad_q_kernel, grad_kv_kernel)


# rows, keys, warps and stages in half precision on Hopper, the fastest of dozens on an H100: for heads of up to 64,
# and of 128
TILES = (
    {
        entropy_kernel: (64, 64, 4, 1), forward_kernel: (64, 64, 4, 1),
        grad_q_kernel: (64, 64, 4, 1), grad_kv_kernel: (32, 64, 4, 3),
    },
    {
        entropy_kernel: (128, 64, 8, 3), forward_kernel: (64, 64, 4, 1),
        grad_q_kernel: (64, 64, 4, 1), grad_kv_kernel: (32, 128, 8, 1),
    },
)  # fmt: skip


def _options(kernel: Any, dtype: torch.dtype, precision: str, width: int, measured: bool) -> dict[str, Any]:
    """Compile-time constants, warps and stages; measured: for a chip that tiles have been measured on."""
    if measured and dtype.itemsize == 2:
        rows, keys, warps, stages = TILES[width == WIDTHS[-1]][kernel]
    else:
        full, exact = dtype == torch.float32, dtype == torch.float32 and precision == "ieee"
        side = SIDE if not full else SIDE // 2
        step = 16 if kernel is grad_kv_kernel and width == WIDTHS[-1] else max(16, side // 2)
        rows, keys = (step, side) if kernel is grad_kv_kernel else (side, step)
        # as few as hold the tiles on every chip
        if kernel is grad_kv_kernel:
            few = width >= 64 and full and not exact
        elif kernel is grad_q_kernel:
            few = width == 64 and full
        else:
            few = width == 32 and not exact and kernel is forward_kernel
        warps, stages = 4 if few else 8, 1
    sizes = {"ROWS": rows, "KEYS": keys, "DIM": width, "PRECISION": precision}
    return {**sizes, "num_warps": warps, "num_stages": stages}


class _Call:
    """What all kernels of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> None:
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        (self.batch, self.queries, self.heads, dim), (_, self.keys, self.kv_heads, value_dim) = q.shape, v.shape
        width = next(width for width in WIDTHS if max(dim, value_dim) <= width)
        self.kind = q.dtype, precision, width, is_hopper(q.device)
        self.arguments: dict[str, Any] = {
            **dict(zip("qkv", (x.contiguous() for x in (q, k, v)), strict=True)),
            "mask": None if mask is None else mask.contiguous().view(torch.uint8),
            "queries": self.queries, "keys": self.keys, "heads": self.heads, "kv_heads": self.kv_heads,
            "dim": dim, "value_dim": value_dim, "scale": scale, "CAUSAL": causal,
            "MASK": 0 if mask is None else mask.ndim - 1,
        }  # fmt: skip

    def __call__(self, kernel: Any, **more: Tensor) -> None:
        """Runs a kernel for all of its blocks."""
        options = _options(kernel, *self.kind)
        if kernel is grad_kv_kernel:
            programs = self.batch * self.kv_heads * triton.cdiv(self.keys, options["KEYS"])
        else:
            programs = self.batch * self.heads * triton.cdiv(self.queries, options["ROWS"])
        given = {**self.arguments, **more, **options}
        if programs:
            kernel[(programs,)](**{x: given[x] for x in given if x in kernel.arg_names or x.startswith("num_")})


def adaptive_temperature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    coefficients: Sequence[float],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    call = _Call(q, k, v, mask, causal, scale)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    entropy, lse, sharp = (
        torch.empty((call.batch, call.heads, call.queries), dtype=torch.float32, device=q.device) for _ in range(3)
    )
    call(entropy_kernel, lse=lse, entropy=entropy)
    beta, _ = inverse_temperature(entropy, coefficients, threshold)
    call(forward_kernel, beta=beta, out=out, sharp=sharp)
    return out, entropy, lse, sharp


def adaptive_temperature_attention_backward(
    grad_out: Tensor,
    grad_entropy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    entropy: Tensor,
    lse: Tensor,
    sharp: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    coefficients: Sequence[float],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    call = _Call(q, k, v, mask, causal, scale)
    beta, slope = inverse_temperature(entropy, coefficients, threshold)
    delta = (grad_out.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    grad_out, grad_entropy = grad_out.contiguous(), grad_entropy.contiguous()
    shared = {"grad_out": grad_out, "entropy": entropy, "lse": lse, "sharp": sharp, "beta": beta, "delta": delta}
    shared["through"] = torch.empty_like(entropy)
    grad_q, grad_k, grad_v = (torch.empty_like(call.arguments[name]) for name in "qkv")
    call(grad_q_kernel, **shared, grad_entropy=grad_entropy, slope=slope, grad_q=grad_q)
    call(grad_kv_kernel, **shared, grad_k=grad_k, grad_v=grad_v)
    return grad_q, grad_k, grad_v


def launches() -> list[Launch]:
    """The configurations for the static analysis: causal, and in half precision also with a mask of pairs."""
    found = []
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        half = dtype.itemsize == 2
        for width, kernel, mask, hopper in product(WIDTHS, KERNELS, (0, 2) if half else (0,), (False, True)):
            if hopper and not half:
                continue
            options = _options(kernel, dtype, precision, width, hopper)
            warps, stages = options.pop("num_warps"), options.pop("num_stages")
            launch = Launch(
                kernel, {**options, "CAUSAL": True, "MASK": mask}, dtype,
                states=("lse", "entropy", "beta", "sharp", "slope", "delta", "grad_entropy", "through"),
                integers=(), bytes=("mask",),
                scalars=("queries", "keys", "heads", "kv_heads", "dim", "value_dim"), floats=("scale",),
                absent=() if mask else ("mask",),
                warps=warps, stages=stages, label=f"{width} {precision}" + (" masked" if mask else ""),
                matmul=dtype != torch.float32, chips=chips(hopper, half), spills=MEASURED_SPILLS if hopper else 0,
            )  # fmt: skip
            found.append(launch)
    return found
