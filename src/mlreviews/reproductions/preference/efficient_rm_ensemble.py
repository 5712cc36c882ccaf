"""Do members that share a backbone, apart from heads or LoRA matrices, keep as much of the true reward as whole models?

Prompts and answers are vectors. The true reward prefers one direction for each prompt and punishes size. Backbones have
two hidden layers of 48 units, are pretrained by regression on a related reward, and fine-tuned on 100 noisy comparisons
as one reward model, as five heads on one backbone, as five LoRA members of rank 4, or as five whole models. Members
see the same batches. Answers to choose from are spread wider than those of the training data.
Quick: 12 problems. Full: 100 problems.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.common.layers import linear
from mlreviews.preference.efficient_rm_ensemble import LinearRewardEnsemble, LoRARewardEnsemble
from mlreviews.preference.regularised_rm_ensembles import bt_reward_loss, mean_reward, min_reward
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2401.16635"
MEMBERS, HIDDEN, PAIRS, PROMPT, ANSWER = 5, 48, 100, 3, 5
BUDGETS = (4, 16, 64, 256)
KINDS = ("one model", "linear heads", "LoRA members", "whole models")


def run(settings: Settings) -> Outcome:
    """Trains the four kinds of reward models on each problem, and takes the best of n by each."""
    problems = 100 if settings.full else 12
    left: dict[str, list[list[float]]] = {}
    spread: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for problem in settings.track(range(problems), "problems"):
        truth, learnt = _problem(settings.generator(problem))
        for kind, rewards in learnt.items():
            spread[kind].append(float(rewards.var(0, unbiased=False).mean().sqrt() / rewards.mean(0).std()))
            for name, choose in (("mean", mean_reward), ("minimum", min_reward)):
                shares = [_share(truth, choose(rewards), n) for n in BUDGETS]
                left.setdefault(f"{kind}: {name}", []).append(shares)
    final = {name: [shares[-1] for shares in rows] for name, rows in left.items()}

    def gain(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(final[one], final[other], strict=True)]

    claims = [
        measure(
            "The best of 256 by the mean of linear heads keeps more of the true reward than by one model (difference)",
            f"{PAPER}, best-of-n",
            gain("linear heads: mean", "one model: mean"),
            at_least=0.0,
        ),
        measure(
            "... and so does that by the mean of LoRA members (difference)",
            f"{PAPER}, best-of-n",
            gain("LoRA members: mean", "one model: mean"),
            at_least=0.0,
        ),
        measure(
            "LoRA members do better than linear heads (difference)",
            f"{PAPER}, best-of-n",
            gain("LoRA members: mean", "linear heads: mean"),
            at_least=0.0,
        ),
        measure(
            "LoRA members come close to whole models (difference)",
            f"{PAPER}, best-of-n",
            gain("LoRA members: mean", "whole models: mean"),
            at_least=-0.05,
        ),
        measure(
            "LoRA members differ more than linear heads do (standard deviation over members, share of the rewards')",
            "ours: why members need more than a head",
            [a - b for a, b in zip(spread["LoRA members"], spread["linear heads"], strict=True)],
            at_least=0.0,
        ),
        measure(
            "The minimum of LoRA members is no worse than their mean (difference)",
            "review of 2024-06-25",
            gain("LoRA members: minimum", "LoRA members: mean"),
            at_least=-0.02,
        ),
    ]
    series = {name: torch.tensor(rows).mean(0).tolist() for name, rows in left.items()}
    return Outcome(claims, {"n": [float(n) for n in BUDGETS]} | series)


def _problem(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """True rewards [8, 256] of answers, and those of the members by kind [members, 8, 256]."""
    turn = torch.randn(PROMPT, ANSWER, generator=generator)
    related = 0.7 * turn + 0.7 * torch.randn(PROMPT, ANSWER, generator=generator)

    def draw(*shape: int, spread: float = 1.0) -> Tensor:
        """Prompts and answers in one vector each."""
        x = torch.randn(*shape, PROMPT, generator=generator)
        return torch.cat([x, spread * torch.randn(*shape, ANSWER, generator=generator)], -1)

    def reward(z: Tensor, turn: Tensor) -> Tensor:
        x, y = z.split([PROMPT, ANSWER], -1)
        return ((x @ turn).tanh() * y).sum(-1) - 0.3 * y.square().sum(-1)

    backbone = nn.Sequential(
        linear(PROMPT + ANSWER, HIDDEN, generator=generator),
        nn.ReLU(),
        linear(HIDDEN, HIDDEN, generator=generator),
        nn.ReLU(),
    )
    start = LinearRewardEnsemble(backbone, HIDDEN, 1, generator=generator)
    _train(start, 100, lambda: _error(start, z := draw(64), reward(z, related)))

    first, second = draw(PAIRS), draw(PAIRS)
    second[:, :PROMPT] = first[:, :PROMPT]
    margin = reward(first, turn) - reward(second, turn)
    better = (torch.rand(PAIRS, generator=generator) < margin.sigmoid())[:, None]
    chosen, rejected = torch.where(better, first, second), torch.where(better, second, first)
    tests = draw(8, BUDGETS[-1], spread=1.5)
    tests[..., :PROMPT] = tests[:, :1, :PROMPT]

    models: dict[str, nn.Module] = {
        "one model": LinearRewardEnsemble(copy.deepcopy(backbone), HIDDEN, 1, generator=generator),
        "linear heads": LinearRewardEnsemble(copy.deepcopy(backbone), HIDDEN, MEMBERS, generator=generator),
        "LoRA members": LoRARewardEnsemble(
            copy.deepcopy(backbone), HIDDEN, ["0", "2"], MEMBERS, rank=4, alpha=8.0, generator=generator
        ),
        "whole models": _Whole(
            [LinearRewardEnsemble(copy.deepcopy(backbone), HIDDEN, 1, generator=generator) for _ in range(MEMBERS)]
        ),
    }
    learnt = {}
    for kind, model in models.items():

        def loss(model: nn.Module = model) -> Tensor:
            rows = torch.randint(PAIRS, (32,), generator=generator)
            rewards = model(torch.cat([chosen[rows], rejected[rows]]))
            return bt_reward_loss(rewards[:, :32].flatten(), rewards[:, 32:].flatten()).losses.sum() / 32

        _train(model, 80, loss)
        with torch.no_grad():
            learnt[kind] = model(tests.flatten(0, 1)).view(-1, *tests.shape[:2])
    return reward(tests, turn), learnt


class _Whole(nn.Module):
    """Models that share nothing."""

    def __init__(self, models: list[LinearRewardEnsemble]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([model(x) for model in self.models])


def _error(model: nn.Module, z: Tensor, target: Tensor) -> Tensor:
    error: Tensor = (model(z) - target).square().mean()
    return error


def _train(model: nn.Module, steps: int, loss: Callable[[], Tensor]) -> None:
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.005)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def _share(truth: Tensor, reward: Tensor, n: int) -> float:
    """True reward of what a reward takes from the first n answers: 0 for a random one, 1 for the best."""
    truth, reward = truth[:, :n], reward[:, :n]
    taken, middle = truth.gather(1, reward.argmax(1, keepdim=True)).mean(), truth.mean()
    return float((taken - middle) / (truth.amax(1).mean() - middle))


def draw(outcome: Outcome) -> Figure:
    """What is left of the true reward, against the number of answers."""
    figure, axes = panels(2)
    for axis, name in zip(axes, ("mean", "minimum"), strict=True):
        for kind in KINDS:
            axis.semilogx(outcome.series["n"], outcome.series[f"{kind}: {name}"], base=2, marker="o", label=kind)
        axis.set(
            title=f"By the members' {name}", xlabel="answers to choose from", ylabel="true reward (1: best answer)"
        )
    axes[0].legend()
    return figure
