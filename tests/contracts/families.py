"""Finds the members of each family in the catalogue, and their samples in the tests."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import nn, optim

from mlreviews.catalogue import Technique, techniques
from mlreviews.common.adapter import Adapter

__all__ = ["FAMILIES", "Member", "Sample", "each_member", "members"]


def _is_module(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, nn.Module)


def _is_optimiser(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, optim.Optimizer)


def _draws(thing: object) -> bool:
    return inspect.isfunction(thing) and "generator" in inspect.signature(thing).parameters


def _is_recurrent(thing: Any) -> bool:
    return _is_module(thing) and hasattr(thing, "step") and "state" in inspect.signature(thing.forward).parameters


def _is_adapter(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Adapter) and thing is not Adapter


def _is_attention_layer(thing: object) -> bool:
    # what TinyLM's `attention` argument is called with
    asked = {"heads", "kv_heads", "layer", "generator"}
    return inspect.isclass(thing) and issubclass(thing, nn.Module) and asked <= set(inspect.signature(thing).parameters)


def _is_preference_loss(thing: object) -> bool:
    if not inspect.isfunction(thing):
        return False
    signature = inspect.signature(thing)
    return signature.return_annotation == "PreferenceLoss" and "policy_chosen_logps" in signature.parameters


def _is_decoder(thing: object) -> bool:
    asked = {"input_ids", "max_new_tokens", "sampler", "generator", "stop_tokens"}
    return inspect.isfunction(thing) and asked <= set(inspect.signature(thing).parameters)


# family -> what makes a public name a member.  The batteries of the families that DESIGN.md lists arrive with their
# first member: a predicate here, and test_<family>.py beside it.
FAMILIES: dict[str, Callable[[object], bool]] = {
    "adapter": _is_adapter,
    "attention_layer": _is_attention_layer,
    "decoder": _is_decoder,
    "module": _is_module,
    "optimiser": _is_optimiser,
    "preference_loss": _is_preference_loss,
    "random": _draws,
    "recurrent": _is_recurrent,
}


@dataclass
class Sample:
    """How to use a member once.

    Attributes:
        target: an instance (of a class), or the function itself.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **more: Any) -> Any:
        return self.target(*self.args, **self.kwargs, **more)


@dataclass(frozen=True)
class Member:
    """A public name of a technique that belongs to a family."""

    technique: Technique
    name: str

    @property
    def _tests(self) -> str:
        return f"tests.{self.technique.area}.test_{self.technique.module_name}"

    def _contract(self) -> dict[str, Callable[[], Sample]]:
        return getattr(importlib.import_module(self._tests), "CONTRACT", {})

    def sample(self, label: str | None = None) -> Sample:
        """A fresh sample from the technique's test file: that of the name, or the one of a label of `labels`."""
        contract = self._contract()
        if self.name not in contract:
            pytest.fail(
                f'{self._tests} has no sample of {self.name}: add CONTRACT = {{"{self.name}": lambda: Sample(...)}}'
            )
        return contract[label or self.name]()

    def labels(self) -> list[str]:
        """What the test file calls its samples of the member: the name, and ``"name, in other settings"``."""
        return [self.name, *(label for label in self._contract() if label.startswith(f"{self.name}, "))]


def members(family: str) -> list[Member]:
    """All members of a family, over all implemented techniques."""
    belongs = FAMILIES[family]
    found = []
    for technique in techniques().values():
        if technique.implemented:
            module = importlib.import_module(technique.module)
            found += [Member(technique, name) for name in module.__all__ if belongs(getattr(module, name, None))]
    return found


def each_member(family: str) -> pytest.MarkDecorator:
    """Parametrises a test over the family's members."""
    return pytest.mark.parametrize("member", members(family), ids=lambda m: f"{m.technique.slug}:{m.name}")
