"""State-space duality (Mamba-2's scan): compiled chunks and vectorised PyTorch against what users have.

The limit is the bare matrix products of the chunked algorithm (chunks of 64, B and C shared by the heads), in as few
calls of torch.bmm as there are kinds of them; with backward, theirs under autograd. The alternatives: the minimal
listing of the Mamba-2 paper (arXiv:2405.21060, listing 1), written anew from the algorithm, with B and C repeated for
every head; and the masked attention form, quadratic in time. Tables: forward; forward and backward; growth with the
length. The last column is the largest difference from the vectorised form in float64, relative to its largest value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from harness import Candidate, Measurement, lengths, measure, parser, report, use_threads
from torch import Tensor
from torch.nn.functional import pad

from mlreviews_kernels import use_backend
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.ssd import ssd

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Scan = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CHUNK = 64


def data(time: int, heads: int, dim: int, state: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, time, heads, dim, generator=generator)
    log_a = -torch.rand(1, time, heads, generator=generator) / 5
    B, C = torch.randn(2, 1, time, 1, state, generator=generator)
    return x, log_a, B, C


def compiled(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return ssd(x, log_a, B, C, chunk_size=CHUNK)[0]


def segment_sums(values: Tensor) -> Tensor:
    """sum of values[j + 1 : i + 1] at [i, j], -inf above the diagonal."""
    size = values.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool).tril(-1)
    sums = values[..., None].expand(*values.shape, size).masked_fill(~below, 0.0).cumsum(-2)
    return sums.masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(), float("-inf"))


def minimal(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The algorithm of listing 1 in four contractions."""
    heads = x.shape[2]
    x, log_a, B, C = (t.unflatten(1, (-1, CHUNK)) for t in (x, log_a, B, C))
    B, C = (t.expand(*t.shape[:3], heads, t.shape[-1]).contiguous() for t in (B, C))
    log_a = log_a.permute(0, 3, 1, 2)  # batch, heads, chunks, time
    total = log_a.cumsum(-1)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segment_sums(log_a).exp(), x)
    added = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (total[..., -1:] - total).exp(), x)
    states = torch.cat([torch.zeros_like(added[:, :1]), added], 1)
    between = segment_sums(pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    return (inside + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, total.exp())).flatten(1, 2)


def attention(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The quadratic form: (L o C B^T) X."""
    M = (C[:, :, 0] @ B[:, :, 0].mT)[:, None] * segment_sums(log_a.mT).exp()
    return (M @ x.transpose(1, 2)).transpose(1, 2)


def products(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The chunked algorithm's matrix products with nothing in between."""
    _, time, heads, dim = x.shape
    B, C = (t.reshape(time // CHUNK, CHUNK, -1) for t in (B, C))
    wide = x.reshape(time // CHUNK, CHUNK, heads * dim)
    by_head = x.reshape(time // CHUNK, CHUNK, heads, dim).transpose(1, 2).reshape(-1, CHUNK, dim)
    scores = C @ B.mT
    inside = scores.repeat_interleave(heads, 0) @ by_head
    return (C @ (B.mT @ wide)).reshape(x.shape) + inside.reshape(x.shape)


def forward(inputs: Inputs, scan: Scan) -> Tensor:
    with torch.no_grad():
        return scan(*inputs)


def backward(inputs: Inputs, scan: Scan) -> Tensor:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = scan(*leaves)
    out.backward(torch.ones_like(out))
    return out.detach()


def vectorised(inputs: Inputs, run: Callable[[Inputs, Scan], Tensor]) -> Tensor:
    with without_compiled_code():
        return run(inputs, compiled)


def candidates(shape: tuple[int, int, int, int], backwards: bool, slow: bool) -> list[Candidate]:
    make = partial(data, *shape)
    run = backward if backwards else forward
    scans: dict[str, Scan] = {"minimal listing": minimal}
    if slow:
        scans["masked attention"] = attention
    return [
        Candidate("compiled", run, (compiled,), make),
        Candidate("vectorised", vectorised, (run,), make),
        *(Candidate(name, run, (scan,), make) for name, scan in scans.items()),
        Candidate("matrix products", run, (products,), make),
    ]


def errors(found: list[Measurement], shape: tuple[int, int, int, int]) -> None:
    with use_backend("cpu"):
        exact = compiled(*(t.double() for t in data(*shape)))
    for measurement in found[:-1]:
        measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()
    found[-1].notes["error"] = float("nan")  # it computes something else


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    shape = (256, 4, 16, 32) if arguments.quick else (2048, 24, 64, 128)
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    suffix = f"_{torch.get_num_threads()}_threads"
    names = ("time", "heads", "dim", "state")
    for name, backwards in (("forward", False), ("backward", True)):
        found = measure(candidates(shape, backwards, slow=True), rounds=rounds, memory=not arguments.quick)
        errors(found, shape)
        report(f"ssd_{name}{suffix}", found, arguments, settings=dict(zip(names, shape, strict=True)))
    for time in lengths(arguments):
        long = (time, 4, 64, 64)
        found = measure(candidates(long, backwards=True, slow=False), rounds=3, memory=not arguments.quick)
        errors(found, long)
        report(f"ssd_growth_{time}{suffix}", found, arguments, settings=dict(zip(names, long, strict=True)))


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
