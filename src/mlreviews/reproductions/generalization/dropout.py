"""Does dropout help a wide network on few examples, at what price, and is its test rule as good as averaging?

A network 64-256-256-10 learns handwritten digits from 50 and 200 examples, with and without dropout on both hidden
layers: 400 updates on batches of 50; the two start from the same weights and see the same batches. The equivalence with
ridge regression is measured on the diabetes data.
Quick: 6 seeds, about a minute and a half. Full: also 600 examples, 512 units a layer, 1,200 updates, 10 seeds, about a
quarter of an hour on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.datasets import diabetes, digits
from mlreviews.generalization.dropout import Dropout, dropout, marginal_dropout_solve, mc_dropout_predict
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:1207.0580"
JMLR = "Srivastava et al. 2014"
ALEXNET = "Krizhevsky et al. 2012"
REVIEW = "review of 2023-06-18"
RATES = (0.0, 0.5)
CONVERGED = 0.1  # cross-entropy in nats
MASKS = 50
BATCH = 50
TESTS = 20  # in the course of a training


@dataclass
class _Run:
    """One trained network and what was measured on the way."""

    model: nn.Sequential
    train_loss: list[float]  # after each epoch, without masks
    masked_loss: list[float]  # mean over each epoch, as trained
    test_loss: list[float]  # at each of the tests
    test_accuracy: list[float]

    @property
    def gap(self) -> float:
        """Test loss less training loss, in the end."""
        return self.test_loss[-1] - self.train_loss[-1]


def run(settings: Settings) -> Outcome:
    """Trains pairs of networks, with and without dropout, and compares them seed by seed."""
    sizes, hidden, seeds = ((50, 200, 600), 512, 10) if settings.full else ((50, 200), 256, 6)
    updates, tested = (1200 if settings.full else 400), 1000
    pairs: dict[int, list[tuple[_Run, _Run]]] = {n: [] for n in sizes}
    damage, averaging = [], []
    for seed in settings.track(range(seeds), "seeds"):
        generator = settings.generator(seed)
        data = digits()
        x, labels = (data.features / 16).float(), data.targets
        order = torch.randperm(len(x), generator=generator)
        x, labels = x[order].to(settings.device), labels[order].to(settings.device)
        x_test, labels_test = x[-tested:], labels[-tested:]
        for n in sizes:
            start = int(torch.randint(2**62, (), generator=generator))
            plain, dropped = (
                _train(x[:n], labels[:n], x_test, labels_test, hidden, updates, rate, start) for rate in RATES
            )
            pairs[n].append((plain, dropped))
        damage.append([_accuracy_lost(pair.model, x_test, labels_test) for pair in (plain, dropped)])
        averaging.append(_averaged_accuracy(dropped.model, x_test, labels_test))
    copies, errors = _ridge_errors(settings, seeds)
    largest = max(sizes)
    claims = [claim for n in sizes for claim in _size_claims(n, pairs[n])]
    claims += _convergence_claims(largest, pairs[largest])
    claims += _ensemble_claims(damage, averaging, [pair[1].test_accuracy[-1] for pair in pairs[largest]])
    claims += _ridge_claims(copies, errors)
    series: dict[str, list[float]] = {"masks": list(range(1, MASKS + 1))}
    for n in sizes:
        series[f"updates, n = {n}"] = [float(i) for i in range(n // BATCH, updates + 1, n // BATCH)]
        for i, name in enumerate(("plain", "dropout")):
            series[f"test accuracy, {name}, n = {n}"] = _mean([pair[i].test_accuracy for pair in pairs[n]])
            series[f"training loss, {name}, n = {n}"] = _mean([pair[i].train_loss for pair in pairs[n]])
            series[f"masked training loss, {name}, n = {n}"] = _mean([pair[i].masked_loss for pair in pairs[n]])
    series["accuracy of so many masks averaged"] = _mean(averaging)
    series["accuracy of weight scaling"] = [series[f"test accuracy, dropout, n = {largest}"][-1]]
    series["masked copies"] = list(map(float, copies))
    series["distance from ridge"] = _mean(errors)
    return Outcome(claims, series)


def _mean(runs: list[list[float]]) -> list[float]:
    return torch.tensor(runs, dtype=torch.float64).mean(0).tolist()


def _train(
    x: Tensor, labels: Tensor, x_test: Tensor, labels_test: Tensor, hidden: int, updates: int, rate: float, seed: int
) -> _Run:
    """SGD with momentum. One seed gives the weights and batches, and in a stream apart the masks."""
    masks = torch.Generator(x.device).manual_seed(seed)
    batches = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((x.shape[1], hidden), (hidden, hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), Dropout(rate, generator=masks)]
    model = nn.Sequential(*layers, nn.Linear(hidden, 10))
    for parameter in model.parameters():
        bound = (parameter.shape[-1] if parameter.ndim == 2 else hidden) ** -0.5
        nn.init.uniform_(parameter, -bound, bound, generator=batches)
    model.to(x.device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = _Run(model, [], [], [], [])
    epochs = updates * BATCH // len(x)
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(x), generator=batches).to(x.device).split(BATCH):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), labels[batch])
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(batch)
        model.eval()
        with torch.no_grad():
            run.masked_loss.append(total / len(x))
            run.train_loss.append(float(nn.functional.cross_entropy(model(x), labels)))
            if epoch % (epochs // TESTS) == 0:
                scores = model(x_test)
                run.test_loss.append(float(nn.functional.cross_entropy(scores, labels_test)))
                run.test_accuracy.append(_accuracy(scores, labels_test))
    return run


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(-1) == labels).double().mean())


def _accuracy_lost(model: nn.Sequential, x: Tensor, labels: Tensor) -> float:
    """Accuracy that is lost when a random half of the hidden units is switched off and the others are doubled."""
    rates = [layer.p for layer in model if isinstance(layer, Dropout)]
    _set_rate(model, 0.5)
    thinned = mc_dropout_predict(model, x, 20).draws
    _set_rate(model, rates[0])
    return _accuracy(model(x), labels) - _accuracy(thinned, labels)


def _set_rate(model: nn.Sequential, rate: float) -> None:
    for layer in model:
        if isinstance(layer, Dropout):
            layer.p = rate


def _averaged_accuracy(model: nn.Sequential, x: Tensor, labels: Tensor) -> list[float]:
    """Test accuracy of the mean prediction over the first 1, 2, 3 ... masks."""
    probabilities = torch.softmax(mc_dropout_predict(model, x, MASKS).draws, dim=-1)
    return [_accuracy(total, labels) for total in probabilities.cumsum(0)]


def _ridge_errors(settings: Settings, seeds: int) -> tuple[list[int], list[list[float]]]:
    """Relative distance between least squares on so many masked copies of the data, and the closed form."""
    data = diabetes()
    x = (data.features - data.features.mean(0)) / data.features.std(0)
    y = data.targets - data.targets.mean()
    exact = marginal_dropout_solve(x, y, 0.5)
    copies = [1, 10, 100, 1000, *([10_000] if settings.full else [])]
    errors = []
    for seed in range(seeds):
        generator = settings.generator(1000 + seed)
        row = []
        for count in copies:
            gram, moment = torch.zeros(10, 10, dtype=x.dtype), torch.zeros(10, dtype=x.dtype)
            for part in torch.ones(count).split(100):  # a hundred copies at a time, to save memory
                masked = dropout(x.expand(len(part), *x.shape), 0.5, generator=generator)
                gram += torch.einsum("cni,cnj->ij", masked, masked)
                moment += masked.sum(0).T @ y
            row.append(float((torch.linalg.solve(gram, moment) - exact).norm() / exact.norm()))
        errors.append(row)
    return copies, errors


def _size_claims(n: int, pairs: list[tuple[_Run, _Run]]) -> list[Claim]:
    return [
        measure(
            f"n = {n}: dropout narrows the gap between training and test loss (gap with / without)",
            PAPER,
            [dropped.gap / plain.gap for plain, dropped in pairs],
            at_most=1,
        ),
        measure(
            f"n = {n}: dropout helps (test accuracy with less without)",
            f"{PAPER}; {REVIEW} doubts it",
            [100 * (dropped.test_accuracy[-1] - plain.test_accuracy[-1]) for plain, dropped in pairs],
            unit="percentage points",
            at_least=0,
        ),
    ]


def _convergence_claims(n: int, pairs: list[tuple[_Run, _Run]]) -> list[Claim]:
    def epochs(losses: list[float]) -> int:
        return next((i for i, loss in enumerate(losses, start=1) if loss <= CONVERGED), len(losses) + 1)

    return [
        measure(
            f"n = {n}: dropout doubles the epochs until the loss as trained, with masks, is at {CONVERGED} (ratio)",
            ALEXNET,
            [epochs(dropped.masked_loss) / epochs(plain.masked_loss) for plain, dropped in pairs],
            at_least=1.5,
            at_most=2.5,
        ),
        measure(
            f"n = {n}: ... and until the training loss without masks is at {CONVERGED} (ratio)",
            ALEXNET,
            [epochs(dropped.train_loss) / epochs(plain.train_loss) for plain, dropped in pairs],
            at_least=1.5,
            at_most=2.5,
        ),
    ]


def _ensemble_claims(damage: list[list[float]], averaging: list[list[float]], scaled: list[float]) -> list[Claim]:
    return [
        measure(
            "No unit is needed: with half of them off, a network trained so loses less accuracy (loss with / without)",
            REVIEW,
            [dropped / plain for plain, dropped in damage],
            at_most=0.5,
        ),
        measure(
            f"Weight scaling is as accurate as averaging {MASKS} thinned networks (difference)",
            JMLR,
            [100 * (one - many[-1]) for one, many in zip(scaled, averaging, strict=True)],
            unit="percentage points",
            at_least=-0.5,
            at_most=0.5,
        ),
        measure(
            "... and more accurate than averaging 5 (difference)",
            JMLR,
            [100 * (one - many[4]) for one, many in zip(scaled, averaging, strict=True)],
            unit="percentage points",
            at_least=0,
        ),
    ]


def _ridge_claims(copies: list[int], errors: list[list[float]]) -> list[Claim]:
    sizes = torch.tensor(copies, dtype=torch.float64).log()
    centred = sizes - sizes.mean()
    slopes = [float(centred @ torch.tensor(row, dtype=torch.float64).log() / centred.square().sum()) for row in errors]
    return [
        measure(
            f"Least squares on {copies[-1]:,} masked copies is the ridge regression of eq. (5) (relative distance)",
            JMLR,
            [row[-1] for row in errors],
            at_most=0.02,
        ),
        measure(
            "... to which it tends with the square root of their number (slope in logarithms)",
            "sampling error",
            slopes,
            at_least=-0.6,
            at_most=-0.4,
        ),
    ]


def draw(outcome: Outcome) -> Figure:
    """Test accuracy and training loss by epoch, averaging against weight scaling, and the way to ridge regression."""
    figure, (accuracy, loss, masks, ridge) = panels(2, 2, width=5, height=3.6)
    series = outcome.series
    sizes = sorted(int(name.rpartition(" ")[2]) for name in series if name.startswith("test accuracy, dropout"))
    for n, colour in zip((sizes[0], sizes[-1]), COLOURS, strict=False):
        for name, line in (("plain", "--"), ("dropout", "-")):
            label = f"n = {n}, {'without' if name == 'plain' else 'with'}"
            curve = series[f"test accuracy, {name}, n = {n}"]
            updates = series[f"updates, n = {n}"]
            accuracy.plot(
                updates[len(updates) // TESTS - 1 :: len(updates) // TESTS], curve, line, color=colour, label=label
            )
    accuracy.set(title="With and without dropout", xlabel="updates", ylabel="test accuracy")
    accuracy.set_ylim(bottom=0.5)
    n = sizes[-1]
    for name, colour in zip(("plain", "dropout"), COLOURS, strict=False):
        label = "without" if name == "plain" else "with"
        loss.semilogy(updates, series[f"training loss, {name}, n = {n}"], color=colour, label=label)
    masked = series[f"masked training loss, dropout, n = {n}"]
    loss.semilogy(updates, masked, ":", color=COLOURS[1], label="with, as trained")
    loss.axhline(CONVERGED, color="0.4", linestyle=":", linewidth=1)
    loss.set(title=f"Training loss, n = {n}", xlabel="updates", ylabel="cross-entropy (nats)")
    masks.semilogx(series["masks"], series["accuracy of so many masks averaged"], label="mean over masks")
    masks.axhline(series["accuracy of weight scaling"][0], color=COLOURS[1], label="weight scaling")
    masks.set(title=f"Averaging thinned networks, n = {n}", xlabel="masks", ylabel="test accuracy")
    ridge.loglog(series["masked copies"], series["distance from ridge"], marker="o", label="measured")
    start = series["distance from ridge"][0]
    ridge.loglog(series["masked copies"], [start * c**-0.5 for c in series["masked copies"]], ":", label="slope −1/2")
    ridge.set(title="Linear regression on masked copies", xlabel="copies", ylabel="distance from ridge")
    for axis in (accuracy, loss, masks, ridge):
        axis.legend()
    return figure
