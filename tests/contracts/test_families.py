"""The machinery itself: members are found, and one without a sample is told what to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn, optim

from mlreviews.catalogue import find
from tests.contracts.families import FAMILIES, Member, members


def test_members_come_from_the_catalogue() -> None:
    found = {(m.technique.slug, m.name) for m in members("module")}
    assert ("parameter-counting", "MemorizingNet") in found
    assert ("parameter-counting", "memorize_construct") in {(m.technique.slug, m.name) for m in members("random")}


def test_every_family_with_members_has_a_battery() -> None:
    batteries = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert {family for family in FAMILIES if members(family)} <= batteries


def test_predicates() -> None:
    @dataclass
    class Plain:
        x: int

    class Recurrent(nn.Module):
        def forward(self, x: object, state: object = None) -> object:
            return x, state

        step = forward

    def draws(n: int, *, generator: object = None) -> int:
        return n

    assert [name for name, belongs in FAMILIES.items() if belongs(nn.Linear)] == ["module"]
    assert [name for name, belongs in FAMILIES.items() if belongs(optim.SGD)] == ["optimiser"]
    assert [name for name, belongs in FAMILIES.items() if belongs(draws)] == ["random"]
    assert [name for name, belongs in FAMILIES.items() if belongs(Recurrent)] == ["module", "recurrent"]
    assert not FAMILIES["recurrent"](nn.LSTM)
    assert not any(belongs(thing) for belongs in FAMILIES.values() for thing in (Plain, 3, nn.Linear(1, 1), len))


def test_a_member_without_a_sample_is_told_what_to_write() -> None:
    with pytest.raises(pytest.fail.Exception, match="no sample of effective_dof: add CONTRACT"):
        Member(find("parameter-counting"), "effective_dof").sample()
