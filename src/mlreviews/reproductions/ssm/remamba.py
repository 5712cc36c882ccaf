"""Does a learned choice of what to keep of a context beat a random one, and the most recent, when as much is kept?

Data tokens are strewn among bytes of Python's own source, and have to be repeated at the end of the prompt. ReMamba
compresses all of the text to a few states, as many as there are data tokens, and answers from them in a second pass.
Its choice by similarity is compared with a random one and with the last states of the text; scores, step sizes,
updates and batches are the same. All begin with a Mamba that has been trained to answer in one pass, as the paper does,
and that one is trained on for as many updates, too.
Quick: 2 tokens among 16 bytes, 3 seeds, 300 updates and 80 more, half a minute. Full: 6 tokens of 8 kinds among 120
bytes, 5 seeds, 3,000 and 1,500 updates.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.datasets import python_source
from mlreviews.models import SequenceModel
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import training
from mlreviews.ssm.mamba import MambaBlock
from mlreviews.ssm.remamba import ReMamba

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2408.15496"
TESTS = 5  # in the course of a training
END = 256  # the largest id of the text; 0 to 256 are bytes and the end of a file
LEARNED, RANDOM, LAST, ONCE = "learned choice", "random choice", "the last states", "Mamba, one pass"


class Chosen(ReMamba):
    """ReMamba that keeps other states than the most similar ones, with their scores.

    Args:
        backbone: as of `ReMamba`.
        compress_frac: as of `ReMamba`.
        ratio: as of `ReMamba`.
        choose: places from tokens, kept and batch: [batch, kept], ascending.
        generator: draws the weights.
    """

    def __init__(
        self,
        backbone: SequenceModel,
        compress_frac: float,
        ratio: float,
        choose: Callable[[int, int, int], Tensor],
        generator: torch.Generator,
    ) -> None:
        super().__init__(backbone, compress_frac, ratio, generator=generator)
        self.choose = choose

    def select(self, h: Tensor, query: Tensor, K: int) -> tuple[Tensor, Tensor]:
        """As of `ReMamba`, with the scores of the states that were chosen."""
        cosines = nn.functional.cosine_similarity(self.K_proj(h), self.Q_proj(query)[:, None], dim=2)
        places = self.choose(h.shape[1], K, h.shape[0]).to(h.device)
        return places, cosines.gather(1, places)


@dataclass(frozen=True)
class Task:
    """Recall of data tokens strewn in text.

    Attributes:
        length: of the text.
        tokens: data tokens in it.
        kinds: of data tokens.
        batch_size: examples in an update.
    """

    length: int
    tokens: int
    kinds: int
    batch_size: int

    def examples(
        self, batch_size: int, generator: torch.Generator, *, train: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Prompts (text with data in place of some bytes, then as many marks), the data, and where it was."""
        corpus = python_source()
        for text in (corpus.train if train else corpus.validation).batches(self.length - 1, batch_size, generator):
            targets = torch.randint(self.kinds, (batch_size, self.tokens), generator=generator)
            places = torch.rand(text.shape, generator=generator).topk(self.tokens).indices.sort().values
            ids = text.clamp(max=END).scatter(1, places, targets + END + 1)
            yield torch.cat([ids, torch.full_like(targets, END + 1 + self.kinds)], dim=1), targets, places


def run(settings: Settings) -> Outcome:
    """Trains Mamba, and goes on from it with each of the four models on the same examples."""
    task = Task(120, 6, 8, 32) if settings.full else Task(16, 2, 4, 16)
    before, updates, seeds, width = (3000, 1500, 5, 48) if settings.full else (300, 80, 3, 24)
    names = [LEARNED, RANDOM, LAST, ONCE]
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    kept: dict[str, list[float]] = {name: [] for name in names[:3]}
    start: list[float] = []
    for seed in settings.track(range(seeds), "seeds"):
        generator = settings.generator(seed)
        blocks = [MambaBlock(width, 8, generator=generator) for _ in range(2)]
        vocab_size = END + 2 + task.kinds
        backbone = SequenceModel(vocab_size, width, blocks, classes=task.kinds, generator=generator)
        backbone = backbone.to(settings.device)
        start.append(_train(backbone, task, before, 0.01, generator)[-1])
        for name in names:
            model = _model(name, copy.deepcopy(backbone), task, settings.generator(seed + seeds)).to(settings.device)
            curves[name].append(_train(model, task, updates, 0.003, settings.generator(seed + 2 * seeds)))
            if isinstance(model, ReMamba):
                kept[name].append(_kept(model, task, settings.generator(seed + 3 * seeds)))
    final = {name: [curve[-1] for curve in curves[name]] for name in names}

    def ahead(other: str, at_least: float, statement: str, section: str) -> Claim:
        points = [100 * (a - b) for a, b in zip(final[LEARNED], final[other], strict=True)]
        return measure(statement, f"{PAPER}, {section}", points, unit="percentage points", at_least=at_least)

    what = f"{task.tokens} of {task.length} states"
    claims = [
        ahead(RANDOM, 5, f"A learned choice of {what} answers better than a random one", "selective compression"),
        ahead(LAST, 5, f"A learned choice of {what} answers better than the last ones", "selective compression"),
        measure(
            "The learned choice keeps the places of the data more often than a random one (times chance)",
            f"{PAPER}, selective compression",
            [share * task.length / task.tokens for share in kept[LEARNED]],
            at_least=1.5,
        ),
        ahead(ONCE, 0, "ReMamba answers no worse than Mamba that was trained on for as many updates", "results"),
    ]
    series: dict[str, list[float]] = {"updates": [updates * (i + 1) / TESTS for i in range(TESTS)]}
    series |= {f"accuracy, {name}": torch.tensor(curves[name]).mean(0).tolist() for name in names}
    series |= {f"final accuracy, {name}": final[name] for name in names} | {"accuracy before": start}
    series |= {f"kept, {name}": shares for name, shares in kept.items()}
    chances = {"chance of an answer": [1 / task.kinds], "chance of a place": [task.tokens / task.length]}
    return Outcome(claims, series | chances)


def _model(name: str, backbone: SequenceModel, task: Task, generator: torch.Generator) -> nn.Module:
    # The range is the text: the marks, as many as there are data tokens, come after it.
    parts = (task.length / (task.length + task.tokens), task.tokens / task.length)
    if name == ONCE:
        return backbone
    if name == LEARNED:
        return ReMamba(backbone, *parts, generator=generator)

    def at_random(count: int, K: int, batch: int) -> Tensor:
        return torch.rand(batch, count, generator=generator).topk(K).indices.sort().values

    def the_last(count: int, K: int, batch: int) -> Tensor:
        return torch.arange(count - K, count).expand(batch, -1)

    return Chosen(backbone, *parts, at_random if name == RANDOM else the_last, generator)


def _train(model: nn.Module, task: Task, updates: int, rate: float, generator: torch.Generator) -> list[float]:
    """AdamW with a rate that rises and falls; accuracies on unseen text in the course of the training."""
    device = next(model.parameters()).device
    data = task.examples(task.batch_size, generator, train=True)
    tests = {round(updates * (i + 1) / TESTS) for i in range(TESTS)}

    def loss() -> Tensor:
        ids, targets, _ = next(data)
        logits = model(ids.to(device))[0][:, -task.tokens :]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().to(device))

    trained = training(model, loss, updates, rate)
    return [_accuracy(model, task, generator) for update, _ in trained if update in tests]


@torch.no_grad()
def _accuracy(model: nn.Module, task: Task, generator: torch.Generator) -> float:
    ids, targets, _ = next(task.examples(256, generator, train=False))
    logits = model(ids.to(next(model.parameters()).device))[0]
    return float((logits[:, -task.tokens :].argmax(-1).cpu() == targets).double().mean())


@torch.no_grad()
def _kept(model: ReMamba, task: Task, generator: torch.Generator) -> float:
    """Share of the data tokens whose own place is kept."""
    ids, _, places = next(task.examples(256, generator, train=False))
    indices = model.compress(ids.to(next(model.parameters()).device)).indices.cpu()
    return float((places[:, :, None] == indices[:, None]).any(2).double().mean())


def draw(outcome: Outcome) -> Figure:
    """Accuracy in the course of training, and what each choice keeps."""
    figure, (training, places) = panels(2)
    series = outcome.series
    for name, colour in zip((LEARNED, RANDOM, LAST, ONCE), COLOURS, strict=False):
        style = "--" if name == ONCE else "-"
        training.plot(series["updates"], series[f"accuracy, {name}"], style, color=colour, marker=".", label=name)
    training.axhline(series["chance of an answer"][0], color="0.4", linestyle=":", linewidth=1, label="chance")
    training.set(title="Recall of tokens strewn in text", xlabel="updates", ylabel="accuracy", ylim=(0, 1.03))
    names = (LEARNED, RANDOM, LAST)
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        shares = series[f"kept, {name}"]
        places.bar(i, statistics.fmean(shares), color=colour, width=0.6, alpha=0.5)
        places.scatter([i] * len(shares), shares, color=colour, zorder=3)
    places.axhline(series["chance of a place"][0], color="0.4", linestyle=":", linewidth=1, label="chance")
    places.set(title="Data tokens whose place is kept", ylabel="share (points: seeds)", ylim=(0, 1.03))
    places.set_xticks(range(len(names)), names)
    for axis in (training, places):
        axis.legend()
    return figure
