"""Do members that share a backbone, apart from heads or LoRA matrices, keep as much of the true reward as whole models?

Prompts and answers are vectors. The true reward prefers one direction for each prompt and punishes size. Backbones have
two hidden layers of 48 units, are pretrained by regression on a related reward, and fine-tuned on 100 noisy comparisons
as one reward model, as five heads on one backbone, as five LoRA members of rank 4, or as five whole models. Members
see the same batches. Answers to choose from are spread wider than those of the training data.
Quick: 24 problems. Full: 100 problems.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
    problems = 100 if settings.full else 24
    left: dict[str, Tensor] = {}
    spread: dict[str, Tensor] = {}
    truth, learnt = _train_all(problems, settings)
    for kind, rewards in learnt.items():
        spread[kind] = rewards.var(0, unbiased=False).mean((1, 2)).sqrt() / rewards.mean(0).flatten(1).std(1)
        for name, choose in (("mean", mean_reward), ("minimum", min_reward)):
            left[f"{kind}: {name}"] = torch.stack([_share(truth, choose(rewards), n) for n in BUDGETS])

    def gain(one: str, other: str) -> list[float]:
        return (left[one][-1] - left[other][-1]).tolist()

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
            (spread["LoRA members"] - spread["linear heads"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "The minimum of LoRA members is no worse than their mean (difference)",
            "review of 2024-06-25",
            gain("LoRA members: minimum", "LoRA members: mean"),
            at_least=-0.02,
        ),
    ]
    series = {name: value.mean(1).tolist() for name, value in left.items()}
    return Outcome(claims, {"n": [float(n) for n in BUDGETS]} | series)


def _train_all(problems: int, settings: Settings) -> tuple[Tensor, dict[str, Tensor]]:
    """True rewards [problems, 8, 256] of answers, and those of the members by kind [members, problems, 8, 256]."""
    generator = settings.generator()
    turn, other = torch.randn(2, problems, PROMPT, ANSWER, generator=generator)
    related = 0.7 * turn + 0.7 * other

    def draw(count: int, spread: float = 1.0) -> Tensor:
        """Prompts and answers in one vector each."""
        x = torch.randn(problems, count, PROMPT, generator=generator)
        return torch.cat([x, spread * torch.randn(problems, count, ANSWER, generator=generator)], -1)

    def reward(z: Tensor, turn: Tensor) -> Tensor:
        x, y = z.split([PROMPT, ANSWER], -1)
        return ((x @ turn).tanh() * y).sum(-1) - 0.3 * y.square().sum(-1)

    def pretraining(call: Callable[[Tensor], Tensor]) -> Tensor:
        z = draw(64)
        return (call(z)[:, 0] - reward(z, related)).square().sum() / 64

    starts = [_linear(_backbone(generator), 1, generator) for _ in range(problems)]
    _train(starts, 100, pretraining)
    backbones = [start.backbone for start in starts]

    first, second = draw(PAIRS), draw(PAIRS)
    second[..., :PROMPT] = first[..., :PROMPT]
    margin = reward(first, turn) - reward(second, turn)
    better = (torch.rand(problems, PAIRS, generator=generator) < margin.sigmoid())[..., None]
    chosen, rejected = torch.where(better, first, second), torch.where(better, second, first)
    tests = draw(8 * BUDGETS[-1], spread=1.5).unflatten(1, (8, -1))
    tests[..., :PROMPT] = tests[:, :, :1, :PROMPT].clone()

    def fine_tuning(call: Callable[[Tensor], Tensor]) -> Tensor:
        rows = torch.randint(PAIRS, (32,), generator=generator)
        rewards = call(torch.cat([chosen[:, rows], rejected[:, rows]], 1))
        return bt_reward_loss(rewards[..., :32].flatten(), rewards[..., 32:].flatten()).losses.sum() / 32

    makes: dict[str, Callable[[nn.Module], nn.Module]] = {
        "one model": lambda backbone: _linear(backbone, 1, generator),
        "linear heads": lambda backbone: _linear(backbone, MEMBERS, generator),
        "LoRA members": lambda backbone: LoRARewardEnsemble(
            copy.deepcopy(backbone), HIDDEN, ["0", "2"], MEMBERS, rank=4, alpha=8.0, generator=generator
        ),
        "whole models": lambda backbone: _Whole([_linear(backbone, 1, generator) for _ in range(MEMBERS)]),
    }
    learnt = {}
    for kind in settings.track(KINDS, "kinds of ensembles"):
        models = [makes[kind](backbone) for backbone in backbones]
        _train(models, 80, fine_tuning)
        with torch.no_grad():
            rewards = [model(z.flatten(0, 1)).unflatten(1, (8, -1)) for model, z in zip(models, tests, strict=True)]
        learnt[kind] = torch.stack(rewards, 1)
    return reward(tests.flatten(1, 2), turn).unflatten(1, (8, -1)), learnt


def _backbone(generator: torch.Generator) -> nn.Module:
    inner = linear(PROMPT + ANSWER, HIDDEN, generator=generator)
    return nn.Sequential(inner, nn.ReLU(), linear(HIDDEN, HIDDEN, generator=generator), nn.ReLU())


def _linear(backbone: nn.Module, members: int, generator: torch.Generator) -> LinearRewardEnsemble:
    return LinearRewardEnsemble(copy.deepcopy(backbone), HIDDEN, members, generator=generator)


class _Whole(nn.Module):
    """Models that share nothing."""

    def __init__(self, models: list[LinearRewardEnsemble]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([model(x) for model in self.models])


def _train(models: Sequence[nn.Module], steps: int, loss: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> None:
    """Trains one model a problem, all at once; the loss gets the function from inputs to rewards, problems first."""
    parameters, _ = torch.func.stack_module_state(list(models))
    call = torch.vmap(lambda p, z: torch.func.functional_call(models[0], p, (z,)))
    optimiser = torch.optim.Adam([p for p in parameters.values() if p.requires_grad], lr=0.005)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(lambda z: call(parameters, z)).backward()
        optimiser.step()
    with torch.no_grad():
        for i, model in enumerate(models):
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters[name][i])


def _share(truth: Tensor, reward: Tensor, n: int) -> Tensor:
    """True reward of what a reward takes from the first n answers, [problems]: 0 for a random one, 1 for the best."""
    truth, reward = truth[..., :n], reward[..., :n]
    taken = truth.gather(-1, reward.argmax(-1, keepdim=True))[..., 0].mean(1)
    middle = truth.mean((1, 2))
    return (taken - middle) / (truth.amax(-1).mean(1) - middle)


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
