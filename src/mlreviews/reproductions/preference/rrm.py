"""Does a reward model that also sees answers to other prompts stop rewarding an artefact of preferred answers?

Prompts and answers are vectors, and answers lie around the prompt's ideal one. The true reward is either a relation of
answer and prompt alone (how far the answer goes towards the ideal one), as the paper's causal model assumes, or the
negative distance to the ideal answer, a part of which, the answer's size, is the answer's own. In training, an artefact
of one bit goes with preferred answers, more or less reliably. Reward models are linear in the artefact, the answer, its
squares and its products with the prompt, so that they can express both rewards. They are trained on 100 comparisons,
alone (RM) or with the 14 new pairs an example (RRM), all of them or those that the RM gets wrong.

Then the artefact is the answer's length (its logarithm, in standard deviations), which is drawn on its own, but so that
the longer answer wins more than half of the comparisons. Which one do models prefer of two answers whose lengths say
nothing, and how long is the best of 64?
Quick: 16 problems. Full: 200 problems.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.rrm import rrm_augment, rrm_filter, rrm_loss, rrm_permutations
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2409.13156"
PAIRS, WIDTH, BUDGET = 100, 4, 64
SHARES = (0.5, 0.75, 1.0)
LONGER = (0.5, 0.6, 0.75, 0.9)  # comparisons that the longer answer wins; the claims are about 0.75
MODELS = ("RM", "RRM", "RRM, filtered")


def run(settings: Settings) -> Outcome:
    """Trains the three models for each strength of the artefact; the claims are about the strongest."""
    problems = 200 if settings.full else 16
    series: dict[str, list[float]] = {"share": list(SHARES)}
    found: dict[str, dict[str, Tensor]] = {}
    for share in settings.track(SHARES, "artefacts"):
        found = _compare(problems, share, True, settings.generator(int(100 * share)))
        for model in MODELS:
            for name in ("weight", "flipped"):
                series.setdefault(f"{model}: {name}", []).append(float(found[model][name].mean()))
    distance = _compare(problems, 1.0, False, settings.generator(1000))
    series["share, longer"] = list(LONGER)
    lengths = {}
    for share in settings.track(LONGER, "lengths"):
        lengths[share] = _compare(problems, share, True, settings.generator(2000 + int(100 * share)), lengths=True)
        for model in MODELS:
            for name in ("longer", "length of the best"):
                series.setdefault(f"{model}: {name}", []).append(float(lengths[share][model][name].mean()))
    long = lengths[0.75]

    def gain(name: str, model: str = "RRM", over: str = "RM") -> list[float]:
        return (found[model][name] - found[over][name]).tolist()

    claims = [
        measure(
            "RRM gives the artefact less weight than RM (in standard deviations of rewards of answers, difference)",
            f"{PAPER}, on artefacts",
            gain("weight"),
            at_most=0.0,
        ),
        measure(
            "Where the artefact goes with the worse answer, RRM is right more often than RM (accuracy, difference)",
            f"{PAPER}, on artefacts",
            gain("flipped"),
            at_least=0.0,
        ),
        measure(
            "Where no answer has the artefact, RRM is no less accurate than RM (accuracy, difference)",
            f"{PAPER}, RewardBench",
            gain("without"),
            at_least=-0.01,
        ),
        measure(
            "The best of 64 answers, half of them with the artefact, is truly better by RRM than by RM (difference)",
            f"{PAPER}, DPO policies",
            gain("best"),
            at_least=0.0,
        ),
        measure(
            "Most of the new pairs can be left out: the share that RM gets wrong by 0.2 and more",
            f"{PAPER}, on filtering",
            found["RRM, filtered"]["kept"].tolist(),
            at_most=0.5,
        ),
        measure(
            "... and with these alone accuracy where the artefact misleads is that of all (difference)",
            f"{PAPER}, on filtering",
            gain("flipped", "RRM, filtered", "RRM"),
            at_least=-0.02,
        ),
        measure(
            "Where part of the reward is the answer's own, RRM is no less accurate without artefacts (difference)",
            "ours: beyond the paper's causal model",
            (distance["RRM"]["without"] - distance["RM"]["without"]).tolist(),
            at_least=-0.01,
        ),
        measure(
            "... and its best of 64 answers is truly better than that of RM (difference)",
            "ours: beyond the paper's causal model",
            (distance["RRM"]["best"] - distance["RM"]["best"]).tolist(),
            at_least=0.0,
        ),
        measure(
            "Where the longer answer won three of four comparisons, RM prefers the longer of two whose lengths say "
            "nothing (share of pairs)",
            f"{PAPER}, introduction",
            long["RM"]["longer"].tolist(),
            at_least=0.55,
        ),
        measure(
            "... RRM less often (difference of shares)",
            f"{PAPER}, on artefacts",
            (long["RRM"]["longer"] - long["RM"]["longer"]).tolist(),
            at_most=0.0,
        ),
        measure(
            "... and hardly more often than not (share of pairs)",
            f"{PAPER}, on artefacts",
            long["RRM"]["longer"].tolist(),
            at_least=0.48,
            at_most=0.52,
        ),
        measure(
            "The best of 64 answers is shorter by RRM than by RM (logarithm of lengths, difference in standard "
            "deviations)",
            f"{PAPER}, length-controlled AlpacaEval",
            (long["RRM"]["length of the best"] - long["RM"]["length of the best"]).tolist(),
            at_most=0.0,
        ),
        measure(
            "... and truly better (reward, difference)",
            f"{PAPER}, length-controlled AlpacaEval",
            (long["RRM"]["best"] - long["RM"]["best"]).tolist(),
            at_least=0.0,
        ),
    ]
    return Outcome(claims, series)


def _features(x: Tensor, y: Tensor, artefact: Tensor) -> Tensor:
    """[problems, answers, features]; the artefact is the last one."""
    products = (x[..., None] * y[..., None, :]).flatten(-2)
    return torch.cat([products, y, y.square(), artefact[..., None]], -1)


def _compare(
    problems: int, share: float, relation: bool, generator: torch.Generator, *, lengths: bool = False
) -> dict[str, dict[str, Tensor]]:
    """What each model is measured by, [problems] each.

    Args:
        problems: how many.
        share: of preferred answers with the artefact; of comparisons that the longer answer wins.
        relation: whether the true reward is a relation of prompt and answer alone.
        generator: draws everything.
        lengths: the artefact is a length, not a bit.
    """
    ideal = torch.randn(problems, WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def draw(count: int, answers: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [problems, count, WIDTH], answers [answers, ...] around the ideal ones, and their true rewards."""
        x = torch.randn(problems, count, WIDTH, generator=generator)
        y = x @ ideal + 0.7 * torch.randn(answers, problems, count, WIDTH, generator=generator)
        return x, y, (y * (x @ ideal)).sum(-1) if relation else -(y - x @ ideal).square().sum(-1)

    def comparisons(count: int) -> tuple[Tensor, Tensor]:
        """Prompts, and pairs of answers [2, problems, count, WIDTH], the truly better one first."""
        x, y, truth = draw(count, 2)
        return x, torch.where((truth[0] > truth[1])[..., None], y, y.flip(0))

    x, y = comparisons(PAIRS)
    if lengths:
        longer = 2**0.5 * torch.special.ndtri(torch.tensor([share, 0.5]))
        has = torch.randn(2, problems, PAIRS, generator=generator) + longer[:, None, None]
    else:
        has = torch.rand(2, problems, PAIRS, generator=generator) < torch.tensor([share, 1 - share])[:, None, None]
    answers, artefact = torch.cat([y[0], y[1]], 1), torch.cat([has[0], has[1]], 1).float()
    own = torch.arange(PAIRS)
    new = rrm_augment(rrm_permutations(PAIRS, generator=generator))
    prompts, first, second = (
        torch.cat([own, new.prompts]),
        torch.cat([own, new.first]),
        torch.cat([own + PAIRS, new.second]),
    )
    target = torch.cat([torch.ones(PAIRS), new.target]).expand(problems, -1)
    sides = [_features(x[:, prompts], answers[:, side], artefact[:, side]) for side in (first, second)]
    difference = sides[0] - sides[1]

    original = (torch.arange(len(prompts)) < PAIRS).expand(problems, -1)
    base = _fit(difference, target, original)
    margin = (difference @ base[..., None])[..., 0].flatten()
    wrong = rrm_filter(margin, torch.zeros_like(margin), target.flatten()).view(problems, -1)
    kept = wrong[:, PAIRS:].float().mean(1)
    weights = {
        "RM": base,
        "RRM": _fit(difference, target, torch.ones_like(original)),
        "RRM, filtered": _fit(difference, target, original | wrong),
    }

    x, y = comparisons(500)
    none = torch.zeros(problems, 500)
    many, choices, truth = draw(20, BUDGET)
    marked = torch.arange(BUDGET)[:, None, None] % 2 * torch.ones(BUDGET, problems, 20)
    marks, misleading = torch.stack([none, none]), none + 1
    if lengths:
        marked = torch.randn(marked.shape, generator=generator)
        marks, misleading = torch.randn(marks.shape, generator=generator), none + 2
    found = {}
    for name, weight in weights.items():

        def reward(x: Tensor, y: Tensor, artefact: Tensor, weight: Tensor = weight) -> Tensor:
            return (_features(x, y, artefact) @ weight[..., None])[..., 0]

        plain = [reward(x, side, none) for side in y]
        flipped = reward(x, y[1], misleading)
        first, second = (reward(x, side, mark) for side, mark in zip(y, marks, strict=True))
        taken = torch.stack([reward(many, *pair) for pair in zip(choices, marked, strict=True)]).argmax(0)
        best, length = (every.gather(0, taken[None])[0].mean(1) for every in (truth, marked))
        found[name] = {
            "weight": weight[:, -1] / torch.stack(plain).std((0, 2)),
            "without": (plain[0] > plain[1]).float().mean(1),
            "flipped": (plain[0] > flipped).float().mean(1),
            "best": best,
            "length of the best": length,
            "longer": ((first > second) == (marks[0] > marks[1])).float().mean(1),
            "kept": kept,
        }
    return found


def _fit(difference: Tensor, target: Tensor, used: Tensor) -> Tensor:
    """Weights [problems, features] of a reward by logistic regression on the pairs that are used, a little shrunk."""
    weight = torch.zeros(difference.shape[0], difference.shape[2], requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=0.2)
    for _ in range(80):
        margin = (difference @ weight[..., None])[..., 0].flatten()
        losses = rrm_loss(margin, torch.zeros_like(margin), target.flatten()).losses.view_as(target)
        optimiser.zero_grad()
        ((losses * used).sum(1) / used.sum(1) + 0.005 * weight.square().sum(1)).sum().backward()
        optimiser.step()
    return weight.detach()


def draw(outcome: Outcome) -> Figure:
    """What an artefact and the length do to the models, against how reliable they were in training."""
    figure, axes = panels(2, rows=2)
    labels = {
        "weight": ("Weight of the artefact", "standard deviations of rewards"),
        "flipped": ("Artefact with the worse answer", "accuracy"),
    }
    labels |= {
        "longer": ("The longer of two answers", "share that is preferred"),
        "length of the best": ("The best of 64 answers", "log-length (standard deviations)"),
    }
    for i, (axis, (name, (title, label))) in enumerate(zip(axes, labels.items(), strict=True)):
        shares = outcome.series["share" if i < 2 else "share, longer"]
        for model in MODELS:
            axis.plot(shares, outcome.series[f"{model}: {name}"], marker="o", label=model)
        what = "preferred answers with the artefact" if i < 2 else "comparisons won by the longer answer"
        axis.set(title=title, xlabel=f"share of {what}", ylabel=label)
    axes[0].legend()
    return figure
