"""Does LoRA learn faster when it starts along the principal components of each layer's inputs?

A byte-level model of Python source is fine-tuned on prose by LoRA and by EVA with the same mean rank.
Quick: 3 seeds, half a minute. Full: a larger model, 5 seeds, an hour.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from mlreviews.datasets import python_prose
from mlreviews.peft import LoRASettings, eva_start, inject_eva, inject_lora
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.finetuning import MATRICES, fine_tuning
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.07170"
REVIEW = "review of 2025-02-13"
RANK, ALPHA, RATE = 4, 8.0, 3e-3
WAYS = ("LoRA", "EVA", "EVA, equal ranks")


def run(settings: Settings) -> Outcome:
    """Measures losses of both, the ranks, and how soon the components have converged."""
    task = fine_tuning(settings)
    bits: dict[str, list[float]] = {way: [] for way in WAYS}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    ranks: dict[str, int] = {}
    needed, converged = [], []
    for seed in settings.track(range(task.seeds), "seeds"):
        for way in WAYS:
            model = task.model()
            if way == "LoRA":
                inject_lora(model, MATRICES, LoRASettings(RANK, ALPHA), generator=settings.generator(seed))
            else:
                windows = python_prose().train.batches(task.length, 16, settings.generator(300 + seed))
                batches = (next(windows)[:, :-1].to(task.device) for _ in range(20))
                start = eva_start(model, batches, MATRICES, RANK, rho=2.0 if way == "EVA" else 1.0)
                inject_eva(model, start, ALPHA)
                if way == "EVA":
                    needed.append(start.batches)
                    converged.append(float(start.converged))
                    ranks = {path: len(rows) for path, rows in start.rows.items()}
            curves[way].append(task.train(model, RATE, settings.generator(200 + seed)))
            bits[way].append(task.prose(model))
    gain = [a - b for a, b in zip(bits["LoRA"], bits["EVA"], strict=True)]
    half = len(curves["LoRA"][0]) // 2
    early = [
        statistics.fmean(a[:half]) - statistics.fmean(b[:half])
        for a, b in zip(curves["LoRA"], curves["EVA"], strict=True)
    ]
    claims = [
        measure(
            "EVA's loss on unseen prose is below LoRA's after as many updates (LoRA minus EVA)",
            f"{PAPER}, section 4",
            gain,
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "EVA converges faster: lower training loss over the first half (LoRA minus EVA)",
            f"{PAPER}, figure 1",
            early,
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "Choosing ranks by explained variance helps beside the start itself (equal ranks minus EVA)",
            REVIEW,
            [a - b for a, b in zip(bits["EVA, equal ranks"], bits["EVA"], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "Ranks differ between layers (largest minus smallest, mean rank 4)",
            REVIEW,
            max(ranks.values()) - min(ranks.values()),
            at_least=2,
        ),
        measure(
            "The components converge within 20 batches of the fine-tuning data (part of seeds)",
            f"{PAPER}, section 3",
            statistics.fmean(converged),
            at_least=1.0,
        ),
    ]
    series: dict[str, list[float]] = {"rank": [float(r) for r in ranks.values()]}
    series |= {f"loss, {way}": [statistics.fmean(v) for v in zip(*curves[way], strict=True)] for way in WAYS}
    series |= {f"unseen, {way}": bits[way] for way in WAYS} | {"batches until convergence": [float(n) for n in needed]}
    return Outcome(claims, series)


def draw(outcome: Outcome) -> Figure:
    """Training losses smoothed over 5 updates, and the rank of each layer."""
    figure, (left, right) = panels(2)
    for way in WAYS:
        curve = outcome.series[f"loss, {way}"]
        smooth = [statistics.fmean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
        left.plot(range(1, len(smooth) + 1), smooth, label=way)
    left.set(title="Fine-tuning on prose", xlabel="updates", ylabel="training loss, bits per byte")
    left.legend()
    rank = outcome.series["rank"]
    right.bar(range(len(rank)), rank)
    right.axhline(RANK, color="0.4", linestyle=":")
    right.set(title="EVA's ranks (dotted: LoRA's)", xlabel="matrix, from the first block on", ylabel="rank")
    return figure
