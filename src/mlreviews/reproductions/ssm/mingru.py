"""Does a GRU without dependence on its state still copy selectively, how much faster is it, and what does it cost?

Models of one and of three minGRU layers learn to repeat the data tokens that are strewn among noise. Then a training
step (forward, backward) of one minGRU layer is timed against torch.nn.GRU at several lengths, and what the two keep in
memory for the backward pass is added up. Times are medians and depend on the machine, which must be idle.
Quick: 3 tokens among 16 positions, 3 seeds, 300 updates; lengths to 512; twenty seconds.
Full: 6 tokens of 14 kinds among 48, also two layers, 3,000 updates, 3 seeds; lengths to 4,096; a quarter of an hour.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlreviews.models import SequenceModel
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Claim, Outcome, Settings, measure
from mlreviews.reproductions.ssm.mamba import Task, accuracy, train_copying
from mlreviews.reproductions.training import median_seconds
from mlreviews.ssm.mingru import MinGRU, log_g, parallel_scan_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2410.01201"
REVIEW = "review of 2024-10-04"
BATCH, WIDTH = 16, 64  # of the timed layers
CLAIMED = 512  # the length at which the paper gives its factors


def run(settings: Settings) -> Outcome:
    """Trains on selective copying, and measures time, memory and rounding of one layer."""
    task, updates, width = (Task(48, 6, 16), 3000, 64) if settings.full else (Task(16, 3, 6), 300, 32)
    depths, seeds = ((1, 2, 3) if settings.full else (1, 3)), 3
    curves: dict[int, list[list[float]]] = {depth: [] for depth in depths}
    final: dict[int, list[float]] = {depth: [] for depth in depths}
    runs = [(seed, depth) for seed in range(seeds) for depth in depths]
    for seed, depth in settings.track(runs, "models"):
        generator = settings.generator(seed)
        layers = [MinGRU(width, 2.0, generator=generator) for _ in range(depth)]
        model = SequenceModel(task.vocab_size, width, layers, mlp_ratio=2.0, generator=generator).to(settings.device)
        curves[depth].append(train_copying(model, task, updates, 0.01, generator))
        final[depth].append(accuracy(model, task, generator))
    lengths = [16, 64, 256, CLAIMED, *([1024, 2048, 4096] if settings.full else [])]
    seconds, megabytes = _costs(lengths, settings)
    rounding = _rounding(lengths, settings.generator(seeds))
    claims = [*_copying_claims(task, final), *_cost_claims(lengths, seconds, megabytes)]
    claims.append(
        measure(
            f"The scan of the paper's listing is accurate in float32 at length {lengths[-1]} (largest relative error)",
            f"ours, on {PAPER}, appendix B",
            rounding["the paper's listing"][-1],
            at_most=1e-5,
        )
    )
    tests = len(curves[depths[0]][0])
    series: dict[str, list[float]] = {"updates": [updates * (i + 1) / tests for i in range(tests)]}
    series |= {f"accuracy, layers: {depth}": torch.tensor(curves[depth]).mean(0).tolist() for depth in depths}
    series["lengths"] = [float(length) for length in lengths]
    series |= {f"seconds, {name}": found for name, found in seconds.items()}
    series |= {f"megabytes, {name}": found for name, found in megabytes.items()}
    return Outcome(claims, series | {f"rounding, {name}": found for name, found in rounding.items()})


def _copying_claims(task: Task, final: dict[int, list[float]]) -> list[Claim]:
    deep = max(final)
    return [
        measure(
            f"Three layers copy {task.tokens} of {task.length} positions (accuracy)",
            f"{PAPER}, table 1",
            final[deep],
            at_least=0.95,
        ),
        measure(
            "One layer, whose gates see one token only, does not come near (accuracy)",
            f"{PAPER}, table 1",
            final[1],
            at_most=0.75,
        ),
    ]


def _cost_claims(lengths: list[int], seconds: dict[str, list[float]], megabytes: dict[str, list[float]]) -> list[Claim]:
    factors = [gru / mine for gru, mine in zip(seconds["GRU"], seconds["minGRU"], strict=True)]
    place = lengths.index(CLAIMED)
    return [
        measure(
            f"A training step of minGRU is faster than GRU's at length {CLAIMED} (factor)",
            f"{PAPER}, section 4.1",
            factors[place],
            at_least=1,
        ),
        measure("... 175 times, as on the paper's GPU (factor)", f"{PAPER}, section 4.1", factors[place], at_least=175),
        measure("It is faster at every length that was timed (smallest factor)", "ours", min(factors), at_least=1),
        measure(
            "The advantage grows with the length (factor at the longest over that at the shortest)",
            f"{PAPER}, figure 1",
            factors[-1] / factors[0],
            at_least=2,
        ),
        measure(
            f"minGRU keeps more memory for the backward pass at length {CLAIMED} (bytes over GRU's)",
            f"{PAPER}, section 4.1 (1.88); {REVIEW}",
            megabytes["minGRU"][place] / megabytes["GRU"][place],
            at_least=1,
        ),
    ]


def _costs(lengths: list[int], settings: Settings) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Median seconds of a training step, and megabytes kept for its backward pass, for each kind and length."""
    with torch.random.fork_rng(devices=[]):  # no number that is reported depends on the weights of nn.GRU
        gru = nn.GRU(WIDTH, WIDTH, batch_first=True).to(settings.device)
    mine = MinGRU(WIDTH, generator=settings.generator(100)).to(settings.device)
    seconds: dict[str, list[float]] = {"GRU": [], "minGRU": []}
    megabytes: dict[str, list[float]] = {"GRU": [], "minGRU": []}
    for length in settings.track(lengths, "lengths"):
        x = torch.randn(BATCH, length, WIDTH, generator=settings.generator(length)).to(settings.device)
        for name, layer in (("GRU", gru), ("minGRU", mine)):
            seconds[name].append(median_seconds(lambda layer=layer, x=x: layer(x)[0], settings.device))  # type: ignore[misc]
            megabytes[name].append(_kept(layer, x) / 1e6)
    return seconds, megabytes


def _kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that autograd holds between forward and backward, without the layer's weights."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    del output
    return sum(size for pointer, size in held.items() if pointer not in weights)


@torch.no_grad()
def _rounding(lengths: list[int], generator: torch.Generator) -> dict[str, list[float]]:
    """Largest relative error in float32 of the paper's scan and of the layer's, against float64."""
    layer = MinGRU(WIDTH, generator=generator)
    found: dict[str, list[float]] = {"the paper's listing": [], "the layer here": []}
    for length in lengths:
        x = torch.randn(2, length, WIDTH, generator=generator)
        exact = layer.double()(x.double())[0]
        layer.float()
        keep, take = layer.log_gates(x)
        first = torch.full((2, 1, WIDTH), -math.inf)
        listing = parallel_scan_log(keep, torch.cat([first, take + log_g(layer.linear_h(x))], 1))
        for name, h in zip(found, (listing, layer(x)[0]), strict=True):
            found[name].append(float(((h.double() - exact) / exact).abs().max()))
    return found


def draw(outcome: Outcome) -> Figure:
    """Accuracy in the course of training, times, memory, and rounding errors."""
    figure, (training, times, memory, rounding) = panels(2, 2)
    series = outcome.series
    prefix = "accuracy, layers: "
    for depth in [name.removeprefix(prefix) for name in series if name.startswith(prefix)]:
        label = f"{depth} layer{'s' if depth != '1' else ''}"
        training.plot(series["updates"], series[prefix + depth], marker=".", label=label)
    training.set(title="Selective copying with minGRU", xlabel="updates", ylabel="accuracy", ylim=(0, 1.03))
    lengths = series["lengths"]
    for name, marker in (("GRU", "s"), ("minGRU", "o")):
        times.loglog(lengths, [1000 * s for s in series[f"seconds, {name}"]], marker=marker, label=name)
        memory.loglog(lengths, series[f"megabytes, {name}"], marker=marker, label=name)
    times.set(title="Training step of one layer", ylabel="milliseconds")
    memory.set(title="Kept for the backward pass", ylabel="megabytes")
    for name, colour in zip(("the paper's listing", "the layer here"), COLOURS[2:], strict=False):
        rounding.loglog(lengths, series[f"rounding, {name}"], marker="o", color=colour, label=name)
    rounding.set(title="Rounding of the scan in logarithms", ylabel="largest relative error, float32")
    for axis in (times, memory, rounding):
        axis.set_xlabel("length")
        axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axis.minorticks_off()
    for axis in (training, times, memory, rounding):
        axis.legend()
    return figure
