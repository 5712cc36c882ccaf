"""GenARM: laws that can be written down, and a reward that has to be learnt from pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlreviews.decoding.genarm import GenARM, arm_loss, guided_logits
from mlreviews.models import CausalLM, Sampler, TinyLM, TinyLMConfig, generate
from tests.decoding.models import TableLM, assert_same_law, exact_law, law_of_chain


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _logits(seed: int) -> Tensor:
    return torch.randn(2, 3, 7, generator=_rng(seed), dtype=torch.float64)


def test_any_law_can_be_reached() -> None:
    base, target, beta = _logits(0), _logits(1).softmax(-1), 0.7
    reward = beta * (target.log() - base.log_softmax(-1))  # the reward model is any multiple of this power
    torch.testing.assert_close(guided_logits(base, [reward + 5.0], [1.0], beta).softmax(-1), target)


def test_logits_are_linear_in_the_weights() -> None:
    base, one, other = (_logits(seed) for seed in range(3))
    found = guided_logits(base, [one, one, other], [0.3, 0.7, -2.0], 0.5)
    expected = guided_logits(guided_logits(base, [one], [1.0], 0.5), [other], [-4.0], 1.0)
    torch.testing.assert_close(found, expected)
    # by hand: probabilities to the power of weight / beta
    p = base.softmax(-1) * one.softmax(-1) ** 2 * other.softmax(-1) ** -4
    torch.testing.assert_close(found.softmax(-1), p / p.sum(-1, keepdim=True))


def test_reduces_to_plain_decoding() -> None:
    base, ids = TableLM.random(3, 0), torch.tensor([[1, 2]])
    reward, flat = TableLM.random(3, 1), TableLM(torch.full((4, 3, 3), 1.7))
    sampler = Sampler(temperature=0.8)
    for steered in (GenARM(base, [reward], [0.0]), GenARM(base, [flat], [3.0], beta=0.2)):
        law = exact_law(lambda steered=steered: generate(steered, ids, 3, sampler=sampler).tokens)  # type: ignore[misc]
        assert_same_law(law, law_of_chain(base, ids, 3, sampler))
    barred = TableLM(torch.where(torch.arange(3) == 0, -math.inf, 0.0).expand(4, 3, 3))
    assert GenARM(base, [barred], [0.0])(ids).logits.isfinite().all()
    assert GenARM(base, [barred])(ids).logits.softmax(-1)[..., 0].max() == 0


def test_the_law_of_a_text_is_the_product_s() -> None:
    base, rewards, ids = TableLM.random(3, 0), [TableLM.random(3, seed) for seed in (1, 2)], torch.tensor([[0, 1]])
    steered = GenARM(base, rewards, [0.5, 1.5], beta=2.0)
    product = TableLM(base.table + rewards[0].table / 4 + 3 * rewards[1].table / 4)
    sampler = Sampler(temperature=1.2, top_k=2)
    law = exact_law(lambda: generate(steered, ids, 3, sampler=sampler).tokens)
    assert_same_law(law, law_of_chain(product, ids, 3, sampler))


def test_is_a_model_with_the_caches_of_all() -> None:
    sizes = ((12, 2, 40), (8, 1, 30))
    models = [
        TinyLM(TinyLMConfig(vocab_size=11, d_model=d, layers=n, heads=2, hidden=16, context=context), generator=_rng(d))
        .double()
        .eval()
        for d, n, context in sizes
    ]
    steered = GenARM(models[0], models[1:])
    assert isinstance(steered, CausalLM)
    assert (steered.vocab_size, steered.max_length) == (11, 30)
    ids = torch.randint(11, (3, 9), generator=_rng(5))
    whole = steered(ids, hidden_states=True)
    expected = models[0](ids).logits.softmax(-1) * models[1](ids).logits.softmax(-1)
    torch.testing.assert_close(whole.logits.softmax(-1), expected / expected.sum(-1, keepdim=True))
    assert whole.hidden_states is not None
    torch.testing.assert_close(models[0].lm_head(whole.hidden_states[-1]), models[0](ids).logits)
    first = steered(ids[:, :4])
    assert first.hidden_states is None
    torch.testing.assert_close(steered(ids[:, 4:], first.cache).logits, whole.logits[:, 4:])
    assert whole.cache.length == 9
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(steered(ids[rows, 6:], whole.cache.rows(rows).crop(6)).logits, whole.logits[rows, 6:])
    kept = whole.cache.keep(4, torch.tensor([[0], [0], [0]]))
    torch.testing.assert_close(steered(ids[:, 5:], kept).logits, whole.logits[:, 5:])


def test_reduces_to_dpo() -> None:
    from mlreviews.preference import dpo_loss

    chosen, rejected = (-5 * torch.rand(4, generator=_rng(seed), dtype=torch.float64) for seed in (0, 1))
    same = torch.full((4,), -9.0).double()
    expected = dpo_loss(chosen, rejected, same, same, beta=0.05).losses
    torch.testing.assert_close(arm_loss(chosen, rejected), expected)
    assert float(arm_loss(chosen, chosen)[0]) == pytest.approx(math.log(2))
    torch.testing.assert_close(arm_loss(chosen, rejected, beta_r=2.0), torch.log1p(torch.exp(-2 * (chosen - rejected))))


def test_a_learnt_reward_steers_more_the_smaller_beta() -> None:
    """Pairs prefer texts with more of token 2; the reward model is a table of single tokens."""
    generator, table = _rng(), torch.zeros(4, requires_grad=True)
    optimiser = torch.optim.Adam([table], 0.1)
    for _ in range(40):
        texts = torch.randint(4, (32, 2, 6), generator=generator)
        better = (texts == 2).sum(-1).argsort(dim=1, descending=True, stable=True)
        texts = texts.gather(1, better[..., None].expand_as(texts))
        reward = table.log_softmax(-1)[texts].sum(-1)
        loss = arm_loss(reward[:, 0], reward[:, 1], beta_r=0.5).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    base = TableLM.random(4, 3, scale=0.5)
    reward_model = TableLM(table.detach().expand(5, 4, 4).clone())
    ids = torch.zeros(150, 1, dtype=torch.int64)
    shares = []
    for inverse in (0.0, 0.5, 1.0, 2.0):
        steered = GenARM(base, [reward_model], [inverse])
        tokens = generate(steered, ids, 8, sampler=Sampler(temperature=1.0), generator=_rng(1)).tokens
        shares.append(float((tokens == 2).double().mean()))
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] + 0.2


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    base, ids = TableLM.random(4, 0), torch.zeros(1)
    with pytest.raises(ValueError, match="reward_models"):
        GenARM(base, [])
    with pytest.raises(ValueError, match="reward_models"):
        GenARM(base, [TableLM.random(3, 0)])
    with pytest.raises(ValueError, match="weights"):
        GenARM(base, [base], [1.0, 2.0])
    with pytest.raises(ValueError, match="weights"):
        GenARM(base, [base], [math.nan])
    with pytest.raises(ValueError, match="beta"):
        GenARM(base, [base], beta=0.0)
    for beta_r in (0.0, -0.1):
        with pytest.raises(ValueError, match="beta_r"):
            arm_loss(ids, ids, beta_r=beta_r)
