"""Linear recurrence h_t = a_t h_{t-1} + b_t: compiled loop and vectorised PyTorch against what users have.

The limit is `a + b`, which reads and writes the same bytes. The alternatives: a loop over time, the scan by doubling
(log2(time) passes over everything) and the scan in log space by two cumulative sums (Heinsen 2023), which takes
positive numbers only. Tables: forward; forward and backward; growth with the length.
The last column is the largest difference from the recurrence in float64, relative to its largest value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from harness import Candidate, Measurement, lengths, measure, parser, report, use_threads
from torch import Tensor

from mlreviews_kernels import use_backend
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.linear_scan import linear_scan

Scan = Callable[[Tensor, Tensor], Tensor]


def data(batch: int, time: int, channels: int) -> tuple[Tensor, Tensor]:
    """Positive numbers, so that the log-space scan can take part."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(batch, time, channels, generator=generator)
    return a, torch.rand(batch, time, channels, generator=generator)


def compiled(a: Tensor, b: Tensor) -> Tensor:
    return linear_scan(a, b)[0]


def vectorised(a: Tensor, b: Tensor) -> Tensor:
    with without_compiled_code():
        return linear_scan(a, b)[0]


def vectorised_backward(inputs: tuple[Tensor, Tensor]) -> Tensor:
    with without_compiled_code():
        return backward(inputs, compiled)


def loop(a: Tensor, b: Tensor) -> Tensor:
    h, states = torch.zeros_like(b[:, 0]), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):  # indexing would make backward quadratic in time
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, 1)


def doubling(a: Tensor, b: Tensor) -> Tensor:
    """Every step composes each position with the one `span` before it."""
    span = 1
    while span < a.shape[1]:
        b = torch.cat([b[:, :span], torch.addcmul(b[:, span:], a[:, span:], b[:, :-span])], 1)
        a = torch.cat([a[:, :span], a[:, span:] * a[:, :-span]], 1)
        span *= 2
    return b


def heinsen(a: Tensor, b: Tensor) -> Tensor:
    """exp(A + logcumsumexp(log b - A)) with A = cumsum(log a)."""
    total = a.log().cumsum(1)
    return (total + (b.log() - total).logcumsumexp(1)).exp()


def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def forward(inputs: tuple[Tensor, Tensor], scan: Scan) -> Tensor:
    with torch.no_grad():
        return scan(*inputs)


def backward(inputs: tuple[Tensor, Tensor], scan: Scan) -> Tensor:
    a, b = (x.detach().requires_grad_() for x in inputs)
    out = scan(a, b)
    out.backward(torch.ones_like(out))
    return out.detach()


def candidates(shape: tuple[int, int, int], backwards: bool, slow: bool) -> list[Candidate]:
    make = partial(data, *shape)
    run = backward if backwards else forward
    scans: dict[str, Scan] = {
        "compiled": compiled,
        "vectorised": vectorised,
        "doubling": doubling,
        "log space": heinsen,
    }
    if slow:
        scans["loop"] = loop
    found = [Candidate(name, run, (scan,), make) for name, scan in scans.items()]
    if backwards:  # its backward would use the compiled loop outside the block
        found[1] = Candidate("vectorised", vectorised_backward, (), make)
    return [*found, Candidate("a + b", run, (add,), make)]


def errors(found: list[Measurement], shape: tuple[int, int, int]) -> None:
    with use_backend("cpu"):
        exact, _ = linear_scan(*(x.double() for x in data(*shape)))
    for measurement in found[:-1]:
        measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()
    found[-1].notes["error"] = 0.0


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    shape = (2, 512, 64) if arguments.quick else (4, 4096, 512)
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    suffix = f"_{torch.get_num_threads()}_threads"
    sizes = dict(zip(("batch", "time", "channels"), shape, strict=True))
    for name, backwards in (("forward", False), ("backward", True)):
        found = measure(candidates(shape, backwards, slow=True), rounds=rounds)
        errors(found, shape)
        report(f"linear_scan_{name}{suffix}", found, arguments, settings=sizes)
    for time in lengths(arguments):
        long = (1, time, 64)
        found = measure(candidates(long, backwards=True, slow=False), rounds=rounds)
        errors(found, long)
        settings = dict(zip(("batch", "time", "channels"), long, strict=True))
        report(f"linear_scan_growth_{time}{suffix}", found, arguments, settings=settings)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
