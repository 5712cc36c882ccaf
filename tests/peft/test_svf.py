import copy

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mlreviews.common.adapter import adapter_state_dict, inject, merge, trainable_parameters
from mlreviews.common.layers import linear
from mlreviews.peft.svf import SVFLinear, cem_search, compose_experts, expert, load_expert, svf_policy_loss
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _layer(columns: int = 5, rows: int = 3, z: Tensor | None = None, seed: int = 0) -> SVFLinear:
    layer = SVFLinear(linear(columns, rows, generator=_rng(seed)))
    if z is not None:
        layer.z.data = z
    return layer


def _goal(alpha: Tensor) -> float:
    return -float((alpha - torch.tensor([0.7, -0.2, 0.4])).square().sum())


CONTRACT = {
    "SVFLinear": lambda: Sample(_layer(), (_random(4, 5),)),
    "cem_search": lambda: Sample(cem_search, (_goal, 3), {"iterations": 2}),
}


class TestLayer:
    @pytest.mark.parametrize(("columns", "rows"), [(5, 3), (3, 5), (4, 4)])
    def test_singular_values_are_scaled(self, columns: int, rows: int) -> None:
        rank = min(columns, rows)
        z = torch.linspace(-1.5, 2, rank)
        layer, x = _layer(columns, rows, z), _random(2, 4, columns)
        assert [p.shape for p in layer.parameters() if p.requires_grad] == [(rank,)]
        u, sigma, vh = np.linalg.svd(layer.base.weight.detach().double().numpy(), full_matrices=False)
        # eq. (1), term by term
        expected = sum(z[i].item() * sigma[i] * np.outer(u[:, i], vh[i]) for i in range(rank))
        y = x.double().numpy() @ expected.T + layer.base.bias.detach().double().numpy()
        np.testing.assert_allclose(layer(x).detach(), y, atol=1e-5)
        layer.merge()
        np.testing.assert_allclose(layer.base.weight, expected, atol=1e-6)
        found = np.linalg.svd(layer.base.weight.numpy(), compute_uv=False)
        np.testing.assert_allclose(found, np.sort(np.abs(sigma * z.numpy()))[::-1], atol=1e-6)

    def test_reduces_to_torch_linear(self) -> None:
        layer, x = _layer(), _random(4, 5)
        assert torch.equal(layer(x), layer.base(x))

    def test_zeros_leave_the_bias(self) -> None:
        layer = _layer(z=torch.zeros(3))
        torch.testing.assert_close(layer(_random(4, 5)), layer.base.bias.expand(4, 3))

    def test_transposed_weight(self) -> None:
        base, x = Conv1D(3, 5), _random(2, 4, 5)
        usual = nn.Linear(5, 3)
        usual.weight.data, usual.bias.data = base.weight.data.mT.clone(), base.bias.data.clone()
        ours, plain = SVFLinear(base), SVFLinear(usual)
        z = torch.tensor([0.5, 2.0, -1.0])
        ours.z.data = plain.z.data = z
        torch.testing.assert_close(ours(x), plain(x))
        torch.testing.assert_close(ours.delta_weight(), plain.delta_weight().mT)

    def test_gradient(self) -> None:
        layer = _layer(z=torch.tensor([0.5, 2.0, -1.0])).double()
        x = _random(4, 5, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda z: torch.func.functional_call(layer, {"z": z}, (x,)), (layer.z,))

    def test_a_state_brings_its_own_decomposition(self) -> None:
        layer, other, x = _layer(z=torch.tensor([0.5, 2.0, -1.0])), _layer(seed=1), _random(4, 5)
        model, target = nn.Sequential(layer), nn.Sequential(other)
        assert list(adapter_state_dict(model)) == ["0.z"]
        target.load_state_dict(model.state_dict())
        torch.testing.assert_close(target(x), model(x))
        # a copy, whose hook must be its own
        duplicate = copy.deepcopy(nn.Sequential(_layer(seed=2)))
        duplicate.load_state_dict(model.state_dict())
        torch.testing.assert_close(duplicate(x), model(x))

    def test_half_precision_base(self) -> None:
        base = nn.Linear(5, 3).bfloat16()
        layer = SVFLinear(base)
        assert layer.z.dtype == layer.sigma.dtype == torch.float32
        layer.z.data = torch.tensor([1.5, 1.0, 0.5])
        assert layer(_random(4, 5).bfloat16()).dtype == torch.bfloat16
        assert SVFLinear(nn.Linear(5, 3).double()).z.dtype == torch.float64

    @pytest.mark.usefixtures("unchecked")
    def test_bad_layer(self) -> None:
        with pytest.raises(TypeError, match="base: expected a linear layer, got Tanh"):
            SVFLinear(nn.Tanh())
        base = nn.Linear(2, 2)
        base.weight.data[0, 0] = torch.inf
        with pytest.raises(ValueError, match=r"base\.weight: expected finite"):
            SVFLinear(base)


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    inject(model, ["0", "2"], lambda path, base: SVFLinear(base))
    return model


class TestExperts:
    def test_one_hot_is_that_expert_and_mixtures_are_linear(self) -> None:
        experts = [{"0": _random(4, seed=k), "2": _random(3, seed=9 + k)} for k in range(3)]
        for k, one_hot in enumerate(torch.eye(3)):
            assert all(torch.equal(z, experts[k][path]) for path, z in compose_experts(experts, one_hot).items())
        assert torch.equal(compose_experts(experts[:1], torch.tensor([2.0]))["2"], 2 * experts[0]["2"])
        a, b = _random(3, seed=20), _random(3, seed=21)
        mixed = compose_experts(experts, 2 * a - b)
        for path, z in mixed.items():
            parts = [compose_experts(experts, alpha)[path] for alpha in (a, b)]
            torch.testing.assert_close(z, 2 * parts[0] - parts[1])

    def test_into_a_model_and_out(self) -> None:
        model, x = _model(), _random(5, 4)
        scales = {"0": _random(4), "2": _random(3)}
        start = expert(model)
        load_expert(model, scales)
        assert all(torch.equal(z, scales[path]) for path, z in expert(model).items())
        assert torch.equal(model[2].z, scales["2"])
        assert start["0"].equal(torch.ones(4))  # a copy
        assert not start["0"].requires_grad
        merge(model)
        with pytest.raises(RuntimeError, match="model: expected layers that are not merged"):
            load_expert(model, scales)
        assert model(x).shape == (5, 3)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        model = _model()
        for wrong in ({"0": torch.ones(4)}, {"0": torch.ones(4), "2": torch.ones(4)}):
            with pytest.raises(ValueError, match="scales: expected the paths and shapes of the model's 2 layers"):
                load_expert(model, wrong)
        with pytest.raises(ValueError, match="model: expected layers of SVFLinear"):
            expert(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="experts: expected at least one"):
            compose_experts([], torch.ones(0))
        with pytest.raises(ValueError, match=r"experts: .* all of the same layers, got 2"):
            compose_experts([{"a": torch.ones(1)}, {"b": torch.ones(1)}], torch.ones(2))
        with pytest.raises(ValueError, match="alpha: expected one weight for each of 1 experts"):
            compose_experts([{"a": torch.ones(1)}], torch.ones(2))


class TestCrossEntropyMethod:
    def test_recovers_the_weights_of_a_mixture(self) -> None:
        experts = [{"a": _random(7, seed=k)} for k in range(3)]
        truth = torch.tensor([0.7, -0.2, 0.4])
        goal = compose_experts(experts, truth)["a"]

        def score(alpha: Tensor) -> float:
            return -float((compose_experts(experts, alpha)["a"] - goal).square().sum())

        torch.testing.assert_close(
            cem_search(score, 3, population=100, elite=20, generator=_rng()), truth, atol=0.01, rtol=0
        )

    def test_first_generation(self) -> None:
        seen: list[Tensor] = []

        def score(alpha: Tensor) -> float:
            seen.append(alpha.clone())
            return float(alpha[0])

        best = cem_search(score, 4, population=2000, elite=500, iterations=2, deviation=0.3, generator=_rng())
        first, second = torch.stack(seen).split(2000)
        assert torch.equal(first[0], torch.full((4,), 0.25))
        error = 0.3 / 2000**0.5
        assert ((first.mean(0) - 0.25).abs() < 4 * error).all()
        assert ((first.std(0) - 0.3).abs() < 4 * error).all()
        assert torch.equal(second[0], first[first[:, 0].argmax()])  # the best so far is tried again
        assert torch.equal(best, second[second[:, 0].argmax()])
        chosen = first[first[:, 0].argsort(descending=True)[:500]]
        assert ((second.mean(0) - chosen.mean(0)).abs() < 5 * chosen.std(0) / 2000**0.5).all()
        assert ((second.std(0) - chosen.std(0)).abs() < 5 * chosen.std(0) / 2000**0.5).all()

    def test_defaults(self) -> None:
        calls = []
        cem_search(lambda alpha: calls.append(1) or 0.0, 2, generator=_rng())
        assert len(calls) == 32 * 20
        explicit = {"population": 32, "elite": 6, "iterations": 20, "deviation": 0.5}
        assert torch.equal(cem_search(_goal, 3, generator=_rng()), cem_search(_goal, 3, **explicit, generator=_rng()))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="iterations: expected at least 1"):
            cem_search(_goal, 3, iterations=0)
        with pytest.raises(ValueError, match="elite: expected at least 2"):
            cem_search(_goal, 3, elite=1)
        with pytest.raises(ValueError, match="experts: expected at least 1"):
            cem_search(_goal, 0)
        with pytest.raises(ValueError, match="population: expected at least 6"):
            cem_search(_goal, 3, population=5)
        with pytest.raises(ValueError, match="deviation: expected more than 0"):
            cem_search(_goal, 3, deviation=0.0)
        with pytest.raises(ValueError, match="score: expected numbers, got NaN"):
            cem_search(lambda alpha: float("nan"), 3)


class TestPolicyLoss:
    def test_by_hand(self) -> None:
        logits, reference = _random(2, 3, 4, dtype=torch.float64), _random(2, 3, 4, seed=1, dtype=torch.float64)
        answers = torch.tensor([[1, 0, 3], [2, 2, 0]])
        mask = torch.tensor([[True, True, False], [False, True, True]])
        rewards = torch.tensor([1.0, -0.5], dtype=torch.float64)
        p, q = (np.exp(x.numpy()) / np.exp(x.numpy()).sum(-1, keepdims=True) for x in (logits, reference))
        kept = [(0, 0), (0, 1), (1, 1), (1, 2)]
        gain = sum(float(rewards[b]) * np.log(p[b, t, answers[b, t]]) for b, t in kept)
        divergence = sum(entropy(p[b, t], q[b, t]) for b, t in kept)
        for weight in (0.0, 0.3):
            loss = svf_policy_loss(logits, reference, answers, rewards, mask, weight)
            assert loss.item() == pytest.approx((weight * divergence - gain) / 2)
        assert svf_policy_loss(logits, reference, answers, rewards, mask).item() == pytest.approx(-gain / 2)

    def test_divergence_and_its_gradient_vanish_at_one(self) -> None:
        model, x = _model().double(), _random(5, 4, dtype=torch.float64)
        base = copy.deepcopy(model)
        mask, zeros = torch.ones(5, 1).bool(), torch.zeros(5, dtype=torch.float64)
        answers = torch.zeros(5, 1, dtype=torch.int64)

        def penalty() -> Tensor:
            return svf_policy_loss(model(x)[:, None], base(x)[:, None], answers, zeros, mask, 1.0)

        penalty().backward()
        assert abs(penalty().item()) < 1e-12
        assert all(p.grad.abs().max() < 1e-12 for p in trainable_parameters(model).values())
        model[0].z.data *= 1.5
        assert penalty().item() > 1e-4

    def test_reinforce_on_the_scales_alone_learns_a_shifted_task(self) -> None:
        model, x = _model(3), _random(300, 4, seed=5)
        with torch.no_grad():  # answers are those of the model with other scales
            base = model(x)
            load_expert(model, {"0": torch.tensor([4.0, -2.0, 3.0, 0.2]), "2": torch.tensor([6.0, -4.0, 2.0])})
            right = model(x).argmax(-1)
            load_expert(model, {"0": torch.ones(4), "2": torch.ones(3)})
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        optimiser = torch.optim.Adam(trainable_parameters(model).values(), lr=0.2)
        generator, history = _rng(), []
        for _ in range(40):
            logits = model(x)
            answers = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            rewards = torch.where(answers[:, 0] == right, 1.0, -1.0)
            history.append(rewards.mean().item())
            mask = torch.ones(300, 1).bool()
            optimiser.zero_grad()
            svf_policy_loss(logits[:, None], base[:, None], answers, rewards, mask, 1e-3).backward()
            optimiser.step()
        assert history[0] < 0 < 0.3 < sum(history[-5:]) / 5
        assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x, ids, mask = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3).bool()
        with pytest.raises(ValueError, match="kl_weight: expected at least 0"):
            svf_policy_loss(x, x, ids, torch.ones(2), mask, -1.0)
        for wrong in (
            (x, x[..., 1:], ids, torch.ones(2), mask),
            (x, x, ids[:, 1:], torch.ones(2), mask),
            (x, x, ids, torch.ones(3), mask),
            (x, x, ids, torch.ones(2), mask[:1]),
        ):
            with pytest.raises(ValueError, match="logits: expected shapes that fit each other"):
                svf_policy_loss(*wrong)
