"""What does FourierFT learn for each trained parameter, against LoRA, and does it matter which frequencies it has?

A byte-level model of Python source is fine-tuned on prose through all matrices of its blocks: by LoRA over ranks, and
by FourierFT with as many coefficients, with fewer, and with low frequencies alone. Coefficients begin at 0, and the
scaling follows the size of these small matrices: normal ones under the paper's would drown their weights. The step
sizes are the best of a few on another seed.
Quick: 3 seeds, half a minute. Full: a larger model, 5 seeds, three hours.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mlreviews.peft import (
    FourierFTLinear,
    LoRASettings,
    fourier_delta_weight,
    fourier_product,
    inject,
    inject_lora,
    matching_layers,
    trainable_parameters,
    uniform_entries,
)
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.finetuning import MATRICES, fine_tuning
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2405.03003"
RANKS = (1, 4)
# coefficients of all matrices together, relative to the parameters of LoRA of rank 1
SHARES = (0.25, 1.0, 4.0)
LORA_RATE, FOURIER_RATE = 3e-3, 3e-2
# scaling / (rows * columns), the mean over matrices; 5e-4 in the paper's language models
SCALE = 1.3e-3
WAYS = (*(f"rank {rank}" for rank in RANKS), *(f"share {share:g}" for share in SHARES), "low frequencies")


def run(settings: Settings) -> Outcome:
    """Measures losses on unseen prose before and after, trained parameters, and the error of the sparse form."""
    task = fine_tuning(settings)
    before = task.prose(task.model())
    saved: dict[str, list[float]] = {way: [] for way in WAYS}
    counts: dict[str, float] = {}
    for seed in settings.track(range(task.seeds), "seeds"):
        for way in WAYS:
            model, rate = task.model(), FOURIER_RATE
            if way.startswith("rank"):
                rank, rate = int(way.removeprefix("rank ")), LORA_RATE
                inject_lora(model, MATRICES, LoRASettings(rank, 2.0 * rank), generator=settings.generator(seed))
            else:
                low = way == "low frequencies"
                _inject_fourier(model, 1.0 if low else float(way.removeprefix("share ")), low, seed)
            counts[way] = float(sum(p.numel() for p in trainable_parameters(model).values()))
            task.train(model, rate, settings.generator(200 + seed))
            saved[way].append(before - task.prose(model))

    def more(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(saved[one], saved[other], strict=True)]

    claims = [
        measure(
            "With as many parameters FourierFT learns more than LoRA (saved on unseen prose, difference)",
            f"{PAPER}, figure 4",
            more("share 1", "rank 1"),
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "FourierFT learns as much as LoRA with a quarter of the parameters (saved, share of LoRA's of rank 4)",
            f"{PAPER}, abstract",
            [a / b for a, b in zip(saved["share 1"], saved["rank 4"], strict=True)],
            at_least=0.95,
        ),
        measure(
            "More coefficients learn more (saved by 16 times as many, difference)",
            f"{PAPER}, section 4.5",
            more(f"share {SHARES[-1]:g}", f"share {SHARES[0]:g}"),
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "Frequencies without a bias are no worse than low ones (saved, difference)",
            f"{PAPER}, section 4.5",
            more("share 1", "low frequencies"),
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "The sparse form gives what the dense matrix gives (largest relative difference, single precision)",
            "mlreviews, equation 2",
            _difference(settings),
            at_most=1e-5,
        ),
    ]
    series = {f"saved, {way}": saved[way] for way in WAYS} | {f"parameters, {way}": [counts[way]] for way in WAYS}
    return Outcome(claims, series | {"before": [before]})


def _inject_fourier(model: nn.Module, share: float, low: bool, seed: int) -> None:
    """The same number of coefficients for each matrix, as the method has it."""
    layers: list[Any] = list(matching_layers(model, MATRICES).values())
    n = round(share * statistics.fmean(sum(layer.weight.shape) for layer in layers))
    scaling = SCALE * statistics.fmean(layer.weight.numel() for layer in layers)

    def make(path: str, base: nn.Module) -> FourierFTLinear:
        # the band that holds four times as many places as are taken
        bandwidth = (4 * n / torch.pi) ** 0.5
        return FourierFTLinear(
            base, n, scaling, seed=777 + seed, f_c=0.0 if low else None, bandwidth=bandwidth, zero=True
        )

    inject(model, MATRICES, make)


def _difference(settings: Settings) -> float:
    """Between the forms, for a matrix of 384 by 512 and 1000 coefficients."""
    generator = settings.generator(900)
    c, x = torch.randn(1000, generator=generator), torch.randn(64, 512, generator=generator)
    entries = uniform_entries(384, 512, 1000)
    dense = x @ fourier_delta_weight(c, entries, 384, 512).mT
    return float((fourier_product(x, c, entries, 384) - dense).abs().max() / dense.abs().max())


def draw(outcome: Outcome) -> Figure:
    """What is learned over trained parameters."""
    figure, (axis,) = panels(1, width=6.0, height=3.8)
    series = outcome.series
    groups = (
        (f"LoRA, ranks {' and '.join(map(str, RANKS))}", [f"rank {rank}" for rank in RANKS], "o-", COLOURS[0]),
        ("FourierFT", [f"share {share:g}" for share in SHARES], "o-", COLOURS[1]),
        ("FourierFT, low frequencies", ["low frequencies"], "s", COLOURS[2]),
    )
    for label, ways, line, colour in groups:
        x = [series[f"parameters, {way}"][0] for way in ways]
        y = [series[f"saved, {way}"] for way in ways]
        axis.plot(x, [statistics.fmean(values) for values in y], line, color=colour, label=label)
        for place, values in zip(x, y, strict=True):
            axis.plot([place] * len(values), values, ".", color=colour, alpha=0.4)
    axis.set(xscale="log", xlabel="trained parameters", ylabel="saved on unseen prose, bits per byte")
    axis.set(title="Fine-tuning on prose (dots: seeds)")
    axis.legend()
    return figure
