"""A small sequence model around any recurrent mixer: embedding, pre-norm residual blocks, norm, head.

A mixer is any module from ``[batch, time, d_model]`` to the same shape that carries a state::

    class Mixer(nn.Module):
        def forward(self, x, state=None): ...   # -> (y, state); None is the state before the first token
        def step(self, x_t, state): ...         # -> (y_t, state), x_t and y_t [batch, d_model]

What the state is, is the mixer's own business, and the model never looks into it. `mlreviews.ssm` has many mixers::

    model = SequenceModel(ByteTokenizer.vocab_size, 64, [MambaBlock(64) for _ in range(2)])

    logits, _ = model(window[:, :-1])                                               # training
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    logits, state = model(prompt)                                                   # decoding
    for _ in range(100):
        logits, state = model.step(logits[..., -1, :].argmax(-1), state)            # or of [batch, vocab] itself

A sequence may be cut anywhere: the state carried over makes the parts equal to the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number
from mlreviews.common.layers import linear

__all__ = ["ResidualBlock", "SequenceModel"]


class ResidualBlock(nn.Module):
    """One pre-norm residual block: ``x + mixer(norm(x))``, and with an MLP then ``x + mlp(norm(x))``.

    Args:
        d_model: size of a token's vector.
        mixer: from [batch, time, d_model] to the same, with a state; see the module's text.
        mlp_ratio: hidden units of the MLP (linear, GELU, linear) as a multiple of d_model; 0 for no MLP.
        generator: draws the MLP's weights.

    Raises:
        ValueError: a size below 1, or a negative ratio.
    """

    def __init__(
        self, d_model: int, mixer: nn.Module, *, mlp_ratio: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_count("d_model", d_model)
        check_number("mlp_ratio", mlp_ratio, least=0.0)
        self.norm = nn.RMSNorm(d_model)
        self.mixer: Any = mixer
        hidden = round(mlp_ratio * d_model)
        self.mlp = (
            nn.Sequential()
            if hidden == 0
            else nn.Sequential(
                nn.RMSNorm(d_model),
                linear(d_model, hidden, generator=generator),
                nn.GELU(),
                linear(hidden, d_model, generator=generator),
            )
        )

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: Any = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        cu_seqlens: Int[Tensor, " documents_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], Any]:
        """Runs over a sequence; arguments as of `SequenceModel.forward`, with vectors in place of ids."""
        # Only what was given is passed on: not every mixer knows padding and packing.
        layout = {name: value for name, value in (("mask", mask), ("cu_seqlens", cu_seqlens)) if value is not None}
        mixed, state = self.mixer(self.norm(x), state, **layout)
        return self._finish(x + mixed), state

    def step(
        self, x_t: Float[Tensor, "batch d_model"], state: Any = None
    ) -> tuple[Float[Tensor, "batch d_model"], Any]:
        """One token: ``(y_t, state)``."""
        mixed, state = self.mixer.step(self.norm(x_t), state)
        return self._finish(x_t + mixed), state

    def _finish(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) if len(self.mlp) else x


class SequenceModel(nn.Module):
    """Embedding, residual blocks around the given mixers, norm, and a head to logits.

    Args:
        vocab_size: number of ids.
        d_model: size of a token's vector.
        mixers: one a block, from the first to the last; their number is the model's depth.
        mlp_ratio: hidden units of the MLP of each block as a multiple of d_model; 0 for none.
        classes: number of logits; None is vocab_size, with the embedding's matrix as the head's (tied).
        generator: draws the embedding, the head and the MLPs. Mixers have drawn their own weights.

    Raises:
        ValueError: a size below 1, a negative ratio, or no mixers.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        mixers: Iterable[nn.Module],
        *,
        mlp_ratio: float = 0.0,
        classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("vocab_size", vocab_size)
        check_count("d_model", d_model)
        # An empty weight that is filled below: the constructor would draw from the global generator.
        self.embedding = nn.Embedding(vocab_size, d_model, _weight=torch.empty(vocab_size, d_model))
        # With the head tied, entries of this size give the logits of a normed vector unit variance.
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5, generator=generator)
        self.blocks = nn.ModuleList(
            ResidualBlock(d_model, mixer, mlp_ratio=mlp_ratio, generator=generator) for mixer in mixers
        )
        if not self.blocks:
            raise ValueError("mixers: expected at least one, got none")
        self.norm = nn.RMSNorm(d_model)
        if classes is None:
            self.head = linear(d_model, vocab_size, bias=False, generator=torch.Generator())
            self.head.weight = self.embedding.weight
        else:
            check_count("classes", classes)
            self.head = linear(d_model, classes, bias=False, generator=generator)

    def forward(
        self,
        ids: Int[Tensor, "batch time"],
        state: tuple[Any, ...] | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        cu_seqlens: Int[Tensor, " documents_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "batch time classes"], tuple[Any, ...]]:
        """Runs over a sequence.

        Args:
            ids: [batch, time], int64 or int32.
            state: what an earlier call returned, one state a block; None before the first token.
            mask: [batch, time], False at padding on the left of a row, for mixers that take a mask; logits there have
                no meaning.
            cu_seqlens: [documents + 1], where documents packed into the one row (batch 1) begin and end, for mixers
                that take it; states are then one a document.

        Returns:
            ``(logits, state)``: [batch, time, classes], and the states after the last token.

        Raises:
            ValueError: ids are not [batch, time] or have an empty axis, or there are not as many states as blocks.
            TypeError: ids are not integers.
        """
        _check_ids(ids, ("batch", "time"))
        x = self.embedding(ids)
        found = []
        for block, before in zip(self.blocks, self._states(state), strict=True):
            x, after = block(x, before, mask=mask, cu_seqlens=cu_seqlens)
            found.append(after)
        return self.head(self.norm(x)), tuple(found)

    def step(
        self, ids: Int[Tensor, " batch"], state: tuple[Any, ...] | None = None
    ) -> tuple[Float[Tensor, "batch classes"], tuple[Any, ...]]:
        """One token a row, for decoding.

        Args:
            ids: [batch].
            state: as in `forward`; the two can be mixed freely.

        Returns:
            ``(logits, state)``: [batch, classes], and the states after the token. Errors as of `forward`.
        """
        _check_ids(ids, ("batch",))
        x = self.embedding(ids)
        found = []
        for block, before in zip(self.blocks, self._states(state), strict=True):
            assert isinstance(block, ResidualBlock)
            x, after = block.step(x, before)
            found.append(after)
        return self.head(self.norm(x)), tuple(found)

    def _states(self, state: tuple[Any, ...] | None) -> tuple[Any, ...]:
        depth = len(self.blocks)
        if state is None:
            return (None,) * depth
        if len(state) != depth:
            raise ValueError(f"state: expected one for each of {depth} blocks, got {len(state)}")
        return state


def _check_ids(ids: Tensor, axes: tuple[str, ...]) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
    if ids.ndim != len(axes) or ids.numel() == 0:
        raise ValueError(f"ids: expected [{', '.join(axes)}] with no empty axis, got shape {tuple(ids.shape)}")
