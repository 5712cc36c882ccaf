import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlreviews.peft.lora import LoRALinear
from mlreviews.preference.efficient_rm_ensemble import (
    LinearRewardEnsemble,
    LoRARewardEnsemble,
    MultiLoRALinear,
    mean_minus_variance_reward,
)
from mlreviews.preference.regularised_rm_ensembles import (
    RewardEnsemble,
    mean_minus_std_reward,
    mean_reward,
    min_reward,
)
from tests.contracts.families import Sample


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed))


class Backbone(nn.Module):
    """From [batch, time, 4] to [batch, 6], with two kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner = nn.Linear(4, 5)
            self.outer = nn.Linear(5, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh()).mean(1)


def _lora(members: int = 3, targets: str = "inner|outer") -> LoRARewardEnsemble:
    return LoRARewardEnsemble(Backbone(), 6, targets, members, rank=2, alpha=3.0, generator=_generator())


CONTRACT = {
    "LinearRewardEnsemble": lambda: Sample(
        LinearRewardEnsemble(Backbone(), 6, 3, generator=_generator()), (_random(2, 7, 4),)
    ),
    "LoRARewardEnsemble": lambda: Sample(_lora(), (_random(2, 7, 4),)),
    "MultiLoRALinear": lambda: Sample(
        MultiLoRALinear(nn.Linear(4, 5), 3, 2, generator=_generator()), (_random(6, 7, 4),)
    ),
}


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class TestLinear:
    def test_reduces_to_an_ensemble_of_whole_models_and_runs_the_backbone_once(self) -> None:
        model, x = LinearRewardEnsemble(Backbone(), 6, 3), _random(2, 7, 4)
        calls: list[int] = []
        handle = model.backbone.register_forward_hook(lambda *_: calls.append(1))
        found = model(x)
        assert found.shape == (3, 2)
        assert len(calls) == 1
        handle.remove()
        wholes = []
        for m in range(3):
            head = nn.Linear(6, 1)
            head.load_state_dict({"weight": model.heads.weight[m : m + 1], "bias": model.heads.bias[m : m + 1]})
            wholes.append(nn.Sequential(model.backbone, head, nn.Flatten(0)))
        torch.testing.assert_close(found, RewardEnsemble(wholes).members(x))

    def test_parameters(self) -> None:
        model = LinearRewardEnsemble(Backbone(), 6)
        extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in Backbone().parameters())
        assert extra == 5 * (6 + 1)


class TestLoRA:
    def test_reduces_to_an_ensemble_of_whole_models(self) -> None:
        """Every member against a copy of the backbone into whose weights its change is put."""
        model, x = _lora(), _random(2, 7, 4)
        with torch.no_grad():
            for i, parameter in enumerate(_trained(model)):
                parameter.add_(_random(*parameter.shape, seed=i))
        wholes = []
        for m in range(3):
            whole = Backbone()
            with torch.no_grad():
                for name in ("inner", "outer"):
                    layer = getattr(model.backbone, name)
                    getattr(whole, name).weight += 3.0 / 2 * layer.lora_B[m] @ layer.lora_A[m]
            head = nn.Linear(6, 1)
            head.load_state_dict({"weight": model.heads.weight[m : m + 1], "bias": model.heads.bias[m : m + 1]})
            wholes.append(nn.Sequential(whole, head, nn.Flatten(0)))
        torch.testing.assert_close(model(x), RewardEnsemble(wholes).members(x), rtol=1e-4, atol=1e-5)

    def test_reduces_to_lora(self) -> None:
        base, x = nn.Linear(4, 5), _random(3, 7, 4)
        one = LoRALinear(copy.deepcopy(base), rank=8, alpha=16.0, generator=_generator(5))
        many = MultiLoRALinear(base, 1, generator=_generator(5))
        assert torch.equal(many.lora_A[0], one.lora_A["default"])
        change = _random(5, 8)
        with torch.no_grad():
            one.lora_B["default"].copy_(change)
            many.lora_B[0].copy_(change)
        torch.testing.assert_close(many(x), one(x))

    def test_new_members_with_one_head_agree(self) -> None:
        model, x = _lora(), _random(2, 7, 4)
        with torch.no_grad():
            model.heads.weight.copy_(model.heads.weight[:1].expand(3, 6).clone())
            model.heads.bias.fill_(0.3)
        rewards = model(x)
        torch.testing.assert_close(rewards, rewards[:1].expand(3, 2))
        torch.testing.assert_close(rewards[0], Backbone()(x) @ model.heads.weight[0] + 0.3)
        for aggregate in (min_reward, mean_minus_std_reward, mean_minus_variance_reward):
            torch.testing.assert_close(aggregate(rewards), mean_reward(rewards))

    def test_members_learn_by_themselves(self) -> None:
        model, x = _lora(), _random(2, 7, 4)
        with torch.no_grad():
            for i, parameter in enumerate(_trained(model)):
                parameter.add_(_random(*parameter.shape, seed=i))
        model(x)[1].sum().backward()
        for parameter in (model.backbone.inner.lora_A, model.backbone.outer.lora_B, model.heads.weight):
            assert parameter.grad is not None
            assert parameter.grad.flatten(1).any(1).tolist() == [False, True, False]

    def test_only_what_members_own_is_trained(self) -> None:
        model = _lora(targets="inner")
        assert sum(p.numel() for p in _trained(model)) == 3 * (2 * (4 + 5) + 6 + 1)
        assert isinstance(model.backbone.outer, nn.Linear)
        assert not model.backbone.outer.weight.requires_grad
        inner = LoRARewardEnsemble(Backbone(), 6, "inner").backbone.inner
        assert inner.lora_A.shape == (5, 8, 4)
        assert inner.scaling == 2


def test_mean_minus_variance() -> None:
    rewards = _random(4, 2, 5).double()
    expected = rewards.numpy().mean(0) - 0.7 * np.var(rewards.numpy(), axis=0)
    np.testing.assert_allclose(mean_minus_variance_reward(rewards, 0.7), expected)
    assert torch.equal(mean_minus_variance_reward(rewards, 0.0), mean_reward(rewards))
    assert torch.equal(mean_minus_variance_reward(rewards), mean_minus_variance_reward(rewards, 0.5))


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    with pytest.raises(ValueError, match="weight: expected at least 0"):
        mean_minus_variance_reward(_random(2, 3), -1.0)
    with pytest.raises(ValueError, match=r"rewards: expected \[members"):
        mean_minus_variance_reward(_random(0, 3))
    with pytest.raises(ValueError, match="targets: expected regular expressions"):
        _lora(targets="nothing")
    with pytest.raises(TypeError, match=r"base: expected torch.nn.Linear, got ReLU"):
        MultiLoRALinear(nn.ReLU())
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        MultiLoRALinear(nn.Linear(4, 5), rank=0)
    with pytest.raises(ValueError, match="alpha: expected a finite"):
        MultiLoRALinear(nn.Linear(4, 5), alpha=float("nan"))
    with pytest.raises(ValueError, match="x: expected a multiple of 5 rows"):
        MultiLoRALinear(nn.Linear(4, 5))(_random(6, 4))
    for make in (
        lambda d, m: LinearRewardEnsemble(Backbone(), d, m),
        lambda d, m: LoRARewardEnsemble(Backbone(), d, "inner", m),
    ):
        with pytest.raises(ValueError, match="d_model: expected at least 1"):
            make(0, 1)
        with pytest.raises(ValueError, match="n_members: expected at least 1"):
            make(6, 0)
    with pytest.raises(ValueError, match="n_members: expected at least 1"):
        MultiLoRALinear(nn.Linear(4, 5), 0)
