"""Does training on its own Jacobi iterations let a language model decode a memorised text in fewer of them?

A small model learns some files of Python by heart. Trajectories of Jacobi decoding are collected after their lines, and
the model is trained on with the consistency loss, on the whole (global) or to the next state (local), beside the usual
loss. The same number of updates with the usual loss alone shows what further training does by itself. Prompts are
those of the training and others of the same files.
Quick: 3 models of 2 layers of width 64, 300 updates and 150 more. Full: 5 models of 4 layers of width 128, 2,000
updates and 600 more.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.decoding.cllm import autoregressive_loss, cllm_loss, collect_jacobi_trajectory, consistency_loss
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews.reproductions.training import next_token_loss, training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2403.00835"
N = 16  # tokens of a block
TIME = 32  # of a prompt
WAYS = ("usual loss alone", "local", "global")


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment.

    Attributes:
        config: of the models.
        text: bytes that are learnt by heart.
        updates: of the first training.
        further: of the second one.
        prompts: whose trajectories are collected, and as many others.
        seeds: how many models.
    """

    config: TinyLMConfig
    text: int
    updates: int
    further: int
    prompts: int
    seeds: int


QUICK = Scale(TinyLMConfig(d_model=64, layers=2, heads=4), 1500, 300, 150, 64, 3)
FULL = Scale(TinyLMConfig(d_model=128, layers=4, heads=4), 6000, 2000, 600, 256, 5)


def run(settings: Settings) -> Outcome:
    """Trains models, and counts Jacobi iterations before and after."""
    scale = FULL if settings.full else QUICK
    rows = [_one(settings, scale, seed) for seed in settings.track(range(scale.seeds), "models")]
    found = {name: [row[name] for row in rows] for name in rows[0]}

    def saved(after: str, before: str = "before", what: str = "iterations") -> list[float]:
        return [a / b for a, b in zip(found[f"{what}, {before}"], found[f"{what}, {after}"], strict=True)]

    claims = [
        measure(
            "Consistency training lets a block be decoded in fewer iterations (before over after)",
            f"{PAPER}, table 1",
            saved("global"),
            at_least=2,
        ),
        measure(
            "... on prompts it hasn't been trained on, too",
            f"{PAPER}, table 1",
            saved("global", what="iterations on other prompts"),
            at_least=1.1,
        ),
        measure(
            "... and not for being trained longer (iterations after the usual loss alone over those after both)",
            "ours",
            saved("global", WAYS[0]),
            at_least=1.1,
        ),
        measure(
            "The global loss saves more than the local one (ratio of iterations)",
            f"{PAPER}, ablation study",
            saved("global", "local"),
            at_least=1,
        ),
        measure(
            "Greedy text stays what it was (share of tokens)",
            f"{PAPER}, table 1",
            found["same tokens, global"],
            at_least=0.95,
        ),
    ]
    return Outcome(claims, found)


def _one(settings: Settings, scale: Scale, seed: int) -> dict[str, float]:
    """Everything that is measured on one model."""
    generator = settings.generator(seed)
    split = python_source().train
    start = int(torch.randint(len(split.data) - scale.text, (), generator=generator))
    text = split.data[start : start + scale.text].long()
    text = torch.where(text == 0, 10, text).to(settings.device)  # no ends of documents inside
    model = TinyLM(scale.config, generator=generator).to(settings.device)

    def windows(count: int, length: int) -> Tensor:
        at = torch.randint(scale.text - length, (count, 1), generator=generator)
        return text[(at + torch.arange(length)).to(text.device)]

    for _ in training(
        model, lambda: next_token_loss(lambda ids: model(ids)[:2], windows(16, TIME + N)), scale.updates, 5e-3
    ):
        pass
    model.eval()
    seen, others = (windows(scale.prompts, TIME + N)[:, :TIME] for _ in range(2))
    trajectories, iterations = _trajectories(model, seen, generator)
    fixed = torch.stack([states[-1] for states in trajectories])
    rows = {
        "iterations, before": iterations,
        "iterations on other prompts, before": _trajectories(model, others, generator)[1],
        "bits a byte learnt by heart": _bits(model, text),
    }
    for way in WAYS:
        trained = copy.deepcopy(model)

        def loss(way: str = way, trained: TinyLM = trained) -> Tensor:
            index = torch.randint(scale.prompts, (16,), generator=generator).tolist()
            prompt, ends = seen[index], fixed[index]
            if way == WAYS[0]:
                return 10 * autoregressive_loss(trained, prompt, ends)
            steps = [int(torch.randint(max(len(trajectories[i]) - 1, 1), (), generator=generator)) for i in index]
            state = torch.stack([trajectories[i][j] for i, j in zip(index, steps, strict=True)])
            if way == "global":
                return cllm_loss(trained, prompt, state, ends)
            after = torch.stack(
                [trajectories[i][min(j + 1, len(trajectories[i]) - 1)] for i, j in zip(index, steps, strict=True)]
            )
            return consistency_loss(trained, prompt, state, after) + 10 * autoregressive_loss(trained, prompt, ends)

        for _ in training(trained, loss, scale.further, 1e-3):
            pass
        again, rows[f"iterations, {way}"] = _trajectories(trained, seen, generator)
        rows[f"iterations on other prompts, {way}"] = _trajectories(trained, others, generator)[1]
        same = torch.stack([states[-1] for states in again]) == fixed
        rows[f"same tokens, {way}"] = float(same.double().mean())
    return rows


def _trajectories(model: TinyLM, prompts: Tensor, generator: torch.Generator) -> tuple[list[Tensor], float]:
    """The trajectory of each prompt until it stands still, [states, n] each, and the mean number of iterations."""
    states = collect_jacobi_trajectory(model, prompts, N, generator=generator)
    found = []
    for row in states.unbind(1):
        changes = (row[1:] != row[:-1]).any(1).nonzero()[:, 0]
        found.append(row[: int(changes[-1]) + 2 if len(changes) else 1])
    return found, sum(len(row) - 1 for row in found) / len(found)


@torch.no_grad()
def _bits(model: TinyLM, text: Tensor) -> float:
    window = text[None, : 8 * (TIME + N)].reshape(8, -1)
    return float(next_token_loss(lambda ids: model(ids)[:2], window)) / torch.log(torch.tensor(2.0)).item()


def draw(outcome: Outcome) -> Figure:
    """Iterations of a block before and after, and how much of the text stays."""
    figure, (iterations, same) = panels(2)
    series = outcome.series
    names = ("before", *WAYS)
    labels = ("before", *(f"after: {way}" for way in WAYS))
    places = torch.arange(len(names), dtype=torch.float64)
    for offset, prefix, label in (
        (-0.2, "iterations", "prompts of the training"),
        (0.2, "iterations on other prompts", "other prompts"),
    ):
        means = [sum(series[f"{prefix}, {name}"]) / len(series[f"{prefix}, {name}"]) for name in names]
        iterations.barh(places + offset, means, height=0.36, label=label)
    iterations.axvline(N, color="black", linestyle=":", label="one token a step")
    iterations.set(title=f"Iterations of a block of {N}", xlabel="iterations", xlim=(0, N + 1))
    iterations.set_yticks(places.tolist(), labels)
    iterations.invert_yaxis()
    iterations.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, fontsize=8)
    shares = [sum(series[f"same tokens, {way}"]) / len(series[f"same tokens, {way}"]) for way in WAYS]
    same.barh(labels[1:], shares, color="C2")
    same.set(title="Greedy text that stays", xlabel="share of tokens", xlim=(0, 1))
    same.invert_yaxis()
    for axis in (iterations, same):
        axis.grid(axis="y", visible=False)
    return figure
