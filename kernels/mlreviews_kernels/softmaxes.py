"""What the attention cores share: checks of their arguments, and the vectorised form of weighted softmaxes over one v.

Attention is the case of one softmax of weight 1, differential attention that of two with weights 1 and -lambda:

    out = sum_s w_s P_s v,   P_s = softmax(scale q_s k_s^T)
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.arguments import check_floating, check_offsets, check_same, check_shape, offsets_of
from mlreviews_kernels.backends import BACKENDS, BackendError, Core, select
from mlreviews_kernels.compiled import load, pointer

__all__ = [
    "WIDEST",
    "Geometry",
    "check_layout",
    "check_scale",
    "chosen_for",
    "flat_mask",
    "offsets_of_both",
    "vectorised",
    "vectorised_backward",
    "without_autocast",
]

ROWS = 128  # queries that the vectorised form takes at a time
WIDEST = 128  # heads of the Triton kernels; v is twice as wide where two softmaxes share it
MANY = 256  # keys a sequence, up to which these copies cost less than a loop over sequences in Python
FEW = 4  # queries a sequence that aren't worth the compiled form's copies of all keys and values


def check_layout(names: tuple[str, str, str], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k and v are ``[batch, time, heads, dim]`` and go together.

    Args:
        names: of the three.
        q: ``[batch, q_time, heads, dim]``.
        k: ``[batch, k_time, kv_heads, dim]``, kv_heads a divisor of heads.
        v: ``[batch, k_time, kv_heads, value_dim]``.
    """
    for name, tensor, axes in zip(
        names, (q, k, v), ("heads, dim", "kv_heads, dim", "kv_heads, value_dim"), strict=True
    ):
        check_floating(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name}: expected [batch, time, {axes}], got {tuple(tensor.shape)}")
    batch, _, heads, dim = q.shape
    if not batch:
        raise ValueError(f"{names[0]}: expected at least one row, got {tuple(q.shape)}")
    if dim < 1:
        raise ValueError(f"{names[0]}: expected dim of at least 1, got {tuple(q.shape)}")
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(f"{names[1]}: expected a number of heads that divides the {heads} heads, got {tuple(k.shape)}")
    check_shape(names[1], k, (batch, k.shape[1], k.shape[2], dim), "[batch, time, kv_heads, dim]")
    check_shape(names[2], v, (*k.shape[:3], v.shape[3]), "[batch, time, kv_heads, value_dim]")
    check_same(names[1], k, q)
    check_same(names[2], v, q)


def check_scale(scale: float | None, dim: int) -> float:
    """The scale of the scores: dim^-1/2 if None."""
    if scale is None:
        return float(dim**-0.5)
    if not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    return float(scale)


def flat_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask ``[batch, k_time]`` as ``[k_tokens]``; one of ``[batch, q_time, k_time]`` as it is.

    Raises:
        TypeError: it isn't boolean.
        ValueError: it has another shape or device.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected booleans, True where a query may attend, got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"mask: expected a tensor on {q.device}, got one on {mask.device}")
    batch, keys = k.shape[:2]
    if tuple(mask.shape) == (batch, keys):
        return mask.reshape(batch * keys)
    meaning = f"[batch, k_time] = {(batch, keys)} or [batch, q_time, k_time] = {(batch, q.shape[1], keys)}"
    if tuple(mask.shape) != (batch, q.shape[1], keys):
        raise ValueError(f"mask: expected {meaning}, got {tuple(mask.shape)}")
    return mask


def offsets_of_both(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the sequences of q and of k begin and end; packed ones have keys as many as queries."""
    if cu_seqlens is not None and q.shape[1] != k.shape[1]:
        raise ValueError(f"cu_seqlens: expected as many keys as queries, got {k.shape[1]} and {q.shape[1]}")
    return tuple(offsets_of(x.shape[0], x.shape[1], cu_seqlens, x.device) for x in (q, k))  # type: ignore[return-value]


def chosen_for(core: Core, q: Tensor, width: int, widest: int = WIDEST, *, backward: bool = True) -> tuple[str, Tensor]:
    """`ops.chosen`; what the Triton kernels can't do runs in the PyTorch of ``cpu.py``, unless they are asked for.

    Args:
        core: the core.
        q: the queries.
        width: of the widest heads.
        widest: of the heads that the Triton kernels can take.
        backward: whether there are Triton kernels for it. If not, the backward is handed "triton" only where that was
            asked for by name, which it has to refuse.

    Raises:
        BackendError: a backend was asked for by name and can't be used.
    """
    choice = select(core, q.device)
    backend = choice.backend
    by_name = choice.reason.startswith("asked for")
    if backend == "triton" and (q.dtype == torch.float64 or width > widest):
        if by_name:
            what = f"they compute in float32 and take heads of at most {widest}, these are {q.dtype} and {width} wide"
            raise BackendError(f"{core.name}: the Triton kernels {choice.reason} can't be used: {what}")
        backend = "cpu"
    later = "cpu" if backend == "triton" and not (backward or by_name) else backend
    return backend, torch.tensor([BACKENDS.index(later)], dtype=torch.int8)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Inside, what is float32 is computed in float32, in every backend: the dtype of the inputs decides, nothing else.

    Args:
        tensor: one on the device that is computed on.
    """
    return torch.autocast(tensor.device.type, enabled=False)


@dataclass(frozen=True)
class Geometry:
    """Which keys a query sees, but for the mask.

    Attributes:
        q_offsets: where the sequences' queries begin, and where the last one ends.
        k_offsets: the same of their keys.
        causal: no key after the query's own position, counted from the last key.
        window: positions back (and forth, if not causal) that a query sees, its own included; 0: all.
    """

    q_offsets: list[int]
    k_offsets: list[int]
    causal: bool
    window: int

    @classmethod
    def read(
        cls, q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, *, causal: bool, window: int = 0
    ) -> Geometry:
        """From the tensors of the op."""
        return cls(check_offsets(q_offsets, q.shape[0]), check_offsets(k_offsets, k.shape[0]), causal, window)

    def blocks(self) -> Iterator[tuple[int, slice, slice, Tensor | None]]:
        """Blocks of queries: (sequence, query tokens, key tokens that any of them sees, which of those each sees).

        The last is None where every query of the block sees all of these keys.
        """
        for i, ((q_start, q_stop), (k_start, k_stop)) in enumerate(
            zip(pairwise(self.q_offsets), pairwise(self.k_offsets), strict=True)
        ):
            keys, shift = k_stop - k_start, (k_stop - k_start) - (q_stop - q_start)
            for start in range(0, q_stop - q_start, ROWS):
                stop = min(start + ROWS, q_stop - q_start)
                low = max(0, start + shift - self.window + 1) if self.window else 0
                high = stop + shift if self.causal else stop + shift + self.window - 1 if self.window else keys
                low, high = min(low, keys), max(min(high, keys), 0)
                high = max(high, low)
                gap = torch.arange(start, stop)[:, None] + shift - torch.arange(low, high)
                seen = (gap >= 0) if self.causal else torch.ones_like(gap, dtype=torch.bool)
                if self.window:
                    seen &= gap.abs() < self.window
                tokens = slice(q_start + start, q_start + stop), slice(k_start + low, k_start + high)
                yield i, *tokens, None if bool(seen.all()) else seen


def _seen(
    seen: Tensor | None, mask: Tensor | None, sequence: int, rows: slice, keys: slice, geometry: Geometry
) -> Tensor | None:
    """What each query of a block sees, with the mask."""
    if mask is None:
        return seen
    if mask.ndim == 1:
        more = mask[keys][None]
    else:
        q_start, k_start = geometry.q_offsets[sequence], geometry.k_offsets[sequence]
        more = mask[sequence, rows.start - q_start : rows.stop - q_start, keys.start - k_start : keys.stop - k_start]
    return more if seen is None else seen.to(more.device) & more


def _by_head(tensor: Tensor, kv_heads: int) -> Tensor:
    """``[tokens, heads, dim]`` as ``[kv_heads, heads of a group * tokens, dim]``: a group is one matrix product."""
    tokens, heads, dim = tensor.shape
    return tensor.reshape(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)


def _by_token(tensor: Tensor, tokens: int) -> Tensor:
    """The way back."""
    kv_heads, _, dim = tensor.shape
    return tensor.reshape(kv_heads, -1, tokens, dim).permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """``[heads, rows, keys]``, -inf where nothing may be seen."""
    rows, heads, _ = q.shape
    scores = torch.matmul(_by_head(q, k.shape[1]), k.permute(1, 2, 0)).mul_(scale).reshape(heads, rows, -1)
    return scores if seen is None else scores.masked_fill_(~seen.to(scores.device), float("-inf"))


def vectorised(
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    v: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The forward in PyTorch, a block of queries at a time.

    Args:
        qs: one ``[q_tokens, heads, dim]`` for each softmax.
        ks: likewise ``[k_tokens, kv_heads, dim]``.
        v: ``[k_tokens, kv_heads, value_dim]``.
        weights: ``[softmaxes, heads]``, in the dtype of the computation.
        mask: ``[k_tokens]`` or ``[sequences, q_time, k_time]``.
        geometry: which keys a query sees.
        scale: of the scores.

    Returns:
        out ``[q_tokens, heads, value_dim]`` in q's dtype and lse ``[softmaxes, q_tokens, heads]`` in that of weights.
    """
    dtype, (tokens, heads, _) = weights.dtype, qs[0].shape
    out = qs[0].new_zeros((tokens, heads, v.shape[2]))
    lse = weights.new_full((len(qs), tokens, heads), float("-inf"))
    for sequence, rows, keys, inside in geometry.blocks():
        if keys.start == keys.stop:
            continue
        seen = _seen(inside, mask, sequence, rows, keys, geometry)
        total: Tensor | None = None
        for s, (q, k) in enumerate(zip(qs, ks, strict=True)):
            scores = _scores(q[rows].to(dtype), k[keys].to(dtype), seen, scale)
            lse[s, rows] = (one := scores.logsumexp(-1)).T
            # a row that sees nothing: exp(-inf - 0) = 0
            p = scores.sub_(one.masked_fill(torch.isneginf(one), 0.0)[..., None]).exp_()
            p.mul_(weights[s, :, None, None])
            total = p if total is None else total.add_(p)
        assert total is not None
        grouped = total.reshape(v.shape[1], -1, keys.stop - keys.start)
        out[rows] = _by_token(grouped @ v[keys].to(dtype).transpose(0, 1), rows.stop - rows.start).to(out.dtype)
    return out, lse


def vectorised_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    v: Tensor,
    weights: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Gradients of all qs, all ks, v and the weights.

    With dP = dO v^T and delta_s = rowsum(P_s dP): dS_s = P_s (w_s (dP - delta_s) + dlse_s), dw_s = sum delta_s.
    """
    dtype, kv_heads = weights.dtype, v.shape[1]
    grad_qs = [torch.zeros(q.shape, dtype=dtype, device=q.device) for q in qs]
    grad_ks = [torch.zeros(k.shape, dtype=dtype, device=k.device) for k in ks]
    grad_v = torch.zeros(v.shape, dtype=dtype, device=v.device)
    grad_weights = torch.zeros_like(weights)
    for sequence, rows, keys, inside in geometry.blocks():
        if keys.start == keys.stop:
            continue
        seen = _seen(inside, mask, sequence, rows, keys, geometry)
        count, width = rows.stop - rows.start, keys.stop - keys.start
        dO = _by_head(grad_out[rows].to(dtype), kv_heads)
        dP = torch.matmul(dO, v[keys].to(dtype).permute(1, 2, 0)).reshape(-1, count, width)
        total = torch.zeros_like(dP)
        for s, (q, k) in enumerate(zip(qs, ks, strict=True)):
            one_q, one_k, weight = q[rows].to(dtype), k[keys].to(dtype), weights[s, :, None, None]
            one_lse = lse[s, rows].T
            one_lse = one_lse.masked_fill(torch.isneginf(one_lse), 0.0)[..., None]
            p = _scores(one_q, one_k, seen, scale).sub_(one_lse).exp_()
            total.addcmul_(p, weight)
            delta = (p * dP).sum(-1, keepdim=True)
            grad_weights[s] += delta.sum((1, 2))
            dS = (dP - delta).mul_(weight)
            if grad_lse is not None:
                dS += grad_lse[s, rows].T[..., None].to(dtype)
            grouped = dS.mul_(p).mul_(scale).reshape(kv_heads, -1, width)
            grad_qs[s][rows] = _by_token(grouped @ one_k.transpose(0, 1), count)
            grad_ks[s][keys] += (grouped.mT @ _by_head(one_q, kv_heads)).transpose(0, 1)
        grad_v[keys] += (total.reshape(kv_heads, -1, width).mT @ dO).transpose(0, 1)
    return grad_qs, grad_ks, grad_v, grad_weights


def library_for(source: Path, q: Tensor, geometry: Geometry) -> ctypes.CDLL | None:
    """The compiled form where it serves: not in float64, and not for a few queries over many keys (decoding)."""
    sequences = len(geometry.q_offsets) - 1
    decoding = q.shape[0] <= FEW * sequences and geometry.k_offsets[-1] > MANY * sequences
    if q.dtype == torch.float64 or q.device.type != "cpu" or decoding:
        return None
    return load(source)


def compiled(
    library: ctypes.CDLL,
    name: str,
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    v: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The forward of a library that ``softmaxes.h`` went into, in float32; otherwise as `vectorised`.

    Args:
        library: it has the functions ``<name>``, ``<name>_parts`` and ``<name>_backward``.
        name: of the function.
        qs: as in `vectorised`, and so are the others.
        ks: likewise.
        v: likewise.
        weights: likewise.
        mask: likewise.
        geometry: likewise.
        scale: likewise.
    """
    inputs = _Inputs(qs, ks, v, weights, mask, geometry, scale)
    tokens, heads, _ = qs[0].shape
    out = torch.empty((tokens, heads, v.shape[2]), dtype=torch.float32)
    lse = torch.empty((len(qs), tokens, heads), dtype=torch.float32)
    getattr(library, name)(*inputs.arguments(), pointer(out), pointer(lse))
    return out.to(qs[0].dtype), lse


def compiled_backward(
    library: ctypes.CDLL,
    name: str,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    v: Tensor,
    weights: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The backward of such a library; otherwise as `vectorised_backward`."""
    inputs = _Inputs(qs, ks, v, weights, mask, geometry, scale)
    count = getattr(library, f"{name}_parts")
    count.restype = ctypes.c_int64
    parts = count(*inputs.arguments())
    given = [None if x is None else x.float().contiguous() for x in (grad_out, grad_lse, lse)]
    grad_qs = [torch.empty(q.shape, dtype=torch.float32) for q in qs]
    grad_ks = [torch.empty((parts, *k.shape), dtype=torch.float32) for k in ks]
    grad_v = torch.empty((parts, *v.shape), dtype=torch.float32)
    grad_weights = torch.empty(lse.shape, dtype=torch.float32)
    pairs = (x for pair in zip(grad_qs, grad_ks, strict=True) for x in pair)
    arrays = map(pointer, (*given, *pairs, grad_v, grad_weights))
    getattr(library, f"{name}_backward")(*inputs.arguments(), *arrays, ctypes.c_int64(parts))
    return grad_qs, [_total(grad) for grad in grad_ks], _total(grad_v), grad_weights.sum(1)


def _total(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


class _Inputs:
    """The arguments that all compiled functions begin with; keeps the memory that they point to."""

    def __init__(
        self,
        qs: Sequence[Tensor],
        ks: Sequence[Tensor],
        v: Tensor,
        weights: Tensor,
        mask: Tensor | None,
        geometry: Geometry,
        scale: float,
    ) -> None:
        pairs = (x for pair in zip(qs, ks, strict=True) for x in pair)
        masks = (mask, None) if mask is not None and mask.ndim == 1 else (None, mask)
        self.tensors = (
            *(x.float().contiguous() for x in (*pairs, v, weights)),
            *(None if x is None else x.contiguous() for x in masks),
            torch.tensor(geometry.q_offsets),
            torch.tensor(geometry.k_offsets),
        )
        (_, heads, dim), (_, kv_heads, value_dim) = qs[0].shape, v.shape
        sizes = (len(geometry.q_offsets) - 1, heads, kv_heads, dim, value_dim, geometry.window, int(geometry.causal))
        self.numbers = (
            *map(ctypes.c_int64, sizes),
            ctypes.c_float(scale),
            ctypes.c_int(torch.get_num_threads()),
        )

    def arguments(self) -> tuple[object, ...]:
        """For a function called through ctypes."""
        return *map(pointer, self.tensors), *self.numbers
