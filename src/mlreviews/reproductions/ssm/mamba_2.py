"""Is the state-space model of Mamba-2 an attention without softmax, and what does its block give up against Mamba's?

Duality, rank and linear attention are computed in float64 on random inputs. Then three models with two blocks each and
75,000 to 82,000 parameters learn the source code of Python, byte by byte: Mamba-2, Mamba, and minGRU with an MLP, which
has no short convolution as the other two have. Times depend on the machine, which must be idle.
Quick: 100 updates on 8 x 96 bytes, 3 seeds, evaluated on 16,000 bytes of other files; about a minute.
Full: 1,500 updates on 16 x 256 bytes, 3 seeds, 500,000 bytes; a quarter of an hour and more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.datasets import ByteTokenizer, python_source
from mlreviews.models import SequenceModel
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.training import bits_per_byte, median_seconds, next_token_loss, training
from mlreviews.ssm.mamba import MambaBlock
from mlreviews.ssm.mamba_2 import Mamba2Block, ssd_matrix
from mlreviews.ssm.mingru import MinGRU
from mlreviews_kernels.selective_scan import selective_scan
from mlreviews_kernels.ssd import ssd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2405.21060"
WIDTH = 64
STATES = (16, 64, 256)  # N, in the comparison of times
SIZES: dict[str, Callable[[torch.Generator], tuple[nn.Module, float]]] = {  # block, and hidden units of an MLP
    "Mamba-2": lambda g: (Mamba2Block(WIDTH, 32, 32, chunk_size=64, generator=g), 0.0),
    "Mamba": lambda g: (MambaBlock(WIDTH, generator=g), 0.0),
    "minGRU and MLP": lambda g: (MinGRU(WIDTH, 2.0, generator=g), 0.5),
}


def run(settings: Settings) -> Outcome:
    """Measures the identities, trains on text, and times the two scans against each other."""
    length, batch, updates, tested = (256, 16, 1500, 500_000) if settings.full else (96, 8, 100, 16_000)
    seeds = 3
    corpus = python_source()
    losses: dict[str, list[list[float]]] = {name: [] for name in SIZES}
    bits: dict[str, list[float]] = {name: [] for name in SIZES}
    runs = [(seed, name) for seed in range(seeds) for name in SIZES]
    for seed, name in settings.track(runs, "models"):
        generator = settings.generator(seed)
        model = language_model(name, generator).to(settings.device)
        batches = corpus.train.batches(length, batch, settings.generator(100 + seed))
        losses[name].append(_train(model, batches, updates))
        bits[name].append(bits_per_byte(model, corpus.validation, length, tested))
    duality, rank, attention = _identities(settings.generator(seeds))
    times = _times(2048 if settings.full else 512, settings)
    claims = [
        *_identity_claims(duality, rank, attention),
        *(_text_claim(other, bits) for other in SIZES if other != "Mamba-2"),
        measure(
            f"With N = {STATES[-1]} states SSD runs forward and back faster than the selective scan (times as fast)",
            f"{PAPER}, section 9.3",
            times["selective scan"][-1] / times["SSD"][-1],
            at_least=2,
        ),
    ]
    series: dict[str, list[float]] = {
        f"loss, {name}": torch.tensor(rows).mean(0).tolist() for name, rows in losses.items()
    }
    series |= {f"bits per byte, {name}": found for name, found in bits.items()}
    series |= {"states": [float(n) for n in STATES]} | {f"seconds, {name}": found for name, found in times.items()}
    return Outcome(claims, series)


def language_model(name: str, generator: torch.Generator) -> SequenceModel:
    """One of the three, with two blocks.

    Args:
        name: which, a key of `SIZES`.
        generator: draws the weights.
    """
    blocks, ratios = zip(*(SIZES[name](generator) for _ in range(2)), strict=True)
    return SequenceModel(ByteTokenizer.vocab_size, WIDTH, blocks, mlp_ratio=ratios[0], generator=generator)


def _train(model: SequenceModel, batches: Iterator[Tensor], updates: int) -> list[float]:
    """AdamW; the loss of every update in bits per byte."""
    device = next(model.parameters()).device
    losses = training(model, lambda: next_token_loss(model, next(batches).to(device)), updates, 0.01)
    return [loss / math.log(2) for _, loss in losses]


def _inputs(generator: torch.Generator, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, log a, B and C of 4 heads in 2 groups, N = 8, P = 5."""
    x, B, C = (
        torch.randn(2, length, *shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (2, 8), (2, 8))
    )
    log_a = -0.3 * torch.rand(2, length, 4, generator=generator, dtype=torch.float64)
    return x, log_a, B, C


def _identities(generator: torch.Generator) -> tuple[float, tuple[int, int], float]:
    """Relative errors of duality and of linear attention, and the smallest and largest rank of square blocks."""
    errors, attention, ranks = [], [], []
    for length, chunk in ((1, 64), (50, 7), (64, 16), (200, 64)):
        x, log_a, B, C = _inputs(generator, length)
        matrix = ssd_matrix(log_a, B, C)
        expected = torch.einsum("bhij,bjhp->bihp", matrix, x)
        errors.append(float((ssd(x, log_a, B, C, chunk_size=chunk)[0] - expected).norm() / expected.norm()))
        queries, keys = (part.repeat_interleave(2, dim=2) for part in (C, B))
        expected = torch.einsum("bhij,bjhp->bihp", torch.einsum("bihn,bjhn->bhij", queries, keys).tril(), x)
        found, _ = ssd(x, torch.zeros_like(log_a), B, C, chunk_size=chunk)
        attention.append(float((found - expected).norm() / expected.norm()))
        for i in range(8, length - 8):  # blocks of 9 rows and columns at least, where a full rank would show
            ranks += torch.linalg.matrix_rank(matrix[..., i:, : i + 1], rtol=1e-9).flatten().tolist()
    return max(errors), (min(ranks), max(ranks)), max(attention)


def _identity_claims(duality: float, rank: tuple[int, int], attention: float) -> list[Claim]:
    return [
        measure(
            "The chunked scan is the masked attention (largest relative error in float64)",
            f"{PAPER}, equation 16 and theorem 6.1",
            duality,
            at_most=1e-12,
        ),
        measure(
            "Blocks on and below the diagonal have rank N = 8 at most (largest rank)",
            f"{PAPER}, definition 3.1",
            rank[1],
            at_most=8,
        ),
        measure("... and attain it (smallest rank)", f"{PAPER}, definition 3.1", rank[0], at_least=8),
        measure(
            "Without decay it is causal linear attention (largest relative error)",
            f"{PAPER}, section 5.2",
            attention,
            at_most=1e-12,
        ),
    ]


def _text_claim(other: str, bits: dict[str, list[float]]) -> Claim:
    return measure(
        f"Mamba-2 learns text at least as well as {other} of about the same size (bits per byte, less the other's)",
        f"{PAPER}, section 9.2" if other == "Mamba" else "ours",
        [a - b for a, b in zip(bits["Mamba-2"], bits[other], strict=True)],
        unit="bits per byte",
        at_most=0,
    )


def _times(length: int, settings: Settings) -> dict[str, list[float]]:
    """Median seconds of a pass forward and back with 256 channels; they depend on the machine, which must be idle."""
    found: dict[str, list[float]] = {"SSD": [], "selective scan": []}
    for state in STATES:
        generator = settings.generator(10_000 + state)

        def leaf(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator).to(settings.device).requires_grad_()

        u, delta, rates = leaf(1, length, 256), leaf(1, length, 256), leaf(256, state)
        B, C, log_a = leaf(1, length, 1, state), leaf(1, length, 1, state), leaf(1, length, 4)

        def selective(u: Tensor = u, delta: Tensor = delta, A: Tensor = rates, B: Tensor = B, C: Tensor = C) -> Tensor:
            return selective_scan(u, delta, -A.exp(), B, C, delta_softplus=True)[0]

        def dual(u: Tensor = u, log_a: Tensor = log_a, B: Tensor = B, C: Tensor = C) -> Tensor:
            return ssd(u.unflatten(2, (4, 64)), -log_a.exp(), B, C, chunk_size=64)[0]

        for name, call in (("SSD", dual), ("selective scan", selective)):
            found[name].append(median_seconds(call, settings.device))
    return found


def draw(outcome: Outcome) -> Figure:
    """Training losses, bits per byte on other files, and times by the number of states."""
    figure, (training, test, times) = panels(3)
    series = outcome.series
    names = [name.removeprefix("loss, ") for name in series if name.startswith("loss, ")]
    window = max(1, len(series[f"loss, {names[0]}"]) // 30)
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        loss = series[f"loss, {name}"]
        smooth = [statistics.fmean(loss[max(0, k - window) : k + 1]) for k in range(len(loss))]
        training.plot(range(1, len(loss) + 1), smooth, color=colour, label=name)
        bits = series[f"bits per byte, {name}"]
        test.plot([i] * len(bits), bits, "o", color=colour)
    training.set(title="Learning Python's source code", xlabel="updates", ylabel="training loss (bits per byte)")
    training.legend()
    test.set(title="On other files", ylabel="bits per byte, one point a seed", xlim=(-0.5, len(names) - 0.5))
    test.set_xticks(range(len(names)), names)
    for name, marker in (("SSD", "s"), ("selective scan", "o")):
        milliseconds = [1000 * s for s in series[f"seconds, {name}"]]
        times.loglog(series["states"], milliseconds, marker=marker, label=name)
    times.set(title="Forward and backward pass", xlabel="states N", ylabel="milliseconds")
    times.set_xticks(series["states"], [f"{n:g}" for n in series["states"]])
    times.minorticks_off()
    times.legend()
    return figure
