"""Attention with an adaptive temperature: compiled and vectorised, against the listing with all scores at once.

Tables: forward; forward and backward; growth of time and memory with the length. The last line, two calls of
scaled_dot_product_attention, is what two sweeps over the keys cost that don't compute an entropy. The last column is
the largest difference from the vectorised form in float64, relative to its largest value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from harness import Candidate, Measurement, measure, parser, report, use_threads
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlreviews_kernels.adaptive_temperature_attention import COEFFICIENTS, adaptive_temperature_attention
from mlreviews_kernels.compiled import without_compiled_code

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int]
TWICE = "scaled_dot_product_attention, twice"


def data(time: int, heads: int, dim: int) -> Inputs:
    """Scores with a standard deviation of 2: about half of the queries are sharpened."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, time, heads, dim, generator=generator)
    return 2 * q, k, v


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return adaptive_temperature_attention(q, k, v)[0]


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5
    hidden = ~torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    entropy = -(p * torch.log(p + 1e-9)).sum(-1, keepdim=True)
    beta = torch.zeros_like(entropy)
    for coefficient in COEFFICIENTS:
        beta = beta * entropy + coefficient
    beta = torch.where(entropy > 0.5, beta.clamp(min=1.0), 1.0)
    weights = (beta * scores).masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out = sum(scaled_dot_product_attention(*heads_first, is_causal=True) for _ in range(2))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


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
        *([Candidate("eager listing", run, (eager,), make)] if slow else []),
        Candidate(TWICE, run, (twice,), make),
    ]


def errors(found: list[Measurement], shape: Shape) -> None:
    with torch.no_grad():
        exact = ours(*(x.double() for x in data(*shape)))
    for measurement in found:
        if measurement.name != TWICE:
            measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    suffix = f"_{torch.get_num_threads()}_threads"

    def table(name: str, shape: Shape, backwards: bool, rounds: int, slow: bool = True) -> None:
        rounds = arguments.rounds or (3 if arguments.quick else rounds)
        found = measure(candidates(shape, backwards, slow), rounds=rounds, memory=not arguments.quick)
        errors(found, shape)
        settings = dict(zip(("time", "heads", "dim"), shape, strict=True))
        report(f"adaptive_temperature_attention_{name}{suffix}", found, arguments, settings=settings)

    time = 256 if arguments.quick else 2048
    for name, backwards in (("forward", False), ("backward", True)):
        table(name, (time, 8, 64), backwards, 5)
    for time in () if arguments.no_growth else (128, 512) if arguments.quick else (2048, 8192, 16384):
        table(f"growth_{time}", (time, 1, 64), True, 3, slow=time <= 8192)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
