"""The CPU path of `selective_attention`: compiled tiles for float32 and below, blocks of queries in PyTorch otherwise.

The PyTorch form goes through blocks of queries: one is the reference with fewer queries than keys, and F goes from
block to block as decoding goes on. Its memory is linear in the number of keys.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.compiled import load, pointer
from mlreviews_kernels.ops import gradients
from mlreviews_kernels.selective_attention import reference

SOURCE = Path(__file__).with_name("cpu.cpp")
BLOCK = 128  # queries of a block of the PyTorch form
FEW = 16  # queries, of decoding: one block in PyTorch, which doesn't lay out all keys anew for them


def selective_attention(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, mask: Tensor, selector: int, scale: float, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward; shapes as in `reference`."""
    given = (q, k, v, initial, mask, selector, scale, tau)
    if (library := _library(q, initial)) is None:
        return vectorised(*given)
    inputs = _inputs(q, k, v, initial, mask)
    batch, queries, heads = q.shape[:3]
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=torch.float32)
    lse, selection = torch.empty((batch, heads, queries)), torch.empty_like(initial)
    memory = torch.empty((batch, queries))
    library.selective_attention(
        *map(pointer, (*inputs, out, lse, selection, memory)), *_sizes(q, k, v, selector, scale, tau)
    )
    return out.to(q.dtype), lse, selection, memory


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
    grads = (grad_out, grad_selection, grad_memory)
    if (library := _library(q, initial)) is None:
        return vectorised_backward(*grads, q, k, v, initial, mask, selector, scale, tau)
    inputs = _inputs(*grads, q, k, v, initial, mask, out, lse)
    found = [torch.empty_like(tensor) for tensor in inputs[3:7]]
    library.selective_attention_backward(*map(pointer, (*inputs, *found)), *_sizes(q, k, v, selector, scale, tau))
    return tuple(grad.to(tensor.dtype) for grad, tensor in zip(found, (q, k, v, initial), strict=True))


def vectorised(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor, mask: Tensor, selector: int, scale: float, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward in PyTorch, on any device."""
    selection = initial.clone()
    outs, lses, memories = [], [], []
    for start, stop, seen in _blocks(q, k):
        block = (q[:, start:stop], k[:, :seen], v[:, :seen], selection[:, :seen], mask[:, :seen])
        out, lse, selected, memory = reference.selective_attention(*block, selector, scale, tau)
        selection[:, :seen] = selected
        outs.append(out)
        lses.append(lse)
        memories.append(memory)
    return torch.cat(outs, 1), torch.cat(lses, 2), selection, torch.cat(memories, 1)


def vectorised_backward(
    grad_out: Tensor,
    grad_selection: Tensor,
    grad_memory: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor,
    mask: Tensor,
    selector: int,
    scale: float,
    tau: float,
) -> tuple[Tensor, ...]:
    """The backward in PyTorch, on any device: block by block, from the last one on."""
    dtype = initial.dtype
    blocks = _blocks(q, k)
    borders = [initial]
    for start, stop, seen in blocks[:-1]:
        queries_of_selector = scale * q[:, start:stop, selector].to(dtype)
        logits = queries_of_selector @ k[:, :seen, selector // (q.shape[2] // k.shape[2])].to(dtype).mT
        border = borders[-1].clone()
        border[:, :seen] = reference.accumulated(logits, border[:, :seen], mask[:, :seen])[:, -1]
        borders.append(border)
    grad_F = grad_selection.to(dtype, copy=True)
    grad_q = torch.empty_like(q, dtype=dtype)
    grad_k, grad_v = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for (start, stop, seen), border in zip(reversed(blocks), reversed(borders), strict=True):

        def run(q: Tensor, k: Tensor, v: Tensor, F: Tensor) -> tuple[Tensor, ...]:
            visible = mask[:, : k.shape[1]]
            found = reference.selective_attention(q, k, v, F, visible, selector, scale, tau)
            return found[0], found[2], found[3]

        block = [x.to(dtype) for x in (q[:, start:stop], k[:, :seen], v[:, :seen], border[:, :seen])]
        grads = (grad_out[:, start:stop], grad_F[:, :seen], grad_memory[:, start:stop])
        found = gradients(run, block, grads)
        grad_q[:, start:stop] = found[0]
        grad_k[:, :seen] += found[1]
        grad_v[:, :seen] += found[2]
        grad_F[:, :seen] = found[3]
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_F


def _blocks(q: Tensor, k: Tensor) -> list[tuple[int, int, int]]:
    """Where each block of queries begins and ends, and how many keys it sees; one of no queries if there are none."""
    queries, keys = q.shape[1], k.shape[1]
    found = []
    for start in range(0, max(queries, 1), BLOCK):
        stop = min(start + BLOCK, queries)
        found.append((start, stop, keys - queries + stop))
    return found


def _library(q: Tensor, initial: Tensor) -> ctypes.CDLL | None:
    if initial.dtype == torch.float64 or q.device.type != "cpu" or q.shape[1] <= FEW or q.numel() == 0:
        return None
    return load(SOURCE)


def _inputs(*tensors: Tensor) -> list[Tensor]:
    return [(x if x.dtype == torch.bool else x.float()).contiguous() for x in tensors]


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, selector: int, scale: float, tau: float
) -> tuple[ctypes.c_int64 | ctypes.c_float | ctypes.c_int, ...]:
    (batch, queries, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    sizes = (batch, queries, keys, heads, kv_heads, dim, v.shape[3], selector)
    numbers = (ctypes.c_float(scale), ctypes.c_float(tau))
    return *map(ctypes.c_int64, sizes), *numbers, ctypes.c_int(torch.get_num_threads())
