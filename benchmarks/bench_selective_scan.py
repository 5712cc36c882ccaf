"""The selective scan of Mamba: compiled loops and vectorised PyTorch against what users have.

The limits of the forward: one `torch.exp` for every token, channel and state, in pieces that stay in the cache
("torch.exp"), and the compiled loop with nothing but its own exponentials left ("exponentials"). The alternatives: the
parallel scan of mambapy (the extra `peers`), and a loop over time as transformers has it without its CUDA kernels.

Tables: forward; forward and backward; growth with the length; decoding, where "transformers" is its whole Mamba layer,
one token at a time with a cache, and "block" the same layer of this project with the same weights.
The last column is the largest difference from the recurrence in float64, relative to its largest value.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from harness import Candidate, Measurement, lengths, measure, parser, report, use_threads
from torch import Tensor

from mlreviews_kernels import use_backend
from mlreviews_kernels.compiled import load, pointer, without_compiled_code
from mlreviews_kernels.selective_scan import selective_scan

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
TOKENS = 64  # that are decoded


def data(batch: int, time: int, channels: int, states: int) -> Inputs:
    """u, delta, A, B, C; step sizes up to 0.1, rates of S4D-Real."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, time, channels, generator=generator)
    delta = torch.rand(batch, time, channels, generator=generator) * 0.1
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    B, C = torch.randn(2, batch, time, states, generator=generator)
    return u, delta, A, B, C


def compiled(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return selective_scan(u, delta, A, B, C)[0]


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    decay = torch.exp(delta[..., None] * A)
    entering = (delta * u)[..., None] * B[:, :, None]
    h, outputs = torch.zeros_like(decay[:, 0]), []
    # indexing by time would make backward quadratic
    for decay_t, entering_t, C_t in zip(decay.unbind(1), entering.unbind(1), C.unbind(1), strict=True):
        h = decay_t * h + entering_t
        outputs.append((h @ C_t[..., None])[..., 0])
    return torch.stack(outputs, 1)


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    h = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])
    return (h @ C[..., None])[..., 0]


def torch_exp(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    x, out = torch.full((2**16,), -0.1), torch.empty(2**16)
    for _ in range(u.numel() * A.shape[1] // x.numel()):
        torch.exp(x, out=out)
    return out


def exponentials(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    library = load(Path(__file__).with_name("exponentials.cpp"))
    out = torch.empty_like(delta)
    if library is not None:
        sizes = (delta.shape[0] * delta.shape[1], *A.shape)
        library.exponentials(
            *map(pointer, (delta, A, out)), *map(ctypes.c_int64, sizes), ctypes.c_int(torch.get_num_threads())
        )
    return out


def forward(inputs: Inputs, scan: Scan) -> Tensor:
    with torch.no_grad():
        return scan(*inputs)


def backward(inputs: Inputs, scan: Scan) -> Tensor:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = scan(*leaves)
    out.backward(torch.ones_like(out))
    return out.detach()


def vectorised(inputs: Inputs, run: Callable[[Inputs, Scan], Tensor]) -> Tensor:
    with without_compiled_code():
        return run(inputs, compiled)


def candidates(
    shape: tuple[int, int, int, int], run: Callable[[Inputs, Scan], Tensor], *, peers: bool
) -> list[Candidate]:
    make = partial(data, *shape)
    found = [Candidate("compiled", run, (compiled,), make), Candidate("vectorised", vectorised, (run,), make)]
    if peers:
        found.append(Candidate("loop", run, (loop,), make))
        if util.find_spec("mambapy") is not None:
            found.append(Candidate(f"mambapy {metadata.version('mambapy')}", run, (mambapy,), make))
    limits = {"exponentials": exponentials, "torch.exp": torch_exp}
    return found + [Candidate(name, forward, (scan,), make) for name, scan in limits.items()]


def errors(found: list[Measurement], shape: tuple[int, int, int, int]) -> None:
    with use_backend("cpu"):
        exact, _ = selective_scan(*(x.double() for x in data(*shape)))
    for measurement in found[:-2]:
        measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()
    found[-1].notes["error"] = 0.0


def layers() -> tuple[Any, Any]:
    """The Mamba layer of mamba-130m, of this project and of transformers, with the same weights."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    from mlreviews.ssm import MambaBlock

    torch.manual_seed(0)
    mixer = MambaMixer(MambaConfig(hidden_size=768, num_hidden_layers=1, vocab_size=8), 0)
    block = MambaBlock(768)
    block.load_state_dict(mixer.state_dict())
    return block, mixer


@torch.no_grad()
def decode_block(pair: tuple[Any, Any]) -> Tensor:
    x, state, out = torch.randn(TOKENS, 1, 768, generator=torch.Generator().manual_seed(1)), None, []
    for token in x:
        y, state = pair[0].step(token, state)
        out.append(y)
    return torch.stack(out, 1)


@torch.no_grad()
def decode_transformers(pair: tuple[Any, Any]) -> Tensor:
    from transformers import DynamicCache, MambaConfig

    cache = DynamicCache(config=MambaConfig(hidden_size=768, num_hidden_layers=1, vocab_size=8))
    x = torch.randn(TOKENS, 1, 768, generator=torch.Generator().manual_seed(1))
    return torch.cat([pair[1](token[:, None], cache_params=cache) for token in x], 1)


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    shape = (1, 256, 64, 16) if arguments.quick else (1, 2048, 1536, 16)
    axes = ("batch", "time", "channels", "states")
    suffix = f"_{torch.get_num_threads()}_threads"
    for name, run in (("forward", forward), ("backward", backward)):
        found = measure(candidates(shape, run, peers=True), rounds=arguments.rounds or 3)
        errors(found, shape)
        settings = dict(zip(axes, shape, strict=True)) | {"mambapy": bool(util.find_spec("mambapy"))}
        report(f"selective_scan_{name}{suffix}", found, arguments, settings=settings)
    for time in lengths(arguments):
        long = (1, time, shape[2] // 6 * 2, shape[3])
        found = measure(candidates(long, backward, peers=False), rounds=arguments.rounds or 3)
        errors(found, long)
        settings = dict(zip(axes, long, strict=True))
        report(f"selective_scan_growth_{time}{suffix}", found, arguments, settings=settings)
    if util.find_spec("transformers") is None:
        return
    decoders = (("block", decode_block), ("transformers", decode_transformers))
    found = measure([Candidate(name, decode, (), layers) for name, decode in decoders], rounds=arguments.rounds or 5)
    torch.testing.assert_close(found[0].result, found[1].result)
    for measurement in found:
        measurement.notes["tokens/s"] = TOKENS / measurement.median
    settings = {"tokens": TOKENS, "d_model": 768, "batch": 1, "transformers": metadata.version("transformers")}
    report(f"selective_scan_decode{suffix}", found, arguments, settings=settings)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
