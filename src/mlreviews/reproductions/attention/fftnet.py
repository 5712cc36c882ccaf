"""Does a filter on frequencies do what attention does, what does its dependence on the input add, what does it save?

The identities are computed in float64. Then encoders with two blocks learn handwritten digits, 16 patches of 2 x 2
pixels each: FFTNet, the same with a fixed filter, none at all (the mean over tokens at the end is all that mixes), and
attention. On text, the causal relative takes the place of attention in a small language model. Times are those of one
layer forward; they depend on the machine, which must be idle.
Quick: 150 updates of 64 images, 5 seeds; 100 updates on 8 x 128 bytes, 3 seeds; lengths to 4,096. Two minutes.
Full: 1,500 updates; 1,500 updates on 16 x 256 bytes; lengths to 16,384. About half an hour.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlreviews.attention.fftnet import CausalFFTMixer, FFTNetMixer, spectral_filter
from mlreviews.common.layers import linear
from mlreviews.datasets import digits, python_source
from mlreviews.models import CausalAttention, TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import bits_per_byte, next_token_loss, training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2502.18394"
WIDTH, PATCHES, HEADS = 32, 16, 4
ENCODERS = ("FFTNet", "fixed filter", "attention", "no mixing")
LANGUAGE = {"causal FFT mixer": CausalFFTMixer, "attention": CausalAttention}


class Attention(nn.Module):
    """Softmax attention of every token to all."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.qkv = linear(WIDTH, 3 * WIDTH, generator=generator)
        self.out = linear(WIDTH, WIDTH, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens [batch, time, width]."""
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Encoder(nn.Module):
    """Patches with learned positions, two blocks of a mixer and an MLP, the mean of the tokens, classes."""

    def __init__(self, name: str, generator: torch.Generator) -> None:
        super().__init__()
        self.embed = linear(4, WIDTH, generator=generator)
        self.positions = nn.Parameter(0.1 * torch.randn(PATCHES, WIDTH, generator=generator))
        self.mixers = nn.ModuleList(_mixer(name, generator) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                linear(WIDTH, 2 * WIDTH, generator=generator),
                nn.GELU(),
                linear(2 * WIDTH, WIDTH, generator=generator),
            )
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.head = linear(WIDTH, 10, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [batch, 10], of images [batch, 64]."""
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, 4)
        x = self.embed(patches) + self.positions
        for mixer, norm, mlp in zip(self.mixers, self.norms, self.mlps, strict=True):
            x = x + mixer(norm(x))
            x = x + mlp(x)
        y: Tensor = self.head(x.mean(1))
        return y


def _mixer(name: str, generator: torch.Generator) -> nn.Module:
    if name == "attention":
        return Attention(generator)
    if name == "no mixing":
        return nn.Identity()
    return FFTNetMixer(WIDTH, PATCHES, HEADS, adaptive=name == "FFTNet", generator=generator)


def run(settings: Settings) -> Outcome:
    """Checks the identities, trains encoders and language models, and takes times."""
    accuracies = {
        name: [_digits(name, seed, settings) for seed in settings.track(range(5), f"digits, {name}")]
        for name in ENCODERS
    }
    bits = {name: [_text(name, seed, settings) for seed in settings.track(range(3), name)] for name in LANGUAGE}
    lengths = [256, 1024, 4096] + ([16384] if settings.full else [])
    seconds = {name: [_seconds(name, n, settings) for n in lengths] for name in ("FFTNet", "attention")}
    series: dict[str, list[float]] = {f"accuracy, {name}": found for name, found in accuracies.items()}
    series |= {f"bits per byte, {name}": found for name, found in bits.items()}
    series |= {"tokens": [float(n) for n in lengths]} | {f"seconds, {name}": s for name, s in seconds.items()}
    claims = [*_identities(settings), *_quality(accuracies, bits), *_cost(lengths, seconds)]
    return Outcome(claims, series)


def _identities(settings: Settings) -> list[Claim]:
    x = torch.randn(2, 50, HEADS, 3, dtype=torch.float64, generator=settings.generator(1))
    weight = torch.rand(HEADS, 26, dtype=torch.float64, generator=settings.generator(2))
    y = spectral_filter(x, weight)
    kernel = torch.fft.irfft(weight, n=50)
    lags = (torch.arange(50)[:, None] - torch.arange(50)) % 50
    circular = torch.einsum("hts,bshd->bthd", kernel[:, lags], x)
    same = spectral_filter(x, torch.ones_like(weight), torch.zeros_like(weight))
    return [
        measure(
            "A fixed filter is a circular convolution with its inverse FFT (largest difference)",
            f"{PAPER}, section 3",
            float((y - circular).abs().max()),
            at_most=1e-12,
        ),
        measure(
            "Energy is kept by the orthonormal FFT (relative difference)",
            f"{PAPER}, section 4",
            float((same.square().sum() / x.square().sum() - 1).abs()),
            at_most=1e-12,
        ),
    ]


def _digits(name: str, seed: int, settings: Settings) -> float:
    """Accuracy on a fifth of the images."""
    train, test = digits().split([0.8, 0.2], settings.generator(100 + seed), stratified=True)
    generator = settings.generator(200 + seed)
    model = Encoder(name, generator).to(settings.device)
    images, labels = (train.features / 16).float().to(settings.device), train.targets.to(settings.device)

    def loss() -> Tensor:
        chosen = torch.randint(len(labels), (64,), generator=generator).to(settings.device)
        return nn.functional.cross_entropy(model(images[chosen]), labels[chosen])

    for _ in training(model, loss, 1500 if settings.full else 150, 0.01):
        pass
    with torch.no_grad():
        found = model((test.features / 16).float().to(settings.device)).argmax(1).cpu()
    return float((found == test.targets).double().mean())


def _text(name: str, seed: int, settings: Settings) -> float:
    length, batch, updates, tested = (256, 16, 1500, 500_000) if settings.full else (128, 8, 100, 33_000)
    corpus = python_source()
    config = TinyLMConfig(d_model=64, layers=2, heads=4, hidden=128)
    attention: Any = LANGUAGE[name]
    model = TinyLM(config, attention, generator=settings.generator(300 + seed)).to(settings.device)
    batches = corpus.train.batches(length, batch, settings.generator(400 + seed))
    for _ in training(model, lambda: next_token_loss(model, next(batches).to(settings.device)), updates, 0.005):
        pass
    return bits_per_byte(model, corpus.validation, length, tested)


@torch.no_grad()
def _seconds(name: str, length: int, settings: Settings) -> float:
    """Median of one layer forward, without its gradients."""
    generator = settings.generator(length)
    layer = FFTNetMixer(WIDTH, length, HEADS, generator=generator) if name == "FFTNet" else Attention(generator)
    layer, x = layer.to(settings.device), torch.randn(4, length, WIDTH, generator=generator).to(settings.device)
    found = []
    for _ in range(12):
        start = time.perf_counter()
        layer(x)
        if settings.device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def _quality(accuracies: dict[str, list[float]], bits: dict[str, list[float]]) -> list[Claim]:
    def less(one: str, other: str, found: dict[str, list[float]]) -> list[float]:
        return [a - b for a, b in zip(found[one], found[other], strict=True)]

    return [
        measure(
            "FFTNet classifies digits as well as attention, to one point (accuracy, less attention's)",
            f"{PAPER}, section 5",
            less("FFTNet", "attention", accuracies),
            at_least=-0.01,
        ),
        measure(
            "The filter's dependence on the input helps (accuracy, less that of a fixed filter)",
            f"{PAPER}, section 5, ablation",
            less("FFTNet", "fixed filter", accuracies),
            at_least=0.0,
        ),
        measure(
            "Mixing by fixed filters helps at all (accuracy, less that without mixing)",
            "ours",
            less("fixed filter", "no mixing", accuracies),
            at_least=0.0,
        ),
        measure(
            "Made causal, it learns text as well as attention, to 0.05 bits (bits per byte, less attention's)",
            "ours",
            less("causal FFT mixer", "attention", bits),
            unit="bits per byte",
            at_most=0.05,
        ),
    ]


def _cost(lengths: list[int], seconds: dict[str, list[float]]) -> list[Claim]:
    def exponent(name: str) -> float:
        return math.log(seconds[name][-1] / seconds[name][-2]) / math.log(lengths[-1] / lengths[-2])

    return [
        measure(
            f"Time grows about as N log N (exponent of N between {lengths[-2]} and {lengths[-1]} tokens)",
            PAPER,
            exponent("FFTNet"),
            at_most=1.3,
        ),
        measure(
            f"At {lengths[-1]} tokens it is faster than attention (times as fast)",
            PAPER,
            seconds["attention"][-1] / seconds["FFTNet"][-1],
            at_least=1.0,
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Accuracies, bits per byte, and times by length."""
    figure, (accuracy, text, times) = panels(3)
    series = outcome.series
    for axis, prefix in ((accuracy, "accuracy, "), (text, "bits per byte, ")):
        names = [name.removeprefix(prefix) for name in series if name.startswith(prefix)]
        for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
            found = series[prefix + name]
            axis.plot([i] * len(found), found, "o", color=colour)
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.5, len(names) - 0.5)
    accuracy.set(title="Handwritten digits", ylabel="test accuracy, one point a seed")
    text.set(title="Python's source code", ylabel="bits per byte, one point a seed")
    for name, marker in (("FFTNet", "s"), ("attention", "o")):
        times.loglog(series["tokens"], [1000 * s for s in series[f"seconds, {name}"]], marker=marker, label=name)
    times.set(title="One layer, batch 4, width 32", xlabel="tokens", ylabel="milliseconds")
    times.set_xticks(series["tokens"], [f"{n:,.0f}" for n in series["tokens"]])
    times.minorticks_off()
    times.legend()
    return figure
