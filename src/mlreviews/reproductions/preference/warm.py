"""Does the mean of reward models' weights predict as well as they do, and learn fewer wrong labels by heart?

Networks with one hidden layer of 64 units, pretrained by regression on a related reward and fine-tuned on 200
comparisons, a quarter of which has the wrong label. Six members of a run come from one pretrained network and differ in
the order of the data and in dropout; for contrast, members whose networks were pretrained from starts of their own.
Quick: 16 runs. Full: 100 runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.preference.regularised_rm_ensembles import bt_reward_loss
from mlreviews.preference.warm import average_weights, lmc_curve
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2401.12187"
MEMBERS, HIDDEN, INPUTS, PAIRS, FLIPPED = 6, 64, 8, 200, 0.25
Network = dict[str, Tensor]


def run(settings: Settings) -> Outcome:
    """Fine-tunes members from one start and from several, and compares them with their averages."""
    runs = 100 if settings.full else 16
    generator = settings.generator()
    truth, related = (_network(runs, 1, 16, generator) for _ in range(2))
    # What pretraining has seen is near the truth, not the truth.
    related = {name: 0.7 * truth[name] + 0.7 * related[name] for name in truth}
    train = _pairs(truth, PAIRS, 1.0, generator)
    labels = torch.rand(runs, PAIRS, generator=generator) < FLIPPED
    tests = {"test": _pairs(truth, 500, 1.0, generator), "shifted": _pairs(truth, 500, 2.0, generator)}
    starts = _pretrain(related, _network(runs, MEMBERS, HIDDEN, generator), generator)
    from_one = {name: w[:, :1].expand_as(w).clone() for name, w in starts.items()}
    members = _fine_tune(from_one, train, labels, generator)
    strangers = _fine_tune(starts, train, labels, generator)

    def wrong_learnt(margin: Tensor) -> Tensor:
        """Share of the wrong labels that a model agrees with."""
        return ((margin < 0) & labels).sum(-1) / labels.sum(-1)

    average = _average(members)
    margins = {name: _margin(members, pair) for name, pair in tests.items()}
    clean = {name: (margin > 0).float().mean(-1) for name, margin in margins.items()}
    own = {name: (_margin(average, pair) > 0).float().mean(-1) for name, pair in tests.items()}
    fits = _margin(members, train)
    heart = torch.stack([wrong_learnt(fits[:, i]) for i in range(MEMBERS)])
    average_heart = wrong_learnt(_margin(average, train)[:, 0])
    ensemble_heart = wrong_learnt(fits.mean(1))
    ensemble = (margins["shifted"].mean(1) > 0).float().mean(-1)
    middle = {}
    for name, nets in (("one start", members), ("own starts", strangers)):
        two = {key: w[:, :2] for key, w in nets.items()}
        scores = [(_margin(net, tests["test"]) > 0).float().mean(-1) for net in (_average(two), two)]
        middle[name] = scores[0][:, 0] - scores[1].mean(1)
    claims = [
        measure(
            "Half-way between two members the accuracy is that of the members or better (difference)",
            f"{PAPER}, observation 1",
            middle["one start"].tolist(),
            at_least=-0.005,
        ),
        measure(
            "... and needs the common start: from starts of their own it is worse (difference)",
            f"{PAPER}, on the common start",
            middle["own starts"].tolist(),
            at_most=-0.005,
        ),
        measure(
            "The average of six is at least as accurate on clean comparisons as the mean member (difference)",
            f"{PAPER}, experiments",
            (own["test"][:, 0] - clean["test"].mean(1)).tolist(),
            at_least=0.0,
        ),
        measure(
            "The average has learnt fewer of the wrong labels than the mean member (share, difference)",
            f"{PAPER}, on corrupted labels",
            (average_heart - heart.mean(0)).tolist(),
            at_most=0.0,
        ),
        measure(
            "... and fewer than the ensemble of predictions (share, difference)",
            f"{PAPER}, observation 3",
            (average_heart - ensemble_heart).tolist(),
            at_most=0.0,
        ),
        measure(
            "Where answers are spread twice as wide the average is no worse than the ensemble (accuracy, difference)",
            f"{PAPER}, experiments",
            (own["shifted"][:, 0] - ensemble).tolist(),
            at_least=-0.005,
        ),
    ]
    series: dict[str, list[float]] = {}
    for name, nets in (("one start", members), ("own starts", strangers)):
        curve = lmc_curve(_member(nets, 0), _member(nets, 1), lambda net: _accuracy(net, tests["test"]))
        series["place"] = curve.places
        series[f"accuracy, {name}"] = curve.scores
    return Outcome(claims, series)


def _network(runs: int, members: int, hidden: int, generator: torch.Generator) -> Network:
    return {
        "inner": torch.randn(runs, members, INPUTS + 1, hidden, generator=generator) / INPUTS**0.5,
        "head": torch.randn(runs, members, hidden, 1, generator=generator) * (2 / hidden) ** 0.5,
    }


def _reward(net: Network, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Rewards [runs, members, answers] of answers [runs, 1 or members, answers, INPUTS]."""
    hidden = torch.relu(torch.cat([x, torch.ones_like(x[..., :1])], -1) @ net["inner"])
    return ((hidden if keep is None else hidden * keep) @ net["head"])[..., 0]


def _pairs(truth: Network, count: int, spread: float, generator: torch.Generator) -> Tensor:
    """Answers [2, runs, 1, count, INPUTS], the truly better one first."""
    runs = len(truth["head"])
    pair = spread * torch.randn(2, runs, 1, count, INPUTS, generator=generator)
    first = _reward(truth, pair[0]) > _reward(truth, pair[1])
    return torch.where(first[..., None], pair, pair.flip(0))


def _margin(net: Network, pair: Tensor) -> Tensor:
    """Reward of the better answer less that of the other, [runs, members, count]."""
    return _reward(net, pair[0]) - _reward(net, pair[1])


def _accuracy(net: Network, pair: Tensor) -> float:
    return float((_margin(net, pair) > 0).float().mean())


def _member(net: Network, index: int) -> Network:
    return {name: w[:, index : index + 1] for name, w in net.items()}


def _average(net: Network) -> Network:
    return average_weights([_member(net, i) for i in range(net["head"].shape[1])])


def _pretrain(target: Network, net: Network, generator: torch.Generator) -> Network:
    """Regression on a reward, each network on data of its own."""
    net = {name: w.clone().requires_grad_() for name, w in net.items()}
    optimiser = torch.optim.Adam(net.values(), lr=0.01)
    for _ in range(200):
        x = torch.randn(*net["head"].shape[:2], 64, INPUTS, generator=generator)
        optimiser.zero_grad()
        (_reward(net, x) - _reward(target, x)).square().mean(-1).sum().backward()
        optimiser.step()
    return {name: w.detach() for name, w in net.items()}


def _fine_tune(net: Network, pair: Tensor, flipped: Tensor, generator: torch.Generator) -> Network:
    """Bradley-Terry on comparisons, some of them the wrong way round; order and dropout are each member's own."""
    labelled = torch.where(flipped[:, None, :, None], pair.flip(0), pair)
    net = {name: w.clone().requires_grad_() for name, w in net.items()}
    runs, members = net["head"].shape[:2]
    optimiser = torch.optim.Adam(net.values(), lr=0.005)
    for _ in range(250):
        rows = torch.randint(PAIRS, (runs, members, 32, 1), generator=generator).expand(-1, -1, -1, INPUTS)
        keep = (torch.rand(runs, members, 1, HIDDEN, generator=generator) > 0.1) / 0.9
        good, bad = (_reward(net, side.expand(-1, members, -1, -1).gather(2, rows), keep) for side in labelled)
        optimiser.zero_grad()
        bt_reward_loss(good.flatten(), bad.flatten(), center=0.0).losses.sum().div(32).backward()
        optimiser.step()
    return {name: w.detach() for name, w in net.items()}


def draw(outcome: Outcome) -> Figure:
    """Accuracy on the line between two members."""
    figure, (axis,) = panels(1, width=6, height=3.8)
    series = outcome.series
    for index, name in enumerate(("one start", "own starts")):
        values = series[f"accuracy, {name}"]
        axis.plot(series["place"], values, marker="o", color=f"C{index}", label=f"members from {name}")
        axis.plot([0, 1], [values[0], values[-1]], color=f"C{index}", linestyle=":")
    axis.set(
        title="Between two members", xlabel="place on the line (dotted: chord)", ylabel="accuracy, clean comparisons"
    )
    axis.legend()
    return figure
