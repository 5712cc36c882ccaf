"""Does a mixture of LoRA and identity experts forget less than LoRA, and do its routes tell old inputs from new ones?

A byte-level model of Python source is fine-tuned on prose by LoRA and by SLIM of about as many trained numbers, and
tested on prose and on source code. Quick: 3 seeds, 40 seconds. Full: a larger model, 5 seeds, two hours.
"""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

import torch

from mlreviews.datasets import TextSplit, python_prose, python_source
from mlreviews.models import TinyLM
from mlreviews.peft import LoRASettings, SLIMLinear, adapters, inject, inject_lora, trainable_parameters
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.finetuning import FineTuning, fine_tuning
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.07739"
REVIEW = "review of 2025-03-13"
# what the paper adapts: the matrices of the MLPs
TARGETS = r"layers\.\d+\.mlp\.\w+_proj"
RANK = 4
# An expert sees a part of the tokens, and counts with its weight: at LoRA's step size it would learn far less.
RATES = {"LoRA": 3e-3, "SLIM": 1e-2, "SLIM without identity": 1e-2}
WAYS = tuple(RATES)


def run(settings: Settings) -> Outcome:
    """Measures what is learned and forgotten, and how much goes to the identity experts."""
    task = fine_tuning(settings)
    model = task.model()
    prose, source = task.prose(model), task.source(model)
    learned: dict[str, list[float]] = {way: [] for way in WAYS}
    forgot: dict[str, list[float]] = {way: [] for way in WAYS}
    numbers: dict[str, int] = {}
    yielded = []
    for seed in settings.track(range(task.seeds), "seeds"):
        for way in WAYS:
            model = task.model()
            _adapt(model, way, settings.generator(seed))
            numbers[way] = sum(p.numel() for p in trainable_parameters(model).values())
            task.train(model, RATES[way], settings.generator(200 + seed))
            learned[way].append(prose - task.prose(model))
            forgot[way].append(task.source(model) - source)
            if way == "SLIM":
                shares = [_identity_share(task, model, c.validation) for c in (python_source(), python_prose())]
                yielded.append(shares[0] - shares[1])
    claims = [
        measure(
            "SLIM forgets less of source code than LoRA of as many trained numbers (LoRA minus SLIM)",
            f"{PAPER}, table 2",
            [a - b for a, b in zip(forgot["LoRA"], forgot["SLIM"], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "SLIM learns as much prose (saved by SLIM over saved by LoRA)",
            f"{PAPER}, table 1",
            [a / b for a, b in zip(learned["SLIM"], learned["LoRA"], strict=True)],
            at_least=0.9,
        ),
        measure(
            "The identity experts are what keeps the knowledge (forgotten without them minus with them)",
            f"{PAPER}, table 3",
            [a - b for a, b in zip(forgot["SLIM without identity"], forgot["SLIM"], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "Source code is sent to identity experts more than prose is (difference of their mean weights)",
            REVIEW,
            yielded,
            at_least=0.0,
        ),
    ]
    series = {f"learned, {way}": learned[way] for way in WAYS} | {f"forgotten, {way}": forgot[way] for way in WAYS}
    return Outcome(claims, series | {"trained numbers": [float(n) for n in numbers.values()]})


def _adapt(model: TinyLM, way: str, generator: torch.Generator) -> None:
    if way == "LoRA":
        inject_lora(model, TARGETS, LoRASettings(8 * RANK, 16.0 * RANK), generator=generator)
        return
    identity = 2 if way == "SLIM" else 0
    inject(
        model,
        TARGETS,
        lambda path, base: SLIMLinear(
            base, 8, identity, RANK, 2.0 * RANK, n_clusters=16, momentum=0.9, generator=generator
        ),
    )


@torch.no_grad()
def _identity_share(task: FineTuning, model: TinyLM, split: TextSplit) -> float:
    """The mean weight of the identity experts over the tokens of some windows, over all layers."""
    model.eval()
    shares: list[float] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, args: shares.append(float(m.routing(args[0].flatten(0, 1).float())[:, m.n_lora :].sum(1).mean()))
        )
        for layer in adapters(model).values()
    ]
    for window in itertools.islice(split.sweep(128, 16), 2):
        model(window[:, :-1].to(task.device))
    for hook in hooks:
        hook.remove()
    model.train()
    return statistics.fmean(shares)


def draw(outcome: Outcome) -> Figure:
    """Forgotten against learned, a point a seed."""
    figure, (axis,) = panels(1, width=5.6, height=3.8)
    for way, colour, marker in zip(WAYS, COLOURS, "osD", strict=False):
        x, y = (outcome.series[f"{name}, {way}"] for name in ("learned", "forgotten"))
        axis.scatter(x, y, color=colour, marker=marker, label=way)
    axis.set(
        title="Learned and forgotten",
        xlabel="prose learned, bits per byte saved",
        ylabel="source code forgotten, bits per byte",
    )
    axis.legend()
    return figure
