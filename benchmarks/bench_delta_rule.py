"""The delta rule: compiled chunks and vectorised PyTorch against the loop over time that users have.

The limit is the bare matrix products of the dual form (chunks of 64), in as few calls of torch.bmm as there are kinds
of them. The alternatives on a CPU: the loop over steps, and, for mini-batches of 16 (TTT-Linear), the loop over
mini-batches in their dual form. Tables: forward; forward and backward, for mini-batches of 1 and 16; growth with the
length. The last column is the largest difference from the vectorised form in float64, relative to its largest value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from harness import Candidate, Measurement, lengths, measure, parser, report, use_threads
from torch import Tensor
from torch.nn.functional import normalize

from mlreviews_kernels import use_backend
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.delta_rule import delta_rule

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CHUNK = 64


def data(time: int, heads: int, dim: int, mini_batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, time, heads, dim, generator=generator)
    return q, normalize(k, dim=-1), v, torch.rand(1, time, heads, generator=generator) / mini_batch**0.5


def compiled(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, mini_batch: int) -> Tensor:
    return delta_rule(q, k, v, beta, mini_batch=mini_batch, chunk_size=CHUNK)[0]


def loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """Step by step."""
    state, outputs = q.new_zeros(*q.shape[::2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[1]):
        key = k[:, t, :, :, None]
        error = v[:, t, :, None] - key.mT @ state
        state = state + beta[:, t, :, None, None] * key @ error
        outputs.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, 1)


def mini_batches(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, mini_batch: int) -> Tensor:
    """The dual form of TTT-Linear, one mini-batch after another."""
    q, k, v, beta = (t.transpose(1, 2) for t in (q, k, v, beta[..., None]))
    state, outputs = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(0, q.shape[2], mini_batch):
        Q, K, V, rate = (x[:, :, t : t + mini_batch] for x in (q, k, v, beta))
        update = rate * (V - K @ state)
        outputs.append(Q @ state + (Q @ K.mT).tril() @ update)
        state = state + K.mT @ update
    return torch.cat(outputs, 2).transpose(1, 2)


def products(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The dual form's matrix products with nothing in between."""
    Q, K, V = (x[0].unflatten(0, (-1, CHUNK)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    state = K.mT @ V
    return Q @ state + (Q @ K.mT) @ (K @ state) + (K @ K.mT) @ V


def forward(inputs: Inputs, rule: Rule) -> Tensor:
    with torch.no_grad():
        return rule(*inputs)


def backward(inputs: Inputs, rule: Rule) -> Tensor:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = rule(*leaves)
    out.backward(torch.ones_like(out))
    return out.detach()


def vectorised(inputs: Inputs, run: Callable[[Inputs, Rule], Tensor], mini_batch: int) -> Tensor:
    with without_compiled_code():
        return run(inputs, partial(compiled, mini_batch=mini_batch))


def candidates(shape: tuple[int, int, int], mini_batch: int, backwards: bool, slow: bool) -> list[Candidate]:
    make = partial(data, *shape, mini_batch)
    run = backward if backwards else forward
    rules: dict[str, Rule] = {}
    if mini_batch > 1:
        rules["loop over mini-batches"] = partial(mini_batches, mini_batch=mini_batch)
    elif slow:
        rules["loop"] = loop
    return [
        Candidate("compiled", run, (partial(compiled, mini_batch=mini_batch),), make),
        Candidate("vectorised", vectorised, (run, mini_batch), make),
        *(Candidate(name, run, (rule,), make) for name, rule in rules.items()),
        Candidate("matrix products", run, (products,), make),
    ]


def errors(found: list[Measurement], shape: tuple[int, int, int], mini_batch: int) -> None:
    with use_backend("cpu"):
        exact = compiled(*(t.double() for t in data(*shape, mini_batch)), mini_batch)
    for measurement in found[:-1]:
        measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()
    found[-1].notes["error"] = float("nan")  # it computes something else


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    shape = (256, 2, 32) if arguments.quick else (2048, 12, 64)
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    suffix = f"_{torch.get_num_threads()}_threads"
    names = ("time", "heads", "dim", "mini-batch")
    for mini_batch in (1, 16):
        for name, backwards in (("forward", False), ("backward", True)):
            found = measure(
                candidates(shape, mini_batch, backwards, slow=True), rounds=rounds, memory=not arguments.quick
            )
            errors(found, shape, mini_batch)
            settings = dict(zip(names, (*shape, mini_batch), strict=True))
            report(f"delta_rule_{mini_batch}_{name}{suffix}", found, arguments, settings=settings)
    for time in lengths(arguments):
        long = (time, 2, 64)
        found = measure(candidates(long, 1, backwards=True, slow=False), rounds=3, memory=not arguments.quick)
        errors(found, long, 1)
        settings = dict(zip(names, (*long, 1), strict=True))
        report(f"delta_rule_growth_{time}{suffix}", found, arguments, settings=settings)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
