"""Does validation loss find the layers that LoRA should train, and is training those alone better?

A byte-level model of Python source is to learn prose. Gates of its matrices are searched for; then LoRA is trained
anew on the matrices that were chosen, on all, and on as many at random. Quick: 3 seeds, 40 seconds. Full: a larger
model, 5 seeds, two hours.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlreviews.datasets import python_prose
from mlreviews.models import CausalAttention, KVCache, TinyLM
from mlreviews.peft import GatedLoRALinear, LoRASettings, inject, inject_lora, trainable_parameters
from mlreviews.peft.flexora import FlexoraSearch, flexora_search, flexora_select
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.finetuning import MATRICES, FineTuning, fine_tuning
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews.reproductions.training import next_token_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2408.10774"
RANK, ALPHA = 8, 16.0


def run(settings: Settings) -> Outcome:
    """Measures the loss on unseen prose of LoRA on chosen, all and random matrices."""
    task = fine_tuning(settings)
    bits: dict[str, list[float]] = {way: [] for way in ("all", "chosen", "random")}
    parts, searches = [], []
    for seed in settings.track(range(task.seeds), "seeds"):
        found = _searched(task, settings, seed)
        searches.append(found)
        every = list(found.alpha)
        chosen = flexora_select(found.alpha)
        order = torch.randperm(len(every), generator=settings.generator(400 + seed)).tolist()
        paths = {"all": every, "chosen": chosen, "random": [every[i] for i in order[: len(chosen)]]}
        trained = {}
        for way, targets in paths.items():
            model = task.model()
            inject_lora(model, targets, LoRASettings(RANK, ALPHA), generator=settings.generator(seed))
            trained[way] = sum(p.numel() for p in trainable_parameters(model).values())
            task.train(model, 3e-3, settings.generator(200 + seed))
            bits[way].append(task.prose(model))
        parts.append(trained["chosen"] / trained["all"])
    agreement = _agreement(searches)
    claims = [
        measure(
            "LoRA on the chosen matrices does better than on all (loss on unseen prose, all minus chosen)",
            f"{PAPER}, table 1",
            [a - b for a, b in zip(bits["all"], bits["chosen"], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "... and better than on as many at random (random minus chosen)",
            f"{PAPER}, table 2",
            [a - b for a, b in zip(bits["random"], bits["chosen"], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "It trains about half as many parameters (chosen over all)",
            f"{PAPER}, section 5",
            parts,
            at_most=0.7,
        ),
        measure(
            "Searches with other data choose alike (mean correlation of the gates of two seeds)",
            "ours",
            agreement,
            at_least=0.5,
        ),
    ]
    series = {f"unseen, {way}": values for way, values in bits.items()}
    series |= {f"alpha, seed {i}": list(found.alpha.values()) for i, found in enumerate(searches)}
    series |= {"part of the parameters": parts, "validation loss": searches[0].val_losses}
    return Outcome(claims, series)


class TwiceDifferentiable(CausalAttention):
    """Attention from torch's elementary operations: fused kernels have no second derivative."""

    def mix(self, q: Tensor, cache: KVCache) -> Tensor:
        """What the heads give for each query of a sequence that begins with the cache."""
        q, k, v = (x.transpose(1, 2) for x in (q, cache.keys, cache.values))
        with sdpa_kernel(SDPBackend.MATH):
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _searched(task: FineTuning, settings: Settings, seed: int) -> FlexoraSearch:
    shipped = task.model()
    model = TinyLM(shipped.config, TwiceDifferentiable, generator=torch.Generator()).to(task.device)
    model.load_state_dict(shipped.state_dict())
    generator = settings.generator(seed)
    inject(model, MATRICES, lambda path, base: GatedLoRALinear(base, RANK, ALPHA, generator=generator))
    split = python_prose().train
    train, validation = (
        (window.to(task.device) for window in split.batches(64, task.batch, settings.generator(stream + seed)))
        for stream in (500, 600)
    )
    return flexora_search(model, next_token_loss, train, validation, task.updates // 2, lr_theta=0.3, lr_alpha=0.05)


def _agreement(searches: list[FlexoraSearch]) -> float:
    alphas = torch.tensor([list(found.alpha.values()) for found in searches])
    pairs = torch.corrcoef(alphas)
    return float(pairs[torch.triu(torch.ones_like(pairs), 1).bool()].mean())


def draw(outcome: Outcome) -> Figure:
    """Alpha of every matrix, and losses of the three ways."""
    figure, (left, right) = panels(2)
    series = outcome.series
    for name, values in series.items():
        if name.startswith("alpha, "):
            left.plot(range(len(values)), values, marker="o", markersize=4, label=name.removeprefix("alpha, "))
    left.axhline(0, color="0.4", linestyle=":")
    left.set(title="Gates (above 0: chosen)", xlabel="matrix, from the first block on", ylabel="α")
    left.legend()
    ways = ("all", "chosen", "random")
    for place, way in enumerate(ways):
        values = series[f"unseen, {way}"]
        right.scatter([place] * len(values), values)
        right.hlines(statistics.fmean(values), place - 0.25, place + 0.25, color="0.3")
    right.set_xticks(range(len(ways)), ways)
    right.set(title="LoRA on these matrices", xlabel="matrices", ylabel="bits per byte of unseen prose")
    return figure
