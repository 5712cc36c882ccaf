import copy
import inspect
import itertools

import pytest
import torch
from torch import Tensor, nn

from mlreviews.common.adapter import adapters, inject, trainable_parameters
from mlreviews.common.layers import linear
from mlreviews.peft.flexora import (
    GatedLoRALinear,
    drop_adapters,
    flexora_search,
    flexora_select,
    hypergradient,
    layer_gates,
)
from mlreviews.peft.lora import LoRALinear
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _layer(gate: float = 1.0) -> GatedLoRALinear:
    layer = GatedLoRALinear(linear(5, 3, generator=_rng()), 2, 3.0, generator=_rng(1))
    layer.gate.fill_(gate)
    return layer


CONTRACT = {
    "GatedLoRALinear": lambda: Sample(_layer(), (_random(4, 5),)),
    "GatedLoRALinear, with a gate": lambda: Sample(_layer(1.7), (_random(4, 5),)),
}


class TestGates:
    def test_sum_to_their_number(self) -> None:
        alpha = _random(7, dtype=torch.float64)
        gates = layer_gates(alpha)
        assert gates.sum().item() == pytest.approx(7)
        torch.testing.assert_close((gates[1:] / gates[:-1]).log(), alpha.diff())
        assert torch.equal(layer_gates(torch.zeros(4)), torch.ones(4))

    def test_reduces_to_lora(self) -> None:
        gated, plain = _layer(), LoRALinear(linear(5, 3, generator=_rng()), 2, 3.0, generator=_rng(1))
        for layer in (gated, plain):
            layer.lora_B["default"].data = _random(3, 2)
        x = _random(4, 5)
        assert torch.equal(gated(x), plain(x))
        gated.gate.fill_(0.3)
        torch.testing.assert_close(gated(x) - gated.base(x), 0.3 * (plain(x) - plain.base(x)))
        torch.testing.assert_close(gated.delta_weight(), 0.3 * plain.delta_weight())
        gated.gate.zero_()
        assert torch.equal(gated(x), gated.base(x))
        assert GatedLoRALinear(nn.Linear(9, 9)).settings["default"].rank == 8
        assert GatedLoRALinear(nn.Linear(9, 9)).settings["default"].scaling == 2


class TestHypergradient:
    """A quadratic whose inner minimum, and so whose steps, depend on alpha."""

    h = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))

    def train(self, weights: dict[str, Tensor], alpha: Tensor) -> Tensor:
        x = weights["x"] - torch.tanh(alpha) * 2
        return 0.5 * x @ self.h @ x + (alpha * weights["x"]).sum() ** 2

    def validation(self, weights: dict[str, Tensor], alpha: Tensor) -> Tensor:
        return (weights["x"] - 1).pow(2).sum() + 0.3 * alpha.pow(3).sum()

    @pytest.mark.parametrize("steps", [0, 1, 4])
    def test_against_finite_differences(self, steps: int) -> None:
        start, alpha, lr, eps = _random(3, dtype=torch.float64), _random(3, seed=1, dtype=torch.float64), 0.2, 1e-5

        def trained(a: Tensor) -> Tensor:
            x = start
            for _ in range(steps):
                # the derivative of `train` by hand
                x = x - lr * (self.h @ (x - 2 * torch.tanh(a)) + 2 * (a @ x) * a)
            return x

        g, theta, value = hypergradient([self.train] * steps, self.validation, {"x": start}, alpha, lr)
        torch.testing.assert_close(theta["x"], trained(alpha))
        assert value.item() == pytest.approx(float(self.validation({"x": trained(alpha)}, alpha)))
        for i, e in enumerate(torch.eye(3, dtype=torch.float64) * eps):
            up, down = (self.validation({"x": trained(a)}, a) for a in (alpha + e, alpha - e))
            assert g[i].item() == pytest.approx(float(up - down) / (2 * eps), rel=1e-6)
        if steps == 0:
            torch.testing.assert_close(g, 0.9 * alpha.square())  # the partial derivative
        assert not any(x.requires_grad for x in (alpha, g, theta["x"], value))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        start, alpha = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        with pytest.raises(ValueError, match="lr: expected more than 0"):
            hypergradient([], self.validation, {"x": start}, alpha, 0.0)
        with pytest.raises(ValueError, match="val_loss: expected a finite"):
            hypergradient([], lambda w, a: a.sum() * torch.inf, {"x": start}, alpha + 1, 0.1)


def _deep(seed: int = 0) -> nn.Sequential:
    """Without the nonlinearities, a change of rank 1 in one layer could be made in any other as well."""
    model = nn.Sequential()
    for i in range(4):
        model.append(nn.Linear(6, 6, bias=False))
        model[-1].weight.data = 1.5 * torch.linalg.qr(_random(6, 6, seed=10 * seed + i)).Q
        model.append(nn.Tanh())
    return model[:-1]


def _batches(teacher: nn.Module, seed: int) -> itertools.count:
    for i in itertools.count():
        x = _random(32, 6, seed=1000 * seed + i)
        yield x, teacher(x).detach()


def _squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class TestSearch:
    @pytest.mark.parametrize(("place", "steps"), [(0, 2), (4, 0)])
    def test_the_layer_that_has_to_change_gets_the_largest_gate(self, place: int, steps: int) -> None:
        model, teacher = _deep(), _deep()
        u, v = (nn.functional.normalize(_random(6, seed=s), dim=0) for s in (50, 51))
        teacher[place].weight.data += 1.5 * torch.outer(u, v)
        inject(model, "[0246]", lambda path, base: GatedLoRALinear(base, 1, 2.0, generator=_rng(int(path))))
        found = flexora_search(
            model,
            _squares,
            _batches(teacher, 1),
            _batches(teacher, 2),
            40,
            inner_steps=steps,
            lr_theta=0.3,
            lr_alpha=0.05,
        )
        assert found.history.shape == (40, 4)
        assert max(found.alpha, key=found.alpha.get) == str(place)
        assert str(place) in flexora_select(found.alpha)
        assert found.val_losses[-1] < 0.6 * found.val_losses[0]
        torch.testing.assert_close(found.history[-1], torch.tensor(list(found.alpha.values())))
        gates = torch.stack([layer.gate for layer in adapters(model).values()])
        torch.testing.assert_close(gates, layer_gates(found.history[-1]))
        assert model[place].lora_B["default"].abs().max() > 0.01

    def test_first_round_by_hand(self) -> None:
        model, teacher = _deep(), _deep(1)
        inject(model, "[0246]", lambda path, base: GatedLoRALinear(base, 2, 2.0, generator=_rng(int(path))))
        other = copy.deepcopy(model)
        batch = next(_batches(teacher, 1))
        found = flexora_search(
            model, _squares, iter([batch]), iter([batch]), 1, lr_theta=0.1, group=lambda path: "ab"[int(path) > 2]
        )
        assert list(found.alpha) == ["a", "b"]
        # Adam's first step is its rate, by the sign of the gradient; the gradients by a softmax sum to 0
        assert found.alpha["a"] == pytest.approx(-found.alpha["b"], rel=1e-3)
        assert abs(found.alpha["a"]) == pytest.approx(0.01, rel=1e-3)
        assert [float(layer.gate) for layer in adapters(model).values()] == pytest.approx(
            [float(g) for g in layer_gates(torch.tensor(list(found.alpha.values()))).repeat_interleave(2)]
        )
        # the inner step is one of gradient descent with gates of 1
        _squares(other, batch).backward()
        for name, p in trainable_parameters(other).items():
            torch.testing.assert_close(model.get_parameter(name), p - 0.1 * p.grad)
        losses = flexora_search(model, _squares, iter([batch]), iter([batch]), 1, inner_steps=1).val_losses
        assert len(losses) == 1

    def test_defaults(self) -> None:
        defaults = {name: p.default for name, p in inspect.signature(flexora_search).parameters.items()}
        assert (defaults["inner_steps"], defaults["lr_theta"], defaults["lr_alpha"]) == (1, 1e-4, 0.01)

    def test_selection(self) -> None:
        alpha = {"a": 0.2, "b": -0.1, "c": 0.0, "d": 0.05}
        assert flexora_select(alpha) == ["a", "d"]
        assert flexora_select(alpha, 0.1) == ["a"]
        with pytest.raises(ValueError, match=r"threshold: expected less than the largest alpha, 0.2, got 0.2"):
            flexora_select(alpha, 0.2)

    def test_dropping_layers_that_learned_nothing_changes_nothing(self) -> None:
        model, x = _deep(), _random(3, 6)
        inject(model, "[0246]", lambda path, base: GatedLoRALinear(base, 2, generator=_rng(int(path))))
        model[4].lora_B["default"].data.normal_(generator=_rng())
        before = model(x)
        model[2].merge()
        with pytest.raises(ValueError, match="paths: expected layers with adapters, got"):
            drop_adapters(model, ["0", "9"])
        drop_adapters(model, ["0", "2", "6"])
        assert list(adapters(model)) == ["4"]
        torch.testing.assert_close(model(x), before)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        model, batches = _deep(), _batches(_deep(), 1)
        with pytest.raises(ValueError, match="model: expected layers of GatedLoRALinear"):
            flexora_search(model, _squares, batches, batches, 1)
        with pytest.raises(ValueError, match="rounds: expected at least 1"):
            flexora_search(model, _squares, batches, batches, 0)
        with pytest.raises(ValueError, match="inner_steps: expected at least 0"):
            flexora_search(model, _squares, batches, batches, 1, inner_steps=-1)
