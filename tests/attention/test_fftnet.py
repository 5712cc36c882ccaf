from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlreviews.attention.fftnet import (
    CausalFFTMixer,
    FFTMixerState,
    FFTNetMixer,
    causal_fft_conv,
    modrelu,
    spectral_filter,
)
from tests.contracts.families import Sample

BATCH, TIME, HEADS, DIM = 2, 9, 2, 3
D_MODEL = HEADS * DIM


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _x(time: int = TIME, seed: int = 1) -> Tensor:
    return torch.randn(BATCH, time, D_MODEL, dtype=torch.float64, generator=_rng(seed))


def _mixer(time: int = TIME, **options: Any) -> FFTNetMixer:
    mixer = FFTNetMixer(D_MODEL, time, HEADS, generator=_rng(), **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=_rng(2)))
    return mixer


def _causal(**options: Any) -> CausalFFTMixer:
    return CausalFFTMixer(D_MODEL, HEADS, **{"filters": 3, "max_length": 5, "generator": _rng(), **options}).double()


CONTRACT = {
    "FFTNetMixer": lambda: Sample(FFTNetMixer(8, 6, 2, generator=_rng()), (torch.randn(2, 6, 8, generator=_rng(1)),)),
    "CausalFFTMixer": lambda: Sample(
        CausalFFTMixer(8, 2, filters=2, max_length=5, generator=_rng()), (torch.randn(2, 6, 8, generator=_rng(1)),)
    ),
}


def test_modrelu() -> None:
    z = torch.tensor([3 + 4j, -0.6 + 0.8j, 0j, 1e-3j], dtype=torch.complex128)
    assert torch.equal(modrelu(z, torch.zeros(4).double()), z)
    found = modrelu(z, torch.full((4,), -1.0).double())
    torch.testing.assert_close(found, torch.tensor([0.8 * (3 + 4j), 0, 0, 0], dtype=torch.complex128))
    wider = modrelu(z, torch.full((4,), 0.5).double())
    torch.testing.assert_close(wider.abs(), torch.tensor([5.5, 1.5, 0.0, 0.501]).double())
    torch.testing.assert_close(wider[:2].angle(), z[:2].angle())
    assert torch.autograd.gradcheck(
        modrelu, (z[:2].clone().requires_grad_(), torch.tensor([-4.0, 0.3]).double().requires_grad_())
    )


@pytest.mark.parametrize("time", [1, 2, TIME, 10])
def test_reduces_to_the_identity(time: int) -> None:
    mixer = FFTNetMixer(D_MODEL, time, HEADS, adaptive=False).double()
    torch.testing.assert_close(mixer(_x(time)), _x(time))


@pytest.mark.parametrize("time", [TIME, 10])
def test_reduces_to_a_circular_convolution(time: int) -> None:
    weight = torch.rand(HEADS, time // 2 + 1, dtype=torch.float64, generator=_rng(3))
    found = spectral_filter(_x(time).unflatten(2, (HEADS, DIM)), weight).flatten(2).numpy()
    x = _x(time).numpy()
    kernel = np.fft.irfft(weight.numpy(), n=time)
    for feature in range(D_MODEL):
        circulant = np.stack([np.roll(kernel[feature // DIM], t) for t in range(time)], 1)
        np.testing.assert_allclose(found[:, :, feature], x[:, :, feature] @ circulant.T, atol=1e-12)


def test_the_mixer_is_its_equations() -> None:
    mixer, x = _mixer(), _x()
    first, _, last = mixer.adaptive_mlp  # type: ignore[misc]
    for row in range(BATCH):
        hidden = torch.nn.functional.gelu(first.weight @ x[row].mean(0) + first.bias)
        weight = mixer.base_filter + (last.weight @ hidden + last.bias).view(HEADS, -1)
        for feature in range(D_MODEL):
            head = feature // DIM
            z = np.fft.rfft(x[row, :, feature].numpy(), norm="ortho") * weight[head].detach().numpy()
            size = np.maximum(np.abs(z) + mixer.modrelu_bias[head].detach().numpy(), 0)
            expected = np.fft.irfft(size * np.exp(1j * np.angle(z)), n=TIME, norm="ortho")
            np.testing.assert_allclose(mixer(x)[row, :, feature].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shift", [1, 4])
def test_a_circular_shift_of_the_tokens_shifts_the_output(shift: int) -> None:
    mixer, x = _mixer(), _x()
    torch.testing.assert_close(mixer(x.roll(shift, 1)), mixer(x).roll(shift, 1))


def test_energies_agree() -> None:
    # Parseval: a filter of ones with biases of 0 keeps the energy, one of twos quadruples it
    x = _x().unflatten(2, (HEADS, DIM))
    twos = torch.full((HEADS, TIME // 2 + 1), 2.0).double()
    torch.testing.assert_close(spectral_filter(x, twos).square().sum(), 4 * x.square().sum())


def test_the_last_token_changes_the_first() -> None:
    mixer, x = _mixer(), _x()
    other = torch.cat([x[:, :-1], x[:, -1:] + 1], 1)
    assert not torch.allclose(mixer(other)[:, 0], mixer(x)[:, 0])


def test_gradients() -> None:
    mixer, x = _mixer(4), _x(4).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,))
    layer = _causal()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))


def test_causal_convolution_reduces_to_a_depthwise_one() -> None:
    x = _x().unflatten(2, (HEADS, DIM))
    for length in (1, 4, TIME, 20):
        filters = torch.randn(3, HEADS, length, dtype=torch.float64, generator=_rng(4))
        found = causal_fft_conv(x, filters)
        assert found.shape == (3, *x.shape)
        for number in range(3):
            for feature in range(D_MODEL):
                head, within = divmod(feature, DIM)
                kernel = filters[number, head].numpy()
                for row in range(BATCH):
                    expected = np.convolve(x[row, :, head, within].numpy(), kernel)[:TIME]
                    np.testing.assert_allclose(found[number, row, :, head, within].numpy(), expected, atol=1e-12)


def test_the_causal_relative_is_its_equation() -> None:
    layer, x = _causal(), _x()
    with torch.no_grad():
        layer.filters.add_(0.3 * torch.randn(layer.filters.shape, generator=_rng(5)))
    y, _ = layer(x)
    for t in range(TIME):
        alpha = layer.adaptive_mlp(x[:, : t + 1].mean(1)).view(BATCH, HEADS, 3)
        for head in range(HEADS):
            expected = torch.zeros(BATCH, DIM).double()
            for s in range(min(t + 1, 5)):
                weight = layer.filters[0, head, s] + alpha[:, head] @ layer.filters[1:, head, s]
                expected = expected + weight[:, None] * x[:, t - s, head * DIM : (head + 1) * DIM]
            torch.testing.assert_close(y[:, t, head * DIM : (head + 1) * DIM], expected)


def test_the_first_filter_is_the_identity_at_the_start() -> None:
    layer = _causal(max_length=400)
    assert torch.equal(layer.filters[0], torch.eye(1, 400).expand(HEADS, -1))
    distances = torch.arange(1, 401)
    assert 0.9 < (layer.filters[1:] * distances).std() < 1.1


def test_states_are_cropped_and_reordered() -> None:
    layer, x = _causal(), _x()
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[1, :4] = False
    whole, state = layer(x, mask=mask)
    assert state.length == TIME
    assert state.inputs[1, :4].abs().max() == 0
    torch.testing.assert_close(layer(x[:, 6:], state.crop(6))[0], whole[:, 6:])
    index = torch.tensor([1, 0, 1])
    torch.testing.assert_close(layer(x[index, 6:], state.crop(6).rows(index))[0], whole[index, 6:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = _x().to(dtype).unflatten(2, (HEADS, DIM))
    weight = torch.rand(HEADS, TIME // 2 + 1, generator=_rng(3)).to(dtype)
    found = spectral_filter(x, weight, -0.1 * weight)
    assert found.dtype == dtype
    assert torch.equal(found, spectral_filter(x.float(), weight.float(), (-0.1 * weight).float()).to(dtype))
    assert torch.equal(causal_fft_conv(x, weight[None]), causal_fft_conv(x.float(), weight[None].float()).to(dtype))


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    for options, match in (({"heads": 4}, "heads: expected a divisor"), ({"heads": 0}, "heads: expected at least 1")):
        with pytest.raises(ValueError, match=match):
            FFTNetMixer(6, 8, **options)
        with pytest.raises(ValueError, match=match):
            CausalFFTMixer(6, **options)
    with pytest.raises(ValueError, match="seq_len: expected at least 1"):
        FFTNetMixer(6, 0, 2)
    for name in ("filters", "max_length"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1"):
            _causal(**{name: 0})
    with pytest.raises(ValueError, match="x: expected 9 tokens, as seq_len says, got 7"):
        _mixer()(_x(7))
    with pytest.raises(ValueError, match=r"x: expected \[batch, time, 6\]"):
        _mixer()(_x()[..., :5])
    with pytest.raises(ValueError, match="weight: expected 5 frequencies for 9 tokens, got 4"):
        spectral_filter(_x()[..., None], torch.ones(D_MODEL, 4).double())
    with pytest.raises(ValueError, match="state: expected that of 2 rows"):
        _causal()(_x(), FFTMixerState(torch.zeros(3, 2, D_MODEL), torch.ones(3, 2, dtype=torch.bool)))


def test_defaults() -> None:
    mixer, causal = FFTNetMixer(8, 6), CausalFFTMixer(8)
    assert mixer.base_filter.shape == (4, 4)
    assert mixer.adaptive_mlp is not None
    assert causal.filters.shape == (5, 4, 512)
