import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlreviews.models import SequenceModel
from mlreviews.ssm.mamba_2 import Mamba2Block
from mlreviews.ssm.state_collapse_mitigations import (
    MitigatedMamba2,
    StateCollapseMonitor,
    clipped_ssd,
    scaled_ssd,
    sliding_state,
    windowed_ssd,
)
from mlreviews_kernels.ssd import ssd
from tests.contracts.families import Sample

BATCH, TIME, HEADS, DIM, GROUPS, STATE = 2, 11, 4, 3, 2, 5


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _inputs(time: int = TIME, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, log_a, B, C; decays from 0.2 to 1."""
    x, B, C = (_random(BATCH, time, *s, seed=seed + i) for i, s in enumerate(((HEADS, DIM), *2 * [(GROUPS, STATE)])))
    log_a = -0.5 * _random(BATCH, time, HEADS, seed=seed + 3).abs()
    return tuple(t.to(dtype) for t in (x, log_a, B, C))


def _block() -> Mamba2Block:
    block = Mamba2Block(4, STATE, 2, ngroups=2, generator=_rng()).double()
    with torch.no_grad():
        block.A_log.copy_(_random(4, seed=7) * 0.3)
        block.dt_bias.copy_(_random(4, seed=8) * 0.3)
        for i, parameter in enumerate(block.parameters()):
            parameter += 0.1 * _random(*parameter.shape, seed=20 + i)
    return block


SCANS: dict[str, Any] = {
    "window": partial(windowed_ssd, window=4),
    "norm": partial(clipped_ssd, max_norm=0.5, chunk_size=3),
    "scales": partial(scaled_ssd, decay_scale=0.8, input_scale=0.7),
}


def _sample(name: str) -> Sample:
    return Sample(MitigatedMamba2(_block().float(), SCANS[name]), (_random(BATCH, 8, 4).float(),))


CONTRACT = {
    "MitigatedMamba2": lambda: _sample("window"),
    "MitigatedMamba2, bounded norm": lambda: _sample("norm"),
    "MitigatedMamba2, scales": lambda: _sample("scales"),
}


def _each_input(log_a: Tensor) -> Tensor:
    """[batch, heads, t, i]: what is left at t of input i, by products of decays from i + 1 to t."""
    batch, time, heads = log_a.shape
    found = torch.zeros(batch, heads, time, time, dtype=log_a.dtype)
    for t in range(time):
        for i in range(t + 1):
            found[:, :, t, i] = log_a[:, i + 1 : t + 1].exp().prod(1)
    return found


def _states(x: Tensor, log_a: Tensor, B: Tensor, window: int | None = None) -> Tensor:
    """All states, [batch, time, heads, state, dim], as weighted sums over (the last) inputs."""
    weights = _each_input(log_a)
    if window is not None:
        weights = weights.triu(1 - window)
    return torch.einsum("bhti,bihn,bihp->bthnp", weights, B.repeat_interleave(HEADS // GROUPS, 2), x)


def _read(h: Tensor, C: Tensor) -> Tensor:
    return torch.einsum("bthnp,bthn->bthp", h, C.repeat_interleave(HEADS // GROUPS, 2))


class TestWindow:
    @pytest.mark.parametrize("window", [1, 2, 3, 5, 10, 11, 12, 40])
    def test_equals_scans_started_anew_for_every_token(self, window: int) -> None:
        x, log_a, B, C = _inputs()
        y, state = windowed_ssd(x, log_a, B, C, window)
        for t in range(TIME):
            last = slice(max(0, t - window + 1), t + 1)
            expected, h = ssd(x[:, last], log_a[:, last], B[:, last], C[:, last])
            torch.testing.assert_close(y[:, t], expected[:, -1], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(state.h, h, rtol=1e-10, atol=1e-11)
        assert [t.shape[1] for t in state[1:]] == 3 * [min(window - 1, TIME)]

    @pytest.mark.parametrize("window", [1, 2, 4, 11, 30])
    def test_difference_of_states_equals_the_sum_over_the_window(self, window: int) -> None:
        x, log_a, B, C = _inputs()
        expected = _states(x, log_a, B, window)
        found = sliding_state(_states(x, log_a, B), log_a, window)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(windowed_ssd(x, log_a, B, C, window)[0], _read(expected, C))

    @given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
    @settings(max_examples=25)
    def test_parts_equal_the_whole(self, window: int, first: int, second: int, seed: int) -> None:
        inputs = _inputs(first + second, seed)
        whole, last = windowed_ssd(*inputs, window)
        y_first, state = windowed_ssd(*(t[:, :first] for t in inputs), window)
        y_second, end = windowed_ssd(*(t[:, first:] for t in inputs), window, initial_state=state)
        torch.testing.assert_close(torch.cat([y_first, y_second], 1), whole)
        torch.testing.assert_close(end, last)

    def test_gradients_equal_those_of_the_direct_form(self) -> None:
        inputs = [t.requires_grad_() for t in _inputs()]
        x, log_a, B, C = inputs
        weights, h_weights = _random(*x.shape, seed=9), _random(BATCH, HEADS, STATE, DIM, seed=10)
        y, state = windowed_ssd(*inputs, 4)
        h = _states(x, log_a, B, 4)
        pairs = ((y, state.h), (_read(h, C), h[:, -1]))
        found, expected = (
            torch.autograd.grad((out * weights).sum() + (end * h_weights).sum(), inputs) for out, end in pairs
        )
        torch.testing.assert_close(found, expected)

    def test_window_of_one_sees_the_present_token_only(self) -> None:
        x, log_a, B, C = _inputs()
        products = (B * C).sum(-1).repeat_interleave(HEADS // GROUPS, 2)
        torch.testing.assert_close(windowed_ssd(x, log_a, B, C, 1)[0], products[..., None] * x)

    def test_reduces_to_mamba_2_when_all_is_in_the_window(self) -> None:
        inputs = _inputs()
        y, h = ssd(*inputs)
        for window in (TIME, TIME + 1, 100):
            found, state = windowed_ssd(*inputs, window)
            torch.testing.assert_close((found, state.h), (y, h))

    def test_reduces_to_sliding_window_linear_attention_without_decay(self) -> None:
        x, log_a, B, C = _inputs()
        scores = torch.einsum("btgn,bign->bgti", C, B).tril().triu(-3).repeat_interleave(HEADS // GROUPS, 1)
        y, _ = windowed_ssd(x, 0 * log_a, B, C, 4)
        torch.testing.assert_close(y, torch.einsum("bhti,bihp->bthp", scores, x))

    def test_a_decay_of_zero_empties_the_window(self) -> None:
        x, log_a, B, C = _inputs()
        log_a[:, [0, 3, 7]] = -math.inf
        log_a.requires_grad_()
        y, _ = windowed_ssd(x, log_a, B, C, 4)
        torch.testing.assert_close(y, _read(_states(x, log_a, B, 4), C))
        y.sum().backward()
        assert log_a.grad.isfinite().all()

    def test_no_digits_are_lost_on_long_inputs_in_float32(self) -> None:
        # All that came before is a million times what is in the window; the paper's difference can't see the window.
        time, window = 4000, 16
        x, log_a, B, C = _inputs(time, dtype=torch.float32)
        x[:, :-100] *= 1e6
        log_a *= 1e-4
        y, _ = windowed_ssd(x, log_a, B, C, window)
        last = [t[:, -200:].double() for t in (x, log_a, B, C)]
        exact = windowed_ssd(*last, window)[0][:, -50:]
        assert (y[:, -50:] - exact).abs().max() < 1e-4
        wide, narrow = (ssd(*(t.to(dtype) for t in (x, log_a, B, C)))[0] for dtype in (torch.float64, torch.float32))
        assert (wide - narrow)[:, -50:].abs().max() > 1  # so much is lost already before states are subtracted

    def test_in_bfloat16_states_are_float32(self) -> None:
        inputs = _inputs(30, dtype=torch.bfloat16)
        y, state = windowed_ssd(*inputs, 4)
        exact, _ = windowed_ssd(*(t.double() for t in inputs), 4)
        assert y.dtype == torch.bfloat16
        assert {t.dtype for t in state} == {torch.float32}
        assert (y - exact).norm() < 0.005 * exact.norm()

    def test_bounds_the_variance_of_a_state_that_hardly_forgets(self) -> None:
        x, log_a, B, _ = _inputs(200)
        log_a = torch.full_like(log_a, math.log(0.9999))
        h = _states(x, log_a, B)
        variance = [s.var(dim=(0, 1, 3, 4)).mean().item() for s in h.split(50, 1)]
        assert variance == sorted(variance)
        assert variance[-1] > 4 * variance[0]
        window = [s.var(dim=(0, 1, 3, 4)).mean().item() for s in sliding_state(h, log_a, 20).split(50, 1)]
        assert max(window[1:]) < 1.5 * min(window[1:])

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        inputs = _inputs()
        for call in (windowed_ssd, lambda *args: sliding_state(_states(*args[:3]), args[1], args[4])):
            with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
                call(*inputs, 0)
        with pytest.raises(ValueError, match="B: expected"):
            windowed_ssd(*inputs[:2], inputs[2][:1], inputs[3], 3)


def _clipped(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, max_norm: float, h: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (3), head by head."""
    outputs = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for head in range(HEADS):
            state, group = h[b, head], head // (HEADS // GROUPS)
            for t in range(x.shape[1]):
                state = log_a[b, t, head].exp() * state + torch.outer(B[b, t, group], x[b, t, head])
                if state.norm() > max_norm:
                    state = state / state.norm() * max_norm
                outputs[b, t, head] = state.T @ C[b, t, group]
            h = h.clone()
            h[b, head] = state
    return outputs, h


class TestClipping:
    @pytest.mark.parametrize("chunk", [1, 4, TIME, 64])
    @pytest.mark.parametrize("max_norm", [0.5, 5.0, 12.0, 1e3])
    def test_equals_the_recurrence(self, max_norm: float, chunk: int) -> None:
        inputs, start = _inputs(), 0.3 * _random(BATCH, HEADS, STATE, DIM, seed=9)
        expected, h = _clipped(*inputs, max_norm, start)
        y, state = clipped_ssd(*inputs, max_norm, chunk_size=chunk, initial_state=start)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(state, h, rtol=1e-10, atol=1e-11)

    def test_the_norm_never_exceeds_the_bound(self) -> None:
        inputs = _inputs()
        plain = _states(*inputs[:3]).norm(dim=(3, 4))
        assert (plain > 6).any(2).any(0)[3:].all()
        reached = 0
        for t in range(1, TIME + 1):
            _, state = clipped_ssd(*(i[:, :t] for i in inputs), 6.0)
            norms = state.norm(dim=(2, 3))
            assert (norms <= 6 + 1e-12).all()
            reached += int((norms > 6 - 1e-9).sum())
        assert reached > 10

    def test_small_queries_are_no_reason_not_to_cut(self) -> None:
        x, log_a, B, C = _inputs()
        (y, state), (small, same) = (clipped_ssd(x, log_a, B, scale * C, 2.0) for scale in (1.0, 1e-3))
        torch.testing.assert_close((1e3 * small, same), (y, state))

    def test_large_inputs_saturate(self) -> None:
        x, log_a, B, C = _inputs()
        (y, state), (other, same) = (clipped_ssd(scale * x, log_a, B, C, 2.0) for scale in (1e6, 1e9))
        torch.testing.assert_close(state.norm(dim=(2, 3)), torch.full((BATCH, HEADS), 2.0).double())
        torch.testing.assert_close((other, same), (y, state), rtol=1e-4, atol=1e-4)

    def test_reduces_to_mamba_2_without_a_bound(self) -> None:
        inputs, start = _inputs(), _random(BATCH, HEADS, STATE, DIM, seed=9)
        for max_norm in (math.inf, 1e4):
            torch.testing.assert_close(
                clipped_ssd(*inputs, max_norm, chunk_size=4, initial_state=start), ssd(*inputs, initial_state=start)
            )

    def test_chunks_below_the_bound_are_done_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import mlreviews.ssm.state_collapse_mitigations as module

        steps = []
        monkeypatch.setattr(module, "ssd_step", lambda *args: steps.append(1) or pytest.fail("a step was made"))
        x, log_a, B, C = _inputs()
        log_a = torch.full_like(log_a, math.log(0.5))
        weights = B.norm(dim=-1).repeat_interleave(HEADS // GROUPS, 2) * x.norm(dim=-1)
        bound, h = 0.0, torch.zeros(())
        for t in range(TIME):
            h = 0.5 * h + weights[:, t]
            bound = max(bound, h.max().item())
        clipped_ssd(x, log_a, B, C, bound * (1 + 1e-9))
        monkeypatch.undo()
        assert not steps

    @pytest.mark.parametrize("cut", [1, 4, 10])
    def test_parts_equal_the_whole_in_values_and_gradients(self, cut: int) -> None:
        inputs = [t.requires_grad_() for t in _inputs()]
        whole = clipped_ssd(*inputs, 5.0, chunk_size=3)
        first, state = clipped_ssd(*(t[:, :cut] for t in inputs), 5.0, chunk_size=3)
        second, end = clipped_ssd(*(t[:, cut:] for t in inputs), 5.0, chunk_size=3, initial_state=state)
        parts = (torch.cat([first, second], 1), end)
        torch.testing.assert_close(parts, whole)
        found, expected = (
            torch.autograd.grad((y * _random(*y.shape, seed=9)).sum() + h.square().sum(), inputs)
            for y, h in (parts, whole)
        )
        torch.testing.assert_close(found, expected)

    def test_gradcheck(self) -> None:
        inputs = [t[:, :4].clone().requires_grad_() for t in _inputs()]
        run = partial(clipped_ssd, max_norm=4.0, chunk_size=2)
        assert not torch.equal(run(*inputs)[0], ssd(*inputs)[0])
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)

    def test_a_state_of_zero_has_finite_gradients(self) -> None:
        x, log_a, B, C = (t.clone() for t in _inputs())
        x[:, :3] = 0
        x.requires_grad_()
        clipped_ssd(x, log_a, B, C, 1e-3)[0].sum().backward()
        assert x.grad.isfinite().all()

    def test_in_bfloat16_states_are_float32(self) -> None:
        inputs = _inputs(30, dtype=torch.bfloat16)
        for max_norm in (2.0, math.inf):
            y, state = clipped_ssd(*inputs, max_norm)
            exact, _ = clipped_ssd(*(t.double() for t in inputs), max_norm)
            assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
            assert (y - exact).norm() < 0.01 * exact.norm()

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        for max_norm in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="max_norm: expected more than 0"):
                clipped_ssd(*_inputs(), max_norm)
        with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
            clipped_ssd(*_inputs(), 1.0, chunk_size=0)


class TestScaling:
    def test_reduces_to_mamba_2_with_scales_of_one(self) -> None:
        inputs, start = _inputs(), _random(BATCH, HEADS, STATE, DIM, seed=9)
        torch.testing.assert_close(scaled_ssd(*inputs, initial_state=start), ssd(*inputs, initial_state=start))

    def test_no_decay_left_keeps_the_present_token_only(self) -> None:
        inputs = _inputs()
        torch.testing.assert_close(scaled_ssd(*inputs, decay_scale=0.0)[0], windowed_ssd(*inputs, 1)[0])

    def test_an_input_counts_once_with_its_scale_and_once_a_token_since(self) -> None:
        x, log_a, B, C = _inputs()
        times = torch.arange(TIME)
        factor = 0.5 * 0.9 ** (times[:, None] - times).clamp(min=0).double()
        weights = _each_input(log_a) * factor
        h = torch.einsum("bhti,bihn,bihp->bthnp", weights, B.repeat_interleave(HEADS // GROUPS, 2), x)
        y, state = scaled_ssd(x, log_a, B, C, 0.9, 0.5)
        torch.testing.assert_close((y, state), (_read(h, C), h[:, -1]))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="decay_scale: expected a probability"):
            scaled_ssd(*_inputs(), 1.1)
        with pytest.raises(ValueError, match="input_scale: expected a probability"):
            scaled_ssd(*_inputs(), input_scale=-0.1)


class TestMitigatedMamba2:
    @pytest.mark.parametrize("scan", [ssd, partial(windowed_ssd, window=99), partial(clipped_ssd, max_norm=1e9)])
    def test_reduces_to_mamba_2_where_nothing_is_mitigated(self, scan: Any) -> None:
        block, u = _block(), _random(BATCH, TIME, 4)
        y, state = MitigatedMamba2(block, scan)(u)
        expected, last = block(u)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(state.conv, last.conv)

    @pytest.mark.parametrize("name", SCANS)
    def test_a_mitigation_shows_and_steps_equal_the_whole(self, name: str) -> None:
        layer, u = MitigatedMamba2(_block(), SCANS[name]), _random(BATCH, TIME, 4)
        whole, last = layer(u)
        assert (whole - layer.block(u)[0]).abs().max() > 1e-3
        _, state = layer(u[:, :2])
        for t in range(2, TIME):
            y, state = layer.step(u[:, t], state)
            torch.testing.assert_close(y, whole[:, t])
        torch.testing.assert_close(state, last)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        layer, u = MitigatedMamba2(_block(), ssd), _random(BATCH, TIME, 4)
        with pytest.raises(ValueError, match=r"u: expected \[batch, time, 4\]"):
            layer(u[..., :3])
        with pytest.raises(ValueError, match=r"u_t: expected \[batch, 4\], got shape \(2, 11, 4\)"):
            layer.step(u)


class TestMonitor:
    def test_sees_the_states_of_every_block(self) -> None:
        window = MitigatedMamba2(_block(), SCANS["window"])
        model = SequenceModel(13, 4, [_block(), window], generator=_rng()).double()
        ids = torch.randint(13, (3, TIME), generator=_rng())
        monitor = StateCollapseMonitor(model, every=4)
        for _ in range(2):  # a second call forgets the first
            torch.testing.assert_close(monitor(ids), model(ids)[0])
        assert monitor.positions == [4, 8, 11]
        variances = monitor.variance_by_channel()
        assert [v.shape for v in variances] == 2 * [(3, 4, 2)]
        for look, position in enumerate(monitor.positions):
            plain, mitigated = model(ids[:, :position])[1]
            for found, h in zip(variances, (plain.ssm, mitigated.ssm.h), strict=True):
                channels = h.transpose(2, 3)  # [rows, heads, dim, state]
                for head in range(4):
                    for p in range(2):
                        expected = channels[:, head, p].flatten().detach().numpy().var()
                        assert found[look, head, p].item() == pytest.approx(expected, rel=1e-9)

    def test_looks_every_64_tokens(self) -> None:
        monitor = StateCollapseMonitor(SequenceModel(13, 4, [_block()], generator=_rng()).double())
        monitor(torch.zeros(1, 130, dtype=torch.long))
        assert monitor.positions == [64, 128, 130]
        assert not monitor.states[0][0].requires_grad

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
            StateCollapseMonitor(_block(), every=0)
