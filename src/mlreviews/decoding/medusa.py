r"""Medusa: further heads on a language model guess the tokens after the next one, and a tree of guesses is verified.

Paper: Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads (arXiv:2401.10774).

Head k predicts, from the last hidden state, the token k places behind the one that the model's own head predicts. All
heads guess at once, without seeing each other's choice. Combinations of their best guesses make a tree, which the model
verifies in one pass. A guess is accepted where it is what the model would have chosen, or, in typical acceptance, where
the model finds it probable enough for a distribution of that entropy.

Equation:
    $$ p^{(k)}_t = \mathrm{softmax}\bigl(W_2^{(k)} (\mathrm{SiLU}(W_1^{(k)} h_t + b_1^{(k)}) + h_t)\bigr), \qquad
       k = 1, \dots, K \tag{1} $$
    is to predict $x_{t+k+1}$; at the start $W_1 = 0$, $b_1 = 0$ and $W_2$ is the model's head.
    $$ L = \sum_{k=1}^K \lambda_k\, \mathrm{CE}(p^{(k)}_t, x_{t+k+1}), \qquad \lambda_k = 0.8^k \tag{2} $$
    Typical acceptance of a token x after a node with the model's distribution p of entropy H, if all before it on the
    branch are accepted; the longest accepted branch stays, and of equally long ones the most probable:
    $$ p(x) > \min\bigl(\epsilon,\; \delta\, e^{-H(p)}\bigr) \tag{3} $$

Symbols:
    h: [batch, time, d_model], the model's last hidden states, after its last norm.
    W_1: [heads, d_model, d_model], b_1: [heads, d_model]; zero at the start.
    W_2: [heads, vocab, d_model].
    H: entropy in nats.

Defaults:
    heads: 5 (section 3).
    decay: 0.8 (section 2.2.1).
    eps: 0.09 (the authors' code).
    delta: 0.3, the square root of eps (section 2.3.1).
    tree: the three best guesses of the first head, two of the second after each, one of the others (ours).

Deviations:
    1. `medusa_generate` is exact unless typical acceptance is asked for: above temperature 0 the token after a node is
       drawn from the model's distribution, and the child that holds it is taken.
    2. In typical acceptance the token after the accepted branch is the model's most likely one, as in the authors'
       code; each step takes that one at least.
    3. One layer of W_1 a head, as in the paper; the authors' code allows more.

Reduces to:
    mlreviews.models.generate: a tree of height 0, or heads that never guess right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number
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
from mlreviews.models import CausalLM, GenerationResult, Sampler

__all__ = [
    "MEDUSA_TREE",
    "MedusaHeads",
    "TypicalAcceptance",
    "medusa_generate",
    "medusa_loss",
    "typical_threshold",
    "verify_typical",
]

MEDUSA_TREE = RankTree(
    [(a, b, 0, 0, 0)[:height] for a in range(3) for b in range(2) for height in range(2, 6)] + [(0,), (1,), (2,)]
)


class MedusaHeads(TrainedDrafter):
    """All heads of (1) at once.

    Args:
        d_model: size of a hidden state.
        vocab_size: number of ids.
        heads: K.
        lm_head: [vocab, d_model], the model's head, with which each of them starts; None draws them.
        generator: draws W_2; None is the global one.

    Raises:
        ValueError: a size below 1, or a head of another shape.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        heads: int = 5,
        *,
        lm_head: Float[Tensor, "vocab d_model"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("vocab_size", vocab_size), ("heads", heads)):
            check_count(name, size)
        if lm_head is not None and tuple(lm_head.shape) != (vocab_size, d_model):
            raise ValueError(f"lm_head: expected shape {(vocab_size, d_model)}, got {tuple(lm_head.shape)}")
        self.config = {"d_model": d_model, "vocab_size": vocab_size, "heads": heads}
        self.tree = MEDUSA_TREE.cut(heads)
        self.residual = nn.Parameter(torch.zeros(heads, d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(heads, d_model))
        self.head = nn.Parameter(torch.empty(heads, vocab_size, d_model))
        with torch.no_grad():
            if lm_head is None:
                self.head.uniform_(-(d_model**-0.5), d_model**-0.5, generator=generator)
            else:
                self.head.copy_(lm_head)

    def forward(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch heads vocab"]:
        """The logits of each head.

        Args:
            hidden: [..., d_model].
        """
        flat = hidden.reshape(-1, hidden.shape[-1])  # the heads come first, which makes one product of matrices each
        inner = nn.functional.silu(
            torch.baddbmm(self.bias[:, None], flat.expand(len(self.bias), -1, -1), self.residual.mT)
        )
        logits = (inner + flat) @ self.head.mT
        return logits.transpose(0, 1).reshape(*hidden.shape[:-1], *self.head.shape[:2])


def medusa_loss(
    logits: Float[Tensor, "batch time heads vocab"], ids: Int[Tensor, "batch time"], decay: float = 0.8
) -> Float[Tensor, ""]:
    """The loss (2), each head's cross-entropy in nats averaged over the tokens that it can predict.

    Args:
        logits: of `MedusaHeads` at each token.
        ids: the tokens; head k at t is to predict ``ids[:, t + k + 1]``.
        decay: of the weights of the heads.

    Raises:
        ValueError: too few tokens for the last head.
    """
    heads = logits.shape[2]
    if ids.shape[1] < heads + 2:
        raise ValueError(f"ids: expected at least {heads + 2} tokens for {heads} heads, got {ids.shape[1]}")
    losses = [
        nn.functional.cross_entropy(logits[:, : -k - 1, k - 1].flatten(0, 1), ids[:, k + 1 :].flatten())
        for k in range(1, heads + 1)
    ]
    return torch.stack([decay**k * loss for k, loss in enumerate(losses, 1)]).sum()


@dataclass(frozen=True)
class TypicalAcceptance:
    """The numbers of (3).

    Attributes:
        eps: no token above this probability is refused.
        delta: part of exp(-H) that is enough.
        temperature: of the model's distribution.
    """

    eps: float = 0.09
    delta: float = 0.3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("eps", self.eps, least=0.0)
        check_number("delta", self.delta, least=0.0)
        check_number("temperature", self.temperature, above=0.0)


def typical_threshold(
    p: Float[Tensor, "*batch vocab"], eps: float = 0.09, delta: float = 0.3
) -> Float[Tensor, "*batch"]:
    """What a token's probability has to exceed, the right-hand side of (3).

    Args:
        p: distributions.
        eps: the most that is asked for.
        delta: part of exp(-H).
    """
    return (-torch.special.entr(p).sum(-1)).exp().mul(delta).clamp(max=eps)


def verify_typical(
    p: Float[Tensor, "tree vocab"],
    tokens: Sequence[int],
    parents: Sequence[int],
    eps: float = 0.09,
    delta: float = 0.3,
) -> tuple[list[int], int]:
    """The longest branch all of whose tokens are typical.

    Args:
        p: the model's distribution after each node.
        tokens: of each node.
        parents: of each node.
        eps: of (3).
        delta: of (3).

    Returns:
        The accepted nodes, the root first, and the most likely token after the last of them.
    """
    threshold = typical_threshold(p, eps, delta).tolist()
    inner = torch.tensor([parents[1:], tokens[1:]], dtype=torch.int64, device=p.device)
    probable = p[inner[0], inner[1]].tolist()
    # of each node whose branch is accepted: how long that is, and its log-probability
    score: dict[int, tuple[int, float]] = {0: (0, 0.0)}
    for node, probability in enumerate(probable, 1):
        parent = parents[node]
        if parent in score and probability > threshold[parent]:
            length, log_p = score[parent]
            score[node] = length + 1, log_p + math.log(probability)
    node = max(score, key=lambda i: score[i])
    last, path = node, [node]
    while parents[node] >= 0:
        node = parents[node]
        path.append(node)
    return path[::-1], int(p[last].argmax())


def typical_verdicts(rule: TypicalAcceptance, sampler: Sampler) -> Verdicts:
    """`verify_typical` with the sampler's distributions at the rule's temperature."""

    def verdicts(logits: Tensor, drafted: Drafted, previous: Tensor | None) -> Found:
        p = Sampler(rule.temperature, repetition_penalty=sampler.repetition_penalty).probabilities(logits, previous)
        rows = zip(p, drafted.tokens.tolist(), parents_of_rows(drafted), strict=True)
        return [verify_typical(*row, rule.eps, rule.delta) for row in rows]

    return verdicts


class MedusaDrafter:
    """Trees of the heads' best guesses.

    Args:
        heads: guess.
        tree: of ranks; at depth k those of head k.

    Raises:
        ValueError: the tree is higher than there are heads.
    """

    def __init__(self, heads: MedusaHeads, tree: RankTree) -> None:
        if tree.height > len(heads.bias):
            raise ValueError(f"tree: expected a height of {len(heads.bias)} heads at most, got {tree.height}")
        self.heads, self.tree, self.height = heads, tree, tree.height
        self.plans: dict[int, tuple[TokenTree, int, Tensor]] = {}

    def __call__(
        self, hidden: Tensor, following: Tensor, mask: Tensor | None, positions: Tensor, height: int
    ) -> Drafted:
        """See `TreeDrafter`."""
        if height not in self.plans:
            cut = self.tree.cut(height)
            width = 1 + int(cut.ranks.max())
            source = (cut.shape.depth[1:] - 1) * width + cut.ranks[1:]
            self.plans[height] = cut.shape.to(hidden.device), width, source.to(hidden.device)
        shape, width, source = self.plans[height]
        guesses = self.heads(hidden[:, -1])[:, :height].topk(width, -1).indices
        return Drafted(torch.cat([following[:, -1:], guesses.flatten(1)[:, source]], 1), shape)


@torch.no_grad()
def medusa_generate(
    model: CausalLM,
    heads: MedusaHeads,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    *,
    tree: RankTree | None = None,
    typical: TypicalAcceptance | None = None,
    sampler: Sampler = Sampler(),
    mask: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Sequence[int] = (),
) -> GenerationResult:
    """Continues each row of a batch, several tokens a pass: exactly as `generate` would, or by typical acceptance.

    Args:
        model: writes the text.
        heads: trained on the model's hidden states.
        input_ids: [batch, time], int64.
        max_new_tokens: of each row.
        tree: shape of the drafts; None is the drafter's own.
        typical: accepts by (3), which is no sampling from the model's law any more; None is exact.
        sampler: of the model; with `typical` of the first token and the repetition penalty alone.
        mask: [batch, time], False at padding on the left of shorter rows.
        generator: draws; None is the global one.
        stop_tokens: ids that end a row.

    Returns:
        The new tokens; `accepted` and `drafted` count the nodes of each tree without its root.

    Raises:
        ValueError: as of `generate`, hidden states of another size, or a tree with more levels than heads.
        TypeError: ids are not int64.
    """
    expected, came = model.embed_tokens.weight.shape[1], heads.bias.shape[1]
    if expected != came:
        raise ValueError(f"heads: expected hidden states of size {expected}, as the model has, got {came}")
    return decode_trees(
        model,
        MedusaDrafter(heads, heads.tree if tree is None else tree),
        exact_verdicts(sampler, generator) if typical is None else typical_verdicts(typical, sampler),
        input_ids,
        max_new_tokens,
        sampler=sampler,
        mask=mask,
        generator=generator,
        stop_tokens=stop_tokens,
    )
