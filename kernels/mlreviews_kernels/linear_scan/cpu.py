"""The CPU path of `linear_scan`: compiled loops for float32 and below, vectorised PyTorch for the rest.

The vectorised form cuts time into about sqrt(time) chunks, steps through all chunks at once, and then through the
chunks: 2 sqrt(time) steps on large tensors instead of ``time`` steps on small ones.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets
from mlreviews_kernels.compiled import load, pointer
from mlreviews_kernels.linear_scan.reference import Inputs
from mlreviews_kernels.sequences import each

SOURCE = Path(__file__).with_name("cpu.cpp")


def linear_scan(given: Inputs, offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    h, final = _forward("linear_scan", _scan, given, offsets, reverse)
    return h.to(given.b.dtype), final


def log_linear_scan(given: Inputs, offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The op's forward in log space."""
    return _forward("log_linear_scan", _log_scan, given, offsets, reverse)


def linear_scan_backward(
    grad_h: Tensor, grad_final: Tensor, given: Inputs, h: Tensor, offsets: Tensor, reverse: bool
) -> list[Tensor]:
    """Gradients of what is given."""
    saved = (given.a, h, given.initial)
    return _backward("linear_scan_backward", _scan_backward, grad_h, grad_final, saved, offsets, reverse)


def log_linear_scan_backward(
    grad_h: Tensor, grad_final: Tensor, given: Inputs, log_h: Tensor, offsets: Tensor, reverse: bool
) -> list[Tensor]:
    """Gradients of what is given."""
    saved = (given.a, given.b, log_h, given.initial)
    return _backward("log_linear_scan_backward", _log_scan_backward, grad_h, grad_final, saved, offsets, reverse)


def _forward(
    name: str, vectorised: Callable[..., tuple[Tensor, Tensor]], given: Inputs, offsets: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    bounds = check_offsets(offsets, given.a.shape[0])
    a, b, initial = (x.to(given.initial.dtype).contiguous() for x in given)
    library = None if initial.dtype == torch.float64 else load(SOURCE)
    if library is None:
        h, final = _each(vectorised, (a, b), (initial,), bounds, reverse)
    else:
        h, final = torch.empty_like(b), torch.empty_like(initial)
        arrays = (a, b, initial, offsets.contiguous(), h, final)
        getattr(library, name)(*map(pointer, arrays), *_sizes(initial, reverse))
    return h, final


def _backward(
    name: str,
    vectorised: Callable[..., tuple[Tensor, ...]],
    grad_h: Tensor,
    grad_final: Tensor,
    saved: tuple[Tensor, ...],
    offsets: Tensor,
    reverse: bool,
) -> list[Tensor]:
    dtype, initial = saved[0].dtype, saved[-1]
    library = None if initial.dtype == torch.float64 else load(SOURCE)
    grad_h, grad_final, *saved = (x.to(initial.dtype).contiguous() for x in (grad_h, grad_final, *saved))  # type: ignore[assignment]
    if library is None:
        grads = _each(vectorised, (grad_h, *saved[:-1]), (grad_final, saved[-1]), offsets.tolist(), reverse)
    else:
        grads = torch.empty_like(grad_h), torch.empty_like(grad_h), torch.empty_like(grad_final)
        arrays = (grad_h, grad_final, *saved, offsets.contiguous(), *grads)
        getattr(library, name)(*map(pointer, arrays), *_sizes(initial, reverse))
    return [grads[0].to(dtype), grads[1].to(dtype), grads[2]]


def _sizes(initial: Tensor, reverse: bool) -> tuple[ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int]:
    sequences, channels = initial.shape
    threads = ctypes.c_int(torch.get_num_threads())
    return ctypes.c_int64(sequences), ctypes.c_int64(channels), ctypes.c_int(reverse), threads


def _each(
    function: Callable[..., tuple[Tensor, ...]],
    tokens: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    bounds: list[int],
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Applies a function of ``[batch, time, channels]`` to all sequences, in the direction of the recurrence."""

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        rows, rest = arguments[: len(tokens)], arguments[len(tokens) :]
        if not reverse:
            return function(*rows, *rest)
        *outputs, state = function(*(x.flip(1) for x in rows), *rest)
        return *(x.flip(1) for x in outputs), state

    # forward h, backward the gradients of a and b: these have a time axis, and a state follows
    return each(run, tokens, states, bounds, outputs=1 if len(states) == 1 else 2)


def _scan(a: Tensor, b: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    return _chunked(torch.mul, lambda x, factor, h: torch.addcmul(x, factor, h), a, b, initial)


def _log_scan(log_a: Tensor, log_b: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    return _chunked(torch.add, lambda x, factor, h: torch.logaddexp(factor + h, x), log_a, log_b, initial)


def _chunked(
    multiply: Callable[[Tensor, Tensor], Tensor],
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    initial: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence ``h = step(b, a, h)`` in chunks; ``multiply`` composes two factors."""
    batch, time, channels = a.shape
    size = max(1, math.isqrt(time))
    whole = time // size * size
    h = torch.empty_like(b)
    chunks_a, chunks_b, chunks_h = (x[:, :whole].reshape(batch, -1, size, channels) for x in (a, b, h))
    decay = torch.empty_like(chunks_a)  # the product of the chunk's factors so far
    decay[:, :, 0], chunks_h[:, :, 0] = chunks_a[:, :, 0], chunks_b[:, :, 0]
    for i in range(1, size):
        decay[:, :, i] = multiply(chunks_a[:, :, i], decay[:, :, i - 1])
        chunks_h[:, :, i] = step(chunks_b[:, :, i], chunks_a[:, :, i], chunks_h[:, :, i - 1])
    state = initial
    for chunk in range(chunks_a.shape[1]):
        h[:, chunk * size : (chunk + 1) * size] = step(chunks_h[:, chunk], decay[:, chunk], state[:, None])
        state = h[:, (chunk + 1) * size - 1]
    for t in range(whole, time):
        state = h[:, t] = step(b[:, t], a[:, t], state)
    return h, state.clone()


def _scan_backward(
    grad_h: Tensor, a: Tensor, h: Tensor, grad_final: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """g_t = grad_t + a_{t+1} g_{t+1}: the same recurrence, backwards, with the factors shifted by one."""
    g = _adjoint(grad_h, a, grad_final)
    before = torch.cat([initial[:, None], h], 1)[:, :-1]
    return g * before, g, _into_state(a, g, grad_final)


def _log_scan_backward(
    grad_h: Tensor, log_a: Tensor, log_b: Tensor, log_h: Tensor, grad_final: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the shares of the old state and of the input in the new one as factors."""
    before = torch.cat([initial[:, None], log_h], 1)[:, :-1]
    empty = torch.isneginf(log_h)
    old = torch.exp(log_a + before - log_h).masked_fill(empty, 0.0)
    new = torch.exp(log_b - log_h).masked_fill(empty, 0.0)
    g = _adjoint(grad_h, old, grad_final)
    return old * g, new * g, _into_state(old, g, grad_final)


def _adjoint(grad_h: Tensor, a: Tensor, grad_final: Tensor) -> Tensor:
    shifted = torch.cat([a[:, 1:], torch.ones_like(a[:, :1])], 1)
    return _scan(shifted.flip(1), grad_h.flip(1), grad_final)[0].flip(1)


def _into_state(a: Tensor, g: Tensor, grad_final: Tensor) -> Tensor:
    return a[:, 0] * g[:, 0] if a.shape[1] else grad_final.clone()
