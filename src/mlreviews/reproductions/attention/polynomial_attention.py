"""Is it the norm of the attention matrix that counts, and do powers of the scores do as well as softmax?

Norms of the matrices and of their Jacobians for Gaussian tokens, against the length. Then small vision transformers
(patches of scikit-learn's digits, as the paper's have patches of ImageNet), and language models of Python's source
code, which the paper has not, with softmax, powers 1 and 3, and power 3 without the factor. Quick: 3 seeds, half a
minute; models are then seen at the beginning of their training. Full: longer sequences, larger models that are trained
longer, 5 seeds, hours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.attention.polynomial_attention import (
    PolynomialAttention,
    polynomial_attention,
    polynomial_jacobian_norm,
    polynomial_matrix,
    softmax_jacobian_norm,
)
from mlreviews.common.layers import linear
from mlreviews.datasets import digits, python_source
from mlreviews.models import CausalAttention, TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import training
from mlreviews_kernels.attention import attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.18613"
REVIEW = "review of 2024-11-05"
SOFTMAX, LINEAR, CUBIC, UNSCALED = "softmax", "power 1", "power 3", "power 3, no 1/√n"
Mixing = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Of the experiments.

    Attributes:
        lengths: for the norms.
        draws: of Gaussian tokens for each length.
        width: d_model of the classifiers and of the language models.
        layers: blocks of both.
        epochs: of the classifiers.
        length: bytes of a piece of text.
        updates: of the language models.
        seeds: independent runs.
    """

    lengths: tuple[int, ...]
    draws: int
    width: int
    layers: int
    epochs: int
    length: int
    updates: int
    seeds: int


QUICK = Size((64, 128, 256, 512), 6, 32, 1, 4, 128, 40, 3)
FULL = Size((64, 128, 256, 512, 1024, 2048), 20, 128, 4, 60, 512, 3000, 5)


class PatchClassifier(nn.Module):
    """A vision transformer for digits: 16 patches of 2 x 2 pixels, pre-norm blocks, the mean of the tokens.

    Args:
        mix: from q, k and v [batch, time, heads, dim] to what the heads give.
        width: size of a token's vector; heads have 16 entries.
        layers: blocks.
        generator: draws the weights.
    """

    def __init__(self, mix: Mixing, width: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        self.mix, self.heads = mix, width // 16
        self.embed = linear(4, width, generator=generator)
        self.places = nn.Parameter(0.1 * torch.randn(16, width, generator=generator))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(linear(width, 3 * width, bias=False, generator=generator) for _ in range(layers))
        self.out = nn.ModuleList(linear(width, width, bias=False, generator=generator) for _ in range(layers))
        self.up = nn.ModuleList(linear(width, 2 * width, generator=generator) for _ in range(layers))
        self.down = nn.ModuleList(linear(2 * width, width, generator=generator) for _ in range(layers))
        self.head = linear(width, 10, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 10] of images [batch, 64]."""
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.embed(patches) + self.places
        for i, (qkv, out, up, down) in enumerate(zip(self.qkv, self.out, self.up, self.down, strict=True)):
            q, k, v = (part.unflatten(2, (self.heads, 16)) for part in qkv(self.norms[2 * i](x)).chunk(3, 2))
            x = x + out(self.mix(q, k, v).flatten(2))
            x = x + down(nn.functional.gelu(up(self.norms[2 * i + 1](x))))
        y: Tensor = self.head(self.norms[-1](x).mean(1))
        return y


def mixings() -> dict[str, Mixing]:
    """Attention among patches."""
    return {
        SOFTMAX: lambda q, k, v: attention(q, k, v, causal=False)[0],
        LINEAR: partial(polynomial_attention, degree=1, causal=False),
        CUBIC: partial(polynomial_attention, causal=False),
        UNSCALED: partial(polynomial_attention, length_power=0.0, causal=False),
    }


def layers() -> dict[str, Callable[..., nn.Module]]:
    """Attention of language models."""
    return {
        SOFTMAX: CausalAttention,
        LINEAR: partial(PolynomialAttention, degree=1),
        CUBIC: PolynomialAttention,
        UNSCALED: partial(PolynomialAttention, length_power=0.0),
    }


def run(settings: Settings) -> Outcome:
    """Measures norms, and trains the classifiers and the language models."""
    size = FULL if settings.full else QUICK
    norms = _norms(size, settings.generator(0))
    accuracy: dict[str, list[float]] = {name: [] for name in mixings()}
    bits: dict[str, list[float]] = {name: [] for name in layers()}
    runs = [(seed, name) for seed in range(size.seeds) for name in layers()]
    for seed, name in settings.track(runs, "models"):
        accuracy[name].append(_classify(mixings()[name], size, settings, seed))
        bits[name].append(_model_text(layers()[name], size, settings, seed))
    series: dict[str, list[float]] = {"lengths": [float(n) for n in size.lengths]}
    series |= {f"norm, {name}": found for name, found in norms.items()}
    series |= {f"accuracy of each seed, {name}": found for name, found in accuracy.items()}
    series |= {f"bits of each seed, {name}": found for name, found in bits.items()}
    return Outcome([*_norm_claims(size, norms), *_model_claims(accuracy, bits)], series)


def _norms(size: Size, generator: torch.Generator, dim: int = 64) -> dict[str, list[float]]:
    """Mean norms over draws of Gaussian queries and keys, for each length."""
    found: dict[str, list[float]] = {}
    for n in size.lengths:
        draws: dict[str, list[float]] = {}
        for _ in range(size.draws):
            q, k = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in "qk")
            logits = q @ k.T / dim**0.5
            one = {"softmax": logits.softmax(1).norm(), "softmax, Jacobian": softmax_jacobian_norm(logits)}
            for degree in (1, 3):
                one[f"power {degree}"] = polynomial_matrix(q, k, degree).norm()
                one[f"power {degree}, Jacobian"] = polynomial_jacobian_norm(q, k, degree)
            for name, value in one.items():
                draws.setdefault(name, []).append(float(value))
        for name, values in draws.items():
            found.setdefault(name, []).append(sum(values) / len(values))
    return found


def _classify(mix: Mixing, size: Size, settings: Settings, seed: int) -> float:
    """Accuracy on the digits that were not trained on."""
    data, generator = digits(), settings.generator(100 + seed)
    order = torch.randperm(len(data), generator=generator)
    x, labels = (data.features[order] / 16).float().to(settings.device), data.targets[order].to(settings.device)
    count, batch = 1200, 50
    model = PatchClassifier(mix, size.width, size.layers, generator).to(settings.device)

    def loss() -> Tensor:
        rows = torch.randint(count, (batch,), generator=generator)
        return nn.functional.cross_entropy(model(x[rows]), labels[rows])

    for _ in training(model, loss, size.epochs * count // batch, 0.01 if size.width < 64 else 0.003):
        pass
    with torch.no_grad():
        return float((model(x[count:]).argmax(1) == labels[count:]).float().mean())


def _model_text(layer: Callable[..., nn.Module], size: Size, settings: Settings, seed: int) -> float:
    """Bits for each byte of the validation text."""
    config = TinyLMConfig(d_model=size.width, layers=size.layers, heads=size.width // 16)
    model = TinyLM(config, layer, generator=settings.generator(seed)).to(settings.device)
    batches = python_source().train.batches(size.length, 8, settings.generator(2000 + seed))

    def loss() -> Tensor:
        return _loss(model, next(batches).to(settings.device))

    for _ in training(model, loss, size.updates, 0.01 if size.width < 64 else 0.003):
        pass
    held_out = python_source().validation.batches(size.length, 64, settings.generator(3000 + seed))
    with torch.no_grad():
        return float(_loss(model, next(held_out).to(settings.device))) / math.log(2)


def _loss(model: TinyLM, window: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(window[:, :-1]).logits.flatten(0, 1), window[:, 1:].flatten())


def _norm_claims(size: Size, norms: dict[str, list[float]]) -> list[Claim]:
    span = math.log(size.lengths[-1] / size.lengths[0])
    growth = {name: math.log(found[-1] / found[0]) / span for name, found in norms.items()}
    bound = max(value / math.sqrt(n) for value, n in zip(norms["softmax"], size.lengths, strict=True))
    slope = max(value / math.sqrt(n) for value, n in zip(norms["softmax, Jacobian"], size.lengths, strict=True))
    claims = [
        measure("Softmax has a Frobenius norm of √n at most (largest norm / √n)", f"{PAPER}, 4.1", bound, at_most=1),
        measure("Its Jacobian has one of 2 √n at most (largest norm / √n)", f"{PAPER}, 4.1", slope, at_most=2),
        measure(
            "For Gaussian tokens the norm of softmax grows like √n, as its bound does (exponent)",
            REVIEW,
            growth["softmax"],
            at_least=0.45,
            at_most=0.55,
        ),
    ]
    for degree in (1, 3):
        for what, name in (("matrix", f"power {degree}"), ("Jacobian for Q", f"power {degree}, Jacobian")):
            claims.append(
                measure(
                    f"The norm of the {what} of power {degree} over √n grows like √n (exponent)",
                    f"{PAPER}, theorems of section 4",
                    growth[name],
                    at_least=0.45,
                    at_most=0.55,
                )
            )
    return claims


def _model_claims(accuracy: dict[str, list[float]], bits: dict[str, list[float]]) -> list[Claim]:
    def better(found: dict[str, list[float]], one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(found[one], found[other], strict=True)]

    points = {name: [100 * a for a in found] for name, found in accuracy.items()}
    unit = "bits per byte"
    return [
        measure(
            "Images: power 3 is within a point of softmax, or better (difference of accuracies)",
            f"{PAPER}, table of ImageNet",
            better(points, CUBIC, SOFTMAX),
            at_least=-1,
            unit="points",
        ),
        measure(
            "Images: power 3 is better than power 1 (difference of accuracies)",
            f"{PAPER}, table of ImageNet",
            better(points, CUBIC, LINEAR),
            at_least=0,
            unit="points",
        ),
        measure(
            "Images: the factor 1 / √n helps (power 3, difference of accuracies)",
            f"{PAPER}, section 5",
            better(points, CUBIC, UNSCALED),
            at_least=0,
            unit="points",
        ),
        measure(
            "Text: power 3 is within 0.02 bits of softmax, or better (its loss less softmax's)",
            REVIEW,
            better(bits, CUBIC, SOFTMAX),
            at_most=0.02,
            unit=unit,
        ),
        measure(
            "Text: the factor 1 / √n helps (loss without it less loss with it, power 3)",
            f"{PAPER}, section 5",
            better(bits, UNSCALED, CUBIC),
            at_least=0,
            unit=unit,
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Norms against length, and what the models reach."""
    figure, (norms, images, text) = panels(3, width=4.2)
    series = outcome.series
    lengths = series["lengths"]
    for name, colour in zip(("softmax", "power 1", "power 3"), COLOURS, strict=False):
        norms.loglog(lengths, series[f"norm, {name}"], color=colour, marker="o", markersize=3, label=name)
        norms.loglog(lengths, series[f"norm, {name}, Jacobian"], "--", color=colour)
    norms.loglog(lengths, [n**0.5 for n in lengths], ":", color="0.4", label="√n")
    norms.set_xticks(lengths, [f"{n:.0f}" for n in lengths])
    norms.minorticks_off()
    norms.set(title="Gaussian tokens (dashed: Jacobian)", xlabel="tokens n", ylabel="Frobenius norm")
    norms.legend(loc="center", bbox_to_anchor=(0.5, 0.22), ncols=2)
    for axis, prefix, title, label in (
        (images, "accuracy of each seed, ", "Digits, each seed", "accuracy"),
        (text, "bits of each seed, ", "Source code, each seed", "bits per byte"),
    ):
        names = [name.removeprefix(prefix) for name in series if name.startswith(prefix)]
        for row, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
            axis.plot(series[prefix + name], [row] * len(series[prefix + name]), "o", color=colour, markersize=5)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(title=title, xlabel=label)
    return figure
