"""Every loss of preference pairs: what any trainer relies on. Arguments are made from the names in the signature."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mlreviews.preference import PreferenceLoss
from tests.contracts.families import Member, each_member

each_loss = each_member("preference_loss")

# The loss of a pair depends on the whole batch, by definition.
COUPLED = {"aot_loss"}
# Not monotone: its slope is positive around a margin of 0, which is what its discovery is known for.
BUMPY = {"discopop_loss"}
BATCH = 5


def function(member: Member):  # type: ignore[no-untyped-def]
    return getattr(importlib.import_module(member.technique.module), member.name)


def arguments(member: Member, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors [batch] by name, and the numbers that have no default."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, parameter in inspect.signature(function(member)).parameters.items():
        if name.endswith("_logps"):
            tensors[name] = -9 + 8 * torch.rand(BATCH, generator=generator)
        elif name.endswith("_lengths"):
            tensors[name] = torch.randint(1, 7, (BATCH,), generator=generator)
        elif parameter.default is parameter.empty:
            numbers[name] = 0.1
    return tensors, numbers


def on(member: Member, tensors: dict[str, Tensor]) -> PreferenceLoss:
    return function(member)(**tensors, **arguments(member)[1])


def with_gradients(member: Member, tensors: dict[str, Tensor]) -> tuple[PreferenceLoss, dict[str, Tensor]]:
    leaves = {k: t.clone().requires_grad_() if t.is_floating_point() else t for k, t in tensors.items()}
    found = on(member, leaves)
    found.losses.sum().backward()
    return found, {k: t.grad for k, t in leaves.items() if t.grad is not None}


@each_loss
def test_pairs_are_independent(member: Member) -> None:
    """Another order gives the losses in that order, and micro-batches have the losses of the one batch."""
    tensors, _ = arguments(member)
    whole = on(member, tensors)
    order = torch.tensor([3, 0, 4, 1, 2])
    for ours, theirs in zip(on(member, {k: t[order] for k, t in tensors.items()}), whole, strict=True):
        torch.testing.assert_close(ours, theirs[order])
    parts = [on(member, {k: t[rows] for k, t in tensors.items()}) for rows in (slice(0, 2), slice(2, None))]
    if member.name not in COUPLED:
        for ours, theirs in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
            torch.testing.assert_close(ours, theirs)


@each_loss
def test_shapes_and_detached_rewards(member: Member) -> None:
    tensors, _ = arguments(member)
    before = {k: t.clone() for k, t in tensors.items()}
    found, gradients = with_gradients(member, tensors)
    assert [t.shape for t in found] == [(BATCH,)] * 3
    assert found.losses.requires_grad
    assert not found.chosen_rewards.requires_grad
    assert not found.rejected_rewards.requires_grad
    assert gradients.keys() == {name for name in tensors if name.endswith("_logps")}
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


def _extremes() -> Iterator[tuple[float, float]]:
    for chosen in (-1e4, -1e-3):
        for rejected in (-1e4, -1e-3):
            yield chosen, rejected


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extremes_are_finite(member: Member, dtype: torch.dtype) -> None:
    tensors, _ = arguments(member)
    for policy in _extremes():
        for reference in _extremes():
            values = {"policy": policy, "ref": reference}
            for name, tensor in tensors.items():
                if name.endswith("_logps"):
                    value = values[name.split("_")[0]]["rejected" in name]
                    tensors[name] = torch.full(tensor.shape, value, dtype=dtype)
            found, gradients = with_gradients(member, tensors)
            assert all(t.isfinite().all() and t.dtype == dtype for t in (*found, *gradients.values())), values


@each_loss
def test_a_policy_that_is_the_reference(member: Member) -> None:
    """Rewards are 0 and all pairs have the same loss, whatever the likelihoods are."""
    tensors, _ = arguments(member)
    if "ref_chosen_logps" not in tensors:
        pytest.skip("has no reference")
    for name in ("chosen_logps", "rejected_logps"):
        tensors[f"policy_{name}"] = tensors[f"ref_{name}"]
    found = on(member, tensors)
    assert not found.chosen_rewards.any()
    assert not found.rejected_rewards.any()
    if member.name not in COUPLED:
        assert found.losses.max() - found.losses.min() < 1e-6
        assert math.isfinite(found.losses[0])


@each_loss
def test_a_step_down_the_gradient_widens_the_margin_of_rewards(member: Member) -> None:
    """Summed over pairs near the reference, where no loss is saturated yet."""
    tensors, _ = arguments(member)
    for name in ("chosen_logps", "rejected_logps"):
        if f"ref_{name}" in tensors:
            noise = torch.randn(BATCH, generator=torch.Generator().manual_seed(1))
            tensors[f"policy_{name}"] = tensors[f"ref_{name}"] + 0.1 * noise
    _, gradients = with_gradients(member, tensors)
    slope = (gradients["policy_chosen_logps"] - gradients["policy_rejected_logps"]).sum()
    assert (slope > 0) == (member.name in BUMPY)


@each_loss
@pytest.mark.usefixtures("unchecked")
def test_each_argument_is_checked(member: Member) -> None:
    tensors, _ = arguments(member)
    for name, tensor in tensors.items():
        with pytest.raises(ValueError, match=r"_logps|_lengths"):
            on(member, tensors | {name: tensor[:-1]})
        if tensor.is_floating_point():
            with pytest.raises(ValueError, match=name):
                on(member, tensors | {name: tensor * torch.nan})
            with pytest.raises(TypeError, match=name):
                on(member, tensors | {name: tensor.long()})
    if "beta" in inspect.signature(function(member)).parameters:
        with pytest.raises(ValueError, match="beta"):
            function(member)(**tensors, **arguments(member)[1] | {"beta": 0.0})
