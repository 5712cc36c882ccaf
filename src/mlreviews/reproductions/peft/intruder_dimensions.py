"""Do intruder dimensions appear with LoRA and not with full fine-tuning, and what comes back when they are scaled down?

A byte-level model of Python source is fine-tuned on prose, in full and by LoRA of several ranks and step sizes. Then
the singular vectors of its matrices are compared with those before, and what it has forgotten of source is measured.
Quick: 3 seeds, 40 seconds. Full: a larger model, 5 seeds, more than an hour.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.models import TinyLM
from mlreviews.peft import LoRASettings, eject, inject_lora
from mlreviews.peft.intruder_dimensions import (
    count_intruders,
    effective_update_rank,
    mitigate_intruders,
    singular_similarity,
)
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.finetuning import MATRICES, fine_tuning
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.21228"
REVIEW = "review of 2025-03-01"
# way -> rank (0: in full) and step size; all come to about the same loss on prose
WAYS = {"full": (0, 5e-4), "LoRA 1": (1, 1e-2), "LoRA 1, large steps": (1, 5e-2), "LoRA 32, large steps": (32, 1e-2)}
LOW, HIGH = "LoRA 1, large steps", "LoRA 32, large steps"
SCALES = (0.0, 0.5, 0.75)
EPSILONS = tuple(i / 20 for i in range(2, 20))


def run(settings: Settings) -> Outcome:
    """Counts intruders, and measures what was learned and forgotten, before and after mitigation."""
    task = fine_tuning(settings)
    before = _matrices(task.model())
    counts: dict[str, list[float]] = {way: [] for way in WAYS}
    sweep: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    learned: dict[str, list[float]] = {way: [] for way in WAYS}
    forgot: dict[str, list[float]] = {way: [] for way in WAYS}
    spread: dict[str, list[float]] = {way: [] for way in WAYS}
    mitigated: dict[float, list[tuple[float, float]]] = {scale: [] for scale in SCALES}
    source = task.source(task.model())
    for seed in settings.track(range(task.seeds), "seeds"):
        for way, (rank, rate) in WAYS.items():
            model = task.model()
            if rank:
                # As in the paper: alpha is twice the rank.
                inject_lora(model, MATRICES, LoRASettings(rank, 2.0 * rank), generator=settings.generator(seed))
            task.train(model, rate, settings.generator(200 + seed))
            if rank:
                eject(model, keep=True)
            after = _matrices(model)
            counts[way].append(statistics.fmean(count_intruders(before, after).values()))
            best = torch.cat([singular_similarity(before[n], w)[:10].amax(1) for n, w in after.items()])
            sweep[way].append([float((best < eps).float().mean()) * 10 for eps in EPSILONS])
            spread[way].append(statistics.fmean(effective_update_rank(before[n], w) for n, w in after.items()))
            learned[way].append(task.prose(model))
            forgot[way].append(task.source(model) - source)
            if way == LOW:
                for scale in SCALES:
                    _put(model, {name: mitigate_intruders(before[name], w, scale) for name, w in after.items()})
                    mitigated[scale].append((task.prose(model), task.source(model) - source))
    half = mitigated[0.5]
    claims = [
        measure(
            "LoRA of rank 1 with large steps has more intruders among a matrix' 10 leading vectors than full "
            "fine-tuning (difference per matrix)",
            f"{PAPER}, figure 4",
            [a - b for a, b in zip(counts[LOW], counts["full"], strict=True)],
            at_least=0.1,
        ),
        measure(
            "... and so it has with the smaller steps that lead to the same loss",
            f"{PAPER}, figure 4",
            [a - b for a, b in zip(counts["LoRA 1"], counts["full"], strict=True)],
            at_least=0.1,
        ),
        measure("Full fine-tuning has hardly any (per matrix)", f"{PAPER}, figure 4", counts["full"], at_most=0.1),
        measure(
            "Rank 32 has fewer intruders than rank 1, both with large steps (difference per matrix)",
            REVIEW,
            [a - b for a, b in zip(counts[LOW], counts[HIGH], strict=True)],
            at_least=0.1,
        ),
        measure(
            "LoRA of rank 1 with large steps forgets more source code than full fine-tuning (difference)",
            REVIEW,
            [a - b for a, b in zip(forgot[LOW], forgot["full"], strict=True)],
            at_least=0.001,
            unit="bits per byte",
        ),
        measure(
            "Halving its intruders' singular values brings source code back (forgotten before minus after)",
            f"{PAPER}, section 5",
            [a - b for a, (_, b) in zip(forgot[LOW], half, strict=True)],
            at_least=0.001,
            unit="bits per byte",
        ),
        measure(
            "... at a smaller cost in prose (source code regained minus prose lost)",
            f"{PAPER}, section 5",
            [(a - f) - (p - q) for a, q, (p, f) in zip(forgot[LOW], learned[LOW], half, strict=True)],
            at_least=0.001,
            unit="bits per byte",
        ),
    ]
    series: dict[str, list[float]] = {"epsilon": list(EPSILONS)}
    series |= {f"intruders, {way}": [statistics.fmean(v) for v in zip(*sweep[way], strict=True)] for way in WAYS}
    for name, values in (("prose", learned), ("forgotten", forgot), ("effective rank", spread)):
        series |= {f"{name}, {way}": [statistics.fmean(values[way])] for way in WAYS}
    series["scale"] = [*SCALES, 1.0]
    kept = [statistics.fmean(learned[LOW]), statistics.fmean(forgot[LOW])]
    for i, name in enumerate(("prose, scaled", "forgotten, scaled")):
        series[name] = [*(statistics.fmean(v[i] for v in mitigated[scale]) for scale in SCALES), kept[i]]
    return Outcome(claims, series)


def _matrices(model: TinyLM) -> dict[str, Tensor]:
    """The matrices of the blocks, copied."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2}


@torch.no_grad()
def _put(model: TinyLM, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)


def draw(outcome: Outcome) -> Figure:
    """Intruders against the threshold, and what mitigation trades."""
    figure, (left, right) = panels(2)
    series = outcome.series
    for name, values in series.items():
        if name.startswith("intruders, "):
            left.plot(series["epsilon"], values, label=name.removeprefix("intruders, "))
    left.axvline(0.5, color="0.4", linestyle=":")
    left.set(title="Intruders", xlabel="threshold ε (0.5: the paper's)", ylabel="of 10 leading vectors of a matrix")
    left.legend()
    right.plot(series["scale"], series["forgotten, scaled"], marker="o", label="source code forgotten")
    lost = [value - series["prose, scaled"][-1] for value in series["prose, scaled"]]
    right.plot(series["scale"], lost, marker="s", label="prose lost")
    right.set(
        title="LoRA 1, large steps: intruders scaled", xlabel="factor λ", ylabel="bits per byte more than without"
    )
    right.legend()
    return figure
