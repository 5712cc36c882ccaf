"""Attention as a recurrence, as a layer: what is remembered of the past has one size, however long it is.

`RecurrentAttention` has the projections of `CausalAttention`; a variant is one method, `recur`. Queries and keys come
to it before RoPE, since a feature map may have to be applied first::

    class Memory(RecurrentAttention):
        def recur(self, tokens, rotate, state=None):
            q, k = rotate(tokens.q, hidden(tokens.k, tokens.mask))
            ...
            return out, FixedState(memory, length)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlreviews.common.checks import check_sequence
from mlreviews.models.attention import CausalAttention

__all__ = ["FixedState", "RecurrentAttention", "Rotate", "Tokens", "check_heads", "hidden", "repeated"]

Rotate = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class FixedState(NamedTuple):
    """What a recurrence remembers: no more after a million tokens than after one.

    Attributes:
        memory: S, [batch, heads, features, dim].
        length: how many tokens have come, padding included.
        normaliser: z, [batch, heads, features, 1]; None where there is no denominator.
        log_scale: [batch, heads], the logarithm of what `memory` and `normaliser` have been divided by; None is 0.
    """

    memory: Tensor
    length: int
    normaliser: Tensor | None = None
    log_scale: Tensor | None = None

    def rows(self, index: Int[Tensor, " rows"]) -> FixedState:
        """The given rows of the batch, in that order; a row may be taken several times.

        Args:
            index: [rows], int64.
        """
        memory, normaliser, log_scale = (
            None if x is None else x[index] for x in (self.memory, self.normaliser, self.log_scale)
        )
        assert memory is not None
        return FixedState(memory, self.length, normaliser, log_scale)


class Tokens(NamedTuple):
    """What a recurrence reads.

    Attributes:
        x: [batch, time, d_model], the layer's input.
        q: [batch, time, heads, dim], before RoPE.
        k: [batch, time, kv_heads, dim], before RoPE.
        v: [batch, time, kv_heads, dim].
        mask: [batch, time], False at padding; None where there is none.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None


class RecurrentAttention(CausalAttention):
    """A layer whose state is a `FixedState`; arguments as of `CausalAttention`. Subclasses have `recur`."""

    def forward(  # type: ignore[override]  # no trees
        self,
        x: Float[Tensor, "batch time d_model"],
        state: FixedState | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], FixedState]:
        """Arguments, results and errors as of `CausalAttention.forward`; the state is a `FixedState`."""
        check_sequence(x, self.d_model, mask)
        start = 0 if state is None else state.length
        q = self.q_proj(x).unflatten(2, (self.heads, -1))
        k, v = (proj(x).unflatten(2, (self.kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        rotate = partial(self.rotated, start=start, positions=positions)
        out, state = self.recur(Tokens(x, q, k, v, mask), rotate, state)
        return self.o_proj(out.flatten(2)), state

    def recur(
        self, tokens: Tokens, rotate: Rotate, state: FixedState | None = None
    ) -> tuple[Float[Tensor, "batch time heads dim"], FixedState]:
        """What the heads give, and the state after the last token; the method that variants have.

        Args:
            tokens: queries, keys and values.
            rotate: from q and k, or features of theirs, to those after RoPE.
            state: before the first of these tokens; None where there was none.
        """
        raise NotImplementedError


def repeated(x: Float[Tensor, "batch time kv_heads dim"], heads: int) -> Float[Tensor, "batch time heads dim"]:
    """Keys or values of each query head: head h uses head h // (heads / kv_heads).

    Args:
        x: [batch, time, kv_heads, dim].
        heads: a multiple of kv_heads.
    """
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def hidden(
    y: Float[Tensor, "batch time *rest"], mask: Bool[Tensor, "batch time"] | None
) -> Float[Tensor, "batch time *rest"]:
    """With zeros at padding.

    Args:
        y: [batch, time, ...], such as keys.
        mask: [batch, time], False at padding; None where there is none.
    """
    return y if mask is None else y.masked_fill(~mask.reshape(*mask.shape, *[1] * (y.ndim - 2)), 0.0)


def check_heads(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> None:
    """Raises ValueError unless q, k and v are [batch, time, heads, features] and go together.

    Args:
        q: [batch, q_time, heads, features].
        k: [batch, k_time, kv_heads, features].
        v: [batch, k_time, kv_heads, dim].
        causal: whether q has to be as long as k.
    """
    if q.ndim != 4:
        raise ValueError(f"q: expected [batch, time, heads, features], got shape {tuple(q.shape)}")
    batch, time, heads, features = q.shape
    lengths = f"{batch}, {time}" if causal else f"{batch}, time"
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != features or (causal and k.shape[1] != time):
        raise ValueError(f"k: expected [{lengths}, kv_heads, {features}], got shape {tuple(k.shape)}")
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(f"k: expected a number of heads that divides {heads}, got shape {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected {list(k.shape[:3])} and dim, got shape {tuple(v.shape)}")
