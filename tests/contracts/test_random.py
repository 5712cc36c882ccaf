"""Every public function that draws: the generator decides the result, and nothing else does."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.contracts.families import Member, Sample, each_member

each_drawing = each_member("random")


def _numbers(value: Any) -> list[Tensor]:
    """All tensors and numbers in a value; functions among the arguments hold none that could change."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, nn.Module):
            found += leaf.state_dict().values()
        elif dataclasses.is_dataclass(leaf):
            found += _numbers([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        elif leaf is not None and not callable(leaf) and not isinstance(leaf, str):
            found.append(torch.as_tensor(leaf))
    return found


def _drawn(sample: Sample, seed: int) -> list[Tensor]:
    return _numbers(sample(generator=torch.Generator().manual_seed(seed)))


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@each_drawing
def test_same_seed_same_result(member: Member) -> None:
    assert _same(_drawn(member.sample(), 3), _drawn(member.sample(), 3))


@each_drawing
def test_another_seed_another_result(member: Member) -> None:
    assert not all(_same(_drawn(member.sample(), 3), _drawn(member.sample(), seed)) for seed in range(4, 8))


@each_drawing
def test_the_global_generator_is_left_alone(member: Member) -> None:
    sample = member.sample()
    before = torch.get_rng_state()
    _drawn(sample, 3)
    assert torch.equal(before, torch.get_rng_state())


@each_drawing
def test_arguments_are_left_alone(member: Member) -> None:
    sample = member.sample()
    before = _numbers(copy.deepcopy((sample.args, sample.kwargs)))
    _drawn(sample, 3)
    assert _same(before, _numbers((sample.args, sample.kwargs)))
