"""AdaptiveDecoder: laws at chosen temperatures, the three losses against DPO's, and a bandit that has to be learnt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mlreviews.decoding.adaptivedecoder import (
    TEMPERATURES,
    AdaptiveDecoder,
    AdaptiveTemperatureLM,
    best_and_worst,
    lpo_joint_loss,
    lpo_marginal_loss,
    lpo_temperature_loss,
    mixture_log_probs,
    tempered_log_probs,
)
from mlreviews.models import CausalLM, Sampler, TinyLM, TinyLMConfig, draw, generate
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CONTRACT = {
    "AdaptiveDecoder": lambda: Sample(AdaptiveDecoder(6, generator=_rng()), (torch.randn(3, 5, 6, generator=_rng(1)),))
}


def _model() -> TinyLM:
    config = TinyLMConfig(vocab_size=11, d_model=12, layers=2, heads=2, hidden=16)
    return TinyLM(config, generator=_rng()).double().eval()


def _pairs(count: int = 4) -> list[Tensor]:
    return list(-3 * torch.rand(6, count, generator=_rng(), dtype=torch.float64))


def test_each_distribution_has_its_own_temperature() -> None:
    logits = torch.randn(3, 7, generator=_rng(), dtype=torch.float64)
    found = tempered_log_probs(logits, torch.tensor([0.0, 0.5, 2.0]).double()).exp()
    expected = [Sampler(temperature=t).probabilities(row) for t, row in zip((0.0, 0.5, 2.0), logits, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_temperature_of_0_takes_one_of_several_most_likely_tokens_and_has_no_nan_gradient() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    log_p = tempered_log_probs(logits, torch.tensor([0.0]))
    assert log_p.tolist() == [[0.0, -math.inf, -math.inf]]
    log_p[0, 0].backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_mixture_is_the_law_of_a_drawn_temperature() -> None:
    logits = torch.randn(2, 3, 5, generator=_rng(), dtype=torch.float64)
    choice = torch.randn(2, 3, 6, generator=_rng(1), dtype=torch.float64).log_softmax(-1)
    temperatures = torch.tensor(TEMPERATURES).double()
    p = mixture_log_probs(logits, choice, temperatures).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3).double())
    expected = sum(
        choice[..., k, None].exp() * Sampler(temperature=t).probabilities(logits) for k, t in enumerate(TEMPERATURES)
    )
    torch.testing.assert_close(p, expected)
    certain = torch.full((2, 3, 6), -math.inf).double()
    certain[..., 2] = 0.0
    torch.testing.assert_close(
        mixture_log_probs(logits, certain, temperatures), (logits / TEMPERATURES[2]).log_softmax(-1)
    )


def test_reduces_to_dpo() -> None:
    from mlreviews.preference import dpo_loss

    tau_c, _, chosen, rejected, ref_chosen, ref_rejected = _pairs()
    expected = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3).losses
    torch.testing.assert_close(lpo_marginal_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3), expected)
    same = lpo_joint_loss(tau_c, tau_c, chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    torch.testing.assert_close(same, expected)
    # temperature 1 alone is certain, and its mixture the model's own law
    logits = torch.randn(4, 5, generator=_rng(), dtype=torch.float64)
    alone = AdaptiveDecoder(3, (1.0,), generator=_rng()).double()
    choice = alone(torch.randn(4, 3, generator=_rng(2), dtype=torch.float64))
    torch.testing.assert_close(mixture_log_probs(logits, choice, alone.temperatures), logits.log_softmax(-1))


def test_the_joint_loss_counts_temperatures_as_tokens() -> None:
    tau_c, tau_r, chosen, rejected, ref_chosen, ref_rejected = _pairs()
    joint = lpo_joint_loss(tau_c, tau_r, chosen, rejected, ref_chosen, ref_rejected, beta=0.4)
    # one more token, on which the reference has no opinion
    torch.testing.assert_close(
        joint, lpo_marginal_loss(chosen + tau_c, rejected + tau_r, ref_chosen, ref_rejected, beta=0.4)
    )
    torch.testing.assert_close(
        lpo_joint_loss(tau_c, tau_r, chosen, rejected, chosen, rejected, beta=0.4),
        lpo_temperature_loss(tau_c, tau_r, beta=0.4),
    )
    closed = torch.log1p(torch.exp(-0.4 * (tau_c - tau_r)))
    torch.testing.assert_close(lpo_temperature_loss(tau_c, tau_r, beta=0.4), closed)
    assert float(lpo_temperature_loss(tau_c, tau_c)[0]) == pytest.approx(math.log(2))
    closed = torch.log1p(torch.exp(-0.1 * (tau_c - tau_r)))  # beta is 0.1 unless it is given
    for found in (
        lpo_temperature_loss(tau_c, tau_r),
        lpo_marginal_loss(tau_c, tau_r, chosen, chosen),
        lpo_joint_loss(tau_c, tau_r, chosen, chosen, rejected, rejected),
    ):
        torch.testing.assert_close(found, closed)


def test_pairs_are_the_best_and_the_worst_of_prompts_whose_answers_differ() -> None:
    scores = torch.tensor([[0.0, 2.0, -1.0], [1.0, 1.0, 1.0], [5.0, 4.0, 9.0]])
    prompt, chosen, rejected = best_and_worst(scores)
    assert (prompt.tolist(), chosen.tolist(), rejected.tolist()) == ([0, 2], [1, 2], [2, 1])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_is_a_model_at_the_chosen_temperatures(level: str) -> None:
    model = _model()
    decoder = AdaptiveDecoder(12, (0.0, 0.5, 1.0, 2.0), generator=_rng(3)).double()
    with torch.no_grad():
        decoder.layers[2].weight.mul_(20)
    adaptive = AdaptiveTemperatureLM(model, decoder, level)  # type: ignore[arg-type]
    assert isinstance(adaptive, CausalLM)
    ids = torch.randint(11, (3, 8), generator=_rng(1))
    plain = model(ids, hidden_states=True)
    assert plain.hidden_states is not None
    best = decoder(plain.hidden_states[-1]).argmax(-1)
    assert len(best.unique()) > 1
    wanted = torch.tensor([0.0, 0.5, 1.0, 2.0]).double()[best]
    if level == "token":
        out = adaptive(ids, hidden_states=True)
        assert out.hidden_states is not None
    else:
        out = adaptive(ids[:, :5])
        assert torch.equal(out.cache.temperature, wanted[:, 4])
        wanted = wanted[:, 4:5].expand(-1, 8)
        out = adaptive(ids[:, 5:], out.cache)
        assert out.hidden_states is None
    expected = tempered_log_probs(plain.logits, wanted)
    torch.testing.assert_close(out.logits, expected[:, -out.logits.shape[1] :])
    turned = out.cache.rows(torch.tensor([2, 0])).crop(6)
    assert turned.length == 6
    assert torch.equal(turned.temperature, out.cache.temperature[[2, 0]])
    kept = out.cache.keep(6, torch.tensor([[1], [0], [1]]))
    assert kept.length == 7
    assert torch.equal(kept.temperature, out.cache.temperature)
    found = generate(adaptive, ids, 6, sampler=Sampler(temperature=1.0), generator=_rng())
    assert found.tokens.shape == (3, 6)


def test_the_network_has_three_layers_with_silu() -> None:
    assert [round(5 * t, 9) for t in TEMPERATURES] == [0, 1, 2, 3, 4, 5]
    decoder, h = AdaptiveDecoder(4, hidden=3, generator=_rng()), torch.randn(2, 5, 4, generator=_rng(1))
    a, b, c = decoder.layers
    peer = nn.Sequential(a, nn.SiLU(), b, nn.SiLU(), c, nn.Softmax(-1))
    torch.testing.assert_close(decoder(h).exp(), peer(h))
    assert [layer.weight.shape for layer in AdaptiveDecoder(4).layers] == [(4, 4), (4, 4), (6, 4)]


def test_cold_sequences_are_greedy() -> None:
    model, ids = _model(), torch.randint(11, (2, 4), generator=_rng(1))
    cold = AdaptiveTemperatureLM(model, AdaptiveDecoder(12, (0.0,), generator=_rng()).double(), "sequence")
    found = generate(cold, ids, 9, sampler=Sampler(temperature=1.0)).tokens
    assert torch.equal(found, generate(model, ids, 9).tokens)
    assert (cold.vocab_size, cold.max_length) == (model.vocab_size, model.max_length)


def test_what_each_context_is_rewarded_for_is_learnt() -> None:
    """Context 0 is rewarded for the most likely token, context 1 for any other one; only pairs are seen."""
    generator, temperatures = _rng(), torch.tensor(TEMPERATURES)
    hidden, logits = torch.eye(2), torch.tensor([2.0, 1.0, 0.5, 0.0])
    decoder = AdaptiveDecoder(2, hidden=16, generator=generator)
    optimiser = torch.optim.Adam(decoder.parameters(), 0.02)
    for _ in range(120):
        log_choice = decoder(hidden.repeat(16, 1))
        tau = draw(log_choice.detach().exp()[:, None].expand(-1, 4, -1), generator)
        tokens = draw(tempered_log_probs(logits.expand(32, 4, 4), temperatures[tau]).exp(), generator)
        likeliest = (tokens == 0).float()
        context = torch.arange(32) % 2
        prompt, chosen, rejected = best_and_worst(torch.where(context[:, None] == 0, likeliest, -likeliest))
        taken = log_choice.gather(1, tau)
        loss = lpo_temperature_loss(taken[prompt, chosen], taken[prompt, rejected], beta=1.0).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert temperatures[decoder(hidden).argmax(-1)].tolist() == [0.0, 1.0]


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    for bad in ((), (0.5, 0.5), (-0.1,), (math.nan,)):
        with pytest.raises(ValueError, match="temperatures"):
            AdaptiveDecoder(4, bad)
    with pytest.raises(ValueError, match="d_model"):
        AdaptiveDecoder(0)
    with pytest.raises(ValueError, match="hidden"):
        AdaptiveDecoder(4, hidden=0)
    with pytest.raises(ValueError, match="level"):
        AdaptiveTemperatureLM(_model(), AdaptiveDecoder(12), "word")  # type: ignore[arg-type]
    for scores in (torch.ones(3), torch.ones(3, 1), torch.tensor([[1.0, math.nan]])):
        with pytest.raises(ValueError, match="scores"):
            best_and_worst(scores)
    one = torch.zeros(1)
    for beta in (0.0, -1.0):
        with pytest.raises(ValueError, match="beta"):
            lpo_temperature_loss(one, one, beta=beta)
