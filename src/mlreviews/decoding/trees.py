r"""Trees of drafted tokens: their shapes, which branch a target accepts, and the loop of drafting and verifying.

What EAGLE, EAGLE-2 and Medusa share. Node 0 of a tree is its root, the last token that is certain; the others are
guesses of what follows, each after its parent. The target sees all of them in one pass, each with its ancestors.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from mlreviews.common.checks import check_matrix
from mlreviews.models import CausalLM, GenerationResult, Sampler, Stops, check_prompt, draw, most_likely
from mlreviews.models.causal_lm import PRETRAINED
from mlreviews_kernels.tree_masked_attention import ancestor_mask

__all__ = [
    "Drafted",
    "RankTree",
    "TokenTree",
    "TrainedDrafter",
    "TreeDrafter",
    "decode_trees",
    "follow_tree",
    "verify_top_tree",
]


class TokenTree(NamedTuple):
    """Shape of a tree, the same for all rows of a batch or one for each.

    Attributes:
        parents: [tree] or [batch, tree], the node before each, of a smaller number; -1 for the root, which is node 0.
        mask: [tree, tree] or [batch, tree, tree], True where a node (row) sees another one: itself and its ancestors.
        depth: [tree] or [batch, tree], how far each node is from the root.
    """

    parents: Int[Tensor, "*batch tree"]
    mask: Bool[Tensor, "*batch tree tree"]
    depth: Int[Tensor, "*batch tree"]

    @classmethod
    def of(cls, parents: Int[Tensor, "*batch tree"]) -> TokenTree:
        """The tree with these parents.

        Raises:
            ValueError: a parent doesn't come before its child, or node 0 is not the only root.
        """
        mask = ancestor_mask(parents)
        if not bool(mask[..., 0].all()):
            raise ValueError(f"parents: expected node 0 as the only root, got {parents.tolist()}")
        return cls(parents, mask, mask.sum(-1) - 1)

    def to(self, device: torch.device) -> TokenTree:
        """The tree on a device."""
        return TokenTree(*(x.to(device) for x in self))


class RankTree:
    """A tree that is fixed beforehand: which child of a node it holds, by its rank among the drafter's guesses.

    Nodes are numbered so that the branch of all best guesses comes first, which leaves a cache that need only be cut.

    Args:
        choices: for each node but the root the ranks on the way to it, from 0 on: ``(0, 1)`` is the second guess after
            the first guess. Each node needs its parent, and a node of rank r its siblings of lower rank.

    Attributes:
        choices: sorted, the number of a node less 1 is its place.
        shape: `TokenTree`.
        ranks: [tree], of each node among its siblings; -1 for the root.

    Raises:
        ValueError: a node twice, or without its parent or a sibling of lower rank.
    """

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        paths = sorted(tuple(path) for path in choices)
        known = {(), *paths}
        if len(known) != len(paths) + 1:
            raise ValueError("choices: expected each node once, and not the root")
        for path in paths:
            if path[-1] < 0 or path[:-1] not in known or (path[-1] > 0 and (*path[:-1], path[-1] - 1) not in known):
                raise ValueError(f"choices: {path} needs its parent and its siblings of lower rank")
        self.choices = paths
        number = {path: i for i, path in enumerate([(), *paths])}
        self.shape = TokenTree.of(torch.tensor([-1] + [number[path[:-1]] for path in paths]))
        self.ranks = torch.tensor([-1] + [path[-1] for path in paths])

    @classmethod
    def chain(cls, length: int) -> RankTree:
        """The best guess after the best guess, `length` times."""
        return cls([(0,) * i for i in range(1, length + 1)])

    @classmethod
    def likeliest(cls, accuracies: Float[Tensor, "depth ranks"], nodes: int) -> RankTree:
        r"""The tree whose expected number of accepted tokens is largest, if guesses hit independently.

        A node is accepted with the product of the accuracies along its branch, and their sum over the nodes is the
        expectation. The largest products of all make a tree, since a node's is at most its parent's (Medusa,
        section 2.3.3); accuracies that grow with the rank count as those of the rank before.

        Args:
            accuracies: [depth, ranks], how often the guess of a rank is right at a depth, given that all before it on
                the branch are.
            nodes: how many, without the root.
        """
        check_matrix("accuracies", accuracies)
        table = accuracies.cummin(1).values.tolist()
        ready: list[tuple[float, tuple[int, ...]]] = [(-table[0][0], (0,))]
        chosen: list[tuple[int, ...]] = []
        while ready and len(chosen) < nodes:
            value, path = heapq.heappop(ready)
            chosen.append(path)
            row = table[len(path) - 1]
            if path[-1] + 1 < len(row) and row[path[-1]] > 0:
                heapq.heappush(ready, (value * row[path[-1] + 1] / row[path[-1]], (*path[:-1], path[-1] + 1)))
            if len(path) < len(table):
                heapq.heappush(ready, (value * table[len(path)][0], (*path, 0)))
        return cls(chosen)

    @property
    def height(self) -> int:
        """Tokens of the longest branch, without the root."""
        return max(map(len, self.choices), default=0)

    def cut(self, height: int) -> RankTree:
        """The nodes at most so far from the root."""
        return self if height >= self.height else RankTree([path for path in self.choices if len(path) <= height])


_Module = TypeVar("_Module", bound="TrainedDrafter")


class TrainedDrafter(nn.Module):
    """A module that guesses, trained for one target, with the tree that suits it.

    Attributes:
        config: the constructor's arguments.
        tree: shape of the drafts where none is asked for.
    """

    config: dict[str, Any]
    tree: RankTree

    def save(self, folder: str | Path) -> None:
        """Writes ``config.json``, with the tree, and ``model.safetensors``.

        Args:
            folder: made where it doesn't exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = json.dumps({**self.config, "tree": self.tree.choices})
        (folder / "config.json").write_text(written + "\n", encoding="utf-8")
        save_model(self, str(folder / "model.safetensors"))

    @classmethod
    def load(cls: type[_Module], name: str | Path) -> _Module:
        """What `save` wrote, in evaluation mode: a folder, or a shipped one by name.

        "python-eagle" (`EagleDraft`) and "python-medusa" (`MedusaHeads`) guess for "python-target" of
        `mlreviews.models.load_pretrained`.

        Args:
            name: of a shipped drafter, or a folder.

        Raises:
            ValueError: there is no such drafter.
        """
        shipped = PRETRAINED / name
        folder = shipped if shipped.is_dir() else Path(name)
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"name: expected a shipped drafter, or a folder that save() wrote, got {str(name)!r}")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tree = RankTree(config.pop("tree"))
        module = cls(**config, generator=torch.Generator())
        module.tree = tree
        load_model(module, str(folder / "model.safetensors"))
        return module.eval()


class Drafted(NamedTuple):
    """What a drafter offers.

    Attributes:
        tokens: [batch, tree]; those of the root are certain.
        tree: its shape.
        q: [batch, tree, vocab], the distributions that the children of each node were drawn from without replacement;
            None where they are fixed by what came before, such as the likeliest ones.
    """

    tokens: Int[Tensor, "batch tree"]
    tree: TokenTree
    q: Float[Tensor, "batch tree vocab"] | None = None


@runtime_checkable
class TreeDrafter(Protocol):
    """Something that guesses trees. It remembers what it was told before."""

    height: int

    def __call__(
        self,
        hidden: Float[Tensor, "batch new d_model"],
        following: Int[Tensor, "batch new"],
        mask: Bool[Tensor, "batch new"] | None,
        positions: Int[Tensor, "*batch new"],
        height: int,
    ) -> Drafted:
        """A tree on what has been decoded so far.

        Args:
            hidden: the target's last hidden states at the tokens that are new to the drafter.
            following: the token after each of them. The last one, which the target hasn't seen yet, becomes the root.
            mask: False at what only fills up a row, on the left; None where all are real.
            positions: of the new tokens.
            height: of the tree at most.
        """


def follow_tree(choose: Callable[[int], int], tokens: Sequence[int], parents: Sequence[int]) -> tuple[list[int], int]:
    """From the root on to the child that holds what is chosen, as long as there is one.

    If the choice at each node follows the target's law given the node's branch, then so do the tokens, whatever the
    tree holds: they are what plain decoding would have chosen, and the tree only had them computed before.

    Args:
        choose: from the number of a node to the token after it; called once for each node on the way.
        tokens: of each node.
        parents: of each node.

    Returns:
        The nodes on the way, the root first, and the token after the last of them.
    """
    child = {(parents[i], tokens[i]): i for i in range(len(tokens) - 1, 0, -1)}
    path = [0]
    while True:
        token = choose(path[-1])
        node = child.get((path[-1], token))
        if node is None:
            return path, token
        path.append(node)


def verify_top_tree(
    p: Float[Tensor, "tree vocab"],
    tokens: Sequence[int],
    parents: Sequence[int],
    generator: torch.Generator | None = None,
) -> tuple[list[int], int]:
    """Which branch of a tree is accepted whose tokens were not drawn but follow from what came before.

    Args:
        p: the target's distribution after each node.
        tokens: of each node.
        parents: of each node.
        generator: draws; None is the global one.

    Returns:
        The accepted nodes, the root first, and the token after the last of them. The law of the tokens is the target's.
    """
    return follow_tree(lambda node: int(draw(p[node], generator)), tokens, parents)


Found = list[tuple[list[int], int]]

# A rule of acceptance. From the target's logits [batch, tree, vocab], the trees, and each node with what came before
# it [batch, tree, time] (-1 is no token; None where it isn't needed) to the accepted nodes of each row, the root first,
# and the token after the last of them.
Verdicts = Callable[[Tensor, Drafted, Tensor | None], Found]


def exact_verdicts(sampler: Sampler, generator: torch.Generator | None) -> Verdicts:
    """The rule of `verify_top_tree` with the sampler's distributions; where it is greedy nothing is drawn."""

    def verdicts(logits: Tensor, drafted: Drafted, previous: Tensor | None) -> Found:
        tokens, parents = drafted.tokens.tolist(), parents_of_rows(drafted)
        if sampler.greedy:
            if sampler.repetition_penalty != 1.0:
                logits = sampler.probabilities(logits, previous)
            chosen = most_likely(logits).tolist()
            return [follow_tree(c.__getitem__, t, r) for c, t, r in zip(chosen, tokens, parents, strict=True)]
        p = sampler.probabilities(logits, previous)
        return [verify_top_tree(*row, generator) for row in zip(p, tokens, parents, strict=True)]

    return verdicts


def parents_of_rows(drafted: Drafted) -> list[list[int]]:
    """The parents of each row's tree."""
    parents = drafted.tree.parents
    found: list[list[int]] = parents.tolist() if parents.ndim == 2 else [parents.tolist()] * len(drafted.tokens)
    return found


class _State(NamedTuple):
    """Where decoding stands; the last four are arguments of `TreeDrafter`."""

    cache: Any
    hidden: Tensor
    following: Tensor
    mask: Tensor | None
    positions: Tensor


@torch.no_grad()
def decode_trees(
    target: CausalLM,
    drafter: TreeDrafter,
    verdicts: Verdicts,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    sampler: Sampler,
    mask: Bool[Tensor, "batch time"] | None,
    generator: torch.Generator | None,
    stop_tokens: Sequence[int],
) -> GenerationResult:
    """Drafts a tree, has the target see it in one pass, keeps the branch that is accepted, and so on.

    Args:
        target: writes the text.
        drafter: guesses; not used before.
        verdicts: decides which branch stays.
        input_ids: [batch, time], int64.
        max_new_tokens: of each row.
        sampler: of the first token.
        mask: [batch, time], False at padding on the left.
        generator: draws the first token.
        stop_tokens: ids that end a row.

    Returns:
        The new tokens. `accepted` and `drafted` count nodes without the root.

    Raises:
        ValueError: as of `mlreviews.models.generate`.
        TypeError: ids are not int64.
    """
    check_prompt(target, input_ids, max_new_tokens, mask, "target")
    stops = Stops(len(input_ids), max_new_tokens, stop_tokens)
    counts: tuple[list[list[int]], list[list[int]]] = ([], [])
    if stops.done:
        return stops.result(0, *counts)
    context = input_ids if mask is None else input_ids.masked_fill(~mask, -1)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    out = target(input_ids, mask=mask, positions=positions, hidden_states=True)
    first = sampler.sample(out.logits[:, -1], context, generator)[:, None]
    for row, token in enumerate(first.tolist()):
        stops.add(row, token)
    state = _State(out.cache, _last(out.hidden_states), torch.cat([input_ids[:, 1:], first], 1), mask, positions)
    while not stops.done:
        offer = _offer(drafter, state, max(map(stops.left, range(stops.batch))) - 1)
        start = state.positions[..., -1:] + 1
        at = start + offer.tree.depth
        if target.max_length is not None:  # rows that end before the others have guesses beyond their budget
            at = at.clamp(max=target.max_length - 1)
        previous = None
        if sampler.repetition_penalty != 1.0:
            previous = _before(context, offer)
        out = target(offer.tokens, state.cache, positions=at, tree=offer.tree.mask, hidden_states=True)
        found, ended, tokens = verdicts(out.logits, offer, previous), list(stops.ended), offer.tokens.tolist()
        news = [[*(tokens[row][node] for node in path[1:]), token] for row, (path, token) in enumerate(found)]
        taken = [stops.add(row, new) for row, new in enumerate(news)]
        accepted = [min(len(new) - 1, kept) for new, kept in zip(news, taken, strict=True)]
        counts[0].append([-1 if end else count for end, count in zip(ended, accepted, strict=True)])
        counts[1].append([-1 if end else len(tokens[0]) - 1 for end in ended])
        if not stops.done:
            paths = [[] if end else path for end, (path, _) in zip(stops.ended, found, strict=True)]
            news = [[] if end else new for end, new in zip(stops.ended, news, strict=True)]
            state = _advanced(state.cache.length, out, start, paths, news)
            if previous is not None:
                added = [[row[0], *new[:-1]] for row, new in zip(tokens, news, strict=True)]
                context = torch.cat([context, _filled(added, -1, context)], 1)
    return stops.result(1 + len(counts[0]), *counts)


def _offer(drafter: TreeDrafter, state: _State, height: int) -> Drafted:
    """A tree no higher than what is left of the budget, of the root alone if need be."""
    if height > 0:
        return drafter(*state[1:], min(height, drafter.height))
    return Drafted(state.following[:, -1:], TokenTree.of(state.following.new_tensor([-1])))


def _advanced(seen: int, out: Any, start: Tensor, paths: list[list[int]], news: list[list[int]]) -> _State:
    """The state after the accepted nodes: rows that keep fewer of them are filled up on the left."""
    hidden = _last(out.hidden_states)
    longest = max(map(len, paths))
    lengths = torch.tensor([len(path) for path in paths], device=hidden.device)[:, None]
    index, following = (_filled(lists, 0, lengths) for lists in (paths, news))
    steps = torch.arange(longest, device=hidden.device)
    if all(path == list(range(longest)) for path in paths):
        cache = out.cache.crop(seen + longest)
        return _State(cache, hidden[:, :longest], following, None, start + steps)
    mask, positions = None, start + steps
    if not all(len(path) == longest for path in paths):
        mask = steps >= longest - lengths
        positions = (positions - (longest - lengths)).clamp(min=0)
    rows = torch.arange(len(paths), device=hidden.device)[:, None]
    return _State(out.cache.keep(seen, index, mask), hidden[rows, index], following, mask, positions)


def _filled(lists: list[list[int]], fill: int, like: Tensor) -> Tensor:
    """[rows, longest] of lists, filled up on the left."""
    longest = max(map(len, lists))
    return like.new_tensor([[fill] * (longest - len(row)) + row for row in lists])


def _before(context: Tensor, offer: Drafted) -> Tensor:
    """[batch, tree, time]: the context of a row, and the branch of each of its nodes."""
    nodes = offer.tokens.shape[1]
    branches = offer.tokens[:, None].expand(-1, nodes, -1).masked_fill(~offer.tree.mask, -1)
    return torch.cat([context[:, None].expand(-1, nodes, -1), branches], 2)


def _last(hidden_states: Any) -> Tensor:
    found: Tensor = hidden_states[-1]
    return found
