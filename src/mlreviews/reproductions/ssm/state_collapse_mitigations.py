"""Does a Mamba-2 model collapse beyond its training length, and what helps?

Small models of two Mamba-2 blocks learn Python's source code in short pieces, and then read far longer ones. Models are
trained with the usual initial decays, and with initial decays so close to 1 that nothing of a short piece is forgotten;
the latter also with a small state, and on longer pieces. A model's excess is what it loses against itself with a
window as long as its training pieces, on the same bytes, more than 16 training lengths after the beginning.
Quick: pieces of 16 bytes, 512 bytes to read, 4 seeds, half a minute. Full: pieces of 32 bytes, 8,192 to read, wider
models, 5 seeds, about an hour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlreviews.datasets import ByteTokenizer, python_source
from mlreviews.models import SequenceModel
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import next_token_loss, training
from mlreviews.ssm.mamba_2 import Mamba2Block
from mlreviews.ssm.state_collapse_mitigations import (
    MitigatedMamba2,
    StateCollapseMonitor,
    clipped_ssd,
    scaled_ssd,
    sliding_state,
    windowed_ssd,
)
from mlreviews_kernels.linear_scan import linear_scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.07145"
REVIEW = "review of 2025-02-12"
SLOW = 1000.0  # the usual initial rates of decay, divided
DECAY_SCALE = 0.97


@dataclass(frozen=True)
class Size:
    """Of one experiment.

    Attributes:
        width: d_model.
        length: bytes of a training piece.
        longer: how many times longer the long training pieces are; batches have as many bytes.
        batch: pieces in a batch.
        updates: of a training.
        reading: bytes of a piece in the end.
        rows: how many such pieces.
        seeds: independent models.
    """

    width: int
    length: int
    longer: int
    batch: int
    updates: int
    reading: int
    rows: int
    seeds: int


QUICK = Size(width=32, length=16, longer=16, batch=48, updates=60, reading=512, rows=8, seeds=4)
FULL = Size(width=128, length=32, longer=32, batch=64, updates=2000, reading=8192, rows=16, seeds=5)

# name -> divisor of the rates of decay, state size, trained on long pieces
MODELS = {
    "usual decays": (1.0, 64, False),
    "slow decays": (SLOW, 64, False),
    "slow decays, state of 4": (SLOW, 4, False),
    "slow decays, trained on long pieces": (SLOW, 64, True),
}
USUAL, COLLAPSING, SMALL, LONG = MODELS


def run(settings: Settings) -> Outcome:
    """Trains the models, reads on with and without mitigations, and measures losses and states."""
    size = FULL if settings.full else QUICK
    excess: dict[str, list[float]] = {}
    curves: dict[str, list[Tensor]] = {}
    growth, share, variances = [], [], []
    runs = [(seed, name) for seed in range(size.seeds) for name in MODELS]
    for seed, name in settings.track(runs, "models"):
        generator = settings.generator(seed)
        model = train(name, size, generator).to(settings.device)
        windows = next(
            iter(python_source().validation.batches(size.reading, size.rows, settings.generator(1000 + seed)))
        )
        windows = windows.to(settings.device)
        monitor = StateCollapseMonitor(model, size.length)
        losses = {"": _losses(monitor, windows)}
        channels = torch.cat([v.flatten(1) for v in monitor.variance_by_channel()], 1)
        for mitigation, scans in _mitigations(model, size, windows).items():
            if mitigation == "window" or name == COLLAPSING:
                losses[mitigation] = _mitigated(model, scans, windows)
        late = slice(16 * size.length, None)
        for mitigation, loss in losses.items():
            label = f"{name}, {mitigation}" if mitigation else name
            curves.setdefault(label, []).append(loss.mean(0))
            excess.setdefault(label, []).append(float((loss - losses["window"])[:, late].mean()))
        if name == COLLAPSING:
            largest = channels[-1].sort(descending=True).values
            growth.append(math.log10(float(channels[-1].max() / channels[0].max())))
            share.append(float(largest[: len(largest) // 10].sum() / largest.sum()))
            variances.append(torch.stack([channels.max(1).values, channels.median(1).values]))
    claims = _claims(excess, growth, share, _window_error(settings.generator(99)))
    edges = [0, *(size.length * 2**i for i in range(int(math.log2(size.reading / size.length)) + 1))]
    series: dict[str, list[float]] = {"bytes read": [float(e) for e in edges[1:]]}
    for label, rows in curves.items():
        mean = torch.stack(rows).mean(0)
        series[f"bits, {label}"] = [float(mean[a:b].mean()) for a, b in pairwise(edges)]
    series["looks"] = [float(p) for p in monitor.positions]
    largest_mean, median_mean = torch.stack(variances).log().mean(0).exp()
    series |= {"largest variance": largest_mean.tolist(), "median variance": median_mean.tolist()}
    series["training length"] = [float(size.length)]
    return Outcome(claims, series)


def train(name: str, size: Size, generator: torch.Generator) -> SequenceModel:
    """One of `MODELS`, by AdamW with a rate that rises and falls."""
    divisor, d_state, long = MODELS[name]
    blocks = [Mamba2Block(size.width, d_state, 16, generator=generator) for _ in range(2)]
    for block in blocks:
        block.A_log.data -= math.log(divisor)
    model = SequenceModel(ByteTokenizer.vocab_size, size.width, blocks, generator=generator)
    length, batch = (
        (size.length * size.longer, max(1, size.batch // size.longer)) if long else (size.length, size.batch)
    )
    batches = python_source().train.batches(length, batch, generator)
    for _ in training(model, lambda: next_token_loss(model, next(batches)), size.updates, 0.01):
        pass
    return model


def _mitigations(model: SequenceModel, size: Size, windows: Tensor) -> dict[str, list[Any]]:
    """For each mitigation, the scan of each block."""
    with torch.no_grad():
        _, states = model(windows[:, : size.length])
    norms = [float(state.ssm.norm(dim=(2, 3)).max()) for state in states]
    blocks = len(states)
    return {
        "window": [partial(windowed_ssd, window=size.length)] * blocks,
        "norm": [partial(clipped_ssd, max_norm=norm, chunk_size=32) for norm in norms],
        "forget more": [partial(scaled_ssd, decay_scale=DECAY_SCALE)] * blocks,
        "remember less": [partial(scaled_ssd, input_scale=0.5)] * blocks,
    }


def _mitigated(model: SequenceModel, scans: Sequence[Any], windows: Tensor) -> Tensor:
    plain = [block.mixer for block in model.blocks]
    for block, mixer, scan in zip(model.blocks, plain, scans, strict=True):
        assert isinstance(mixer, Mamba2Block)
        block.mixer = MitigatedMamba2(mixer, scan)
    losses = _losses(model, windows)
    for block, mixer in zip(model.blocks, plain, strict=True):
        block.mixer = mixer
    return losses


@torch.no_grad()
def _losses(model: Any, windows: Tensor) -> Tensor:
    """Bits for each byte, [rows, reading]."""
    logits = model(windows[:, :-1])
    logits = logits[0] if isinstance(logits, tuple) else logits
    return nn.functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none") / math.log(2)


def _window_error(generator: torch.Generator) -> float:
    """Relative error of the window by differences against states begun anew for every token, in float64."""
    time, window = 300, 32
    b = torch.randn(1, time, 2, 4, 3, generator=generator, dtype=torch.float64)
    log_a = -torch.rand(1, time, 2, generator=generator, dtype=torch.float64) * 0.1
    a = log_a.exp()[..., None, None].expand_as(b)
    h, _ = linear_scan(a, b)
    starts = [max(0, t - window + 1) for t in range(time)]
    anew = torch.stack([linear_scan(a[:, i : t + 1], b[:, i : t + 1])[1] for t, i in enumerate(starts)], 1)
    return float((sliding_state(h, log_a, window) - anew).norm() / anew.norm())


def _claims(excess: dict[str, list[float]], growth: list[float], share: list[float], error: float) -> list[Claim]:
    bits: dict[str, Any] = {"unit": "bits per byte"}
    return [
        measure(
            "A model with a large state and the usual initial decays collapses beyond its training length (excess)",
            f"{PAPER}, section 3",
            excess[USUAL],
            at_least=0.2,
            **bits,
        ),
        measure(
            "One that starts with decays near 1, and never has to forget, does (excess)",
            f"{PAPER}, section 4",
            excess[COLLAPSING],
            at_least=0.2,
            **bits,
        ),
        measure(
            "... and the largest variance among the channels of its states grows tenfold at least (powers of 10)",
            REVIEW,
            growth,
            at_least=1,
        ),
        measure("... with half of all variance in a tenth of the channels", REVIEW, share, at_least=0.5),
        measure(
            "A state 16 times smaller does not collapse (excess)",
            f"{PAPER}, section 4",
            excess[SMALL],
            at_most=0.2,
            **bits,
        ),
        measure(
            "Nor does the large state after training on as many bytes in longer pieces (excess)",
            f"{PAPER}, section 4",
            excess[LONG],
            at_most=0.2,
            **bits,
        ),
        measure(
            "A bound on the norm of the state removes 80 % of the excess",
            f"{PAPER}, first version",
            _removed(excess, "norm"),
            at_least=80,
            unit="%",
        ),
        measure(
            f"Decays times {DECAY_SCALE} remove 80 % of the excess",
            f"{PAPER}, first version",
            _removed(excess, "forget more"),
            at_least=80,
            unit="%",
        ),
        measure(
            "Inputs of half the size, with decays as they are, remove 80 % of the excess",
            f"{PAPER}, first version",
            _removed(excess, "remember less"),
            at_least=80,
            unit="%",
        ),
        measure(
            "The difference of two states is the state of the window (relative error)",
            f"{PAPER}, first version",
            error,
            at_most=1e-12,
        ),
    ]


def _removed(excess: dict[str, list[float]], mitigation: str) -> list[float]:
    pairs = zip(excess[COLLAPSING], excess[f"{COLLAPSING}, {mitigation}"], strict=True)
    return [100 * (1 - mitigated / plain) for plain, mitigated in pairs]


def draw(outcome: Outcome) -> Figure:
    """Loss against bytes read for the models and for the mitigations, and the variance of the states."""
    figure, (models, mitigations, variance) = panels(3)
    series = outcome.series
    for name, colour in zip(MODELS, COLOURS, strict=False):
        models.plot(series["bytes read"], series[f"bits, {name}"], color=colour, marker="o", markersize=3, label=name)
    labels = {COLLAPSING: "as it is"} | {
        f"{COLLAPSING}, {m}": m for m in ("window", "norm", "forget more", "remember less")
    }
    for (name, label), colour in zip(labels.items(), (COLOURS[1], *COLOURS[2:], COLOURS[0]), strict=False):
        style = "--" if label == "window" else "-"
        mitigations.plot(series["bytes read"], series[f"bits, {name}"], style, color=colour, label=label)
    models.set(title="Beyond the training length", ylabel="bits per byte")
    mitigations.set(title="Slow decays, mitigated", ylabel="bits per byte")
    variance.loglog(series["looks"], series["largest variance"], color=COLOURS[1], label="largest")
    variance.loglog(series["looks"], series["median variance"], color=COLOURS[4], label="median")
    variance.set(title="Slow decays: channels of the state", ylabel="variance")
    for axis in (models, mitigations, variance):
        axis.set(xscale="log", xlabel="bytes read")
        axis.axvline(series["training length"][0], color="0.4", linestyle=":", linewidth=1)
        axis.legend()
    return figure
