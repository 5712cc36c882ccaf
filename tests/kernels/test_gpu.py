"""The Triton kernels as a GPU runs them: ``TRITON_INTERPRET=0 pytest -m gpu``; skipped where torch sees none.

What the interpreter can't show: that the compiled code is right with the tiles that are really chosen, in half
precision, with asynchronous memory. The oracle is each core's reference in float64, from the inputs as they were
rounded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlreviews_kernels import use_backend
from mlreviews_kernels.adaptive_temperature_attention import adaptive_temperature_attention
from mlreviews_kernels.attention import attention
from mlreviews_kernels.delta_rule import delta_rule
from mlreviews_kernels.differential_attention import differential_attention
from mlreviews_kernels.linear_scan import linear_scan, log_linear_scan
from mlreviews_kernels.selective_attention import selective_attention_with_memory
from mlreviews_kernels.selective_scan import selective_scan
from mlreviews_kernels.ssd import ssd
from mlreviews_kernels.tree_masked_attention import tree_masked_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(os.environ["TRITON_INTERPRET"] == "1", reason="TRITON_INTERPRET=0 is not set"),
]

Inputs = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
# of an output or gradient, relative to its largest value: results, and factors of products, are rounded
TOLERANCES = {torch.float32: 5e-5, torch.float16: 3 * 2**-10, torch.bfloat16: 3 * 2**-7}


@dataclass(frozen=True)
class Case:
    """A core with one size of its inputs.

    Attributes:
        name: shown in the tests' ids.
        function: the public op.
        shapes: of the tensors that have gradients.
        change: what is done to standard normal numbers in float64, so that they fit the op.
        options: further arguments; tensors among them go to the GPU.
        wide: tensors that stay float32 beside half precision.
    """

    name: str
    function: Callable[..., Any]
    shapes: Shapes
    change: Callable[[Inputs], Inputs] = field(default=lambda inputs: inputs)
    options: dict[str, Any] = field(default_factory=dict)
    wide: tuple[str, ...] = ()


def _linear(inputs: Inputs) -> Inputs:
    return {**inputs, "a": inputs["a"].tanh()}


def _selective_scan(inputs: Inputs) -> Inputs:
    return {**inputs, "A": -inputs["A"].exp(), "delta": inputs["delta"] - 2}


def _decays(inputs: Inputs) -> Inputs:
    return {**inputs, "log_a": -inputs["log_a"].exp() / 8}


def _keys(inputs: Inputs) -> Inputs:
    return {**inputs, "k": normalize(inputs["k"], dim=-1), "beta": inputs["beta"].sigmoid()}


def _lam(inputs: Inputs) -> Inputs:
    return {**inputs, "lam": inputs["lam"].sigmoid()}


def _scan(time: int, channels: int, states: int, groups: int) -> Shapes:
    tokens = (2, time)
    return {
        "u": (*tokens, channels), "delta": (*tokens, channels), "A": (channels, states),
        "B": (*tokens, groups, states), "C": (*tokens, groups, states), "D": (channels,), "z": (*tokens, channels),
        "delta_bias": (channels,), "initial_state": (2, channels, states),
    }  # fmt: skip


def _ssd(time: int, heads: int, groups: int, dim: int, states: int) -> Shapes:
    tokens = (2, time)
    return {
        "x": (*tokens, heads, dim), "log_a": (*tokens, heads), "B": (*tokens, groups, states),
        "C": (*tokens, groups, states), "D": (heads,), "initial_state": (2, heads, states, dim),
    }  # fmt: skip


def _delta(time: int, heads: int, dim_k: int, dim_v: int) -> Shapes:
    wide, narrow = (2, time, heads, dim_k), (2, time, heads, dim_v)
    return {"q": wide, "k": wide, "v": narrow, "beta": wide[:3], "initial_state": (2, heads, dim_k, dim_v)}


def _heads(queries: int, keys: int, heads: int, kv_heads: int, dim: int, value_dim: int) -> Shapes:
    shared = (2, keys, kv_heads)
    return {"q": (2, queries, heads, dim), "k": (*shared, dim), "v": (*shared, value_dim)}


def _two(queries: int, keys: int, heads: int, kv_heads: int, dim: int, value_dim: int) -> Shapes:
    one = _heads(queries, keys, heads, kv_heads, dim, value_dim)
    return {"q1": one["q"], "k1": one["k"], "q2": one["q"], "k2": one["k"], "v": one["v"], "lam": (heads,)}


def _tree(tree: int, cache: int, heads: int, kv_heads: int, dim: int) -> Shapes:
    one = _heads(tree, tree, heads, kv_heads, dim, dim)
    return {**one, "k_cache": (2, cache, kv_heads, dim), "v_cache": (2, cache, kv_heads, dim)}


def _padding(time: int) -> Tensor:
    mask = torch.rand(2, time, generator=torch.Generator().manual_seed(1)) > 0.2
    mask[0, :70] = False  # the first queries see nothing
    return mask


def _branches(tree: int) -> Tensor:
    """Every token sees itself and each second one of its row before it."""
    row = torch.arange(tree)
    return (row[:, None] >= row) & ((row[:, None] - row) % 2 == 0)


SOFTPLUS = {"delta_softplus": True}
STATES = ("initial_state",)
CASES = [
    Case("linear_scan", linear_scan, dict.fromkeys(("a", "b"), (2, 517, 3, 70)), _linear),
    Case("linear_scan-reverse", linear_scan, dict.fromkeys(("a", "b"), (2, 517, 70)), _linear, {"reverse": True}),
    Case("log_linear_scan", log_linear_scan, dict.fromkeys(("log_a", "log_b"), (2, 300, 70))),
    Case("selective_scan", selective_scan, _scan(300, 200, 16, 2), _selective_scan, SOFTPLUS, (*STATES, "A")),
    Case("selective_scan-slices", selective_scan, _scan(70, 40, 40, 1), _selective_scan, SOFTPLUS, STATES),
    Case("ssd", ssd, _ssd(300, 4, 2, 64, 128), _decays, {}, (*STATES, "log_a")),
    Case("ssd-odd", ssd, _ssd(150, 3, 1, 40, 20), _decays, {"chunk_size": 48}, STATES),
    Case("ssd-256", ssd, _ssd(600, 2, 1, 128, 64), _decays, {"chunk_size": 256}, STATES),
    Case("delta_rule", delta_rule, _delta(300, 3, 128, 64), _keys, {}, STATES),
    Case("delta_rule-16", delta_rule, _delta(150, 2, 40, 72), _keys, {"mini_batch": 16}, STATES),
    Case("attention", attention, _heads(300, 300, 6, 2, 64, 64)),
    Case("attention-128", attention, _heads(200, 330, 2, 2, 128, 128)),
    Case("attention-window", attention, _heads(270, 270, 4, 2, 40, 32), options={"window": 50}),
    Case("attention-mask", attention, _heads(270, 270, 4, 2, 64, 64), options={"mask": _padding(270), "causal": False}),
    Case("differential", differential_attention, _two(300, 300, 4, 2, 64, 128), _lam),
    Case("differential-mask", differential_attention, _two(150, 270, 2, 2, 32, 48), _lam, {"mask": _padding(270)}),
    Case("selective", selective_attention_with_memory, _heads(700, 700, 4, 2, 64, 64), options={"selector": 1}),
    Case("selective-128", selective_attention_with_memory, _heads(150, 333, 2, 1, 128, 128)),
    Case("selective-mask", selective_attention_with_memory, _heads(270, 270, 4, 2, 40, 32),
         options={"mask": _padding(270)}),
    Case("adaptive_temperature", adaptive_temperature_attention, _heads(300, 300, 4, 2, 64, 64)),
    Case("adaptive_temperature-mask", adaptive_temperature_attention, _heads(270, 270, 4, 2, 128, 40),
         options={"mask": _padding(270)}),
    Case("tree_masked", tree_masked_attention, _tree(24, 1000, 6, 2, 64),
         options={"tree_mask": _branches(24), "cache_lengths": torch.tensor([1000, 517])}),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def hostile_memory() -> Iterator[None]:
    """What `torch.empty` returns is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def drawn(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    inputs = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in case.shapes.items()}
    return {
        name: x.to("cuda", torch.float32 if name in case.wide else dtype) for name, x in case.change(inputs).items()
    }


def options_of(case: Case, inputs: Inputs) -> dict[str, Any]:
    device = next(iter(inputs.values())).device
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.options.items()}


def run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs by number, and gradients by name, of their sum with fixed weights."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    found = case.function(**leaves, **options_of(case, inputs))
    outputs = [x.masked_fill(torch.isneginf(x), 0.0) for x in (found if isinstance(found, tuple) else (found,))]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16() for x in outputs]  # the same in every dtype
    torch.autograd.backward(outputs, [w.to(x) for w, x in zip(weights, outputs, strict=True)])
    grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {str(i): x.detach() for i, x in enumerate(outputs)} | grads


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    with use_backend("reference"):  # on the CPU, where a loop over time waits for nothing
        found = run(case, {name: x.double().cpu() for name, x in inputs.items()})
    return {name: x.cuda() for name, x in found.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    errors = {
        name: (((found[name].double() - x).abs().max() / x.abs().max().clamp(min=1e-3)).item())
        for name, x in expected.items()
    }
    assert all(error <= tolerance for error in errors.values()), errors  # a NaN is not below it


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@every_case
def test_values_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = drawn(case, dtype)
    assert_close(run(case, inputs), truth(case, inputs), TOLERANCES[dtype])


@every_case
def test_same_numbers_every_time(case: Case) -> None:
    inputs = drawn(case, torch.bfloat16)
    first = run(case, inputs)
    for _ in range(3):
        for name, x in run(case, inputs).items():
            assert torch.equal(x, first[name]), name


@every_case
def test_compiles_as_a_whole(case: Case) -> None:
    inputs = drawn(case, torch.float32)
    options = options_of(case, inputs)
    expected = case.function(**inputs, **options)
    found = torch.compile(case.function, fullgraph=True)(**inputs, **options)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@every_case
def test_runs_on_another_stream(case: Case) -> None:
    inputs = drawn(case, torch.float32)
    expected = run(case, inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = run(case, inputs)
    torch.cuda.synchronize()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
