"""Triton kernels of `ssd`, forward and backward, on chunks that run at the same time.

Forward: what each chunk adds to the state (`added_kernel`); the states at the chunks' borders, one after another
(`pass_kernel`); the outputs (`output_kernel`). Backward: the borders again, the gradients of the borders by the same
two kernels in reverse, then x and log_a by head (`grad_x_kernel`) and B and C by group (`grad_bc_kernel`). The formulas
are those of ``README.md``. Every matrix product is a `tl.dot`. In float32 it is exact unless
`torch.set_float32_matmul_precision` asks for less.
"""

# Triton kernels are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlreviews_kernels.backends import is_hopper
from mlreviews_kernels.chunks_gpu import chunk_at, first_row, rows
from mlreviews_kernels.ssd.reference import Inputs
from mlreviews_kernels.static import MEASURED_SPILLS, Launch, chips

LONGEST, SHORTEST = 64, 16  # steps of a chunk: the one or the other; tl.dot takes no fewer than 16
WIDEST = 64  # columns of a tile
NARROW, THIN = 32, 16  # of a tile of grad_x_kernel and grad_bc_kernel, which keep more of them
HEADS = 4  # heads whose dB and dC one program adds up
PASSED = 1024  # elements of a state that one program of `pass_kernel` carries


@triton.jit
def _log_decay(log_a, heads, row, inside):
    """log_a of a chunk with resets as 0, and how many resets there were up to each step."""
    step = tl.load(log_a + row * heads, mask=inside, other=0.0)
    reset = step == float("-inf")
    count = tl.cumsum(reset.to(tl.int32), axis=0)
    return tl.where(reset, 0.0, step), count, tl.sum(reset.to(tl.int32), axis=0)


@triton.jit
def _decays(log_a, heads, row, inside):
    """The running sum in two floats (differences of large sums would lose what is small), resets, e, f and e_end."""
    step, count, resets = _log_decay(log_a, heads, row, inside)
    exact = step.to(tl.float64)
    total = tl.cumsum(exact, axis=0)
    rest = tl.sum(exact, axis=0) - total
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    since_start = tl.where(count == 0, tl.exp(high), 0.0)
    to_end = tl.where(count == resets, tl.exp(rest.to(tl.float32)), 0.0)
    whole = tl.where(resets == 0, tl.exp(tl.sum(step, axis=0)), 0.0)
    return high, low, count, since_start, to_end, whole


@triton.jit
def _between(high, low, count, TIME: tl.constexpr):
    """L: exp of a sum over the steps between, 0 above the diagonal and across resets; masked before exp."""
    row = tl.arange(0, TIME)
    gap = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    together = (row[:, None] >= row[None, :]) & (count[:, None] == count[None, :])
    return tl.exp(tl.where(together, gap, float("-inf")))


@triton.jit
def _load(pointer, rows, stride, columns, row_mask, column_mask):
    mask = row_mask[:, None] & column_mask[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _bounds(chunk, most, offsets, sequences, TIME: tl.constexpr):
    """Where a chunk begins and how many steps it has; none or fewer, where there are not so many chunks."""
    _, begin, end, start = chunk_at(chunk, most, offsets, sequences, TIME)
    return begin + start, tl.minimum(end - begin - start, TIME).to(tl.int32)


@triton.jit
def added_kernel(
    x, log_a, B, offsets, added, wholes, sequences, heads, groups, dim, state,
    FROM_START: tl.constexpr, PRECISION: tl.constexpr,
    TIME: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """B^T (f o X) of a chunk; with FROM_START, C^T (e o dY), when x is dY and B is C."""
    program = tl.program_id(0).to(tl.int64)
    chunk, head = program // heads, program % heads
    begin, steps = _bounds(chunk, tl.num_programs(0) // heads, offsets, sequences, TIME)
    row = tl.arange(0, TIME)
    inside = row < steps
    p = tl.program_id(1) * DIM + tl.arange(0, DIM)
    n = tl.program_id(2) * STATE + tl.arange(0, STATE)
    _, _, _, since_start, to_end, whole = _decays(log_a + begin * heads + head, heads, row, inside)
    weight = since_start if FROM_START else to_end
    xs = _load(x + (begin * heads + head) * dim, row, heads * dim, p, inside, p < dim)
    Bs = _load(B + (begin * groups + head // (heads // groups)) * state, row, groups * state, n, inside, n < state)
    xs = (xs.to(tl.float32) * weight[:, None]).to(x.dtype.element_ty)
    tile = tl.dot(tl.trans(Bs), xs, input_precision=PRECISION)
    mask = (n < state)[:, None] & (p < dim)[None, :]
    tl.store(added + program * state * dim + n[:, None] * dim + p[None, :], tile, mask=mask)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(wholes + program, whole)


@triton.jit
def pass_kernel(
    added, wholes, initial, offsets, final, heads, size, time, REVERSE: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """S_{c+1} = e_end S_c + what chunk c adds, which S_c takes the place of; REVERSE: from the last chunk on."""
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // heads, program % heads
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    first = first_row(sequence, begin, time)
    last = first + (end - begin + time - 1) // time
    i = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    mask = i < size
    state = tl.load(initial + program * size + i, mask=mask, other=0.0)
    for step in range(0, last - first):
        chunk = last - 1 - step if REVERSE else first + step
        at = added + (chunk * heads + head) * size + i
        more = tl.load(at, mask=mask, other=0.0)
        tl.store(at, state, mask=mask)
        state = tl.load(wholes + chunk * heads + head) * state + more
    tl.store(final + program * size + i, state, mask=mask)


@triton.jit
def output_kernel(
    x, log_a, B, C, D, offsets, states, y, sequences, heads, groups, dim, state,
    PRECISION: tl.constexpr, TIME: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Y = M X + e o (C S) + D X."""
    program = tl.program_id(0).to(tl.int64)
    chunk, head = program // heads, program % heads
    begin, steps = _bounds(chunk, tl.num_programs(0) // heads, offsets, sequences, TIME)
    row = tl.arange(0, TIME)
    inside = row < steps
    p = tl.program_id(1) * DIM + tl.arange(0, DIM)
    at_group = (begin * groups + head // (heads // groups)) * state
    scores = tl.zeros((TIME, TIME), dtype=tl.float32)
    ys = tl.zeros((TIME, DIM), dtype=tl.float32)
    for start in range(0, state, STATE):
        n = start + tl.arange(0, STATE)
        Bs = _load(B + at_group, row, groups * state, n, inside, n < state)
        Cs = _load(C + at_group, row, groups * state, n, inside, n < state)
        S = _load(states + program * state * dim, n, dim, p, n < state, p < dim)
        scores += tl.dot(Cs, tl.trans(Bs), input_precision=PRECISION)
        ys += tl.dot(Cs, S.to(C.dtype.element_ty), input_precision=PRECISION)
    high, low, count, since_start, _, _ = _decays(log_a + begin * heads + head, heads, row, inside)
    xs = _load(x + (begin * heads + head) * dim, row, heads * dim, p, inside, p < dim)
    M = (scores * _between(high, low, count, TIME)).to(x.dtype.element_ty)
    ys = ys * since_start[:, None] + tl.dot(M, xs, input_precision=PRECISION)
    ys += tl.load(D + head) * xs.to(tl.float32)
    at = y + (begin * heads + head) * dim + row[:, None] * (heads * dim) + p[None, :]
    tl.store(at, ys.to(y.dtype.element_ty), mask=inside[:, None] & (p < dim)[None, :])


@triton.jit
def grad_x_kernel(
    grad_y, x, log_a, B, C, D, offsets, states, grad_states, grad_x, grad_log_a, grad_D,
    tokens, sequences, heads, groups, dim, state,
    PRECISION: tl.constexpr, TIME: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """dX = M^T dY + f o (B dS') + D dY; and from y . dy - x . dx and <S', dS'> the gradient of log_a."""
    program = tl.program_id(0).to(tl.int64)
    chunk, head = program // heads, program % heads
    begin, steps = _bounds(chunk, tl.num_programs(0) // heads, offsets, sequences, TIME)
    row = tl.arange(0, TIME)
    inside = row < steps
    p = tl.program_id(1) * DIM + tl.arange(0, DIM)
    at_group = (begin * groups + head // (heads // groups)) * state
    scores = tl.zeros((TIME, TIME), dtype=tl.float32)
    from_state = tl.zeros((TIME, DIM), dtype=tl.float32)
    from_grad = tl.zeros((TIME, DIM), dtype=tl.float32)
    kept = tl.zeros((DIM,), dtype=tl.float32)
    for start in range(0, state, STATE):
        n = start + tl.arange(0, STATE)
        Bs = _load(B + at_group, row, groups * state, n, inside, n < state)
        Cs = _load(C + at_group, row, groups * state, n, inside, n < state)
        S = _load(states + program * state * dim, n, dim, p, n < state, p < dim)
        dS = _load(grad_states + program * state * dim, n, dim, p, n < state, p < dim)
        kept += tl.sum(S * dS, axis=0)
        scores += tl.dot(Cs, tl.trans(Bs), input_precision=PRECISION)
        from_state += tl.dot(Cs, S.to(C.dtype.element_ty), input_precision=PRECISION)
        from_grad += tl.dot(Bs, dS.to(B.dtype.element_ty), input_precision=PRECISION)
    high, low, count, since_start, to_end, whole = _decays(log_a + begin * heads + head, heads, row, inside)
    xs = _load(x + (begin * heads + head) * dim, row, heads * dim, p, inside, p < dim)
    dys = _load(grad_y + (begin * heads + head) * dim, row, heads * dim, p, inside, p < dim)
    M = (scores * _between(high, low, count, TIME)).to(x.dtype.element_ty)
    from_grad *= to_end[:, None]
    ys = from_state * since_start[:, None] + tl.dot(M, xs, input_precision=PRECISION)
    dxs = from_grad + tl.dot(tl.trans(M), dys, input_precision=PRECISION)
    xs, dys = xs.to(tl.float32), dys.to(tl.float32)
    change = tl.sum(ys * dys - xs * dxs, axis=1)
    given = tl.sum(tl.sum(xs * from_grad, axis=1), axis=0) + whole * tl.sum(kept, axis=0)
    # the sum from each step on
    grad = given + tl.sum(change, axis=0) - tl.cumsum(change, axis=0) + change
    part = tl.program_id(1).to(tl.int64)
    tl.store(grad_log_a + (part * tokens + begin) * heads + head + row * heads, grad, mask=inside)
    skipped = tl.sum(tl.sum(xs * dys, axis=1), axis=0)
    tl.store(grad_D + program * tl.num_programs(1) + part, skipped)
    dxs += tl.load(D + head) * dys
    at = grad_x + (begin * heads + head) * dim + row[:, None] * (heads * dim) + p[None, :]
    tl.store(at, dxs.to(grad_x.dtype.element_ty), mask=inside[:, None] & (p < dim)[None, :])


@triton.jit
def grad_bc_kernel(
    grad_y, x, log_a, B, C, offsets, states, grad_states, grad_B, grad_C,
    tokens, sequences, heads, groups, dim, state, splits,
    PRECISION: tl.constexpr, HEADS: tl.constexpr, TIME: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """dC = (sum L o dY X^T) B + sum (e o dY) S^T and dB = (sum L o dY X^T)^T C + sum (f o X) dS'^T of some heads."""
    program = tl.program_id(0).to(tl.int64)
    split, group, chunk = program % splits, program // splits % groups, program // splits // groups
    begin, steps = _bounds(chunk, tl.num_programs(0) // splits // groups, offsets, sequences, TIME)
    row = tl.arange(0, TIME)
    inside = row < steps
    n = tl.program_id(1) * STATE + tl.arange(0, STATE)
    per_group = heads // groups
    first = split * HEADS
    sums = tl.zeros((TIME, TIME), dtype=tl.float32)
    dB = tl.zeros((TIME, STATE), dtype=tl.float32)
    dC = tl.zeros((TIME, STATE), dtype=tl.float32)
    for one in range(first, tl.minimum(first + HEADS, per_group)):
        head = group * per_group + one
        high, low, count, since_start, to_end, _ = _decays(log_a + begin * heads + head, heads, row, inside)
        products = tl.zeros((TIME, TIME), dtype=tl.float32)
        at_state = (chunk * heads + head) * state * dim
        for start in range(0, dim, DIM):
            p = start + tl.arange(0, DIM)
            xs = _load(x + (begin * heads + head) * dim, row, heads * dim, p, inside, p < dim)
            dys = _load(grad_y + (begin * heads + head) * dim, row, heads * dim, p, inside, p < dim)
            S = _load(states + at_state, n, dim, p, n < state, p < dim).to(x.dtype.element_ty)
            dS = _load(grad_states + at_state, n, dim, p, n < state, p < dim).to(x.dtype.element_ty)
            products += tl.dot(dys, tl.trans(xs), input_precision=PRECISION)
            dys = (dys.to(tl.float32) * since_start[:, None]).to(x.dtype.element_ty)
            xs = (xs.to(tl.float32) * to_end[:, None]).to(x.dtype.element_ty)
            dC += tl.dot(dys, tl.trans(S), input_precision=PRECISION)
            dB += tl.dot(xs, tl.trans(dS), input_precision=PRECISION)
        sums += products * _between(high, low, count, TIME)
    Bs = _load(B + (begin * groups + group) * state, row, groups * state, n, inside, n < state)
    Cs = _load(C + (begin * groups + group) * state, row, groups * state, n, inside, n < state)
    sums = sums.to(x.dtype.element_ty)
    dC += tl.dot(sums, Bs, input_precision=PRECISION)
    dB += tl.dot(tl.trans(sums), Cs, input_precision=PRECISION)
    at = ((split * tokens + begin) * groups + group) * state + row[:, None] * (groups * state) + n[None, :]
    mask = inside[:, None] & (n < state)[None, :]
    tl.store(grad_B + at, dB, mask=mask)
    tl.store(grad_C + at, dC, mask=mask)


class _Tiles(NamedTuple):
    """Compile-time sizes. Few, so that all of them can be looked at: what is smaller is filled up with zeros."""

    time: int
    dim: int
    state: int


def _tiles(chunk_size: int, dtype: torch.dtype) -> _Tiles:
    # float32 products take registers for both factors
    part = 1 if dtype.itemsize == 2 else 2
    return _Tiles(LONGEST // part if chunk_size >= LONGEST else SHORTEST, WIDEST // part, WIDEST // part)


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# in half precision on Hopper, with 4 warps: the fastest on an H100
STAGES = {added_kernel: 2, output_kernel: 2, grad_x_kernel: 3, grad_bc_kernel: 3}


def _options(kernel: Any, tiles: _Tiles, hopper: bool) -> dict[str, int]:
    """Warps and stages; elsewhere as few warps as spill nothing."""
    half = tiles.dim == WIDEST
    if half and hopper:
        return {"num_warps": 4, "num_stages": STAGES[kernel]}
    return {"num_warps": 8 if half else 4, "num_stages": 1}


def _borders(
    x: Tensor, log_a: Tensor, B: Tensor, initial: Tensor, offsets: Tensor, tiles: _Tiles, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States at the beginnings of the chunks and the last one; reverse: gradients of those at their ends."""
    sequences, heads, state, dim = initial.shape
    most = rows(x.shape[0], sequences, tiles.time)
    states = torch.empty((most, heads, state, dim), dtype=torch.float32, device=x.device)
    wholes = torch.empty((most, heads), dtype=torch.float32, device=x.device)
    final = torch.empty_like(initial)
    grid = (most * heads, triton.cdiv(dim, tiles.dim), triton.cdiv(state, tiles.state))
    added_kernel[grid](
        x, log_a, B, offsets, states, wholes, sequences, heads, B.shape[1], dim, state,
        FROM_START=reverse, PRECISION=_precision(), TIME=tiles.time, DIM=tiles.dim, STATE=tiles.state,
        **_options(added_kernel, tiles, is_hopper(x.device)),
    )  # fmt: skip
    pass_kernel[(sequences * heads, triton.cdiv(state * dim, PASSED))](
        states, wholes, initial, offsets, final, heads, state * dim, tiles.time,
        REVERSE=reverse, SIZE=PASSED, num_warps=4, num_stages=1,
    )  # fmt: skip
    return states, final


def ssd(given: Inputs, offsets: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    x, log_a, B, C, initial, D = _contiguous(given)
    heads, dim = x.shape[1:]
    y = torch.empty_like(x)
    tiles = _tiles(chunk_size, x.dtype)
    states, final = _borders(x, log_a, B, initial, offsets, tiles, reverse=False)
    output_kernel[(len(states) * heads, triton.cdiv(dim, tiles.dim))](
        x, log_a, B, C, D, offsets, states, y, len(initial), heads, B.shape[1], dim, B.shape[2],
        PRECISION=_precision(), TIME=tiles.time, DIM=tiles.dim, STATE=tiles.state,
        **_options(output_kernel, tiles, is_hopper(x.device)),
    )  # fmt: skip
    return y, final


def ssd_backward(
    grad_y: Tensor, grad_final: Tensor, given: Inputs, offsets: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of what is given."""
    x, log_a, B, C, initial, D = _contiguous(given)
    grad_y, grad_final = grad_y.contiguous(), grad_final.contiguous()
    (tokens, heads, dim), (groups, state) = x.shape, B.shape[1:]
    tiles = _tiles(chunk_size, x.dtype)
    states, _ = _borders(x, log_a, B, initial, offsets, tiles, reverse=False)
    grad_states, grad_initial = _borders(grad_y, log_a, C, grad_final, offsets, tiles, reverse=True)
    parts, splits = triton.cdiv(dim, NARROW), triton.cdiv(heads // groups, HEADS)
    grad_x = torch.empty_like(x)
    grad_log_a = torch.empty((parts, tokens, heads), dtype=torch.float32, device=x.device)
    grad_D = torch.empty((len(states), heads, parts), dtype=torch.float32, device=x.device)
    grad_B, grad_C = torch.empty((2, splits, tokens, groups, state), dtype=torch.float32, device=x.device)
    grad_x_kernel[(len(states) * heads, parts)](
        grad_y, x, log_a, B, C, D, offsets, states, grad_states,
        grad_x, grad_log_a, grad_D, tokens, len(initial), heads, groups, dim, state,
        PRECISION=_precision(), TIME=tiles.time, DIM=NARROW, STATE=NARROW,
        **_options(grad_x_kernel, tiles, is_hopper(x.device)),
    )  # fmt: skip
    grad_bc_kernel[(len(states) * groups * splits, triton.cdiv(state, NARROW))](
        grad_y, x, log_a, B, C, offsets, states, grad_states, grad_B, grad_C,
        tokens, len(initial), heads, groups, dim, state, splits,
        PRECISION=_precision(), HEADS=HEADS, TIME=tiles.time, DIM=THIN, STATE=NARROW,
        **_options(grad_bc_kernel, tiles, is_hopper(x.device)),
    )  # fmt: skip
    log_a_grad = grad_log_a.sum(0).masked_fill_(torch.isneginf(log_a), 0.0)
    grads = (grad_x, log_a_grad, grad_B.sum(0), grad_C.sum(0), grad_initial, grad_D.sum((0, 2)))
    return [None if tensor is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, given, strict=True)]


def _contiguous(given: Inputs) -> tuple[Tensor, ...]:
    """Everything contiguous; log_a and D in float32, zeros where there is no D."""
    x, log_a, B, C, initial, D = given
    D = log_a.new_zeros(x.shape[1]) if D is None else D
    return tuple(tensor.contiguous() for tensor in (x, log_a.float(), B, C, initial, D.float()))


def launches() -> list[Launch]:
    """Every configuration that can be chosen, for the static analysis."""
    found = []
    sizes = ("tokens", "sequences", "heads", "groups", "dim", "state", "splits", "size", "time")
    states = ("log_a", "D", "added", "wholes", "states", "grad_states", "initial", "final", "grad_log_a", "grad_D")
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        for chunk in (SHORTEST, LONGEST):
            tiles = _tiles(chunk, dtype)
            shape = {"TIME": tiles.time, "DIM": tiles.dim, "STATE": tiles.state, "PRECISION": precision}
            kernels: dict[Any, dict[str, Any]] = {
                added_kernel: {"FROM_START": True},
                output_kernel: {},
                grad_x_kernel: {"DIM": NARROW, "STATE": NARROW},
                grad_bc_kernel: {"HEADS": HEADS, "DIM": THIN, "STATE": NARROW},
            }
            half = dtype.itemsize == 2
            for (kernel, constants), hopper in product(kernels.items(), (False, True) if half else (False,)):
                options = _options(kernel, tiles, hopper)
                found.append(
                    Launch(
                        kernel,
                        {**shape, **constants},
                        dtype,
                        states=(*states, "grad_B", "grad_C"),
                        scalars=sizes,
                        warps=options["num_warps"],
                        stages=options["num_stages"],
                        label=f"{tiles.time}x{tiles.dim}x{tiles.state} {precision}",
                        matmul=dtype != torch.float32,
                        chips=chips(hopper, half),
                        spills=MEASURED_SPILLS if hopper else 0,
                    )
                )
    for reverse in (False, True):
        found.append(
            Launch(
                pass_kernel,
                {"REVERSE": reverse, "SIZE": PASSED},
                torch.float32,
                states=states,
                scalars=sizes,
                label="reverse" if reverse else "",
            )
        )
    return found
