import math
from functools import partial

import pytest
import torch
from torch import Tensor

from mlreviews.decoding import (
    SVIPPolicy,
    acceptance_bound,
    acceptance_probability,
    draft_entropy,
    speculative_generate,
)
from mlreviews.models import Sampler, generate
from tests.decoding.models import TableLM, assert_same_law, exact_law, law_of_chain

TARGET = TableLM.random(3, 0)
DRAFT = TableLM.random(3, 1, near=TARGET, distance=1.0)


@pytest.mark.parametrize("vocab", [2, 9])
def test_pinsker(vocab: int) -> None:
    noise = torch.randn(2, 500, vocab, generator=torch.Generator().manual_seed(vocab), dtype=torch.float64)
    for scale, distance in ((0.01, 0.01), (1.0, 0.1), (1.0, 3.0), (10.0, 20.0)):
        q = (scale * noise[0]).softmax(-1)
        p = (scale * noise[0] + distance * noise[1]).softmax(-1)
        bound = acceptance_bound(p, q)
        assert bool((bound <= acceptance_probability(p, q) + 1e-9).all())
        # the same from entropies
        cross = -(q * p.log()).sum(-1)
        expected = 1 - ((cross - draft_entropy(q.log())) / 2).clamp(min=0).sqrt()
        torch.testing.assert_close(bound, expected, atol=1e-6, rtol=0)


def test_bound_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]])
    expected = torch.tensor([1.0, 1 - math.sqrt(math.log(2) / 2), -math.inf])
    torch.testing.assert_close(acceptance_bound(p, q), expected)
    # near each other the bound is tight to first order: TV = e, KL = 2 e^2
    close = acceptance_bound(torch.tensor([0.51, 0.49]).double(), torch.tensor([0.5, 0.5]).double())
    assert float(close) == pytest.approx(0.99, abs=1e-5)


def test_entropy() -> None:
    logits = torch.tensor(
        [[3.0, 3.0, 3.0, 3.0], [0.0, -math.inf, 0.0, -math.inf], [9.0, -math.inf, -math.inf, -math.inf]]
    )
    torch.testing.assert_close(draft_entropy(logits), torch.tensor([math.log(4), math.log(2), 0.0]))
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    expected = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(draft_entropy(p.log() + 7), expected)


def test_where_it_stops() -> None:
    policy = SVIPPolicy()
    # sqrt(c H) > h, that is H > h^2 / c = 0.6 nats: a coin of 0.29 has 0.602, of 0.28 has 0.593
    p = torch.tensor([0.29, 0.28])
    assert policy.should_stop(torch.stack([p, 1 - p], 1).log()).tolist() == [True, False]
    assert SVIPPolicy(c=0.3).should_stop(torch.tensor([[0.28, 0.72]]).log()).tolist() == [True]
    assert SVIPPolicy(threshold=math.inf).should_stop(torch.zeros(1, 9999)).tolist() == [False]
    certain = torch.tensor([[0.0, -math.inf]])  # not above a threshold of 0
    assert SVIPPolicy(threshold=0.0).should_stop(certain).tolist() == [False]
    assert (policy.c, policy.threshold, policy.max_len) == (0.15, 0.3, 40)


@pytest.mark.parametrize(("scale", "length"), [(50.0, 7), (0.0, 1)])
def test_sure_drafts_go_on_and_unsure_ones_end(scale: float, length: int) -> None:
    one_way = torch.zeros(6, 5, 5)
    one_way[:, torch.arange(5), torch.tensor([1, 2, 3, 4, 0])] = 1.0
    target, draft = TableLM(50 * one_way), TableLM(scale * one_way)
    policy = SVIPPolicy(max_len=7)
    found = speculative_generate(
        target, draft, torch.tensor([[0]]), 17, draft_length=policy.max_len, stop_drafting=policy.should_stop
    )
    assert found.drafted is not None
    assert set(found.drafted[:-1].flatten().tolist()) == {length}


@pytest.mark.parametrize("threshold", [0.2, 0.35])
def test_the_output_is_the_target_s(threshold: float) -> None:
    policy = SVIPPolicy(threshold=threshold, max_len=3)
    ids, batch = torch.tensor([[0, 2]]), torch.randint(3, (4, 5), generator=torch.Generator().manual_seed(0))

    def run(ids: Tensor, new: int, sampler: Sampler) -> Tensor:
        return speculative_generate(
            TARGET, DRAFT, ids, new, draft_length=3, sampler=sampler, stop_drafting=policy.should_stop
        ).tokens

    assert run(batch, 15, Sampler()).equal(generate(TARGET, batch, 15).tokens)
    for sampler in (Sampler(1.0), Sampler(0.6, top_k=2)):
        assert_same_law(exact_law(partial(run, ids, 3, sampler)), law_of_chain(TARGET, ids, 3, sampler))


def test_reduces_to_a_fixed_length() -> None:
    policy, ids = SVIPPolicy(threshold=math.inf, max_len=3), torch.tensor([[0, 2], [1, 1]])
    found, fixed = (
        speculative_generate(
            TARGET, DRAFT, ids, 20, draft_length=policy.max_len, sampler=Sampler(1.0), stop_drafting=stop,
            generator=torch.Generator().manual_seed(3),
        )
        for stop in (policy.should_stop, None)
    )  # fmt: skip
    for one, other in zip(found, fixed, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_the_target_as_its_own_draft_has_everything_accepted() -> None:
    policy = SVIPPolicy(max_len=6)
    found = speculative_generate(
        TARGET,
        TARGET,
        torch.tensor([[0, 2]]),
        30,
        draft_length=6,
        sampler=Sampler(1.0),
        stop_drafting=policy.should_stop,
    )
    assert found.acceptance_rate == 1.0


def test_errors() -> None:
    for name, value in (("c", 0.0), ("c", math.nan), ("threshold", -0.1), ("threshold", math.nan), ("max_len", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            SVIPPolicy(**{name: value})  # type: ignore[arg-type]
