"""What all attention cores promise alike, each with its own inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from mlreviews_kernels import use_backend
from mlreviews_kernels.adaptive_temperature_attention import adaptive_temperature_attention
from mlreviews_kernels.attention import attention
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.differential_attention import differential_attention
from mlreviews_kernels.selective_attention import selective_attention_with_memory
from mlreviews_kernels.tree_masked_attention import tree_masked_attention

TIME, HEADS, KV_HEADS = 21, 6, 3
Inputs = dict[str, Tensor]


def drawn(**axes: int) -> Inputs:
    """Tensors ``[2, time, heads, width]``, by name the number of heads."""
    generator = torch.Generator().manual_seed(0)
    widths = {"v": 5, "v_cache": 5}
    shapes = {name: (2, TIME, heads, widths.get(name, 4)) for name, heads in axes.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def padding() -> Tensor:
    mask = torch.rand(2, TIME, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[0, :4] = False  # the first queries see nothing
    return mask


def _tree(mask: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """A chain of tokens, whose padding is in the mask; the cache has its own lengths."""
    seen = torch.ones(TIME, TIME, dtype=torch.bool).tril() & mask[:, None]
    return tree_masked_attention(**inputs, tree_mask=seen, cache_lengths=torch.tensor([0, 6]))


LAM = torch.linspace(0.2, 0.9, HEADS)
CASES: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {
    "attention": (attention, ("q",), ("k", "v")),
    "differential": (differential_attention, ("q1", "q2"), ("k1", "k2", "v")),
    "selective": (selective_attention_with_memory, ("q",), ("k", "v")),
    "adaptive_temperature": (adaptive_temperature_attention, ("q",), ("k", "v")),
    "tree_masked": (_tree, ("q",), ("k", "v", "k_cache", "v_cache")),
}
every_core = pytest.mark.parametrize("core", CASES)
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu", "vectorised"])


@pytest.fixture(autouse=True)
def hostile_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def using(backend: str) -> AbstractContextManager[object]:
    return without_compiled_code() if backend == "vectorised" else use_backend(backend)


def inputs_of(core: str, kv_heads: int = KV_HEADS) -> Inputs:
    _, queries, keys = CASES[core]
    inputs = drawn(**dict.fromkeys(queries, HEADS), **dict.fromkeys(keys, kv_heads))
    return {**inputs, "lam": LAM.clone()} if core == "differential" else inputs


def run(core: str, inputs: Inputs, **options: Any) -> tuple[Inputs, list[Tensor]]:
    """Gradients by name, of the sum of the outputs' sines, and the outputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    found = CASES[core][0](**leaves, mask=padding(), **options)
    outputs = list(found) if isinstance(found, tuple) else [found]
    sum(x.masked_fill(torch.isneginf(x), 0.0).float().sin().sum() for x in outputs).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, [x.detach() for x in outputs]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 5e-6) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@every_core
@every_backend
def test_heads_that_share_keys_equal_repeated_ones_beside_padding(core: str, backend: str) -> None:
    inputs, shared = inputs_of(core), CASES[core][2]
    repeated = {name: x.repeat_interleave(2, 2) if name in shared else x for name, x in inputs.items()}
    with using(backend):
        (grads, outputs), (wide_grads, wide_outputs) = run(core, inputs), run(core, repeated)
    for one, other in zip(outputs, wide_outputs, strict=True):
        assert not one.isnan().any()
        assert_close(one, other)
    for name, grad in wide_grads.items():
        summed = grad.unflatten(2, (KV_HEADS, 2)).sum(3) if name in shared else grad
        assert_close(grads[name], summed, 2e-5)


@every_core
@every_backend
def test_order_of_heads_does_not_matter(core: str, backend: str) -> None:
    inputs, order = inputs_of(core, HEADS), torch.tensor([4, 0, 5, 2, 1, 3])
    moved = {name: x[order] if name == "lam" else x[:, :, order] for name, x in inputs.items()}
    options = [{"selector": 2}, {"selector": 3}] if core == "selective" else [{}, {}]
    with using(backend):
        (grads, (out, *_)), (other_grads, (other, *_)) = (
            run(core, x, **more) for x, more in zip((inputs, moved), options, strict=True)
        )
    assert_close(other, out[:, :, order])
    for name, grad in grads.items():
        assert_close(other_grads[name], grad[order] if name == "lam" else grad[:, :, order], 2e-5)


@every_core
@every_backend
def test_autocast_changes_nothing(core: str, backend: str) -> None:
    """The inputs' dtype decides: float32 is computed in float32, bfloat16 with float32 sums, in every backend."""
    inputs = inputs_of(core)
    half = {name: x if name == "lam" else x.bfloat16() for name, x in inputs.items()}
    with using(backend):
        for given in (inputs, half):
            expected = run(core, given)
            with torch.autocast("cpu", torch.bfloat16):
                found = run(core, given)
            for one, other in zip([*found[0].values(), *found[1]], [*expected[0].values(), *expected[1]], strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)


@every_core
def test_what_autocast_leaves_in_several_dtypes_is_refused_by_name(core: str) -> None:
    inputs, name = inputs_of(core), CASES[core][2][0]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"^{name}: expected torch.float32"):
        run(core, {**inputs, name: inputs[name].bfloat16()})
