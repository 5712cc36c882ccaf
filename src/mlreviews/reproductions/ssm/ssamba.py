"""Does guessing masked patches teach an encoder what helps to recognise, and how does its cost grow with the patches?

No recordings come with the packages, so that the spectrograms are scikit-learn's digits: images of 8 x 8 in 16 patches.
SSAMBA is pretrained on some of them without labels. The parts of its loss are measured on the others, a linear probe
on its features is compared with one on the features of the encoder as it began. Then the encoder and a transformer
encoder of as many parameters run over more and more tokens: the paper compares with SSAST on a GPU at 22,000 tokens,
which is not reproduced; what is measured is how time and memory grow. Times depend on the machine, which must be idle.
Quick: 3 seeds, 200 updates, to 1,024 tokens, half a minute. Full: 5 seeds, 3,000 updates, wider, to 8,192 tokens.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.datasets import digits
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import training
from mlreviews.ssm.ssamba import SSAMBA, BiMambaEncoder, cluster_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2405.11831"
TESTS = 5  # in the course of a training
GRID, SIDE, MASKED = 4, 2, 10  # patches along each axis, their pixels along each, and how many are masked
ENCODERS = ("BiMamba", "transformer")


class AttentionBlock(nn.Module):
    """Pre-norm attention, with its matrix written out as SSAST has it, and an MLP.

    Args:
        d_model: size of a token's vector.
        hidden: units of the MLP.
        heads: of the attention.
    """

    def __init__(self, d_model: int, hidden: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(d_model), nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(
            nn.LayerNorm(d_model), nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, d_model] to the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def transformer(d_model: int, depth: int, hidden: int) -> nn.Module:
    """A transformer encoder."""
    return nn.Sequential(*(AttentionBlock(d_model, hidden) for _ in range(depth)))


def run(settings: Settings) -> Outcome:
    """Pretrains, probes, and measures the growth of time and memory."""
    updates, seeds, width, depth = (3000, 5, 96, 4) if settings.full else (200, 3, 32, 2)
    curves: dict[str, list[list[float]]] = {"disc": [], "gen": []}
    probes: dict[str, list[float]] = {"pretrained": [], "as it began": [], "pixels": []}
    for seed in settings.track(range(seeds), "seeds"):
        generator = settings.generator(seed)
        train, test = digits().split([1000, 797], generator, stratified=True)
        centre, spread = train.features.mean(), 2 * train.features.std()  # as the authors normalise
        images = [((t.features - centre) / spread).float().reshape(-1, 8, 8) for t in (train, test)]
        labels = [train.targets, test.targets]
        model = SSAMBA(GRID, GRID, SIDE, SIDE, width, depth, 8, generator=generator).to(settings.device)
        probes["pixels"].append(_probe([x.flatten(1) for x in images], labels))
        probes["as it began"].append(_probe([_features(model, x) for x in images], labels))
        found = _pretrain(model, images[0], images[1], updates, generator)
        for part, curve in zip(curves, found, strict=True):
            curves[part].append(curve)
        probes["pretrained"].append(_probe([_features(model, x) for x in images], labels))
    lengths = [64, 128, 256, 512, 1024, *([2048, 4096, 8192] if settings.full else [])]
    seconds, megabytes, parameters = _costs(lengths, settings)
    series: dict[str, list[float]] = {"updates": [updates * i / TESTS for i in range(TESTS + 1)]}
    series |= {f"loss, {part}": torch.tensor(rows).mean(0).tolist() for part, rows in curves.items()}
    series |= {f"probe, {name}": values for name, values in probes.items()}
    series["lengths"] = [float(n) for n in lengths]
    series |= {f"seconds, {name}": seconds[name] for name in ENCODERS}
    series |= {f"megabytes, {name}": megabytes[name] for name in ENCODERS} | {"parameters": parameters}
    claims = [*_pretraining_claims(curves, probes), *_cost_claims(lengths, seconds, megabytes)]
    return Outcome(claims, series)


def _pretraining_claims(curves: dict[str, list[list[float]]], probes: dict[str, list[float]]) -> list[Claim]:
    differences = [100 * (a - b) for a, b in zip(probes["pretrained"], probes["as it began"], strict=True)]
    return [
        measure(
            "On unseen images the right patch is told from the others better than by chance (nats, as a part of log N)",
            f"{PAPER}, masked spectrogram patch modelling",
            [curve[-1] / math.log(MASKED) for curve in curves["disc"]],
            at_most=0.9,
        ),
        measure(
            "... and masked patches are drawn better than by the mean of their place (squared error, as a part)",
            f"{PAPER}, masked spectrogram patch modelling",
            [curve[-1] for curve in curves["gen"]],
            at_most=0.9,
        ),
        measure(
            "A linear probe on the features gains by the pretraining",
            f"{PAPER}, downstream tasks",
            differences,
            unit="percentage points",
            at_least=2,
        ),
    ]


def _cost_claims(lengths: list[int], seconds: dict[str, list[float]], megabytes: dict[str, list[float]]) -> list[Claim]:
    n = lengths[-1]
    more = lengths[-1] / lengths[-3]
    claims = [
        measure(
            f"{more:g} times as many patches ({n:,}) take about {more:g} times as {what} in the bidirectional Mamba",
            f"{PAPER}, efficiency",
            values["BiMamba"][-1] / values["BiMamba"][-3],
            at_most=1.5 * more,
        )
        for what, values in (("long", seconds), ("much memory", megabytes))
    ]
    for what, values in (("time", seconds), ("memory", megabytes)):
        saved = 100 * (1 - values["BiMamba"][-1] / values["transformer"][-1])
        claims.append(
            measure(
                f"At {n:,} tokens it saves half the {what} of a transformer encoder of its size, or more",
                f"{PAPER}, efficiency (92.7 % and 95.4 % at 22,000 tokens on a GPU)",
                saved,
                unit="%",
                at_least=50,
            )
        )
    return claims


@torch.no_grad()
def _features(model: SSAMBA, images: Tensor) -> Tensor:
    return model.features(images.to(model.positions.device)).mean(1).cpu()


def _probe(features: list[Tensor], labels: list[Tensor]) -> float:
    """Accuracy of a linear classifier on unseen images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = (f.double().numpy() for f in features)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000)).fit(train, labels[0].numpy())
    return float(probe.score(test, labels[1].numpy()))


def _pretrain(
    model: SSAMBA, train: Tensor, test: Tensor, updates: int, generator: torch.Generator
) -> tuple[list[float], list[float]]:
    """Both parts of the loss on unseen images, before and in the course of the training.

    The squared error is divided by that of the mean of each place of the training images.
    """
    device = model.positions.device
    train, test = train.to(device), test.to(device)
    mask = cluster_mask(len(test), GRID, GRID, MASKED, generator=generator).to(device)
    means = model.patches(train).mean(0)
    errors = (model.patches(test) - means).square().mean(2)[mask].mean()
    # Masks are slow to throw, and there are far fewer of them than of images: they are drawn from these.
    masks = cluster_mask(1000, GRID, GRID, MASKED, generator=generator).to(device)
    tests = {round(updates * (i + 1) / TESTS) for i in range(TESTS)}
    disc, gen = [], []

    def test_now() -> None:
        with torch.no_grad():
            loss = model.pretraining_loss(test, mask)
        disc.append(float(loss.disc))
        gen.append(float(loss.gen / errors))

    def drawn() -> Tensor:
        images, chosen = (torch.randint(len(x), (32,), generator=generator) for x in (train, masks))
        return model.pretraining_loss(train[images], masks[chosen]).total

    test_now()
    for update, _ in training(model, drawn, updates, 3e-3, weight_decay=0.01):
        if update in tests:
            test_now()
    return disc, gen


def _costs(
    lengths: list[int], settings: Settings, width: int = 64, depth: int = 2
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Seconds of a forward pass, megabytes kept for a backward pass, and the parameters of the two encoders."""
    mamba = BiMambaEncoder(width, depth, generator=settings.generator(99))
    size = sum(p.numel() for p in mamba.parameters())
    fixed = sum(p.numel() for p in transformer(width, depth, 1).parameters())
    per_unit = depth * (2 * width + 1)
    torch.manual_seed(settings.seed)
    other = transformer(width, depth, 1 + round((size - fixed) / per_unit))
    encoders: dict[str, nn.Module] = dict(zip(ENCODERS, (mamba, other), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in ENCODERS}
    megabytes: dict[str, list[float]] = {name: [] for name in ENCODERS}
    for length in settings.track(lengths, "lengths"):
        x = torch.randn(1, length, width, generator=settings.generator(length)).to(settings.device)
        for name, encoder in encoders.items():
            encoder.to(settings.device)
            seconds[name].append(_seconds(encoder, x))
            megabytes[name].append(_megabytes(encoder, x))
    return seconds, megabytes, [float(sum(p.numel() for p in e.parameters())) for e in encoders.values()]


@torch.no_grad()
def _seconds(encoder: nn.Module, x: Tensor) -> float:
    """Median of seven forward passes."""
    encoder(x)
    times = []
    for _ in range(7):
        if x.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        encoder(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _megabytes(encoder: nn.Module, x: Tensor) -> float:
    """What is kept of a forward pass for the backward one, parameters left out."""
    own = {p.data_ptr() for p in encoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The output is held until all has been counted, so that no address is used twice.
        y = encoder(x)
        total = sum(kept.values())
    del y
    return total / 1e6


def draw(outcome: Outcome) -> Figure:
    """The parts of the loss, the probes, time and memory."""
    figure, (losses, probes, times, memory) = panels(2, 2)
    series = outcome.series
    chance = math.log(MASKED)
    losses.plot(series["updates"], [v / chance for v in series["loss, disc"]], marker=".", label="$L_d$ / log N")
    losses.plot(series["updates"], series["loss, gen"], marker=".", label="$L_g$ / error of the place's mean")
    losses.axhline(1, color="0.4", linestyle=":", linewidth=1)
    losses.set(title="Pretraining, on unseen digits", xlabel="updates", ylabel="part of the trivial loss")
    losses.set_ylim(0, 1.1 * max(1.5, series["loss, disc"][0] / chance, series["loss, gen"][0]))
    losses.legend()
    names = ("as it began", "pretrained", "pixels")
    for i, (name, colour) in enumerate(zip(names, COLOURS[2:], strict=False)):
        values = series[f"probe, {name}"]
        probes.bar(i, 100 * statistics.fmean(values), color=colour, width=0.6, alpha=0.5)
        probes.scatter([i] * len(values), [100 * v for v in values], color=colour, zorder=3)
    probes.set_xticks(range(3), ["encoder\nas it began", "encoder\npretrained", "pixels"])
    probes.set(title="Linear probe", ylabel="accuracy in % (points: seeds)", ylim=(0, 103))
    lengths = series["lengths"]
    for name, marker in zip(ENCODERS, ("o", "s"), strict=True):
        times.loglog(lengths, [1000 * s for s in series[f"seconds, {name}"]], marker=marker, label=name)
        memory.loglog(lengths, series[f"megabytes, {name}"], marker=marker, label=name)
    times.set(title="Forward pass of an encoder", ylabel="milliseconds")
    memory.set(title="Kept for the backward pass", ylabel="megabytes")
    for axis in (times, memory):
        axis.set_xlabel("patches")
        axis.set_xticks(lengths, [f"{n:g}" for n in lengths])
        axis.minorticks_off()
        axis.legend()
    return figure
