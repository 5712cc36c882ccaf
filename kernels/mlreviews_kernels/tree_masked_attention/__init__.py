r"""Attention of a small tree of tokens over a long cache: what verifies the drafts of speculative decoding.

Each token sees the cache, its ancestors in the tree, and itself. The cache is read where it lies. See ``README.md``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_shape
from mlreviews_kernels.backends import BackendError, Core
from mlreviews_kernels.ops import backend_of, empty_choice, gradients, implementation
from mlreviews_kernels.softmaxes import check_layout, check_scale, chosen_for, without_autocast
from mlreviews_kernels.tree_masked_attention import reference

__all__ = ["ancestor_mask", "tree_masked_attention"]

CORE = Core.read(Path(__file__).parent)


def tree_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens of a tree in one call, each over the cache and its own branch.

    Args:
        q: ``[batch, tree, heads, dim]``.
        k: ``[batch, tree, kv_heads, dim]``, in q's dtype; query head h uses head ``h // (heads / kv_heads)``.
        v: ``[batch, tree, kv_heads, value_dim]``, in q's dtype.
        tree_mask: boolean, ``[tree, tree]`` or ``[batch, tree, tree]``, True where a token (row) may attend to another
            one (column) of the tree: `ancestor_mask`.
        k_cache: ``[batch, context, kv_heads, dim]``, in q's dtype: may be a buffer that is longer than what is used,
            and any view whose last axis is contiguous (``[batch, kv_heads, context, dim]`` transposed, say); it is not
            copied.
        v_cache: ``[batch, context, kv_heads, value_dim]``, likewise.
        cache_lengths: ``[batch]``, int32 or int64: how many tokens of the cache all tokens of the tree see; all if
            None. Its numbers are checked on the CPU only: a GPU would have to be waited for.
        scale: of the scores; ``dim ** -0.5`` if None.

    Returns:
        out ``[batch, tree, heads, value_dim]`` in q's dtype, and lse ``[batch, heads, tree]``, the logarithm of the
        softmax's denominator, float32 for half-precision inputs. A token that sees nothing gets 0 and -inf. Gradients
        flow through both, to the caches, too.

    Raises:
        ValueError: shapes or devices don't go together, or a length is not within the cache.
        TypeError: a dtype is none of float32, float64, bfloat16, float16, or they differ, the mask isn't boolean, or
            the lengths are no integers.
        BackendError: the backend asked for by name can't be used. Triton has no backward: asked for by name, it raises
            there; picked by the device, it leaves the backward to PyTorch.
    """
    check_layout(("q", "k", "v"), q, k, v)
    check_layout(("q", "k_cache", "v_cache"), q, k_cache, v_cache)
    (batch, tree, _, dim), (_, _, kv_heads, value_dim), context = q.shape, v.shape, k_cache.shape[1]
    check_shape("k", k, (batch, tree, kv_heads, dim), "[batch, tree, kv_heads, dim]")
    check_shape("k_cache", k_cache, (batch, context, kv_heads, dim), "[batch, context, kv_heads, dim]")
    check_shape("v_cache", v_cache, (batch, context, kv_heads, value_dim), "[batch, context, kv_heads, value_dim]")
    if tree_mask.dtype != torch.bool:
        raise TypeError(f"tree_mask: expected booleans, True where a token may attend, got {tree_mask.dtype}")
    if tuple(tree_mask.shape) not in ((tree, tree), (batch, tree, tree)):
        meaning = f"[tree, tree] = {(tree, tree)} or [batch, tree, tree] = {(batch, tree, tree)}"
        raise ValueError(f"tree_mask: expected {meaning}, got {tuple(tree_mask.shape)}")
    if tree_mask.device != q.device:
        raise ValueError(f"tree_mask: expected a tensor on {q.device}, got one on {tree_mask.device}")
    lengths = _lengths(cache_lengths, batch, context, q)
    tree_mask = tree_mask.expand(batch, tree, tree)
    arguments = (q, k, v, tree_mask, k_cache, v_cache, lengths, check_scale(scale, dim))
    out, lse, _ = torch.ops.mlreviews.tree_masked_attention(*arguments)
    return out, lse


def _lengths(lengths: Tensor | None, batch: int, context: int, q: Tensor) -> Tensor:
    if lengths is None:
        return torch.full((batch,), context, device=q.device)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cache_lengths: expected int32 or int64, got {lengths.dtype}")
    check_shape("cache_lengths", lengths, (batch,), "[batch]")
    if lengths.device != q.device:
        raise ValueError(f"cache_lengths: expected a tensor on {q.device}, got one on {lengths.device}")
    return lengths.to(torch.int64)


def ancestor_mask(parents: Tensor) -> Tensor:
    """Which tokens of a tree are ancestors of which, or the token itself.

    Args:
        parents: ``[tree]`` or ``[batch, tree]``, int32 or int64: the index of each token's parent in the tree, which
            comes before it; -1 for a token that follows the cache directly. The numbers are checked on the CPU only.

    Returns:
        Boolean ``[tree, tree]`` or ``[batch, tree, tree]``, True where the column is the row's ancestor or itself.

    Raises:
        ValueError: it has another shape, or a parent doesn't come before its child.
        TypeError: it is neither int32 nor int64.
    """
    if parents.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"parents: expected int32 or int64, got {parents.dtype}")
    if parents.ndim not in (1, 2):
        raise ValueError(f"parents: expected [tree] or [batch, tree], got {tuple(parents.shape)}")
    tree = torch.arange(parents.shape[-1], device=parents.device)
    if parents.device.type == "cpu" and not bool(((parents >= -1) & (parents < tree)).all()):
        raise ValueError(f"parents: expected -1 or the index of an earlier token, got {parents.tolist()}")
    seen = (tree == parents[..., None]) | (tree == tree[:, None])
    reach = 1
    while reach < parents.shape[-1]:  # seen reaches so many generations back, then twice as many
        seen = (seen.float() @ seen.float()) > 0
        reach *= 2
    return seen


@torch.library.custom_op("mlreviews::tree_masked_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    context = k_cache.shape[1]
    if lengths.device.type == "cpu" and not bool(((lengths >= 0) & (lengths <= context)).all()):
        raise ValueError(f"cache_lengths: expected numbers from 0 to the context {context}, got {lengths.tolist()}")
    backend, choice = chosen_for(CORE, q, max(q.shape[3], v.shape[3]), backward=False)
    run = implementation(CORE, backend).tree_masked_attention
    with without_autocast(q):
        return *run(q, k, v, tree_mask, k_cache, v_cache, lengths, scale), choice


@torch.library.custom_op("mlreviews::tree_masked_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    out: Tensor,
    lse: Tensor,
    choice: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend = backend_of(choice)
    if backend == "triton":
        what = "the Triton kernels asked for by name have no backward; PyTorch's is used where no backend is asked for"
        raise BackendError(f"{CORE.name}: {what}")
    with without_autocast(q):
        if backend == "reference":
            function = partial(_reference, (tree_mask, lengths, scale))
            found = gradients(function, (q, k, v, k_cache, v_cache), (grad_out, grad_lse))
        else:
            run = implementation(CORE, "cpu").tree_masked_attention_backward  # PyTorch on any device
            found = run(grad_out, grad_lse, q, k, v, tree_mask, k_cache, v_cache, lengths, out, lse, scale)
    return found[0], found[1], found[2], found[3], found[4]


def _reference(
    options: tuple[Tensor, Tensor, float], q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor
) -> tuple[Tensor, Tensor]:
    tree_mask, lengths, scale = options
    return reference.tree_masked_attention(q, k, v, tree_mask, k_cache, v_cache, lengths, scale)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    batch, tree, heads, _dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((batch, tree, heads, v.shape[3])), q.new_empty((batch, heads, tree), dtype=dtype), empty_choice()


@_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *_: object,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, k_cache, v_cache))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.scale = inputs[7]
    ctx.save_for_backward(*inputs[:7], *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: object) -> tuple[Tensor | None, ...]:
    grad_q, grad_k, grad_v, *cached = _attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale)
    return grad_q, grad_k, grad_v, None, *cached, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
