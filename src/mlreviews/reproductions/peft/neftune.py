"""Does noise on the embeddings help a model that is fine-tuned on few texts?

A byte-level model of Python source is fine-tuned on a few thousand bytes of prose, with and without noise, and tested
on prose of other files. Quick: 3 seeds, half a minute. Full: a larger model, 5 seeds, an hour.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch

from mlreviews.datasets import TextSplit, python_prose
from mlreviews.peft.neftune import NEFTune, neftune_noise
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.finetuning import fine_tuning
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2310.05914"
FEW = 4096  # bytes of prose that are trained on, again and again
ALPHAS = {False: (0.0, 5.0), True: (0.0, 5.0, 15.0)}


def run(settings: Settings) -> Outcome:
    """Measures training and test loss with and without noise."""
    task = fine_tuning(settings)
    known: dict[float, list[float]] = {alpha: [] for alpha in ALPHAS[settings.full]}
    unseen: dict[float, list[float]] = {alpha: [] for alpha in known}
    curves: dict[float, list[float]] = {}
    for seed in settings.track(range(task.seeds), "seeds"):
        few = _few(python_prose().train, settings.generator(seed))
        for alpha in known:
            model = task.model()
            noise = NEFTune(model.embed_tokens, alpha, generator=settings.generator(100 + seed, device=task.device))
            curves[alpha] = task.train(model, 3e-3, settings.generator(200 + seed), split=few)
            noise.detach()
            known[alpha].append(task.bits(model, few))
            unseen[alpha].append(task.prose(model))
    start = task.prose(task.model())
    x = torch.zeros(64, task.length, 112)
    norms = neftune_noise(x, 5.0, generator=settings.generator(300)).square().sum((1, 2)).tolist()
    claims = [
        measure(
            "Noise lowers the loss on unseen text after fine-tuning (without noise minus with alpha = 5)",
            f"{PAPER}, section 5 and figure 4",
            [a - b for a, b in zip(unseen[0.0], unseen[5.0], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "Noise makes the model fit its training texts less (loss there, with alpha = 5 minus without)",
            f"{PAPER}, section 5 and figure 4",
            [b - a for a, b in zip(known[0.0], known[5.0], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "The squared norm of the noise on a sequence is alpha² / 3 on average, 8.33 for alpha = 5",
            f"{PAPER}, section 3",
            norms,
            at_least=8.2,
            at_most=8.5,
        ),
    ]
    series = {f"loss while training, alpha {alpha:g}": curve for alpha, curve in curves.items()}
    series |= {"alpha": list(known), "before fine-tuning": [start]}
    series["unseen"] = [statistics.fmean(v) for v in unseen.values()]
    series["training texts"] = [statistics.fmean(v) for v in known.values()]
    return Outcome(claims, series)


def _few(split: TextSplit, generator: torch.Generator) -> TextSplit:
    start = int(torch.randint(len(split.data) - FEW, (1,), generator=generator))
    return TextSplit(split.data[start : start + FEW], torch.tensor([0, FEW]), ("excerpt",))


def draw(outcome: Outcome) -> Figure:
    """Losses after fine-tuning on known and unseen text, against alpha."""
    figure, (axis,) = panels(1, width=5.6, height=3.6)
    series = outcome.series
    places = range(len(series["alpha"]))
    for offset, name in ((-0.2, "training texts"), (0.2, "unseen")):
        bars = axis.bar([p + offset for p in places], series[name], 0.36, label=f"{name}, after")
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.axhline(series["before fine-tuning"][0], color="0.4", linestyle=":", label="unseen, before")
    axis.set_xticks(list(places), [f"{alpha:g}" for alpha in series["alpha"]])
    axis.set_ylim(0, 1.35 * max(series["before fine-tuning"][0], *series["unseen"]))
    axis.set(title="Noise on the embeddings", xlabel="alpha", ylabel="bits per byte of prose")
    axis.legend(loc="upper right", ncols=2)
    return figure
