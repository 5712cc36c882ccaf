import copy
import functools
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from mlreviews.generalization.dropout import (
    DropConnectLinear,
    Dropout,
    channel_dropout,
    classic_dropout,
    drop_connect,
    dropout,
    gaussian_dropout,
    marginal_dropout_loss,
    marginal_dropout_solve,
    mc_dropout_predict,
    path_dropout,
    predictive_entropy,
)
from tests.contracts.families import Sample

Variant = Callable[..., Tensor]

INVERTED = [dropout, channel_dropout, path_dropout]
MASKS = [*INVERTED, classic_dropout]
ALL = [*MASKS, gaussian_dropout]
each_inverted = pytest.mark.parametrize("variant", INVERTED, ids=lambda f: f.__name__)
each_mask = pytest.mark.parametrize("variant", MASKS, ids=lambda f: f.__name__)
each_variant = pytest.mark.parametrize("variant", ALL, ids=lambda f: f.__name__)


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


CONTRACT = {
    variant.__name__: functools.partial(lambda f: Sample(f, (_random(5, 4, 3, dtype=torch.float32), 0.3)), variant)
    for variant in ALL
} | {
    "drop_connect": lambda: Sample(drop_connect, (_random(5, 4), _random(3, 4, seed=1), _random(3, seed=2), 0.3)),
    "Dropout": lambda: Sample(Dropout(0.3, channel_dropout), (_random(5, 4, 3, dtype=torch.float32),)),
    "DropConnectLinear": lambda: Sample(DropConnectLinear(4, 3, 0.3), (_random(5, 4, dtype=torch.float32),)),
}


def _masks(d: int, p: float) -> list[tuple[Tensor, float]]:
    """All masks of length d with their probabilities."""
    masks = [torch.tensor(m, dtype=torch.float64) for m in itertools.product([0.0, 1.0], repeat=d)]
    return [(m, (1 - p) ** int(m.sum()) * p ** int(d - m.sum())) for m in masks]


def _assert_law(codes: Sequence[int], probabilities: dict[int, float]) -> None:
    """A chi-squared test at the level of 4.5 sigma: the codes have been drawn with these probabilities."""
    counts = Counter(codes)
    assert counts.keys() <= probabilities.keys()
    expected = np.array(list(probabilities.values())) * len(codes)
    assert expected.min() > 5
    observed = np.array([counts[code] for code in probabilities])
    assert stats.chisquare(observed, expected).pvalue > 1e-5


def _codes(kept: Tensor) -> list[int]:
    """Each row of a boolean matrix as the number that it is in binary."""
    return (kept.long() @ (2 ** torch.arange(kept.shape[1]))).tolist()


def _mask_probabilities(d: int, p: float) -> dict[int, float]:
    return {_codes(mask.bool()[None])[0]: probability for mask, probability in _masks(d, p)}


class TestMasks:
    @pytest.mark.parametrize("p", [0.3, 0.5])
    def test_expectation_and_variance_over_all_masks(self, p: float) -> None:
        x = torch.tensor([1.5, -2.0, 0.25], dtype=torch.float64)
        y = dropout(x.expand(20_000, 3), p, generator=_rng())
        _assert_law(_codes(y != 0), _mask_probabilities(3, p))
        outputs = {code: row for code, row in zip(_codes(y != 0), y, strict=True)}
        probabilities = _mask_probabilities(3, p)
        mean = sum(probabilities[code] * row for code, row in outputs.items())
        torch.testing.assert_close(mean, x)
        variance = sum(probabilities[code] * (row - x) ** 2 for code, row in outputs.items())
        torch.testing.assert_close(variance, x**2 * p / (1 - p))

    def test_classic_has_the_mean_of_training_at_test(self) -> None:
        x, p = torch.tensor([1.5, -2.0, 0.25], dtype=torch.float64), 0.3
        y = classic_dropout(x.expand(20_000, 3), p, generator=_rng())
        _assert_law(_codes(y != 0), _mask_probabilities(3, p))
        assert torch.equal(y, torch.where(y != 0, x, 0))
        mean = sum(probability * mask * x for mask, probability in _masks(3, p))
        torch.testing.assert_close(classic_dropout(x, p, training=False), mean)

    def test_classic_needs_no_factor_at_p_zero(self) -> None:
        x = _random(4, 3)
        assert torch.equal(classic_dropout(x, 0.0), x)
        assert torch.equal(classic_dropout(x, 0.0, training=False), x)
        assert torch.equal(classic_dropout(x, 1.0, training=False), 0 * x)

    def test_channels_are_dropped_whole_and_one_by_one(self) -> None:
        y = channel_dropout(torch.ones(20_000, 3, 2, 4), 0.3, generator=_rng()).flatten(2)
        assert torch.equal(y.amin(2), y.amax(2))
        torch.testing.assert_close(y.max(), torch.tensor(1 / 0.7))
        _assert_law(_codes(y[..., 0] != 0), _mask_probabilities(3, 0.3))

    def test_paths_are_dropped_whole_and_one_by_one(self) -> None:
        y = path_dropout(torch.ones(40_000, 3, 2), 0.3, generator=_rng()).flatten(1)
        assert torch.equal(y.amin(1), y.amax(1))
        torch.testing.assert_close(y.max(), torch.tensor(1 / 0.7))
        _assert_law(_codes((y[:, 0] != 0).reshape(-1, 2)), _mask_probabilities(2, 0.3))

    def test_without_an_extent_the_variants_are_the_same(self) -> None:
        x = _random(7, 3)
        assert torch.equal(channel_dropout(x, 0.4, generator=_rng()), dropout(x, 0.4, generator=_rng()))
        assert torch.equal(path_dropout(x[:, 0], 0.4, generator=_rng()), dropout(x[:, 0], 0.4, generator=_rng()))

    def test_gaussian_noise_has_the_variance_of_bernoulli(self) -> None:
        x, p = torch.full((5_000, 4), -3.0, dtype=torch.float64), 0.2
        noise = (gaussian_dropout(x, p, generator=_rng()) / x - 1) / 0.5  # sqrt(0.2 / 0.8)
        assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-5
        assert not torch.equal(noise, noise.float().double()), "float64 noise was drawn in float32"

    def test_reduces_to_torch_dropout_in_law(self) -> None:
        x, p = _random(3), 0.3
        theirs, ours = nn.Dropout(p), Dropout(p, generator=_rng())
        torch.manual_seed(0)
        outputs = [layer(x.expand(20_000, 3)) for layer in (theirs, ours)]
        for y in outputs:
            _assert_law(_codes(y != 0), _mask_probabilities(3, p))
        torch.testing.assert_close(outputs[0].unique(dim=0), outputs[1].unique(dim=0))
        theirs.eval(), ours.eval()
        assert torch.equal(theirs(x), ours(x))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_small_rate_is_met_in_half_precision(self, dtype: torch.dtype) -> None:
        n, p = 1_000_000, 0.001
        dropped = int((dropout(torch.ones(n, dtype=dtype), p, generator=_rng()) == 0).sum())
        assert abs(dropped - n * p) < 4 * math.sqrt(n * p)


class TestEveryVariant:
    @pytest.mark.parametrize("variant", [*INVERTED, gaussian_dropout], ids=lambda f: f.__name__)
    def test_evaluation_and_p_zero_are_the_identity(self, variant: Variant) -> None:
        x = _random(5, 4, 3)
        assert variant(x, 0.7, training=False) is x
        assert variant(x, 0.0, training=True) is x

    @each_mask
    def test_p_one_gives_zeros_with_zero_gradient(self, variant: Variant) -> None:
        x = torch.tensor([[1.0, math.inf, -math.inf], [0.0, 3.0, -2.0]], requires_grad=True)
        y = variant(x, 1.0)
        assert torch.equal(y, torch.zeros(2, 3))
        y.sum().backward()
        assert torch.equal(x.grad, torch.zeros(2, 3))

    @each_mask
    def test_infinity_is_dropped_without_nan(self, variant: Variant) -> None:
        x = torch.full((64, 2, 3), math.inf, requires_grad=True)
        y = variant(x, 0.5, generator=_rng())
        assert set(y.unique().tolist()) == {0.0, math.inf}
        y.sum().backward()
        assert x.grad.isfinite().all()

    @each_variant
    def test_backward_uses_the_mask_of_forward(self, variant: Variant) -> None:
        x = (1 + _random(6, 5, 2).abs()).requires_grad_()
        y = variant(x, 0.4, generator=_rng())
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, (y / x).detach())
        assert len(gradient.unique()) > 1
        assert torch.autograd.gradcheck(lambda t: variant(t, 0.4, generator=_rng()), x[:2])

    @each_variant
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("training", [True, False])
    def test_dtype_shape_and_strides(self, variant: Variant, dtype: torch.dtype, training: bool) -> None:
        x = _random(3, 4, 5, dtype=torch.float32).to(dtype).transpose(0, 2)
        y = variant(x, 0.25, training=training, generator=_rng())
        assert (y.dtype, y.shape) == (dtype, (5, 4, 3))
        assert torch.equal(y, variant(x.contiguous(), 0.25, training=training, generator=_rng()))

    @each_variant
    def test_one_seed_one_mask_and_the_next_call_another(self, variant: Variant) -> None:
        x, generator = torch.ones(40, 3), _rng(1)
        first, second = variant(x, generator=generator), variant(x, generator=generator)
        assert torch.equal(first, variant(x, 0.5, generator=_rng(1)))
        assert not torch.equal(first, second)

    @each_variant
    def test_without_a_generator_the_global_one_draws(self, variant: Variant) -> None:
        x = torch.ones(40, 3)
        torch.manual_seed(0)
        first, second = variant(x), variant(x)
        torch.manual_seed(0)
        assert torch.equal(first, variant(x))
        assert not torch.equal(first, second)

    @each_variant
    @pytest.mark.usefixtures("unchecked")
    def test_compiles_as_one_graph_in_training(self, variant: Variant) -> None:
        layer = Dropout(0.25, variant)
        compiled = torch.compile(lambda t: 3 * layer(t), fullgraph=True, backend="aot_eager")
        x = torch.ones(40, 6, 2, requires_grad=True)
        y = compiled(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, y.detach())
        assert not torch.equal(compiled(x), y)
        if variant in INVERTED:
            torch.testing.assert_close(y.detach().unique(), torch.tensor([0, 4.0]))

    @each_variant
    def test_under_vmap(self, variant: Variant) -> None:
        x = torch.ones(4, 60, 3)
        different = torch.func.vmap(variant, randomness="different")(x)
        assert len(different.unique(dim=0)) == 4
        same = torch.func.vmap(variant, randomness="same")(x)
        assert len(same.unique(dim=0)) == 1
        assert 0.2 < (same != 1).float().mean() <= 1

    @each_variant
    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self, variant: Variant) -> None:
        for p in (-0.1, 1.1, math.nan):
            for training in (True, False):
                with pytest.raises(ValueError, match=r"p: expected a probability in \[0, 1\]"):
                    variant(torch.ones(3, 2), p, training=training)
        with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch\.int64"):
            variant(torch.ones(3, 2, dtype=torch.int64))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"x: expected \[batch, channels, \.\.\.\], got shape \(3,\)"):
            channel_dropout(torch.ones(3))
        with pytest.raises(ValueError, match=r"x: expected \[batch, \.\.\.\]"):
            path_dropout(torch.tensor(1.0))
        with pytest.raises(ValueError, match="p: expected a probability below 1, got 1"):
            gaussian_dropout(torch.ones(3), 1.0)

    def test_default_rate_is_one_half(self) -> None:
        x = torch.ones(40, 3)
        for variant in ALL:
            assert torch.equal(variant(x, generator=_rng()), variant(x, 0.5, generator=_rng()))
        assert Dropout().p == DropConnectLinear(2, 3).p == 0.5


class TestWeightScaling:
    def test_is_the_geometric_mean_of_all_thinned_softmax_regressions(self) -> None:
        d, classes, p = 5, 3, 0.3
        x, weight, bias = _random(4, d), _random(classes, d, seed=1), _random(classes, seed=2)

        def predict(inputs: Tensor) -> Tensor:
            return torch.softmax(inputs @ weight.T + bias, dim=1)

        geometric = torch.stack([predict(mask * x) ** probability for mask, probability in _masks(d, p)]).prod(0)
        scaled = predict(classic_dropout(x, p, training=False))
        torch.testing.assert_close(scaled, geometric / geometric.sum(1, keepdim=True))
        arithmetic = sum(probability * predict(mask * x) for mask, probability in _masks(d, p))
        assert (scaled - arithmetic).abs().max() > 0.01


class TestDropConnect:
    def test_every_weight_and_bias_has_a_mask_of_its_own_for_every_example(self) -> None:
        p, n = 0.4, 20_000
        weight = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
        y = drop_connect(torch.ones(n, 2), weight, torch.full((3,), 4.0), p, generator=_rng())
        numbers = (y * (1 - p)).round().long()
        torch.testing.assert_close(numbers / (1 - p), y)
        kept = torch.stack([numbers // 2**bit % 2 for bit in range(3)], dim=-1).bool()
        # All nine masks of an example together, those of two outputs with the next example, and without the biases.
        _assert_law(_codes(kept.reshape(n, 9)), _mask_probabilities(9, p))
        _assert_law(_codes(kept[:, 0].reshape(n // 2, 6)), _mask_probabilities(6, p))
        without = drop_connect(torch.ones(n, 2), weight, None, p, generator=_rng())
        assert set((without * (1 - p)).round().unique().tolist()) == {0, 1, 2, 3}

    def test_gradient_reaches_what_is_kept(self) -> None:
        x, weight, bias = (t.requires_grad_() for t in (_random(3, 4), _random(2, 4, seed=1), _random(2, seed=2)))
        assert torch.autograd.gradcheck(lambda *t: drop_connect(*t, 0.4, generator=_rng()), (x, weight, bias))

    def test_batch_axes(self) -> None:
        weight, bias = _random(2, 4, seed=1), _random(2, seed=2)
        x = _random(3, 5, 4)
        y = drop_connect(x, weight, bias, 0.4, generator=_rng())
        torch.testing.assert_close(y.flatten(0, 1), drop_connect(x.flatten(0, 1), weight, bias, 0.4, generator=_rng()))
        assert drop_connect(x[0, 0], weight, bias, 0.4, generator=_rng()).shape == (2,)

    @pytest.mark.parametrize("bias", [True, False])
    def test_reduces_to_torch_linear(self, bias: bool) -> None:
        layer, linear, x = DropConnectLinear(4, 3, 0.4, bias=bias), nn.Linear(4, 3, bias=bias), torch.randn(5, 4)
        layer.load_state_dict(linear.state_dict())
        assert not torch.equal(layer(x), linear(x))
        assert torch.equal(layer.eval()(x), linear(x))
        layer.train().p = 0.0
        assert torch.equal(layer(x), linear(x))
        layer.p = 1.0
        assert torch.equal(layer(x), torch.zeros(5, 3))

    def test_layer_draws_from_its_generator(self) -> None:
        layer, x = DropConnectLinear(4, 3, 0.4, generator=_rng(2)), torch.randn(5, 4)
        expected = drop_connect(x, layer.weight, layer.bias, 0.4, generator=_rng(2))
        assert torch.equal(layer(x), expected)
        assert not torch.equal(layer(x), expected)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"x: expected 4 inputs, as weight has, got shape \(5, 3\)"):
            drop_connect(torch.ones(5, 3), torch.ones(2, 4))
        with pytest.raises(ValueError, match="p: expected a probability"):
            drop_connect(torch.ones(5, 4), torch.ones(2, 4), p=2.0)
        with pytest.raises(ValueError, match="p: expected a probability"):
            DropConnectLinear(4, 3, -1.0)


class TestDropoutLayer:
    @each_variant
    def test_applies_its_variant_in_training_only(self, variant: Variant) -> None:
        layer, x = Dropout(0.3, variant, generator=_rng(2)), _random(5, 4)
        expected = variant(x, 0.3, generator=_rng(2))
        assert torch.equal(layer(x), expected)
        assert not torch.equal(layer(x), expected)
        assert torch.equal(layer.eval()(x), variant(x, 0.3, training=False))

    def test_copies_go_on_with_a_generator_of_their_own(self) -> None:
        layer, x = Dropout(0.3, generator=_rng(2)), torch.ones(50)
        for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(duplicate(x), dropout(x, 0.3, generator=_rng(2)))
        assert torch.equal(layer(x), dropout(x, 0.3, generator=_rng(2)))

    def test_says_what_it_is(self) -> None:
        assert str(Dropout(0.3, path_dropout)) == "Dropout(p=0.3, variant=path_dropout)"

    @pytest.mark.usefixtures("unchecked")
    def test_bad_rate(self) -> None:
        with pytest.raises(ValueError, match="p: expected a probability"):
            Dropout(1.5)


class _Custom(nn.Module):
    """Drops something in training, and dislikes to be told so by train()."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)

    def train(self, mode: bool = True) -> "_Custom":
        raise AssertionError


class TestMCDropout:
    def test_mean_and_variance_of_a_linear_model(self) -> None:
        x, p, samples = _random(30, 6), 0.2, 500
        linear = nn.Linear(6, 1).double()
        model = nn.Sequential(Dropout(p, generator=_rng()), linear)
        predicted = mc_dropout_predict(model, x, samples)
        assert predicted.draws.shape == (samples, 30, 1)
        assert not predicted.draws.requires_grad
        variance = ((x * linear.weight.detach()) ** 2 * p / (1 - p)).sum(1, keepdim=True)
        assert ((predicted.mean - linear(x).detach()).abs() < 4 * (variance / samples).sqrt()).all()
        # The standard error of a variance follows from the fourth moment of the draws.
        fourth = (predicted.draws - predicted.mean).pow(4).mean(0)
        error = ((fourth - variance**2) / samples).sqrt()
        assert ((predicted.variance - variance).abs() < 4 * error).all()

    def test_variance_is_unbiased(self) -> None:
        model = nn.Sequential(Dropout(0.5, generator=_rng()))
        predicted = mc_dropout_predict(model, torch.ones(6), 3)
        np.testing.assert_allclose(predicted.variance, np.var(predicted.draws.numpy(), axis=0, ddof=1), rtol=1e-6)

    def test_everything_else_is_in_evaluation_mode_and_comes_back_as_it_was(self) -> None:
        norm = nn.BatchNorm1d(4)
        model = nn.Sequential(nn.Linear(4, 4), norm, nn.Sequential(nn.Dropout(0.5), DropConnectLinear(4, 2)))
        model[0].eval(), model[2][1].eval()
        before = copy.deepcopy(model.state_dict())
        modes = [module.training for module in model.modules()]
        seen: list[list[bool]] = []
        norm.register_forward_hook(lambda *_: seen.append([module.training for module in model.modules()]))
        predicted = mc_dropout_predict(model, 3 + torch.randn(7, 4), 5)
        assert seen == [[False, False, False, False, True, True]] * 5
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert (predicted.variance > 0).all()

    def test_comes_back_as_it_was_after_an_error(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).eval()
        with pytest.raises(RuntimeError, match="shapes"):
            mc_dropout_predict(model, torch.ones(3, 5))
        assert not any(module.training for module in model.modules())
        assert torch.backends.mha.get_fastpath_enabled()

    @pytest.mark.parametrize("enabled", [True, False])
    def test_transformer_layers_drop_although_their_fused_path_does_not(self, enabled: bool) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True).eval()
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            assert (mc_dropout_predict(layer, torch.randn(2, 3, 8), 4).variance > 0).all()
            assert torch.backends.mha.get_fastpath_enabled() == enabled
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    def test_attention_and_recurrent_layers_drop(self) -> None:
        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(4, 8, num_layers=2, dropout=0.5)
                self.attention = nn.MultiheadAttention(8, 2, dropout=0.5)

            def forward(self, x: Tensor) -> Tensor:
                h = self.lstm(x)[0]
                return torch.stack([h, self.attention(x.repeat(1, 1, 2), h, h)[0]])

        variance = mc_dropout_predict(Last(), torch.randn(5, 3, 4), 4).variance
        assert variance[0].amax() > 0
        assert variance[1].amax() > 0

    def test_layers_of_the_user(self) -> None:
        model = nn.Sequential(_Custom(), nn.Identity())
        with pytest.raises(ValueError, match="model: expected a layer that drops, found none in Sequential"):
            mc_dropout_predict(model, torch.ones(50))
        assert mc_dropout_predict(model, torch.ones(50), layers=(_Custom,)).draws.shape == (100, 50)
        assert mc_dropout_predict(model, torch.ones(50), 6, layers=(_Custom,)).variance.max() > 0

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="samples: expected at least 2, got 1"):
            mc_dropout_predict(nn.Dropout(), torch.ones(3), 1)


class TestPredictiveEntropy:
    def test_against_scipy(self) -> None:
        logits = 2 * _random(7, 3, 2, 5)
        total, mutual = predictive_entropy(logits)
        probabilities = torch.softmax(logits, -1).numpy()
        expected = stats.entropy(probabilities.mean(0), axis=-1)
        np.testing.assert_allclose(total, expected, rtol=1e-12)
        np.testing.assert_allclose(mutual, expected - stats.entropy(probabilities, axis=-1).mean(0), rtol=1e-10)
        assert mutual.min() > 0

    def test_extremes(self) -> None:
        certain = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])  # two masks that contradict each other
        for value in predictive_entropy(certain):
            assert value.item() == pytest.approx(math.log(2))
        agreed, disagreement = predictive_entropy(torch.randn(1, 4).expand(6, 4))
        assert agreed > 0
        assert 0 <= disagreement.item() < 1e-6
        assert predictive_entropy(torch.zeros(2, 3))[0].item() == pytest.approx(math.log(3))


class TestMarginalDropout:
    @pytest.mark.parametrize("p", [0.0, 0.3, 0.8])
    def test_loss_is_the_mean_over_all_masks_of_every_row(self, p: float) -> None:
        x, y, w = _random(5, 4), _random(5, seed=1), _random(4, seed=2)
        expected = sum(
            probability * (target - (mask * row / (1 - p)) @ w) ** 2
            for row, target in zip(x, y, strict=True)
            for mask, probability in _masks(4, p)
        )
        torch.testing.assert_close(marginal_dropout_loss(x, y, w, p), expected)
        # The original form without the factor is the same function of q w, q = 1 - p.
        original = sum(
            probability * (target - (mask * row) @ w) ** 2
            for row, target in zip(x, y, strict=True)
            for mask, probability in _masks(4, p)
        )
        torch.testing.assert_close(marginal_dropout_loss(x, y, (1 - p) * w, p), original)

    @pytest.mark.parametrize(("n", "d"), [(9, 4), (4, 9)])
    @pytest.mark.parametrize("p", [0.1, 0.6])
    def test_solution_has_no_gradient_left(self, n: int, d: int, p: float) -> None:
        x, y = _random(n, d) * torch.arange(1, d + 1), _random(n, seed=1)
        w = marginal_dropout_solve(x, y, p).requires_grad_()
        loss = marginal_dropout_loss(x, y, w, p)
        (gradient,) = torch.autograd.grad(loss, w)
        assert gradient.abs().max() < 1e-11 * loss.item() * d
        assert w.abs().min() > 0

    def test_without_dropout_it_is_least_squares(self) -> None:
        x, y = _random(9, 4), _random(9, seed=1)
        expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
        np.testing.assert_allclose(marginal_dropout_solve(x, y, 0.0), expected, rtol=1e-10)

    def test_without_dropout_it_is_the_limit_where_it_is_not_unique(self) -> None:
        x, y = _random(4, 9) * torch.arange(1, 10), _random(4, seed=1)
        limit = marginal_dropout_solve(x, y, 1e-9)
        torch.testing.assert_close(marginal_dropout_solve(x, y, 0.0), limit, rtol=1e-6, atol=1e-9)

    def test_does_not_depend_on_the_units_of_the_features(self) -> None:
        x, y, units = _random(9, 4), _random(9, seed=1), torch.tensor([1e-6, 1.0, 50.0, 1e6], dtype=torch.float64)
        w = marginal_dropout_solve(x, y, 0.3)
        torch.testing.assert_close(marginal_dropout_solve(x * units, y, 0.3) * units, w)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_feature_that_is_zero_gets_no_weight(self, dtype: torch.dtype) -> None:
        x, y = _random(9, 4, dtype=dtype), _random(9, seed=1, dtype=dtype)
        x[:, 2] = 0
        w = marginal_dropout_solve(x, y, 0.3)
        assert w.dtype == dtype
        assert w[2] == 0
        torch.testing.assert_close(w[[0, 1, 3]], marginal_dropout_solve(x[:, [0, 1, 3]], y, 0.3))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, y, w = _random(5, 4), _random(5), _random(4)
        for call in (lambda *a: marginal_dropout_loss(*a[:2], w, *a[2:]), marginal_dropout_solve):
            with pytest.raises(ValueError, match="p: expected a probability below 1"):
                call(x, y, 1.0)
            with pytest.raises(ValueError, match=r"p: expected a probability in \[0, 1\]"):
                call(x, y, -0.1)
            with pytest.raises(ValueError, match="features has 5, targets has 4"):
                call(x, y[:4], 0.5)
            with pytest.raises(ValueError, match="features: expected finite"):
                call(x / 0, y, 0.5)
            with pytest.raises(ValueError, match="targets: expected finite"):
                call(x, y / 0, 0.5)
        with pytest.raises(ValueError, match="weights: expected one for each of 4 features, got 3"):
            marginal_dropout_loss(x, y, w[:3], 0.5)
        with pytest.raises(ValueError, match="weights: expected finite"):
            marginal_dropout_loss(x, y, w / 0, 0.5)
