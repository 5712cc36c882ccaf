"""Attention of a tree of drafted tokens over a cache, against torch's attention over both joined, and token by token.

One layer's verification of a tree over a long cache, in float32 and bfloat16, at several sizes of the tree and of the
context. The last line has cache and tree joined beforehand, which decoding can't have. The last column is the largest
difference from the vectorised form in float64, relative to its largest value.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from harness import Candidate, Measurement, measure, parser, report, use_threads
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.tree_masked_attention import ancestor_mask, tree_masked_attention

Inputs = dict[str, Tensor]
Shape = tuple[int, int, int, int, int]


def data(tree: int, context: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """A tree in which each token has two children."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (tree, heads), "k": (tree, kv_heads), "v": (tree, kv_heads)}
    shapes |= {"k_cache": (context, kv_heads), "v_cache": (context, kv_heads)}
    values = {name: torch.randn(1, *shape, dim, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**values, "tree_mask": ancestor_mask((torch.arange(tree) - 1) // 2)}


def with_joined(values: Inputs) -> Inputs:
    context = values["k_cache"].shape[1]
    seen = torch.nn.functional.pad(values["tree_mask"], (context, 0), value=True)
    joined = {x: torch.cat([values[f"{x}_cache"], values[x]], 1).transpose(1, 2) for x in "kv"}
    return {"q": values["q"].transpose(1, 2), **joined, "seen": seen}


def joined_data(*shape: int, dtype: torch.dtype) -> Inputs:
    return with_joined(data(*shape, dtype=dtype))  # type: ignore[arg-type]


def compiled(values: Inputs) -> Tensor:
    with torch.no_grad():
        return tree_masked_attention(**values)[0]


def vectorised(values: Inputs) -> Tensor:
    with without_compiled_code():
        return compiled(values)


def torchs(values: Inputs) -> Tensor:
    q, k, v = values["q"], values["k"], values["v"]
    with torch.no_grad():
        out = scaled_dot_product_attention(q, k, v, attn_mask=values["seen"], enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def joining(values: Inputs) -> Tensor:
    return torchs(with_joined(values))


def token_by_token(values: Inputs) -> Tensor:
    """Each token over the cache and its own branch, as without a tree."""
    outs = []
    for i, seen in enumerate(values["tree_mask"]):
        k, v = (torch.cat([values[f"{x}_cache"], values[x][:, seen]], 1).transpose(1, 2) for x in "kv")
        q = values["q"][:, i : i + 1].transpose(1, 2)
        with torch.no_grad():
            outs.append(scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]))
    return torch.cat(outs, 2).transpose(1, 2)


def candidates(shape: Shape, dtype: torch.dtype) -> list[Candidate]:
    make = partial(data, *shape, dtype=dtype)
    return [
        Candidate("compiled", compiled, (), make),
        Candidate("vectorised", vectorised, (), make),
        Candidate("token by token", token_by_token, (), make),
        Candidate("joined, with a mask", joining, (), make),
        Candidate("joined beforehand, with a mask", torchs, (), partial(joined_data, *shape, dtype=dtype)),
    ]


def errors(found: list[Measurement], shape: Shape, dtype: torch.dtype) -> None:
    values = data(*shape, dtype=dtype)
    exact = compiled({x: value.double() if value.is_floating_point() else value for x, value in values.items()})
    for measurement in found:
        measurement.notes["error"] = ((measurement.result - exact).abs().max() / exact.abs().max()).item()


def main(arguments: argparse.Namespace) -> None:
    use_threads(arguments.threads)
    suffix = f"_{torch.get_num_threads()}_threads"
    names = ("tree", "context", "heads", "kv_heads", "dim")

    def table(tree: int, context: int, heads: int, dtype: torch.dtype) -> None:
        shape = (tree, context, heads, 8, 64)
        rounds = arguments.rounds or (3 if arguments.quick else 7)
        found = measure(candidates(shape, dtype), rounds=rounds, memory=not arguments.quick)
        errors(found, shape, dtype)
        kind = str(dtype).removeprefix("torch.")
        name = f"tree_masked_attention_{tree}_{context}_{heads}_{kind}{suffix}"
        report(name, found, arguments, settings={**dict(zip(names, shape, strict=True)), "dtype": kind})

    if arguments.quick:
        table(5, 300, 16, torch.float32)
        return
    for tree, heads in ((16, 8), (16, 32), (64, 32)):
        for context in (2048, 8192):
            table(tree, context, heads, torch.float32)
    table(16, 8192, 32, torch.bfloat16)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
