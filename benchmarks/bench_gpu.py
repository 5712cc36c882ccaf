"""The Triton kernels of all cores on a GPU, beside what users have there.

One table a core and direction: forward; forward and backward. Times are medians of `triton.testing.do_bench` (events
on the GPU, its cache emptied before each call), repeated in rounds over all candidates; "memory" is what a call adds to
the memory allocated on the GPU. "graph" is the time in ms of a call replayed from a CUDA graph: without the time that
Python takes to launch it, and with a warm cache. Alternatives: `scaled_dot_product_attention` and compiled
flex_attention of torch, eager forms, also compiled by torch, flash-linear-attention and mamba_ssm where they are
installed. The last row is the limit: what does less than the job, or moves the same bytes. The last column is the
largest difference from our result, relative to its largest value; where a row computes something else it says nothing.

    python benchmarks/bench_gpu.py                    # all cores, bfloat16
    python benchmarks/bench_gpu.py --cores ssd attention --dtype float32
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module, util
from typing import Any

import torch
from harness import Measurement, parser, report
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import normalize, scaled_dot_product_attention

from mlreviews_kernels.adaptive_temperature_attention import COEFFICIENTS, adaptive_temperature_attention
from mlreviews_kernels.attention import attention
from mlreviews_kernels.delta_rule import delta_rule
from mlreviews_kernels.differential_attention import differential_attention
from mlreviews_kernels.linear_scan import linear_scan
from mlreviews_kernels.selective_attention import selective_attention
from mlreviews_kernels.selective_scan import selective_scan
from mlreviews_kernels.ssd import ssd
from mlreviews_kernels.tree_masked_attention import tree_masked_attention

FLA, MAMBA = util.find_spec("fla"), util.find_spec("mamba_ssm")
Inputs = dict[str, Tensor]
Function = Callable[..., Tensor]
Candidate = Function | tuple[Function, Inputs]  # with inputs of its own layout
Table = tuple[str, dict[str, int], Inputs, dict[str, Candidate]]  # name, sizes, inputs, candidates: ours first
LAM = 0.5


def draw(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(0)
    return {n: torch.randn(s, generator=generator, device="cuda").to(dtype) for n, s in shapes.items()}


def turned(*tensors: Tensor) -> Iterator[Tensor]:
    """``[batch, heads, time, dim]``."""
    return (x.transpose(1, 2) for x in tensors)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gqa = q.shape[2] != k.shape[2]
    return scaled_dot_product_attention(*turned(q, k, v), is_causal=True, enable_gqa=gqa).transpose(1, 2)


@cache
def block_mask(time: int) -> Any:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, time, time, device="cuda")


torch._dynamo.config.recompile_limit = 64  # each shape is a case of its own
flex_compiled = torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_compiled(*turned(q, k, v), block_mask=block_mask(q.shape[1])).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = turned(q, k, v)
    logits = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~lower(q.shape[2]), -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def lower(time: int) -> Tensor:
    return torch.ones(time, time, dtype=torch.bool, device="cuda").tril()


def of_attention(dtype: torch.dtype, quick: bool) -> Iterator[Table]:
    for time, heads, dim in ((256, 4, 64),) if quick else ((4096, 16, 64), (4096, 16, 128), (16384, 16, 64)):
        sizes = {"batch": 2 if time < 16384 else 1, "time": time, "heads": heads, "dim": dim}
        shape = tuple(sizes.values())
        candidates: dict[str, Candidate] = {"ours": lambda q, k, v: attention(q, k, v)[0], "flex_attention": flex}
        if time <= 4096:
            candidates["eager softmax"] = eager
        yield f"attention_{dim}_{time}", sizes, draw(dtype, q=shape, k=shape, v=shape), candidates | {"SDPA": sdpa}


def two_calls(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor) -> Tensor:
    return sdpa(q1, k1, v) - LAM * sdpa(q2, k2, v)


def four_calls(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor) -> Tensor:
    halves = v.chunk(2, -1)
    return torch.cat([sdpa(q1, k1, half) - LAM * sdpa(q2, k2, half) for half in halves], -1)


def two_flex(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor) -> Tensor:
    return flex(q1, k1, v) - LAM * flex(q2, k2, v)


def of_differential_attention(dtype: torch.dtype, quick: bool) -> Iterator[Table]:
    for time in (256,) if quick else (4096, 16384):
        sizes = {"batch": 2 if time < 16384 else 1, "time": time, "heads": 8, "dim": 64}
        narrow = tuple(sizes.values())
        inputs = draw(dtype, q1=narrow, k1=narrow, q2=narrow, k2=narrow, v=(*narrow[:3], 128))
        yield f"differential_attention_{time}", sizes, inputs, {
            "ours": lambda q1, k1, q2, k2, v: differential_attention(q1, k1, q2, k2, v, LAM),
            "flex_attention twice": two_flex,
            "SDPA on halves of v": four_calls,
            "SDPA twice": two_calls,
        }  # fmt: skip


def eager_selective(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The paper's listing on whole matrices."""
    q, k, v = turned(q, k, v)
    time = q.shape[2]
    logits = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~lower(time), -math.inf)
    S = logits[:, 0].relu().tril(-1)
    S = torch.cat([torch.zeros_like(S[..., :1]), S[..., 1:]], -1)
    F = torch.cat([torch.zeros_like(S[:, :1]), S[:, :-1]], 1).cumsum(1, dtype=torch.float32)
    return ((logits - F[:, None]).softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def of_selective_attention(dtype: torch.dtype, quick: bool) -> Iterator[Table]:
    for time in (256,) if quick else (4096, 16384):
        sizes = {"batch": 2 if time < 16384 else 1, "time": time, "heads": 16, "dim": 64}
        shape = tuple(sizes.values())
        candidates: dict[str, Candidate] = {"ours": lambda q, k, v: selective_attention(q, k, v)[0]}
        if time <= 4096:
            candidates |= {"eager": eager_selective, "eager, compiled": torch.compile(eager_selective)}
        yield f"selective_attention_{time}", sizes, draw(dtype, q=shape, k=shape, v=shape), {
            **candidates, "SDPA, not selective": sdpa
        }  # fmt: skip


def eager_adaptive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = turned(q, k, v)
    logits = (q @ k.mT * q.shape[3] ** -0.5).float().masked_fill(~lower(q.shape[2]), -math.inf)
    p = logits.softmax(-1)
    H = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
    beta = torch.zeros_like(H)
    for c in COEFFICIENTS:
        beta = beta * H + c
    beta = torch.where((H > 0.5) & (beta > 1), beta, 1.0)
    return ((beta * logits).softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def sdpa_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v) + sdpa(q, k, v)


def of_adaptive_temperature_attention(dtype: torch.dtype, quick: bool) -> Iterator[Table]:
    sizes = {"batch": 2, "time": 256 if quick else 4096, "heads": 16, "dim": 64}
    shape = tuple(sizes.values())
    yield "adaptive_temperature_attention", sizes, draw(dtype, q=shape, k=shape, v=shape), {
        "ours": lambda q, k, v: adaptive_temperature_attention(q, k, v)[0],
        "eager": eager_adaptive,
        "eager, compiled": torch.compile(eager_adaptive),
        "SDPA twice": sdpa_twice,
    }  # fmt: skip


def of_tree_masked_attention(dtype: torch.dtype, quick: bool) -> Iterator[Table]:
    sizes = {"batch": 4, "tree": 32, "context": 512 if quick else 16384, "heads": 32, "kv_heads": 8, "dim": 128}
    batch, tree, context, heads, kv_heads, dim = sizes.values()
    few, long = (batch, tree, kv_heads, dim), (batch, context, kv_heads, dim)
    inputs = draw(dtype, q=(batch, tree, heads, dim), k=few, v=few, k_cache=long, v_cache=long)
    mask = lower(tree)
    seen = torch.cat([mask.new_ones(tree, context), mask], 1)

    def ours(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return tree_masked_attention(q, k, v, mask, k_cache=k_cache, v_cache=v_cache)[0]

    def joined(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        keys, values = torch.cat([k_cache, k], 1), torch.cat([v_cache, v], 1)
        return scaled_dot_product_attention(*turned(q, keys, values), attn_mask=seen, enable_gqa=True).transpose(1, 2)

    def bytes_read(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return k_cache.sum() + v_cache.sum()

    yield "tree_masked_attention", sizes, inputs, {
        "ours": ours, "SDPA with a mask, cache and tree joined": joined, "sums of both caches": bytes_read
    }  # fmt: skip


def of_linear_scan(dtype: torch.dtype, quick: bool) -> Iterator[Table]:
    for batch, time, channels in ((2, 256, 64),) if quick else ((4, 4096, 512), (8, 4096, 2048), (1, 65536, 512)):
        sizes = {"batch": batch, "time": time, "channels": channels}
        inputs = draw(dtype, a=tuple(sizes.values()), b=tuple(sizes.values()))
        inputs["a"] = inputs["a"].sigmoid()
        candidates: dict[str, Candidate] = {"ours": lambda a, b: linear_scan(a, b)[0]}
        if FLA:
            candidates["fla hgrn, chunks"] = lambda a, b: import_module("fla.ops.hgrn").chunk_hgrn(b, a.log())[0]
            candidates["fla hgrn, recurrent"] = lambda a, b: import_module("fla.ops.hgrn").fused_recurrent_hgrn(
                b, a.log()
            )[0]
        yield f"linear_scan_{batch}x{time}x{channels}", sizes, inputs, candidates | {"a + b": lambda a, b: a + b}


def mamba_scan(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, B, C).mT


def of_selective_scan(dtype: torch.dtype, quick: bool) -> Iterator[Table]:
    for batch, time, channels in ((1, 256, 64),) if quick else ((1, 2048, 1536), (4, 4096, 2048)):
        sizes = {"batch": batch, "time": time, "channels": channels, "states": 16}
        tokens = (batch, time)
        inputs = draw(dtype, u=(*tokens, channels), delta=(*tokens, channels), B=(*tokens, 16), C=(*tokens, 16))
        inputs["delta"] = (inputs["delta"] - 3).exp()
        inputs["A"] = -torch.arange(1.0, 17.0, device="cuda").repeat(channels, 1)
        candidates: dict[str, Candidate] = {"ours": lambda u, delta, B, C, A: selective_scan(u, delta, A, B, C)[0]}
        if MAMBA and util.find_spec("selective_scan_cuda"):
            # its layout has time last; to bring it there is not counted
            last = {name: x if name == "A" else x.mT.contiguous() for name, x in inputs.items()}
            candidates["mamba_ssm, CUDA"] = mamba_scan, last
        yield (
            f"selective_scan_{batch}x{time}x{channels}",
            sizes,
            inputs,
            candidates | {"u + delta": lambda u, delta, B, C, A: u + delta + A.sum() + B.sum() + C.sum()},
        )


def mamba_ssd(x: Tensor, B: Tensor, C: Tensor, log_a: Tensor) -> Tensor:
    """With dt = -log_a and A = -1 its decays are ours; what enters is multiplied by dt as well, so x comes divided."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x, -log_a, -torch.ones(x.shape[2], device="cuda"), B, C, chunk_size=256)


def fla_ssd(x: Tensor, B: Tensor, C: Tensor, log_a: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    keys, queries = (t.expand(-1, -1, x.shape[2], -1) for t in (B, C))
    return chunk_simple_gla(queries, keys, x, g=log_a, scale=1.0)[0]


def of_ssd(dtype: torch.dtype, quick: bool) -> Iterator[Table]:
    for batch, time, heads in ((1, 256, 4),) if quick else ((1, 2048, 24), (4, 4096, 32)):
        sizes = {"batch": batch, "time": time, "heads": heads, "dim": 64, "state": 128}
        inputs = draw(dtype, x=(batch, time, heads, 64), B=(batch, time, 1, 128), C=(batch, time, 1, 128))
        inputs["log_a"] = -0.01 - torch.rand(batch, time, heads, device="cuda") / 5
        candidates: dict[str, Candidate] = {"ours": lambda x, B, C, log_a: ssd(x, log_a, B, C)[0]}
        if MAMBA:
            candidates["mamba_ssm"] = mamba_ssd, {**inputs, "x": (inputs["x"] / -inputs["log_a"][..., None]).to(dtype)}
        if FLA:
            candidates["fla simple_gla"] = fla_ssd
        yield (
            f"ssd_{batch}x{time}x{heads}",
            sizes,
            inputs,
            candidates | {"x + x": lambda x, B, C, log_a: x + x + B.sum() + C.sum() + log_a.sum()},
        )


def of_delta_rule(dtype: torch.dtype, quick: bool) -> Iterator[Table]:
    for batch, time, heads in ((1, 256, 2),) if quick else ((1, 2048, 16), (4, 4096, 16)):
        sizes = {"batch": batch, "time": time, "heads": heads, "dim": 128}
        shape = tuple(sizes.values())
        inputs = draw(dtype, q=shape, k=shape, v=shape, beta=shape[:3])
        inputs["k"], inputs["beta"] = normalize(inputs["k"], dim=-1), inputs["beta"].sigmoid()
        candidates: dict[str, Candidate] = {"ours": lambda q, k, v, beta: delta_rule(q, k, v, beta)[0]}
        if FLA:
            candidates["fla"] = lambda q, k, v, beta: import_module("fla.ops.delta_rule").chunk_delta_rule(
                q, k, v, beta, scale=1.0
            )[0]
        yield (
            f"delta_rule_{batch}x{time}x{heads}",
            sizes,
            inputs,
            candidates | {"q + k + v": lambda q, k, v, beta: q + k + v + beta.sum()},
        )


CORES = {name.removeprefix("of_"): make for name, make in list(globals().items()) if name.startswith("of_")}


def forward(function: Function, inputs: Inputs) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return function(**inputs)

    return call


def backward(function: Function, inputs: Inputs) -> Callable[[], Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    grad = torch.randn_like(function(**inputs))

    def call() -> Tensor:
        out = function(**leaves)
        torch.autograd.grad(out, list(leaves.values()), grad.expand_as(out), allow_unused=True)
        return out.detach()

    return call


def added_memory(call: Callable[[], Tensor]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def replayed(call: Callable[[], Tensor]) -> float:
    """Milliseconds, NaN where the call can't be captured."""
    from triton.testing import do_bench_cudagraph

    try:
        return float(do_bench_cudagraph(call, rep=20, return_mode="median"))
    except RuntimeError:
        torch.cuda.synchronize()
        return math.nan


def measured(calls: dict[str, Callable[[], Tensor]], rounds: int) -> list[Measurement]:
    from triton.testing import do_bench

    found: dict[str, Measurement] = {}
    for name, call in calls.items():
        try:
            result = call()
        except Exception as error:
            if name == "ours":
                raise
            # that a peer can't do it here is a finding, not the end
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
            continue
        found[name] = Measurement(name, [], added_memory(call), result)
    for _ in range(rounds):
        for name, measurement in found.items():
            measurement.seconds.append(do_bench(calls[name], warmup=10, rep=40, return_mode="median") / 1000)
    for measurement in found.values():
        ours = found["ours"].result.float()
        same = measurement.result.shape == ours.shape
        away = (measurement.result.float() - ours).abs().max() / ours.abs().max() if same else math.nan
        measurement.notes["graph"] = replayed(calls[measurement.name])
        measurement.notes["from ours"] = float(away)
    return list(found.values())


def main(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("torch sees no GPU: nothing was measured")
        return
    dtype = getattr(torch, arguments.dtype)
    if dtype == torch.float32 and arguments.tf32:
        torch.set_float32_matmul_precision("high")
    kind = arguments.dtype + ("_tf32" if arguments.tf32 else "")
    for core in arguments.cores or CORES:
        for name, sizes, inputs, candidates in CORES[core](dtype, arguments.quick):
            directions = (("forward", forward), ("backward", backward))
            for direction, bind in directions[:1] if core == "tree_masked_attention" else directions:
                calls = {
                    label: bind(*given) if isinstance(given, tuple) else bind(given, inputs)
                    for label, given in candidates.items()
                }
                found = measured(calls, arguments.rounds or 3)
                report(f"gpu_{name}_{direction}_{kind}", found, arguments, settings={**sizes, "dtype": kind})


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--cores", nargs="+", choices=CORES, help="default: all")
    options.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options.add_argument("--tf32", action="store_true", help="products of float32 may be rounded, in all candidates")
    main(options.parse_args())
