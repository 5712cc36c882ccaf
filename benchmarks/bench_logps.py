"""Log-probabilities of answers from hidden states: tiles of the vocabulary against logits that are held in full.

The plain form is logits, log_softmax and gather (last row). Beside it: the gathered logit minus logsumexp, of full
logits; torch's own `linear_cross_entropy` in chunks of tokens; trl's projection in chunks of the vocabulary. Tables,
for vocabularies of 32k and 128k: forward; forward and backward with the head trained; the same with the head frozen, as
under adapters. A quarter of the tokens are the prompt's, which all but the forms with full logits leave out. The last
column is the largest difference of an answer's log-probability from float64.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from functools import partial

import torch
from harness import Candidate, Measurement, measure, parser, report, use_threads
from torch import Tensor
from torch.nn import functional as F

from mlreviews.preference import linear_sequence_logps, sequence_logps

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Logps = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def data(batch: int, time: int, dim: int, vocab: int) -> Inputs:
    """Hidden states, head, labels, and a mask that leaves a quarter to the prompt."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, time, dim, generator=generator)
    weight = torch.randn(vocab, dim, generator=generator) / dim**0.5
    labels = torch.randint(vocab, (batch, time), generator=generator)
    return hidden, weight, labels, (torch.arange(time) >= time // 4).expand(batch, time)


def tiles(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, chunk: int | None = None) -> Tensor:
    return linear_sequence_logps(hidden, weight, labels, mask, chunk=chunk)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logps = (hidden @ weight.mT).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return (logps * mask).sum(1)


def normalised(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return sequence_logps(hidden @ weight.mT, labels, mask)


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(hidden[mask], weight, labels[mask], reduction="none", options=options)
    return losses.new_zeros(mask.shape).masked_scatter(mask, -losses).sum(1)


def trls(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    chunked = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    found = chunked.apply(hidden[mask], weight, None, labels[mask], 1.0, 32768, None, 1.0, ("log_probs",))[0]
    return found.new_zeros(mask.shape).masked_scatter(mask, found).sum(1)


def forward(inputs: Inputs, logps: Logps) -> Tensor:
    with torch.no_grad():
        return logps(*inputs)


def backward(inputs: Inputs, logps: Logps, frozen: bool) -> Tensor:
    hidden, weight, labels, mask = inputs
    found = logps(hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen), labels, mask)
    found.backward(torch.linspace(-1, 1, len(found)))  # each answer has its own weight, as in a loss of pairs
    return found.detach()


def candidates(shape: tuple[int, int, int, int], run: Callable[[Inputs, Logps], Tensor]) -> list[Candidate]:
    forms: dict[str, Logps] = {"tiles": tiles, "tiles of 8192": partial(tiles, chunk=8192)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        forms["torch, chunks of tokens"] = torchs
    try:
        importlib.import_module("trl.kernels.chunked_logprob")
        forms["trl, chunks of 32768"] = trls
    except ImportError:
        pass
    forms |= {"gather - logsumexp": normalised, "log_softmax, gather": plain}
    return [Candidate(name, run, (form,), partial(data, *shape)) for name, form in forms.items()]


def errors(found: list[Measurement], shape: tuple[int, int, int, int]) -> None:
    hidden, weight, labels, mask = data(*shape)
    exact = plain(hidden.double(), weight.double(), labels, mask)
    for measurement in found:
        measurement.notes["error"] = (measurement.result - exact).abs().max().item()


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    suffix = f"_{torch.get_num_threads()}_threads"
    kinds: dict[str, Callable[[Inputs, Logps], Tensor]] = {
        "forward": forward,
        "trained": partial(backward, frozen=False),
        "frozen": partial(backward, frozen=True),
    }
    for vocab in (2**12, 2**13) if arguments.quick else (2**15, 2**17):
        shape = (2, 64, 64, vocab) if arguments.quick else (4, 256, 512, vocab)
        for kind, run in kinds.items():
            found = measure(candidates(shape, run), rounds=rounds, memory=not arguments.quick)
            errors(found, shape)
            settings = dict(zip(("answers", "tokens", "dim", "vocabulary"), shape, strict=True)) | {"head": kind}
            report(f"logps_{vocab}_{kind}{suffix}", found, arguments, settings=settings)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
