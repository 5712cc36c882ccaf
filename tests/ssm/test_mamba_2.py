import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlreviews.ssm.mamba import MambaState
from mlreviews.ssm.mamba_2 import GatedRMSNorm, Mamba2Block, segsum, ssd_matrix
from mlreviews_kernels.selective_scan import selective_scan
from mlreviews_kernels.ssd import ssd
from tests.contracts.families import Sample

BATCH, TIME, DIM, STATE, HEADDIM, CHUNK = 2, 9, 6, 5, 3, 4  # 12 channels in 4 heads


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _block(d_conv: int = 4, ngroups: int = 2, dtype: torch.dtype = torch.float64, **options: Any) -> Mamba2Block:
    """With every parameter moved away from where it begins, and decays that leave something of the state."""
    sizes = {"headdim": HEADDIM, "ngroups": ngroups, "chunk_size": CHUNK}
    block = Mamba2Block(DIM, STATE, d_conv=d_conv, **sizes, generator=_rng(), **options)
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.add_(0.3 * _random(*parameter.shape, seed=i, dtype=torch.float32))
        block.dt_bias.copy_(torch.tensor([-0.5, -1.0, 0.3, -2.0]))
        block.A_log.copy_(torch.tensor([0.1, -0.6, 0.4, 0.9]))
    return block.to(dtype)


CONTRACT = {
    "Mamba2Block": lambda: Sample(_block(dtype=torch.float32, bias=True), (_random(BATCH, TIME, DIM).float(),)),
    "Mamba2Block, no convolution": lambda: Sample(_block(1, dtype=torch.float32), (_random(BATCH, TIME, DIM).float(),)),
    "GatedRMSNorm": lambda: Sample(
        GatedRMSNorm(6, 2), (_random(3, 6, dtype=torch.float32), _random(3, 6, seed=1, dtype=torch.float32))
    ),
}


def _loop(block: Mamba2Block, inputs: np.ndarray, groups: int) -> np.ndarray:
    """Equations (1), (4) and (5) in numpy, head by head and step by step, for one sequence [time, d_model]."""
    p = {name: value.detach().double().numpy() for name, value in block.named_parameters()}
    inner, heads = p["norm.weight"].shape[0], p["A_log"].shape[0]
    dim, width, shared = inner // heads, p["conv1d.weight"].shape[2], groups * STATE

    def silu(v: np.ndarray) -> np.ndarray:
        return v / (1 + np.exp(-v))

    projected = inputs @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
    z, xBC, delta = np.split(projected, [inner, 2 * inner + 2 * shared], axis=1)
    padded = np.concatenate([np.zeros((width - 1, xBC.shape[1])), xBC])
    state, outputs = np.zeros((heads, STATE, dim)), []
    for t in range(len(inputs)):
        v = silu((padded[t : t + width] * p["conv1d.weight"][:, 0].T).sum(0) + p.get("conv1d.bias", 0))
        y = np.empty((heads, dim))
        for h in range(heads):
            x = v[h * dim : (h + 1) * dim]
            g = h // (heads // groups)
            B = v[inner + g * STATE : inner + (g + 1) * STATE]
            C = v[inner + shared + g * STATE : inner + shared + (g + 1) * STATE]
            step = math.log1p(math.exp(delta[t, h] + p["dt_bias"][h]))
            state[h] = math.exp(-step * math.exp(p["A_log"][h])) * state[h] + np.outer(step * B, x)
            y[h] = C @ state[h] + p["D"][h] * x
        gated = (y.reshape(inner) * silu(z[t])).reshape(groups, -1)
        normed = gated / np.sqrt((gated**2).mean(1, keepdims=True) + 1e-5)
        outputs.append(p["out_proj.weight"] @ (normed.reshape(inner) * p["norm.weight"]) + p.get("out_proj.bias", 0))
    return np.stack(outputs)


class TestMamba2Block:
    @pytest.mark.parametrize(("d_conv", "ngroups", "biases"), [(1, 1, True), (4, 2, False), (2, 4, True)])
    def test_equals_the_equations_one_head_at_a_time(self, d_conv: int, ngroups: int, biases: bool) -> None:
        block, u = _block(d_conv, ngroups, bias=biases, conv_bias=not biases), _random(BATCH, TIME, DIM)
        y, state = block(u)
        for b in range(BATCH):
            np.testing.assert_allclose(y[b].detach(), _loop(block, u[b].numpy(), ngroups), rtol=1e-9, atol=1e-12)
        assert state.conv.shape == (BATCH, d_conv - 1, 12 + 2 * ngroups * STATE)
        assert state.ssm.shape == (BATCH, 4, STATE, HEADDIM)

    @pytest.mark.parametrize("chunk", [1, 2, 7, TIME, TIME + 1, 64])
    def test_chunks_change_nothing(self, chunk: int) -> None:
        block, u = _block(), _random(BATCH, TIME, DIM)
        other = copy.deepcopy(block)
        other.chunk_size = chunk
        torch.testing.assert_close(other(u), block(u))

    def test_in_bfloat16_decays_and_states_are_float32(self) -> None:
        block, u = _block(dtype=torch.bfloat16), _random(BATCH, 50, DIM).bfloat16()
        exact = copy.deepcopy(block).double()
        y, state = block(u)
        assert (y.dtype, state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        expected = exact(u.double())[0]
        # a few roundings of 2^-9 one after another, none of which the recurrence repeats
        assert (y.double() - expected).abs().max() < 2**-5 * expected.abs().max()
        y, state = block.step(u[:, 0], state)
        assert (y.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)

    def test_states_that_are_wiped_give_no_nan(self) -> None:
        block, u = _block(dtype=torch.float32), _random(BATCH, 3 * CHUNK + 2, DIM, dtype=torch.float32)
        with torch.no_grad():
            block.A_log.fill_(5.0)  # log a near -150 a step
        y, state = block(u)
        (y.sum() + state.ssm.sum()).backward()
        assert all(t.isfinite().all() for t in (y, state.ssm, *(p.grad for p in block.parameters())))

    def test_begins_as_the_papers_code(self) -> None:
        block = Mamba2Block(64, 8, 1, generator=_rng())
        rates = block.A_log.exp()
        assert 1 <= rates.min() < 1.5
        assert 15.5 < rates.max() <= 16
        assert rates.mean().item() == pytest.approx(8.5, abs=4 * 15 / math.sqrt(12 * 128))
        steps = nn.functional.softplus(block.dt_bias)
        assert 0.00099 < steps.min() < 0.002
        assert 0.05 < steps.max() < 0.101
        assert torch.equal(block.D, torch.ones(128))
        default = Mamba2Block(64)
        assert (default.d_state, default.headdim, default.heads, default.ngroups) == (128, 64, 2, 1)
        assert (default.chunk_size, default.norm.eps) == (256, 1e-5)
        assert (default.in_proj.bias, default.out_proj.bias) == (None, None)
        assert default.conv1d.bias is not None
        assert GatedRMSNorm(6).groups == 1
        assert default.conv1d.weight.shape == (128 + 256, 1, 4)
        assert default.in_proj.weight.shape == (2 * 128 + 256 + 2, 64)

    def test_the_generator_decides_the_weights(self) -> None:
        before = torch.get_rng_state()
        one, same, other = (Mamba2Block(4, 3, 2, generator=_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert all(map(torch.equal, one.parameters(), same.parameters()))
        for (name, value), drawn in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(value, drawn) == (name in {"D", "norm.weight"})

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        block, u = _block(), _random(BATCH, TIME, DIM)
        with pytest.raises(ValueError, match=r"u: expected \[batch, time, 6\] .* got shape \(2, 9, 5\)"):
            block(u[..., :5])
        with pytest.raises(ValueError, match=r"u_t: expected \[batch, 6\], got shape \(2, 9, 6\)"):
            block.step(u)
        with pytest.raises(ValueError, match="u: expected"):
            block.step(u[:, 0, :5], block(u)[1])
        with pytest.raises(ValueError, match=r"mask: expected \[2, 9\]"):
            block(u, mask=torch.ones(2, 8, dtype=torch.bool))
        with pytest.raises(ValueError, match="window: expected"):
            block(u, MambaState(u, u))
        with pytest.raises(ValueError, match="initial_state: expected"):
            block(u, MambaState(_random(2, 3, 32), u))
        with pytest.raises(ValueError, match="headdim: expected a divisor of 12 channels, got 5"):
            Mamba2Block(6, headdim=5)
        with pytest.raises(ValueError, match="ngroups: expected a divisor of 4 heads, got 3"):
            Mamba2Block(6, headdim=3, ngroups=3)
        for name in ("d_model", "d_state", "headdim", "expand", "d_conv", "ngroups", "chunk_size"):
            with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
                Mamba2Block(**({"d_model": 64} | {name: 0}))


def _ssm(time: int, heads: int = 4, groups: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _random(BATCH, time, heads, HEADDIM, seed=seed)
    log_a = -_random(BATCH, time, heads, seed=seed + 1).square()
    B, C = (_random(BATCH, time, groups, STATE, seed=seed + k) for k in (2, 3))
    return x, log_a, B, C


class TestDuality:
    @given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 20))
    @settings(max_examples=25)
    def test_the_scan_is_a_masked_attention(self, time: int, chunk: int, seed: int) -> None:
        x, log_a, B, C = _ssm(time, seed=seed)
        y, _ = ssd(x, log_a, B, C, chunk_size=chunk)
        attention = torch.einsum("bhij,bjhp->bihp", ssd_matrix(log_a, B, C), x)
        torch.testing.assert_close(y, attention, rtol=1e-9, atol=1e-10)

    def test_every_number_of_the_matrix(self) -> None:
        _, log_a, B, C = _ssm(5)
        matrix = ssd_matrix(log_a, B, C)
        for b, h, i, j in np.ndindex(BATCH, 4, 5, 5):
            decay = math.prod(math.exp(log_a[b, k, h]) for k in range(j + 1, i + 1))
            expected = decay * float(C[b, i, h // 2] @ B[b, j, h // 2]) if j <= i else 0.0
            assert matrix[b, h, i, j].item() == pytest.approx(expected, rel=1e-12)

    def test_blocks_off_the_diagonal_have_the_rank_of_the_state(self) -> None:
        _, log_a, B, C = _ssm(20)
        matrix = ssd_matrix(0.1 * log_a, B, C)
        for i in range(20):
            ranks = torch.linalg.matrix_rank(matrix[:, :, i:, : i + 1], rtol=1e-10)
            assert (ranks == min(STATE, 20 - i, i + 1)).all()
        assert (torch.linalg.matrix_rank(matrix, rtol=1e-10) > STATE).all()

    def test_reduces_to_causal_linear_attention_without_decay(self) -> None:
        x, log_a, B, C = _ssm(11, heads=2)
        y, _ = ssd(x, torch.zeros_like(log_a), B, C, chunk_size=4)
        scores = torch.einsum("bihn,bjhn->bhij", C, B).tril()
        torch.testing.assert_close(y, torch.einsum("bhij,bjhp->bihp", scores, x))

    def test_reduces_to_retnet_retention_with_one_decay(self) -> None:
        x, log_a, B, C = _ssm(11, heads=2)
        gamma = torch.tensor([0.9, 0.5], dtype=torch.float64)
        y, _ = ssd(x, gamma.log().expand_as(log_a), B, C, chunk_size=4)
        n = torch.arange(11)
        mask = (gamma[:, None, None] ** (n[:, None] - n)).tril()
        torch.testing.assert_close(y, torch.einsum("bihn,bjhn,hij,bjhp->bihp", C, B, mask, x))

    def test_reduces_to_mamba_with_equal_rates(self) -> None:
        channels = 3
        u, delta = _random(BATCH, TIME, channels), _random(BATCH, TIME, channels, seed=1).exp()
        B, C, rates = _random(BATCH, TIME, STATE, seed=2), _random(BATCH, TIME, STATE, seed=3), -torch.rand(3).double()
        expected, last = selective_scan(u, delta, rates[:, None].expand(-1, STATE).contiguous(), B, C)
        y, state = ssd((delta * u)[..., None], delta * rates, B[:, :, None], C[:, :, None], chunk_size=4)
        torch.testing.assert_close(y[..., 0], expected)
        torch.testing.assert_close(state[..., 0], last)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        _, log_a, B, C = _ssm(5, groups=3)
        with pytest.raises(ValueError, match="B: expected a number of groups that divides 4 heads, got 3"):
            ssd_matrix(log_a, B, C)


class TestSegsum:
    def test_every_sum(self) -> None:
        x = _random(2, 3, 7)
        sums = segsum(x)
        for b, c, i, j in np.ndindex(2, 3, 7, 7):
            expected = float(x[b, c, j + 1 : i + 1].sum()) if j <= i else -math.inf
            assert sums[b, c, i, j].item() == pytest.approx(expected, abs=1e-14)

    def test_a_decay_of_zero_and_large_sums(self) -> None:
        x = torch.tensor([-1e8, -math.inf, -0.25, -0.5], requires_grad=True)
        sums = segsum(x)
        assert sums[3].tolist() == [-math.inf, -0.75, -0.5, 0.0]
        assert sums[1, 0] == -math.inf
        late = segsum(torch.tensor([-1e8, -0.25, -0.5]))
        assert late[2, 1] == -0.5  # a difference of cumulative sums would have lost it
        sums.exp().sum().backward()
        assert x.grad.isfinite().all()


class TestGatedRMSNorm:
    @pytest.mark.parametrize("groups", [1, 3])
    def test_is_the_norm_of_torch_for_each_group(self, groups: int) -> None:
        norm = GatedRMSNorm(6, groups, eps=1e-3).double()
        with torch.no_grad():
            norm.weight.copy_(_random(6, seed=5))
        y, z = _random(4, 2, 6), _random(4, 2, 6, seed=1)
        parts = (y * z * torch.sigmoid(z)).split(6 // groups, -1)
        expected = torch.cat([nn.functional.rms_norm(part, part.shape[-1:], eps=1e-3) for part in parts], -1)
        torch.testing.assert_close(norm(y, z), expected * norm.weight)

    def test_squares_of_half_precision_do_not_overflow(self) -> None:
        y = torch.full((1, 4), 3e4, dtype=torch.float16)
        torch.testing.assert_close(GatedRMSNorm(4).half()(y, torch.full_like(y, 8.0)), torch.ones_like(y))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="groups: expected a divisor of 4 channels, got 3"):
            GatedRMSNorm(4, 3)
        with pytest.raises(ValueError, match="groups: expected at least 1"):
            GatedRMSNorm(4, 0)
        with pytest.raises(ValueError, match="channels: expected at least 1"):
            GatedRMSNorm(0)


class TestTransformers:
    """The mixer of transformers, on its slow path, with random weights."""

    @pytest.fixture(params=[False, True])
    def pair(self, request: pytest.FixtureRequest) -> SimpleNamespace:
        from transformers import DynamicCache, Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = Mamba2Config(
            hidden_size=DIM, state_size=STATE, num_hidden_layers=1, vocab_size=5, num_heads=4, head_dim=HEADDIM,
            n_groups=2, chunk_size=CHUNK, use_bias=request.param, use_conv_bias=not request.param,
        )  # fmt: skip
        block = _block(dtype=torch.float32, bias=request.param, conv_bias=not request.param)
        mixer = Mamba2Mixer(config, 0)
        mixer.load_state_dict(block.state_dict())
        sizes = {"headdim": HEADDIM, "ngroups": 2, "chunk_size": CHUNK}
        other = Mamba2Block(DIM, STATE, **sizes, bias=request.param, conv_bias=not request.param)
        other.load_state_dict(mixer.state_dict())
        return SimpleNamespace(block=other, mixer=mixer, cache=DynamicCache(config=config))

    def test_outputs_and_gradients(self, pair: SimpleNamespace) -> None:
        u = _random(BATCH, TIME, DIM, dtype=torch.float32)
        found, expected = pair.block(u)[0], pair.mixer(u)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for y in (found, expected):
            (y * _random(*y.shape, seed=3)).sum().backward()
        theirs = dict(pair.mixer.named_parameters())
        assert theirs.keys() == dict(pair.block.named_parameters()).keys()
        for name, parameter in pair.block.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-4, msg=name)

    @pytest.mark.parametrize("prefill", [1, 2, 5])
    def test_prefill_then_decode(self, pair: SimpleNamespace, prefill: int) -> None:
        u = _random(BATCH, TIME, DIM, dtype=torch.float32)
        with torch.no_grad():
            y, state = pair.block(u[:, :prefill])
            torch.testing.assert_close(y, pair.mixer(u[:, :prefill], cache_params=pair.cache), rtol=1e-5, atol=1e-5)
            for t in range(prefill, TIME):
                y, state = pair.block.step(u[:, t], state)
                theirs = pair.mixer(u[:, t : t + 1], cache_params=pair.cache)[:, 0]
                torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5)
