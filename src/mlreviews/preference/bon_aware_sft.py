r"""BoN-aware fine-tuning: train a policy for the best of N samples that will be taken from it.

Paper: Inference-Aware Fine-Tuning for Best-of-N Sampling in Large Language Models (arXiv:2412.15287)

At inference N answers are drawn and the one with the highest score is returned. A policy trained for that need not put
its whole mass on the answer that is best on average: it can keep several that are right at times. The fine-tuning loss
is the likelihood of expert answers under a smooth approximation of the best-of-N policy; with verified rewards the
policy gradient of pass@N is exact.

Equation:
    $$ \pi_{bon}(y) = \pi(y) \frac{F_\le(y)^N - F_<(y)^N}{F_\le(y) - F_<(y)}, \qquad
       F_\le(y) = P_{y' \sim \pi}(r(y') \le r(y)) \tag{1} $$
    $$ \pi_{bon}(y) \approx \frac{\pi(y) e^{\lambda_N Q(y)}}{Z}, \quad Q(y) = P_{y' \sim \pi}(r(y) \ge r(y')), \quad
       Z = E_{y' \sim \pi}[e^{\lambda_N Q(y')}] \tag{2} $$
    $$ \frac{(\lambda - 1) e^\lambda + 1}{e^\lambda - 1} - \log \frac{e^\lambda - 1}{\lambda} = \log N - \frac{N - 1}{N}
       \tag{3} $$
    is the tilt at which both have the same divergence from the policy, for scores without ties.
    $$ L = -\log \pi(y) - \lambda_N Q(y) + \log Z \tag{4} $$
    $$ \nabla [1 - (1 - p)^N] = N E_{y \sim \pi}\bigl[(1 - p)^{N - 1} R(y) \nabla \log \pi(y)\bigr], \qquad
       p = E_{y \sim \pi} R(y) \tag{5} $$

Symbols:
    r: scores of the verifier; R: verdicts, 0 or 1.
    F: probabilities that one draw scores at most, or less than, the answer.
    lambda_N: tilt, in nats per unit of win rate.
    Q: win rate of an answer over the policy's own.
    p: probability that one draw passes.

Defaults:
    n: none; 32 for mathematics and 16 for code in the paper.

Deviations:
    1. Q and Z are means over the samples given, and depend on the policy that drew them. Their gradient comes from
       weights that are equal in value and normalised over the samples, which centres it as a baseline does.
    2. (1 - p)^(N - 1) is estimated without bias from the other samples of the group: the share of draws of N - 1 of
       them in which none passes. The paper weights by its own functions of the failure rate.

Reduces to:
    supervised fine-tuning: N = 1, where the tilt is 0.
    REINFORCE without a baseline: N = 1 with verdicts, see `rloo`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_finite
from mlreviews.preference.losses import PolicyLoss, check_group_size, check_logps

__all__ = ["bon_distribution", "bon_sft_loss", "bon_tilt", "centred_pass_weights", "pass_weights"]


def bon_distribution(
    probabilities: Float[Tensor, "*batch answers"], scores: Float[Tensor, "*batch answers"], n: int
) -> Float[Tensor, "*batch answers"]:
    """The exact law of the best of n draws, eq. (1); among equal scores the draw decides.

    Args:
        probabilities: [..., answers], of one draw, with gradient.
        scores: [..., answers], of the verifier.
        n: draws, at least 1.

    Returns:
        [..., answers], which sum to 1.

    Raises:
        ValueError: shapes differ, scores are NaN or infinite, or n is below 1.
    """
    check_count("n", n)
    if probabilities.shape != scores.shape:
        raise ValueError(f"scores: expected shape {tuple(probabilities.shape)}, got {tuple(scores.shape)}")
    check_finite("scores", scores)
    mine, other = scores[..., :, None], scores[..., None, :]
    below = torch.where(other < mine, probabilities[..., None, :], 0.0).sum(-1)
    up_to = torch.where(other <= mine, probabilities[..., None, :], 0.0).sum(-1)
    # (a^n - b^n) / (a - b) as the sum that it is: no division by a score's probability, which can be 0.
    factors = [up_to**k * below ** (n - 1 - k) for k in range(n)]
    return probabilities * torch.stack(factors).sum(0)


def bon_tilt(n: int) -> float:
    """lambda_N of eq. (3), by bisection: 0 at n = 1, near n where n is large.

    Args:
        n: draws, at least 1.

    Raises:
        ValueError: n is below 1.
    """
    check_count("n", n)
    wanted = math.log(n) - (n - 1) / n
    low, high = 0.0, 2.0 * n + 10
    if n == 1:
        return 0.0
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _tilted_divergence(middle) < wanted else (low, middle)
    return (low + high) / 2


def _tilted_divergence(tilt: float) -> float:
    """The left side of eq. (3): KL of the density proportional to exp(tilt u) from the uniform one on [0, 1]."""
    rest = -math.expm1(-tilt)  # 1 - exp(-tilt)
    return tilt / rest - 1 - tilt - math.log(rest) + math.log(tilt)


def bon_sft_loss(
    logp: Float[Tensor, " batch"],
    scores: Float[Tensor, " batch"],
    sample_logps: Float[Tensor, "batch samples"],
    sample_scores: Float[Tensor, "batch samples"],
    n: int,
) -> PolicyLoss:
    """Minus the log-likelihood of expert answers under the tilted policy, eq. (4), mean over the batch.

    Args:
        logp: [batch], log-probabilities of the expert answers, with gradient.
        scores: [batch], the verifier's scores of them.
        sample_logps: [batch, samples], log-probabilities of answers that the policy drew, with gradient.
        sample_scores: [batch, samples], their scores.
        n: draws at inference, at least 1.

    Returns:
        The loss and ``win_rate``, the mean of Q over the expert answers.

    Raises:
        ValueError: shapes don't fit, values are NaN or infinite, or n is below 1.
    """
    check_logps(logp=logp, scores=scores)
    check_logps(2, sample_logps=sample_logps, sample_scores=sample_scores)
    if len(sample_logps) != len(logp):
        raise ValueError(f"sample_logps: expected {len(logp)} rows, one an expert answer, got {len(sample_logps)}")
    tilt = bon_tilt(n)
    # Equal weights, whose gradient is that of the probabilities with which the samples were drawn.
    weights = (sample_logps - sample_logps.detach()).softmax(1)
    wins = _win_rate(scores[:, None], sample_scores, weights)[:, 0]
    own = _win_rate(sample_scores, sample_scores, weights)
    log_z = (weights.log() + tilt * own).logsumexp(1)
    losses = -logp - tilt * wins + log_z
    return PolicyLoss(losses.mean(), {"win_rate": wins.detach().mean()})


def _win_rate(scores: Tensor, sample_scores: Tensor, weights: Tensor) -> Tensor:
    """[batch, answers]: weighted share of a row's samples that each answer beats or equals."""
    return ((scores[:, :, None] >= sample_scores[:, None, :]) * weights[:, None, :]).sum(-1)


def pass_weights(verdicts: Float[Tensor, " batch"], group_size: int, n: int) -> Float[Tensor, " batch"]:
    """Weights of log-probabilities whose weighted mean has the gradient of pass@n, eq. (5), in expectation.

    Only answers that pass have a weight (the paper's variant with positives alone): large where the others failed.

    Args:
        verdicts: [batch], 0 or 1, groups of answers to one prompt after one another.
        group_size: answers to a prompt, at least n.
        n: draws at inference, at least 1.

    Returns:
        [batch], without gradient. The loss is ``-(weights * seq_logps).mean()``.

    Raises:
        ValueError: verdicts other than 0 and 1, a group smaller than n or that does not divide the batch, or n below 1.
    """
    passed, others = _others_fail(verdicts, group_size, n)
    return (n * others * passed).flatten()


def centred_pass_weights(verdicts: Float[Tensor, " batch"], group_size: int, n: int) -> Float[Tensor, " batch"]:
    """`pass_weights` with the pass rate of the others in the group as a baseline: failures have weights, too.

    Args:
        verdicts: [batch], 0 or 1, groups of answers to one prompt after one another.
        group_size: answers to a prompt, at least n and at least 2.
        n: draws at inference, at least 1.

    Returns:
        [batch], without gradient; the same expectation, and less variance where most answers pass.

    Raises:
        ValueError: as `pass_weights`.
    """
    check_group_size(group_size, len(verdicts), least=2)
    passed, others = _others_fail(verdicts, group_size, n)
    rate = (passed.sum(1, keepdim=True) - passed) / (group_size - 1)
    return (n * others * (passed - rate)).flatten()


def _others_fail(verdicts: Tensor, group_size: int, n: int) -> tuple[Tensor, Tensor]:
    """Verdicts as groups, and for each answer the share of draws of n - 1 of the others in which none passes."""
    check_count("n", n)
    check_group_size(group_size, len(verdicts), least=n)
    if not ((verdicts == 0) | (verdicts == 1)).all():
        raise ValueError("verdicts: expected 0 or 1")
    groups = verdicts.detach().view(-1, group_size)
    failing = (1 - groups).sum(1, keepdim=True) - (1 - groups)
    share = torch.ones_like(groups)
    for k in range(n - 1):  # without replacement: (f - k) / (m - k) for each draw
        share = share * ((failing - k).clamp(min=0) / (group_size - 1 - k))
    return groups, share
