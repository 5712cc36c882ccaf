"""Every attention of a technique as the one argument of `TinyLM`: it is causal, can be cut anywhere, and trains."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlreviews.models import CausalAttention, TinyLM, TinyLMConfig
from tests.contracts.families import Member, each_member

TIME = 9
CONFIG = TinyLMConfig(vocab_size=13, d_model=16, layers=2, heads=4, hidden=24)

each_attention = each_member("attention_layer")
each_kv_heads = pytest.mark.parametrize("kv_heads", [None, 2], ids=["heads", "grouped"])


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(member: Member, **changes: Any) -> TinyLM:
    attention = getattr(importlib.import_module(member.technique.module), member.name)
    model = TinyLM(TinyLMConfig(**{**CONFIG.__dict__, **changes}), attention, generator=_rng())
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays at a value where it has no effect
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=_rng(2)))
    return model.eval()


def _ids(batch: int = 2, time: int = TIME) -> Tensor:
    return torch.randint(13, (batch, time), generator=_rng(1))


@each_attention
def test_defaults_are_those_of_the_standard_layer(member: Member) -> None:
    own, standard = (
        {name: p.default for name, p in inspect.signature(kind).parameters.items() if name in ("layer", "rope_base")}
        for kind in (getattr(importlib.import_module(member.technique.module), member.name), CausalAttention)
    )
    assert own == {name: standard[name] for name in own}


@each_attention
@each_kv_heads
def test_no_token_sees_a_later_one(member: Member, kv_heads: int | None) -> None:
    model, ids = _model(member, kv_heads=kv_heads).double(), _ids()
    whole = model(ids).logits
    for cut in range(1, TIME):
        changed = torch.cat([ids[:, :cut], (ids[:, cut:] + 1) % 13], 1)
        torch.testing.assert_close(model(changed).logits[:, :cut], whole[:, :cut])
    assert not torch.allclose(model(changed).logits[:, -1], whole[:, -1])


@each_attention
@each_kv_heads
def test_parts_equal_the_whole_wherever_it_is_cut(member: Member, kv_heads: int | None) -> None:
    model, ids = _model(member, kv_heads=kv_heads).double(), _ids()
    whole = model(ids)
    for cut in range(1, TIME):
        first = model(ids[:, :cut])
        second = model(ids[:, cut:], first.cache)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits)
        assert second.cache.length == TIME


@each_attention
def test_token_by_token_equals_the_whole_for_a_padded_batch(member: Member) -> None:
    model, ids = _model(member).double(), _ids(3)
    starts = [0, 1, 4]
    mask = torch.arange(TIME) >= torch.tensor(starts)[:, None]
    prompt = 6
    out = model(ids[:, :prompt], mask=mask[:, :prompt])
    logits = [out.logits]
    for t in range(prompt, TIME):
        out = model(ids[:, t : t + 1], out.cache)
        logits.append(out.logits)
    found = torch.cat(logits, 1)
    assert found.isfinite().all()
    for row, start in enumerate(starts):
        alone = model(ids[row : row + 1, start:]).logits[0]
        torch.testing.assert_close(found[row, start:], alone, rtol=1e-5, atol=1e-5)  # angles are float32


@each_attention
def test_learns_a_sequence(member: Member) -> None:
    model, ids = _model(member), _ids(2, 16).repeat(1, 2)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
