"""Medusa: heads that start as the model's own, the loss by loops, greedy text as plain, thresholds in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlreviews.decoding import (
    MedusaHeads,
    TypicalAcceptance,
    medusa_generate,
    medusa_loss,
    typical_threshold,
    verify_typical,
)
from mlreviews.decoding.medusa import MEDUSA_TREE
from mlreviews.decoding.trees import RankTree
from mlreviews.models import Sampler, TinyLM, TinyLMConfig, generate
from tests.contracts.families import Sample
from tests.decoding.models import TableLM, assert_same_law, exact_law, law_of_chain

VOCAB, WIDTH = 7, 12


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model() -> TinyLM:
    config = TinyLMConfig(vocab_size=VOCAB, d_model=WIDTH, layers=2, heads=2, hidden=16, tied=False)
    model = TinyLM(config, generator=_rng()).double().eval().requires_grad_(False)
    model.lm_head.weight.mul_(4)
    return model


def _heads(width: int = WIDTH, vocab: int = VOCAB, heads: int = 5) -> MedusaHeads:
    """Perturbed: no weight is at its start."""
    found = MedusaHeads(width, vocab, heads, generator=_rng()).double().requires_grad_(False)
    for parameter in found.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=_rng(1), dtype=torch.float64))
    return found


def _prompt(batch: int = 2, time: int = 6) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=_rng(5))


CONTRACT = {
    "MedusaHeads": lambda: Sample(MedusaHeads(8, 7, 3, generator=_rng()), (torch.randn(2, 5, 8, generator=_rng(1)),)),
    "medusa_generate": lambda: Sample(
        medusa_generate, (_model(), _heads(), _prompt(), 6), {"sampler": Sampler(temperature=1.0)}
    ),
}


def test_every_head_starts_as_the_models_own() -> None:
    model = _model()
    heads = MedusaHeads(WIDTH, VOCAB, 3, lm_head=model.lm_head.weight).double()
    out = model(_prompt(), hidden_states=True)
    assert out.hidden_states is not None
    torch.testing.assert_close(
        heads(out.hidden_states[-1]), out.logits[:, :, None].expand(-1, -1, 3, -1), rtol=1e-6, atol=1e-6
    )


def test_heads_of_no_model_are_drawn_evenly_around_0() -> None:
    weight = MedusaHeads(16, 50, generator=_rng()).head.detach()
    assert weight.shape == (5, 50, 16)
    assert 0.249 < float(weight.max()) <= 0.25  # 1 / sqrt(16)
    assert -0.25 <= float(weight.min()) < -0.249
    assert abs(float(weight.mean())) < 4 * 0.25 / math.sqrt(3 * weight.numel())


def test_heads_are_a_residual_layer_and_a_matrix_each() -> None:
    heads, hidden = _heads(), torch.randn(2, 3, WIDTH, generator=_rng(2), dtype=torch.float64)
    found = heads(hidden)
    for k in range(5):
        inner = nn.functional.linear(hidden, heads.residual[k], heads.bias[k])
        expected = nn.functional.linear(inner * inner.sigmoid() + hidden, heads.head[k])
        torch.testing.assert_close(found[:, :, k], expected)
    torch.testing.assert_close(heads(hidden[1, 2]), found[1, 2])


def test_the_loss_weighs_each_head_and_looks_further_with_each() -> None:
    logits = torch.randn(2, 7, 3, VOCAB, generator=_rng(), dtype=torch.float64)
    ids = torch.randint(VOCAB, (2, 7), generator=_rng(1))
    expected = 0.0
    for k in (1, 2, 3):
        terms = [-float(logits[b, t, k - 1].log_softmax(0)[ids[b, t + k + 1]]) for b in range(2) for t in range(6 - k)]
        expected += 0.7**k * sum(terms) / len(terms)
    assert float(medusa_loss(logits, ids, 0.7)) == pytest.approx(expected)
    assert float(medusa_loss(torch.zeros_like(logits), ids)) == pytest.approx((0.8 + 0.64 + 0.512) * math.log(VOCAB))


def test_greedy_text_is_that_of_plain_decoding_whatever_the_heads_predict() -> None:
    model, ids, sampler = _model(), _prompt(3), Sampler(repetition_penalty=1.3)
    mask = torch.arange(6) >= torch.tensor([0, 4, 2])[:, None]
    wide = RankTree([(a,) for a in range(6)] + [(a, b) for a in range(6) for b in range(6)])
    expected = generate(model, ids, 11, mask=mask, sampler=sampler)
    found = medusa_generate(model, _heads(), ids, 11, tree=wide, mask=mask, sampler=sampler)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.accepted is not None
    assert int(found.accepted.max()) > 0


def test_reduces_to_plain_decoding() -> None:
    model, ids, none = _model(), _prompt(), RankTree([])
    sampler = Sampler(temperature=1.0)
    found = medusa_generate(model, _heads(), ids, 9, tree=none, sampler=sampler, generator=_rng(3))
    expected = generate(model, ids, 9, sampler=sampler, generator=_rng(3))
    assert found.target_calls == 9
    assert found.tokens.shape == expected.tokens.shape
    greedy = medusa_generate(model, _heads(), ids, 9, tree=none)
    assert torch.equal(greedy.tokens, generate(model, ids, 9).tokens)


def test_sampled_text_has_the_models_law() -> None:
    model, ids, sampler = TableLM.random(4, 0), torch.tensor([[1, 3]]), Sampler(1.0, top_k=2)
    tree, heads = RankTree([(0,), (1,), (0, 0)]), _heads(4, 4, 2).float()
    found = exact_law(lambda: medusa_generate(model, heads, ids, 4, tree=tree, sampler=sampler).tokens)
    assert_same_law(found, law_of_chain(model, ids, 4, sampler))


def _cycle() -> tuple[TableLM, MedusaHeads]:
    """After each token the next number, and heads that know it: hidden states are the logits."""
    following = torch.eye(VOCAB).roll(1, 1)
    heads = MedusaHeads(VOCAB, VOCAB, 4, generator=_rng()).requires_grad_(False)
    for k in range(4):
        heads.head[k] = torch.eye(VOCAB).roll(k + 1, 0)
    return TableLM(20 * following.expand(VOCAB + 1, -1, -1).clone()), heads


@pytest.mark.parametrize("typical", [None, TypicalAcceptance()])
def test_heads_that_are_right_give_all_their_tokens_in_each_pass(typical: TypicalAcceptance | None) -> None:
    model, heads = _cycle()
    found = medusa_generate(model, heads, torch.tensor([[2]]), 23, tree=RankTree.chain(4), typical=typical)
    assert found.tokens[0].tolist() == [(3 + i) % VOCAB for i in range(23)]
    assert found.target_calls == 6  # 1 token after the prompt, 5 in each pass, and the 2 that are left
    assert found.accepted is not None
    assert found.drafted is not None
    assert found.accepted[:, 0].tolist() == found.drafted[:, 0].tolist() == [4, 4, 4, 4, 1]


def test_the_threshold_of_certain_and_of_uniform_distributions() -> None:
    certain, uniform = torch.eye(8, dtype=torch.float64)[:1], torch.full((1, 8), 1 / 8, dtype=torch.float64)
    assert typical_threshold(certain, 0.2, 0.1).tolist() == [0.1]
    assert typical_threshold(certain, 0.05, 0.1).tolist() == [0.05]
    assert float(typical_threshold(uniform, 0.2, 0.4)) == pytest.approx(0.4 / 8)
    assert typical_threshold(certain).tolist() == [0.09]
    assert float(typical_threshold(uniform)) == pytest.approx(0.3 / 8)
    assert TypicalAcceptance() == TypicalAcceptance(0.09, 0.3, 1.0)
    half = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    assert float(typical_threshold(half, 1.0, 1.0)) == pytest.approx(2**-1.5)


def test_defaults_of_typical_acceptance() -> None:
    """Of 20 tokens that are equally likely each has 0.05, above 0.3 of it and below 0.09."""
    uniform = torch.full((2, 20), 0.05)
    assert verify_typical(uniform, [3, 5], [-1, 0])[0] == [0, 1]
    assert verify_typical(uniform, [3, 5], [-1, 0], delta=1.1)[0] == [0]


def test_the_longest_typical_branch_stays_and_of_these_the_likeliest() -> None:
    tokens, parents = [9, 0, 1, 0, 1, 2, 0], [-1, 0, 0, 1, 2, 2, 3]
    p = torch.full((7, 3), 1e-3, dtype=torch.float64)
    p[0] = torch.tensor([0.5, 0.3, 0.2])
    p[1] = torch.tensor([0.2, 0.2, 0.6])
    p[2] = torch.tensor([0.05, 0.45, 0.5])
    p[3] = torch.tensor([0.01, 0.01, 0.98])
    p[5] = torch.tensor([0.1, 0.7, 0.2])
    # node 3 has 0.5 * 0.2, node 4 has 0.3 * 0.45, node 5 has 0.3 * 0.5; node 6 is not typical
    assert verify_typical(p, tokens, parents) == ([0, 2, 5], 1)
    # with a higher threshold the first level alone is left, then nothing but the root
    assert verify_typical(p, tokens, parents, 0.25, 9.0) == ([0, 2, 5], 1)
    assert verify_typical(p, tokens, parents, 0.45, 9.0) == ([0, 1], 2)
    assert verify_typical(p, tokens, parents, 0.5, 9.0) == ([0], 0)  # more than, not at least
    assert verify_typical(p, tokens, parents, 0.0, 0.0) == ([0, 1, 3, 6], 0)


def test_typical_acceptance_of_nothing_is_greedy_decoding() -> None:
    model, ids = _model(), _prompt()
    strict = TypicalAcceptance(eps=1.0, delta=1e9)
    assert torch.equal(medusa_generate(model, _heads(), ids, 9, typical=strict).tokens, generate(model, ids, 9).tokens)
    loose = medusa_generate(model, _heads(), ids, 16, typical=TypicalAcceptance(eps=0.0, temperature=2.0))
    assert loose.target_calls == 4  # all five heads' guesses are accepted: 1 + 6 + 6 tokens, and 3 more


def test_the_tree_is_cut_to_the_heads() -> None:
    assert MEDUSA_TREE.height == 5
    assert _heads(heads=2).tree.height == 2
    assert len(MEDUSA_TREE.choices) == 3 + 6 + 3 * 6


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    model: Any = _model()
    with pytest.raises(ValueError, match="lm_head"):
        MedusaHeads(WIDTH, VOCAB, lm_head=torch.zeros(VOCAB, 3))
    for name in ("d_model", "vocab_size", "heads"):
        with pytest.raises(ValueError, match=name):
            MedusaHeads(**{"d_model": 4, "vocab_size": 5, "heads": 2, name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 4 tokens for 2 heads"):
        medusa_loss(torch.zeros(1, 3, 2, 5), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="tree: expected a height of 2"):
        medusa_generate(model, _heads(heads=2), _prompt(), 5, tree=MEDUSA_TREE)
    with pytest.raises(ValueError, match="heads: expected hidden states of size 12"):
        medusa_generate(model, _heads(width=6), _prompt(), 5)
    for name, bad in (("eps", -0.1), ("delta", math.nan), ("temperature", 0.0)):
        with pytest.raises(ValueError, match=name):
            TypicalAcceptance(**{name: bad})
