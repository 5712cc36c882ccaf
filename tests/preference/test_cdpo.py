from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mlreviews.preference import contrastive_token_scores, critical_dpo_loss, dpo_loss, find_critical_token

GAMMA = 0.3


def models() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    positive, negative = 2 * torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=generator)
    return positive, negative, torch.randint(5, (2, 3), generator=generator)


def answers() -> dict[str, Tensor]:
    """Chosen answers of up to 3 tokens, rejected ones of up to 4; NaN-free junk under the masks."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for which, time in (("chosen", 3), ("rejected", 4)):
        for model in ("policy", "ref"):
            found[f"{model}_{which}_token_logps"] = -3 * torch.rand(2, time, dtype=torch.float64, generator=generator)
    found["chosen_mask"] = torch.tensor([[True, True, True], [False, True, True]])
    found["rejected_mask"] = torch.tensor([[True, True, True, True], [True, True, False, False]])
    found["rejected_scores"] = torch.rand(2, 4, dtype=torch.float64, generator=generator)
    return found


def test_scores_are_a_tempered_ratio_of_the_two_models() -> None:
    positive, negative, labels = models()
    p, q = positive.softmax(-1), negative.softmax(-1)
    weights = p**2.5 / q**1.5
    wanted = (weights / weights.sum(-1, keepdim=True)).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(contrastive_token_scores(positive, negative, labels, beta=1.5), wanted)
    # shifts of a position's logits are none of the model's business
    shifted = negative + torch.tensor([[3.0, -2.0, 0.5]], dtype=torch.float64)[..., None]
    torch.testing.assert_close(contrastive_token_scores(positive, shifted, labels, beta=1.5), wanted)
    own = p.gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(contrastive_token_scores(positive, positive, labels), own)
    torch.testing.assert_close(contrastive_token_scores(positive, negative, labels, beta=0.0), own)
    weights = p**2 / q
    wanted = (weights / weights.sum(-1, keepdim=True)).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(contrastive_token_scores(positive, negative, labels), wanted)


def test_equation_2_token_by_token() -> None:
    given = answers()
    weights = torch.tensor([[0.5, 1.0, 2.0], [9.0, 1.5, 0.0]], dtype=torch.float64)
    found = critical_dpo_loss(**given, gamma=GAMMA, chosen_weights=weights)
    for row in range(2):
        phi = {}
        for which in ("chosen", "rejected"):
            logs = given[f"policy_{which}_token_logps"][row] - given[f"ref_{which}_token_logps"][row]
            factor = weights[row] if which == "chosen" else 1 - given["rejected_scores"][row]
            phi[which] = sum(
                float(f * x) for f, x, m in zip(factor, logs, given[f"{which}_mask"][row], strict=True) if m
            )
        wanted = math.log1p(math.exp(-GAMMA * (phi["chosen"] - phi["rejected"])))
        assert found.losses[row].item() == pytest.approx(wanted)
        assert found.chosen_rewards[row].item() == pytest.approx(GAMMA * phi["chosen"])
        assert found.rejected_rewards[row].item() == pytest.approx(GAMMA * phi["rejected"])


def test_reduces_to_dpo_when_all_scores_are_0() -> None:
    given = answers() | {"rejected_scores": torch.zeros(2, 4, dtype=torch.float64)}
    sums = [
        (given[f"{m}_{w}_token_logps"] * given[f"{w}_mask"]).sum(1)
        for m in ("policy", "ref")
        for w in ("chosen", "rejected")
    ]
    for one, other in zip(critical_dpo_loss(**given, gamma=GAMMA), dpo_loss(*sums, beta=GAMMA), strict=True):
        torch.testing.assert_close(one, other)


def test_gradient_goes_to_the_tokens_to_blame() -> None:
    given = answers()
    given["rejected_scores"][0, 1] = 1.0
    rejected = given["policy_rejected_token_logps"].requires_grad_()
    given["policy_chosen_token_logps"].requires_grad_()
    found = critical_dpo_loss(**given)
    gradient = torch.autograd.grad(found.losses.sum(), rejected)[0]
    assert not gradient[~given["rejected_mask"]].any()
    assert gradient[0, 1] == 0
    for row, mask in enumerate(given["rejected_mask"]):
        blame = (1 - given["rejected_scores"][row])[mask]
        torch.testing.assert_close(gradient[row][mask] / gradient[row, 0], blame / blame[0])
    assert (gradient >= 0).all()
    assert not found.chosen_rewards.requires_grad
    assert not found.rejected_rewards.requires_grad


def test_a_policy_that_is_the_reference_has_loss_log_2_and_padding_is_nothing() -> None:
    given = answers()
    for which in ("chosen", "rejected"):
        given[f"policy_{which}_token_logps"] = given[f"ref_{which}_token_logps"].clone()
        given[f"policy_{which}_token_logps"][~given[f"{which}_mask"]] -= 50
    assert critical_dpo_loss(**given).losses.tolist() == pytest.approx([math.log(2)] * 2)


def test_the_planted_token_is_found() -> None:
    """Success is certain before token 3 and impossible from it on; no more prefixes are tried than needed."""
    asked: list[int] = []

    def rollout(prefix: Sequence[str], samples: int) -> int:
        asked.append(len(prefix))
        return 0 if "x" in prefix else samples

    assert find_critical_token("abcxdef", rollout) == 3
    assert asked == [7, 6, 5, 4, 3]
    assert find_critical_token("abc", rollout) is None
    assert find_critical_token("xyz", rollout) == 0
    assert find_critical_token("", rollout) is None


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ([64, 20, 0, 3, 0], 2),  # 3 of 64 is less than 5 %
        ([64, 20, 0, 4, 0], 4),  # 4 of 64 is not
        ([64, 0, 10, 3, 1], None),  # dead ends, but no token after which nothing succeeds
        ([64, 20, 2, 0, 1], 3),
    ],
)
def test_later_tokens_may_succeed_by_chance(counts: list[int], wanted: int | None) -> None:
    assert find_critical_token(range(5), lambda prefix, samples: counts[len(prefix) - 1]) == wanted


def test_the_tolerance_is_a_share_of_the_samples() -> None:
    counts = [10, 0, 2, 0]
    assert (
        find_critical_token(range(4), lambda prefix, samples: counts[len(prefix) - 1], samples=10, tolerance=0.3) == 1
    )
    assert (
        find_critical_token(range(4), lambda prefix, samples: counts[len(prefix) - 1], samples=10, tolerance=0.2) == 3
    )


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    positive, negative, labels = models()
    with pytest.raises(ValueError, match="negative_logits"):
        contrastive_token_scores(positive, negative[:1], labels)
    with pytest.raises(ValueError, match="beta"):
        contrastive_token_scores(positive, negative, labels, beta=-1.0)
    given = answers()
    for name in given:
        for wrong in (given[name][:1], given[name][:, 1:]):
            with pytest.raises(ValueError, match=r"chosen|rejected"):
                critical_dpo_loss(**(given | {name: wrong}))
    halves = {name: tensor[:1] for name, tensor in given.items() if "rejected" in name}
    with pytest.raises(ValueError, match="rejected_mask: expected 2 answers"):
        critical_dpo_loss(**(given | halves))
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="rejected_scores"):
            critical_dpo_loss(**(given | {"rejected_scores": given["rejected_scores"].clone().fill_(wrong)}))
    with pytest.raises(ValueError, match=r"rejected_mask: .*of bool"):
        critical_dpo_loss(**(given | {"rejected_mask": given["rejected_mask"].long()}))
    with pytest.raises(ValueError, match="gamma"):
        critical_dpo_loss(**given, gamma=0.0)
    with pytest.raises(ValueError, match="chosen_weights"):
        critical_dpo_loss(**given, chosen_weights=torch.ones(2, 4))
    with pytest.raises(ValueError, match="samples"):
        find_critical_token("ab", lambda prefix, samples: 0, samples=0)
    with pytest.raises(ValueError, match="tolerance"):
        find_critical_token("ab", lambda prefix, samples: 0, tolerance=1.5)
