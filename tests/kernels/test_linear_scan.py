from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from mlreviews_kernels import use_backend
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.linear_scan import linear_scan, linear_scan_step, log_linear_scan
from tests.kernels.scan_cases import Inputs, ScanCase


def _inputs(batch: int, time: int, generator: torch.Generator) -> Inputs:
    """Factors of either sign, some zero; two axes after time."""
    shape = (batch, time, 5, 2)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    a[torch.rand(shape, generator=generator) < 0.1] = 0.0
    b = torch.randn(shape, generator=generator, dtype=torch.float64)
    state = torch.randn((batch, 5, 2), generator=generator, dtype=torch.float64)
    return {"a": a, "b": b, "initial_state": state}


def _log_inputs(batch: int, time: int, generator: torch.Generator) -> Inputs:
    a, b = torch.randn((2, batch, time, 10), generator=generator, dtype=torch.float64)
    state = torch.randn((batch, 10), generator=generator, dtype=torch.float64)
    return {"log_a": a, "log_b": 2 * b, "log_initial_state": state}


LENGTHS = (1, 2, 7, 8, 9, 27)  # around the GPU's rows; 27 = 5 chunks of 5 and a rest of 2 on the CPU
# chunks of SHORTEST steps where there are twice as many tokens; ten channels are two blocks or one
TILES = {"COLUMNS": 16, "AHEAD": 4, "AHEAD_BACK": 4, "PASS_COLUMNS": 16, "PASS_AHEAD": 2, "SHORTEST": 16}
CASES = [
    ScanCase(
        "linear_scan",
        linear_scan,
        _inputs,
        ("a", "b"),
        lengths=LENGTHS,
        interpreter_tiles=TILES | {"COLUMNS": 8, "PASS_COLUMNS": 8},
    ),
    ScanCase(
        "linear_scan-reverse",
        linear_scan,
        _inputs,
        ("a", "b"),
        options={"reverse": True},
        lengths=LENGTHS,
        interpreter_tiles=TILES | {"SHORTEST": 8},
    ),
    ScanCase(
        "log_linear_scan",
        log_linear_scan,
        _log_inputs,
        ("log_a", "log_b"),
        state="log_initial_state",
        lengths=LENGTHS,
        interpreter_tiles=TILES,
        empty=-math.inf,
    ),
]


def dense(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """h_t = sum_s (prod_{s<r<=t} a_r) b_s + (prod_{r<=t} a_r) h_0 as one matrix a channel."""
    time = a.shape[1]
    matrix = torch.zeros(a.shape[0], time, time + 1, *a.shape[2:], dtype=a.dtype)
    for t in range(time):
        for s in range(t + 2):  # column 0 is the initial state, column s the input s - 1
            matrix[:, t, s] = a[:, s : t + 1].prod(1)
    inputs = torch.cat([initial[:, None], b], 1)
    return torch.einsum("nts...,ns...->nt...", matrix, inputs)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


@BACKENDS
def test_equals_the_dense_matrix(backend: str) -> None:
    a, b, initial = _random(2, 9, 3), _random(2, 9, 3, seed=1), _random(2, 3, seed=2)
    a[0, 4, 1] = 0.0
    with use_backend(backend):
        h, final = linear_scan(a, b, initial)
    torch.testing.assert_close(h, dense(a, b, initial), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, h[:, -1], rtol=0, atol=0)


@BACKENDS
def test_constant_factor_is_a_recursive_filter(backend: str) -> None:
    # scipy's direct form of y_t = x_t + 0.9 y_{t-1}, with the state it wants: 0.9 y_{-1}
    b = _random(1, 50, 1)
    expected, _ = lfilter([1.0], [1.0, -0.9], b[0, :, 0].numpy(), zi=np.array([0.9 * 2.0]))
    with use_backend(backend):
        h, _ = linear_scan(torch.full_like(b, 0.9), b, torch.full((1, 1), 2.0, dtype=torch.float64))
    np.testing.assert_allclose(h[0, :, 0].numpy(), expected, rtol=1e-12)


@BACKENDS
def test_reverse_is_the_scan_of_the_reversed_sequence(backend: str) -> None:
    a, b, initial = _random(2, 7, 3), _random(2, 7, 3, seed=1), _random(2, 3, seed=2)
    with use_backend(backend):
        h, final = linear_scan(a, b, initial, reverse=True)
        forwards, last = linear_scan(a.flip(1), b.flip(1), initial)
    torch.testing.assert_close(h, forwards.flip(1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(final, last, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("vectorised", [False, True])
def test_log_form_is_the_logarithm_of_the_plain_one(vectorised: bool) -> None:
    log_a, log_b, log_initial = _random(2, 33, 4), _random(2, 33, 4, seed=1), _random(2, 4, seed=2)
    expected, _ = linear_scan(log_a.exp(), log_b.exp(), log_initial.exp())
    dtype = torch.float64 if vectorised else torch.float32
    h, final = log_linear_scan(log_a.to(dtype), log_b.to(dtype), log_initial.to(dtype))
    torch.testing.assert_close(h.exp().double(), expected, rtol=1e-12 if vectorised else 3e-6, atol=0)
    torch.testing.assert_close(final, h[:, -1], rtol=0, atol=0)


def _implementations() -> list[str]:
    return ["reference", "compiled", "vectorised"]


def _run(how: str, function: object, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    with use_backend("reference" if how == "reference" else "cpu"):
        if how == "vectorised":
            with without_compiled_code():
                return function(*arguments)  # type: ignore[operator]
        return function(*arguments)  # type: ignore[operator]


@pytest.mark.parametrize("how", _implementations())
def test_log_form_neither_overflows_nor_forgets_small_numbers(how: str) -> None:
    # e^200 is no float32, and neither is e^-200: sums of 2, 3 and 4 equal numbers
    log_b = torch.tensor([200.0, -500.0, -200.0]).reshape(1, 3, 1)
    log_a = torch.tensor([0.0, -700.0, 300.0]).reshape(1, 3, 1)
    h, _ = _run(how, log_linear_scan, log_a, log_b, torch.full((1, 1), 200.0))
    logs = torch.tensor([2.0, 3.0, 4.0]).log()
    expected = (torch.tensor([200.0, -500.0, -200.0]) + logs).reshape(1, 3, 1)
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("how", _implementations())
def test_log_form_of_nothing_is_minus_infinity_without_nan(how: str) -> None:
    nothing = -math.inf
    log_a = torch.tensor([nothing, 0.0, nothing, 0.5]).reshape(1, 4, 1).requires_grad_()
    log_b = torch.tensor([nothing, nothing, 1.0, nothing]).reshape(1, 4, 1).requires_grad_()
    initial = torch.tensor([[nothing]], requires_grad=True)
    h, final = _run(how, log_linear_scan, log_a, log_b, initial)
    assert h.flatten().tolist() == [nothing, nothing, 1.0, 1.5]
    final.sum().backward()
    assert final.item() == 1.5
    assert log_a.grad is not None
    assert log_b.grad is not None
    assert log_a.grad.flatten().tolist() == [0.0, 0.0, 0.0, 1.0]
    assert log_b.grad.flatten().tolist() == [0.0, 0.0, 1.0, 0.0]
    assert initial.grad == 0.0


@pytest.mark.parametrize("how", _implementations())
def test_growing_and_alternating_states(how: str) -> None:
    a = torch.tensor([2.0, -1.0]).expand(1, 20, 2).contiguous()
    h, _ = _run(how, linear_scan, a, torch.ones(1, 20, 2))
    steps = torch.arange(1, 21.0)
    torch.testing.assert_close(h[0, :, 0], 2.0**steps - 1)  # 1 + 2 + ... + 2^(t-1)
    torch.testing.assert_close(h[0, :, 1], steps % 2)


@pytest.mark.parametrize("channels", [1, 15, 1025, 2100])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_compiled_blocks_of_channels(channels: int, threads: int) -> None:
    # blocks of 1,024 channels, narrower ones where there are few tasks: the result is the same to the last bit
    a, b = _random(3, 6, channels, dtype=torch.float32), _random(3, 6, channels, seed=1, dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    for number in (threads, 1):
        torch.set_num_threads(number)
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        h, final = linear_scan(*leaves)
        (h.square().sum() + final.sum()).backward()
        found.append((h, final, leaves[0].grad, leaves[1].grad))
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]
    with use_backend("reference"):
        torch.testing.assert_close(found[0][0], linear_scan(a, b)[0])


def test_steps_are_the_scan() -> None:
    a, b, state = _random(2, 5, 3), _random(2, 5, 3, seed=1), _random(2, 3, seed=2)
    expected, last = linear_scan(a, b, state)
    for t in range(5):
        h, state = linear_scan_step(a[:, t], b[:, t], state)
        torch.testing.assert_close(h, expected[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
    h, state = linear_scan_step(a[:, 0].bfloat16(), b[:, 0].bfloat16(), state.float())
    assert (h.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_denormals_survive_loading_compiled_code() -> None:
    linear_scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    assert (torch.tensor(1e-40) * 1.0).item() > 0
    h, _ = linear_scan(torch.full((1, 1, 3), 0.5), torch.zeros(1, 1, 3), torch.full((1, 3), 2e-40))
    assert (h > 0).all()


def test_needs_a_time_axis() -> None:
    with pytest.raises(ValueError, match=r"^a: expected \[batch, time, \.\.\.\], got \(3,\)"):
        linear_scan(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"^b: expected a's shape"):
        linear_scan(torch.ones(1, 3, 2), torch.ones(1, 3, 1))
    with pytest.raises(ValueError, match=r"^state: expected"):
        linear_scan_step(torch.ones(1, 3), torch.ones(1, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"^b: expected"):
        linear_scan_step(torch.ones(1, 3), torch.ones(3), torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"^state: expected float32"):  # the factor would be cut off to 0
        linear_scan_step(torch.full((1, 3), 0.5), torch.ones(1, 3), torch.ones(1, 3).long())
    with pytest.raises(ValueError, match=r"^state: expected a tensor on cpu"):
        linear_scan_step(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3, device="meta"))
    # without further axes every row is one number a step
    h, final = linear_scan(torch.ones(2, 3), torch.ones(2, 3))
    assert (h.shape, final.shape) == ((2, 3), (2,))
