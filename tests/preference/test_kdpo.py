from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlreviews.preference import dpo_loss, kdpo_loss, teacher_forced_negatives

VOCAB = 11


def case(time: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of policy and reference, a new answer, and a mask with a position of prompt and one of padding."""
    generator = torch.Generator().manual_seed(6)
    policy, reference = torch.randn(2, 3, time, VOCAB, dtype=torch.float64, generator=generator)
    labels = torch.randint(VOCAB, (3, time), generator=generator)
    mask = torch.ones(3, time, dtype=torch.bool)
    if time > 1:
        mask[0, 0], mask[2, -1] = False, False
        labels = torch.where(mask, labels, -100)
        policy[1, 2, labels[1, 2]] = 9.0  # known already
    return policy.requires_grad_(), reference, labels, mask


def test_equation_2_token_by_token() -> None:
    policy, reference, labels, mask = case()
    found = kdpo_loss(policy, reference, labels, mask, beta=0.4)
    for row in range(3):
        total = {"chosen": 0.0, "rejected": 0.0}
        for t in range(5):
            if mask[row, t]:
                p, q = policy[row, t].detach().softmax(0), reference[row, t].softmax(0)
                good, bad = int(labels[row, t]), int(p.argmax())
                if good != bad:
                    total["chosen"] += math.log(p[good] / q[good])
                    total["rejected"] += math.log(p[bad] / q[bad])
        margin = 0.4 * (total["chosen"] - total["rejected"])
        assert found.losses[row].item() == pytest.approx(math.log1p(math.exp(-margin)))
        assert found.chosen_rewards[row].item() == pytest.approx(0.4 * total["chosen"])
        assert found.rejected_rewards[row].item() == pytest.approx(0.4 * total["rejected"])


def test_tokens_that_are_right_already_are_left_alone() -> None:
    """No gradient where the favourite is the label, nor at prompt and padding; gradient everywhere else."""
    policy, reference, labels, mask = case()
    found = kdpo_loss(policy, reference, labels, mask).losses
    gradient = torch.autograd.grad(found.sum(), policy)[0].abs().sum(-1)
    wrong = mask & (teacher_forced_negatives(policy) != labels)
    assert not wrong[1, 2]
    assert torch.equal(gradient > 0, wrong)


def test_an_edit_that_is_made_is_log_2_without_gradient() -> None:
    policy, reference, labels, mask = case()
    made = policy.detach().scatter(-1, labels.clamp(min=0)[..., None], 20.0).requires_grad_()
    found = kdpo_loss(made, reference, labels, mask).losses
    assert found.tolist() == pytest.approx([math.log(2)] * 3, abs=0)
    assert not torch.autograd.grad(found.sum(), made)[0].any()


def test_reduces_to_dpo_for_answers_of_one_token() -> None:
    policy, reference, labels, mask = case(time=1)
    p, q = policy[:, 0].log_softmax(-1), reference[:, 0].log_softmax(-1)
    rows, good, bad = torch.arange(3), labels[:, 0], policy[:, 0].argmax(-1)
    wanted = dpo_loss(p[rows, good], p[rows, bad], q[rows, good], q[rows, bad], beta=0.2)
    for one, other in zip(kdpo_loss(policy, reference, labels, mask, beta=0.2), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_negatives_can_be_kept() -> None:
    policy, reference, labels, mask = case()
    kept = teacher_forced_negatives(policy)
    torch.testing.assert_close(
        kdpo_loss(policy, reference, labels, mask, negatives=kept), kdpo_loss(policy, reference, labels, mask)
    )
    other = kdpo_loss(policy, reference, labels, mask, negatives=(kept + 1) % VOCAB)
    assert (other.losses != kdpo_loss(policy, reference, labels, mask).losses).all()
    slope = torch.autograd.grad(kdpo_loss(policy, reference.requires_grad_(), labels, mask).losses.sum(), policy)
    assert slope[0].isfinite().all()


def test_the_reference_has_no_gradient_and_beta_is_a_tenth_unless_given() -> None:
    policy, reference, labels, mask = case()
    given = kdpo_loss(policy, reference, labels, mask, beta=0.1)
    assert torch.equal(kdpo_loss(policy, reference, labels, mask).losses, given.losses)
    reference.requires_grad_()
    kdpo_loss(policy, reference, labels, mask).losses.sum().backward()
    assert reference.grad is None


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    policy, reference, labels, mask = case()
    with pytest.raises(ValueError, match="mask"):
        kdpo_loss(policy, reference, labels, mask.long())
    with pytest.raises(ValueError, match="ref_logits"):
        kdpo_loss(policy, reference[:1], labels, mask)
    with pytest.raises(ValueError, match="beta"):
        kdpo_loss(policy, reference, labels, mask, beta=0.0)
    with pytest.raises(ValueError, match="labels"):
        kdpo_loss(policy, reference, labels + VOCAB, mask)
