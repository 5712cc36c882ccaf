"""Pieces of layers that several modules share: linear maps drawn from a generator, and the causal convolution."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["causal_conv1d", "depthwise_conv1d", "linear"]


def linear(
    in_features: int, out_features: int, *, bias: bool = True, generator: torch.Generator | None = None
) -> nn.Linear:
    """A `torch.nn.Linear` with its usual distribution, uniform in ± in_features ** -0.5, drawn from a generator.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: whether there is a bias, of the same distribution.
        generator: draws weight and bias; None is the global one.
    """
    # What the constructor draws is drawn again; torch.nn.utils.skip_init would load two seconds of torch for this.
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(in_features, out_features, bias=bias)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(in_features**-0.5), in_features**-0.5, generator=generator)
    return layer


def depthwise_conv1d(
    channels: int, width: int, *, bias: bool = True, generator: torch.Generator | None = None
) -> nn.Conv1d:
    """A `torch.nn.Conv1d` for the weights of `causal_conv1d`, with its usual distribution, uniform in ± width ** -0.5.

    Args:
        channels: how many.
        width: of the kernel.
        bias: whether there is a bias, of the same distribution.
        generator: draws weight and bias; None is the global one.
    """
    with torch.random.fork_rng(devices=[]):
        layer = nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
    return layer


def causal_conv1d(
    x: Float[Tensor, "batch time channels"],
    weight: Float[Tensor, "channels width"],
    bias: Float[Tensor, " channels"] | None = None,
    window: Float[Tensor, "sequences past channels"] | None = None,
    *,
    cu_seqlens: Int[Tensor, " sequences_plus_1"] | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "sequences past channels"]]:
    r"""Causal depthwise convolution $y_t = \beta + \sum_{k < w} W_{w-1-k}\, x_{t-k}$, with the inputs before the first.

    Args:
        x: [batch, time, channels]; any length, also shorter than the window.
        weight: [channels, width], the last column for the present, as `torch.nn.Conv1d` has it.
        bias: [channels].
        window: [batch, width - 1, channels], the inputs (not outputs) before the first time, the last one last; None
            is zeros. Packed: [documents, width - 1, channels].
        cu_seqlens: [documents + 1], where documents packed into one row (batch 1) begin and end.

    Returns:
        ``(y, window)``: [batch, time, channels], and the last inputs, for the call that goes on from here.

    Raises:
        ValueError: shapes don't go together.
    """
    batch, time, channels = x.shape
    past = weight.shape[1] - 1
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if weight.shape[0] != channels:
        raise ValueError(f"x: expected {weight.shape[0]} channels, as weight has, got shape {tuple(x.shape)}")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"x: expected batch 1 with cu_seqlens, got {batch}")
    if window is None:
        window = x.new_zeros(sequences, past, channels)
    elif tuple(window.shape) != (sequences, past, channels):
        raise ValueError(f"window: expected {[sequences, past, channels]}, got shape {tuple(window.shape)}")
    if cu_seqlens is None:
        padded = torch.cat([window.to(x.dtype), x], dim=1)
        return _valid_conv(padded, weight, bias), padded[:, time:]
    # Each document is laid out after its own window, so that nothing reaches across.
    times = torch.arange(time, device=x.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), times, right=True)
    token = times + past * (document + 1)
    ends = cu_seqlens[1:] + past * torch.arange(1, sequences + 1, device=x.device)
    offsets = torch.arange(past, device=x.device)
    starts = cu_seqlens[:-1] + past * torch.arange(sequences, device=x.device)
    padded = x.new_zeros(time + past * sequences, channels)
    padded = padded.index_copy(0, (starts[:, None] + offsets).flatten().long(), window.to(x.dtype).flatten(0, 1))
    padded = padded.index_copy(0, token, x[0])
    y = _valid_conv(padded[None], weight, bias)[:, token - past]
    return y, padded[(ends[:, None] - past + offsets).long()]


def _valid_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[batch, time + width - 1, channels] -> [batch, time, channels]."""
    return nn.functional.conv1d(x.mT, weight[:, None], bias, groups=x.shape[2]).mT
