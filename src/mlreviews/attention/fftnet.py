r"""FFTNet: tokens are mixed by a filter in the frequency domain that depends on the input, instead of attention.

Paper: The FFT Strikes Back: An Efficient Alternative to Self-Attention (arXiv:2502.18394).

Every feature is taken to the frequency domain over the tokens; its coefficients are multiplied by a filter, which is a
learned one plus what a small network makes of the mean token; a ReLU on the magnitudes, which keeps the phases, is the
only nonlinearity; and the way back gives the mixed tokens. Costs grow as N log N. Every token sees all others, at
one fixed length: for language models there is a causal relative.

Equation:
    $$ F = \operatorname{FFT}(X), \qquad c = \frac{1}{N} \sum_t x_t, \qquad
       W = W_{base} + \operatorname{MLP}(c) \tag{1} $$
    $$ \tilde F = F \odot W, \qquad \operatorname{modReLU}(z) = \max(|z| + b, 0)\, \frac{z}{|z|}, \qquad
       Y = \operatorname{IFFT}(\operatorname{modReLU}(\tilde F)) \tag{2} $$
    The causal relative is a convolution over the past whose R filters are weighted by the mean token so far:
    $$ y_t = \sum_{s=0}^{\min(t, L - 1)} \Bigl( h^{(0)}_s + \sum_{r=1}^{R} \alpha_r(c_t)\, h^{(r)}_s \Bigr) x_{t-s},
       \qquad c_t = \frac{1}{t + 1} \sum_{s \le t} x_s \tag{3} $$

Symbols:
    X: [time, d_model], tokens; N of them.
    F: [time / 2 + 1, d_model], complex coefficients of a real signal, orthonormal.
    W: [heads, time / 2 + 1], real, one filter for all features of a head.
    b: [heads, time / 2 + 1], biases of modReLU.
    h: [R + 1, heads, L], filters over the past.
    alpha: [R], of each head, what a small network makes of the mean token.

Defaults:
    heads: 4 (the authors' code).
    W_base: ones, b: zeros (the authors' code), so that without the network the mixer is the identity.
    filters: R = 4, and max_length: L = 512, of the causal relative (ours).

Deviations:
    1. The mixer gives Y. The paper's LayerNorm(X + Dropout(Y)) around it is the block's affair, as with attention.
    2. z / |z| is exact and 0 at 0; the authors divide by |z| + 1e-6.
    3. The context is the mean over tokens, as in the authors' code; the review has it in the frequency domain, where it
       would be the first token. Their later versions (an additive bias, GELU, windows, wavelets) are left out.
    4. Equation (3) is ours: the mean of all tokens and a nonlinearity on the spectrum both look ahead, so that the
       filter depends on the mean so far, through few filters that one FFT each applies, and there is no modReLU.

Reduces to:
    torch.nn.Identity: ones for W, zeros for b.
    torch.nn.Conv1d: without modReLU and for fixed W, a circular convolution with the inverse FFT of W; and equation (3)
        with alpha = 0 is a causal depthwise convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_sequence
from mlreviews.common.layers import linear

__all__ = ["CausalFFTMixer", "FFTMixerState", "FFTNetMixer", "causal_fft_conv", "modrelu", "spectral_filter"]


def modrelu(z: Complex[Tensor, "*shape"], bias: Float[Tensor, "*#shape"]) -> Complex[Tensor, "*shape"]:
    """ReLU of the magnitude plus a bias; the phase stays, eq. (2).

    Args:
        z: any shape.
        bias: broadcast against z; 0 makes this the identity, and -c sends coefficients of magnitude up to c to 0.
    """
    return torch.relu(z.abs() + bias) * torch.sgn(z)


def spectral_filter(
    x: Float[Tensor, "batch time heads dim"],
    weight: Float[Tensor, "*batch heads frequencies"],
    bias: Float[Tensor, "heads frequencies"] | None = None,
) -> Float[Tensor, "batch time heads dim"]:
    """Tokens after a filter on their frequencies and, with a bias, modReLU: eq. (2).

    Args:
        x: [batch, time, heads, dim].
        weight: [heads, time // 2 + 1], or one for each row of the batch in front.
        bias: [heads, time // 2 + 1]; None leaves modReLU out.

    Returns:
        of x's shape and dtype, computed in float32 at least.

    Raises:
        ValueError: not that many frequencies.
    """
    time = x.shape[1]
    if weight.shape[-1] != time // 2 + 1:
        raise ValueError(f"weight: expected {time // 2 + 1} frequencies for {time} tokens, got {weight.shape[-1]}")
    wide = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft(x.to(wide), dim=1, norm="ortho")
    spectrum = spectrum * weight.to(wide).mT.unsqueeze(-1)
    if bias is not None:
        spectrum = modrelu(spectrum, bias.to(wide).mT.unsqueeze(-1))
    return torch.fft.irfft(spectrum, n=time, dim=1, norm="ortho").to(x.dtype)


class FFTNetMixer(nn.Module):
    """The mixer of FFTNet, for tokens that may all see each other: images, encoders.

    Args:
        d_model: size of a token's vector.
        seq_len: N, the number of tokens, which is fixed.
        heads: groups of features that share a filter; a divisor of d_model.
        adaptive: whether the filter depends on the input; without, it is a learned one.
        generator: draws the weights of the network; None is the global one.

    Raises:
        ValueError: a size below 1, or heads that don't divide.
    """

    def __init__(
        self,
        d_model: int,
        seq_len: int,
        heads: int = 4,
        *,
        adaptive: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(d_model, heads, seq_len=seq_len)
        self.d_model, self.seq_len, self.heads = d_model, seq_len, heads
        frequencies = seq_len // 2 + 1
        self.base_filter = nn.Parameter(torch.ones(heads, frequencies))
        self.modrelu_bias = nn.Parameter(torch.zeros(heads, frequencies))
        self.adaptive_mlp = _network(d_model, heads * frequencies, generator) if adaptive else None

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """Mixes all tokens.

        Args:
            x: [batch, seq_len, d_model].

        Raises:
            ValueError: another shape, or another number of tokens.
        """
        check_sequence(x, self.d_model)
        if x.shape[1] != self.seq_len:
            raise ValueError(f"x: expected {self.seq_len} tokens, as seq_len says, got {x.shape[1]}")
        weight = self.base_filter
        if self.adaptive_mlp is not None:
            weight = weight + self.adaptive_mlp(x.mean(1)).unflatten(1, (self.heads, -1))
        return spectral_filter(x.unflatten(2, (self.heads, -1)), weight, self.modrelu_bias).flatten(2)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"d_model={self.d_model}, seq_len={self.seq_len}, heads={self.heads}"


def causal_fft_conv(
    x: Float[Tensor, "batch time heads dim"], filters: Float[Tensor, "number heads length"]
) -> Float[Tensor, "number batch time heads dim"]:
    r"""Causal convolutions $\sum_{s < L} h_s x_{t-s}$ with long filters, by FFT of padded signals: N log N.

    Args:
        x: [batch, time, heads, dim].
        filters: [number, heads, length], entry s of the last axis for the token s steps back.

    Returns:
        [number, batch, time, heads, dim] in x's dtype, computed in float32 at least.
    """
    time = x.shape[1]
    taps = filters[..., :time]
    n = time + taps.shape[2] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    signal = torch.fft.rfft(x.to(wide), n=n, dim=1)
    response = torch.fft.rfft(taps.to(wide), n=n, dim=2).mT  # [number, frequencies, heads]
    return torch.fft.irfft(signal * response[:, None, :, :, None], n=n, dim=2)[:, :, :time].to(x.dtype)


class FFTMixerState(NamedTuple):
    """What a `CausalFFTMixer` remembers: all tokens so far. A value, like `mlreviews.models.KVCache`.

    Attributes:
        inputs: [batch, time, d_model], zero at padding.
        real: [batch, time], False at padding.
    """

    inputs: Tensor
    real: Tensor

    @property
    def length(self) -> int:
        """How many tokens are held, padding included."""
        return self.inputs.shape[1]

    def crop(self, length: int) -> FFTMixerState:
        """The state after the first `length` tokens."""
        return FFTMixerState(self.inputs[:, :length], self.real[:, :length])

    def rows(self, index: Int[Tensor, " rows"]) -> FFTMixerState:
        """The given rows of the batch, reordered or repeated."""
        return FFTMixerState(self.inputs[index], self.real[index])


class CausalFFTMixer(nn.Module):
    """The causal relative of FFTNet, eq. (3), for language models; needs no positions.

    Args:
        d_model: size of a token's vector.
        heads: groups of features that share filters; a divisor of d_model.
        kv_heads: not used, since there are neither keys nor values.
        layer: not used.
        filters: R, how many the input can weigh.
        max_length: L, how many tokens back a filter reaches.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, or heads that don't divide.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        *,
        kv_heads: int | None = None,
        layer: int = 0,
        filters: int = 4,
        max_length: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(d_model, heads, filters=filters, max_length=max_length)
        self.d_model, self.heads = d_model, heads
        taps = torch.zeros(filters + 1, heads, max_length)
        # The others' variance falls with the distance, so that all scales begin with about the same weight.
        taps[1:].normal_(generator=generator).div_(torch.arange(1, max_length + 1))
        taps[0, :, 0] = 1.0  # the identity, as W_base = 1 is in eq. (1)
        self.filters = nn.Parameter(taps)
        self.adaptive_mlp = _network(d_model, heads * filters, generator)

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: FFTMixerState | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], FFTMixerState]:
        """Runs over a sequence.

        Args:
            x: [batch, time, d_model].
            state: what an earlier call returned; None before the first token.
            mask: [batch, time], False at padding on the left of a row. The outputs there have no meaning.
            positions: not used: a convolution knows distances only.

        Returns:
            ``(y, state)``: [batch, time, d_model], and the state after the last token.

        Raises:
            ValueError: x, mask or state has another shape.
        """
        check_sequence(x, self.d_model, mask)
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        inputs, new = x.masked_fill(~real[..., None], 0.0), x.shape[1]
        if state is not None:
            if (state.inputs.shape[0], state.inputs.shape[2]) != (x.shape[0], x.shape[2]):
                raise ValueError(f"state: expected that of {x.shape[0]} rows, got {list(state.inputs.shape)}")
            inputs, real = torch.cat([state.inputs, inputs], 1), torch.cat([state.real, real], 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        sums, counts = inputs.cumsum(1, dtype=wide)[:, -new:], real.cumsum(1)[:, -new:, None].clamp(min=1)
        alpha = self.adaptive_mlp((sums / counts).to(x.dtype)).unflatten(2, (self.heads, -1))
        mixed = causal_fft_conv(inputs.unflatten(2, (self.heads, -1)), self.filters)[:, :, -new:]
        y = mixed[0] + torch.einsum("bthr,rbthd->bthd", alpha, mixed[1:])
        return y.flatten(2), FFTMixerState(inputs, real)

    def step(
        self, x_t: Float[Tensor, "batch d_model"], state: FFTMixerState | None = None
    ) -> tuple[Float[Tensor, "batch d_model"], FFTMixerState]:
        """One token, [batch, d_model]: ``(y_t, state)`` as `forward` gives them for a sequence of length 1."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def extra_repr(self) -> str:
        """Sizes."""
        filters, _, length = self.filters.shape
        return f"d_model={self.d_model}, heads={self.heads}, filters={filters - 1}, max_length={length}"


def _check_sizes(d_model: int, heads: int, **sizes: int) -> None:
    for name, size in {"d_model": d_model, "heads": heads, **sizes}.items():
        check_count(name, size)
    if d_model % heads:
        raise ValueError(f"heads: expected a divisor of d_model {d_model}, got {heads}")


def _network(d_model: int, outputs: int, generator: torch.Generator | None) -> nn.Sequential:
    return nn.Sequential(
        linear(d_model, d_model, generator=generator), nn.GELU(), linear(d_model, outputs, generator=generator)
    )
