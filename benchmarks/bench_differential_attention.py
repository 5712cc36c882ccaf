"""Differential attention: compiled and vectorised, against compositions of scaled_dot_product_attention.

The compositions: two calls, which v wider than k takes off torch's flash path on the CPU; four calls on halves of v;
two calls with q and k padded to v's width; two of compiled flex_attention (forward only); and two softmaxes with all
scores at once. Tables: forward; forward and backward; growth of time and memory with the length. The last column is the
largest difference from the vectorised form in float64, relative to its largest value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from flex import flex
from harness import Candidate, Measurement, measure, parser, report, use_threads
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.differential_attention import differential_attention

Inputs = tuple[Tensor, ...]
Attention = Callable[..., Tensor]


def data(time: int, heads: int, dim: int) -> Inputs:
    """q1, k1, q2, k2, v twice as wide, and lambda for each head."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(4, 1, time, heads, dim, generator=generator)
    v = torch.randn(1, time, heads, 2 * dim, generator=generator)
    return *keys, v, torch.rand(heads, generator=generator)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=scale)
    return out.transpose(1, 2)


def two_calls(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    return sdpa(q1, k1, v) - lam[:, None] * sdpa(q2, k2, v)


def four_calls(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    return torch.cat([two_calls(q1, k1, q2, k2, half, lam) for half in v.chunk(2, -1)], -1)


def padded(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    dim = q1.shape[3]
    q1, k1, q2, k2 = (pad(x, (0, v.shape[3] - dim)) for x in (q1, k1, q2, k2))
    return sdpa(q1, k1, v, dim**-0.5) - lam[:, None] * sdpa(q2, k2, v, dim**-0.5)


def two_flex_calls(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    return flex(q1, k1, v) - lam[:, None] * flex(q2, k2, v)


def eager(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    above = ~torch.ones(q1.shape[1], k1.shape[1], dtype=torch.bool).tril()

    def softmax(q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5
        return scores.masked_fill(above, float("-inf")).softmax(-1)

    return torch.einsum("bhij,bjhd->bihd", softmax(q1, k1) - lam[:, None, None] * softmax(q2, k2), v)


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
        return run(inputs, differential_attention)


def candidates(shape: tuple[int, int, int], backwards: bool, slow: bool) -> list[Candidate]:
    make, run = partial(data, *shape), backward if backwards else forward
    return [
        Candidate("compiled", run, (differential_attention,), make),
        Candidate("vectorised", vectorised, (run,), make),
        *([Candidate("eager softmaxes", run, (eager,), make)] if slow else []),
        *([Candidate("two calls", run, (two_calls,), make)] if slow else []),
        Candidate("four calls on halves of v", run, (four_calls,), make),
        *([] if backwards else [Candidate("two calls of flex_attention", run, (two_flex_calls,), make)]),
        Candidate("two calls, q and k padded", run, (padded,), make),
    ]


def errors(found: list[Measurement], shape: tuple[int, int, int]) -> None:
    with torch.no_grad():
        exact = differential_attention(*(x.double() for x in data(*shape)))
    for measurement in found:
        measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    suffix = f"_{torch.get_num_threads()}_threads"

    def table(name: str, shape: tuple[int, int, int], backwards: bool, rounds: int, slow: bool = True) -> None:
        rounds = arguments.rounds or (3 if arguments.quick else rounds)
        found = measure(candidates(shape, backwards, slow), rounds=rounds, memory=not arguments.quick)
        errors(found, shape)
        settings = dict(zip(("time", "heads", "dim"), shape, strict=True))
        report(f"differential_attention_{name}{suffix}", found, arguments, settings=settings)

    time = 256 if arguments.quick else 2048
    for name, backwards in (("forward", False), ("backward", True)):
        table(name, (time, 4, 64), backwards, 7)
    for time in (128, 512) if arguments.quick else (2048, 8192, 16384):
        table(f"growth_{time}", (time, 1, 64), True, 3, slow=time <= 2048)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
