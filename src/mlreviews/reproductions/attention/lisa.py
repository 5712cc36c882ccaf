"""Are the attentions of neighbouring layers alike, and can a layer's scores be made of those of the layer before?

Language models of the text are trained; their attention is compared between layers, shared in one layer at a time, and
replaced by LiSA layers in all but the first, which are then distilled. Layers with small queries and keys alone, which
take nothing from the layer before, are distilled in the same way.
Quick: 3 models of 4 layers of width 48, 250 updates, 60 of distillation, half a minute. Full: 5 models of 6 layers of
width 96, 2,000 updates, 500 of distillation, half an hour and more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlreviews.attention.lisa import (
    LiSAAttention,
    attention_distill_loss,
    attention_weights,
    convert_to_lisa,
    fit_alignment,
    layer_scores,
)
from mlreviews.datasets import python_source
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import next_token_loss, training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2408.01890"
RATE = 3e-3
LAMBDA = 1.0  # weight of the distillation loss


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment.

    Attributes:
        config: of the language models.
        ranks: of the small queries and keys.
        updates: of the models.
        distilled: updates of the LiSA layers.
        seeds: how many models.
        length: of a window of text.
    """

    config: TinyLMConfig
    ranks: tuple[int, ...]
    updates: int
    distilled: int
    seeds: int
    length: int


QUICK = Scale(TinyLMConfig(d_model=48, layers=4, heads=4, hidden=96), (8, 24), 250, 60, 3, 64)
FULL = Scale(TinyLMConfig(d_model=96, layers=6, heads=4, hidden=256), (16, 32, 48), 2000, 500, 5, 128)


def run(settings: Settings) -> Outcome:
    """Trains models, compares their layers, and converts and distils them."""
    scale = FULL if settings.full else QUICK
    rows = [_one(settings, scale, seed) for seed in settings.track(range(scale.seeds), "models")]
    found = {name: [row[name] for row in rows] for name in rows[0]}
    series = {name: torch.tensor(values).mean(0).reshape(-1).tolist() for name, values in found.items()}
    series["compression"] = [scale.config.d_model / rank for rank in scale.ranks]
    series["layers"] = [float(layer) for layer in range(1, scale.config.layers)]
    return Outcome(_claims(scale, found), series)


def _one(settings: Settings, scale: Scale, seed: int) -> dict[str, list[float]]:
    """Everything that is measured on one model."""
    generator = settings.generator(seed)
    corpus = python_source()
    windows = corpus.train.batches(scale.length, 8, generator)
    held_out = next(corpus.validation.batches(scale.length, 64, generator))
    teacher = TinyLM(scale.config, generator=generator)
    for _ in training(
        teacher, lambda: next_token_loss(lambda ids: teacher(ids)[:2], next(windows)), scale.updates, 5e-3
    ):
        pass
    text = next(windows)[:, :-1]
    loss = _loss(teacher, held_out)
    rows: dict[str, list[float]] = {"loss of the model": [loss]}
    same, best, other = _similarities(teacher, held_out[:16, :-1])
    rows |= {"similarity, same head": same, "similarity, best head": best, "similarity, best head, other text": other}
    for name, aligned in (("shared as it is", False), ("shared after alignment", True)):
        shared = (_sharing(teacher, layer, text if aligned else None) for layer in range(1, scale.config.layers))
        rows[f"loss added, {name}"] = [_loss(model, held_out) - loss for model in shared]
    for name, sharing in (("LiSA", True), ("small queries and keys alone", False)):
        before, after = [], []
        for rank in scale.ranks:
            student = convert_to_lisa(teacher, rank=rank, text=text if sharing else None)
            before.append(_loss(student, held_out) - loss)
            _distil(student, teacher, windows, scale.distilled, sharing=sharing)
            after.append(_loss(student, held_out) - loss)
        rows |= {f"loss added, {name}, converted": before, f"loss added, {name}, distilled": after}
    cache = student(held_out[:1, :-1]).cache.layers
    rows["cache of the last rank, share of the model's"] = [
        sum(state.keys.numel() + state.values.numel() for state in cache)
        / sum(state.keys.numel() + state.values.numel() for state in teacher(held_out[:1, :-1]).cache.layers)
    ]
    return rows


@torch.no_grad()
def _loss(model: TinyLM, windows: Tensor) -> float:
    """Nats a byte."""
    return float(next_token_loss(lambda ids: model(ids)[:2], windows))


@torch.no_grad()
def _similarities(model: TinyLM, ids: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Mean cosines of the attention of each layer's heads with those of the layer before: the head of the same number,
    the head that is most alike, and the head that is most alike on other texts (what positions alone explain)."""
    weights = [attention_weights(scores) for scores in layer_scores(model, ids)[1]]
    same, best, other = [], [], []
    for before, here in pairwise(weights):
        cosines = _cosines(here, before)
        same.append(float(cosines.diagonal().mean()))
        best.append(float(cosines.amax(1).mean()))
        other.append(float(_cosines(here, before.roll(1, 0)).amax(1).mean()))
    return same, best, other


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """[heads, heads], mean over texts and queries; the first queries, which see few keys, are left out."""
    one, other = (nn.functional.normalize(x[:, :, 8:], dim=-1) for x in (one, other))
    return torch.einsum("bhij,bgij->bhgi", one, other).mean((0, 3))


def _sharing(teacher: TinyLM, layer: int, text: Tensor | None) -> TinyLM:
    """The model with the scores of the layer before in one layer, as they are or under a linear map fitted on text."""
    heads, student = teacher.config.heads, copy.deepcopy(teacher)
    blocks: list[Any] = list(student.layers)
    for i, block in enumerate(blocks[: layer + 1]):
        plain = block.self_attn
        shared = LiSAAttention(
            plain.d_model, heads, layer=1 if i == layer else 0, rank=plain.d_model, generator=torch.Generator()
        )
        shared.load_state_dict(shared.state_dict() | plain.state_dict())
        block.self_attn = shared
    align = blocks[layer].self_attn.align
    weight = torch.eye(heads)
    if text is not None:
        with torch.no_grad():
            scores = layer_scores(teacher, text)[1]
        weight = fit_alignment(scores[layer - 1], scores[layer])
    align.set_linear(torch.cat([weight, torch.zeros(heads, heads)], 1))
    return student


def _distil(student: TinyLM, teacher: TinyLM, windows: Iterator[Tensor], updates: int, *, sharing: bool) -> None:
    """Trains the small queries and keys, and the alignments where layers share, on text and the teacher's attention."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", *(["self_attn.align"] if sharing else []))
    shared = [i for i, block in enumerate(student.layers) if block.self_attn.shares]  # type: ignore[union-attr]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(any(f"layers.{i}.{part}." in name for i in shared for part in parts))

    def loss() -> Tensor:
        window = next(windows)
        with torch.no_grad():
            _, wanted = layer_scores(teacher, window[:, :-1])
        logits, scores = layer_scores(student, window[:, :-1])
        distances = [attention_distill_loss(scores[i], wanted[i]) for i in shared]
        return nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()) + LAMBDA * sum(distances)

    trained = nn.ModuleList([student.layers[i] for i in shared])
    for _ in training(trained, loss, updates, RATE):
        pass


def _claims(scale: Scale, found: dict[str, list[list[float]]]) -> list[Claim]:
    """One value for each model in each claim."""

    def mean(name: str) -> list[float]:
        return [sum(row) / len(row) for row in found[name]]

    def gained(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(mean(one), mean(other), strict=True)]

    alone = found["loss added, shared as it is"]
    lisa, small = "loss added, LiSA, distilled", "loss added, small queries and keys alone, distilled"
    compression = scale.config.d_model / scale.ranks[0]
    return [
        measure(
            "Attention of neighbouring layers is alike, the most similar heads compared (mean cosine)",
            f"{PAPER}, abstract",
            mean("similarity, best head"),
            at_least=0.8,
        ),
        measure(
            "... more than the layers' preferences for positions make it (cosine above that with other texts)",
            f"{PAPER}, abstract",
            gained("similarity, best head", "similarity, best head, other text"),
            at_least=0.05,
        ),
        measure(
            "To share scores as they are is worse than after aligning the heads (loss added, difference)",
            f"{PAPER}, abstract",
            gained("loss added, shared as it is", "loss added, shared after alignment"),
            unit="nats a byte",
            at_least=0,
        ),
        measure(
            "Sharing hurts more in the first layer that can share than in the last (loss added, difference)",
            f"{PAPER}, abstract",
            [row[0] - row[-1] for row in alone],
            unit="nats a byte",
            at_least=0,
        ),
        measure(
            f"All layers but the first as LiSA, queries and keys {compression:g} times smaller, keep the quality "
            "after distillation (loss added)",
            f"{PAPER}, abstract",
            [row[0] for row in found[lisa]],
            unit="nats a byte",
            at_most=0.02,
        ),
        measure(
            "With the scores of the layer before a model is better than with small queries and keys alone "
            "(loss added, difference)",
            f"{PAPER}, abstract",
            [a[0] - b[0] for a, b in zip(found[small], found[lisa], strict=True)],
            unit="nats a byte",
            at_least=0,
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Similarity of layers, loss added by sharing in one layer, and loss added by converting all but the first."""
    figure, (alike, shared, converted) = panels(3)
    series = outcome.series
    labels = {"same head": "same head", "best head": "most similar head", "best head, other text": "... on other text"}
    for name, label in labels.items():
        alike.plot(series["layers"], series[f"similarity, {name}"], marker="o", label=label)
    alike.set(title="Attention of neighbouring layers", xlabel="layer", ylabel="cosine with layer before", ylim=(0, 1))
    for name in ("shared as it is", "shared after alignment"):
        shared.plot(series["layers"], series[f"loss added, {name}"], marker="o", label=name)
    shared.set(title="Scores shared in one layer", xlabel="layer", ylabel="loss added (nats a byte)")
    for name, label, colour in (("LiSA", "LiSA", "C0"), ("small queries and keys alone", "low rank alone", "C1")):
        for stage, line in (("converted", "--"), ("distilled", "-")):
            values = series[f"loss added, {name}, {stage}"]
            converted.plot(
                series["compression"], values, color=colour, linestyle=line, marker="o", label=f"{label}, {stage}"
            )
    converted.set(
        title="All layers but the first", xlabel="compression of queries and keys", ylabel="loss added (nats a byte)"
    )
    for axis in (alike, shared):
        axis.set_xticks(series["layers"])
    for axis, room in ((shared, 1.25), (converted, 1.5)):
        axis.set_ylim(0, room * axis.get_ylim()[1])  # for the legend
    for axis in (alike, shared, converted):
        axis.legend()
    return figure
