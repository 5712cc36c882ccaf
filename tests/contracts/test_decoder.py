"""Every decoder that continues prompts: whatever it drafts, the tokens are those of plain decoding.

A member's sample has the model first and a batch of prompts as ``input_ids``; that drawn tokens have the model's law is
shown by each technique's own test, by enumeration.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from mlreviews.models import GenerationResult, Sampler, generate
from tests.contracts.families import Member, Sample, each_member

each_decoder = each_member("decoder")
BUDGET = 9


def _run(sample: Sample, **changed: Any) -> GenerationResult:
    """The sample's call with greedy decoding and other changes."""
    bound = inspect.signature(sample.target).bind(*sample.args, **sample.kwargs)
    bound.arguments |= {"sampler": Sampler(), "max_new_tokens": BUDGET, **changed}
    found: GenerationResult = sample.target(*bound.args, **bound.kwargs)
    return found


def _plain(sample: Sample, **changed: Any) -> GenerationResult:
    options = {"max_new_tokens": BUDGET, "input_ids": _prompts(sample), **changed}
    return generate(sample.args[0], **options)


def _prompts(sample: Sample) -> torch.Tensor:
    ids: torch.Tensor = inspect.signature(sample.target).bind(*sample.args, **sample.kwargs).arguments["input_ids"]
    return ids


@each_decoder
def test_greedy_tokens_are_those_of_plain_decoding(member: Member) -> None:
    sample = member.sample()
    expected, found = _plain(sample), _run(sample)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert (found.tokens.dtype, found.lengths.tolist()) == (torch.int64, [BUDGET] * len(expected.tokens))
    assert 1 <= found.target_calls <= BUDGET + 1  # the prompt may be read by itself
    if found.accepted is not None:
        assert found.drafted is not None
        assert found.accepted.shape == found.drafted.shape == (len(found.accepted), len(found.tokens))
        assert bool((found.accepted <= found.drafted).all())
    alone = _run(sample, input_ids=_prompts(sample)[1:])
    assert alone.row(0).tolist() == expected.row(1).tolist()


@each_decoder
def test_padding_on_the_left_changes_nothing(member: Member) -> None:
    sample = member.sample()
    ids = _prompts(sample)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 0] = False
    found = _run(sample, mask=mask)
    for row, start in ((0, 1), (1, 0)):
        assert found.row(row).tolist() == _plain(sample, input_ids=ids[row : row + 1, start:]).row(0).tolist()


@each_decoder
def test_rows_end_at_stop_tokens(member: Member) -> None:
    sample = member.sample()
    stop = [int(_plain(sample).tokens[1, 3])]
    expected, found = _plain(sample, stop_tokens=stop), _run(sample, stop_tokens=stop)
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert [found.row(i).tolist() for i in range(2)] == [expected.row(i).tolist() for i in range(2)]


@each_decoder
def test_budgets(member: Member) -> None:
    sample = member.sample()
    expected = _plain(sample).tokens
    for budget in (0, 1, 2):
        found = _run(sample, max_new_tokens=budget)
        assert found.tokens.tolist() == expected[:, :budget].tolist()
        assert found.lengths.tolist() == [budget] * len(expected)


@each_decoder
def test_bad_prompts(member: Member) -> None:
    sample = member.sample()
    ids = _prompts(sample)
    for bad, error in ((ids[:, :0], ValueError), (ids + sample.args[0].vocab_size, ValueError), (ids.int(), TypeError)):
        with pytest.raises(error, match="input_ids: expected"):
            _run(sample, input_ids=bad)
    with pytest.raises(ValueError, match="max_new_tokens: expected"):
        _run(sample, max_new_tokens=-1)
