r"""LiSA: attention scores made from those of the layer before and a low-rank correction.

Paper: Cross-layer Attention Sharing for Large Language Models (arXiv:2408.01890).

Attention patterns of neighbouring layers resemble each other, though under other heads. A LiSA layer takes the scores
of the layer before, adds scores from small queries and keys, and lets a tiny network along the head axis make its own
scores of the two. Queries, keys and the keys in the cache shrink; values stay. The layer replaces the attention of a
trained model, and is then trained to reproduce that model's attention.

Equation:
    $$ S^\Delta_h = \frac{1}{\sqrt{d_r}}\, (X W^Q_h)(X W^K_h)^\top, \qquad d_r = r / H \tag{1} $$
    $$ S^{(l)}_{ij} = W_2 \operatorname{relu}\bigl(W_1 [S^{(l-1)}_{ij}; S^\Delta_{ij}] + b\bigr)
       \in \mathbb{R}^H \tag{2} $$
    $$ A^{(l)} = \operatorname{softmax}(\text{mask}(S^{(l)})), \qquad
       Y = \operatorname{concat}_h(A^{(l)}_h X W^V_h)\, W^O \tag{3} $$
    Layers before the first shared one are ordinary: their scores are those of eq. (1) with r = d. The loss is
    $L_{LM} + \lambda \sum_l L^{(l)}$ with
    $$ L^{(l)} = \frac{1}{H n} \sum_{h,i}
       \operatorname{KL}\bigl(A^{\text{teacher}}_{hi} \,\|\, A^{(l)}_{hi}\bigr) \tag{4} $$

Symbols:
    X: [batch, time, d_model], the layer's input.
    H: heads.
    r: rank, the size of all heads of the small queries together.
    S: [batch, heads, queries, keys], scores before mask and softmax; query i, key j.
    W_1, b, W_2: [hidden, 2 heads], [hidden], [heads, hidden], the alignment, the same for all pairs i, j.
    A: [batch, heads, queries, keys], attention weights.
    n: queries that see a key.

Defaults:
    rank: d_model / 6 (the paper's compression of queries and keys), rounded up to what heads and RoPE divide.
    start: 1, the first layer that shares (ours; the paper leaves more of the shallow layers as they are, where errors
        do most harm).
    align_hidden: 2 heads (ours), the least that can express every linear map: relu(z) - relu(-z) = z.

Deviations:
    1. The scores of eq. (1) are divided by the root of a small head's size. So full rank is ordinary attention.
    2. Small queries and keys take RoPE, on a choice of the planes of a full-sized head.
    3. A new layer's alignment passes S^Delta on unchanged, so it starts as low-rank attention (ours).
    4. `convert` is ours: with RoPE, which a product of projections does not commute with, the planes of a head with the
       largest weights are kept; without RoPE, the best low-rank scores by singular value decomposition. On given text,
       eq. (2) is then fitted as a linear map by least squares.
    5. Which divergence the paper distils with is not in the sources at hand: the Kullback-Leibler divergence of eq. (4)
       and the mean squared error of the weights are both here.
    6. Scores of all pairs live between two layers, as the method asks for: memory grows with queries times keys.
       Eq. (2) and (3) go by blocks of queries; and a long text that is given in parts, through the cache, has one
       part's queries alive at a time.

Reduces to:
    torch.nn.functional.scaled_dot_product_attention: full rank and an alignment that selects S^Delta.
    cross-layer attention sharing: an alignment that selects the scores of the layer before.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_sequence
from mlreviews.common.layers import linear
from mlreviews.common.rotary import apply_rotary
from mlreviews.models import CausalAttention, KVCache, TinyLM

__all__ = [
    "AlignHeads",
    "LiSAAttention",
    "attention_distill_loss",
    "attention_distill_mse",
    "attention_weights",
    "convert_to_lisa",
    "fit_alignment",
    "layer_scores",
]

_BLOCK = 128  # queries whose alignment is computed at once


def attention_weights(
    scores: Float[Tensor, "batch heads queries keys"], mask: Bool[Tensor, "batch keys"] | None = None
) -> Float[Tensor, "batch heads queries keys"]:
    """The causal softmax of eq. (3); the last query is at the last key's place.

    Args:
        scores: [batch, heads, queries, keys].
        mask: [batch, keys], False at padding; None where there is none.

    Returns:
        [batch, heads, queries, keys], rows of 0 for queries that see nothing.
    """
    seen = _seen(scores, mask)
    empty = ~seen.any(-1, keepdim=True)
    # an empty row sees everything for a moment: the softmax over nothing is NaN, and so is its gradient
    return scores.masked_fill(~(seen | empty), float("-inf")).softmax(-1).masked_fill(empty, 0.0)


def _seen(scores: Tensor, mask: Tensor | None) -> Tensor:
    """[batch or 1, 1, queries, keys], which keys a query sees."""
    queries, keys = scores.shape[2:]
    seen = scores.new_ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    return seen if mask is None else seen & mask[:, None, None, :]


def attention_distill_loss(
    student: Float[Tensor, "batch heads queries keys"],
    teacher: Float[Tensor, "batch heads queries keys"],
    mask: Bool[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. (4): the mean divergence of the student's attention from the teacher's, in nats a query and head.

    Args:
        student: [batch, heads, queries, keys], scores before mask and softmax.
        teacher: likewise; gradients flow into it unless it is detached.
        mask: [batch, keys], False at padding; the last query is at the last key's place.
    """
    seen = _seen(student, mask)
    # a key that is not seen weighs 0, and a finite score keeps 0 times its logarithm from being NaN
    logs = [x.masked_fill(~seen, -1e4).log_softmax(-1) for x in (teacher, student)]
    rows = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    real = seen.any(-1).expand_as(rows)
    return rows[real].mean()


def attention_distill_mse(
    student: Float[Tensor, "batch heads queries keys"],
    teacher: Float[Tensor, "batch heads queries keys"],
    mask: Bool[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, ""]:
    """The mean squared difference of the attention weights, over the keys that a query sees.

    Args:
        student: [batch, heads, queries, keys], scores before mask and softmax.
        teacher: likewise; gradients flow into it unless it is detached.
        mask: [batch, keys], False at padding; the last query is at the last key's place.
    """
    seen = _seen(student, mask).expand(len(student), -1, -1, -1)
    difference = attention_weights(student, mask) - attention_weights(teacher, mask)
    return difference.square().sum() / (seen.sum() * student.shape[1])


class AlignHeads(nn.Module):
    """The network of eq. (2) on the head axis, which makes a layer's scores of two kinds of scores.

    Args:
        heads: H.
        hidden: of the network, at least 2 heads; None is that.
        generator: draws the weights of units beyond the first 2 heads; None is the global one.

    Raises:
        ValueError: a size below the least.
    """

    def __init__(self, heads: int, hidden: int | None = None, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_count("heads", heads)
        hidden = 2 * heads if hidden is None else hidden
        check_count("hidden", hidden, least=2 * heads)
        self.heads = heads
        self.up = linear(2 * heads, hidden, generator=generator)
        # No bias: one number for all keys of a row has no effect on a softmax.
        self.down = linear(hidden, heads, bias=False, generator=generator)
        self.set_linear(torch.eye(2 * heads)[heads:])

    @torch.no_grad()
    def set_linear(self, weight: Float[Tensor, "heads both"]) -> None:
        """Makes the network this linear map; units that it doesn't need get no say, but can learn.

        Args:
            weight: [heads, 2 heads], from the scores of the layer before and its own.
        """
        heads = self.heads
        self.up.weight[: 2 * heads] = torch.cat([weight, -weight]).to(self.up.weight)
        self.up.bias[: 2 * heads] = 0
        self.down.weight.zero_()
        self.down.weight[:, :heads].fill_diagonal_(1)
        self.down.weight[:, heads : 2 * heads].fill_diagonal_(-1)

    def forward(
        self,
        previous: Float[Tensor, "batch heads queries keys"],
        own: Float[Tensor, "batch heads queries keys"],
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Eq. (2).

        Args:
            previous: [batch, heads, queries, keys], scores of the layer before.
            own: likewise, of eq. (1).
        """
        both = torch.cat([previous.to(own.dtype), own], 1).flatten(2)
        up, bias, down = (x.to(both.dtype) for x in (self.up.weight, self.up.bias, self.down.weight))
        return (down @ torch.relu(up @ both + bias[:, None])).unflatten(2, own.shape[2:])


class LiSAAttention(nn.Module):
    """Attention whose scores come from the layer before, for `mlreviews.models.TinyLM`.

    It has no ``step``: it needs the scores of the layer before, which the model hands on.

    Args:
        d_model: size of a token's vector.
        heads: H.
        kv_heads: of keys and values; `heads` is a multiple of it. None is `heads`.
        layer: which block of a model this is, from 0 on.
        rank: r, of all query heads together: a multiple of heads (of 2 heads with RoPE), at most d_model. The cache
            holds r kv_heads / heads numbers a token for the keys. None is the least that is d_model / 6 or more.
        start: the first layer that shares; those before it are ordinary attention.
        align_hidden: of the alignment, at least 2 heads; None is that.
        rope_base: of the rotary embedding; None leaves positions out.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, or sizes that don't divide.
    """

    cross_layer = True
    planes: Tensor

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        layer: int = 0,
        rank: int | None = None,
        start: int = 1,
        align_hidden: int | None = None,
        rope_base: float | None = 10000.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("start", start)
        # the checks of sizes, and the ordinary projections
        plain = CausalAttention(
            d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator
        )
        self.d_model, self.heads, self.kv_heads, self.layer = d_model, heads, plain.kv_heads, layer
        self.rope_base, self.start, self.shares = rope_base, start, layer >= start
        self.rank = _checked_rank(rank, d_model, heads, rope_base) if self.shares else d_model
        self.v_proj, self.o_proj = plain.v_proj, plain.o_proj
        self.q_proj, self.k_proj = plain.q_proj, plain.k_proj
        if self.shares:
            self.q_proj = linear(d_model, self.rank, bias=False, generator=generator)
            self.k_proj = linear(d_model, self.rank * self.kv_heads // heads, bias=False, generator=generator)
            self.align = AlignHeads(heads, align_hidden, generator=generator)
        # Which planes of a full-sized head the small one's pairs of entries are, for each head of the keys: from the
        # quickest rotation to the slowest, as far as there are any.
        half, full = self.rank // heads // 2, d_model // heads // 2
        planes = torch.arange(half) * full // max(half, 1)
        self.register_buffer("planes", planes.expand(self.kv_heads, half).clone())

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        cache: KVCache | None = None,
        *,
        carried: Float[Tensor, "batch heads time keys"] | None = None,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], KVCache, Float[Tensor, "batch heads time keys"] | None]:
        """Runs over a sequence, or a part of it.

        Args:
            x: [batch, time, d_model].
            cache: what an earlier call returned; None before the first token.
            carried: [batch, heads, time, keys], scores of the layer before, of these queries and all keys so far. A
                layer that shares needs it, and another one makes no use of it.
            mask: [batch, time], False at padding on the left of a row. The outputs there have no meaning.
            positions: [time] or [batch, time], for RoPE; None counts on from the cache.

        Returns:
            ``(y, cache, scores)``: [batch, time, d_model], the cache after the last token, and the scores for the layer
            behind, before the mask; None where that one doesn't share.

        Raises:
            ValueError: x, mask, cache or carried has another shape, or carried is missing.
        """
        check_sequence(x, self.d_model, mask)
        held = 0 if cache is None else cache.length
        q, k, v = self.project(x, held, positions)
        cache = KVCache(k, v, mask) if cache is None else cache.append(k, v, mask)
        expected = (len(x), self.heads, x.shape[1], held + x.shape[1])
        if self.shares and (carried is None or carried.shape != expected):
            came = None if carried is None else tuple(carried.shape)
            raise ValueError(f"carried: expected the scores of the layer before, {list(expected)}, got {came}")
        ys, handed = [], []
        for first in range(0, x.shape[1], _BLOCK):
            rows = slice(first, first + _BLOCK)
            scores = _head_scores(q[:, rows], cache.keys)
            if self.shares:
                scores = self.align(cast(Tensor, carried)[:, :, rows], scores)
            ys.append(self._mixed(scores, cache, held + first))
            handed.append(scores.to(x.dtype))
        y = self.o_proj(torch.cat(ys, 1).flatten(2))
        return y, cache, torch.cat(handed, 2) if self.layer + 1 >= self.start else None

    def _mixed(self, scores: Tensor, cache: KVCache, first: int) -> Tensor:
        """Eq. (3) before the last projection, [batch, queries, heads, value_dim], for queries from a place on."""
        keys = first + scores.shape[2]  # those behind are not seen by any of these queries
        mask = None if cache.mask is None else cache.mask[:, :keys]
        weights = attention_weights(scores[..., :keys], mask).to(cache.values.dtype)
        weights = weights.unflatten(1, (self.kv_heads, -1))
        return torch.einsum("bkgij,bjkd->bikgd", weights, cache.values[:, :keys]).flatten(2, 3)

    def project(self, x: Tensor, start: int = 0, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, time, heads or kv_heads, dim]; queries and keys after RoPE.

        Args:
            x: [batch, time, d_model].
            start: position of the first token, where `positions` are None.
            positions: as of `forward`.
        """
        q = self.q_proj(x).unflatten(2, (self.heads, -1))
        k, v = (proj(x).unflatten(2, (self.kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        if self.rope_base is None:
            return q, k, v
        if positions is None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        return self._rotated(q, positions), self._rotated(k, positions), v

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """After RoPE with each head's own planes, for which the heads stand in the batch's place."""
        frequencies = cast(float, self.rope_base) ** -(2 * self.planes.float() * self.heads / self.d_model)
        frequencies = frequencies.repeat_interleave(x.shape[2] // self.kv_heads, 0)
        angles = positions[..., None, :, None].float() * frequencies[:, None]  # [..., heads, time, half]
        angles = angles.expand(len(x), -1, -1, -1).flatten(0, 1)
        rotated = apply_rotary(x.transpose(1, 2).flatten(0, 1)[:, :, None], angles)
        return rotated[:, :, 0].unflatten(0, (len(x), -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"d_model={self.d_model}, heads={self.heads}, kv_heads={self.kv_heads}, rank={self.rank}"


def _checked_rank(rank: int | None, d_model: int, heads: int, rope_base: float | None) -> int:
    unit = heads if rope_base is None else 2 * heads
    if rank is None:
        return -(-d_model // (6 * unit)) * unit
    check_count("rank", rank)
    if rank > d_model or rank % unit:
        raise ValueError(f"rank: expected a multiple of {unit} up to d_model {d_model}, got {rank}")
    return rank


def _head_scores(q: Tensor, k: Tensor) -> Tensor:
    """Eq. (1), [batch, heads, queries, keys], in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide).unflatten(2, (k.shape[2], -1)) * q.shape[3] ** -0.5
    return torch.einsum("bikgd,bjkd->bkgij", q, k.to(wide)).flatten(1, 2)


def layer_scores(
    model: TinyLM, ids: Int[Tensor, "batch time"]
) -> tuple[Float[Tensor, "batch time vocab"], list[Float[Tensor, "batch heads time time"]]]:
    """Runs a model and gives the scores of each of its layers, as distillation needs them.

    Args:
        model: with `CausalAttention` or `LiSAAttention`.
        ids: [batch, time].

    Returns:
        ``(logits, scores)``: [batch, time, vocab], and for each layer [batch, heads, time, time].
    """
    x, carried, scores = model.embed_tokens(ids), None, []
    if model.position_embedding is not None:
        x = x + model.position_embedding(ids, None)[0]
    for block in _blocks(model):
        q, k, _ = block.self_attn.project(block.input_layernorm(x), 0)
        x, _, carried = block(x, None, carried, {})
        scores.append(_head_scores(q, k) if carried is None else carried)
    return model.lm_head(model.norm(x)), scores


def _blocks(model: TinyLM) -> list[Any]:
    return list(model.layers)


@torch.no_grad()
def convert_to_lisa(
    model: TinyLM,
    *,
    rank: int | None = None,
    start: int = 1,
    align_hidden: int | None = None,
    text: Int[Tensor, "batch time"] | None = None,
) -> TinyLM:
    """A model with LiSA layers out of an ordinary one, which stays as it is; the beginning of a distillation.

    Args:
        model: with `CausalAttention`.
        rank: as of `LiSAAttention`; at full rank the model computes the same as before.
        start: as of `LiSAAttention`.
        align_hidden: as of `LiSAAttention`.
        text: ids [batch, time], on which the alignments are fitted by least squares. None leaves the scores of the
            layer before out.

    Raises:
        TypeError: the model has another attention.
    """
    plain = [block.self_attn for block in _blocks(model)]
    if any(type(attention) is not CausalAttention for attention in plain):
        raise TypeError(
            f"model: expected CausalAttention in all layers, got {sorted({type(a).__name__ for a in plain})}"
        )
    rope_base = plain[0].rope_base
    student = TinyLM(
        model.config,
        partial(LiSAAttention, rank=rank, start=start, align_hidden=align_hidden, rope_base=rope_base),
        position_embedding=copy.deepcopy(model.position_embedding),
        generator=torch.Generator(),
    ).to(model.embed_tokens.weight)
    weights = student.state_dict() | model.state_dict()
    for i in range(start, len(plain)):
        names = [f"layers.{i}.self_attn.{name}" for name in ("q_proj.weight", "k_proj.weight", "planes")]
        small = _planes_kept if rope_base is not None else _best_low_rank
        weights |= zip(names, small(plain[i], _blocks(student)[i].self_attn.rank), strict=True)
    student.load_state_dict(weights)
    if text is not None:
        _fit_alignments(student, model, text)
    return student


def _projections(attention: CausalAttention) -> tuple[Tensor, Tensor]:
    """Weights of queries [kv_heads, group, head_dim, d_model] and keys [kv_heads, head_dim, d_model]."""
    q = attention.q_proj.weight.unflatten(0, (attention.kv_heads, -1, attention.head_dim))
    return q, attention.k_proj.weight.unflatten(0, (attention.kv_heads, attention.head_dim))


def _planes_kept(attention: CausalAttention, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of small queries and keys and the planes: those where the product of both norms is largest."""
    half = rank // attention.heads // 2
    q, k = (x.unflatten(-2, (2, -1)) for x in _projections(attention))  # [..., 2, planes, d_model]
    size = q.square().sum((1, 2, -1)) * k.square().sum((1, -1))
    planes = size.topk(half).indices.sort().values
    small = []
    for x in (q, k):
        index = planes.reshape(len(planes), *[1] * (x.ndim - 3), half, 1).expand(*x.shape[:-2], half, x.shape[-1])
        small.append(x.gather(-2, index).flatten(0, -2))
    # the scale of eq. (1) is that of the smaller size
    return small[0] * (rank / attention.d_model) ** 0.5, small[1], planes


def _best_low_rank(attention: CausalAttention, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of small queries and keys whose products are nearest to those of the full ones, for each head of keys."""
    size = rank // attention.heads
    q, k = (x.double() for x in _projections(attention))
    products = (q.mT @ k[:, None]).flatten(1, 2)  # [kv_heads, group * d_model, d_model]
    u, s, v = torch.linalg.svd(products, full_matrices=False)
    root = s[:, None, :size].sqrt()
    small_q = (u[..., :size] * root).unflatten(1, (-1, attention.d_model)).mT.flatten(0, 2)
    small_k = (v.mT[..., :size] * root).mT.flatten(0, 1)
    planes = torch.arange(size // 2).expand(attention.kv_heads, -1)
    return small_q * (rank / attention.d_model) ** 0.5, small_k, planes


def _fit_alignments(student: TinyLM, teacher: TinyLM, text: Tensor) -> None:
    """Sets each alignment to the linear map that makes most of the teacher's scores."""
    hidden, scores = teacher(text, hidden_states=True).hidden_states, layer_scores(teacher, text)[1]
    previous: Tensor | None = None
    for i, (block, target) in enumerate(zip(_blocks(student), scores, strict=True)):
        if block.self_attn.shares:
            q, k, _ = block.self_attn.project(block.input_layernorm(hidden[i]))
            own = _head_scores(q, k)
            block.self_attn.align.set_linear(fit_alignment(torch.cat([cast(Tensor, previous), own], 1), target))
            target = block.self_attn.align(previous, own)
        previous = target


def fit_alignment(
    given: Float[Tensor, "batch given queries keys"], wanted: Float[Tensor, "batch heads queries keys"]
) -> Float[Tensor, "heads given"]:
    """The linear map on the head axis that is nearest to the wanted scores, up to a number for each row.

    Args:
        given: [batch, given, queries, keys], scores of whatever heads the wanted ones are to be made of.
        wanted: [batch, heads, queries, keys]; the last query is at the last key's place.
    """
    x, y = (_centred(scores.double()) for scores in (given, wanted))
    return (y @ torch.linalg.pinv(x)).to(wanted.dtype)


def _centred(scores: Tensor) -> Tensor:
    """[heads, batch * queries * keys] without the mean of each row, 0 where a query doesn't see a key."""
    seen = _seen(scores, None)
    mean = (scores * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    return ((scores - mean) * seen).transpose(0, 1).flatten(1)
