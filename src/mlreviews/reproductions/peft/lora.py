"""How much of what full fine-tuning learns does LoRA learn, with how many parameters, and what does LoRA+ add?

A byte-level model of Python source is fine-tuned on prose, in full and by LoRA in all matrices of its blocks, over
ranks, and by LoRA+. The step sizes are the best of a few on another seed.
Quick: 3 seeds, half a minute. Full: a larger model, 5 seeds, two hours.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from mlreviews.peft import LoRASettings, inject_lora, lora_plus_groups, trainable_parameters
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.finetuning import MATRICES, FineTuning, fine_tuning
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LORA, PLUS, FORGETTING = "arXiv:2106.09685", "arXiv:2402.12354", "arXiv:2405.09673"
RANKS = (1, 4, 16)
FULL_RATE, LORA_RATE, PLUS_RATE = 1e-3, 3e-3, 1e-3
WAYS = ("full", *(f"rank {rank}" for rank in RANKS), "LoRA+")
MIDDLE = f"rank {RANKS[1]}"


def run(settings: Settings) -> Outcome:
    """Measures losses on unseen prose and source code before and after, and the trained parameters."""
    task = fine_tuning(settings)
    before, known = task.prose(task.model()), task.source(task.model())
    saved: dict[str, list[float]] = {way: [] for way in WAYS}
    forgotten: dict[str, list[float]] = {way: [] for way in WAYS}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    counts: dict[str, float] = {}
    for seed in settings.track(range(task.seeds), "seeds"):
        for way in WAYS:
            counts[way], curve, prose, source = _one(task, way, settings, seed)
            curves[way].append(curve)
            saved[way].append(before - prose)
            forgotten[way].append(source - known)
    top, low = f"rank {RANKS[-1]}", f"rank {RANKS[0]}"
    claims = [
        measure(
            f"LoRA of rank {RANKS[-1]} learns as much as full fine-tuning (saved on unseen prose, share of the latter)",
            f"{LORA}, abstract",
            _shares(saved[top], saved["full"]),
            at_least=0.95,
        ),
        measure(
            f"... and of rank {RANKS[1]} it trains a small part of the parameters",
            f"{LORA}, abstract",
            counts[MIDDLE] / counts["full"],
            at_most=0.1,
        ),
        measure(
            f"A very low rank is enough (saved by rank {RANKS[0]}, share of rank {RANKS[-1]})",
            f"{LORA}, section 7.2",
            _shares(saved[low], saved[top]),
            at_least=0.9,
        ),
        measure(
            f"LoRA+ learns more than LoRA in as many updates (rank {RANKS[1]}, difference of what is saved)",
            f"{PLUS}, abstract",
            [a - b for a, b in zip(saved["LoRA+"], saved[MIDDLE], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            f"LoRA of rank {RANKS[-1]} forgets less source code than full fine-tuning (difference of the loss added)",
            f"{FORGETTING}, abstract",
            [a - b for a, b in zip(forgotten["full"], forgotten[top], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
    ]
    series: dict[str, list[float]] = {"before": [before], "source code, before": [known]}
    for way in WAYS:
        series |= {
            f"saved, {way}": saved[way],
            f"forgotten, {way}": forgotten[way],
            f"parameters, {way}": [counts[way]],
        }
        series[f"loss, {way}"] = [statistics.fmean(values) for values in zip(*curves[way], strict=True)]
    return Outcome(claims, series)


def _one(task: FineTuning, way: str, settings: Settings, seed: int) -> tuple[float, list[float], float, float]:
    """Trained parameters, losses of the updates, and bits per byte of prose and of source code afterwards."""
    model, rate, groups = task.model(), FULL_RATE, None
    if way != "full":
        rank = RANKS[1] if way == "LoRA+" else int(way.removeprefix("rank "))
        rate = LORA_RATE
        # alpha is twice the rank, so that gamma is the same for all
        inject_lora(model, MATRICES, LoRASettings(rank, 2.0 * rank), generator=settings.generator(seed))
    if way == "LoRA+":
        groups = lora_plus_groups(model, PLUS_RATE)
    count = float(sum(p.numel() for p in trainable_parameters(model).values()))
    curve = task.train(model, rate, settings.generator(200 + seed), groups=groups)
    return count, curve, task.prose(model), task.source(model)


def _shares(parts: list[float], wholes: list[float]) -> list[float]:
    return [part / whole for part, whole in zip(parts, wholes, strict=True)]


def draw(outcome: Outcome) -> Figure:
    """What is learned and forgotten over trained parameters, and the losses while training."""
    figure, (learned, lost, curves) = panels(3)
    series = outcome.series
    for axis, what in ((learned, "saved"), (lost, "forgotten")):
        x = [series[f"parameters, rank {rank}"][0] for rank in RANKS]
        y = [statistics.fmean(series[f"{what}, rank {rank}"]) for rank in RANKS]
        axis.plot(x, y, marker="o", label=f"LoRA, ranks {', '.join(map(str, RANKS))}")
        for way, label, colour in (("LoRA+", f"LoRA+, rank {RANKS[1]}", COLOURS[2]), ("full", "all", COLOURS[1])):
            mean = statistics.fmean(series[f"{what}, {way}"])
            axis.plot(series[f"parameters, {way}"], [mean], "s", color=colour, label=label)
        axis.set(xscale="log", xlabel="trained parameters")
        axis.legend()
    learned.set(title="Learned", ylabel="saved on prose, bits per byte")
    lost.set(title="Forgotten", ylabel="added on source code, bits per byte")
    for way, label, colour in (
        ("full", "all parameters", COLOURS[1]),
        (MIDDLE, f"LoRA, {MIDDLE}", COLOURS[0]),
        ("LoRA+", f"LoRA+, {MIDDLE}", COLOURS[2]),
    ):
        curve = series[f"loss, {way}"]
        smooth = [statistics.fmean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
        curves.plot(range(1, len(smooth) + 1), smooth, color=colour, label=label)
    curves.set(title="While training", xlabel="updates", ylabel="loss, bits per byte")
    curves.legend()
    return figure
