"""What does each way around the quadratic cost of attention give up?

Three experiments. Time of one forward pass against the length, of the functions alone. Recall without training: pairs
of a random key and value are read, then one key is asked for; this shows what the mechanism itself can hold. And
models of equal size that learn Python's source code. Quick: recall of up to 256 pairs, models of one block at
the beginning of their training, 3 seeds, half a minute. Full: up to 1,024 pairs, larger models that are trained longer,
routing as well, 5 seeds, hours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.attention.efficient_attention_families import (
    BlockTopKAttention,
    DecayAttention,
    DeltaAttention,
    FavorAttention,
    LinearAttention,
    RoutingAttention,
    WindowAttention,
    block_topk_attention,
    cluster_attention,
    cluster_scores,
    delta_attention,
    elu_features,
    favor_attention,
    favor_features,
    favor_projection,
    linear_attention,
    linformer_attention,
    updated_centroids,
    window_attention,
)
from mlreviews.datasets import python_source
from mlreviews.models import CausalAttention, TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import training
from mlreviews_kernels.attention import attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2507.19595"
REVIEW = "review of 2025-08-08"
DIM, SHARPNESS, WINDOW, BLOCK, TOP_K, RANK, CLUSTERS, FEATURES = 32, 60.0, 32, 8, 4, 32, 8, 64
FULL_ATTENTION, WINDOWED, LINFORMER = "full attention", "window", "Linformer"
LINEAR, FAVOR, DECAY, DELTA = "linear (elu + 1)", "FAVOR+", "decay", "delta rule"
ROUTING, BLOCKS = "routing", "block top-k"
Mixing = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Size:
    """Of the experiments.

    Attributes:
        pairs: numbers of pairs to recall from.
        lengths: of the sequences that are timed, a short and a long one.
        width: d_model.
        layers: blocks.
        length: bytes of a piece.
        batch: pieces in a batch.
        updates: of a training.
        seeds: independent runs.
    """

    pairs: tuple[int, ...]
    lengths: tuple[int, int]
    width: int
    layers: int
    length: int
    batch: int
    updates: int
    seeds: int


QUICK = Size((8, 16, 32, 64, 128, 256), (1024, 4096), 32, 1, 128, 4, 40, 3)
FULL = Size((8, 16, 32, 64, 128, 256, 512, 1024), (2048, 16384), 128, 4, 512, 16, 3000, 5)


def run(settings: Settings) -> Outcome:
    """Times the functions, asks for stored values, and trains the models on the same bytes."""
    size = FULL if settings.full else QUICK
    seconds = _seconds(size, settings.generator(7))
    names = list(mixings())
    recall: dict[str, list[list[float]]] = {name: [] for name in names}
    favor: list[list[float]] = []
    learners = layers(settings.full)
    bits: dict[str, list[float]] = {name: [] for name in learners}
    parameters: dict[str, int] = {}
    runs = [(seed, name) for seed in range(size.seeds) for name in learners]
    for seed in range(size.seeds):
        for name, mix in mixings().items():
            recall[name].append([_recall(mix, pairs, settings.generator(100 * seed + pairs)) for pairs in size.pairs])
        favor.append([_kernel_error(m, settings.generator(1000 + seed)) for m in (16, 256)])
    for seed, name in settings.track(runs, "models"):
        found, parameters[name] = _train(learners[name], size, settings, seed)
        bits[name].append(found)
    series: dict[str, list[float]] = {
        "lengths": [float(n) for n in size.lengths],
        "pairs": [float(n) for n in size.pairs],
        "parameters": [float(p) for p in parameters.values()],
    }
    series |= {f"seconds, {name}": found for name, found in seconds.items()}
    series |= {f"recall, {name}": torch.tensor(found).mean(0).tolist() for name, found in recall.items()}
    series |= {f"bits of each seed, {name}": found for name, found in bits.items()}
    claims = [*_cost_claims(size, seconds), *_recall_claims(size, recall, favor), *_text_claims(bits)]
    return Outcome(claims, series)


def layers(full: bool) -> dict[str, Callable[..., nn.Module]]:
    """The layers that learn text."""
    found: dict[str, Callable[..., nn.Module]] = {
        FULL_ATTENTION: CausalAttention,
        WINDOWED: partial(WindowAttention, window=16, global_tokens=2),
        LINEAR: LinearAttention,
        FAVOR: partial(FavorAttention, features=FEATURES),
        DECAY: DecayAttention,
        DELTA: DeltaAttention,
        BLOCKS: partial(BlockTopKAttention, block=BLOCK, top_k=TOP_K),
    }
    if full:
        found[ROUTING] = partial(RoutingAttention, clusters=CLUSTERS)
    return found


def mixings() -> dict[str, Mixing]:
    """The functions, from q, k and v with keys of length 1; q is sharpened for those that have a softmax."""

    def sharp(q: Tensor) -> Tensor:
        return SHARPNESS * q

    def windowed(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
        return window_attention(sharp(q), k, v, WINDOW)

    def linformer(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
        projection = torch.randn(RANK, k.shape[1], generator=generator) / RANK**0.5
        return linformer_attention(sharp(q), k, v, projection, projection)

    def favor(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
        factor = SHARPNESS**0.5
        return favor_attention(factor * q, factor * k, v, favor_projection(FEATURES, DIM, generator=generator))[0]

    def linear(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
        return linear_attention(elu_features(DIM**0.5 * q), elu_features(DIM**0.5 * k), v)[0]

    def routed(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
        start = torch.randn(k.shape[2], CLUSTERS, DIM, generator=generator)
        centroids = nn.functional.normalize(start, dim=2)
        for _ in range(5):
            centroids = updated_centroids(centroids, k, decay=0.0)
        of_q, of_k = (cluster_scores(x, centroids).argmax(3) for x in (q, k))
        own = torch.where(k.norm(dim=3) > 0, of_k, of_q)  # what is asked has no key, and belongs to its query's cluster
        return cluster_attention(sharp(q), k, v, own, own, CLUSTERS)

    return {
        FULL_ATTENTION: lambda q, k, v, generator: attention(sharp(q), k, v)[0],
        WINDOWED: windowed,
        LINFORMER: linformer,
        LINEAR: linear,
        FAVOR: favor,
        DELTA: lambda q, k, v, generator: delta_attention(q, k, v, (k.norm(dim=3) > 0).float())[0],
        ROUTING: routed,
        BLOCKS: lambda q, k, v, generator: block_topk_attention(sharp(q), k, v, BLOCK, TOP_K),
    }


@torch.no_grad()
def _recall(mix: Mixing, pairs: int, generator: torch.Generator) -> float:
    """Share of questions whose answer is nearest to the value that was stored with the key."""
    keys = nn.functional.normalize(torch.randn(pairs, DIM, generator=generator), dim=1)
    values = torch.randn(pairs, DIM, generator=generator)
    asked = torch.randperm(pairs, generator=generator)[:128]
    questions = len(asked)
    # A row for each question: the pairs, each with its key as query, then the question, which stores nothing.
    k, v = (torch.cat([x, torch.zeros(1, DIM)]).expand(questions, -1, -1)[:, :, None] for x in (keys, values))
    q = k.clone()
    q[:, -1, 0] = keys[asked]
    out = mix(q, k.contiguous(), v.contiguous(), generator)[:, -1, 0]
    return float((torch.cdist(out, values).argmin(1) == asked).float().mean())


def _kernel_error(features: int, generator: torch.Generator) -> float:
    """Root mean square of the relative error of FAVOR+'s estimate of exp(x . y), over pairs and projections."""
    x, y = (0.2 * torch.randn(200, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    errors = []
    for _ in range(100):
        w = favor_projection(features, 8, generator=generator, dtype=torch.float64)
        estimate = (favor_features(x, w) * favor_features(y, w)).sum(1)
        errors.append(estimate / (x * y).sum(1).exp() - 1)
    return float(torch.stack(errors).square().mean().sqrt())


@torch.no_grad()
def _seconds(size: Size, generator: torch.Generator) -> dict[str, list[float]]:
    """The shortest of three forward passes, at each of the two lengths."""
    found: dict[str, list[float]] = {}
    for name, mix in mixings().items():
        found[name] = []
        for length in size.lengths:
            q, k = (nn.functional.normalize(torch.randn(1, length, 4, DIM, generator=generator), dim=3) for _ in "qk")
            v = torch.randn(1, length, 4, DIM, generator=generator)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                mix(q, k, v, generator)
                times.append(time.perf_counter() - start)
            found[name].append(min(times))
    return found


def _train(layer: Callable[..., nn.Module], size: Size, settings: Settings, seed: int) -> tuple[float, int]:
    """Bits for each byte of the validation text, and the number of parameters."""
    config = TinyLMConfig(d_model=size.width, layers=size.layers, heads=size.width // 16)
    model = TinyLM(config, layer, generator=settings.generator(seed)).to(settings.device)
    batches = python_source().train.batches(size.length, size.batch, settings.generator(2000 + seed))

    def loss() -> Tensor:
        return _loss(model, next(batches).to(settings.device))

    for _ in training(model, loss, size.updates, 0.01 if size.width < 64 else 0.003):
        pass
    model.eval()
    held_out = python_source().validation.batches(size.length, 64, settings.generator(3000 + seed))
    with torch.no_grad():
        bits = float(_loss(model, next(held_out).to(settings.device))) / math.log(2)
    return bits, sum(p.numel() for p in model.parameters())


def _loss(model: TinyLM, window: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(window[:, :-1]).logits.flatten(0, 1), window[:, 1:].flatten())


def _cost_claims(size: Size, seconds: dict[str, list[float]]) -> list[Claim]:
    ratio = math.log(size.lengths[1] / size.lengths[0])
    growth = {name: math.log(long / short) / ratio for name, (short, long) in seconds.items()}
    cheap = [name for name in growth if name not in (FULL_ATTENTION, BLOCKS, ROUTING)]
    slowest = max(cheap, key=growth.__getitem__)
    return [
        measure(
            "The time of full attention grows like the square of the length (exponent)",
            REVIEW,
            growth[FULL_ATTENTION],
            at_least=1.5,
        ),
        measure(
            f"That of windows, low rank and kernels grows like the length (largest exponent: {slowest})",
            REVIEW,
            growth[slowest],
            at_most=1.5,
        ),
        measure(
            "Block top-k is faster than full attention at the longer length (time over that of full attention)",
            REVIEW,
            seconds[BLOCKS][1] / seconds[FULL_ATTENTION][1],
            at_most=1,
        ),
    ]


def _recall_claims(size: Size, recall: dict[str, list[list[float]]], favor: list[list[float]]) -> list[Claim]:
    most, beyond = len(size.pairs) - 1, size.pairs.index(4 * WINDOW)

    def at(name: str, place: int) -> list[float]:
        return [row[place] for row in recall[name]]

    def lead(name: str, other: str, place: int) -> list[float]:
        return [a - b for a, b in zip(at(name, place), at(other, place), strict=True)]

    return [
        measure(
            f"Full attention recalls each of {size.pairs[most]} pairs (share)",
            REVIEW,
            min(at(FULL_ATTENTION, most)),
            at_least=0.95,
        ),
        measure(
            f"A window of {WINDOW} recalls what it covers of {4 * WINDOW} pairs, a quarter (share)",
            REVIEW,
            at(WINDOWED, beyond),
            at_most=0.45,
        ),
        measure(
            f"{RANK} random summaries of {4 * WINDOW} tokens lose dense information (share recalled)",
            REVIEW,
            at(LINFORMER, beyond),
            at_most=0.5,
        ),
        measure(
            f"A state of fixed size forgets: the delta rule recalls less of {size.pairs[most]} pairs than of 16",
            REVIEW,
            [a - b for a, b in zip(at(DELTA, size.pairs.index(16)), at(DELTA, most), strict=True)],
            at_least=0.1,
        ),
        measure(
            f"The delta rule recalls more of {DIM} pairs than linear attention (difference of shares)",
            PAPER,
            lead(DELTA, LINEAR, size.pairs.index(DIM)),
            at_least=0,
        ),
        measure(
            f"Content decides: block top-k recalls more of {4 * WINDOW} pairs than a window that sees as many keys",
            REVIEW,
            lead(BLOCKS, WINDOWED, beyond),
            at_least=0,
        ),
        measure(
            "The error of FAVOR+ falls with the square root of the number of features (exponent)",
            "arXiv:2009.14794, theorem 2",
            [math.log(many / few) / math.log(16) for few, many in favor],
            at_least=-0.55,
            at_most=-0.45,
        ),
    ]


def _text_claims(bits: dict[str, list[float]]) -> list[Claim]:
    unit = "bits per byte"

    def behind(name: str) -> list[float]:
        return [a - b for a, b in zip(bits[name], bits[FULL_ATTENTION], strict=True)]

    best = min((name for name in bits if name != FULL_ATTENTION), key=lambda name: sum(bits[name]))
    return [
        measure(
            f"No efficient form is better than full attention on text (best: {best}; difference of losses)",
            REVIEW,
            behind(best),
            at_least=0,
            unit=unit,
        ),
        measure(
            "The feature map matters: random features are better than elu + 1 (difference of losses)",
            REVIEW,
            [a - b for a, b in zip(bits[LINEAR], bits[FAVOR], strict=True)],
            at_least=0,
            unit=unit,
        ),
        measure(
            "Forgetting helps: a decay is better than linear attention without one (difference of losses)",
            PAPER,
            [a - b for a, b in zip(bits[LINEAR], bits[DECAY], strict=True)],
            at_least=0,
            unit=unit,
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Time against length, recall against the number of pairs, and loss on text."""
    figure, (cost, recall, text) = panels(3, width=4.6, height=4.2)
    series = outcome.series
    colours = dict(zip([*mixings(), DECAY], (*COLOURS, "#999933", "#882255"), strict=True))
    for name in mixings():
        style = {"color": colours[name], "marker": "o", "markersize": 3}
        cost.loglog(series["lengths"], [1000 * s for s in series[f"seconds, {name}"]], **style)
        recall.semilogx(series["pairs"], series[f"recall, {name}"], label=name, base=2, **style)
    cost.set_xticks(series["lengths"], [f"{n:.0f}" for n in series["lengths"]])
    cost.minorticks_off()
    cost.set(title="Time of one pass", xlabel="tokens", ylabel="milliseconds")
    recall.set(title="Recall without training", xlabel="pairs stored", ylabel="share recalled", ylim=(-0.05, 1.05))
    recall.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    prefix = "bits of each seed, "
    names = [name.removeprefix(prefix) for name in series if name.startswith(prefix)]
    for row, name in enumerate(names):
        text.plot(series[prefix + name], [row] * len(series[prefix + name]), "o", color=colours[name], markersize=5)
    text.set_yticks(range(len(names)), names)
    text.invert_yaxis()
    text.set(title="Loss on source code, each seed", xlabel="bits per byte")
    return figure
