import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor, nn

from mlreviews.ssm.mamba import MambaBlock, MambaState, initial_dt_bias, zero_order_hold
from mlreviews.ssm.mingru import MinGRU
from mlreviews_kernels.selective_scan import selective_scan
from tests.contracts.families import Sample

BATCH, TIME, DIM, STATE = 2, 9, 6, 3


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _block(d_conv: int = 4, dtype: torch.dtype = torch.float64, **options: Any) -> MambaBlock:
    """With every parameter moved away from where it begins, and steps large enough for the state to matter."""
    block = MambaBlock(DIM, STATE, d_conv, dt_rank=2, generator=_rng(), **options)
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.add_(0.3 * _random(*parameter.shape, seed=i, dtype=torch.float32))
        block.dt_proj.bias.fill_(-0.5)
    return block.to(dtype)


CONTRACT = {
    "MambaBlock": lambda: Sample(_block(dtype=torch.float32, bias=True), (_random(BATCH, TIME, DIM).float(),)),
    "MambaBlock, no convolution": lambda: Sample(_block(1, torch.float32), (_random(BATCH, TIME, DIM).float(),)),
    "initial_dt_bias": lambda: Sample(initial_dt_bias, (5,)),
}


def _loop(block: MambaBlock, x: np.ndarray) -> np.ndarray:
    """Equations (1) and (2) in numpy, one number at a time, for one sequence [time, d_model]."""
    p = {name: value.detach().double().numpy() for name, value in block.named_parameters()}
    inner, width = p["conv1d.weight"].shape[0], p["conv1d.weight"].shape[2]
    rank = p["dt_proj.weight"].shape[1]
    both = x @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
    u, z = both[:, :inner], both[:, inner:]
    state, outputs = np.zeros((inner, p["A_log"].shape[1])), []
    for t in range(len(x)):
        v = np.array(
            [
                sum(p["conv1d.weight"][d, 0, width - 1 - k] * u[t - k, d] for k in range(min(width, t + 1)))
                for d in range(inner)
            ]
        )
        v = v + p.get("conv1d.bias", 0)
        v = v / (1 + np.exp(-v))
        projected = p["x_proj.weight"] @ v
        delta = np.log1p(np.exp(p["dt_proj.weight"] @ projected[:rank] + p["dt_proj.bias"]))
        B, C = np.split(projected[rank:], 2)
        y = np.empty(inner)
        for d in range(inner):
            for n in range(len(B)):
                state[d, n] = math.exp(-delta[d] * math.exp(p["A_log"][d, n])) * state[d, n] + delta[d] * v[d] * B[n]
            y[d] = (state[d] * C).sum() + p["D"][d] * v[d]
        outputs.append(p["out_proj.weight"] @ (y * z[t] / (1 + np.exp(-z[t]))) + p.get("out_proj.bias", 0))
    return np.stack(outputs)


class TestMambaBlock:
    @pytest.mark.parametrize("d_conv", [1, 2, 4])
    @pytest.mark.parametrize("biases", [False, True])
    def test_equals_the_equations_one_number_at_a_time(self, d_conv: int, biases: bool) -> None:
        block, x = _block(d_conv, bias=biases, conv_bias=not biases), _random(BATCH, TIME, DIM)
        y, state = block(x)
        for b in range(BATCH):
            np.testing.assert_allclose(y[b].detach(), _loop(block, x[b].numpy()), rtol=1e-9, atol=1e-12)
        assert state.conv.shape == (BATCH, d_conv - 1, 2 * DIM)
        assert state.ssm.shape == (BATCH, 2 * DIM, STATE)

    def test_in_bfloat16_rates_and_states_are_float32(self) -> None:
        exact, x = _block().to(torch.bfloat16).double(), _random(BATCH, 50, DIM).bfloat16()
        block = copy.deepcopy(exact).to(torch.bfloat16)
        assert block.rates().dtype == torch.float32
        torch.testing.assert_close(block.rates().double(), exact.rates(), rtol=1e-6, atol=0)
        y, state = block(x)
        assert (y.dtype, state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        expected = exact(x.double())[0]
        # a few roundings of 2^-9 one after another, none of which the recurrence repeats
        assert (y.double() - expected).abs().max() < 2**-5 * expected.abs().max()
        y, state = block.step(x[:, 0], state)
        assert (y.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
        assert exact.rates().dtype == torch.float64

    def test_begins_as_the_paper_says(self) -> None:
        block = MambaBlock(40, 5, generator=_rng())
        torch.testing.assert_close(block.rates(), -torch.arange(1.0, 6).expand(80, 5))
        assert torch.equal(block.D, torch.ones(80))
        assert block.dt_proj.weight.shape == (80, 3)
        steps = nn.functional.softplus(block.dt_proj.bias)
        assert steps.min() >= 0.00099
        assert steps.max() <= 0.101
        assert [tuple(MambaBlock(48).A_log.shape), MambaBlock(48).dt_rank, MambaBlock(49).dt_rank] == [(96, 16), 3, 4]
        assert MambaBlock(48).conv1d.weight.shape == (96, 1, 4)
        assert (block.in_proj.bias, block.out_proj.bias) == (None, None)
        assert block.conv1d.bias is not None
        assert block.conv1d.weight.abs().max() <= 0.5
        assert block.conv1d.weight.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.1)

    def test_the_generator_decides_the_weights(self) -> None:
        before = torch.get_rng_state()
        one, same, other = (MambaBlock(4, generator=_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert all(map(torch.equal, one.parameters(), same.parameters()))
        fixed = {"A_log", "D"}
        for (name, value), drawn in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(value, drawn) == (name in fixed)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        block, x = _block(), _random(BATCH, TIME, DIM)
        with pytest.raises(ValueError, match=r"x: expected \[batch, time, 6\] .* got shape \(2, 9, 5\)"):
            block(x[..., :5])
        with pytest.raises(ValueError, match=r"x: expected .* no empty axis"):
            block(x[:, :0])
        with pytest.raises(ValueError, match=r"x: expected .* got shape \(9, 6\)"):
            block(x[0])
        with pytest.raises(ValueError, match=r"x_t: expected \[batch, 6\], got shape \(2, 9, 6\)"):
            block.step(x)
        with pytest.raises(ValueError, match="x: expected"):
            block.step(x[:, 0, :5], block(x)[1])
        with pytest.raises(ValueError, match=r"mask: expected \[2, 9\], as x has, of bool, got shape \(2, 8\)"):
            block(x, mask=torch.ones(2, 8, dtype=torch.bool))
        with pytest.raises(ValueError, match="window: expected"):
            block(x, MambaState(x, x))
        with pytest.raises(ValueError, match="initial_state: expected"):
            block(x, MambaState(_random(2, 3, 12), x))
        for name in ("d_model", "d_state", "d_conv", "expand", "dt_rank"):
            with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
                MambaBlock(**({"d_model": 4} | {name: 0}))


class TestZeroOrderHold:
    def test_against_scipy(self) -> None:
        delta, A = _random(4, 2).exp(), -_random(2, 3, seed=1).exp()
        decay, gain = zero_order_hold(delta, A)
        for i in range(4):
            for d in range(2):
                for n in range(3):
                    system = tuple(np.array([[value]]) for value in (A[d, n].item(), 1.0, 1.0, 0.0))
                    a, b, *_ = signal.cont2discrete(system, delta[i, d].item(), "zoh")
                    assert decay[i, d, n].item() == pytest.approx(a.item(), rel=1e-12)
                    assert (gain[i, d, n] * delta[i, d]).item() == pytest.approx(b.item(), rel=1e-12)

    def test_small_steps_have_gain_one(self) -> None:
        delta = torch.tensor([0.0, 1e-300, 1e-9, 1e-4], dtype=torch.float64).requires_grad_()
        decay, gain = zero_order_hold(delta, torch.full((4, 1), -2.0, dtype=torch.float64))
        torch.testing.assert_close(gain[:, 0], 1 - delta, rtol=1e-7, atol=0)
        assert decay[0] == 1
        gain.sum().backward()
        assert delta.grad.isfinite().all()

    def test_theorem_1_is_a_gated_leaky_integrator(self) -> None:
        s, u = 2 * _random(BATCH, 40, DIM), _random(BATCH, 40, DIM, seed=1)
        A, ones = -torch.ones(DIM, 1, dtype=torch.float64), torch.ones(BATCH, 40, 1, dtype=torch.float64)
        gain = zero_order_hold(nn.functional.softplus(s), A)[1][..., 0]
        y, _ = selective_scan(u * gain, s, A, ones, ones, delta_softplus=True)
        h = torch.zeros(BATCH, DIM, dtype=torch.float64)
        for t in range(40):
            g = torch.sigmoid(s[:, t])
            h = (1 - g) * h + g * u[:, t]
            torch.testing.assert_close(y[:, t], h)
        # Without the gain, as it is trained, inputs count for up to softplus / sigmoid times as much.
        without, _ = selective_scan(u, s, A, ones, ones, delta_softplus=True)
        torch.testing.assert_close(without[:, 0], y[:, 0] * nn.functional.softplus(s[:, 0]) / torch.sigmoid(s[:, 0]))

    def test_reduces_to_mingru(self) -> None:
        layer, x = MinGRU(DIM, log_space=False, generator=_rng()).double(), _random(BATCH, 40, DIM)
        s, u = layer.linear_z(x), layer.linear_h(x)
        A, ones = -torch.ones(DIM, 1, dtype=torch.float64), torch.ones(BATCH, 40, 1, dtype=torch.float64)
        gain = zero_order_hold(nn.functional.softplus(s), A)[1][..., 0]
        y, state = selective_scan(u * gain, s, A, ones, ones, delta_softplus=True)
        expected, last = layer(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(state[..., 0], last)


def test_reduces_to_conv1d_where_nothing_depends_on_the_input() -> None:
    class TimeInvariant(MambaBlock):
        def selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            B, C = _random(2, STATE, seed=8)
            return torch.zeros_like(u), B.expand(*u.shape[:-1], -1), C.expand(*u.shape[:-1], -1)

    block, u = TimeInvariant(DIM, STATE, 1, dt_rank=2, generator=_rng()).double(), _random(BATCH, TIME, 2 * DIM)
    with torch.no_grad():
        block.D.zero_()
        block.dt_proj.bias.copy_(_random(2 * DIM, seed=4))
    _, B, C = block.selection(u)
    y, _ = selective_scan(
        u, torch.zeros_like(u), block.rates(), B.contiguous(), C.contiguous(), None, None, block.dt_proj.bias,
        delta_softplus=True,
    )  # fmt: skip
    step = nn.functional.softplus(block.dt_proj.bias)
    k = torch.arange(TIME, dtype=torch.float64)
    powers = torch.exp(k[:, None, None] * step[:, None] * block.rates())
    kernel = (powers * (B[0, 0] * C[0, 0])).sum(-1).T * step[:, None]
    padded = nn.functional.pad(u.mT, (TIME - 1, 0))
    expected = nn.functional.conv1d(padded, kernel.flip(1)[:, None], groups=2 * DIM).mT
    torch.testing.assert_close(y, expected)


class TestInitialSteps:
    def test_steps_are_log_uniform(self) -> None:
        steps = nn.functional.softplus(initial_dt_bias(20000, low=0.01, high=1.0, generator=_rng()).double())
        place = (steps / 0.01).log() / math.log(100)
        assert -1e-4 <= place.min() < 0.01
        assert 0.99 < place.max() <= 1 + 1e-4
        assert place.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 20000))
        assert place.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)

    def test_smallest_step(self) -> None:
        steps = nn.functional.softplus(initial_dt_bias(100, low=1e-6, high=1e-5, generator=_rng()))
        torch.testing.assert_close(steps, torch.full((100,), 1e-4), rtol=1e-4, atol=0)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
            initial_dt_bias(0, generator=None)


class TestTransformers:
    """The mixer of transformers, on its slow path, with random weights."""

    @pytest.fixture(params=[False, True])
    def pair(self, request: pytest.FixtureRequest) -> SimpleNamespace:
        from transformers import DynamicCache, MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        config = MambaConfig(
            hidden_size=DIM, state_size=STATE, num_hidden_layers=1, vocab_size=5, time_step_rank=2,
            use_bias=request.param, use_conv_bias=not request.param,
        )  # fmt: skip
        block = _block(dtype=torch.float32, bias=request.param, conv_bias=not request.param)
        mixer = MambaMixer(config, 0)
        mixer.load_state_dict(block.state_dict())
        other = MambaBlock(DIM, STATE, dt_rank=2, bias=request.param, conv_bias=not request.param)
        other.load_state_dict(mixer.state_dict())
        return SimpleNamespace(block=other, mixer=mixer, cache=DynamicCache(config=config))

    def test_outputs_and_gradients(self, pair: SimpleNamespace) -> None:
        x = _random(BATCH, TIME, DIM, dtype=torch.float32)
        found, expected = pair.block(x)[0], pair.mixer(x)
        torch.testing.assert_close(found, expected)
        for y in (found, expected):
            (y * _random(*y.shape, seed=3)).sum().backward()
        for (name, parameter), theirs in zip(
            sorted(pair.block.named_parameters()), [p for _, p in sorted(pair.mixer.named_parameters())], strict=True
        ):
            torch.testing.assert_close(parameter.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("prefill", [1, 2, 5])
    def test_prefill_then_decode(self, pair: SimpleNamespace, prefill: int) -> None:
        x = _random(BATCH, TIME, DIM, dtype=torch.float32)
        with torch.no_grad():
            y, state = pair.block(x[:, :prefill])
            torch.testing.assert_close(y, pair.mixer(x[:, :prefill], cache_params=pair.cache))
            for t in range(prefill, TIME):
                y, state = pair.block.step(x[:, t], state)
                torch.testing.assert_close(y, pair.mixer(x[:, t : t + 1], cache_params=pair.cache)[:, 0])
