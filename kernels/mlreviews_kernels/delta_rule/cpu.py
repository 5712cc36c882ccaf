"""The CPU path of `delta_rule`: the dual form, chunk by chunk, all heads at once, in matrix products.

Within a chunk that begins with the state W0, u_s = beta_s (v_s - W_base^T k_s) solves a triangular system:

    (I + A) U = beta o (V - K W0),    A_sj = beta_s k_s . k_j where j's mini-batch is before s's, else 0
    O = Q W0 + P U,    P = tril(Q K^T)
    W1 = W0 + K^T U

A chunk has whole mini-batches, or is part of one: then A is 0 and the right-hand side has W_base in place of W0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_offsets
from mlreviews_kernels.compiled import load, pointer
from mlreviews_kernels.delta_rule.reference import Inputs
from mlreviews_kernels.sequences import each

SOURCE = Path(__file__).with_name("cpu.cpp")
LONGEST = 64  # chunk of the compiled form: longer ones leave the cache


def delta_rule(given: Inputs, offsets: Tensor, mini_batch: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    bounds = check_offsets(offsets, given.q.shape[0])
    inputs = [tensor.to(given.initial.dtype).contiguous() for tensor in given]
    library = load(SOURCE) if given.initial.dtype == torch.float32 else None
    if library is None:
        forward = partial(_forward, mini_batch=mini_batch, chunk_size=chunk_size)
        out, final = each(forward, tuple(inputs[:4]), (inputs[4],), bounds, outputs=1)
    else:
        out, final = torch.empty_like(inputs[2]), torch.empty_like(inputs[4])
        arrays = (*inputs, offsets.contiguous(), out, final)
        library.delta_rule(*map(pointer, arrays), *_sizes(inputs[4], mini_batch, chunk_size))
    return out.to(given.v.dtype), final


def delta_rule_backward(
    grad_out: Tensor, grad_final: Tensor, given: Inputs, offsets: Tensor, mini_batch: int, chunk_size: int
) -> list[Tensor]:
    """Gradients of what is given."""
    dtype = given.initial.dtype
    grad_out, grad_final, *inputs = (tensor.to(dtype).contiguous() for tensor in (grad_out, grad_final, *given))
    library = load(SOURCE) if dtype == torch.float32 else None
    grads: Sequence[Tensor]
    if library is None:
        backward = partial(_backward, mini_batch=mini_batch, chunk_size=chunk_size)
        tokens, states = (grad_out, *inputs[:4]), (grad_final, inputs[4])
        grads = each(backward, tokens, states, offsets.tolist(), outputs=4)
    else:
        grads = [torch.empty_like(tensor) for tensor in inputs]
        arrays = (grad_out, grad_final, *inputs, offsets.contiguous(), *grads)
        library.delta_rule_backward(*map(pointer, arrays), *_sizes(inputs[4], mini_batch, chunk_size))
    return [grad.to(tensor.dtype) for grad, tensor in zip(grads, given, strict=True)]


def _sizes(initial: Tensor, mini_batch: int, chunk_size: int) -> tuple[ctypes.c_int64 | ctypes.c_int, ...]:
    numbers = (*initial.shape, mini_batch, min(chunk_size, LONGEST))
    return *map(ctypes.c_int64, numbers), ctypes.c_int(torch.get_num_threads())


def chunks(time: int, mini_batch: int, chunk_size: int) -> list[tuple[int, int]]:
    """Where chunks begin and end: whole mini-batches, as many as fit; or parts of one, where it is longer."""
    if mini_batch <= chunk_size:
        size = chunk_size // mini_batch * mini_batch
        return [(start, min(start + size, time)) for start in range(0, time, size)]
    return [
        (start, min(start + chunk_size, first + mini_batch, time))
        for first in range(0, time, mini_batch)
        for start in range(first, min(first + mini_batch, time), chunk_size)
    ]


def _heads_first(tensors: tuple[Tensor, ...], start: int, stop: int) -> list[Tensor]:
    """A chunk of ``[batch, time, heads, ...]`` as ``[batch, heads, time, dim]``; dim is 1 for beta."""
    return [(x if x.ndim == 4 else x[..., None])[:, start:stop].transpose(1, 2) for x in tensors]


def _solve(k: Tensor, v: Tensor, beta: Tensor, base: Tensor, mini_batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, the errors V - K W_base, and I + A."""
    errors = v - k @ base
    system = (beta * (k @ k.mT)).mul_(_before(k.shape[-2], mini_batch, k.device))
    system.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return _triangular(system, beta * errors, mini_batch, upper=False), errors, system


def _before(time: int, mini_batch: int, device: torch.device) -> Tensor:
    """Whether the mini-batch of a column is before that of a row."""
    number = torch.arange(time, device=device) // mini_batch
    return number[:, None] > number


def _triangular(system: Tensor, right: Tensor, mini_batch: int, *, upper: bool) -> Tensor:
    if system.shape[-1] <= mini_batch:  # one mini-batch: the identity
        return right
    return torch.linalg.solve_triangular(system.mT if upper else system, right, upper=upper, unitriangular=True)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial: Tensor, *, mini_batch: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = base = initial
    for start, stop in chunks(v.shape[1], mini_batch, chunk_size):
        Q, K, V, rate = _heads_first((q, k, v, beta), start, stop)
        if start % mini_batch == 0:
            base = state
        U = _solve(K, V, rate, base, mini_batch)[0]
        out[:, start:stop] = (Q @ state + (Q @ K.mT).tril() @ U).transpose(1, 2)
        state = state + K.mT @ U
    return out, state.clone()


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    grad_final: Tensor,
    initial: Tensor,
    *,
    mini_batch: int,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """Chunk by chunk from the last one; states at the chunks' borders are computed again first."""
    bounds = chunks(v.shape[1], mini_batch, chunk_size)
    states = [initial]
    bases: list[Tensor] = []
    for start, stop in bounds:
        K, V, rate = _heads_first((k, v, beta), start, stop)
        bases.append(states[-1] if start % mini_batch == 0 else bases[-1])
        states.append(states[-1] + K.mT @ _solve(K, V, rate, bases[-1], mini_batch)[0])
    grads = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v, beta))
    dstate, dbase = grad_final, torch.zeros_like(grad_final)
    for (start, stop), state, base in reversed(list(zip(bounds, states[:-1], bases, strict=True))):
        given = _heads_first((grad_out, q, k, v, beta), start, stop)
        *found, dstate, part = _chunk_backward(*given, dstate=dstate, state=state, base=base, mini_batch=mini_batch)
        for grad, one in zip(grads, found, strict=True):
            grad[:, start:stop] = one.transpose(1, 2)
        dbase = dbase + part
        if start % mini_batch == 0:
            dstate, dbase = dstate + dbase, torch.zeros_like(dbase)
    return *grads, dstate.clone()


def _chunk_backward(
    dO: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    rate: Tensor,
    *,
    dstate: Tensor,
    state: Tensor,
    base: Tensor,
    mini_batch: int,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, beta, W0 and W_base from those of O and W1."""
    U, errors, system = _solve(K, V, rate, base, mini_batch)
    P = (Q @ K.mT).tril()
    dU = P.mT @ dO + K @ dstate
    dP = (dO @ U.mT).tril()
    dR = _triangular(system, dU, mini_batch, upper=True)  # of the right-hand side, beta o errors
    dQ = dO @ state.mT + dP @ K
    dK = dP.mT @ Q + U @ dstate.mT
    dV = rate * dR
    drate = (dR * errors).sum(-1)
    if system.shape[-1] > mini_batch:
        products = K @ K.mT
        dA = -(dR @ U.mT) * _before(K.shape[-2], mini_batch, K.device)
        drate = drate + (dA * products).sum(-1)
        dproducts = rate * dA
        dK = dK + (dproducts + dproducts.mT) @ K
    dK = dK - dV @ base.mT
    return dQ, dK, dV, drate, dstate + Q.mT @ dO, -(K.mT @ dV)
