"""Attention with its log-sum-exp: compiled and vectorised, against scaled_dot_product_attention and eager softmax.

Tables: forward; forward and backward; growth of time and memory with the length; one query over a long cache. Eager
softmax keeps all scores at once; compiled flex_attention has no backward on a CPU. The last column is the largest
difference from the vectorised form in float64, relative to its largest value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from flex import flex
from harness import Candidate, Measurement, measure, parser, report, use_threads
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlreviews_kernels import attention as core
from mlreviews_kernels.compiled import without_compiled_code

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int, int]


def data(queries: int, keys: int, heads: int, dim: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, queries, heads, dim, generator=generator)
    k, v = torch.randn(2, 1, keys, heads, dim, generator=generator)
    return q, k, v


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return core.attention(q, k, v)[0]


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = q.shape[1] > 1  # torch counts positions from the first key
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    return out.transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def forward(inputs: Inputs, function: Attention) -> Tensor:
    with torch.no_grad():
        return function(*inputs)


def backward(inputs: Inputs, function: Attention) -> Tensor:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(torch.ones_like(out))
    return out.detach()


def vectorised(inputs: Inputs, run: Callable[[Inputs, Attention], Tensor]) -> Tensor:
    with without_compiled_code():
        return run(inputs, ours)


def candidates(shape: Shape, backwards: bool, slow: bool) -> list[Candidate]:
    make, run = partial(data, *shape), backward if backwards else forward
    return [
        Candidate("compiled", run, (ours,), make),
        Candidate("vectorised", vectorised, (run,), make),
        *([Candidate("eager softmax", run, (eager,), make)] if slow else []),
        *([] if backwards else [Candidate("flex_attention, compiled", run, (flex,), make)]),
        Candidate("scaled_dot_product_attention", run, (torchs,), make),
    ]


def errors(found: list[Measurement], shape: Shape) -> None:
    with torch.no_grad():
        exact = ours(*(x.double() for x in data(*shape)))
    for measurement in found:
        measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    suffix = f"_{torch.get_num_threads()}_threads"
    names = ("queries", "keys", "heads", "dim")

    def table(name: str, shape: Shape, backwards: bool, rounds: int, slow: bool = True) -> None:
        rounds = arguments.rounds or (3 if arguments.quick else rounds)
        found = measure(candidates(shape, backwards, slow), rounds=rounds, memory=not arguments.quick)
        errors(found, shape)
        report(f"attention_{name}{suffix}", found, arguments, settings=dict(zip(names, shape, strict=True)))

    time = 256 if arguments.quick else 2048
    for name, backwards in (("forward", False), ("backward", True)):
        table(name, (time, time, 8, 64), backwards, 7)
    for time in (128, 512) if arguments.quick else (2048, 8192, 16384):
        table(f"growth_{time}", (time, time, 1, 64), True, 3, slow=time <= 8192)
    table("decode", (1, 512 if arguments.quick else 8192, 8, 64), False, 21)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
