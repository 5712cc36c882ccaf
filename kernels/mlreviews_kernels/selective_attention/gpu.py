"""Triton kernels of `selective_attention`: F for a span of queries, then attention with F as a bias.

A span is a fixed number of queries, so that its F, shared by the heads, takes memory linear in the keys. Forward:
`select_kernel` accumulates F, `forward_kernel` is attention in tiles. Backward, from the last span to the first: F
again; its gradient, added up over the heads (`grad_selection_kernel`); what the selector's logits get of it
(`select_backward_kernel`); then `grad_q_kernel` by query blocks and `grad_kv_kernel` by key blocks. Nothing is added
atomically. In float32 products are exact unless `torch.set_float32_matmul_precision` asks for less.
"""

# Triton kernels are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlreviews_kernels.backends import is_hopper
from mlreviews_kernels.selective_attention import cpu
from mlreviews_kernels.softmaxes import WIDEST
from mlreviews_kernels.static import MEASURED_SPILLS, Launch, chips

LOG2_E = tl.constexpr(1.4426950408889634)
SIDE = 64  # queries and keys of a tile in half precision; half as many in float32
SPAN = 2048  # queries, of all sequences together, whose F is kept


@triton.jit
def _rows(pointer, batch, time, heads, head, row, dim, mask, DIM: tl.constexpr):
    """Some rows of one head of ``[batch, time, heads, dim]``, with zeros around them."""
    column = tl.arange(0, DIM)
    at = pointer + ((batch * time + row[:, None]) * heads + head) * dim + column[None, :]
    return tl.load(at, mask=mask[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, batch, time, heads, head, row, dim, mask, values, DIM: tl.constexpr):
    column = tl.arange(0, DIM)
    at = pointer + ((batch * time + row[:, None]) * heads + head) * dim + column[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=mask[:, None] & (column < dim)[None, :])


@triton.jit
def _selected(logits, counts, firsts, batch, queries, keys, row, column, inside):
    """Which logits of the selector select, and which keys the queries see: two masks."""
    position = keys - queries + row
    key_counts = tl.load(counts + batch * keys + column, mask=column < keys, other=0.0) > 0.0
    query_counts = tl.load(counts + batch * keys + position, mask=inside, other=0.0) > 0.0
    spared = column == tl.load(firsts + batch)
    earlier = (column[None, :] < position[:, None]) & (key_counts & ~spared)[None, :]
    visible = (column[None, :] <= position[:, None]) & key_counts[None, :]
    return earlier & query_counts[:, None] & (logits > 0.0), visible


@triton.jit
def select_kernel(
    q, k, counts, firsts, carry, F, queries, keys, heads, kv_heads, dim, selector, start, stop, scale,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """F of the queries of a span for one block of keys, infinite where they see nothing; carry goes to the next."""
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, SIDE)
    batch, block = (program // blocks).to(tl.int64), program % blocks
    column = block * SIDE + tl.arange(0, SIDE)
    ks = _rows(k, batch, keys, kv_heads, selector // (heads // kv_heads), column, dim, column < keys, DIM)
    total = tl.load(carry + batch * keys + column, mask=column < keys, other=0.0)
    above = tl.maximum(block * SIDE - (keys - queries) - start, 0) // SIDE * SIDE  # queries that see none of them
    for first in range(start + above, stop, SIDE):
        row = first + tl.arange(0, SIDE)
        inside = row < stop
        qs = _rows(q, batch, queries, heads, selector, row, dim, inside, DIM)
        logits = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * scale
        selects, visible = _selected(logits, counts, firsts, batch, queries, keys, row, column, inside)
        S = tl.where(selects, logits, 0.0)
        before = total[None, :] + (tl.cumsum(S, axis=0) - S)
        at = F + (batch * (stop - start) + row[:, None] - start) * keys + column[None, :]
        tl.store(at, tl.where(visible, before, float("inf")), mask=inside[:, None] & (column < keys)[None, :])
        total += tl.sum(S, axis=0)
    tl.store(carry + batch * keys + column, total, mask=column < keys)


@triton.jit
def _bias(F, batch, queries, keys, row, column, start, stop):
    """A tile of F, infinite where a query comes before the key: not all of that was written."""
    at = F + (batch * (stop - start) + row[:, None] - start) * keys + column[None, :]
    found = tl.load(at, mask=(row < stop)[:, None] & (column < keys)[None, :], other=float("inf"))
    return tl.where(column[None, :] <= keys - queries + row[:, None], found, float("inf"))


@triton.jit
def forward_kernel(
    q, k, v, F, out, lse, memory, queries, keys, heads, kv_heads, dim, v_dim, start, stop, scale, tau,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """softmax(L - F) V of one head and one block of queries; with head 0, the memory term."""
    program = tl.program_id(0)
    blocks = tl.cdiv(stop - start, SIDE)
    head, rest = program % heads, program // heads
    batch, block = (rest // blocks).to(tl.int64), blocks - 1 - rest % blocks  # the long ones first
    row = start + block * SIDE + tl.arange(0, SIDE)
    inside = row < stop
    kv_head = head // (heads // kv_heads)
    qs = _rows(q, batch, queries, heads, head, row, dim, inside, DIM)
    highest = tl.full((SIDE,), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((SIDE,), dtype=tl.float32)
    left = tl.zeros((SIDE,), dtype=tl.float32)
    outs = tl.zeros((SIDE, DIM), dtype=tl.float32)
    for first in range(0, tl.minimum(keys, keys - queries + start + (block + 1) * SIDE), STEP):
        column = first + tl.arange(0, STEP)
        ks = _rows(k, batch, keys, kv_heads, kv_head, column, dim, column < keys, DIM)
        F_tile = _bias(F, batch, queries, keys, row, column, start, stop)
        logits = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * (scale * LOG2_E) - F_tile * LOG2_E
        if head == 0:
            left += tl.sum(tl.where(F_tile < tau, 1.0 - F_tile / tau, 0.0), axis=1)
        most = tl.maximum(highest, tl.max(logits, axis=1))
        shift = tl.where(most == float("-inf"), 0.0, most)
        weights = tl.exp2(logits - shift[:, None])
        kept = tl.exp2(highest - shift)
        sums = sums * kept + tl.sum(weights, axis=1)
        vs = _rows(v, batch, keys, kv_heads, kv_head, column, v_dim, column < keys, DIM)
        outs = outs * kept[:, None]
        outs += tl.dot(weights.to(vs.dtype), vs, input_precision=PRECISION)
        highest = most
    some = sums > 0.0
    safe = tl.where(some, sums, 1.0)
    _store_rows(out, batch, queries, heads, head, row, v_dim, inside, outs / safe[:, None], DIM)
    found = tl.where(some, highest / LOG2_E + tl.log(safe), float("-inf"))
    tl.store(lse + (batch * heads + head) * queries + row, found, mask=inside)
    if head == 0:
        tl.store(memory + batch * queries + row, left, mask=inside)


@triton.jit
def _weights(qs, ks, vs, dos, F_tile, shift, mean, scale, PRECISION: tl.constexpr):
    """P and the gradient of its logits."""
    logits = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * (scale * LOG2_E) - F_tile * LOG2_E
    P = tl.exp2(logits - shift[:, None])
    dP = tl.dot(dos, tl.trans(vs), input_precision=PRECISION)
    return P, P * (dP - mean[:, None])


@triton.jit
def _statistics(lse, delta, at, row, inside):
    shift = tl.load(lse + at + row, mask=inside, other=0.0)
    return tl.where(shift == float("-inf"), 0.0, shift) * LOG2_E, tl.load(delta + at + row, mask=inside, other=0.0)


@triton.jit
def grad_selection_kernel(
    q, k, v, grad_out, F, lse, delta, grad_memory, grad_F,
    queries, keys, heads, kv_heads, dim, v_dim, start, stop, scale, tau,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of F, from all heads and the memory term."""
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, STEP)
    block, rest = program % blocks, program // blocks
    row_blocks = tl.cdiv(stop - start, SIDE)
    batch, row_block = (rest // row_blocks).to(tl.int64), rest % row_blocks
    row = start + row_block * SIDE + tl.arange(0, SIDE)
    column = block * STEP + tl.arange(0, STEP)
    inside = row < stop
    if block * STEP <= keys - queries + start + (row_block + 1) * SIDE - 1:
        F_tile = _bias(F, batch, queries, keys, row, column, start, stop)
        less = tl.load(grad_memory + batch * queries + row, mask=inside, other=0.0) / tau
        grads = tl.where(F_tile <= tau, -less[:, None], 0.0)
        for head in range(0, heads):
            kv_head = head // (heads // kv_heads)
            qs = _rows(q, batch, queries, heads, head, row, dim, inside, DIM)
            dos = _rows(grad_out, batch, queries, heads, head, row, v_dim, inside, DIM)
            ks = _rows(k, batch, keys, kv_heads, kv_head, column, dim, column < keys, DIM)
            vs = _rows(v, batch, keys, kv_heads, kv_head, column, v_dim, column < keys, DIM)
            shift, mean = _statistics(lse, delta, (batch * heads + head) * queries, row, inside)
            grads -= _weights(qs, ks, vs, dos, F_tile, shift, mean, scale, PRECISION)[1]
        at = grad_F + (batch * (stop - start) + row[:, None] - start) * keys + column[None, :]
        tl.store(at, grads, mask=inside[:, None] & (column < keys)[None, :])


@triton.jit
def select_backward_kernel(
    q, k, counts, firsts, carry, grad_F, queries, keys, heads, kv_heads, dim, selector, start, stop, scale,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The gradient of F becomes that of the selector's logits; carry is what F gets from later queries."""
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, SIDE)
    batch, block = (program // blocks).to(tl.int64), program % blocks
    column = block * SIDE + tl.arange(0, SIDE)
    ks = _rows(k, batch, keys, kv_heads, selector // (heads // kv_heads), column, dim, column < keys, DIM)
    later = tl.load(carry + batch * keys + column, mask=column < keys, other=0.0)
    above = tl.maximum(block * SIDE - (keys - queries) - start, 0) // SIDE
    row_blocks = tl.cdiv(stop - start, SIDE)
    for step in range(0, row_blocks - above):
        row = start + (row_blocks - 1 - step) * SIDE + tl.arange(0, SIDE)
        inside = row < stop
        qs = _rows(q, batch, queries, heads, selector, row, dim, inside, DIM)
        logits = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * scale
        selects, visible = _selected(logits, counts, firsts, batch, queries, keys, row, column, inside)
        at = grad_F + (batch * (stop - start) + row[:, None] - start) * keys + column[None, :]
        mask = inside[:, None] & (column < keys)[None, :]
        grads = tl.where(visible, tl.load(at, mask=mask, other=0.0), 0.0)  # the rest may not have been written
        total = tl.sum(grads, axis=0)
        below = later[None, :] + (total[None, :] - tl.cumsum(grads, axis=0))
        tl.store(at, tl.where(selects, below, 0.0), mask=mask)
        later += total
    tl.store(carry + batch * keys + column, later, mask=column < keys)


@triton.jit
def grad_q_kernel(
    q, k, v, grad_out, F, lse, delta, grad_logits, grad_q,
    queries, keys, heads, kv_heads, dim, v_dim, selector, start, stop, scale,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dQ of one head and one block of queries."""
    program = tl.program_id(0)
    blocks = tl.cdiv(stop - start, SIDE)
    head, rest = program % heads, program // heads
    batch, block = (rest // blocks).to(tl.int64), blocks - 1 - rest % blocks
    row = start + block * SIDE + tl.arange(0, SIDE)
    inside = row < stop
    kv_head = head // (heads // kv_heads)
    qs = _rows(q, batch, queries, heads, head, row, dim, inside, DIM)
    dos = _rows(grad_out, batch, queries, heads, head, row, v_dim, inside, DIM)
    shift, mean = _statistics(lse, delta, (batch * heads + head) * queries, row, inside)
    dqs = tl.zeros((SIDE, DIM), dtype=tl.float32)
    for first in range(0, tl.minimum(keys, keys - queries + start + (block + 1) * SIDE), STEP):
        column = first + tl.arange(0, STEP)
        ks = _rows(k, batch, keys, kv_heads, kv_head, column, dim, column < keys, DIM)
        vs = _rows(v, batch, keys, kv_heads, kv_head, column, v_dim, column < keys, DIM)
        F_tile = _bias(F, batch, queries, keys, row, column, start, stop)
        _, dL = _weights(qs, ks, vs, dos, F_tile, shift, mean, scale, PRECISION)
        # what the selector's logits get through F, of what its queries see: the rest was not written
        limit = tl.where(head == selector, float("inf"), float("-inf"))
        at = grad_logits + (batch * (stop - start) + row[:, None] - start) * keys + column[None, :]
        dL += tl.load(at, mask=F_tile < limit, other=0.0)
        dqs += tl.dot(dL.to(ks.dtype), ks, input_precision=PRECISION)
    _store_rows(grad_q, batch, queries, heads, head, row, dim, inside, dqs * scale, DIM)


@triton.jit
def grad_kv_kernel(
    q, k, v, grad_out, F, lse, delta, grad_logits, grad_k, grad_v,
    queries, keys, heads, kv_heads, dim, v_dim, selector, start, stop, scale,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """dK and dV of one kv head and one block of keys, on top of what later spans gave."""
    program = tl.program_id(0)
    blocks = tl.cdiv(keys, SIDE)
    kv_head, rest = program % kv_heads, program // kv_heads
    batch, block = (rest // blocks).to(tl.int64), rest % blocks
    column = block * SIDE + tl.arange(0, SIDE)
    known = column < keys
    ks = _rows(k, batch, keys, kv_heads, kv_head, column, dim, known, DIM)
    vs = _rows(v, batch, keys, kv_heads, kv_head, column, v_dim, known, DIM)
    dks = _rows(grad_k, batch, keys, kv_heads, kv_head, column, dim, known, DIM)
    dvs = _rows(grad_v, batch, keys, kv_heads, kv_head, column, v_dim, known, DIM)
    above = tl.maximum(block * SIDE - (keys - queries) - start, 0) // STEP
    steps = tl.cdiv(stop - start, STEP) - above
    # all tiles are transposed here, [keys, queries]
    for turn in range(0, (heads // kv_heads) * steps):
        head = kv_head * (heads // kv_heads) + turn // steps
        row = start + (above + turn % steps) * STEP + tl.arange(0, STEP)
        inside = row < stop
        qs = _rows(q, batch, queries, heads, head, row, dim, inside, DIM)
        dos = _rows(grad_out, batch, queries, heads, head, row, v_dim, inside, DIM)
        shift, mean = _statistics(lse, delta, (batch * heads + head) * queries, row, inside)
        at = (batch * (stop - start) + row[None, :] - start) * keys + column[:, None]
        F_tile = tl.load(F + at, mask=inside[None, :] & known[:, None], other=float("inf"))
        F_tile = tl.where(column[:, None] <= keys - queries + row[None, :], F_tile, float("inf"))
        logits = tl.dot(ks, tl.trans(qs), input_precision=PRECISION) * (scale * LOG2_E) - F_tile * LOG2_E
        P = tl.exp2(logits - shift[None, :])
        dvs += tl.dot(P.to(dos.dtype), dos, input_precision=PRECISION)
        dL = P * (tl.dot(vs, tl.trans(dos), input_precision=PRECISION) - mean[None, :])
        limit = tl.where(head == selector, float("inf"), float("-inf"))
        dL += tl.load(grad_logits + at, mask=F_tile < limit, other=0.0)
        dks += tl.dot((dL * scale).to(qs.dtype), qs, input_precision=PRECISION)
    _store_rows(grad_k, batch, keys, kv_heads, kv_head, column, dim, known, dks, DIM)
    _store_rows(grad_v, batch, keys, kv_heads, kv_head, column, v_dim, known, dvs, DIM)


# side, step, warps and stages in half precision on Hopper, the fastest of dozens on an H100: for heads of up to 64,
# and of 128
TILES = (
    {
        select_kernel: (64, 0, 8, 1), forward_kernel: (64, 64, 4, 2), grad_selection_kernel: (64, 64, 4, 3),
        select_backward_kernel: (64, 0, 4, 1), grad_q_kernel: (64, 64, 4, 1), grad_kv_kernel: (64, 64, 4, 1),
    },
    {
        select_kernel: (64, 0, 8, 1), forward_kernel: (64, 64, 4, 1), grad_selection_kernel: (64, 64, 4, 3),
        select_backward_kernel: (64, 0, 8, 1), grad_q_kernel: (64, 64, 4, 1), grad_kv_kernel: (64, 32, 4, 1),
    },
)  # fmt: skip


def _options(kernel: Any, dtype: torch.dtype, precision: str, width: int, measured: bool) -> dict[str, Any]:
    """Compile-time constants, warps and stages.

    Args:
        kernel: one of the above.
        dtype: of q, k and v.
        precision: of products in float32.
        width: of the heads: 32, 64 or 128.
        measured: whether it is for a chip that tiles have been measured on; elsewhere they are what doesn't spill.
    """
    half = dtype.itemsize == 2
    if half and measured:
        side, step, warps, stages = TILES[width == WIDEST][kernel]
    else:
        exact = not half and precision == "ieee"
        # float32 products take registers for both factors
        side = SIDE if half else SIDE // 2
        short = width == WIDEST or exact or (half and width == 64 and kernel is not forward_kernel)
        step = max(16, side // 2) if short else side
        if kernel is grad_kv_kernel:  # it holds four tiles
            step = max(16, side // (4 if width == WIDEST else 2))
        if exact and width == WIDEST and kernel in (grad_selection_kernel, select_backward_kernel, grad_kv_kernel):
            side = max(16, side // 2)
        if kernel is select_kernel:
            few = True
        elif kernel is select_backward_kernel:
            few = not half and not (exact and width == WIDEST)
        elif kernel is grad_kv_kernel:
            few = exact and width == 64
        elif kernel is forward_kernel and exact:
            few = width != 32
        elif kernel is grad_q_kernel and not half:
            few = width != 64
        else:
            few = width == 32
        warps, stages = 4 if few else 8, 1
    steps = {"STEP": step} if "STEP" in kernel.arg_names else {}
    return {"SIDE": side, "DIM": width, "PRECISION": precision, **steps, "num_warps": warps, "num_stages": stages}


class _Spans:
    """What the spans of one call share: its numbers, which tokens count, and F span by span."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, selector: int, scale: float) -> None:
        self.q, self.k, self.selector, self.scale = q, k, selector, scale
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        width = next(width for width in (32, 64, WIDEST) if max(q.shape[3], v.shape[3]) <= width)
        self.kind = q.dtype, precision, width, is_hopper(q.device)
        self.batch, self.queries, self.heads, dim = q.shape
        self.keys, self.kv_heads = k.shape[1:3]
        self.dims = (dim, v.shape[3])
        self.counts = mask.to(torch.float32)
        self.firsts = mask.to(torch.int32).argmax(1)

    def bounds(self) -> list[tuple[int, int]]:
        span = max(SPAN // self.batch, SPAN // 8)
        return [(start, min(start + span, self.queries)) for start in range(0, self.queries, span)]

    def sizes(self) -> tuple[int, int, int, int]:
        return self.queries, self.keys, self.heads, self.kv_heads

    def select(self, carry: Tensor, start: int, stop: int) -> Tensor:
        """F of a span; carry, that of its first query, becomes that of the query after its last one."""
        F = self.q.new_empty((self.batch, stop - start, self.keys), dtype=torch.float32)
        self._by_keys(select_kernel, carry, F, start, stop)
        return F

    def select_backward(self, carry: Tensor, grad_F: Tensor, start: int, stop: int) -> None:
        """grad_F becomes the gradient of the selector's logits; carry, that of F after the span, that before it."""
        self._by_keys(select_backward_kernel, carry, grad_F, start, stop)

    def _by_keys(self, kernel: Any, carry: Tensor, F: Tensor, start: int, stop: int) -> None:
        options = _options(kernel, *self.kind)
        kernel[(self.batch * triton.cdiv(self.keys, options["SIDE"]),)](
            self.q, self.k, self.counts, self.firsts, carry, F, *self.sizes(), self.dims[0], self.selector,
            start, stop, self.scale, **options,
        )  # fmt: skip

    def run(self, kernel: Any, tensors: tuple[Tensor, ...], start: int, stop: int, *numbers: float) -> None:
        """Runs one of the other kernels for all of its blocks."""
        options = _options(kernel, *self.kind)
        blocks = triton.cdiv(self.keys if kernel is grad_kv_kernel else stop - start, options["SIDE"])
        if kernel is grad_selection_kernel:
            each = triton.cdiv(self.keys, options["STEP"])
        else:
            each = self.kv_heads if kernel is grad_kv_kernel else self.heads
        kernel[(self.batch * blocks * each,)](*tensors, *self.sizes(), *self.dims, *numbers, **options)


def selective_attention(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, mask: Tensor, selector: int, scale: float, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    if q.numel() == 0:
        return cpu.vectorised(q, k, v, initial, mask, selector, scale, tau)
    q, k, v = (x.contiguous() for x in (q, k, v))
    spans = _Spans(q, k, v, mask, selector, scale)
    batch, queries, heads = q.shape[:3]
    out = q.new_empty((batch, queries, heads, v.shape[3]))
    lse, memory = initial.new_empty((batch, heads, queries)), initial.new_empty((batch, queries))
    selection = initial.clone(memory_format=torch.contiguous_format)
    for start, stop in spans.bounds():
        F = spans.select(selection, start, stop)
        spans.run(forward_kernel, (q, k, v, F, out, lse, memory), start, stop, start, stop, scale, tau)
    return out, lse, selection, memory


def selective_attention_backward(
    grad_out: Tensor,
    grad_selection: Tensor,
    grad_memory: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor,
    mask: Tensor,
    out: Tensor,
    lse: Tensor,
    selector: int,
    scale: float,
    tau: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the initial selection."""
    if q.numel() == 0:
        grads = (grad_out, grad_selection, grad_memory)
        return cpu.vectorised_backward(*grads, q, k, v, initial, mask, selector, scale, tau)
    grad_out, grad_memory, q, k, v = (x.contiguous() for x in (grad_out, grad_memory, q, k, v))
    spans = _Spans(q, k, v, mask, selector, scale)
    bounds = spans.bounds()
    delta = (grad_out.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    carries = [initial.clone(memory_format=torch.contiguous_format)]  # F of each span's first query
    for start, stop in bounds[:-1]:
        carries.append(carries[-1].clone())
        spans.select(carries[-1], start, stop)
    grad_initial = grad_selection.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for (start, stop), carry in zip(reversed(bounds), reversed(carries), strict=True):
        F = spans.select(carry, start, stop)
        grad_F = torch.empty_like(F)
        shared, rest = (q, k, v, grad_out, F, lse, delta), (selector, start, stop, scale)
        spans.run(grad_selection_kernel, (*shared, grad_memory, grad_F), start, stop, start, stop, scale, tau)
        spans.select_backward(grad_initial, grad_F, start, stop)
        spans.run(grad_q_kernel, (*shared, grad_F, grad_q), start, stop, *rest)
        spans.run(grad_kv_kernel, (*shared, grad_F, grad_k, grad_v), start, stop, *rest)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_initial


def launches() -> list[Launch]:
    """Every configuration that can be chosen, for the static analysis."""
    kernels: tuple[Callable[..., Any], ...] = (
        select_kernel, forward_kernel, grad_selection_kernel, select_backward_kernel, grad_q_kernel, grad_kv_kernel
    )  # fmt: skip
    found = []
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        half = dtype.itemsize == 2
        for width, kernel, hopper in product((32, 64, WIDEST), kernels, (False, True) if half else (False,)):
            options = _options(kernel, dtype, precision, width, hopper)
            warps, stages = options.pop("num_warps"), options.pop("num_stages")
            launch = Launch(
                kernel,
                options,
                dtype,
                states=("F", "carry", "counts", "lse", "memory", "delta", "grad_memory", "grad_F", "grad_logits",
                        "grad_k", "grad_v"),
                integers=("firsts",),
                scalars=("queries", "keys", "heads", "kv_heads", "dim", "v_dim", "selector", "start", "stop"),
                floats=("scale", "tau"),
                warps=warps,
                stages=stages,
                label=f"{options['SIDE']}x{width} {precision}",
                matmul=dtype != torch.float32,
                chips=chips(hopper, half),
                spills=MEASURED_SPILLS if hopper else 0,
            )  # fmt: skip
            found.append(launch)
    return found
