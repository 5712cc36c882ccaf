r"""EAGLE: a layer that goes on with the target's own features drafts a tree, and the target verifies it in one pass.

Paper: EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty (arXiv:2401.15077).

The feature of a token is the target's last hidden state, from which its head makes the logits. One decoder layer
predicts the next feature from the features so far and the tokens one ahead of them: which token was sampled is what a
feature can't know of its successor. The target's own embedding and head turn tokens into inputs and predicted features
into guesses. The guesses make a tree, the target sees all its branches in one pass, and recursive rejection keeps one
of them so that the text follows the target's law.

Equation:
    $$ \hat f_{j+1} = \mathrm{Layer}\bigl(W_\mathrm{fc}\,[\,e(x_{j+1}); f_j\,] + b\bigr), \qquad
       q(\cdot \mid x_{\le j+1}) = \mathrm{softmax}(\mathrm{Head}(\hat f_{j+1})) \tag{1} $$
    $$ L = \mathrm{SmoothL1}(f_{j+1}, \hat f_{j+1}) + w_\mathrm{cls}\,
       \mathrm{CE}\bigl(\mathrm{softmax}(\mathrm{Head}(f_{j+1})), q\bigr) \tag{2} $$
    Children $c_1, c_2, \dots$ of a node are drawn from $q$ without replacement, and judged in this order, from
    $p_1 = p$ and $q_1 = q$ on:
    $$ \Pr(\text{accept } c_i) = \min\bigl(1, p_i(c_i) / q_i(c_i)\bigr), \qquad
       p_{i+1} \propto \max(0, p_i - q_i), \qquad q_{i+1} \propto q_i\,[x \ne c_i] \tag{3} $$
    Where all of them are rejected, the next token is drawn from the last $p_i$. Each $c_i$ has the law $q_i$ given
    those before it, so that each trial is one of speculative sampling, with target $p_i$ and draft $q_i$: accepted or
    not, the token has the law $p_i$, whatever q is. The q of (3) has to be what the children were drawn from: for
    children that are simply the likeliest these are point masses, $q_i = [x = c_i]$, and (3) becomes: draw from p, and
    take the child that holds what was drawn (`verify_top_tree`).

Symbols:
    f: [batch, time, d_model], features, the target's last hidden states after its last norm.
    x: [batch, time], tokens; e their embeddings.
    p: [tree, vocab], the target's distribution after each node of a tree, after temperature, top-k and top-p.
    q: [tree, vocab], the drafter's, likewise.

Defaults:
    tree: 25 nodes, 5 high (the authors' code).
    w_cls: 0.1 (section 4).
    noise: uniform in ± 0.1 on the features in training (section 4; the authors' code divides by length / 512).
    sampler: greedy (ours).

Deviations:
    1. Greedy decoding takes the likeliest children, and the child that holds the largest logit: nothing is drawn.
    2. In a row that keeps fewer tokens than another one of its batch, what is too short is filled up and masked.
    3. Queries, keys and values come from one matrix, and both inputs of the SwiGLU from one: the same, in fewer calls.
    4. "Same law" means: when the pass over a tree and the one over a token give the same logits. In floating point the
       last bits differ, so that greedy text may differ from plain decoding's where two logits are that close: to about
       1e-6 in float32, 1e-2 in bfloat16.

Reduces to:
    speculative-decoding: the tree is a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count
from mlreviews.common.layers import linear
from mlreviews.decoding.trees import (
    Drafted,
    Found,
    RankTree,
    TokenTree,
    TrainedDrafter,
    Verdicts,
    decode_trees,
    exact_verdicts,
    parents_of_rows,
)
from mlreviews.models import CausalLM, GenerationResult, KVCache, Sampler, draw, flip

__all__ = ["EAGLE_TREE", "EagleDraft", "draw_children", "eagle_generate", "eagle_loss", "verify_tree"]

EAGLE_TREE = RankTree(
    [
        *[(0,), (1,), (2,), (3,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)],
        *[(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)],
        *[(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 0, 0), (0, 0, 0, 0, 1)],
    ]
)


class EagleDraft(TrainedDrafter):
    """The layer of (1): attention and SwiGLU as in Llama, without the first norm. Written for few calls of torch.

    Args:
        d_model: size of a feature, and of an embedding.
        heads: of the queries.
        kv_heads: of keys and values; None is `heads`.
        hidden: units of the SwiGLU; None is 8/3 d_model, rounded up to a multiple of 16.
        norm_eps: of RMSNorm.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: sizes that don't go together.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        hidden: int | None = None,
        norm_eps: float = 1e-6,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.tree = EAGLE_TREE
        kv_heads = heads if kv_heads is None else kv_heads
        hidden = -(-8 * d_model // 48) * 16 if hidden is None else hidden
        sizes = {"d_model": d_model, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
        for name, size in sizes.items():
            check_count(name, size)
        if d_model % (2 * heads):
            raise ValueError(f"heads: expected heads of an even size, got {d_model} / {heads}")
        if heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads {heads}, got {kv_heads}")
        self.config = {**sizes, "norm_eps": norm_eps}
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, d_model // heads
        self.fc = linear(2 * d_model, d_model, generator=generator)
        self.qkv_proj = linear(d_model, (heads + 2 * kv_heads) * self.head_dim, bias=False, generator=generator)
        self.o_proj = linear(d_model, d_model, bias=False, generator=generator)
        self.post_attention_layernorm = nn.RMSNorm(d_model, eps=norm_eps)
        self.gate_up_proj = linear(d_model, 2 * hidden, bias=False, generator=generator)
        self.down_proj = linear(hidden, d_model, bias=False, generator=generator)

    def forward(
        self,
        features: Float[Tensor, "batch time d_model"],
        embeddings: Float[Tensor, "batch time d_model"],
        cache: KVCache | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*#batch #time"] | None = None,
        seen: Bool[Tensor, "*#batch time all_time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], KVCache]:
        """Predicts the feature after each.

        Args:
            features: [batch, time, d_model].
            embeddings: [batch, time, d_model], of the token after each of them.
            cache: of an earlier call; it stays as it is.
            mask: [batch, time], False at padding.
            positions: [time] or [batch, time], of the features; None counts on from the cache.
            seen: [time, past + time] or [batch, time, past + time], True where one of these sees another one; None:
                all before it. Padding is not seen in any case.

        Returns:
            The predicted features, and the cache with these tokens behind.
        """
        past, time = 0 if cache is None else cache.length, features.shape[1]
        x = self.fc(torch.cat([embeddings, features], -1))
        heads = self.qkv_proj(x).unflatten(2, (-1, self.head_dim))
        if positions is None:
            positions = torch.arange(past, past + time, device=x.device)
        turned = _rotated(heads[:, :, : -self.kv_heads], positions)
        keys, values = turned[:, :, self.heads :], heads[:, :, -self.kv_heads :]
        cache = KVCache(keys, values, mask) if cache is None else cache.append(keys, values, mask)
        if seen is None and time > 1:
            seen = torch.ones(time, past + time, dtype=torch.bool, device=x.device).tril(past)
        if cache.mask is not None:
            # Padding sees itself, for a softmax over nothing is no number.
            own = torch.eye(time, dtype=torch.bool, device=x.device)
            seen = cache.mask[:, None] if seen is None else seen & cache.mask[:, None]
            seen = torch.cat([seen[..., :past].expand(-1, time, -1), seen[..., past:] | own], 2)
        mixed = nn.functional.scaled_dot_product_attention(
            turned[:, :, : self.heads].transpose(1, 2),
            cache.keys.transpose(1, 2),
            cache.values.transpose(1, 2),
            attn_mask=seen if seen is None or seen.ndim == 2 else seen[:, None],
            enable_gqa=True,
        )
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, -1)
        return x + self.down_proj(nn.functional.silu(gate) * up), cache


def _rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (base 10,000) as `mlreviews.common.rotary` has them, in a third of the calls."""
    half = x.shape[3] // 2
    frequencies = torch.exp(torch.arange(half, device=x.device) * (-9.210340371976184 / half))
    angles = positions[..., None, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x.chunk(2, -1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], -1)


def eagle_loss(
    predicted: Float[Tensor, "batch time d_model"],
    features: Float[Tensor, "batch time d_model"],
    lm_head: nn.Module,
    w_cls: float = 0.1,
) -> Float[Tensor, ""]:
    """The loss (2), the mean over the tokens.

    Args:
        predicted: of the drafter.
        features: the target's for the same tokens; nothing is learnt through them.
        lm_head: the target's head, frozen.
        w_cls: weight of the cross-entropy, in nats.
    """
    features = features.detach()
    regression = nn.functional.smooth_l1_loss(predicted, features)
    expected = lm_head(features).flatten(0, -2).softmax(-1)
    return regression + w_cls * nn.functional.cross_entropy(lm_head(predicted).flatten(0, -2), expected.detach())


def draw_children(
    q: Float[Tensor, "*batch vocab"], width: int, generator: torch.Generator | None = None
) -> Int[Tensor, "*batch width"]:
    """Tokens drawn one after another without replacement, all at once: those whose exponential clocks ring first.

    Args:
        q: probabilities; need not be normalised. After all tokens that have any, others follow.
        width: how many.
        generator: draws; None is the global one.
    """
    # float64: a uniform draw that comes out as 0 would be a clock that has rung already
    return (q / torch.empty_like(q).exponential_(generator=generator)).topk(width, -1).indices


def verify_tree(
    p: Float[Tensor, "tree vocab"],
    q: Float[Tensor, "tree vocab"],
    tokens: Sequence[int],
    parents: Sequence[int],
    generator: torch.Generator | None = None,
) -> tuple[list[int], int]:
    """Recursive rejection (3): which branch of a tree is accepted whose children were drawn from q, none twice.

    Args:
        p: the target's distribution after each node.
        q: what each node's children were drawn from.
        tokens: of each node.
        parents: of each node; siblings in the order in which they were drawn.
        generator: draws; None is the global one.

    Returns:
        The accepted nodes, the root first, and the token after the last of them.
    """
    children: list[list[int]] = [[] for _ in tokens]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    path = [0]
    while True:
        rest, law = p[path[-1]], q[path[-1]]
        for node in children[path[-1]]:
            token = tokens[node]
            if not law[token] > 0:  # q had no tokens left to draw
                continue
            if bool(flip(rest[token] / law[token], generator)):
                path.append(node)
                break
            rest, law = _residual(rest, law, token)
        else:
            return path, int(draw(rest, generator))


def _residual(p: Tensor, q: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """The next p and q of (3), after the token was rejected."""
    left = (p - q).clamp(min=0)
    total, others = left.sum(), q.clone()
    others[token] = 0
    # p = q is never rejected but for rounding
    return (left / total if total > 0 else p), others / others.sum().clamp(min=torch.finfo(q.dtype).tiny)


def eagle_verdicts(sampler: Sampler, generator: torch.Generator | None) -> Verdicts:
    """`verify_tree` with the sampler's distributions."""

    def verdicts(logits: Tensor, drafted: Drafted, previous: Tensor | None) -> Found:
        p = sampler.probabilities(logits, previous)
        # the root alone, at the end of the budget, has no children that were drawn
        q = p if drafted.q is None else drafted.q
        rows = zip(p, q, drafted.tokens.tolist(), parents_of_rows(drafted), strict=True)
        return [verify_tree(*row, generator) for row in rows]

    return verdicts


class _Level(NamedTuple):
    """How the nodes of a level come from those of the level above that have children.

    Attributes:
        width: how many guesses are needed of each node above.
        source: [nodes], place of each among all guesses.
        grown: [parents], places in the level of the nodes with children themselves.
        above: [parents], the place above from which these came.
        seen: [parents, nodes run so far but the root], which of these they see; None: all.
    """

    width: int
    source: Tensor
    grown: Tensor
    above: Tensor
    seen: Tensor | None


class _Plan(NamedTuple):
    """How a `RankTree` is drafted: level by level, and then put into the order of its nodes.

    Attributes:
        shape: of the tree.
        levels: from the root's children on.
        order: [tree], place of each node among the root and the levels one after another.
        expanded: [parents], nodes with children in the order in which they are run.
    """

    shape: TokenTree
    levels: list[_Level]
    order: Tensor
    expanded: Tensor

    @classmethod
    def of(cls, tree: RankTree, device: torch.device) -> _Plan:
        def tensor(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        number = {path: i for i, path in enumerate([(), *tree.choices])}
        inner = {path[:-1] for path in tree.choices}
        levels: list[_Level] = []
        above: list[tuple[int, ...]] = [()]
        run, placed = list(above), list(above)
        for height in range(1, tree.height + 1):
            nodes = [path for path in tree.choices if len(path) == height]
            place = {path: i for i, path in enumerate(above)}
            width = 1 + max(path[-1] for path in nodes)
            grown = [i for i, path in enumerate(nodes) if path in inner]
            above = [nodes[i] for i in grown]
            run += above
            seen = [[node[: len(other)] == other for other in run[1:]] for node in above]
            levels.append(
                _Level(
                    width,
                    tensor([place[path[:-1]] * width + path[-1] for path in nodes]),
                    tensor(grown),
                    tensor([place[path[:-1]] for path in above]),
                    None if all(map(all, seen)) else torch.tensor(seen, device=device),
                )
            )
            placed += nodes
        position = {path: i for i, path in enumerate(placed)}
        order = tensor([position[path] for path in number])
        expanded = tensor([number[path] for path in run])
        shape = tree.shape.to(device)
        return cls(shape, levels, order, expanded)


class FeatureDrafter:
    """An `EagleDraft` while it goes along with a text: its cache, and the passes it makes.

    Args:
        target: whose embedding and head it uses.
        draft: the layer.
    """

    def __init__(self, target: CausalLM, draft: EagleDraft) -> None:
        self.target, self.draft = target, draft
        self.cache: KVCache | None = None

    def begin(self, hidden: Tensor, following: Tensor, mask: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the target's new features in; the feature predicted after the root [batch, 1, d_model], its logits."""
        features, self.cache = self.draft(
            hidden, self.target.embed_tokens(following), self.cache, mask=mask, positions=positions
        )
        features = features[:, -1:]
        return features, self.target.lm_head(features)

    def extend(
        self, features: Tensor, tokens: Tensor, cache: KVCache, positions: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor, KVCache]:
        """The features after drafted tokens, their logits, and the cache; `seen` is of the drafted tokens alone.

        None is for a token by itself that sees everything.
        """
        if seen is not None:
            everything = seen.new_ones(*seen.shape[:-1], cache.length + features.shape[1] - seen.shape[-1])
            seen = torch.cat([everything, seen], -1)
        features, cache = self.draft(
            features,
            self.target.embed_tokens(tokens),
            cache,
            positions=positions,
            seen=seen,
        )
        return features, self.target.lm_head(features), cache


class EagleDrafter(FeatureDrafter):
    """Drafts trees of one shape.

    Args:
        target: whose embedding and head it uses.
        draft: the layer.
        tree: the shape.
        sampler: of q; where it is greedy the likeliest children are taken.
        generator: draws children.
    """

    def __init__(
        self,
        target: CausalLM,
        draft: EagleDraft,
        tree: RankTree,
        sampler: Sampler,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(target, draft)
        self.tree, self.sampler, self.generator, self.height = tree, sampler, generator, tree.height
        self.plans: dict[int, _Plan] = {}

    def __call__(
        self, hidden: Tensor, following: Tensor, mask: Tensor | None, positions: Tensor, height: int
    ) -> Drafted:
        """See `TreeDrafter`."""
        if height not in self.plans:
            self.plans[height] = _Plan.of(self.tree.cut(height), hidden.device)
        plan = self.plans[height]
        features, logits = self.begin(hidden, following, mask, positions)
        cache = self.cache
        assert cache is not None
        tokens, laws = [following[:, -1:]], []
        for depth, level in enumerate(plan.levels, 1):
            guesses, law = self._guesses(logits, level.width)
            laws.append(law)
            tokens.append(guesses.flatten(1)[:, level.source])
            if len(level.grown):
                features, logits, cache = self.extend(
                    features[:, level.above],
                    tokens[-1][:, level.grown],
                    cache,
                    positions[..., -1:] + depth,
                    level.seen,
                )
        return Drafted(torch.cat(tokens, 1)[:, plan.order], plan.shape, self._spread(laws, plan))

    def _guesses(self, logits: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
        if self.sampler.greedy:
            return logits.topk(width, -1).indices, None
        q = self.sampler.probabilities(logits)
        return draw_children(q, width, self.generator), q

    def _spread(self, laws: list[Tensor | None], plan: _Plan) -> Tensor | None:
        """[batch, tree, vocab] of the distributions of those nodes that have children."""
        known = [law for law in laws if law is not None]
        if not known:
            return None
        q = torch.cat(known, 1)
        return q.new_zeros(q.shape[0], len(plan.order), q.shape[2]).index_copy_(1, plan.expanded, q)


@torch.no_grad()
def eagle_generate(
    target: CausalLM,
    draft: EagleDraft,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    tree: RankTree | None = None,
    sampler: Sampler = Sampler(),
    mask: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Sequence[int] = (),
) -> GenerationResult:
    """Continues each row of a batch as `mlreviews.models.generate` does, with the same law, in fewer passes.

    Args:
        target: writes the text.
        draft: a layer trained on the target's features; one that isn't costs speed alone.
        input_ids: [batch, time], int64.
        max_new_tokens: of each row.
        tree: shape of the drafts; None is the drafter's own.
        sampler: of the target, and of the drafter.
        mask: [batch, time], False at padding on the left of shorter rows.
        generator: draws; None is the global one.
        stop_tokens: ids that end a row.

    Returns:
        The new tokens; `accepted` and `drafted` count the nodes of each tree without its root.

    Raises:
        ValueError: as of `generate`, or the features have another size.
        TypeError: ids are not int64.
    """
    check_width(target, draft)
    drafter = EagleDrafter(target, draft, draft.tree if tree is None else tree, sampler, generator)
    rule = exact_verdicts if sampler.greedy else eagle_verdicts
    return decode_trees(
        target,
        drafter,
        rule(sampler, generator),
        input_ids,
        max_new_tokens,
        sampler=sampler,
        mask=mask,
        generator=generator,
        stop_tokens=stop_tokens,
    )


def check_width(target: CausalLM, draft: EagleDraft) -> None:
    """Raises ValueError unless the target's embeddings have the drafter's size."""
    expected, came = target.embed_tokens.weight.shape[1], draft.fc.out_features
    if expected != came:
        raise ValueError(f"draft: expected features of size {expected}, as the target has, got {came}")
