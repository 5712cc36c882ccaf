import pytest
import torch
from torch import nn

from mlreviews.common.two_layer_net import TwoLayerNet, gradient_descent


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestTwoLayerNet:
    def test_counts_parameters_as_the_paper_does(self) -> None:
        d, hidden, k = 5, 7, 3
        assert TwoLayerNet(d, hidden, k).n_parameters == (d + 1) * hidden + (hidden + 1) * k

    def test_forward_by_hand(self) -> None:
        net = TwoLayerNet(2, 2, 1)
        net.load_state_dict(
            {
                "first.weight": torch.tensor([[1.0, 2.0], [3.0, -1.0]]),
                "first.bias": torch.tensor([0.5, -9.0]),
                "second.weight": torch.tensor([[2.0, 5.0]]),
                "second.bias": torch.tensor([-1.0]),
            }
        )
        # Hidden units: 1 + 4 + 0.5 and max(3 - 2 - 9, 0).
        assert net(torch.tensor([[1.0, 2.0]])).tolist() == [[2 * 5.5 - 1]]

    def test_starts_glorot_uniform_with_zero_biases(self) -> None:
        net = TwoLayerNet(40, 60, 20, generator=_rng(), dtype=torch.float64)
        for layer, fans in ((net.first, 100), (net.second, 80)):
            weight = layer.weight.detach()
            limit = (6 / fans) ** 0.5
            assert 0.99 * limit < weight.abs().max() <= limit
            deviation = limit**2 / 3 * (0.8 / weight.numel()) ** 0.5  # of the mean square: kurtosis 1.8 less 1
            assert abs(weight.square().mean() - limit**2 / 3) < 4 * deviation
            assert weight.dtype == torch.float64
            assert not layer.bias.any()

    def test_new_units_without_weight_change_nothing(self) -> None:
        net, x = TwoLayerNet(3, 4, 2, generator=_rng(), dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
        for bias in (net.first.bias, net.second.bias):
            nn.init.uniform_(bias, generator=_rng(1))
        wider = net.widened(9, std=0.0)
        assert wider.n_parameters == (3 + 1) * 9 + (9 + 1) * 2
        torch.testing.assert_close(wider(x), net(x))
        assert torch.equal(net.widened(4, std=1.0)(x), net(x))
        wider.first.weight.data.zero_()
        assert net.first.weight.any()

    def test_new_units_have_the_given_spread(self) -> None:
        net = TwoLayerNet(50, 1, 30, generator=_rng()).widened(81, std=0.3, generator=_rng(1)).requires_grad_(False)
        for new in (net.first.weight[1:], net.first.bias[1:], net.second.weight[:, 1:]):
            assert abs(float(new.square().mean()) - 0.09) < 5 * 0.09 * (2 / new.numel()) ** 0.5
        other = TwoLayerNet(50, 1, 30, generator=_rng()).widened(81, std=0.3, generator=_rng(1))
        assert torch.equal(net.second.weight, other.second.weight)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        for name in ("dim", "hidden", "outputs"):
            with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
                TwoLayerNet(**({"dim": 2, "hidden": 3, "outputs": 2} | {name: 0}))
        with pytest.raises(ValueError, match="hidden: expected at least 3, got 2"):
            TwoLayerNet(2, 3, 2).widened(2, std=0.1)


class TestGradientDescent:
    def test_follows_the_recursion_of_momentum_and_decay(self) -> None:
        net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(net.weight, 3.0)
        x, y = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[1.0], [-1.0]]).double()
        w, velocity, lr = 3.0, 0.0, 0.1
        training = gradient_descent(net, x, y, steps=7, lr=lr, momentum=0.6, decay=0.5, decay_every=3)
        for step in range(1, 8):
            velocity = 0.6 * velocity + (w - 1) * 1 + (2 * w + 1) * 2  # the mean of two squared errors
            w -= lr * velocity
            lr *= 0.5 if step % 3 == 0 else 1
            assert next(training) == step
            assert net.weight.item() == pytest.approx(w, rel=1e-12)
        with pytest.raises(StopIteration):
            next(training)

    def test_does_not_decay_by_default(self) -> None:
        net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(net.weight)
        one = torch.ones(1, 1, dtype=torch.float64)
        assert list(gradient_descent(net, one, 0 * one, steps=5, lr=0.25, momentum=0.0)) == [1, 2, 3, 4, 5]
        assert net.weight.item() == 0.5**5

    def test_decays_after_every_step_where_nothing_else_is_said(self) -> None:
        net, one = nn.Linear(1, 1, bias=False, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        nn.init.ones_(net.weight)
        assert len(list(gradient_descent(net, one, 0 * one, steps=3, lr=0.25, momentum=0.0, decay=0.5))) == 3
        assert net.weight.item() == pytest.approx((1 - 0.5) * (1 - 0.25) * (1 - 0.125))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input_raises_before_the_first_step(self) -> None:
        net, x = nn.Linear(1, 1), torch.ones(1, 1)
        with pytest.raises(ValueError, match="steps: expected at least 1"):
            gradient_descent(net, x, x, steps=0, lr=0.1, momentum=0.0)
        with pytest.raises(ValueError, match="lr: expected more than 0"):
            gradient_descent(net, x, x, steps=1, lr=0.0, momentum=0.0)
