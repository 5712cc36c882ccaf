"""Is TTT's inner model what linear attention and the delta rule are, and does learning while reading help?

The special cases are computed in float64. Models of one block learn Python's source code: TTT-Linear, and in place of
its layer one that learns nothing while it reads (inner steps of 0), one with a single mini-batch for the whole piece,
and Mamba; the blocks' MLPs make up for what a layer has fewer parameters. Mamba has a convolution, which TTT-Linear in
the block of a Transformer has not. The inner loss of the trained models is measured along the pieces. Quick: 96 bytes,
130 updates, 3 seeds, half a minute. Full: 512 bytes, 2,000 updates, two blocks, four sizes of mini-batches, TTT-MLP and
minGRU, 5 seeds, hours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.datasets import ByteTokenizer, python_source
from mlreviews.models import SequenceModel
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import next_token_loss, training
from mlreviews.ssm.mamba import MambaBlock
from mlreviews.ssm.mingru import MinGRU
from mlreviews.ssm.ttt_layers import TTTMLP, TTTLinear, ttt_linear_dual

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2407.04620"
REVIEW = "review of 2024-07-09"
Mixer = Callable[[int, torch.Generator], nn.Module]


@dataclass(frozen=True)
class Size:
    """Of one experiment.

    Attributes:
        width: d_model.
        depth: blocks.
        length: bytes of a piece.
        batch: pieces in a batch.
        updates: of a training.
        rows: pieces in the test.
        seeds: independent models.
    """

    width: int
    depth: int
    length: int
    batch: int
    updates: int
    rows: int
    seeds: int


QUICK = Size(width=32, depth=1, length=96, batch=8, updates=130, rows=48, seeds=3)
FULL = Size(width=128, depth=2, length=512, batch=16, updates=2000, rows=256, seeds=5)


def _ttt(mini_batch: int, eta_base: float = 1.0) -> Mixer:
    return lambda width, generator: TTTLinear(width, 2, mini_batch, eta_base, generator=generator)


TTT, STILL, ONE_BATCH, MAMBA, MINGRU = (
    "TTT-Linear",
    "TTT-Linear, inner steps of 0",
    "TTT-Linear, one mini-batch",
    "Mamba",
    "minGRU",
)


def mixers(size: Size, full: bool) -> dict[str, Mixer]:
    """The layers to compare."""
    found: dict[str, Mixer] = {
        TTT: _ttt(16),
        STILL: _ttt(16, 0.0),
        ONE_BATCH: _ttt(size.length),
        MAMBA: lambda width, generator: MambaBlock(width, generator=generator),
    }
    if full:
        found[MINGRU] = lambda width, generator: MinGRU(width, generator=generator)
        found |= {f"TTT-Linear, mini-batches of {b}": _ttt(b) for b in (4, 64)}
        found["TTT-MLP"] = lambda width, generator: TTTMLP(width, 2, generator=generator)
    return found


def run(settings: Settings) -> Outcome:
    """Computes the special cases, trains the models on the same bytes, and measures the inner loss."""
    size = FULL if settings.full else QUICK
    layers = mixers(size, settings.full)
    bits: dict[str, list[float]] = {name: [] for name in layers}
    curves: dict[str, list[Tensor]] = {name: [] for name in layers}
    parameters: dict[str, int] = {}
    inner: list[Tensor] = []
    runs = [(seed, name) for seed in range(size.seeds) for name in layers]
    for seed, name in settings.track(runs, "models"):
        generator = settings.generator(seed)
        model = _model(layers[name], size, generator).to(settings.device)
        parameters[name] = sum(p.numel() for p in model.parameters())
        _train(model, size, settings.generator(1000 + seed))
        windows = next(
            iter(python_source().validation.batches(size.length, size.rows, settings.generator(2000 + seed)))
        )
        loss = _losses(model, windows.to(settings.device))
        bits[name].append(float(loss.mean()))
        curves[name].append(loss.mean(0))
        if name == TTT:
            inner.append(inner_losses(model, windows[:, :-1].to(settings.device)))
    series: dict[str, list[float]] = {"position": [16.0 * (i + 1) for i in range(size.length // 16)]}
    for name, rows in curves.items():
        series[f"bits, {name}"] = torch.stack(rows).mean(0).unflatten(0, (-1, 16)).mean(1).tolist()
        series[f"bits of each seed, {name}"] = bits[name]
    after, before = torch.stack(inner).mean(0)
    series |= {"inner loss": after.tolist(), "inner loss, first weights": before.tolist()}
    series["parameters"] = [float(p) for p in parameters.values()]
    fall = [float(now[-4:].mean() / first[-4:].mean()) for now, first in inner]
    spread = (max(parameters.values()) - min(parameters.values())) / min(parameters.values())
    return Outcome([*_special_cases(settings.generator(99)), *_claims(bits, fall, spread)], series)


def _model(mixer: Mixer, size: Size, generator: torch.Generator) -> SequenceModel:
    """With MLPs that bring each block to 14 width^2 parameters."""
    width = size.width
    blocks = [mixer(width, generator) for _ in range(size.depth)]
    own = sum(p.numel() for p in blocks[0].parameters())
    ratio = round((14 * width**2 - own) / (2 * width + 1)) / width
    return SequenceModel(ByteTokenizer.vocab_size, width, blocks, mlp_ratio=ratio, generator=generator)


def _train(model: SequenceModel, size: Size, generator: torch.Generator) -> None:
    """AdamW with a rate that rises and falls; smaller for the weights of the places in a mini-batch."""
    device = next(model.parameters()).device
    batches = python_source().train.batches(size.length, size.batch, generator)

    # Those begin at 1/16 and less. Updates of 0.01 bring them to 0 in no time, where they have no gradient any more.
    def slower(name: str) -> bool:
        return name.endswith("learnable_token_idx")

    def loss() -> Tensor:
        return next_token_loss(model, next(batches).to(device))

    for _ in training(model, loss, size.updates, 0.01, slower=slower):
        pass


@torch.no_grad()
def _losses(model: SequenceModel, windows: Tensor) -> Tensor:
    """Bits for each byte, [rows, length]."""
    logits = model(windows[:, :-1])[0]
    return nn.functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none") / math.log(2)


@torch.no_grad()
def inner_losses(model: SequenceModel, ids: Tensor) -> Tensor:
    """Mean inner loss of the last block in each mini-batch, [2, mini-batches]: at its weights, and at the first ones.

    The weights are those before the mini-batch, so no token has been learned from when its loss is taken.

    Args:
        model: of blocks with TTT layers.
        ids: [batch, time].
    """
    x = model.embedding(ids)
    for block in list(model.blocks)[:-1]:
        x, _ = block(x)
    last = model.blocks[-1]
    layer = last.get_submodule("mixer")
    assert isinstance(layer, TTTLinear)
    x = last.get_submodule("norm")(x)
    state = first = layer.initial_state(len(ids))
    found = []
    for piece in x.split(layer.mini_batch, 1):
        _, k, v, _ = layer.project(piece)
        found.append([float((layer.predict(k, s.weights) - v).square().sum(-1).mean()) for s in (state, first)])
        _, state = layer(piece, state)
    return torch.tensor(found).T


def _special_cases(generator: torch.Generator) -> list[Claim]:
    shape = (2, 40, 3)
    q, k, v = (torch.randn(*shape, 8, generator=generator, dtype=torch.float64) / 8**0.5 for _ in range(3))
    eta = torch.rand(shape, generator=generator, dtype=torch.float64)
    zeros = q.new_zeros(2, 3, 8, 8)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    attention = torch.einsum("bhij,bjhd->bihd", scores, v)
    found, _ = ttt_linear_dual(q, k, v, zeros, torch.full_like(eta, 0.5), mini_batch=shape[1])
    W, outputs = zeros, []
    for t in range(shape[1]):
        old = torch.einsum("bhde,bhd->bhe", W, k[:, t])
        W = W + torch.einsum("bh,bhd,bhe->bhde", 2 * eta[:, t], k[:, t], v[:, t] - old)
        outputs.append(torch.einsum("bhde,bhd->bhe", W, q[:, t]))
    delta = torch.stack(outputs, 1)
    stepped, _ = ttt_linear_dual(q, k, v, zeros, eta, mini_batch=1)
    return [
        measure(
            "Gradient descent in one batch, from 0 with steps of 1/2, is linear attention (relative error)",
            f"{PAPER}, theorem 1",
            float((found - attention).norm() / attention.norm()),
            at_most=1e-12,
        ),
        measure(
            "Online gradient descent on a linear inner model is the delta rule (relative error)",
            f"{PAPER}, section 5",
            float((stepped - delta).norm() / delta.norm()),
            at_most=1e-12,
        ),
    ]


def _claims(bits: dict[str, list[float]], fall: list[float], spread: float) -> list[Claim]:
    def behind(name: str) -> list[float]:
        return [other - ttt for other, ttt in zip(bits[name], bits[TTT], strict=True)]

    unit = "bits per byte"
    claims = [
        measure(
            "Late in a piece the inner loss is below that of the first weights (ratio)",
            f"{PAPER}, figure 4",
            fall,
            at_most=1,
        ),
        measure(
            "Learning while reading helps: with inner steps of 0 the model is worse",
            REVIEW,
            behind(STILL),
            at_least=0,
            unit=unit,
        ),
        measure(
            "Mini-batches of 16 are better than a single one for the whole piece",
            f"{PAPER}, figure 7",
            behind(ONE_BATCH),
            at_least=0,
            unit=unit,
        ),
        measure(
            "TTT-Linear is not behind Mamba at equal parameters (Mamba's loss less TTT-Linear's)",
            f"{PAPER}, section 3.1",
            behind(MAMBA),
            at_least=0,
            unit=unit,
        ),
        measure("Parameters differ by 2 % at most", "ours", 100 * spread, at_most=2, unit="%"),
    ]
    if MINGRU in bits:
        statement = "TTT-Linear is not behind minGRU (minGRU's loss less TTT-Linear's)"
        claims.append(measure(statement, "ours", behind(MINGRU), at_least=0, unit=unit))
    return claims


def draw(outcome: Outcome) -> Figure:
    """Losses of the models along a piece and in the mean, and the inner loss along a piece."""
    figure, (along, means, inner) = panels(3)
    series = outcome.series
    prefix = "bits of each seed, "
    names = [name.removeprefix(prefix) for name in series if name.startswith(prefix)]
    for row, (name, colour) in enumerate(zip(names, (*COLOURS, *COLOURS), strict=False)):
        along.plot(series["position"], series[f"bits, {name}"], color=colour, marker="o", markersize=3)
        seeds = series[prefix + name]
        means.plot(seeds, [row] * len(seeds), "o", color=colour, markersize=5)
    along.set(title="Loss along a piece (colours: see right)", xlabel="position in bytes", ylabel="bits per byte")
    means.set_yticks(range(len(names)), [name.removeprefix("TTT-Linear, ") for name in names])
    means.invert_yaxis()
    means.set(title="Mean of each seed", xlabel="bits per byte")
    places = [float(i) for i in range(len(series["inner loss"]))]
    inner.plot(places, series["inner loss"], marker="o", label="weights learned so far")
    inner.plot(places, series["inner loss, first weights"], "--", label="first weights")
    inner.set(title="Inner loss of TTT-Linear", xlabel="mini-batch of the piece", ylabel="squared error")
    inner.set_ylim(bottom=0)
    inner.legend()
    return figure
