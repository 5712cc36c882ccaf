"""Adapters against the peft library and the bare linear layer, on 512 tokens: LoRA and FourierFT.

The limit is the bare layer, frozen: its product, and the one for the input's gradient. Each candidate takes an input
that needs a gradient, as the layers of a model do. Tables: forward; forward and backward; over the size of the layer,
and for FourierFT over the number of frequencies. The last column is the largest difference of the output from the same
adapter in float64 with its change as a dense matrix, relative to its largest value. At 2048 features MKL's complex
transform in two dimensions is wrong with several threads (pytorch issue 169670), and so is peft's FourierFT.
"""

from __future__ import annotations

import argparse
import copy
from functools import cache, partial

import torch
from harness import Candidate, Measurement, measure, parser, report, use_threads
from torch import Tensor, nn

from mlreviews.peft import FourierFTLinear, LoRALinear, trainable_parameters

TOKENS, RANK = 512, 8


@cache
def base(d: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(d, d).requires_grad_(False)


def randomised(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(layer).values():
            parameter.normal_(generator=generator).mul_(0.1)
    return layer


def plain(d: int, n: int) -> nn.Module:
    return base(d)


def ours(d: int, n: int) -> nn.Module:
    layer = copy.deepcopy(base(d))
    return randomised(FourierFTLinear(layer, n) if n else LoRALinear(layer, RANK))


def theirs(d: int, n: int) -> nn.Module:
    import peft

    config = (
        peft.FourierFTConfig(n_frequency=n, target_modules=["layer"])
        if n
        else peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["layer"])
    )
    model = peft.get_peft_model(nn.ModuleDict({"layer": copy.deepcopy(base(d))}), config)
    return randomised(model.base_model.model["layer"])


MAKERS = {"mlreviews": ours, "peft": theirs, "bare linear layer": plain}


def prepared(name: str, d: int, n: int) -> tuple[nn.Module, Tensor]:
    return MAKERS[name](d, n), torch.randn(TOKENS, d, generator=torch.Generator().manual_seed(2))


def forward(inputs: tuple[nn.Module, Tensor]) -> Tensor:
    layer, x = inputs
    with torch.no_grad():
        return layer(x)


def backward(inputs: tuple[nn.Module, Tensor]) -> Tensor:
    layer, x = inputs
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(torch.ones_like(y))
    return y.detach()


def errors(found: list[Measurement], d: int, n: int) -> None:
    layer, x = prepared("mlreviews", d, n)
    layer = layer.double()
    exact = layer.base(x.double()) + x.double() @ layer.delta_weight().mT
    for measurement in found[:-1]:
        measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()
    found[-1].notes["error"] = float("nan")  # it has no adapter


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    sizes = (128, 256) if arguments.quick else (512, 1024, 2048, 4096)
    frequencies = (100, 1000) if arguments.quick else (100, 1000, 10000)
    rounds = arguments.rounds or (3 if arguments.quick else 9)
    suffix = f"_{torch.get_num_threads()}_threads"
    for n in (0, *frequencies):
        method, more = (f"fourierft_{n}", {"frequencies": n}) if n else ("lora", {"rank": RANK})
        for d in sizes:
            for run in (forward, backward):
                candidates = [Candidate(name, run, (), partial(prepared, name, d, n)) for name in MAKERS]
                found = measure(candidates, rounds=rounds, memory=d >= 2048)
                errors(found, d, n)
                settings = {"tokens": TOKENS, "features": d, **more}
                report(f"peft_{method}_{d}_{run.__name__}{suffix}", found, arguments, settings=settings)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
