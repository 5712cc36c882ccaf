"""Selective attention: compiled tiles and PyTorch blocks against what users have, and against plain causal attention.

The limit is one causal `scaled_dot_product_attention`, which does everything but the selection. The alternative is
the eager form on whole time x time matrices, as the known implementations have it. Compiled flex_attention can't
express the technique: what it adds to one head's logit depends on another head's logits of all earlier queries, which
a score function of one element doesn't see; precomputed, they are a time x time tensor. Tables: forward; forward and
backward; growth with the length (the eager form only where its matrices fit); decoding, 64 single queries over a cache,
full and pruned to an eighth. The last column is the largest difference from the float64 form, relative to its largest
value.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from harness import Candidate, Measurement, measure, parser, report, use_threads
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlreviews_kernels import use_backend
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.selective_attention import selective_attention

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
STEPS = 64  # of decoding


def data(time: int, heads: int, dim: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, time, heads, dim, generator=generator)
    return q, k, v


def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return selective_attention(q, k, v)[0]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The paper's listing on whole matrices."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    time = q.shape[2]
    logits = q @ k.mT * q.shape[3] ** -0.5
    logits = logits.masked_fill(~torch.ones(time, time, dtype=torch.bool).tril(), -math.inf)
    S = logits[:, 0].relu().tril(-1)
    S = torch.cat([torch.zeros_like(S[..., :1]), S[..., 1:]], -1)
    F = torch.cat([torch.zeros_like(S[:, :1]), S[:, :-1]], 1).cumsum(1)
    return ((logits - F[:, None]).softmax(-1) @ v).transpose(1, 2)


def forward(inputs: Inputs, attention: Attention) -> Tensor:
    with torch.no_grad():
        return attention(*inputs)


def backward(inputs: Inputs, attention: Attention) -> Tensor:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = attention(*leaves)
    out.backward(torch.ones_like(out))
    return out.detach()


def vectorised(inputs: Inputs, run: Callable[[Inputs, Attention], Tensor]) -> Tensor:
    with without_compiled_code():
        return run(inputs, compiled)


def candidates(shape: tuple[int, int, int], backwards: bool, slow: bool) -> list[Candidate]:
    make = partial(data, *shape)
    run = backward if backwards else forward
    whole = [Candidate("eager, time x time", run, (eager,), make)] if slow else []
    return [
        Candidate("compiled", run, (compiled,), make),
        Candidate("vectorised", vectorised, (run,), make),
        *whole,
        Candidate("causal SDPA", run, (causal,), make),
    ]


def errors(found: list[Measurement], shape: tuple[int, int, int]) -> None:
    with use_backend("cpu"):
        exact = compiled(*(t.double() for t in data(*shape)))
    for measurement in found[:-1]:
        measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()
    found[-1].notes["error"] = float("nan")  # it computes something else


def decode(inputs: Inputs, kept: int) -> Tensor:
    """Single queries over the newest `kept` keys of a cache, which is as large as that whichever keys are kept."""
    q, k, v = inputs
    k, v = (x[:, -kept:].contiguous() for x in (k, v))
    selection = torch.zeros(1, kept - 1)
    with torch.no_grad():
        for step in range(STEPS):
            out, selected = selective_attention(q[:, step : step + 1], k, v, initial_selection=selection)
            selection = selected[:, 1:]
    return out


def decode_causal(inputs: Inputs) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    with torch.no_grad():
        for step in range(STEPS):
            out = scaled_dot_product_attention(q[:, :, step : step + 1], k, v)
    return out


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    quick = arguments.quick
    shape = (256, 4, 32) if quick else (2048, 8, 64)
    rounds = arguments.rounds or (3 if quick else 7)
    suffix = f"_{torch.get_num_threads()}_threads"
    names = ("time", "heads", "dim")
    for name, backwards in (("forward", False), ("backward", True)):
        found = measure(candidates(shape, backwards, slow=True), rounds=rounds, memory=not quick)
        errors(found, shape)
        report(f"selective_attention_{name}{suffix}", found, arguments, settings=dict(zip(names, shape, strict=True)))
    for time in (128, 512) if quick else (2048, 8192, 16384):
        long = (time, 2, 64)
        found = measure(candidates(long, backwards=True, slow=time <= 8192), rounds=1, memory=not quick)
        report(
            f"selective_attention_growth_{time}{suffix}", found, arguments, settings=dict(zip(names, long, strict=True))
        )
    for time in (256,) if quick else (2048, 8192):
        make = partial(data, time, 8, 64)
        cached = [
            Candidate("full cache", decode, (time,), make),
            Candidate("cache of an eighth", decode, (time // 8,), make),
            Candidate("SDPA, full cache", decode_causal, (), make),
        ]
        found = measure(cached, rounds=rounds, memory=False)
        for measurement in found:
            measurement.notes["tokens/s"] = STEPS / measurement.median
        settings = {"cache": time, "heads": 8, "dim": 64, "steps": STEPS}
        report(f"selective_attention_decoding_{time}{suffix}", found, arguments, settings=settings)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
