"""Every adapter: it changes nothing at first, merges to what it computes, leaves no trace, and trains only its own.

A sample is a new adapter. What it computes is for its own tests.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mlreviews.common.adapter import (
    Adapter,
    adapter_state_dict,
    eject,
    inject,
    load_adapter_state_dict,
    merge,
    trainable_parameters,
    unmerge,
)
from tests.contracts.families import Member, Sample, members

CASES = [(member, label) for member in members("adapter") for label in member.labels()]


def _each(cases: list[tuple[Member, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"{case[0].technique.slug}:{case[1]}")


each_adapter = _each(CASES)
each_mergeable = _each([case for case in CASES if case[0].sample(case[1]).target.mergeable])


def _perturbed(case: tuple[Member, str], dtype: torch.dtype = torch.float64) -> Sample:
    """With nothing at a value where it has no effect, and no dropout."""
    member, label = case
    sample = member.sample(label)
    target: nn.Module = sample.target.to(dtype).eval()
    with torch.no_grad():
        for i, parameter in enumerate(trainable_parameters(target).values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            parameter.add_(0.3 * noise)
    args = (a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample.args)
    return Sample(target, tuple(args), sample.kwargs)


def _bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def _same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@each_adapter
def test_a_new_one_changes_nothing(case: tuple[Member, str]) -> None:
    sample = case[0].sample(case[1])
    same = torch.equal(sample(), sample.target.base(*sample.args))
    assert same == sample.target.identity_at_start


@each_adapter
def test_one_that_has_learned_changes_the_output(case: tuple[Member, str]) -> None:
    sample = _perturbed(case)
    assert not torch.allclose(sample(), sample.target.base(*sample.args))


@each_mergeable
def test_merged_computes_what_it_did_before(case: tuple[Member, str]) -> None:
    sample = _perturbed(case)
    adapter: Adapter = sample.target
    expected, weight = sample(), adapter.base.weight.clone()
    delta = adapter.delta_weight()
    assert delta.shape == weight.shape
    adapter.merge()
    assert adapter.merged
    torch.testing.assert_close(adapter.base.weight, weight + delta)
    torch.testing.assert_close(sample(), expected)
    torch.testing.assert_close(adapter.base(*sample.args), expected)


@each_mergeable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerged_is_what_it_was_bit_for_bit(case: tuple[Member, str], dtype: torch.dtype) -> None:
    sample = _perturbed(case, dtype)
    adapter: Adapter = sample.target
    parameter, before, expected = adapter.base.weight, _bits(adapter), sample()
    delta = adapter.delta_weight()
    assert delta.dtype == torch.float32
    adapter.merge()
    rounded_once = (parameter.float() + delta).to(dtype)
    assert torch.equal(adapter.base.weight, rounded_once)
    with pytest.raises(RuntimeError, match="merged already"):
        adapter.merge()
    adapter.unmerge()
    assert adapter.base.weight is parameter
    assert _same_bits(_bits(adapter), before)
    assert torch.equal(sample(), expected)
    with pytest.raises(RuntimeError, match="not merged"):
        adapter.unmerge()


@each_mergeable
def test_a_merge_that_fails_leaves_everything_as_it_was(case: tuple[Member, str]) -> None:
    adapter: Adapter = _perturbed(case).target
    with torch.no_grad():
        for parameter in trainable_parameters(adapter).values():
            parameter.fill_(torch.inf)
    before = _bits(adapter)
    with pytest.raises(ValueError, match="NaN or infinity"):
        adapter.merge()
    assert not adapter.merged
    assert _same_bits(_bits(adapter), before)


@_each([case for case in CASES if not case[0].sample(case[1]).target.mergeable])
def test_one_that_is_no_change_of_a_weight_says_so(case: tuple[Member, str]) -> None:
    with pytest.raises(TypeError, match="no change of a weight"):
        case[0].sample(case[1]).target.merge()


@each_adapter
def test_only_its_own_parameters_train(case: tuple[Member, str]) -> None:
    sample = _perturbed(case)
    adapter: Adapter = sample.target
    trained = trainable_parameters(adapter)
    assert trained
    assert not any(name.startswith("base.") for name in trained)
    before = _bits(adapter)
    optimiser = torch.optim.SGD(adapter.parameters(), 0.1)
    sample().square().sum().backward()
    optimiser.step()
    changed = {name for name, x in _bits(adapter).items() if not torch.equal(x, before[name])}
    assert changed == trained.keys()


@each_adapter
def test_in_a_model_and_out_again(case: tuple[Member, str]) -> None:
    sample = _perturbed(case)
    base = sample.target.base.requires_grad_()
    model = nn.ModuleDict({"layer": base, "head": nn.Linear(2, 2)})
    assert inject(model, "lay.r", lambda path, layer: sample.target) == ["layer"]
    assert model["layer"] is sample.target
    assert {f"layer.{name}" for name in trainable_parameters(sample.target)} == trainable_parameters(model).keys()
    state = adapter_state_dict(model)
    assert state.keys() >= trainable_parameters(model).keys()
    assert not any(name.startswith("layer.base.") for name in state)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for x in adapter_state_dict(other).values():
            x.zero_()
    load_adapter_state_dict(other, state)
    assert torch.equal(Sample(other["layer"], sample.args)(), sample())
    if sample.target.mergeable:
        expected = sample()
        merge(model)
        assert adapter_state_dict(model).keys() == state.keys()
        unmerge(model)
        assert torch.equal(sample(), expected)
        merge(model)
    assert eject(model) == ["layer"]
    assert model["layer"] is base
    assert not sample.target.merged
