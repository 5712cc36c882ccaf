r"""Lookahead decoding: Jacobi's iteration beside the text writes n-grams, and the model checks those that fit.

Paper: Break the Sequential Dependency of LLM Inference Using Lookahead Decoding (arXiv:2402.02057).

Jacobi decoding alone seldom saves passes: guesses far ahead are wrong until what comes before them is right. But on the
way they make n-grams that the model likes. Each pass here computes two branches at once: a window of guesses ahead,
with several of their past iterations, whose diagonals are new n-grams for a pool; and the n-grams of the pool that
begin with the last certain token, of which the longest beginning that the model agrees with is taken. No draft model
and no training, and the law of the text is the model's.

Equation:
    $$ w^{s}_{N-1, j} = \arg\max_v p(v \mid x,\ w^{s}_{0, 0 \dots j},\ w^{s}_{1, j}, \dots, w^{s}_{N-2, j}), \qquad
       w^{s+1}_{l, j} = w^{s}_{l + 1, j} \tag{1} $$
    $$ (w^{s}_{0, j}, \dots, w^{s}_{N-1, j}) \to \text{pool},\quad j = 0, \dots, W - 1 \tag{2} $$

Symbols:
    x: the text so far.
    w: [batch, N - 1, W], the window in pass s; level l of column j guesses the token l + j + 1 places after the last.
    N: length of an n-gram.
    W: columns of the window.
    G: n-grams that are checked in a pass at most.

Defaults:
    window: 15 (section 5, for 7 billion parameters on an A100; a CPU wants less).
    ngram: 5 (section 5).
    guesses: 15 (section 5).
    prompt_ngrams: True, n-grams of the prompt are in the pool from the start (the ablation "prompt as reference").

Deviations:
    1. Guesses that begin alike share their nodes: all that a pass computes is one tree, whose root is the last certain
       token. The window is a part of it, a spine with a branch at each of its nodes, and is checked as well.
    2. Sampling draws the next token from the model, and goes on where the tree holds it. That is the law of the
       paper's algorithm 4 (guesses tried one after the other, each refused one taken out of the distribution).
    3. The window begins with tokens of the prompt in all levels; n-grams are taken from it when all levels but the
       first have been computed.
    4. The window moves on by one place in each pass, however many tokens were taken, as in the authors' code.
    5. The prompt's n-grams begin with its second token, the first that follows one.

Reduces to:
    plain decoding: without guesses, and where the window is never right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mlreviews.common.checks import check_count
from mlreviews.decoding.drafters import texts
from mlreviews.decoding.trees import Drafted, Found, TokenTree, decode_trees, exact_verdicts
from mlreviews.models import CausalLM, GenerationResult, Sampler

__all__ = ["NGramPool", "lookahead_decode", "lookahead_tree"]


class NGramPool:
    """N-grams by their first token, the last that came for each.

    Args:
        size: how many are kept for a token.
    """

    def __init__(self, size: int) -> None:
        check_count("size", size, least=0)
        self.size = size
        self.known: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, ngram: Sequence[int]) -> None:
        """Puts an n-gram in, or makes it the newest; the oldest with this first token goes if there are too many.

        Args:
            ngram: two tokens or more.
        """
        rest = self.known.setdefault(ngram[0], {})
        key = tuple(ngram[1:])
        rest.pop(key, None)
        rest[key] = None
        if len(rest) > self.size:
            del rest[next(iter(rest))]

    def after(self, token: int) -> list[tuple[int, ...]]:
        """What followed the token, newest first.

        Args:
            token: the first of the n-grams.
        """
        return list(reversed(self.known.get(token, {})))


def lookahead_tree(
    root: int, guesses: Sequence[Sequence[int]], window: Sequence[Sequence[int]] = ()
) -> tuple[list[int], list[int]]:
    """All that a pass computes for a row: the last certain token, the guesses after it, and the window.

    Args:
        root: the last certain token.
        guesses: what may follow it; those that begin alike share nodes.
        window: [levels][columns], tokens. The first level is a row of tokens after the root; each column goes on from
            its token there.

    Returns:
        ``(tokens, parents)`` of the nodes: the root with parent -1, the guesses, and the window, level after level.
    """
    tokens, parents = [root], [-1]
    known: dict[tuple[int, int], int] = {}
    for guess in guesses:
        node = 0
        for token in guess:
            if (node, token) not in known:
                known[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = known[node, token]
    for i, level in enumerate(window):
        start, width = len(tokens), len(level)
        parents += [0, *range(start, start + width - 1)] if i == 0 else range(start - width, start)
        tokens += level
    return tokens, parents


class _Lookahead:
    """Drafts the trees of `decode_trees`, and learns from what the model says of them."""

    def __init__(
        self,
        window: int,
        ngram: int,
        guesses: int,
        prompt_ngrams: bool,
        sampler: Sampler,
        generator: torch.Generator | None,
    ) -> None:
        self.width, self.ngram, self.guesses = window, ngram, guesses
        self.prompt_ngrams, self.generator = prompt_ngrams, generator
        self.height = window + ngram - 2
        self.rule = exact_verdicts(sampler, generator)
        self.pools: list[NGramPool] = []
        self.window = torch.empty(0)
        self.passes = 0

    def __call__(
        self, hidden: Tensor, following: Tensor, mask: Tensor | None, positions: Tensor, height: int
    ) -> Drafted:
        """See `mlreviews.decoding.trees.TreeDrafter`."""
        if not self.pools:
            self._begin(following, mask)
        trees = []
        for root, pool, window in zip(following[:, -1].tolist(), self.pools, self.window.tolist(), strict=True):
            found = [guess[:height] for guess in pool.after(root)]
            trees.append((*lookahead_tree(root, found), window))
        # rows with fewer guesses are filled up: the nodes of their window have the same numbers then
        size = max(len(tokens) for tokens, *_ in trees)
        offsets = lookahead_tree(0, [], self.window[0].tolist())[1][1:]
        window_parents = [parent + size - 1 if parent else 0 for parent in offsets]
        tokens, parents = [], []
        for tree_tokens, tree_parents, window in trees:
            missing = size - len(tree_tokens)
            tokens.append(tree_tokens + [tree_tokens[0]] * missing + [token for level in window for token in level])
            parents.append(tree_parents + [0] * missing + window_parents)
        shape = parents if len(parents) > 1 else parents[0]
        return Drafted(following.new_tensor(tokens), TokenTree.of(following.new_tensor(shape)))

    def verdicts(self, logits: Tensor, drafted: Drafted, previous: Tensor | None) -> Found:
        """See `mlreviews.decoding.trees.Verdicts`; takes the window's new level, too."""
        if drafted.tokens.shape[1] > 1:
            self._learn(logits[:, -self.width :].argmax(-1))
        return self.rule(logits, drafted, previous)

    def _begin(self, following: Tensor, mask: Tensor | None) -> None:
        """A window of tokens of the prompt, and pools with its n-grams."""
        self.pools = [NGramPool(self.guesses) for _ in following]
        place = torch.randint(
            following.shape[1],
            (len(following), (self.ngram - 1) * self.width),
            generator=self.generator,
            device=following.device,
        )
        self.window = following.gather(1, place).unflatten(1, (self.ngram - 1, self.width))
        if self.prompt_ngrams and self.guesses:
            for text, pool in zip(texts(following, mask), self.pools, strict=True):
                for start in range(len(text) - self.ngram + 1):
                    pool.add(text[start : start + self.ngram])

    def _learn(self, new: Tensor) -> None:
        """Equations (1) and (2) for the window's new level, [batch, columns]."""
        self.passes += 1
        columns = torch.cat([self.window, new[:, None]], 1)
        if self.guesses and self.passes >= self.ngram - 1:
            for pool, ngrams in zip(self.pools, columns.mT.tolist(), strict=True):
                for ngram in ngrams:
                    pool.add(ngram)
        self.window = columns[:, 1:]


def lookahead_decode(
    model: CausalLM,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    window: int = 15,
    ngram: int = 5,
    guesses: int = 15,
    prompt_ngrams: bool = True,
    sampler: Sampler = Sampler(),
    mask: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Sequence[int] = (),
) -> GenerationResult:
    """Continues each row of a batch with the model's law, several tokens a pass where n-grams fit.

    Greedy tokens are those of plain decoding, and drawn ones have its law, as far as a pass over a tree computes the
    logits of a pass over one token: in float32 the last bits differ, which matters at ties closer than 1e-6 alone; in
    bfloat16 greedy texts part at ties closer than about 1e-2.

    Args:
        model: any `mlreviews.models.CausalLM` that takes trees.
        input_ids: [batch, time], int64.
        max_new_tokens: of each row, 0 or more.
        window: columns of the window.
        ngram: length of the n-grams, 2 or more; the window has one level fewer.
        guesses: n-grams that are checked in a pass at most, and kept for each first token; 0 checks the window alone.
        prompt_ngrams: whether the pool begins with the n-grams of the prompt.
        sampler: from logits to the distribution; the default is greedy.
        mask: [batch, time], False at padding on the left of shorter rows.
        generator: draws tokens, and the first window; None is the global one.
        stop_tokens: ids that end a row.

    Returns:
        The new tokens; `accepted` and `drafted` count the nodes of each pass without the root, the window's included.

    Raises:
        ValueError: a number out of range, an empty prompt, ids outside the vocabulary, more tokens than the model can
            see, NaN logits.
        TypeError: ids are not int64, or the model takes no trees.
    """
    check_count("window", window)
    check_count("ngram", ngram, least=2)
    check_count("guesses", guesses, least=0)
    drafter = _Lookahead(window, ngram, guesses, prompt_ngrams, sampler, generator)
    return decode_trees(
        model,
        drafter,
        drafter.verdicts,
        input_ids,
        max_new_tokens,
        sampler=sampler,
        mask=mask,
        generator=generator,
        stop_tokens=stop_tokens,
    )
