import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mlreviews.common.matrix_scan import matrix_scan

# Around the 16 steps of the loop, and odd and even at each level above it.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 34, 55, 100]


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _dense(A: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """All states [batch, time, d] as the solution of one linear system, h_t - A_t h_{t-1} = b_t."""
    batch, time, d, _ = A.shape
    system = torch.eye(time * d, dtype=A.dtype).expand(batch, -1, -1).clone()
    for t in range(1, time):
        system[:, t * d : (t + 1) * d, (t - 1) * d : t * d] = -A[:, t]
    inflow = b.clone()
    inflow[:, 0] += torch.einsum("bij,bj->bi", A[:, 0], initial)
    return torch.linalg.solve(system, inflow.flatten(1)).unflatten(1, (time, d))


@pytest.mark.parametrize("time", LENGTHS)
def test_scan_solves_the_recurrence(time: int) -> None:
    A, b, initial = 0.6 * _random(2, time, 3, 3), _random(2, time, 3, seed=1), _random(2, 3, seed=2)
    states, final = matrix_scan(A, b, initial)
    torch.testing.assert_close(states, _dense(A, b, initial))
    assert torch.equal(final, states[:, -1])
    torch.testing.assert_close(matrix_scan(A, b)[0], _dense(A, b, torch.zeros_like(initial)))
    torch.testing.assert_close(matrix_scan(A, None, initial)[0], _dense(A, torch.zeros_like(b), initial))


@pytest.mark.parametrize("time", [1, 16, 37])
def test_scan_of_columns(time: int) -> None:
    A, b, initial = 0.6 * _random(2, time, 3, 3), _random(2, time, 3, 4, 5, seed=1), _random(2, 3, 4, 5, seed=2)
    states, final = matrix_scan(A, b, initial)
    assert final.shape == initial.shape
    for i, j in itertools.product(range(4), range(5)):
        torch.testing.assert_close(states[..., i, j], _dense(A, b[..., i, j], initial[..., i, j]))
    without = matrix_scan(A, None, initial[..., 0])[0]
    torch.testing.assert_close(without[..., 2], _dense(A, torch.zeros(2, time, 3).double(), initial[..., 2, 0]))
    torch.testing.assert_close(matrix_scan(A, b)[0][..., 3, 1], matrix_scan(A, b[..., 3, 1])[0])


@pytest.mark.parametrize("time", [2, 17, 50])
def test_scan_from_the_identity_gives_products(time: int) -> None:
    A = _random(1, time, 4, 4) / 2
    products, final = matrix_scan(A, None, torch.eye(4, dtype=A.dtype)[None])
    torch.testing.assert_close(final[0], torch.linalg.multi_dot(list(A[0].flip(0))))
    torch.testing.assert_close(products[0, 1], A[0, 1] @ A[0, 0])


@settings(max_examples=15)
@given(st.integers(2, 70), st.data())
def test_scan_split_anywhere(time: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, time - 1))
    A, b, initial = 0.6 * _random(2, time, 3, 3), _random(2, time, 3, seed=1), _random(2, 3, seed=2)
    whole, final = matrix_scan(A, b, initial)
    head, state = matrix_scan(A[:, :cut], b[:, :cut], initial)
    tail, last = matrix_scan(A[:, cut:], b[:, cut:], state)
    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("time", [3, 16, 17, 19, 36])
def test_scan_gradients(time: int) -> None:
    inputs = [0.6 * _random(1, time, 2, 2), _random(1, time, 2, seed=1), _random(1, 2, seed=2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert gradcheck(matrix_scan, inputs)
    if time == 3:
        assert gradgradcheck(matrix_scan, inputs)
    if time == 19:  # of the final state alone, and with singular transitions
        assert gradcheck(lambda *xs: matrix_scan(*xs)[1], [(0 * inputs[0]).detach().requires_grad_(), *inputs[1:]])


def test_scan_of_non_contiguous_inputs() -> None:
    A, b, initial = _random(3, 3, 40, 2) / 2, _random(3, 40, 2, seed=1), _random(3, 2, seed=2)
    views = A.permute(3, 2, 0, 1), b.permute(2, 1, 0), initial.T
    copies = [view.contiguous() for view in views]
    assert not any(view.is_contiguous() for view in views)
    torch.testing.assert_close(matrix_scan(*views), matrix_scan(*copies))
    weights = _random(40, 3, 2, seed=3).permute(2, 0, 1)
    grads = []
    for inputs in (views, copies):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        matrix_scan(*leaves)[0].backward(weights)
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    A, b = (0.6 * _random(2, 50, 3, 3)).to(dtype), _random(2, 50, 3, seed=1).to(dtype)
    initial = _random(2, 3, seed=2, dtype=torch.float32)
    states, final = matrix_scan(A, b, initial)
    exact = matrix_scan(A.float(), b.float(), initial)
    assert states.dtype == dtype
    assert final.dtype == torch.float32
    assert torch.equal(states, exact[0].to(dtype))
    assert torch.equal(final, exact[1])


def test_scan_stays_in_float64() -> None:
    states, final = matrix_scan(_random(1, 40, 2, 2), _random(1, 40, 2))
    assert states.dtype == final.dtype == torch.float64


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_cost_of_the_scan() -> None:
    counts = []
    for time in (256, 512, 1024):
        A, b = torch.zeros(1, time, 6, 6), torch.zeros(1, time, 6)
        with _Operations() as operations:
            matrix_scan(A, b)
        counts.append(operations.count)
        with FlopCounterMode(display=False) as flops:
            matrix_scan(A, b)
        assert flops.get_total_flops() <= 2 * time * (6**3 + 2 * 6**2)
    # The same number of operations more for each doubling: the depth grows with the logarithm of the length.
    assert 0 < counts[2] - counts[1] == counts[1] - counts[0] < 40
    assert counts[0] < 300


@pytest.mark.usefixtures("unchecked")
def test_bad_scans() -> None:
    A, b, initial = _random(2, 5, 3, 3), _random(2, 5, 3), _random(2, 3)
    with pytest.raises(TypeError, match=r"A: expected float32, .*, got torch\.int64"):
        matrix_scan(A.long(), b)
    for bad in (A[0], A[..., :2], A[:, :0], A[:0], A[:, :, :0, :0]):
        with pytest.raises(ValueError, match=r"A: expected \[batch, time, d, d\] with no empty axis, got shape"):
            matrix_scan(bad, b)
    for bad in (b[:1], b[:, :4], b[..., :2], b[0]):
        with pytest.raises(ValueError, match=r"b: expected \[batch, time, d, \.\.\.\] = .*, got"):
            matrix_scan(A, bad)
    with pytest.raises(TypeError, match=r"b: expected torch\.float64, got torch\.float32"):
        matrix_scan(A, b.float())
    for bad in (initial[:1], initial[:, :2], initial[0], initial[..., None]):
        with pytest.raises(ValueError, match=r"initial_state: expected \[batch, d, \.\.\.\] = .*, got"):
            matrix_scan(A, b, bad)
    with pytest.raises(ValueError, match=r"initial_state: expected \[batch, d, \.\.\.\] = .*, got"):
        matrix_scan(A, None, initial[:1])
    with pytest.raises(TypeError, match=r"initial_state: expected float32, .*, got torch\.int64"):
        matrix_scan(A, b, initial.long())
    with pytest.raises(ValueError, match="b, initial_state: expected at least one of them, got neither"):
        matrix_scan(A)
