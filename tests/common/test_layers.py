import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor, nn

from mlreviews.common.layers import causal_conv1d, depthwise_conv1d, linear

BATCH, TIME, CHANNELS = 3, 9, 4


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_rng(seed))


class TestLinear:
    @pytest.mark.parametrize("bias", [True, False])
    def test_has_the_distribution_of_torch(self, bias: bool) -> None:
        layer = linear(400, 300, bias=bias, generator=_rng())
        assert type(layer) is nn.Linear
        assert (layer.bias is not None) == bias
        values = layer.weight.detach().flatten() * 20  # uniform in [-1, 1]
        assert values.abs().max() <= 1
        assert values.square().mean().item() == pytest.approx(1 / 3, abs=0.005)
        if bias:
            assert 0.04 < layer.bias.abs().max() <= 0.05

    def test_the_generator_decides(self) -> None:
        one, same, other = (linear(5, 3, generator=_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(one.weight, same.weight)
        assert torch.equal(one.bias, same.bias)
        assert not torch.equal(one.weight, other.weight)


class TestDepthwiseConv:
    def test_has_the_distribution_and_shape_of_torch(self) -> None:
        layer = depthwise_conv1d(3000, 4, generator=_rng())
        assert str(layer) == str(nn.Conv1d(3000, 3000, 4, groups=3000, padding=3))
        values = 2 * torch.cat([layer.weight.flatten(), layer.bias]).detach()
        assert values.abs().max() <= 1
        assert values.square().mean().item() == pytest.approx(1 / 3, abs=0.01)
        assert depthwise_conv1d(2, 3, bias=False).bias is None

    def test_the_generator_decides(self) -> None:
        before = torch.get_rng_state()
        one, same, other = (depthwise_conv1d(5, 3, generator=_rng(seed)) for seed in (1, 1, 2))
        linear(3, 4, generator=_rng())
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(one.weight, same.weight)
        assert torch.equal(one.bias, same.bias)
        assert not torch.equal(one.weight, other.weight)

    def test_padding_makes_it_the_causal_convolution(self) -> None:
        layer, x = depthwise_conv1d(CHANNELS, 3, generator=_rng()).double(), _random(BATCH, TIME, CHANNELS)
        expected = layer(x.mT)[..., :TIME].mT
        torch.testing.assert_close(causal_conv1d(x, layer.weight[:, 0], layer.bias)[0], expected)


class TestCausalConv:
    @pytest.mark.parametrize("width", [1, 2, 4])
    def test_against_scipy(self, width: int) -> None:
        x, weight, bias = _random(BATCH, TIME, CHANNELS), _random(CHANNELS, width, seed=1), _random(CHANNELS, seed=2)
        window = _random(BATCH, width - 1, CHANNELS, seed=3)
        y, last = causal_conv1d(x, weight, bias, window)
        full = torch.cat([window, x], 1).numpy()
        for b in range(BATCH):
            for c in range(CHANNELS):
                filtered = signal.lfilter(weight[c].flip(0).numpy(), [1.0], full[b, :, c])[width - 1 :]
                np.testing.assert_allclose(y[b, :, c], filtered + bias[c].item(), rtol=1e-12)
        assert torch.equal(last, torch.as_tensor(full[:, TIME:]))
        assert torch.equal(causal_conv1d(x, weight)[0], causal_conv1d(x, weight, None, 0 * window)[0])

    @pytest.mark.parametrize("cut", range(1, TIME))
    def test_parts_equal_the_whole(self, cut: int) -> None:
        x, weight, window = _random(BATCH, TIME, CHANNELS), _random(CHANNELS, 4, seed=1), _random(BATCH, 3, CHANNELS)
        whole, last = causal_conv1d(x, weight, None, window)
        first, middle = causal_conv1d(x[:, :cut], weight, None, window)
        second, end = causal_conv1d(x[:, cut:], weight, None, middle)
        torch.testing.assert_close(torch.cat([first, second], 1), whole)
        assert torch.equal(end, last)

    @pytest.mark.parametrize("width", [1, 2, 4])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_packed_documents_equal_documents_alone(self, width: int, dtype: torch.dtype) -> None:
        lengths = [3, 1, 0, 5, 2]
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
        x, weight = _random(1, sum(lengths), CHANNELS), _random(CHANNELS, width, seed=1)
        bias, window = _random(CHANNELS, seed=2), _random(len(lengths), width - 1, CHANNELS, seed=3)
        y, last = causal_conv1d(x, weight, bias, window, cu_seqlens=cu_seqlens)
        assert y.shape == x.shape
        for i, document in enumerate(x.split(lengths, 1)):
            if lengths[i]:
                alone, end = causal_conv1d(document, weight, bias, window[i : i + 1])
                torch.testing.assert_close(y[:, cu_seqlens[i] : cu_seqlens[i + 1]], alone)
                assert torch.equal(last[i : i + 1], end)
            else:
                assert torch.equal(last[i], window[i])

    def test_packed_documents_do_not_leak(self) -> None:
        cu_seqlens, weight = torch.tensor([0, 4, 9]), _random(CHANNELS, 4, seed=1)
        x = _random(1, 9, CHANNELS)
        changed = x.clone()
        changed[:, :4] = 1e3
        one, other = (causal_conv1d(data, weight, cu_seqlens=cu_seqlens)[0] for data in (x, changed))
        assert torch.equal(one[:, 4:], other[:, 4:])
        assert not torch.equal(one[:, :4], other[:, :4])

    def test_gradients(self) -> None:
        inputs = [_random(1, 5, 2), _random(2, 3, seed=1), _random(2, seed=2), _random(2, 2, 2, seed=3)]
        cu_seqlens = torch.tensor([0, 2, 5])
        inputs = [t.requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, cu_seqlens=cu_seqlens), inputs)
        assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t[:3], t[3][:1]), inputs)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, weight = _random(BATCH, TIME, CHANNELS), _random(CHANNELS, 3)
        with pytest.raises(ValueError, match=r"x: expected 5 channels, as weight has, got shape \(3, 9, 4\)"):
            causal_conv1d(x, _random(5, 3))
        with pytest.raises(ValueError, match=r"window: expected \[3, 2, 4\], got shape \(3, 3, 4\)"):
            causal_conv1d(x, weight, None, x[:, :3])
        with pytest.raises(ValueError, match="x: expected batch 1 with cu_seqlens, got 3"):
            causal_conv1d(x, weight, cu_seqlens=torch.tensor([0, 9]))
