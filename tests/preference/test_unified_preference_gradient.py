from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlreviews.preference import (
    apo_zero_loss,
    bradley_terry_loss,
    dpo_coefficients,
    dpo_loss,
    grpo_coefficients,
    ipo_coefficients,
    ipo_loss,
    pointwise_reward_loss,
    ppo_clip_loss,
    ppo_coefficients,
    raft_coefficients,
    reinforce_coefficients,
    rloo_loss,
    sequence_coefficients,
    sft_coefficients,
    token_logps,
    unified_preference_loss,
)

BATCH, TIME, VOCAB = 6, 5, 7
LENGTHS = torch.tensor([5, 3, 1, 4, 2, 3])
MASK = torch.arange(TIME) < LENGTHS[:, None]
REWARDS = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.1, 0.9], dtype=torch.float64)
ADVANTAGES = REWARDS - 0.7


def policy() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and token log-probabilities under the policy (with gradient) and under a reference."""
    generator = torch.Generator().manual_seed(9)
    logits, other = torch.randn(2, BATCH, TIME, VOCAB, dtype=torch.float64, generator=generator)
    labels = torch.randint(VOCAB, (BATCH, TIME), generator=generator)
    logits.requires_grad_()
    return logits, token_logps(logits, labels), token_logps(other, labels)


def summed(tokens: Tensor) -> Tensor:
    return (tokens * MASK).sum(1)


def means(tokens: Tensor) -> Tensor:
    return summed(tokens) / LENGTHS


def agree(logits: Tensor, unified: Tensor, native: Tensor) -> None:
    one, other = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (unified, native))
    torch.testing.assert_close(one, other)
    assert other.abs().max() > 1e-3


def test_fine_tuning_and_its_best_of_group() -> None:
    logits, logps, _ = policy()
    agree(logits, unified_preference_loss(logps, MASK, sft_coefficients(MASK)), -means(logps).mean())
    best = raft_coefficients(REWARDS, MASK, 3)
    agree(logits, unified_preference_loss(logps, MASK, best, normaliser=2.0), -means(logps)[[1, 3]].mean())
    assert torch.equal(raft_coefficients(REWARDS, MASK, 1), sft_coefficients(MASK).double())
    tied = raft_coefficients(torch.tensor([1.0, 1.0, 0.0, 2.0, 3.0, 3.0]), MASK, 3)
    assert tied.any(1).tolist() == [True, False, False, False, True, False]


def test_reduces_to_rloo_with_the_mean_of_the_others() -> None:
    """RLOO's gradient is of sums, so its coefficients carry the length."""
    logits, logps, _ = policy()
    baselines = torch.stack([(REWARDS.view(2, 3).sum(1)[i // 3] - REWARDS[i]) / 2 for i in range(6)])
    found = reinforce_coefficients(REWARDS, baselines, MASK) * LENGTHS[:, None]
    agree(logits, unified_preference_loss(logps, MASK, found), rloo_loss(summed(logps), REWARDS, 3).loss)


@pytest.mark.parametrize("clip", [0.2, math.inf])
def test_reduces_to_ppo_token_by_token(clip: float) -> None:
    """Ratios on both sides of the clip range, with advantages of both signs."""
    logits, logps, old = policy()
    advantages = ADVANTAGES[:, None] * torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0], dtype=torch.float64)
    found = ppo_coefficients(logps, old, advantages, MASK, clip=clip)
    moved = found[MASK] == 0
    assert moved.any() == (clip < 1)
    weighted = found * LENGTHS[:, None]
    native = ppo_clip_loss(logps, old, advantages, MASK, clip=clip)
    agree(logits, unified_preference_loss(logps, MASK, weighted, normaliser=float(LENGTHS.sum())), native.loss)


def test_ppo_on_its_own_samples_is_reinforce() -> None:
    _, logps, _ = policy()
    spread = ADVANTAGES[:, None].expand(BATCH, TIME)
    found = ppo_coefficients(logps, logps.detach(), spread, MASK)
    torch.testing.assert_close(found, reinforce_coefficients(REWARDS, torch.full_like(REWARDS, 0.7), MASK))


def test_grpo_on_its_own_samples() -> None:
    """Against the loss itself: ratio times advantage, minus the k3 estimate of the divergence, averaged by answer."""
    logits, logps, reference = policy()
    ratio = (logps - logps.detach()).exp()
    log_r = reference - logps
    native = -means(ratio * ADVANTAGES[:, None] - 0.3 * (log_r.exp() - log_r - 1)).mean()
    found = grpo_coefficients(logps, reference, ADVANTAGES, MASK, beta=0.3)
    agree(logits, unified_preference_loss(logps, MASK, found), native)


Coefficients = Callable[..., Tensor]


@pytest.mark.parametrize(("coefficients", "loss"), [(dpo_coefficients, dpo_loss), (ipo_coefficients, ipo_loss)])
def test_reduces_to_dpo_and_ipo(coefficients: Coefficients, loss: Callable[..., Tensor]) -> None:
    logits, logps, reference = policy()
    found = coefficients(summed(logps), summed(reference), MASK, beta=0.4)
    native = loss(*summed(logps).chunk(2), *summed(reference).chunk(2), beta=0.4).losses.mean()  # type: ignore[attr-defined]
    agree(logits, unified_preference_loss(logps, MASK, found, normaliser=3.0), native)
    weight = found[:, 0] / LENGTHS
    torch.testing.assert_close(weight[:3], -weight[3:])


def test_any_other_loss_by_automatic_differentiation() -> None:
    logits, logps, reference = policy()
    answers = summed(logps).detach().requires_grad_()
    loss = apo_zero_loss(*answers.chunk(2), *summed(reference).chunk(2)).losses.sum()
    found = sequence_coefficients(loss, answers, MASK)
    native = apo_zero_loss(*summed(logps).chunk(2), *summed(reference).chunk(2)).losses.sum()
    agree(logits, unified_preference_loss(logps, MASK, found, normaliser=1.0), native)
    assert (found[:3, 0] > 0).all()
    assert (found[3:, 0] < 0).all()
    loss.backward()  # the caller's own
    torch.testing.assert_close(found[:, 0], -answers.grad * LENGTHS)


def test_dpo_lets_go_of_pairs_that_it_has_won() -> None:
    far = torch.tensor([900, 0, -900, -900, 0, 900], dtype=torch.float64)
    weights = dpo_coefficients(far, torch.zeros_like(far), MASK, beta=0.1)[:3, 0] / LENGTHS[:3]
    assert weights.tolist() == pytest.approx([0, 0.05, 0.1], abs=1e-12)
    two = dpo_coefficients(far[[0, 1, 3, 4]], torch.zeros(4).double(), MASK[[0, 1, 3, 4]], beta=0.1)
    torch.testing.assert_close(two[:2, 0] / LENGTHS[:2], weights[:2])


def test_defaults_are_those_of_the_methods() -> None:
    coefficients = ppo_coefficients, grpo_coefficients, dpo_coefficients, ipo_coefficients
    found = [inspect.signature(made).parameters for made in coefficients]
    assert [list(given.values())[-1].default for given in found] == [0.2, 0.04, 0.1, 0.1]


def test_coefficients_are_0_outside_the_answers_and_have_no_gradient() -> None:
    _, logps, reference = policy()
    pairs = summed(logps), summed(reference), MASK
    for found in (
        sft_coefficients(MASK),
        raft_coefficients(REWARDS, MASK, 2),
        reinforce_coefficients(REWARDS, REWARDS * 0.1, MASK),
        ppo_coefficients(logps, reference, reference, MASK),
        grpo_coefficients(logps, reference, ADVANTAGES, MASK),
        dpo_coefficients(*pairs),
        ipo_coefficients(*pairs),
    ):
        assert found.shape == MASK.shape
        assert not found[~MASK].any()
        assert not found.requires_grad


def test_micro_batches_and_answers_without_tokens() -> None:
    _, logps, _ = policy()
    weights = torch.rand(BATCH, TIME, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    whole = unified_preference_loss(logps, MASK, weights)
    parts = sum(unified_preference_loss(logps[r], MASK[r], weights[r], normaliser=6.0) for r in (slice(4), slice(4, 6)))
    torch.testing.assert_close(parts, whole)
    whole.backward()
    assert weights.grad is None
    empty = MASK.clone()
    empty[0] = False
    found = unified_preference_loss(logps.detach().requires_grad_(), empty, weights)
    torch.testing.assert_close(found * 6, whole * 6 + (weights * logps)[0].mean())


def test_reward_models_recover_scores_up_to_a_shift() -> None:
    """All pairs weighted by the exact probabilities of their outcomes: the truth is the minimum, but for a shift."""
    truth = torch.tensor([0.0, 0.5, -1.0, 2.0], dtype=torch.float64)
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    chance = torch.sigmoid(truth[first] - truth[second])

    def loss(scores: Tensor) -> Tensor:
        return (chance * bradley_terry_loss(scores[first], scores[second])).sum()

    at = truth.clone().requires_grad_()
    assert torch.autograd.grad(loss(at), at)[0].abs().max() < 1e-12
    assert loss(truth + 5) == pytest.approx(loss(truth).item())
    for step in torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        assert loss(truth + step) > loss(truth)
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    one, other = truth[:2], truth[2:]
    torch.testing.assert_close(bradley_terry_loss(one + shift, other + shift), bradley_terry_loss(one, other))
    assert bradley_terry_loss(one, one).tolist() == pytest.approx([math.log(2)] * 2)
    assert bradley_terry_loss(one, one, margin=1.5).tolist() == pytest.approx([math.log1p(math.exp(1.5))] * 2)
    verdicts = torch.tensor([True, False, False, True])
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(truth, verdicts.double(), reduction="none")
    torch.testing.assert_close(pointwise_reward_loss(truth, verdicts), wanted)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    _, logps, reference = policy()
    sums = summed(logps), summed(reference)
    for call, match in (
        (lambda: unified_preference_loss(logps, MASK.long(), logps), "mask"),
        (lambda: unified_preference_loss(logps, MASK, logps[1:]), "coefficients"),
        (lambda: unified_preference_loss(logps, MASK, logps, normaliser=0.0), "normaliser"),
        (lambda: raft_coefficients(REWARDS, MASK, 4), "group_size"),
        (lambda: raft_coefficients(REWARDS, MASK[1:], 3), "mask"),
        (lambda: reinforce_coefficients(REWARDS, REWARDS[1:], MASK), "baselines"),
        (lambda: reinforce_coefficients(REWARDS, REWARDS, MASK.long()), "mask"),
        (lambda: reinforce_coefficients(REWARDS, REWARDS, MASK[:, 0]), "mask"),
        (lambda: ppo_coefficients(logps, reference, logps, MASK, clip=0.0), "clip"),
        (lambda: ppo_coefficients(logps, reference, logps, MASK[:, 1:]), "mask"),
        (lambda: grpo_coefficients(logps, reference, REWARDS, MASK, beta=-1.0), "beta"),
        (lambda: grpo_coefficients(logps, reference, REWARDS, MASK[:, 1:]), "mask"),
        (lambda: grpo_coefficients(logps, reference[1:], REWARDS, MASK), "ref_token_logps"),
        (lambda: dpo_coefficients(*sums, MASK, beta=0.0), "beta"),
        (lambda: ipo_coefficients(sums[0][1:], sums[1][1:], MASK[1:]), "group_size"),
        (lambda: ipo_coefficients(*sums, MASK[1:]), "mask"),
        (lambda: sequence_coefficients(logps.sum(), sums[0], MASK[1:]), "mask"),
        (lambda: bradley_terry_loss(REWARDS, REWARDS[1:]), "rejected_rewards"),
        (lambda: bradley_terry_loss(REWARDS, REWARDS, margin=math.nan), "margin"),
        (lambda: pointwise_reward_loss(REWARDS, MASK[:, 0].long()), "correct"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
