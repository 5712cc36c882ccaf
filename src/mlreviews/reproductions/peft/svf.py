"""Is scaling singular values enough to fine-tune, by examples and by reinforcement learning, and do experts mix?

A byte-level model of Python source learns prose by SVF and by LoRA. A classifier of digits, shown them upside down, is
adapted by REINFORCE on the scales alone, to two tasks; for digits of both kinds, the cross-entropy method mixes the
experts. Quick: 3 seeds, 40 seconds. Full: a larger model, 5 seeds, an hour.
"""

from __future__ import annotations

import copy
import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.common.layers import linear
from mlreviews.datasets import digits
from mlreviews.peft import LoRASettings, inject, inject_lora, trainable_parameters
from mlreviews.peft.svf import SVFLinear, cem_search, compose_experts, expert, load_expert, svf_policy_loss
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.finetuning import MATRICES, fine_tuning
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2501.06252"
RANK = 16  # of the paper's LoRA


def run(settings: Settings) -> Outcome:
    """Measures losses and trained parameters, rewards while REINFORCE runs, and accuracies of mixed experts."""
    task = fine_tuning(settings)
    start = task.prose(task.model())
    saved: dict[str, list[float]] = {"SVF": [], "LoRA": []}
    counts: dict[str, int] = {}
    for seed in settings.track(range(task.seeds), "seeds, prose"):
        for way in saved:
            model = task.model()
            if way == "SVF":
                inject(model, MATRICES, lambda path, base: SVFLinear(base))
            else:
                inject_lora(model, MATRICES, LoRASettings(RANK, 2.0 * RANK), generator=settings.generator(seed))
            counts[way] = sum(p.numel() for p in trainable_parameters(model).values())
            task.train(model, 3e-2 if way == "SVF" else 3e-3, settings.generator(200 + seed))
            saved[way].append(start - task.prose(model))
    gains, mixes, singles, curves = [], [], [], []
    for seed in settings.track(range(task.seeds + 2), "seeds, digits"):
        before, after, curve, mixed, single = _digits(settings, seed)
        gains.append(after - before)
        curves.append(curve)
        mixes.append(mixed)
        singles.append(single)
    claims = [
        measure(
            "SVF trains less than 10 % of the parameters of LoRA of rank 16",
            f"{PAPER}, table 4",
            counts["SVF"] / counts["LoRA"],
            at_most=0.1,
        ),
        measure(
            "SVF does better than LoRA all the same (saved on unseen prose, SVF minus LoRA)",
            f"{PAPER}, table 1",
            [a - b for a, b in zip(saved["SVF"], saved["LoRA"], strict=True)],
            at_least=0.0,
            unit="bits per byte",
        ),
        measure(
            "SVF learns by example (saved on unseen prose)", PAPER, saved["SVF"], at_least=0.0, unit="bits per byte"
        ),
        measure(
            "REINFORCE on the scales alone adapts a classifier to digits upside down (rise of test accuracy)",
            f"{PAPER}, section 3",
            gains,
            at_least=0.0,
        ),
        measure(
            "Experts mixed by the cross-entropy method beat the better one on a mixed task (difference of accuracies)",
            f"{PAPER}, table 2",
            [a - b for a, b in zip(mixes, singles, strict=True)],
            at_least=0.0,
        ),
    ]
    series = {f"saved, {way}": values for way, values in saved.items()}
    series |= {"trained numbers": [float(n) for n in counts.values()]}
    series |= {"reward": [statistics.fmean(v) for v in zip(*curves, strict=True)], "mixed": mixes, "better": singles}
    return Outcome(claims, series)


def _digits(settings: Settings, seed: int) -> tuple[float, float, list[float], float, float]:
    """Accuracy on turned digits before and after REINFORCE, rewards, and accuracies on a mixed task."""
    generator = settings.generator(1000 + seed)
    data = digits()
    order = torch.randperm(len(data), generator=generator)
    images, labels = (data.features[order] / 8 - 1).float(), data.targets[order]
    train, test = slice(0, 1200), slice(1200, None)
    net = nn.Sequential(linear(64, 128, generator=generator), nn.ReLU(), linear(128, 10, generator=generator))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(80):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images[train]), labels[train]).backward()
        optimiser.step()
    turned = images.flip(1)
    mirrored = images.view(-1, 8, 8).flip(2).flatten(1)
    reference = copy.deepcopy(net).requires_grad_(False)
    inject(net, ["0", "2"], lambda path, base: SVFLinear(base))
    before = _accuracy(net, turned[test], labels[test])
    experts, curve, after = [], [], 0.0
    for kind in (turned, mirrored):
        load_expert(net, {path: torch.ones_like(z) for path, z in expert(net).items()})
        curve = _reinforce(net, reference, kind[train], labels[train], generator)
        experts.append(expert(net))
        if kind is turned:
            first, after = curve, _accuracy(net, turned[test], labels[test])
    few, rows = torch.cat([turned[:60], mirrored[60:120]]), labels[:120]
    both = torch.cat([turned[test], mirrored[test]]), torch.cat([labels[test]] * 2)

    def score(alpha: Tensor) -> float:
        load_expert(net, compose_experts(experts, alpha))
        return _accuracy(net, few, rows)

    alpha = cem_search(score, 2, iterations=8, generator=generator)
    found = []
    for weights in (alpha, *torch.eye(2)):
        load_expert(net, compose_experts(experts, weights))
        found.append(_accuracy(net, *both))
    return before, after, first, found[0], max(found[1:])


def _reinforce(
    net: nn.Module, reference: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> list[float]:
    optimiser = torch.optim.Adam(trainable_parameters(net).values(), 5e-2)
    mask, rewards = torch.ones(256, 1).bool(), []
    for _ in range(200):
        rows = torch.randint(len(images), (256,), generator=generator)
        logits, base = net(images[rows]), reference(images[rows])
        answers = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        reward = torch.where(answers[:, 0] == labels[rows], 1.0, -1.0)
        rewards.append(float(reward.mean()))
        optimiser.zero_grad()
        svf_policy_loss(logits[:, None], base[:, None], answers, reward, mask, 0.0).backward()
        optimiser.step()
    return rewards


@torch.no_grad()
def _accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((net(images).argmax(1) == labels).float().mean())


def draw(outcome: Outcome) -> Figure:
    """What fine-tuning saves, and the reward while REINFORCE runs."""
    figure, (left, right) = panels(2)
    series = outcome.series
    numbers = dict(zip(("SVF", "LoRA"), series["trained numbers"], strict=True))
    names = [f"{way}\n{numbers[way]:,.0f} numbers" for way in numbers]
    bars = left.bar(names, [statistics.fmean(series[f"saved, {way}"]) for way in numbers], width=0.5)
    left.bar_label(bars, fmt="%.3f")
    left.set(title="Fine-tuning on prose", ylabel="saved, bits per byte")
    right.plot(range(1, len(series["reward"]) + 1), series["reward"])
    right.set(title="REINFORCE: digits upside down", xlabel="updates", ylabel="mean reward, -1 to 1")
    return figure
