"""Is tree attention exact, however the keys are split, and how much less does it send than ring attention?

Exactness on random keys and values, split at random places into shards that are merged in random order; and, with the
numerator as the code published with the paper computes it, how far that is from attention. Traffic and time of one
decoding step in processes that really exchange tensors (gloo): all bytes handed to a send or an all-reduce are counted.
The ring passes keys and values around, as in the paper's comparison.
Quick: 2 processes, contexts up to 16,384 tokens, half a minute. Full: 4 processes as well, up to 65,536 tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn  # type: ignore[attr-defined]

from mlreviews.attention.tree_attention import attention_energy, distributed_tree_attention, tree_attention, tree_volume
from mlreviews.reproductions.figures import COLOURS, panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure
from mlreviews_kernels.attention import attention, merge_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2408.04093"
HEADS, KV_HEADS, DIM = 16, 8, 64  # of one layer of a small Llama


def run(settings: Settings) -> Outcome:
    """Measures errors of merging, and bytes and seconds of a decoding step by both ways of sharing the work."""
    splits = 200 if settings.full else 40
    errors: dict[str, list[float]] = {"double": [], "single": [], "one pass": [], "twice": [], "energy": []}
    for i in settings.track(range(splits), "splits"):
        for name, error in _errors(settings.generator(i)).items():
            errors[name].append(error)
    contexts = [2**k for k in range(10, 17 if settings.full else 15, 2)]
    steps = {world: _steps(world, contexts, settings.seed) for world in ((2, 4) if settings.full else (2,))}
    longest = steps[2][-1]
    claims = [
        measure(
            "Merging shards of any lengths in any order is softmax attention (largest error, float64)",
            f"{PAPER}, section 5",
            max(errors["double"]),
            at_most=1e-12,
        ),
        measure(
            "... and in float32 is as exact as one pass over all keys (ratio of the mean errors)",
            f"{PAPER}, section 5",
            sum(errors["single"]) / sum(errors["one pass"]),
            at_most=1.5,
        ),
        measure(
            "The gradient of the energy at 0 is the attention output (largest error, float64)",
            f"{PAPER}, section 4",
            max(errors["energy"]),
            at_most=1e-12,
        ),
        measure(
            "The numerator of the published code, where exp(lse) counts twice, is not attention (relative error)",
            "tree_shard_test.py of Zyphra/tree_attention",
            min(errors["twice"]),
            at_least=0.1,
        ),
        measure(
            f"Ring attention sends more bytes in a decoding step (times, {contexts[-1]:,} tokens, 2 processes)",
            f"{PAPER}, communication volume",
            longest["ring bytes"] / longest["tree bytes"],
            at_least=2,
        ),
        measure(
            f"Tree attention sends as much for {contexts[-1]:,} tokens as for {contexts[0]:,} (times)",
            f"{PAPER}, communication volume",
            longest["tree bytes"] / steps[2][0]["tree bytes"],
            at_least=1,
            at_most=1,
        ),
        measure(
            "The bytes are those of the formula (times)",
            "equation 4 of the card",
            longest["tree bytes"] / (4 * tree_volume(1, HEADS, DIM, 2)),
            at_least=1,
            at_most=1,
        ),
        measure(
            f"A decoding step takes less time than with ring attention (times, {contexts[-1]:,} tokens, 2 processes)",
            f"{PAPER}, figure 3",
            longest["ring seconds"] / longest["tree seconds"],
            at_least=1,
        ),
        measure(
            "Both ways give the same output (largest difference, float32)",
            f"{PAPER}, section 5",
            max(step["difference"] for found in steps.values() for step in found),
            at_most=1e-5,
        ),
    ]
    series = {"tokens": [float(n) for n in contexts]}
    for world, found in steps.items():
        for name in ("ring bytes", "tree bytes", "ring seconds", "tree seconds"):
            series[f"{name}, {world} processes"] = [step[name] for step in found]
    return Outcome(claims, series | {f"error, {name}": values for name, values in errors.items()})


def _errors(generator: torch.Generator) -> dict[str, float]:
    """Largest errors against all scores at once in float64, for one random split in random order."""
    time = int(torch.randint(20, 400, (1,), generator=generator))
    shapes = (2, 3, HEADS, 32), (2, time, KV_HEADS, 32), (2, time, KV_HEADS, 32)
    q, k, v = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    expected = nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
    ).transpose(1, 2)
    cuts = torch.randint(0, time + 1, (int(torch.randint(1, 12, (1,), generator=generator)),), generator=generator)
    bounds = [0, *cuts.sort().values.tolist(), time]
    order = torch.randperm(len(bounds) - 1, generator=generator).tolist()
    spans = [slice(bounds[i], bounds[i + 1]) for i in order]

    def split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, [k[:, s] for s in spans], [v[:, s] for s in spans])[0]

    def error(found: Tensor) -> float:
        return float((found.double() - expected).abs().max())

    single = [x.float() for x in (q, k, v)]
    zeta = torch.zeros_like(q).requires_grad_()
    (gradient,) = torch.autograd.grad(attention_energy(q, k, v, zeta).sum(), zeta)
    twice = _counted_twice([attention(q, k[:, s], v[:, s], causal=False) for s in spans])
    return {
        "double": error(split(q, k, v)),
        "single": error(split(*single)),
        "one pass": error(attention(*single, causal=False)[0]),
        "twice": float((twice - expected).norm() / expected.norm()),
        "energy": error(gradient),
    }


def _counted_twice(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What the published code computes: the parts are multiplied by exp(lse), and then by exp(lse - m)."""
    most = torch.stack([lse for _, lse in parts]).amax(0)
    shares = [(torch.exp(lse).mT[..., None], torch.exp(lse - most).mT[..., None]) for _, lse in parts]
    total = torch.stack([share for _, share in shares]).sum(0)
    return torch.stack([out * a * b for (out, _), (a, b) in zip(parts, shares, strict=True)]).sum(0) / total


def _steps(world: int, contexts: list[int], seed: int) -> list[dict[str, float]]:
    """Bytes that a rank sends and the median time of a step, for each length of the context."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, args=(world, contexts, seed, folder), nprocs=world)
        found: list[dict[str, float]] = torch.load(Path(folder) / "found.pt")
    return found


def _process(rank: int, world: int, contexts: list[int], seed: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = []
    for context in contexts:
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(1, 1, HEADS, DIM, generator=generator)
        k, v = torch.randn(2, 1, context, KV_HEADS, DIM, generator=generator).unbind()
        k, v = (x.chunk(world, 1)[rank].contiguous() for x in (k, v))
        step = {"difference": float((_ring(q, k, v)[0] - distributed_tree_attention(q, k, v)[0]).abs().max())}
        with _counting() as sent:
            distributed_tree_attention(q, k, v)
        step |= {"tree bytes": sum(sent), "ring bytes": float(_ring(q, k, v)[1])}
        for name, way in (("tree", distributed_tree_attention), ("ring", _ring)):
            step[f"{name} seconds"] = statistics.median(_timed(partial(way, q, k, v)) for _ in range(9))
        found.append(step)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def _counting() -> Iterator[list[float]]:
    """The bytes that a rank sends meanwhile in all-reduces that waste nothing: 2 (p - 1) / p of what is reduced."""
    sent: list[float] = []
    all_reduce, world = dist.all_reduce, dist.get_world_size()

    def counted(tensor: Tensor, *args: Any, **options: Any) -> None:
        sent.append(2 * (world - 1) / world * tensor.nbytes)
        all_reduce(tensor, *args, **options)

    dist.all_reduce = counted
    try:
        yield sent
    finally:
        dist.all_reduce = all_reduce


def _ring(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
    """Ring attention: keys and values go around while those at hand are attended to. Also the bytes that were sent."""
    rank, world = dist.get_rank(), dist.get_world_size()
    held, parts, sent = torch.stack([k, v]), [], 0
    for turn in range(world):
        waiting: list[dist.Work] = []
        if turn < world - 1:
            coming = torch.empty_like(held)
            operations = [
                dist.P2POp(dist.isend, held, (rank + 1) % world),
                dist.P2POp(dist.irecv, coming, (rank - 1) % world),
            ]
            waiting, sent = dist.batch_isend_irecv(operations), sent + held.nbytes
        parts.append(attention(q, held[0], held[1], causal=False))
        for work in waiting:
            work.wait()
        if waiting:
            held = coming
    return merge_attention(*zip(*parts, strict=True))[0], sent


def _timed(step: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def draw(outcome: Outcome) -> Figure:
    """Bytes and time of a decoding step against the length of the context."""
    figure, axes = panels(2)
    series = outcome.series
    worlds = [world for world in (2, 4) if f"tree bytes, {world} processes" in series]
    for axis, quantity, unit in zip(axes, ("bytes", "seconds"), (1, 1e3), strict=True):
        for way, colour in zip(("ring", "tree"), COLOURS, strict=False):
            for world in worlds:
                values = [unit * value for value in series[f"{way} {quantity}, {world} processes"]]
                label, dashes = f"{way}, {world} processes", "-" if world == 2 else "--"
                axis.loglog(series["tokens"], values, dashes, marker="o", color=colour, label=label, base=2)
        axis.set_xlabel("tokens in the context")
        axis.legend()
    axes[0].set(title="Sent by a rank for one token", ylabel="bytes")
    axes[1].set(title="Time of a decoding step", ylabel="milliseconds (median of 9)")
    axes[0].set_yscale("log", base=10)
    axes[1].set_yscale("log", base=10)
    return figure
