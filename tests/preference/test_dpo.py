from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from mlreviews.preference import (
    aot_loss,
    bco_pair_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    mismatched,
    nca_pair_loss,
    normalised_dpo_loss,
    orpo_loss,
    robust_dpo_loss,
    sequence_logps,
    simpo_loss,
    smoothed_dpo_loss,
    sppo_hard_loss,
)

BETA = 0.3


def logps(batch: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities under policy and reference: chosen and rejected of each."""
    draws = torch.randn(4, batch, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = -12 + 5 * draws
    return policy_chosen, policy_rejected, ref_chosen, ref_rejected


def at(u: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pair whose reward margin is u at BETA, with nothing zero."""
    return tuple(torch.tensor([value], dtype=torch.float64) for value in (u / BETA - 6.5, -4.0, -7.5, -5.0))  # type: ignore[return-value]


def margin(inputs: tuple[Tensor, ...]) -> Tensor:
    return (BETA * torch.stack(inputs).T @ torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)).squeeze()


def minimiser(loss: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Where a convex function of a number is smallest, by golden ratio."""
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(50):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(torch.tensor(left)) < loss(torch.tensor(right)):
            high = right
        else:
            low = left
    return (low + high) / 2


def test_reduces_to_logistic_regression() -> None:
    inputs = tuple(t.requires_grad_() for t in logps())
    found = dpo_loss(*inputs, beta=BETA)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(
        margin(inputs), torch.ones(6, dtype=torch.float64), reduction="none"
    )
    torch.testing.assert_close(found.losses, wanted)
    gradient = torch.autograd.grad(found.losses.mean(), inputs[0])[0]
    torch.testing.assert_close(gradient, -BETA * torch.sigmoid(-margin(inputs)) / 6)
    torch.testing.assert_close(found.chosen_rewards, BETA * (inputs[0] - inputs[2]).detach())
    torch.testing.assert_close(found.rejected_rewards, BETA * (inputs[1] - inputs[3]).detach())
    assert not any(rewards.requires_grad for rewards in found[1:])


def test_dpo_at_the_reference_is_log_2() -> None:
    _, _, chosen, rejected = logps()
    found = dpo_loss(chosen, rejected, chosen, rejected)
    torch.testing.assert_close(found.losses, torch.full((6,), math.log(2), dtype=torch.float64))
    assert not (found.chosen_rewards - found.rejected_rewards).any()


def test_smoothed_labels_aim_at_their_odds() -> None:
    """The best margin is the log odds of a right label; at odds of one the loss is symmetric and flat at 0."""
    best = minimiser(lambda u: smoothed_dpo_loss(*at(float(u)), beta=BETA, label_smoothing=0.2).losses, -9, 9)
    assert best == pytest.approx(math.log(0.8 / 0.2), abs=1e-6)
    one, other = (smoothed_dpo_loss(*at(u), beta=BETA, label_smoothing=0.5).losses for u in (1.7, -1.7))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        smoothed_dpo_loss(*logps(), label_smoothing=0.0).losses, dpo_loss(*logps()).losses, rtol=0, atol=0
    )


def test_robust_loss_is_unbiased_over_flipped_labels() -> None:
    pc, pr, rc, rr = logps()
    right = robust_dpo_loss(pc, pr, rc, rr, beta=BETA, label_smoothing=0.3).losses
    flipped = robust_dpo_loss(pr, pc, rr, rc, beta=BETA, label_smoothing=0.3).losses
    torch.testing.assert_close(0.7 * right + 0.3 * flipped, dpo_loss(pc, pr, rc, rr, beta=BETA).losses)


def test_ipo_stops_at_its_margin() -> None:
    """The best log ratio margin is 1 / (2 beta): u = 1/2. With labels right at a rate p it is (2p - 1) / (2 beta)."""

    def mixed(u: Tensor) -> Tensor:
        pc, pr, rc, rr = at(float(u))
        return 0.8 * ipo_loss(pc, pr, rc, rr, beta=BETA).losses + 0.2 * ipo_loss(pr, pc, rr, rc, beta=BETA).losses

    assert minimiser(lambda u: ipo_loss(*at(float(u)), beta=BETA).losses, -9, 9) == pytest.approx(0.5, abs=1e-6)
    assert ipo_loss(*at(0.5), beta=BETA).losses.item() == pytest.approx(0, abs=1e-12)
    assert ipo_loss(*at(0.0), beta=BETA).losses.item() == pytest.approx((0.5 / BETA) ** 2)
    assert minimiser(mixed, -9, 9) == pytest.approx(0.6 / 2, abs=1e-6)


def test_every_token_twice_doubles_sums_and_leaves_averages() -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([[3, 1, 4], [2, 4, 4]])
    mask = torch.arange(4) < lengths[..., None]  # [chosen or rejected, pair, time]
    logits = torch.randn(2, 2, 3, 4, 7, generator=generator, dtype=torch.float64)  # policy or reference first
    labels = torch.randint(7, (2, 3, 4), generator=generator)

    def both(repeats: int) -> list[Tensor]:
        return [
            sequence_logps(*(t.repeat_interleave(repeats, 1) for t in (logits[m, w], labels[w], mask[w])))
            for m in (0, 1)
            for w in (0, 1)
        ]

    once, twice = both(1), both(2)
    double = {"chosen_lengths": 2 * lengths[0], "rejected_lengths": 2 * lengths[1]}
    single = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    torch.testing.assert_close(
        torch.special.logit((-dpo_loss(*twice).losses).exp()), 2 * torch.special.logit((-dpo_loss(*once).losses).exp())
    )
    torch.testing.assert_close(ipo_loss(*twice, **double).losses, ipo_loss(*once, **single).losses)
    torch.testing.assert_close(
        normalised_dpo_loss(*twice, **double).losses, normalised_dpo_loss(*once, **single).losses
    )
    assert not torch.allclose(ipo_loss(*twice).losses, ipo_loss(*once).losses)
    averaged = [sequence_logps(logits[m, w], labels[w], mask[w], average=True) for m in (0, 1) for w in (0, 1)]
    torch.testing.assert_close(ipo_loss(*averaged).losses, ipo_loss(*once, **single).losses)
    torch.testing.assert_close(dpo_loss(*averaged).losses, normalised_dpo_loss(*once, **single).losses)


@pytest.mark.parametrize("loss", [ipo_loss, normalised_dpo_loss])
def test_answers_without_tokens_have_finite_averages(loss: Callable[..., object]) -> None:
    inputs = [torch.zeros(3, requires_grad=True) for _ in range(4)]
    empty = torch.zeros(3, dtype=torch.long)
    found = loss(*inputs, chosen_lengths=empty, rejected_lengths=empty).losses  # type: ignore[attr-defined]
    assert torch.autograd.grad(found.sum(), inputs[0])[0].isfinite().all()


def test_hinge_is_satisfied_from_a_margin_of_1_on() -> None:
    for u, loss, slope in ((0.9, 0.1, -BETA), (1.1, 0.0, 0.0), (-2.0, 3.0, -BETA)):
        inputs = at(u)
        found = hinge_loss(inputs[0].requires_grad_(), *inputs[1:], beta=BETA).losses
        assert found.item() == pytest.approx(loss)
        assert torch.autograd.grad(found, inputs[0])[0].item() == pytest.approx(slope)


def test_exo_is_a_kl_divergence_from_the_smoothed_label() -> None:
    policy = Bernoulli(logits=margin(logps()))
    wanted = kl_divergence(policy, Bernoulli(torch.full((6,), 0.95, dtype=torch.float64)))
    torch.testing.assert_close(exo_pair_loss(*logps(), beta=BETA, label_smoothing=0.05).losses, wanted)


def test_discopop_is_logistic_on_one_side_and_exponential_on_the_other() -> None:
    for u, wanted in ((-2.0, math.log1p(math.exp(2))), (0.0, (math.log(2) + 1) / 2), (2.0, math.exp(-2))):
        assert discopop_loss(*at(u), beta=BETA).losses.item() == pytest.approx(wanted)
    halfway = 0.25 * math.log1p(math.exp(-0.3)) + 0.75 * math.exp(-0.3)  # sigmoid(0.3 / tau) = 3/4
    found = discopop_loss(*at(0.3), beta=BETA, tau=0.3 / math.log(3)).losses
    assert found.item() == pytest.approx(halfway)


def test_losses_of_single_rewards_have_their_minima_where_theory_puts_them() -> None:
    """NCA: sigmoid(r_w) = 2/3. SPPO: log ratios of +-1 / (2 beta). BCO: none, and above DPO everywhere."""

    def paired(chosen_reward: float, rejected_reward: float) -> tuple[Tensor, ...]:
        rewards = torch.tensor([[chosen_reward, rejected_reward, 0, 0]], dtype=torch.float64) / BETA
        return tuple((rewards + torch.tensor([-4.0, -7.0, -4.0, -7.0])).T)

    best = minimiser(lambda r: nca_pair_loss(*paired(float(r), -1.3), beta=BETA).losses, -9, 9)
    assert best == pytest.approx(math.log(2), abs=1e-6)
    for chosen, rejected, wanted in ((0.5, -0.5, 0.0), (0.5, 0.2, (0.7 / BETA) ** 2), (-0.1, -0.5, (0.6 / BETA) ** 2)):
        assert sppo_hard_loss(*paired(chosen, rejected), beta=BETA).losses.item() == pytest.approx(wanted, abs=1e-12)
    far = [nca_pair_loss(*paired(math.log(2), r), beta=BETA).losses.item() for r in (-40.0, 40.0)]
    assert far[1] - far[0] == pytest.approx(20)
    likelihood = Bernoulli(logits=torch.tensor([1.5, -0.7])).log_prob(torch.tensor([1.0, 0.0])).sum()
    assert bco_pair_loss(*paired(1.5, -0.7), beta=BETA).losses.item() == pytest.approx(-likelihood.item())
    assert (bco_pair_loss(*logps()).losses >= dpo_loss(*logps()).losses).all()


def test_aot_is_the_cheapest_of_all_pairings_of_margins() -> None:
    pc, pr, rc, rr = logps(5)
    found = aot_loss(pc, pr, rc, rr, beta=BETA)
    costs = [-torch.nn.functional.logsigmoid(BETA * ((pc - pr) - (rc - rr)[list(p)])) for p in permutations(range(5))]
    best = min(costs, key=lambda c: c.sum().item())
    torch.testing.assert_close(found.losses, best)
    smoothed = aot_loss(pc, pr, rc, rr, beta=BETA, label_smoothing=0.5).losses
    wanted = (best - torch.nn.functional.logsigmoid(torch.special.logit((-best).exp()).neg())) / 2
    torch.testing.assert_close(smoothed, wanted)


def test_losses_without_a_reference_are_dpo_with_a_uniform_one() -> None:
    chosen, rejected, *_ = logps()
    uniform = torch.full_like(chosen, -3.0)
    wanted = dpo_loss(chosen, rejected, uniform, uniform, beta=BETA).losses
    torch.testing.assert_close(simpo_loss(chosen, rejected, beta=BETA, gamma=0.0).losses, wanted)
    torch.testing.assert_close(cpo_loss(chosen, rejected, beta=BETA).losses, wanted - chosen)
    nll = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(cpo_loss(chosen, rejected, beta=BETA, chosen_nll=nll).losses, wanted + nll)
    # at equal likelihoods SimPO still asks for its margin
    assert simpo_loss(chosen, chosen, gamma=1.5).losses[0].item() == pytest.approx(math.log1p(math.exp(1.5)))
    torch.testing.assert_close(simpo_loss(chosen, rejected, beta=BETA).chosen_rewards, BETA * chosen)


def test_orpo_compares_odds() -> None:
    p, q = torch.tensor([0.9, 0.2, 0.5]).double(), torch.tensor([0.3, 0.6, 0.5]).double()
    odds = [x / (1 - x) for x in (p, q)]
    wanted = -p.log() - BETA * (odds[0] / (odds[0] + odds[1])).log()
    torch.testing.assert_close(orpo_loss(p.log(), q.log(), beta=BETA).losses, wanted)
    certain = torch.zeros(1, requires_grad=True)
    found = orpo_loss(certain, torch.tensor([-1.0])).losses
    assert found.isfinite()
    assert torch.autograd.grad(found, certain)[0].isfinite()


@pytest.mark.parametrize("batch", range(2, 10))
def test_mismatched_pairs_have_no_fixed_point(batch: int) -> None:
    order = mismatched(batch)
    assert sorted(order.tolist()) == list(range(batch))
    assert not (order == torch.arange(batch)).any()


def test_kto_weighs_gains_and_losses_against_the_reference_point() -> None:
    policy, _, reference, _ = (t.requires_grad_() for t in logps())
    desirable = torch.tensor([True, False, True, False, False, True])
    point = kto_reference_point(policy.detach() + 9, reference.detach())
    assert point.item() == pytest.approx(9 + (policy - reference).mean().item())
    assert kto_reference_point(policy - 99, reference).item() == 0
    assert not kto_reference_point(policy, reference).requires_grad
    found = kto_loss(policy, reference, desirable, point, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)
    value = Bernoulli(logits=BETA * (policy - reference - point)).probs
    torch.testing.assert_close(found.losses, torch.where(desirable, 1.5 * (1 - value), 0.5 * value))
    torch.testing.assert_close(found.rewards, (BETA * (policy - reference)).detach())
    slopes = torch.autograd.grad(found.losses.sum(), policy)[0]
    assert ((slopes < 0) == desirable).all()
    assert not found.rewards.requires_grad


def test_defaults_are_those_of_the_card() -> None:
    smoothed = {"label_smoothing": 0.2}
    lengths = {f"{which}_lengths": torch.arange(1, 7) for which in ("chosen", "rejected")}
    for loss, given, default in (
        *((loss, {}, {}) for loss in (dpo_loss, ipo_loss, hinge_loss, nca_pair_loss, bco_pair_loss, sppo_hard_loss)),
        *((loss, smoothed, {}) for loss in (smoothed_dpo_loss, robust_dpo_loss)),
        (normalised_dpo_loss, lengths, {}),
        (exo_pair_loss, {}, {"label_smoothing": 1e-3}),
        (discopop_loss, {}, {"tau": 0.05}),
        (aot_loss, {}, {"label_smoothing": 0.0}),
    ):
        found, wanted = loss(*logps(), **given), loss(*logps(), **given, beta=0.1, **default)
        assert torch.equal(torch.stack(found), torch.stack(wanted)), loss
    pair = logps()[:2]
    for loss, default in (
        (simpo_loss, {"beta": 2.0, "gamma": 1.0}),
        (cpo_loss, {"beta": 0.1}),
        (orpo_loss, {"beta": 0.1}),
    ):
        assert torch.equal(loss(*pair).losses, loss(*pair, **default).losses), loss
    kto = (*pair, torch.tensor([True, False] * 3), torch.tensor(0.5, dtype=torch.float64))
    wanted = kto_loss(*kto, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    assert torch.equal(kto_loss(*kto).losses, wanted.losses)


def test_every_loss_is_another() -> None:
    paired = [dpo_loss, ipo_loss, hinge_loss, exo_pair_loss, discopop_loss, nca_pair_loss, bco_pair_loss]
    found = [loss(*logps()).losses for loss in [*paired, sppo_hard_loss, aot_loss]]
    found += [loss(*logps(), label_smoothing=0.1).losses for loss in (smoothed_dpo_loss, robust_dpo_loss)]
    found += [loss(*logps()[:2]).losses for loss in (simpo_loss, cpo_loss, orpo_loss)]
    assert torch.cdist(torch.stack(found), torch.stack(found)).fill_diagonal_(1).min() > 1e-3


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    pc, pr, rc, rr = logps()
    with pytest.raises(ValueError, match="policy_rejected_logps: expected shape"):
        dpo_loss(pc, pr[:1], rc, rr)
    with pytest.raises(ValueError, match=r"ref_chosen_logps: .*NaN"):
        dpo_loss(pc, pr, rc * torch.nan, rr)
    with pytest.raises(ValueError, match=r"policy_chosen_logps: expected \[batch\]"):
        dpo_loss(pc[:0], pr[:0], rc[:0], rr[:0])
    with pytest.raises(TypeError, match=r"ref_rejected_logps: .*floating"):
        dpo_loss(pc, pr, rc, rr.long())
    with pytest.raises(ValueError, match="beta"):
        hinge_loss(pc, pr, rc, rr, beta=0.0)
    with pytest.raises(ValueError, match="beta"):
        simpo_loss(pc, pr, beta=-1.0)
    with pytest.raises(ValueError, match="gamma"):
        simpo_loss(pc, pr, gamma=math.inf)
    for loss, wrong in ((smoothed_dpo_loss, 0.6), (smoothed_dpo_loss, -0.1), (robust_dpo_loss, 0.5), (aot_loss, 0.7)):
        with pytest.raises(ValueError, match="label_smoothing"):
            loss(pc, pr, rc, rr, label_smoothing=wrong)
    for wrong in (0.0, 0.5):
        with pytest.raises(ValueError, match="label_smoothing"):
            exo_pair_loss(pc, pr, rc, rr, label_smoothing=wrong)
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="tau"):
            discopop_loss(pc, pr, rc, rr, tau=wrong)
    discopop_loss(pc, pr, rc, rr, tau=1.0)
    with pytest.raises(ValueError, match="both or neither"):
        ipo_loss(pc, pr, rc, rr, chosen_lengths=torch.ones(6, dtype=torch.long))
    with pytest.raises(ValueError, match="rejected_lengths"):
        normalised_dpo_loss(
            pc, pr, rc, rr, chosen_lengths=torch.zeros(6).long(), rejected_lengths=-torch.ones(6).long()
        )
    with pytest.raises(ValueError, match=r"policy_rejected_logps: .*at most 0"):
        orpo_loss(pc.clamp(max=0), pr + 99)
    with pytest.raises(ValueError, match="chosen_nll"):
        cpo_loss(pc, pr, chosen_nll=pc[1:])
    with pytest.raises(ValueError, match="batch: expected at least 2"):
        mismatched(1)
    good, point = torch.ones(6, dtype=torch.bool), torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"desirable: .*of bool"):
        kto_loss(pc, rc, good.long(), point)
    with pytest.raises(ValueError, match="reference_point"):
        kto_loss(pc, rc, good, pc)
    with pytest.raises(ValueError, match="undesirable_weight"):
        kto_loss(pc, rc, good, point, undesirable_weight=-1.0)
    with pytest.raises(ValueError, match=r"^desirable_weight"):
        kto_loss(pc, rc, good, point, desirable_weight=-1.0)
    with pytest.raises(ValueError, match="beta"):
        kto_loss(pc, rc, good, point, beta=0.0)
    with pytest.raises(ValueError, match="ref_mismatched_logps"):
        kto_reference_point(pc, rc[1:])
