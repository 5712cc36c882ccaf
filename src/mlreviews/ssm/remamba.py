r"""ReMamba: a second pass of Mamba over the few tokens of a long context that the first pass found to matter.

Paper: ReMamba: Equip Mamba with Effective Long-Sequence Modeling (arXiv:2408.15496).

A first pass gives each token of a long prompt a final state. The early part of the prompt is then replaced by the few
states that are most similar to the last one, and the model runs again over this shorter sequence. In the second pass
the step sizes at the kept states are scaled by their similarity: what matters little hardly changes the recurrent
state, and the similarity is trained by the loss, which a hard choice alone would not allow.

Equation:
    The prompt has L tokens with embeddings $x_i$, and final normed states $h_i$ in the first pass. Of the range R with
    $$ R = [s L,\, s L + M), \qquad M = \lceil p L \rceil, \qquad K = \lceil \rho M \rceil \tag{1} $$
    the K states of the largest scores $a_i$ are kept, in their order in the prompt:
    $$ a_i = \cos\left(\mathrm{MLP}_Q(h_L), \mathrm{MLP}_K(h_i)\right), \qquad v_i = \mathrm{MLP}_V(h_i) \tag{2} $$
    with MLPs of the form linear, SiLU, linear. The second pass runs over
    $$ [x_1, \dots, x_{sL},\; v_{i_1}, \dots, v_{i_K},\; x_{sL+M+1}, \dots] \tag{3} $$
    and in each of its blocks the step sizes at the kept states are (elsewhere those of Mamba)
    $$ \Delta_i = \mathrm{softplus}\left(\mathrm{relu}(a_i)\, W_\Delta \delta_i + b_{ret} + b_\Delta\right) \tag{4} $$

Symbols:
    input_ids: [batch, time], the prompt, and what follows it.
    h: [batch, prompt, d_model], final normed states of the first pass.
    a: [batch, K], cosines, in [-1, 1].
    b_ret: [blocks, d_inner], learned, one for each block of the backbone.
    W_Delta delta: [batch, time, d_inner], step sizes before bias and softplus, as in the card of mamba.

Defaults:
    compress_frac: 0.18, p at inference (authors' script for LongBench).
    ratio: 0.009, rho at inference (authors' script for LongBench).
    start: 0, s (authors' scripts).
    b_ret: 0 at first, as the biases of the MLPs are (authors' code).

Deviations:
    1. The paper fine-tunes Mamba 2.8B by LoRA, with p drawn from [0.1, 0.3] and rho from [0.05, 0.2] for each prompt
       of the training; here no part is frozen, and `compress_frac` and `ratio` are attributes that may be changed.
    2. A rounding error does not make M or K larger by one: 0.07 of 100 tokens are 7, and not 8.
    3. The first pass ends with the prompt; the authors' code takes it on over the answer, which changes nothing.
    4. Equal scores are decided for the earlier token.
    5. The output is as short as (3); the authors' code fills it up in front with embeddings.

Reduces to:
    mamba: the second pass over the embeddings themselves, with all scores 1 and b_ret = 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number, check_sequence
from mlreviews.common.layers import linear
from mlreviews.models import ResidualBlock, SequenceModel
from mlreviews.ssm.mamba import MambaBlock, MambaState

__all__ = ["Compressed", "ReMamba", "adapted_forward", "range_to_compress", "select_topk_by_query"]


class Compressed(NamedTuple):
    """What the first pass leaves to the second one.

    Attributes:
        inputs: [batch, time - M + K, d_model], the sequence (3).
        scores: [batch, K], the cosines of the kept states.
        indices: [batch, K], their places in the prompt, ascending.
        first: the place of the first of them in ``inputs``.
    """

    inputs: Tensor
    scores: Tensor
    indices: Tensor
    first: int


def range_to_compress(prompt_len: int, compress_frac: float, ratio: float, start: float = 0.0) -> tuple[int, int, int]:
    """Equation (1).

    Args:
        prompt_len: L, tokens.
        compress_frac: p, the part of the prompt that is compressed, in (0, 1].
        ratio: rho, the part of the range that is kept, in (0, 1].
        start: s, where the range begins, as a part of the prompt; start + compress_frac is at most 1.

    Returns:
        ``(first, last, K)``: the range [first, last) and how many of it are kept, one at least.

    Raises:
        ValueError: a number out of its range.
    """
    check_count("prompt_len", prompt_len)
    _check_part("compress_frac", compress_frac)
    _check_part("ratio", ratio)
    check_number("start", start, least=0.0)
    if start + compress_frac > 1 + 1e-9:
        raise ValueError(f"start: expected at most 1 - compress_frac = {1 - compress_frac:.4g}, got {start}")
    first = math.floor(start * prompt_len + 1e-9)
    last = min(first + _ceil(compress_frac * prompt_len), prompt_len)
    return first, last, _ceil(ratio * (last - first))


def _check_part(name: str, value: float) -> None:
    check_number(name, value, above=0.0)
    if value > 1:
        raise ValueError(f"{name}: expected at most 1, got {value}")


def _ceil(value: float) -> int:
    """Rounds up, but not what a rounding error has put above a whole number; 1 at least."""
    return max(math.ceil(value - 1e-9), 1)


def select_topk_by_query(
    h: Float[Tensor, "batch tokens dim"], q: Float[Tensor, "batch dim"], K: int
) -> tuple[Int64[Tensor, "batch K"], Float[Tensor, "batch K"]]:
    """The K tokens most similar to a query by their cosine, in the order of their places.

    Args:
        h: [batch, tokens, dim], keys.
        q: [batch, dim], one query a row.
        K: how many, of at least as many tokens. Of equal cosines the earlier one is taken.

    Returns:
        ``(indices, scores)``, both [batch, K]: places, ascending, and cosines (float32 for half-precision keys). The
        gradient flows through the scores.

    Raises:
        ValueError: shapes don't go together, or there are fewer tokens than K.
    """
    check_count("K", K)
    if h.ndim != 3 or h.shape[1] < K:
        raise ValueError(f"h: expected [batch, tokens, dim] with at least K = {K} tokens, got shape {tuple(h.shape)}")
    if q.shape != (h.shape[0], h.shape[2]):
        raise ValueError(f"q: expected {[h.shape[0], h.shape[2]]}, as h has, got shape {tuple(q.shape)}")
    dtype = torch.promote_types(h.dtype, torch.float32)
    cosines = nn.functional.cosine_similarity(h.to(dtype), q.to(dtype)[:, None], dim=2)
    indices = cosines.sort(dim=1, descending=True, stable=True).indices[:, :K].sort(dim=1).values
    return indices, cosines.gather(1, indices)


def adapted_forward(
    block: MambaBlock,
    x: Float[Tensor, "batch time d_model"],
    weights: Float[Tensor, "batch K"],
    first: int,
    ret_bias: Float[Tensor, " d_inner"],
) -> tuple[Float[Tensor, "batch time d_model"], MambaState]:
    """A block of Mamba with the step sizes (4) at K tokens.

    Args:
        block: gives all weights but ret_bias.
        x: [batch, time, d_model].
        weights: [batch, K], of the tokens first, ..., first + K - 1: relu(a).
        first: where the tokens begin.
        ret_bias: [d_inner], b_ret.

    Returns:
        As `MambaBlock.forward`, whose ``step`` goes on from the state.

    Raises:
        ValueError: shapes don't go together, or the tokens don't lie within the sequence.
    """
    check_sequence(x, block.d_model)
    last = first + (weights.shape[1] if weights.ndim == 2 else 0)
    if weights.ndim != 2 or weights.shape[0] != x.shape[0] or not 0 <= first < last <= x.shape[1]:
        raise ValueError(
            f"weights: expected [{x.shape[0]}, K] for tokens from {first} on of {x.shape[1]}, "
            f"got shape {tuple(weights.shape)}"
        )
    if ret_bias.shape != (block.d_inner,):
        raise ValueError(f"ret_bias: expected [{block.d_inner}], got shape {tuple(ret_bias.shape)}")
    u, z = block.in_proj(x).chunk(2, dim=-1)
    u, window = block.convolve(u)
    delta, B, C = block.selection(u)
    scaled = delta[:, first:last] * weights[..., None].to(delta.dtype) + ret_bias
    delta = torch.cat([delta[:, :first], scaled, delta[:, last:]], dim=1)
    y, ssm = block.scan(u, delta, B, C, z)
    return block.out_proj(y), MambaState(window, ssm)


def _mlp(width: int, generator: torch.Generator | None) -> nn.Sequential:
    first, second = (linear(width, width, generator=generator) for _ in range(2))
    for layer in (first, second):
        # Else cosines would say more of the biases than of the tokens, and be negative for all tokens of many a draw.
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.SiLU(), second)


class ReMamba(nn.Module):
    """The two passes over a model of Mamba blocks.

    Args:
        backbone: a model whose mixers are all `MambaBlock`; its weights are shared by both passes.
        compress_frac: p of (1).
        ratio: rho of (1).
        start: s of (1).
        generator: draws the weights of the three MLPs; None is the global one.

    Raises:
        ValueError: a part is not in its range.
        TypeError: a mixer is none of Mamba's.
    """

    def __init__(
        self,
        backbone: SequenceModel,
        compress_frac: float = 0.18,
        ratio: float = 0.009,
        start: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        range_to_compress(1, compress_frac, ratio, start)
        mixers: list[Any] = [block.mixer for block in backbone.blocks]
        for mixer in mixers:
            if not isinstance(mixer, MambaBlock):
                raise TypeError(f"backbone: expected mixers of type MambaBlock, got {type(mixer).__name__}")
        self.backbone = backbone
        self.compress_frac, self.ratio, self.start = compress_frac, ratio, start
        width = backbone.embedding.embedding_dim
        self.Q_proj, self.K_proj, self.V_proj = (_mlp(width, generator) for _ in range(3))
        self.ret_bias = nn.ParameterList(nn.Parameter(torch.zeros(mixer.d_inner)) for mixer in mixers)

    def select(
        self, h: Float[Tensor, "batch tokens d_model"], query: Float[Tensor, "batch d_model"], K: int
    ) -> tuple[Int64[Tensor, "batch K"], Float[Tensor, "batch K"]]:
        """Places and scores (2) of the states that are kept; a subclass may choose in another way.

        Args:
            h: [batch, tokens, d_model], states of the range.
            query: [batch, d_model], the last state of the prompt.
            K: how many are kept.
        """
        return select_topk_by_query(self.K_proj(h), self.Q_proj(query), K)

    def compress(self, input_ids: Int[Tensor, "batch time"], prompt_len: int | None = None) -> Compressed:
        """The first pass, and what it keeps. Arguments as of `forward`."""
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: expected [batch, time] with no empty axis, got shape {tuple(input_ids.shape)}"
            )
        length = input_ids.shape[1] if prompt_len is None else prompt_len
        check_count("prompt_len", length)
        if length > input_ids.shape[1]:
            raise ValueError(f"prompt_len: expected at most the {input_ids.shape[1]} tokens there are, got {length}")
        first, last, kept = range_to_compress(length, self.compress_frac, self.ratio, self.start)
        embedded = self.backbone.embedding(input_ids)
        h = embedded[:, :length]
        for block in self.backbone.blocks:
            h, _ = block(h)
        h = self.backbone.norm(h)
        inside = h[:, first:last]
        indices, scores = self.select(inside, h[:, -1], kept)
        values = self.V_proj(inside.gather(1, indices[..., None].expand(-1, -1, h.shape[2])))
        inputs = torch.cat([embedded[:, :first], values, embedded[:, last:]], dim=1)
        return Compressed(inputs, scores, indices + first, first)

    def second_pass(
        self, inputs: Float[Tensor, "batch time d_model"], weights: Float[Tensor, "batch K"], first: int
    ) -> tuple[Float[Tensor, "batch time classes"], tuple[MambaState, ...]]:
        """The backbone over vectors, with the step sizes (4).

        Args:
            inputs: [batch, time, d_model], the sequence (3).
            weights: [batch, K], relu of the scores.
            first: where the kept states begin in it.

        Returns:
            ``(logits, state)``, as of `forward`.
        """
        x, states = inputs, []
        for block, ret_bias in zip(self.backbone.blocks, self.ret_bias, strict=True):
            assert isinstance(block, ResidualBlock)
            mixed, state = adapted_forward(block.mixer, block.norm(x), weights, first, ret_bias)
            x = x + mixed
            x = x + block.mlp(x) if len(block.mlp) else x
            states.append(state)
        return self.backbone.head(self.backbone.norm(x)), tuple(states)

    def forward(
        self, input_ids: Int[Tensor, "batch time"], prompt_len: int | None = None
    ) -> tuple[Float[Tensor, "batch kept classes"], tuple[MambaState, ...]]:
        """Both passes.

        Args:
            input_ids: [batch, time], int64 or int32.
            prompt_len: L; the tokens after it are an answer, which the first pass does not see. None is all of them.

        Returns:
            ``(logits, state)``: [batch, time - M + K, classes], whose last ones belong to the last tokens, and the
            state of each block of the backbone after the last token.

        Raises:
            ValueError: input_ids are not [batch, time] or have an empty axis, or there are fewer than prompt_len.
        """
        inputs, scores, _, first = self.compress(input_ids, prompt_len)
        return self.second_pass(inputs, scores.relu(), first)

    def step(
        self, ids: Int[Tensor, " batch"], state: tuple[MambaState, ...]
    ) -> tuple[Float[Tensor, "batch classes"], tuple[MambaState, ...]]:
        """One token a row, for decoding after `forward`: the backbone's own step.

        Args:
            ids: [batch].
            state: of an earlier call.
        """
        return self.backbone.step(ids, state)
