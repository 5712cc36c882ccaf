r"""Mamba: a state-space model that chooses by the input what enters its state and what it forgets.

Paper: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (arXiv:2312.00752).

Every channel has a small linear recurrence of its own. Step size, input and output vectors are computed from the
current token, so that the layer can let a token in, pass over it, or wipe the state, which no time-invariant model can.
The price is that the recurrence is no convolution any more; it is computed by a scan that never stores the states.

Equation:
    For each channel with input $u_t$ and the state $h_t \in \mathbb{R}^N$ (algorithm 2 and section 3.5 of the paper):
    $$ h_t = e^{\Delta_t A} \odot h_{t-1} + \Delta_t u_t B_t, \qquad y_t = (C_t \cdot h_t + D u_t)\, \mathrm{silu}(z_t)
       \tag{1} $$
    $$ [u, z] = W_{in} x, \qquad u \leftarrow \mathrm{silu}(\mathrm{conv}(u)), \qquad
       [\delta, B, C] = W_x u, \qquad \Delta = \mathrm{softplus}(W_\Delta \delta + b_\Delta) \tag{2} $$
    and the block gives $W_{out} y$. The exact discretisation for an input held over the step is
    $$ h_t = e^{\Delta A} h_{t-1} + \frac{e^{\Delta A} - 1}{\Delta A} \Delta u_t B_t, \tag{3} $$
    whose factor the recurrence (1) replaces by its limit 1 for small steps. With N = 1, A = -1, B = C = 1 and
    $\Delta_t = \mathrm{softplus}(s_t)$, the exact one is a gated leaky integrator (theorem 1):
    $$ h_t = (1 - g_t) h_{t-1} + g_t u_t, \qquad g_t = \sigma(s_t) \tag{4} $$

Symbols:
    x: [batch, time, d_model], the input.
    u: [batch, time, d_inner], the input of the recurrences, d_inner = expand * d_model.
    z: [batch, time, d_inner], the gate.
    Delta: [batch, time, d_inner], step sizes, positive.
    A: [d_inner, N], rates, negative: A = -exp(A_log).
    B, C: [batch, time, N], shared by all channels.
    D: [d_inner], the skip connection.
    h: [batch, d_inner, N], the state.

Defaults:
    d_state: 16, N (section 3.6 and appendix E.2).
    d_conv: 4 (authors' code).
    expand: 2 (section 3.4).
    dt_rank: d_model / 16, rounded up (section 3.6; authors' code).
    A: -(1, ..., N) in every channel, S4D-Real (section 3.6).
    b_Delta: such that step sizes are log-uniform in [0.001, 0.1], 1e-4 at least (authors' code; section 3.6 has them
        uniform there).

Deviations:
    1. The recurrence (1) has the factor of (3) replaced by 1, as the authors' code has; equation 4 of the paper has it.
       So theorem 1 is exact for (3) and not for what is trained; see `zero_order_hold`.
    2. The window of the convolution holds d_conv - 1 inputs, one less than in the authors' code; it needs no more.

Reduces to:
    mingru: with the gain of (3), N = 1, A = -1, B = C = 1, D = 0 and no z it is the recurrence of minGRU without
        logarithms, by (4): its gate is g, its candidate u.
    torch.nn.functional.conv1d: with Delta, B and C the same at all times (a time-invariant model), over the kernel
        $K_k = \sum_n C_n e^{k \Delta A_n} \Delta B_n$.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_sequence
from mlreviews.common.layers import causal_conv1d, depthwise_conv1d, linear
from mlreviews_kernels.selective_scan import selective_scan, selective_scan_step

__all__ = ["MambaBlock", "MambaState", "initial_dt_bias", "zero_order_hold"]


class MambaState(NamedTuple):
    """What a block remembers of a sequence.

    Attributes:
        conv: [batch, d_conv - 1, channels], the last inputs of the convolution (before it, not after).
        ssm: [batch, d_inner, d_state], the state of the recurrences; float32 for half-precision models.
    """

    conv: Tensor
    ssm: Tensor


def zero_order_hold(
    delta: Float[Tensor, "*batch channels"], A: Float[Tensor, "channels state"]
) -> tuple[Float[Tensor, "*batch channels state"], Float[Tensor, "*batch channels state"]]:
    """The exact discretisation (3): decay ``exp(delta A)`` and the gain ``expm1(delta A) / (delta A)``.

    The input of the recurrence is ``gain * delta * u * B``; equation (1) takes 1 for the gain.

    Args:
        delta: step sizes, [..., channels].
        A: rates, [channels, state]; a rate of zero has the gain 1, an integrator.

    Returns:
        ``(decay, gain)``, both [..., channels, state].
    """
    exponent = delta[..., None] * A
    safe = torch.where(exponent == 0, 1.0, exponent)
    return exponent.exp(), torch.where(exponent == 0, 1.0, torch.expm1(safe) / safe)


def initial_dt_bias(
    channels: int, *, low: float = 1e-3, high: float = 0.1, generator: torch.Generator | None = None
) -> Float[Tensor, " channels"]:
    """Biases whose softplus is log-uniform in [low, high]: channels begin with memories of very different length.

    Args:
        channels: how many.
        low: the shortest step.
        high: the longest step.
        generator: draws them; None is the global one.
    """
    check_count("channels", channels)
    dt = torch.exp(torch.rand(channels, generator=generator) * math.log(high / low) + math.log(low)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus, without overflow


class SelectiveSSM(nn.Module):
    """Convolution, selection and recurrence: what stands between the projections of a block.

    Args:
        d_inner: channels.
        d_state: N, states a channel.
        d_conv: width of the convolution.
        dt_rank: size of delta in (2).
        conv_bias: whether the convolution has a bias.
        generator: draws the weights; None is the global one.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        *,
        conv_bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank = d_inner, d_state, dt_rank
        self.conv1d = depthwise_conv1d(d_inner, d_conv, bias=conv_bias, generator=generator)
        self.x_proj = linear(d_inner, dt_rank + 2 * d_state, bias=False, generator=generator)
        self.dt_proj = linear(dt_rank, d_inner, generator=generator)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_dt_bias(d_inner, generator=generator))
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))

    def rates(self) -> Float[Tensor, "d_inner d_state"]:
        """A = -exp(A_log), [d_inner, d_state], in float32 at least."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def convolve(
        self, u: Tensor, window: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch time d_inner"], Float[Tensor, "sequences past d_inner"]]:
        """The activated convolution of u, [batch, time, d_inner], and its window; arguments of `causal_conv1d`."""
        u, window = causal_conv1d(u, self.conv1d.weight[:, 0], self.conv1d.bias, window, cu_seqlens=cu_seqlens)
        return nn.functional.silu(u), window

    def selection(
        self, u: Float[Tensor, "*batch d_inner"]
    ) -> tuple[Float[Tensor, "*batch d_inner"], Float[Tensor, "*batch d_state"], Float[Tensor, "*batch d_state"]]:
        """Delta before bias and softplus, B and C, of eq. (2).

        Args:
            u: [..., d_inner], after the convolution.
        """
        delta, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return nn.functional.linear(delta, self.dt_proj.weight), B, C

    def scan(
        self,
        u: Float[Tensor, "batch time d_inner"],
        delta: Float[Tensor, "batch time d_inner"],
        B: Float[Tensor, "batch time d_state"],
        C: Float[Tensor, "batch time d_state"],
        z: Float[Tensor, "batch time d_inner"],
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch time d_inner"], Float[Tensor, "sequences d_inner d_state"]]:
        """The gated recurrence (1) of what `selection` gave; initial_state and cu_seqlens as of `selective_scan`."""
        inputs = (u, delta, self.rates(), B, C, self.D, z, self.dt_proj.bias)
        return selective_scan(*inputs, delta_softplus=True, initial_state=initial_state, cu_seqlens=cu_seqlens)


class MambaBlock(SelectiveSSM):
    """The block of the paper, figure 3. Parameters have the names of the authors' code and of transformers.

    Args:
        d_model: size of input and output.
        d_state: N, states a channel.
        d_conv: width of the convolution.
        expand: channels as a multiple of d_model.
        dt_rank: size of delta in (2); None is d_model / 16, rounded up.
        bias: whether in_proj and out_proj have biases.
        conv_bias: whether the convolution has one.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": rank}
        for name, size in sizes.items():
            check_count(name, size)
        super().__init__(expand * d_model, d_state, d_conv, rank, conv_bias=conv_bias, generator=generator)
        self.d_model = d_model
        self.in_proj = linear(d_model, 2 * self.d_inner, bias=bias, generator=generator)
        self.out_proj = linear(self.d_inner, d_model, bias=bias, generator=generator)

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: MambaState | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        cu_seqlens: Int[Tensor, " documents_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], MambaState]:
        """Runs over a sequence.

        Args:
            x: [batch, time, d_model].
            state: what an earlier call returned; None before the first token.
            mask: [batch, time], False at padding, which has to be on the left of the first token of a row. The outputs
                there have no meaning.
            cu_seqlens: [documents + 1], where documents packed into the one row (batch 1) begin and end; states are
                then one a document.

        Returns:
            ``(y, state)``: [batch, time, d_model], and the state after the last token.

        Raises:
            ValueError: x, state or mask has another shape.
        """
        check_sequence(x, self.d_model, mask)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        window, ssm = (None, None) if state is None else state
        u, window = self.convolve(without(u, mask), window, cu_seqlens)
        u = without(u, mask)
        y, ssm = self.scan(u, *self.selection(u), z, ssm, cu_seqlens)
        return self.out_proj(y), MambaState(window, ssm)

    def step(
        self, x_t: Float[Tensor, "batch d_model"], state: MambaState | None = None
    ) -> tuple[Float[Tensor, "batch d_model"], MambaState]:
        """One token, [batch, d_model]: ``(y_t, state)`` as `forward` gives them for a sequence of length 1."""
        if x_t.ndim != 2:
            raise ValueError(f"x_t: expected [batch, {self.d_model}], got shape {tuple(x_t.shape)}")
        if state is None:
            y, state = self(x_t[:, None])
            return y[:, 0], state
        check_sequence(x_t[:, None], self.d_model)
        u, z = self.in_proj(x_t).chunk(2, dim=-1)
        u, window = self.convolve(u[:, None], state.conv)
        u = u[:, 0]
        delta, B, C = self.selection(u)
        y, ssm = selective_scan_step(
            u, delta, self.rates(), B, C, self.D, z, self.dt_proj.bias, delta_softplus=True, state=state.ssm
        )
        return self.out_proj(y), MambaState(window, ssm)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"d_model={self.d_model}, d_inner={self.d_inner}, d_state={self.d_state}, dt_rank={self.dt_rank}"


def without(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where the mask is False: what is neither in the window nor in the state has no effect later."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)
