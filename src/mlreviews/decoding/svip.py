r"""SVIP: a draft ends where the draft model is unsure, for then the next token would hardly be accepted.

Paper: Draft Model Knows When to Stop: A Self-Verification Length Policy for Speculative Decoding (arXiv:2411.18462).

How long a draft should be depends on how many of its tokens will be accepted, which is known only afterwards. But the
acceptance probability has a lower bound in the cross-entropy of draft and target, and that is roughly proportional to
the draft's own entropy, which is at hand while it drafts. Nothing is trained, and the law of the output stays the
target's.

Equation:
    $$ \beta = \sum_x \min(p(x), q(x)) = 1 - \mathrm{TV}(p, q) \ge 1 - \sqrt{\tfrac12 \mathrm{KL}(q \,\|\, p)}
       = 1 - \sqrt{\tfrac12 \left(H(q, p) - H(q)\right)} \tag{1} $$
    by Pinsker's inequality. With the cross-entropy taken as $H(q, p) \approx \gamma H(q)$:
    $$ \beta \gtrsim 1 - \sqrt{c\, H(q)}, \qquad c = \tfrac{\gamma - 1}{2} \tag{2} $$
    $$ \text{stop after this token if } \sqrt{c\, H(q)} > h \tag{3} $$

Symbols:
    q: [vocab], the draft model's distribution, softmax of its logits.
    p: [vocab], the target's.
    H(q): entropy of q (nats).
    H(q, p): cross-entropy, $-\sum_x q(x) \log p(x)$ (nats).
    beta: probability that a token drawn from q is accepted.
    h: threshold of what is taken as the probability of a rejection.

Defaults:
    c: 0.15, gamma = 1.3 (the authors' code).
    threshold: 0.3 (the authors' code).
    max_len: 40 tokens (the authors' code).

Deviations:
    1. The entropy is that of the logits as they are: at temperature 1, whatever the sampler's settings, so that greedy
       drafts have one, too.
    2. Where temperature, top-k or top-p change p and q, the bound holds for the changed ones, and eq. (2) estimates it
       from the unchanged q.

Reduces to:
    speculative-decoding: threshold = inf, a fixed draft length of max_len.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_number

__all__ = ["SVIPPolicy", "acceptance_bound", "draft_entropy"]


def draft_entropy(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """H(q) of q = softmax(logits).

    Args:
        logits: [..., vocab]; -inf is a token that can't come.

    Returns:
        Nats, at least 0.
    """
    log_q = logits.log_softmax(-1)
    # a token that can't come adds 0, not 0 times -inf
    return -(log_q.exp() * log_q.clamp(min=torch.finfo(log_q.dtype).min)).sum(-1)


def acceptance_bound(p: Float[Tensor, "*batch vocab"], q: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    r"""Eq. (1): $1 - \sqrt{\mathrm{KL}(q \| p) / 2}$, which the acceptance probability is never below.

    Args:
        p: [..., vocab], the target's distribution.
        q: [..., vocab], the draft's.

    Returns:
        At most 1; may be negative, -inf where q draws what p can't give.
    """
    divergence = (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)
    return 1 - (divergence / 2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class SVIPPolicy:
    """When to stop drafting, eq. (3)::

        policy = SVIPPolicy()
        speculative_generate(
            target, draft, ids, 100, draft_length=policy.max_len, stop_drafting=policy.should_stop
        )

    Attributes:
        c: of eq. (2).
        threshold: h, from 0 on; infinity never stops.
        max_len: tokens at most, for `draft_length`.

    Args:
        c: of eq. (2).
        threshold: h, from 0 on; infinity never stops.
        max_len: tokens at most, for `draft_length`.

    Raises:
        ValueError: a number out of range.
    """

    c: float = 0.15
    threshold: float = 0.3
    max_len: int = 40

    def __post_init__(self) -> None:
        check_number("c", self.c, above=0.0)
        if math.isnan(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold: expected at least 0, got {self.threshold}")
        check_count("max_len", self.max_len)

    def should_stop(self, draft_logits: Float[Tensor, "batch vocab"]) -> Bool[Tensor, " batch"]:
        """Whether the token that has just been drafted is the last one.

        Args:
            draft_logits: [batch, vocab], of the distribution that it was drawn from.
        """
        return (self.c * draft_entropy(draft_logits)).sqrt() > self.threshold
