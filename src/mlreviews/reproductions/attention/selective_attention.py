"""Does selective attention predict text better, and how small a cache then serves as well as the standard one?

Byte-level language models on Python's source are trained from the same weights and on the same batches: standard,
selective, and selective with the memory loss. Then the budgets of the last one's layers are searched greedily, until
its loss on held-out text is that of the standard model with its whole cache. On other held-out text the result is
compared with standard attention to the first token and a window of just as many: in the standard model, and trained so.
Quick: 2 layers of width 48, 64 bytes, 150 updates, 3 seeds, half a minute. Full: 4 layers of width 128, 256 bytes,
3,000 updates, 3 seeds, hours on a CPU. The paper's contexts are of 512 tokens and more, its models much larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.attention.selective_attention import (
    BudgetStep,
    SelectiveAttention,
    memory_loss,
    search_budgets,
)
from mlreviews.datasets import TextCorpus, python_source
from mlreviews.models import CausalAttention, KVCache, LMOutput, TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import training
from mlreviews_kernels.attention import attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.02703"
EPSILON = 0.1  # weight of the memory loss
STANDARD, SELECTIVE, FORGETFUL = "standard", "selective", "selective, memory loss"
CUT, WINDOW = "standard, then first token and window", "trained with first token and window"


@dataclass(frozen=True)
class TextTask:
    """What is trained on.

    Attributes:
        corpus: the text.
        length: bytes in a window.
        batch_size: windows in a batch.
        updates: of the weights.
        rate: the highest step size.
        device: where the models live.
    """

    corpus: TextCorpus
    length: int
    batch_size: int
    updates: int
    rate: float
    device: str

    def held_out(self, batches: int, generator: torch.Generator) -> list[Tensor]:
        """Random windows of the validation part, 16 in a batch."""
        drawn = self.corpus.validation.batches(self.length, 16, generator)
        return [next(drawn).to(self.device) for _ in range(batches)]

    def train(
        self, model: nn.Module, generator: torch.Generator, penalty: Callable[[LMOutput], Tensor] | None = None
    ) -> list[float]:
        """Trains on random windows; the losses in the course of it, each a mean over a tenth of the updates.

        Args:
            model: a language model.
            generator: draws the windows.
            penalty: of a batch's output, added to its loss; None for no such term.
        """
        windows = self.corpus.train.batches(self.length, self.batch_size, generator)
        found: list[float] = []

        def loss() -> Tensor:
            window = next(windows).to(self.device)
            out = model(window[:, :-1])
            entropy = nn.functional.cross_entropy(out.logits.flatten(0, 1), window[:, 1:].flatten())
            found.append(float(entropy.detach()))
            return entropy if penalty is None else entropy + penalty(out)

        for _ in training(model, loss, self.updates, self.rate):
            pass
        return torch.tensor(found).reshape(10, -1).mean(1).tolist()


@torch.no_grad()
def text_loss(model: nn.Module, windows: list[Tensor]) -> float:
    """Mean cross-entropy, in nats a byte.

    Args:
        model: a language model.
        windows: of `TextTask.held_out`.
    """
    model.eval()
    losses = [nn.functional.cross_entropy(model(w[:, :-1]).logits.flatten(0, 1), w[:, 1:].flatten()) for w in windows]
    model.train()
    return float(torch.stack(losses).mean())


class FirstAndWindow(CausalAttention):
    """Standard attention to the first token and the last ones alone: what is dropped is simply the oldest."""

    budget: int

    def mix(self, q: Tensor, cache: KVCache) -> Tensor:
        """As of `CausalAttention`, for whole sequences."""
        batch, time = q.shape[:2]
        seen = torch.ones(time, time, dtype=torch.bool, device=q.device).tril().triu(2 - self.budget)
        seen[:, 0] = True
        return attention(q, cache.keys, cache.values, mask=seen.expand(batch, time, time))[0]


@dataclass(frozen=True)
class Trained:
    """What was measured with one seed.

    Attributes:
        curves: losses in the course of training, by variant.
        losses: on held-out text, with whole caches, by variant.
        memory: the largest M over the length, by variant.
        path: of the budget search.
        limited: loss within the budgets that were found.
        fraction: the size of the caches within the budgets over that of whole ones.
    """

    curves: dict[str, list[float]]
    losses: dict[str, float]
    memory: dict[str, float]
    path: list[BudgetStep]
    limited: float
    fraction: float


def run(settings: Settings) -> Outcome:
    """Trains the three kinds with several seeds, and searches the budgets of the last kind."""
    corpus = python_source()
    if settings.full:
        task, config = TextTask(corpus, 256, 16, 3000, 0.003, settings.device), TinyLMConfig(d_model=128, layers=4)
    else:
        task, config = TextTask(corpus, 64, 8, 150, 0.01, settings.device), TinyLMConfig(d_model=48, layers=2)
    found = [_one(task, config, settings, seed) for seed in settings.track(range(3), "seeds")]
    series: dict[str, list[float]] = {"updates": [task.updates * (i + 0.5) / 10 for i in range(10)]}
    for name in (STANDARD, SELECTIVE, FORGETFUL):
        series[f"training loss, {name}"] = torch.tensor([one.curves[name] for one in found]).mean(0).tolist()
        series[f"held-out loss, {name}"] = [one.losses[name] for one in found]
    for name in (SELECTIVE, FORGETFUL):
        series[f"largest memory over length, {name}"] = [one.memory[name] for one in found]
    for seed, one in enumerate(found):
        whole = task.length * config.layers
        series[f"share of the cache, seed {seed}"] = [sum(step.budgets) / whole for step in one.path]
        series[f"loss above whole cache, seed {seed}"] = [step.loss - one.path[0].loss for step in one.path]
        series[f"budgets, seed {seed}"] = [float(b) for b in one.path[-1].budgets]
    series["share of the cache"] = [one.fraction for one in found]
    series["loss within budgets"] = [one.limited for one in found]
    for name in (CUT, WINDOW):
        series[f"loss within budgets, {name}"] = [one.losses[name] for one in found]
    return Outcome(_claims(found), series)


def _one(task: TextTask, config: TinyLMConfig, settings: Settings, seed: int) -> Trained:
    search = task.held_out(8 if settings.full else 1, settings.generator(50))
    test = task.held_out(32 if settings.full else 8, settings.generator(51))
    models, curves, losses, memory = {}, {}, {}, {}

    def forgetting(out: LMOutput) -> Tensor:
        return EPSILON * memory_loss(out.cache.layers, task.length)

    kinds = ((STANDARD, CausalAttention, None), (SELECTIVE, SelectiveAttention, None))
    for name, kind, penalty in (*kinds, (FORGETFUL, SelectiveAttention, forgetting)):
        model = TinyLM(config, kind, generator=settings.generator(seed)).to(settings.device)
        curves[name] = task.train(model, settings.generator(100 + seed), penalty)
        losses[name] = text_loss(model, test)
        if kind is SelectiveAttention:
            with torch.no_grad():
                memory[name] = float(memory_loss(model(test[0][:, :-1]).cache.layers, task.length))
        models[name] = model
    model, limit = models[FORGETFUL], text_loss(models[STANDARD], search)
    step = task.length // 16
    path = search_budgets(model, lambda: text_loss(model, search), start=task.length, step=step, limit=limit)
    if not path:  # worse than standard with its whole cache
        path = [BudgetStep((task.length,) * config.layers, text_loss(model, search))]
    budgets, limited = path[-1].budgets, text_loss(model, test)
    window = TinyLM(config, FirstAndWindow, generator=settings.generator(seed)).to(settings.device)
    for layer, budget in zip((m for m in window.modules() if isinstance(m, FirstAndWindow)), budgets, strict=True):
        layer.budget = budget
    curves[WINDOW] = task.train(window, settings.generator(100 + seed))
    losses[WINDOW] = text_loss(window, test)
    window.load_state_dict(models[STANDARD].state_dict())
    losses[CUT] = text_loss(window, test)
    return Trained(curves, losses, memory, path, limited, sum(budgets) / (task.length * config.layers))


def _claims(found: list[Trained]) -> list[Claim]:
    def above_standard(name: str) -> list[float]:
        return [one.losses[name] - one.losses[STANDARD] for one in found]

    def behind(name: str) -> list[float]:
        return [one.losses[name] - one.limited for one in found]

    fractions = [one.fraction for one in found]
    return [
        measure(
            "Selective attention predicts held-out text better than standard attention of the same size (its loss "
            "minus the standard one)",
            f"{PAPER}, abstract",
            above_standard(SELECTIVE),
            at_most=0.0,
            unit="nats a byte",
        ),
        measure(
            "With the memory loss, too",
            f"{PAPER}, abstract",
            above_standard(FORGETFUL),
            at_most=0.0,
            unit="nats a byte",
        ),
        measure(
            "The memory loss makes models forget more (largest memory, over that without)",
            f"{PAPER}, on its memory loss",
            [one.memory[FORGETFUL] / one.memory[SELECTIVE] for one in found],
            at_most=1.0,
        ),
        measure(
            "A quarter of the cache serves for the standard model's loss (share of all keys and values)",
            "ours",
            fractions,
            at_most=1 / 4,
        ),
        measure("... a sixteenth, as in the paper for 512 tokens", f"{PAPER}, abstract", fractions, at_most=1 / 16),
        measure(
            "What is selected matters: a standard model cut to the first token and windows of these sizes has a higher "
            "loss (difference)",
            "ours",
            behind(CUT),
            at_least=0.0,
            unit="nats a byte",
        ),
        measure(
            "... and so has a model that was trained with these windows (difference)",
            "ours",
            behind(WINDOW),
            at_least=0.0,
            unit="nats a byte",
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Losses in the course of training, the path of the search, and losses on held-out text."""
    figure, (curves, search, bars) = panels(3, 1, width=4.9, height=3.9)
    series = outcome.series
    for name in (STANDARD, SELECTIVE, FORGETFUL):
        curves.plot(series["updates"], series[f"training loss, {name}"], marker=".", label=name)
    curves.set(title="Training, mean over seeds", xlabel="updates", ylabel="loss, nats a byte")
    curves.legend()
    seeds = [name.rsplit(" ", 1)[1] for name in series if name.startswith("share of the cache, seed ")]
    for seed in seeds:
        share = series[f"share of the cache, seed {seed}"]
        search.plot(share, series[f"loss above whole cache, seed {seed}"], marker=".", label=f"seed {seed}")
    search.set(title="Greedy search of budgets", xlabel="share of the cache", ylabel="added loss, nats a byte")
    search.set_xscale("log", base=2)
    search.invert_xaxis()
    ticks = [2.0**-i for i in range(1 + math.ceil(-math.log2(min(series["share of the cache"]))))]
    search.set_xticks(ticks, ["1" if tick == 1 else f"1/{1 / tick:g}" for tick in ticks])
    search.legend()
    rows = [(name, series[f"held-out loss, {name}"]) for name in (STANDARD, SELECTIVE, FORGETFUL)]
    rows.append(("selective, within budgets", series["loss within budgets"]))
    rows += [(name, series[f"loss within budgets, {name}"]) for name in (CUT, WINDOW)]
    labels = [name.replace(", ", ",\n").replace("with first", "with\nfirst") for name, _ in rows]
    for place, (_, losses) in enumerate(rows):
        bars.plot(losses, [place] * len(losses), "o", color=COLOURS[place], alpha=0.8)
    bars.set_yticks(range(len(rows)), labels, fontsize=8)
    bars.set_ylim(len(rows) - 0.5, -0.5)
    bars.set(title="Held-out text, each seed", xlabel="loss, nats a byte")
    return figure
