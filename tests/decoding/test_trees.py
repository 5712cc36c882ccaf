"""Trees of drafts: their shapes against walks along the parents, the best one against all, what is accepted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mlreviews.decoding import MedusaHeads
from mlreviews.decoding.trees import RankTree, TokenTree, follow_tree, verify_top_tree
from mlreviews.models import TinyLM, TinyLMConfig
from tests.decoding.models import assert_same_law, exact_law

CHOICES = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 0, 0), (0, 0, 0, 0)]


def test_a_tree_of_ranks_begins_with_its_best_branch() -> None:
    tree = RankTree(CHOICES)
    assert tree.choices[:4] == [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]
    assert tree.height == 4
    nodes = [(), *tree.choices]
    for i, path in enumerate(nodes):
        parent, rank = int(tree.shape.parents[i]), int(tree.ranks[i])
        assert (parent, rank) == ((-1, -1) if not path else (nodes.index(path[:-1]), path[-1]))
        assert int(tree.shape.depth[i]) == len(path)
        assert [nodes[j] for j in tree.shape.mask[i].nonzero().flatten()] == [path[:n] for n in range(len(path) + 1)]
    assert RankTree.chain(3).choices == [(0,), (0, 0), (0, 0, 0)]
    assert tree.cut(2).choices == [(0,), (0, 0), (0, 1), (1,), (1, 0)]
    assert tree.cut(4) is tree
    assert RankTree([]).height == 0


@pytest.mark.parametrize("bad", [[(1,)], [(0, 0)], [(0,), (0,)], [()], [(0,), (-1,)], [(0,), (0, 1)]])
def test_a_tree_needs_parents_and_siblings(bad: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="choices"):
        RankTree(bad)


def test_a_tree_has_one_root() -> None:
    with pytest.raises(ValueError, match="only root"):
        TokenTree.of(torch.tensor([-1, 0, -1]))


def test_the_likeliest_tree_is_the_best_of_all() -> None:
    accuracies = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).sort(1, descending=True).values / 2
    everything = [path for n in (1, 2, 3) for path in itertools.product(range(3), repeat=n)]

    def value(path: tuple[int, ...]) -> float:
        return math.prod(float(accuracies[depth, rank]) for depth, rank in enumerate(path))

    for nodes in (1, 2, 3):
        best = 0.0
        for chosen in itertools.combinations(everything, nodes):
            if all(path[:-1] in ((), *chosen) for path in chosen):
                best = max(best, sum(map(value, chosen)))
        assert sum(map(value, RankTree.likeliest(accuracies, nodes).choices)) == pytest.approx(best)
    assert sorted(RankTree.likeliest(accuracies, 10**4).choices) == sorted(everything)
    # a rank that is right more often than the one before it still comes after it
    assert RankTree.likeliest(torch.tensor([[0.3, 0.6]]), 1).choices == [(0,)]
    assert RankTree.likeliest(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 9).choices[0] == (0,)
    with pytest.raises(ValueError, match="accuracies"):
        RankTree.likeliest(torch.full((2, 2), math.nan), 3)


def test_the_way_ends_where_no_child_holds_what_is_chosen() -> None:
    tokens, parents, asked = [9, 1, 2, 1, 3], [-1, 0, 0, 2, 3], []

    def choose(node: int) -> int:
        asked.append(node)
        return {0: 2, 2: 1, 3: 8}[node]

    assert follow_tree(choose, tokens, parents) == ([0, 2, 3], 8)
    assert asked == [0, 2, 3]


def test_fixed_children_leave_the_targets_law() -> None:
    # the same as asking the children one after another, each with its probability among what is left
    tokens, parents = [0, 2, 0, 1, 1], [-1, 0, 0, 1, 2]
    p = torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = p / p.sum(1, keepdim=True)
    before = p.clone()
    found = exact_law(lambda: verify_top_tree(p, tokens, parents))
    expected: dict[tuple[tuple[int, ...], int], float] = {}

    def ask(path: tuple[int, ...], weight: float) -> None:
        rest = p[path[-1]].clone()
        for node in (i for i in range(5) if parents[i] == path[-1]):
            among = float(rest[tokens[node]] / rest.sum())
            ask((*path, node), weight * among)
            weight *= 1 - among
            rest[tokens[node]] = 0
        for token in range(3):
            expected[path, token] = weight * float(rest[token] / rest.sum())

    ask((0,), 1.0)
    assert_same_law(found, expected)
    assert torch.equal(p, before)


def test_each_node_sees_its_own_branch() -> None:
    generator = torch.Generator().manual_seed(0)
    config = TinyLMConfig(vocab_size=11, d_model=12, layers=2, heads=2, hidden=16)
    model = TinyLM(config, generator=generator).double().eval()
    prompt, tree = torch.randint(11, (2, 5), generator=generator), RankTree(CHOICES).shape
    tokens = torch.randint(11, (2, 9), generator=generator)
    start = model(prompt)
    out = model(tokens, start.cache, positions=5 + tree.depth, tree=tree.mask)
    for node in range(9):
        branch = tokens[:, tree.mask[node]]
        alone = model(torch.cat([prompt, branch], 1))
        torch.testing.assert_close(out.logits[:, node], alone.logits[:, -1])
        kept = out.cache.keep(5, tree.mask[node].nonzero().flatten().expand(2, -1))
        torch.testing.assert_close(kept.layers[1].keys, alone.cache.layers[1].keys)
    chain = RankTree.chain(8).shape
    out = model(tokens, start.cache, positions=5 + chain.depth, tree=chain.mask)
    torch.testing.assert_close(out.logits, model(tokens, start.cache).logits)


def test_drafters_are_saved_with_their_tree(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("drafter") / "new" / "deeper"
    heads = MedusaHeads(4, 7, 3, generator=torch.Generator().manual_seed(0))
    heads.tree = RankTree([(0,), (1,), (1, 0)])
    heads.save(folder)
    found = MedusaHeads.load(folder)
    assert found.tree.choices == heads.tree.choices
    x: Tensor = torch.randn(2, 4)
    assert torch.equal(found(x), heads(x))
    assert not found.training
    with pytest.raises(ValueError, match="name: expected a shipped drafter"):
        MedusaHeads.load("nothing")
