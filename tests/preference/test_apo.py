from __future__ import annotations

import difflib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mlreviews.preference import (
    PreferenceLoss,
    apo_down_loss,
    apo_zero_loss,
    clair_pairs,
    edit_distance,
    jaccard_similarity,
)

BETA = 0.3
REWARDS = torch.tensor([[0.0, 0.0], [0.9, -0.4], [-1.7, 0.2], [2.0, 1.1], [-0.8, -2.6]], dtype=torch.float64)


def both(loss, rewards: Tensor) -> tuple[PreferenceLoss, Tensor]:  # type: ignore[no-untyped-def]
    """The loss of given (chosen, rejected) rewards, and its slopes with respect to these."""
    reference = torch.tensor([-5.0, -8.0], dtype=torch.float64).expand_as(rewards)
    policy = (reference + rewards / BETA).requires_grad_()
    found = loss(*policy.T, *reference.T, beta=BETA)
    assert not any(rewards.requires_grad for rewards in found[1:])
    return found, torch.autograd.grad(found.losses.sum(), policy)[0] / BETA


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def density(x: float) -> float:
    """Slope of the logistic function."""
    return 1 / (2 + 2 * math.cosh(x))


def test_zero_is_equation_1_with_its_slopes() -> None:
    found, slopes = both(apo_zero_loss, REWARDS)
    assert found.losses.tolist() == pytest.approx([1 - logistic(w) + logistic(l) for w, l in REWARDS.tolist()])
    for slope, (w, l) in zip(slopes.tolist(), REWARDS.tolist(), strict=True):
        assert slope == pytest.approx([-density(w), density(l)])
    torch.testing.assert_close(torch.stack(found[1:], 1), REWARDS)


def test_down_is_equation_2_with_its_slopes() -> None:
    found, slopes = both(apo_down_loss, REWARDS)
    assert found.losses.tolist() == pytest.approx([logistic(w) + 1 - logistic(w - l) for w, l in REWARDS.tolist()])
    for slope, (w, l) in zip(slopes.tolist(), REWARDS.tolist(), strict=True):
        assert slope == pytest.approx([density(w) - density(w - l), density(w - l)])
    torch.testing.assert_close(torch.stack(found[1:], 1), REWARDS)


def test_at_the_reference_both_are_1_and_only_the_rejected_answer_is_certain_to_move() -> None:
    for loss, slope in ((apo_zero_loss, [-0.25, 0.25]), (apo_down_loss, [0.0, 0.25])):
        found, slopes = both(loss, REWARDS[:1])
        assert found.losses.item() == 1
        assert slopes[0].tolist() == slope


def test_beta_is_a_tenth_unless_given() -> None:
    columns = (*REWARDS.T, *REWARDS.flip(0).T)
    for loss in (apo_zero_loss, apo_down_loss):
        assert torch.equal(loss(*columns).losses, loss(*columns, beta=0.1).losses)


def test_down_lowers_a_preferred_answer_that_leads_by_far() -> None:
    _, slopes = both(apo_down_loss, torch.tensor([[0.3, -6.0]], dtype=torch.float64))
    assert slopes[0, 0] > 0.2


def test_bounded_and_of_one_sign() -> None:
    """Losses in (0, 2); zero always lifts the preferred answer, both always lower the rejected one."""
    grid = torch.linspace(-15, 15, 21, dtype=torch.float64)
    for loss in (apo_zero_loss, apo_down_loss):
        found, slopes = both(loss, torch.cartesian_prod(grid, grid))
        assert found.losses.min() > 0
        assert found.losses.max() < 2
        assert (slopes[:, 1] > 0).all()
        assert loss is apo_down_loss or (slopes[:, 0] < 0).all()


def test_far_from_the_reference_the_gradient_vanishes() -> None:
    for loss in (apo_zero_loss, apo_down_loss):
        for far in (80.0, -80.0):
            assert both(loss, torch.tensor([[far, -far]], dtype=torch.float64))[1].abs().max() < 1e-12


def test_clair_pairs_are_the_answer_and_its_revision() -> None:
    """The reviser sees the prompt and the very answer; an answer without a fault makes no pair."""
    pairs = clair_pairs(["2+2", "3+3", "1+1"], lambda p: f"{p} = 4, I think", lambda p, a: a.replace("4", str(eval(p))))
    assert [tuple(pair) for pair in pairs] == [
        ("3+3", "3+3 = 6, I think", "3+3 = 4, I think"),
        ("1+1", "1+1 = 2, I think", "1+1 = 4, I think"),
    ]
    assert edit_distance(pairs[0].chosen, pairs[0].rejected) == 1


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_measures_of_contrast(one: str, other: str) -> None:
    distance = edit_distance(one, other)
    assert distance == edit_distance(other, one)
    assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))
    assert (distance == 0) == (one == other)
    # the longest common subsequence gives the distance without replacements, which is at most twice as long
    matches = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    assert distance <= len(one) + len(other) - 2 * sum(block.size for block in matches)
    similarity = jaccard_similarity(one, other)
    assert 0 <= similarity <= 1
    assert (similarity == 1) == (set(one) == set(other))


def test_measures_on_known_cases() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance(["a", "long", "word"], ["a", "word"]) == 1
    assert jaccard_similarity(["a", "b", "b"], ["b", "c"]) == pytest.approx(1 / 3)
    assert jaccard_similarity([], []) == 1
