"""How much of the true reward is left when the best of n answers is taken by a learnt one, or by an ensemble?

Prompts and answers are vectors. The true reward prefers one direction for each prompt and punishes size. Reward models
are linear in 48 random ReLU features and trained on 100 noisy comparisons. Members of a pretrained ensemble have
features of their own; those of a fine-tuned one share them, and differ in the first weights and the order of the data.
Answers to choose from are spread wider than those of the training data.
Quick: 32 problems. Full: 200 problems.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.regularised_rm_ensembles import (
    bt_reward_loss,
    mean_minus_std_reward,
    mean_reward,
    min_reward,
)
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2312.09244"
MEMBERS, FEATURES, PAIRS, PROMPT, ANSWER = 5, 48, 100, 3, 5
BUDGETS = (4, 16, 64, 256)
CHOICES = {"one model": lambda r: r[0], "mean": mean_reward, "minimum": min_reward, "mean - std": mean_minus_std_reward}


def run(settings: Settings) -> Outcome:
    """Trains both kinds of ensembles with and without centred rewards, and takes the best of n by each."""
    problems = 200 if settings.full else 32
    left: dict[tuple[str, str], Tensor] = {}
    offsets: dict[float, Tensor] = {}
    series: dict[str, list[float]] = {"n": [float(n) for n in BUDGETS]}
    for kind in settings.track(("pretrained", "fine-tuned", "pretrained, not centred"), "ensembles"):
        generator = settings.generator()
        center = 0.0 if "not" in kind else 0.01
        truth, learnt = _ensemble(problems, kind == "fine-tuned", center, generator)
        if kind != "fine-tuned":
            levels = learnt.mean(-1)  # [members, problems, prompts]: of a prompt, by each member
            offsets[center] = (levels - levels.mean(-1, keepdim=True)).var(0).mean(-1)
        for name, choose in CHOICES.items():
            left[kind, name] = torch.stack([_share(truth, choose(learnt), n) for n in BUDGETS])
            if kind != "pretrained, not centred":
                series[f"{kind}: {name}"] = left[kind, name].mean(1).tolist()
    final = {key: value[-1] for key, value in left.items()}
    one = final["pretrained", "one model"]
    claims = [
        measure(
            "Centring brings the members' levels of a prompt together (variance over members, with / without)",
            f"{PAPER}, on underspecification",
            (offsets[0.01] / offsets[0.0]).tolist(),
            at_most=1.0,
        ),
        measure(
            "At n = 256 the mean of five pretrained members keeps more of the true reward than one model (difference)",
            f"{PAPER}, experiments",
            (final["pretrained", "mean"] - one).tolist(),
            at_least=0.0,
        ),
        measure(
            "... and so does their minimum (difference)",
            f"{PAPER}, experiments",
            (final["pretrained", "minimum"] - one).tolist(),
            at_least=0.0,
        ),
        measure(
            "Members that differ in pretraining help more than members that differ in fine-tuning (mean, difference)",
            f"{PAPER}, experiments",
            (final["pretrained", "mean"] - final["fine-tuned", "mean"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "The minimum needs rewards on one scale (centred minus not centred, difference)",
            "review of 2024-06-18",
            (final["pretrained", "minimum"] - final["pretrained, not centred", "minimum"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "Hacking is not eliminated (share of the true reward that the mean of the ensemble misses at n = 256)",
            f"{PAPER}, on what remains",
            (1 - final["pretrained", "mean"]).tolist(),
            at_least=0.1,
        ),
    ]
    return Outcome(claims, series)


def _ensemble(problems: int, shared: bool, center: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """True rewards [problems, prompts, 256] of answers, and the members' [members, problems, prompts, 256]."""
    turn = torch.randn(problems, PROMPT, ANSWER, generator=generator)

    def truth(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ turn).tanh() * y).sum(-1) - 0.3 * y.square().sum(-1)

    x = torch.randn(problems, PAIRS, PROMPT, generator=generator)
    pair = [torch.randn(problems, PAIRS, ANSWER, generator=generator) for _ in range(2)]
    first = torch.rand(problems, PAIRS, generator=generator) < (truth(x, pair[0]) - truth(x, pair[1])).sigmoid()
    chosen = torch.where(first[..., None], pair[0], pair[1])
    rejected = torch.where(first[..., None], pair[1], pair[0])
    prompts = torch.randn(problems, 8, 1, PROMPT, generator=generator).expand(-1, -1, BUDGETS[-1], -1)
    answers = 1.5 * torch.randn(problems, 8, BUDGETS[-1], ANSWER, generator=generator)
    test = truth(prompts.flatten(1, 2), answers.flatten(1, 2)).view(problems, 8, -1)

    size = (MEMBERS, problems, PROMPT + ANSWER + 1, FEATURES)
    inner = torch.randn(*size, generator=generator) / 3
    inner = inner[:1].expand(size) if shared else inner

    def features(x: Tensor, y: Tensor) -> Tensor:
        flat = torch.cat([x, y, torch.ones_like(x[..., :1])], -1)
        return torch.relu(flat @ inner) / FEATURES**0.5

    good, bad = features(x, chosen), features(x, rejected)
    head = torch.randn(MEMBERS, problems, FEATURES, 1, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([head], lr=0.05)
    for _ in range(150):
        rows = torch.randint(PAIRS, (MEMBERS, problems, 32, 1), generator=generator).expand(-1, -1, -1, FEATURES)
        rewards = [(f.gather(2, rows) @ head).flatten() for f in (good, bad)]
        optimiser.zero_grad()
        bt_reward_loss(rewards[0], rewards[1], center=center).losses.sum().div(32).backward()
        optimiser.step()
    learnt = features(prompts.flatten(1, 2), answers.flatten(1, 2)) @ head.detach()
    return test, learnt.view(MEMBERS, *test.shape)


def _share(truth: Tensor, reward: Tensor, n: int) -> Tensor:
    """True reward of what a reward takes from the first n answers, [problems]: 0 for a random one, 1 for the best."""
    truth, reward = truth[..., :n], reward[..., :n]
    taken = truth.gather(-1, reward.argmax(-1, keepdim=True))[..., 0].mean(1)
    middle = truth.mean((1, 2))
    return (taken - middle) / (truth.amax(-1).mean(1) - middle)


def draw(outcome: Outcome) -> Figure:
    """What is left of the true reward, against the number of answers."""
    figure, axes = panels(2)
    for axis, kind in zip(axes, ("pretrained", "fine-tuned"), strict=True):
        for name in CHOICES:
            axis.semilogx(outcome.series["n"], outcome.series[f"{kind}: {name}"], base=2, marker="o", label=name)
        axis.set(title=f"Members {kind} apart", xlabel="answers to choose from", ylabel="true reward (1: best answer)")
    axes[0].legend()
    return figure
