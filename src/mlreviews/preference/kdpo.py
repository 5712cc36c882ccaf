r"""KDPO: knowledge editing as DPO against what the model itself would say, token by token, after the new answer.

Paper: Knowledge Editing in Language Models via Adapted Direct Preference Optimization (arXiv:2406.09920).

To change what a model answers to a question, fine-tuning raises every token of the new answer and disturbs what is
around it. KDPO takes as the rejected answer, at each position, the model's own favourite token after the tokens of the
new answer so far (teacher forcing), and does so again at every step of the optimisation. Where the model says the right
token already, both are the same and cancel: only the tokens that are wrong now are moved.

Equation:
    $$ y^l_t = \arg\max_v \pi_\theta(v \mid x, y^w_{<t}) \tag{1} $$
    $$ L = -\log\sigma\Bigl(\beta \sum_t \Bigl[\log\frac{\pi_\theta(y^w_t \mid x, y^w_{<t})}
       {\pi_{\mathrm{ref}}(y^w_t \mid x, y^w_{<t})} - \log\frac{\pi_\theta(y^l_t \mid x, y^w_{<t})}
       {\pi_{\mathrm{ref}}(y^l_t \mid x, y^w_{<t})}\Bigr]\Bigr) \tag{2} $$

Symbols:
    x: the question.
    y^w: [time], the new answer.
    y^l: [time], the model's own tokens, each after the new answer's.
    pi_ref: the model before the edit.

Defaults:
    beta: 0.1 (ours, as DPO's).

Deviations:
    1. Which parameters are tuned and when the reference is replaced is up to the caller; the reproduction keeps the
       model from before each edit, and tunes all parameters.

Reduces to:
    dpo: with answers of one token, against the model's present favourite.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.logps import sequence_logps
from mlreviews.preference.losses import PreferenceLoss, check_mask

__all__ = ["kdpo_loss", "teacher_forced_negatives"]


def teacher_forced_negatives(logits: Float[Tensor, "batch time vocab"]) -> Int[Tensor, "batch time"]:
    """The model's favourite token at each position, eq. (1).

    Args:
        logits: [batch, time, vocab], of the model that has read the question and the new answer.
    """
    return logits.argmax(-1)


def kdpo_loss(
    policy_logits: Float[Tensor, "batch time vocab"],
    ref_logits: Float[Tensor, "batch time vocab"],
    labels: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    beta: float = 0.1,
    negatives: Int[Tensor, "batch time"] | None = None,
) -> PreferenceLoss:
    """KDPO, eq. (2): log 2, with no gradient, for an edit that the model has made its own.

    Args:
        policy_logits: [batch, time, vocab] of the model after question and new answer; ``logits[:, t]`` predicts
            ``labels[:, t]``.
        ref_logits: [batch, time, vocab] of the model before the edit, on the same tokens.
        labels: [batch, time], the new answer where the mask is True, anything elsewhere.
        mask: [batch, time], True at the tokens of the new answer.
        beta: strength of the KL penalty.
        negatives: [batch, time], rejected tokens that are kept for several steps; None takes those of the present
            logits, as the paper does at every step.

    Raises:
        ValueError: shapes that don't fit, a mask that is not of bool, or beta <= 0.
    """
    check_mask(mask, labels.shape, like="labels")
    if ref_logits.shape != policy_logits.shape:
        wanted, came = tuple(policy_logits.shape), tuple(ref_logits.shape)
        raise ValueError(f"ref_logits: expected shape {wanted}, as policy_logits has, got {came}")
    rejected = teacher_forced_negatives(policy_logits) if negatives is None else negatives
    # Equal tokens cancel exactly, and not only up to rounding: they are left out.
    counted = mask & (rejected != labels)
    return dpo_loss(
        sequence_logps(policy_logits, labels, counted),
        sequence_logps(policy_logits, rejected, counted),
        sequence_logps(ref_logits.detach(), labels, counted),
        sequence_logps(ref_logits.detach(), rejected, counted),
        beta=beta,
    )
