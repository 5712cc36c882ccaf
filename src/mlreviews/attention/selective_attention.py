r"""Selective attention: tokens decide which earlier tokens are of no use from now on, for all later ones.

Paper: Selective Attention Improves Transformer (arXiv:2410.02703)

In a standard transformer a token can't tell those that follow that a third one has become irrelevant. Here the logits
of one head are taken for such a judgement: where they are positive, they are added up over the tokens so far, and
subtracted from the logits of all heads. No parameter is added. What has been masked a lot can be dropped from the cache
of keys and values, down to a budget for each layer, and a term of the loss makes models forget more.

Equation:
    With the logits $L_h = Q_h K_h^\top / \sqrt d$ of each head h, and s the head that selects:
    $$ S_{ij} = \max(L_{s,ij}, 0) \text{ for } 0 < j < i, \text{ else } 0, \qquad
       F_{ij} = \sum_{i' < i} S_{i'j}, \qquad O_h = \operatorname{softmax}(L_h - F)\, V_h. \tag{1} $$
    Nobody selects himself, nor the first token; what a token selects counts from the next token on.
    The tokens that query i has in memory, and the term of the loss, for N layers and n tokens without padding:
    $$ M_i = \sum_{j \le i} \Bigl(1 - \frac{\min(F_{ij}, \tau)}{\tau}\Bigr), \qquad
       \mathcal{L} = \mathcal{L}_{LM} + \frac{\epsilon}{N n} \sum_{l = 1}^{N} \max_i M_i^{(l)}. \tag{2} $$
    With a budget K, query i attends to K tokens at most: before it comes in, tokens with the largest $F_{ij}$ leave
    the cache for good, until K - 1 are left. The budgets of the layers are found greedily: each step takes a constant
    number of tokens from that layer where it costs least perplexity.

Symbols:
    Q_h, K_h, V_h: [time, d], queries, keys and values of a head, after RoPE.
    S: [time, time], what each token (row) selects.
    F: [time, time], by how much the logits of a query (row) for each key (column) are reduced; float32 at least.
    K: how many tokens a layer's cache holds, the present one and the first one among them; 2 at least.
    tau: a token with F >= tau counts as forgotten.

Defaults:
    selector: 0, the head that selects (the paper's listing).
    tau: 1 (the paper's memory loss).
    epsilon: 0.1, to be applied by the caller (the paper's memory loss).

Deviations:
    1. The first column of S is 0 in the paper because it holds BOS; here it is the first token, whatever it is, and in
       a padded row the first one that is not padding.
    2. Among tokens that are selected equally, such as not at all, the oldest leaves the cache.
    3. A shortened cache can't be taken back to an earlier length: F at that time is gone. Branches keep the old cache.

Reduces to:
    torch.nn.functional.scaled_dot_product_attention: no logit of the selecting head is positive; with a budget then of
        the first token and the window of the last K - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number, check_sequence
from mlreviews.models.attention import CausalAttention, KVCache
from mlreviews_kernels.selective_attention import selective_attention_with_memory

__all__ = [
    "BudgetStep",
    "SelectiveAttention",
    "SelectiveCache",
    "accumulated_selection",
    "keys_within_budget",
    "memory_loss",
    "memory_size",
    "search_budgets",
    "selection_mask",
    "set_budgets",
]

QUERIES = 64  # in a block, where tokens leave the cache between one query and the next


def selection_mask(logits: Float[Tensor, "batch time time"]) -> Float[Tensor, "batch time time"]:
    """F of eq. (1), for reading, measuring and drawing. The layer never forms it.

    Args:
        logits: [batch, time, time], of the head that selects: a query a row, a key a column.
    """
    return accumulated_selection(logits)[:, :-1]


def accumulated_selection(
    logits: Float[Tensor, "batch q_time k_time"],
    initial: Float[Tensor, "batch k_time"] | None = None,
    mask: Bool[Tensor, "batch k_time"] | None = None,
) -> Float[Tensor, "batch q_time_plus_1 k_time"]:
    """F of every query, and in the last row that of the query that would follow.

    Args:
        logits: [batch, q_time, k_time], of the head that selects, for the last q_time tokens.
        initial: [batch, k_time], F of the first query; zeros if None.
        mask: [batch, k_time], True for tokens that count; all of them if None.

    Raises:
        ValueError: there are more queries than keys.
    """
    batch, queries, keys = logits.shape
    if queries > keys:
        raise ValueError(f"logits: expected no more queries than keys, got shape {tuple(logits.shape)}")
    if mask is None:
        mask = logits.new_ones(batch, keys, dtype=torch.bool)
    if initial is None:
        initial = logits.new_zeros(batch, keys)
    selects = mask[:, keys - queries :, None] & (mask & ~_first(mask))[:, None]
    S = logits.relu().masked_fill(~selects, 0.0).tril(keys - queries - 1)
    return torch.cat([initial[:, None], S], 1).cumsum(1)


def memory_size(F: Float[Tensor, "batch time time"], tau: float = 1.0) -> Float[Tensor, "batch time"]:
    """M of eq. (2): how many tokens each query has in memory, those half forgotten counted half.

    Args:
        F: [batch, time, time], of `selection_mask`.
        tau: positive.
    """
    check_number("tau", tau, above=0.0)
    return (1.0 - F.clamp(max=tau) / tau).tril().sum(-1)


def keys_within_budget(
    F: Float[Tensor, "batch q_time k_time"], budget: int, mask: Bool[Tensor, "batch k_time"] | None = None
) -> tuple[Bool[Tensor, "batch q_time k_time"], Bool[Tensor, "batch k_time"]]:
    """Which tokens are in the cache for each query, and which are after the last one.

    Args:
        F: [batch, q_time, k_time], for the last q_time tokens.
        budget: how many tokens the cache holds, 2 at least.
        mask: [batch, k_time], True for tokens that count: padding leaves the cache before anything else does.

    Raises:
        ValueError: budget is below 2, or there are more queries than keys.
    """
    check_count("budget", budget, least=2)
    batch, queries, keys = F.shape
    if queries > keys:
        raise ValueError(f"F: expected no more queries than keys, got shape {tuple(F.shape)}")
    mask = F.new_ones(batch, keys, dtype=torch.bool) if mask is None else mask
    priority = F.masked_fill(~mask[:, None], torch.inf).masked_fill(_first(mask)[:, None], -torch.inf)
    held = torch.ones_like(mask)
    seen = []
    for i, past in enumerate(range(keys - queries, keys)):
        # The first query may find too many, such as a cache made under a larger budget; each further one adds one.
        excess = max(0, (past if i == 0 else min(past, budget)) + 1 - budget)
        if excess:
            candidates = priority[:, i, :past].masked_fill(~held[:, :past], -torch.inf)
            # Of equals the first is found, that is the oldest.
            found = (
                candidates.argsort(dim=1, descending=True, stable=True) if excess > 1 else candidates.argmax(1, True)
            )
            held = held.scatter(1, found[:, :excess], False)
        seen.append(held)
    return torch.stack(seen, 1).tril(keys - queries), held


def _first(mask: Tensor) -> Tensor:
    """[batch, time], True at the first token of each row that counts."""
    return mask & (mask.cumsum(1) == 1)


class SelectiveCache(NamedTuple):
    """Keys and values of the tokens that are still held, and what has been selected of them. A value, not a container.

    Attributes:
        kept: of the tokens held, oldest first.
        selection: [batch, held], F of the next query, float32 at least.
        memory: [batch], the largest M so far, in tokens.
        length: how many tokens there have been, padding and dropped ones included.
    """

    kept: KVCache
    selection: Tensor
    memory: Tensor
    length: int

    def rows(self, index: Int[Tensor, " rows"]) -> SelectiveCache:
        """The given rows of the batch, in that order; a row may be taken several times.

        Args:
            index: [rows], int64.
        """
        return SelectiveCache(self.kept.rows(index), self.selection[index], self.memory[index], self.length)


class SelectiveAttention(CausalAttention):
    """A standard layer with eq. (1), and with a cache that can be limited. It has the standard layer's parameters.

    Args:
        d_model: size of a token's vector.
        heads: of the queries.
        kv_heads: of keys and values; a divisor of `heads`; None is `heads`.
        layer: which block of a model this is; nothing depends on it.
        rope_base: of the rotary embedding; None leaves positions out.
        selector: the head that selects.
        tau: of eq. (2).
        budget: how many tokens the cache holds, 2 at least; None is all. Can be changed at any time, see `set_budgets`.
        generator: draws the weights; None is the global one.

    Raises:
        ValueError: a size below 1, sizes that don't divide, an odd head size with RoPE, no such head, or tau <= 0.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        layer: int = 0,
        rope_base: float | None = 10000.0,
        selector: int = 0,
        tau: float = 1.0,
        budget: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d_model, heads, kv_heads=kv_heads, layer=layer, rope_base=rope_base, generator=generator)
        if not 0 <= selector < heads:
            raise ValueError(f"selector: expected a head from 0 to {heads - 1}, got {selector}")
        check_number("tau", tau, above=0.0)
        self.selector, self.tau = selector, tau
        self.budget = budget

    @property
    def budget(self) -> int | None:
        """How many tokens the cache holds; None is all of them."""
        return self._budget

    @budget.setter
    def budget(self, budget: int | None) -> None:
        if budget is not None:
            check_count("budget", budget, least=2)
        self._budget = budget

    def forward(  # type: ignore[override]  # no trees
        self,
        x: Float[Tensor, "batch time d_model"],
        state: SelectiveCache | None = None,
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "*batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], SelectiveCache]:
        """Runs over a sequence; with a budget, tokens leave the cache as they would one step at a time.

        Args:
            x: [batch, time, d_model].
            state: what an earlier call returned; None before the first token.
            mask: [batch, time], False at padding on the left of a row. The outputs there have no meaning.
            positions: [time] or [batch, time], for RoPE; None counts on from the state.

        Returns:
            ``(y, state)``: [batch, time, d_model], and the state after the last token.

        Raises:
            ValueError: x, mask or state has another shape.
        """
        check_sequence(x, self.d_model, mask)
        q, k, v = self.project(x, 0 if state is None else state.length, positions)
        outs = []
        # As long as nobody leaves, all queries are one block.
        block = x.shape[1] if self.budget is None else QUERIES
        masks = [None] * -(-x.shape[1] // block) if mask is None else mask.split(block, 1)
        for q_b, k_b, v_b, mask_b in zip(*(t.split(block, 1) for t in (q, k, v)), masks, strict=True):
            out, state = self._block(q_b, k_b, v_b, mask_b, state)
            outs.append(out)
        assert state is not None  # x is not empty
        return self.o_proj(torch.cat(outs, 1).flatten(2)), state

    def _block(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: SelectiveCache | None
    ) -> tuple[Tensor, SelectiveCache]:
        """Output of some queries, and the state after them."""
        if state is None:
            kept, length = KVCache(k, v, mask), 0
            before = q.new_zeros(q.shape[0], 0, dtype=torch.promote_types(q.dtype, torch.float32))
            largest = before.sum(1)
        else:
            kept, before, largest, length = state
            kept = kept.append(k, v, mask)
        if self.budget is None or kept.length <= self.budget:
            out, selection, memory = selective_attention_with_memory(
                q, kept.keys, kept.values, tau=self.tau, selector=self.selector,
                initial_selection=before, mask=kept.mask,
            )  # fmt: skip
        else:
            initial = nn.functional.pad(before, (0, q.shape[1]))
            with torch.autocast(q.device.type, enabled=False):  # the selection is summed up in float32 at least
                out, kept, selection, memory = _limited(q, kept, initial, self.budget, self.selector, self.tau)
        return out, SelectiveCache(kept, selection, torch.maximum(largest, memory.amax(1)), length + q.shape[1])


def _limited(
    q: Tensor, cache: KVCache, initial: Tensor, budget: int, selector: int, tau: float
) -> tuple[Tensor, KVCache, Tensor, Tensor]:
    """Eq. (1) for a block of queries between which tokens leave the cache; at most budget + block keys."""
    heads, dim = q.shape[2:]
    k, v = (x.to(initial.dtype).repeat_interleave(heads // x.shape[2], 2) for x in (cache.keys, cache.values))
    logits = torch.einsum("bihd,bjhd->bhij", q.to(initial.dtype), k) * dim**-0.5
    total = accumulated_selection(logits[:, selector], initial, cache.mask)
    F, selection = total[:, :-1], total[:, -1]
    seen, held = keys_within_budget(F.detach(), budget, cache.mask)
    visible = seen if cache.mask is None else seen & cache.mask[:, None]
    empty = ~visible.any(-1)[:, None, :, None]  # a query that is padding
    masked = (logits - F[:, None]).masked_fill(~visible[:, None], -torch.inf).masked_fill(empty, 0.0)
    weights = masked.softmax(-1).masked_fill(empty, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v).to(q.dtype)
    memory = (1.0 - F.clamp(max=tau) / tau).masked_fill(~visible, 0.0).sum(-1)
    # Those that are left, in their order: every row holds the same number of them.
    index = held.int().argsort(dim=1, descending=True, stable=True)[:, :budget]
    left = (None if x is None else x[torch.arange(len(x), device=x.device)[:, None], index] for x in cache)
    return out, KVCache(*left), selection.gather(1, index), memory  # type: ignore[arg-type]


def memory_loss(states: Sequence[SelectiveCache], tokens: int | Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    r"""The sum in eq. (2) over $N n$, without $\epsilon$, as a mean over the batch: 1 where nothing is ever forgotten.

    Args:
        states: of all layers, such as ``model(ids).cache.layers``, after whole sequences.
        tokens: n, how many tokens there are, padding not counted; [batch] where the rows differ.

    Raises:
        ValueError: there are no states.
    """
    if not states:
        raise ValueError("states: expected one for each layer, got none")
    return (torch.stack([state.memory for state in states]).mean(0) / tokens).mean()


class BudgetStep(NamedTuple):
    """One step of `search_budgets`.

    Attributes:
        budgets: of all layers, in tokens.
        loss: with these budgets, in the unit of the function that measures it.
    """

    budgets: tuple[int, ...]
    loss: float


def set_budgets(model: nn.Module, budgets: Sequence[int | None]) -> None:
    """Sets how many tokens each layer's cache holds; it counts from the next call on.

    Args:
        model: with layers of selective attention anywhere in it.
        budgets: one for each of these layers, in the model's order; None is all tokens.

    Raises:
        ValueError: another number of layers, or a budget below 2; nothing is changed then.
    """
    layers = [module for module in model.modules() if isinstance(module, SelectiveAttention)]
    if len(layers) != len(budgets):
        raise ValueError(f"budgets: expected one for each of {len(layers)} selective layers, got {len(budgets)}")
    for budget in budgets:
        if budget is not None:
            check_count("budgets", budget, least=2)
    for layer, budget in zip(layers, budgets, strict=True):
        layer.budget = budget


def search_budgets(
    model: nn.Module, loss: Callable[[], float], *, start: int, step: int, limit: float
) -> list[BudgetStep]:
    """Greedy search: takes `step` tokens at a time from the layer whose loss of them costs least.

    Args:
        model: with layers of selective attention; it is left with the last budgets that were found.
        loss: measures the model as it is, on held-out text; a logarithm of perplexity, or whatever is to be kept low.
        start: the budget of all layers at first, in tokens; at least as long as the text for no effect.
        step: tokens that are taken from one layer.
        limit: the largest loss that is accepted.

    Returns:
        The path, from `start` on; empty where already that is above the limit. No budget falls below 2.
    """
    check_count("start", start, least=2)
    check_count("step", step)
    count = sum(isinstance(module, SelectiveAttention) for module in model.modules())

    def measured(budgets: tuple[int, ...]) -> BudgetStep:
        set_budgets(model, budgets)
        return BudgetStep(budgets, loss())

    path: list[BudgetStep] = []
    best: BudgetStep | None = measured((start,) * count)
    while best is not None and best.loss <= limit:
        path.append(best)
        now = best.budgets
        shorter = [(*now[:i], now[i] - step, *now[i + 1 :]) for i in range(count) if now[i] - step >= 2]
        best = min(map(measured, shorter), key=lambda found: found.loss, default=None)
    set_budgets(model, path[-1].budgets if path else (start,) * count)
    return path
