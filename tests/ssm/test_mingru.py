import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlreviews.ssm.mingru import MinGRU, MinLSTM, log_g, parallel_scan_log
from tests.contracts.families import Sample

BATCH, TIME, DIM = 2, 9, 4

Layer = MinGRU | MinLSTM
each_kind = pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
each_form = pytest.mark.parametrize("log_space", [False, True])


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _layer(kind: type[Layer] = MinGRU, log_space: bool = True, expansion: float = 1.5) -> Layer:
    return kind(DIM, expansion, log_space, generator=_rng()).double()


def _sample(kind: type[Layer], log_space: bool) -> Sample:
    return Sample(_layer(kind, log_space).float(), (_random(BATCH, TIME, DIM).float(),))


CONTRACT = {
    "MinGRU": lambda: _sample(MinGRU, log_space=True),
    "MinGRU, plain": lambda: _sample(MinGRU, log_space=False),
    "MinLSTM": lambda: _sample(MinLSTM, log_space=False),
    "MinLSTM, in logarithms": lambda: _sample(MinLSTM, log_space=True),
}


def _set(linear: nn.Linear, bias: float) -> None:
    """A linear map that gives the same number whatever comes in."""
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(bias)


def _loop(layer: Layer, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Equations (1) to (3) one time after another, in numpy's float64 with gates as they are written."""

    def apply(name: str) -> np.ndarray:
        linear = getattr(layer, name)
        return (x @ linear.weight.T + linear.bias).detach().numpy()

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    candidate = apply("linear_h")
    if layer.log_space:
        candidate = np.where(candidate >= 0, candidate + 0.5, sigmoid(candidate))
    if isinstance(layer, MinGRU):
        take = sigmoid(apply("linear_z"))
        keep = 1 - take
    else:
        f, i = sigmoid(apply("linear_f")), sigmoid(apply("linear_i"))
        keep, take = f / (f + i), i / (f + i)
    h, states = state.numpy(), []
    for t in range(x.shape[1]):
        h = keep[:, t] * h + take[:, t] * candidate[:, t]
        states.append(h)
    return torch.as_tensor(np.stack(states, 1)), torch.as_tensor(h)


@each_kind
@each_form
class TestLayers:
    @pytest.mark.parametrize("time", [1, 2, 40])
    @pytest.mark.parametrize("start", ["none", "zeros", "any sign"])
    def test_equals_the_recurrence(self, kind: type[Layer], log_space: bool, time: int, start: str) -> None:
        layer, x = _layer(kind, log_space), _random(BATCH, time, DIM)
        state = _random(BATCH, 6, seed=2) * (start == "any sign")
        h, last = _loop(layer, x, state)
        y, found = layer(x, None if start == "none" else state)
        torch.testing.assert_close(y, h @ layer.out_proj.weight.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found, last, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("start", [None, _random(BATCH, 6, seed=2)])
    def test_steps_equal_the_whole(self, kind: type[Layer], log_space: bool, start: Tensor | None) -> None:
        layer, x, state = _layer(kind, log_space), _random(BATCH, TIME, DIM), start
        whole, last = layer(x, start)
        for t in range(TIME):
            y, state = layer.step(x[:, t], state)
            torch.testing.assert_close(y, whole[:, t])
        torch.testing.assert_close(state, last)

    @pytest.mark.parametrize("carried", [False, True])
    def test_padding_leaves_the_state_alone(self, kind: type[Layer], log_space: bool, carried: bool) -> None:
        layer, x, mask = _layer(kind, log_space), _random(BATCH, TIME, DIM), torch.ones(BATCH, TIME, dtype=torch.bool)
        mask[1, :4] = False
        start = _random(BATCH, 6, seed=2) if carried else None
        y, state = layer(x, start, mask=mask)
        for b, padding in enumerate((0, 4)):
            alone, end = layer(x[b : b + 1, padding:], None if start is None else start[b : b + 1])
            torch.testing.assert_close(y[b : b + 1, padding:], alone)
            torch.testing.assert_close(state[b : b + 1], end)

    def test_states_stay_between_start_and_candidates(self, kind: type[Layer], log_space: bool) -> None:
        layer, x = _layer(kind, log_space, 1.0), 3 * _random(BATCH, 200, DIM)
        start = _random(BATCH, DIM, seed=2)
        h, _ = layer(x, start)
        candidate = layer.linear_h(x)
        candidate = log_g(candidate).exp() if log_space else candidate
        seen = torch.cat([start[:, None], candidate], 1)
        slack = 1e-12
        assert (h <= seen.cummax(1).values[:, 1:] + slack).all()
        assert (h >= seen.cummin(1).values[:, 1:] - slack).all()

    def test_extreme_gates_give_neither_nan_nor_infinity(self, kind: type[Layer], log_space: bool) -> None:
        layer, x = _layer(kind, log_space).float(), 1e4 * _random(BATCH, 300, DIM, dtype=torch.float32)
        x.requires_grad_()
        y, state = layer(x)
        (y.mean() + state.mean()).backward()
        assert y.isfinite().all()
        assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))

    def test_sizes(self, kind: type[Layer], log_space: bool) -> None:
        gates = 1 if kind is MinGRU else 2
        layer = kind(DIM, 1.0, log_space)
        assert sum(p.numel() for p in layer.parameters()) == (gates + 1) * (DIM * DIM + DIM)
        assert kind(DIM, 2.5, log_space)(torch.ones(3, 2, DIM))[1].shape == (3, 10)
        assert sum(p.numel() for p in kind(DIM, 2.0).parameters()) == (gates + 1) * (8 * DIM + 8) + 8 * DIM

    def test_states_of_bfloat16_are_float32(self, kind: type[Layer], log_space: bool) -> None:
        layer, x = _layer(kind, log_space).to(torch.bfloat16), _random(BATCH, 300, DIM).bfloat16()
        exact = copy.deepcopy(layer).double()
        y, state = layer(x)
        assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        expected = exact(x.double())[0]
        assert (y.double() - expected).abs().max() < 2**-4 * expected.abs().max()
        y, state = layer.step(x[:, 0], state)
        assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        assert layer.step(x[:, 0])[1].dtype == torch.float32

    def test_the_generator_decides_the_weights(self, kind: type[Layer], log_space: bool) -> None:
        before = torch.get_rng_state()
        one, same, other = (kind(DIM, 2.0, log_space, generator=_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert all(map(torch.equal, one.parameters(), same.parameters()))
        assert not any(map(torch.equal, one.parameters(), other.parameters()))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self, kind: type[Layer], log_space: bool) -> None:
        layer, x = _layer(kind, log_space), _random(BATCH, TIME, DIM)
        with pytest.raises(ValueError, match=r"x: expected \[batch, time, 4\] .* got shape \(2, 9, 3\)"):
            layer(x[..., :3])
        with pytest.raises(ValueError, match="x: expected"):
            layer.step(x[:, 0, :3])
        with pytest.raises(ValueError, match=r"x_t: expected \[batch, 4\], got shape \(2, 9, 4\)"):
            layer.step(x)
        with pytest.raises(ValueError, match="initial_state: expected"):
            layer(x, _random(BATCH, 5))
        with pytest.raises(ValueError, match=r"mask: expected \[2, 9\]"):
            layer(x, mask=torch.ones(2, 8, dtype=torch.bool))
        with pytest.raises(ValueError, match="dim: expected at least 1"):
            kind(0)
        with pytest.raises(ValueError, match="expansion: expected more than 0"):
            kind(3, 0.0)
        with pytest.raises(ValueError, match=r"expansion: expected at least one hidden unit, got 0\.1 for dim 3"):
            kind(3, 0.1)


class TestMinGRU:
    @each_form
    def test_a_gate_that_is_open_has_no_memory(self, log_space: bool) -> None:
        layer, x, start = _layer(log_space=log_space, expansion=1.0), _random(BATCH, TIME, DIM), _random(BATCH, DIM)
        _set(layer.linear_z, math.inf)
        expected = layer.linear_h(x)
        expected = log_g(expected).exp() if log_space else expected
        torch.testing.assert_close(layer(x, start)[0], expected)

    @each_form
    def test_a_gate_that_is_shut_keeps_the_state_forever(self, log_space: bool) -> None:
        layer, x, start = _layer(log_space=log_space, expansion=1.0), _random(BATCH, 500, DIM), _random(BATCH, DIM)
        _set(layer.linear_z, -math.inf)
        y, state = layer(x, start)
        assert torch.equal(y, start[:, None].expand_as(y))
        assert torch.equal(state, start)

    def test_reduces_to_gru_with_a_tanh_and_no_weights_from_the_state(self) -> None:
        layer, gru = _layer(log_space=False, expansion=1.0), nn.GRU(DIM, DIM, batch_first=True).double()
        with torch.no_grad():
            gru.weight_hh_l0.zero_()
            gru.bias_hh_l0.zero_()
            gru.weight_ih_l0[DIM:].copy_(torch.cat([-layer.linear_z.weight, layer.linear_h.weight]))
            gru.bias_ih_l0[DIM:].copy_(torch.cat([-layer.linear_z.bias, layer.linear_h.bias]))
        layer.linear_h = nn.Sequential(layer.linear_h, nn.Tanh())
        x, start = _random(BATCH, TIME, DIM), _random(BATCH, DIM, seed=2)
        expected, last = gru(x, start[None])
        y, state = layer(x, start)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(state, last[0])


class TestMinLSTM:
    def test_equal_gates_take_the_mean(self) -> None:
        layer, x, start = _layer(MinLSTM, False, 1.0), _random(BATCH, 1, DIM), _random(BATCH, DIM)
        layer.linear_i = layer.linear_f
        torch.testing.assert_close(layer(x, start)[0][:, 0], (start + layer.linear_h(x)[:, 0]) / 2)

    def test_factors_add_up_to_one_and_depend_on_the_ratio_of_the_gates_only(self) -> None:
        layer, x = _layer(MinLSTM), _random(BATCH, TIME, DIM)
        keep, take = layer.log_gates(x)
        torch.testing.assert_close(keep.exp() + take.exp(), torch.ones_like(keep))
        for f, i in ((0.2, 0.6), (0.1, 0.3), (0.25, 0.75)):
            _set(layer.linear_f, math.log(f / (1 - f)))
            _set(layer.linear_i, math.log(i / (1 - i)))
            keep, take = layer.log_gates(x)
            torch.testing.assert_close(keep.exp(), torch.full_like(keep, 0.25))
            torch.testing.assert_close(take.exp(), torch.full_like(keep, 0.75))


class TestLogForm:
    def test_g(self) -> None:
        v = torch.tensor([-800.0, -3.0, -1e-12, 0.0, 1e-12, 2.0, 1e300], dtype=torch.float64)
        expected = [-800.0, math.log(1 / (1 + math.exp(3))), math.log(0.5), math.log(0.5), math.log(0.5), math.log(2.5)]
        torch.testing.assert_close(log_g(v)[:6], torch.tensor(expected, dtype=torch.float64))
        assert log_g(v)[6].item() == pytest.approx(math.log(1e300))
        slope = v.clone().requires_grad_()
        log_g(slope).sum().backward()
        assert slope.grad.isfinite().all()
        assert torch.autograd.gradcheck(log_g, torch.tensor([-2.0, -0.1, 0.2, 3.0]).double().requires_grad_())

    @given(st.integers(1, 30), st.integers(0, 99))
    @settings(max_examples=20)
    def test_the_papers_scan_is_the_layers(self, time: int, seed: int) -> None:
        layer, x = _layer(expansion=1.0), _random(BATCH, time, DIM, seed=seed)
        start = _random(BATCH, DIM, seed=seed + 1).exp()
        keep, take = layer.log_gates(x)
        values = torch.cat([start.log()[:, None], take + log_g(layer.linear_h(x))], 1)
        torch.testing.assert_close(parallel_scan_log(keep, values), layer(x, start)[0])

    def test_the_papers_scan_loses_digits_where_the_layer_does_not(self) -> None:
        layer, x = _layer(expansion=1.0), _random(BATCH, 2000, DIM, dtype=torch.float32)
        exact = layer(x.double())[0]
        layer.float()
        keep, take = layer.log_gates(x)
        start = torch.full((BATCH, 1, DIM), -math.inf)
        listing = parallel_scan_log(keep, torch.cat([start, take + log_g(layer.linear_h(x))], 1))
        errors = [((y.double() - exact).abs() / exact).max().item() for y in (listing, layer(x)[0])]
        assert errors[0] > 20 * errors[1]
        assert errors[1] < 1e-5

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"log_values: expected \[2, 4, 5\], got shape \(2, 3, 5\)"):
            parallel_scan_log(torch.ones(2, 3, 5), torch.ones(2, 3, 5))


@each_kind
def test_defaults(kind: type[Layer]) -> None:
    layer = kind(DIM)
    assert (layer.d_hidden, layer.log_space) == (DIM, True)
    assert isinstance(layer.out_proj, nn.Identity)
