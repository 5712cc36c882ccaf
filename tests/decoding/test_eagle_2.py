"""EAGLE-2: values and reranking against brute force, the trees' optimality, and what is written."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mlreviews.decoding import DynamicDraftTree, EagleDraft, eagle2_generate, eagle_generate, rerank_tree
from mlreviews.decoding.trees import RankTree
from mlreviews.models import Sampler, TinyLM, TinyLMConfig
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


def _draft(width: int = WIDTH) -> EagleDraft:
    return EagleDraft(width, 2, kv_heads=1, hidden=10, generator=_rng()).double().requires_grad_(False)


def _prompt(batch: int = 2, time: int = 6) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=_rng(5))


CONTRACT = {
    "eagle2_generate": lambda: Sample(
        eagle2_generate, (_model(), _draft(), _prompt(), 6), {"sampler": Sampler(temperature=1.0)}
    )
}


def _drafted(**sizes: int) -> tuple[DynamicDraftTree, tuple[Any, ...]]:
    model, ids = _model(), _prompt()
    hidden = model(ids, hidden_states=True).hidden_states[-1]  # type: ignore[index]
    following = torch.cat([ids[:, 1:], torch.tensor([[4], [2]])], 1)
    return DynamicDraftTree(model, _draft(), **sizes), (hidden, following, None, torch.arange(6), sizes["depth"])


def _laws() -> dict[tuple[int, ...], Tensor]:
    """Row 1's distributions after each drafted branch of up to two tokens, from scratch."""
    (drafter, (hidden, following, _, _, _)), model = _drafted(top_k=2, depth=3, total_tokens=9), _model()
    found = {}
    for branch in [(), *itertools.product(range(VOCAB), repeat=1), *itertools.product(range(VOCAB), repeat=2)]:
        features, tokens = hidden[1:], following[1:]
        for i in range(len(branch) + 1):
            predicted, _ = drafter.draft(features, model.embed_tokens(tokens))
            features = torch.cat([hidden[1:], predicted[:, 5:]], 1)
            tokens = torch.cat([following[1:], torch.tensor([branch[: i + 1]], dtype=torch.int64)], 1)
        found[branch] = model.lm_head(predicted[0, -1]).log_softmax(-1)
    return found


def test_values_are_the_products_along_the_branches_and_the_best_are_grown() -> None:
    laws = _laws()

    def value(branch: tuple[int, ...]) -> float:
        return sum(float(laws[branch[:i]][token]) for i, token in enumerate(branch))

    drafter, arguments = _drafted(top_k=3, depth=3, total_tokens=9)
    tokens, values, parents = (x[1].tolist() for x in drafter.expand(*arguments))
    assert len(tokens) == 1 + 3 + 9 + 9
    branches: list[tuple[int, ...]] = [()]
    for node in range(1, len(tokens)):
        branches.append((*branches[parents[node]], tokens[node]))
        assert values[node] == pytest.approx(value(branches[node]))
        assert values[node] <= values[parents[node]]
    level: list[tuple[int, ...]] = [()]
    for depth in range(3):
        grown = [(*b, int(t)) for b in level for t in laws[b].topk(3).indices]
        assert sorted(b for b in branches if len(b) == depth + 1) == sorted(grown)
        level = sorted(grown, key=value)[-3:]
    # what stays is the best of all that was looked at, so no tree of that size has a larger expectation
    offer = drafter(*arguments)
    best = sorted(branches[1:], key=value)[-9:]
    kept = [()]
    for node in range(1, 10):
        kept.append((*kept[int(offer.tree.parents[1, node])], int(offer.tokens[1, node])))
    assert sorted(kept[1:]) == sorted(best)
    static = RankTree([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0)])
    chosen = []
    for path in static.choices:
        branch: tuple[int, ...] = ()
        for rank in path:
            branch = (*branch, int(laws[branch].argsort(descending=True)[rank]))
        chosen.append(branch)
    assert sum(math.exp(value(b)) for b in best) >= sum(math.exp(value(b)) for b in chosen)


@pytest.mark.parametrize("m", [1, 4, 7, 40])
def test_what_stays_is_a_tree_of_the_largest_values(m: int) -> None:
    generator, batch, nodes = _rng(m), 3, 20
    parents = torch.stack(
        [
            torch.tensor([-1] + [int(torch.randint(i, (1,), generator=generator)) for i in range(1, nodes)])
            for _ in range(batch)
        ]
    )
    parents = torch.cat([parents[:, :1], parents[:, 1:].sort(1).values], 1).clamp(max=torch.arange(nodes) - 1)
    values = torch.zeros(batch, nodes)
    # many steps of 0 make ties between parents and children, and among siblings
    step = -torch.randint(3, (batch, nodes), generator=generator).float()
    for node in range(1, nodes):
        values[:, node] = values.gather(1, parents[:, node : node + 1])[:, 0] + step[:, node]
    kept, above = rerank_tree(values, parents, m)
    assert kept.shape == (batch, 1 + min(m, nodes - 1))
    for row in range(batch):
        chosen = kept[row].tolist()
        assert chosen == sorted(set(chosen))
        assert above[row].tolist() == [-1] + [chosen.index(int(parents[row, node])) for node in chosen[1:]]
        left = sorted(set(range(nodes)) - set(chosen))
        assert all(float(values[row, node]) <= float(values[row, chosen[1:]].min()) for node in left)


def test_reduces_to_eagle() -> None:
    model, draft, ids = _model(), _draft(), _prompt()
    one = eagle2_generate(model, draft, ids, 15, top_k=1, depth=4, total_tokens=4)
    other = eagle_generate(model, draft, ids, 15, tree=RankTree.chain(4))
    assert torch.equal(one.tokens, other.tokens)
    assert one.target_calls == other.target_calls
    assert one.accepted is not None
    assert other.accepted is not None
    assert torch.equal(one.accepted, other.accepted)


def test_sampled_text_has_the_targets_law() -> None:
    model, ids, sampler = TableLM.random(4, 0), torch.tensor([[1, 3]]), Sampler(1.0, top_k=2)
    draft = EagleDraft(4, 1, hidden=5, generator=_rng(1)).requires_grad_(False)
    found = exact_law(
        lambda: eagle2_generate(model, draft, ids, 4, top_k=2, depth=3, total_tokens=4, sampler=sampler).tokens
    )
    assert_same_law(found, law_of_chain(model, ids, 4, sampler))


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    for name in ("top_k", "depth", "total_tokens"):
        with pytest.raises(ValueError, match=name):
            eagle2_generate(_model(), _draft(), _prompt(), 3, **{name: 0})  # type: ignore[arg-type]
    assert DynamicDraftTree(_model(), _draft()).top_k == VOCAB  # no more children than there are tokens
    with pytest.raises(ValueError, match="m: expected"):
        rerank_tree(torch.zeros(1, 3), torch.tensor([[-1, 0, 0]]), 0)
    with pytest.raises(ValueError, match="draft: expected features of size 12"):
        eagle2_generate(_model(), _draft(16), _prompt(), 3)
