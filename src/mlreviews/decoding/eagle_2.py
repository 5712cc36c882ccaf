r"""EAGLE-2: the drafter's own confidence decides which shape the tree of guesses has, anew for each context.

Paper: EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees (arXiv:2406.16858).

A drafter of EAGLE is well calibrated: a guess of probability 0.9 is accepted about nine times of ten. So the product of
the probabilities on the way to a node estimates how probable it is that the node is accepted, and the tree is grown
where that is large: the best nodes of a level are run to give the next one, and in the end the best nodes of all levels
stay. Easy text gets long branches, and hard text many short ones. No training is needed besides EAGLE's.

Equation:
    $$ V_i = \prod_{j \in \mathrm{path}(i)} q(x_j \mid \text{branch before } j) \tag{1} $$
    Expansion: of each level the k nodes of largest V are run, each gives its k likeliest children. Reranking: of all
    nodes the m of largest V stay; a child's V is at most its parent's, and of equal ones the nearer to the root counts
    as larger, so that they make a tree.

Symbols:
    V: [batch, nodes], values of the nodes; here their logarithms.
    q: the drafter's distribution, at temperature 1.

Defaults:
    top_k: 10 (section 5).
    depth: 6 (section 5).
    total_tokens: 60 (section 5, 7B models; 50 for 13B, 48 for 70B).
    sampler: greedy (ours).

Deviations:
    1. Above temperature 0 the token after a node is drawn from the target's distribution, and the child that holds it
       is taken (`mlreviews.decoding.verify_top_tree`). The authors' code asks the children one after another, with
       the probability of each among what is left, which is the same law.
    2. The q of (1) stays at temperature 1 whatever the sampler; the law of the text doesn't hang on it.

Reduces to:
    eagle: a chain, with top_k = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlreviews.common.checks import check_count
from mlreviews.decoding.eagle import EagleDraft, FeatureDrafter, check_width
from mlreviews.decoding.trees import Drafted, TokenTree, decode_trees, exact_verdicts
from mlreviews.models import CausalLM, GenerationResult, Sampler

__all__ = ["DynamicDraftTree", "eagle2_generate", "rerank_tree"]


def rerank_tree(
    values: Float[Tensor, "batch nodes"], parents: Int[Tensor, "batch nodes"], m: int
) -> tuple[Int[Tensor, "batch kept"], Int[Tensor, "batch kept"]]:
    """The nodes of largest value, which make a tree where no child's value is above its parent's.

    Args:
        values: log V of the nodes; node 0 is the root.
        parents: of each node, before it; -1 of the root.
        m: how many stay besides the root; all where there are fewer.

    Returns:
        The nodes that stay in their old order, the root first, and where among them their parents are.

    Raises:
        ValueError: m is below 1.
    """
    check_count("m", m)
    # of equal values the earlier node, which is nearer to the root, comes first
    best = values[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, :m] + 1
    kept = torch.cat([torch.zeros_like(best[:, :1]), best.sort(1).values], 1)
    place = torch.zeros_like(parents).scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    above = parents.gather(1, kept)
    return kept, place.gather(1, above.clamp(min=0)).masked_fill(above < 0, -1)


class DynamicDraftTree(FeatureDrafter):
    """Grows trees with a drafter of EAGLE; `mlreviews.decoding.trees.TreeDrafter`.

    Args:
        target: whose embedding and head the drafter uses.
        draft: the layer.
        top_k: nodes of a level that are run, and children of each.
        depth: height of the trees.
        total_tokens: nodes that stay, the root not counted.
    """

    def __init__(
        self, target: CausalLM, draft: EagleDraft, top_k: int = 10, depth: int = 6, total_tokens: int = 60
    ) -> None:
        for name, value in (("top_k", top_k), ("depth", depth), ("total_tokens", total_tokens)):
            check_count(name, value)
        check_width(target, draft)
        super().__init__(target, draft)
        self.top_k, self.height, self.total_tokens = min(top_k, target.vocab_size), depth, total_tokens

    def __call__(
        self, hidden: Tensor, following: Tensor, mask: Tensor | None, positions: Tensor, height: int
    ) -> Drafted:
        """See `TreeDrafter`."""
        tokens, values, parents = self.expand(hidden, following, mask, positions, height)
        kept, above = rerank_tree(values, parents, self.total_tokens)
        return Drafted(tokens.gather(1, kept), TokenTree.of(above))

    def expand(
        self, hidden: Tensor, following: Tensor, mask: Tensor | None, positions: Tensor, height: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All nodes that were looked at, level by level: tokens, log V and parents, [batch, nodes] each."""
        features, logits = self.begin(hidden, following, mask, positions)
        cache, k = self.cache, self.top_k
        assert cache is not None
        root = following[:, -1:]
        tokens, values, parents = [root], [logits.new_zeros(root.shape)], [torch.full_like(root, -1)]
        run_nodes = torch.zeros_like(root)  # the numbers of the nodes that were run last, and their values
        run_values, seen = values[0], None
        size = 1
        for depth in range(1, height + 1):
            guess = logits.log_softmax(-1).topk(k, -1)
            tokens.append(guess.indices.flatten(1))
            values.append((guess.values + run_values[..., None]).flatten(1))
            parents.append(run_nodes.repeat_interleave(k, 1))
            if depth == height:
                break
            best = values[-1].topk(k, 1)
            above = best.indices // k
            own = torch.eye(k, dtype=torch.bool, device=root.device).expand(len(root), -1, -1)
            seen = own if seen is None else torch.cat([_rows(seen, above), own], 2)
            features, logits, cache = self.extend(
                _rows(features, above), tokens[-1].gather(1, best.indices), cache, positions[..., -1:] + depth, seen
            )
            run_nodes, run_values = size + best.indices, best.values
            size += tokens[-1].shape[1]
        return torch.cat(tokens, 1), torch.cat(values, 1), torch.cat(parents, 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """[batch, chosen, ...] of x [batch, rows, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


@torch.no_grad()
def eagle2_generate(
    target: CausalLM,
    draft: EagleDraft,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    top_k: int = 10,
    depth: int = 6,
    total_tokens: int = 60,
    sampler: Sampler = Sampler(),
    mask: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Sequence[int] = (),
) -> GenerationResult:
    """Continues each row of a batch as `mlreviews.models.generate` does, with the same law, in fewer passes.

    Args:
        target: writes the text.
        draft: a layer trained on the target's features.
        input_ids: [batch, time], int64.
        max_new_tokens: of each row.
        top_k: nodes of a level that are run, and children of each.
        depth: height of the trees.
        total_tokens: nodes that stay.
        sampler: of the target.
        mask: [batch, time], False at padding on the left of shorter rows.
        generator: draws; None is the global one.
        stop_tokens: ids that end a row.

    Returns:
        The new tokens; `accepted` and `drafted` count the nodes of each tree without its root.

    Raises:
        ValueError: as of `generate`, a number below 1, or the features have another size.
        TypeError: ids are not int64.
    """
    return decode_trees(
        target,
        DynamicDraftTree(target, draft, top_k, depth, total_tokens),
        exact_verdicts(sampler, generator),
        input_ids,
        max_new_tokens,
        sampler=sampler,
        mask=mask,
        generator=generator,
        stop_tokens=stop_tokens,
    )
