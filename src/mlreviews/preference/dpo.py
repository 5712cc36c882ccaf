r"""DPO: preference pairs fitted by the likelihood of a Bradley-Terry model whose reward is the policy itself.

Paper: Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv:2305.18290).
Paper: A General Theoretical Paradigm to Understand Learning from Human Preferences (arXiv:2310.12036). IPO.
Source: Eric Mitchell, A note on DPO with noisy preferences and relationship to IPO (2023). Smoothed labels, cDPO.
Paper: Provably Robust DPO: Aligning Language Models with Noisy Feedback (arXiv:2403.00409). Robust.
Paper: SLiC-HF: Sequence Likelihood Calibration with Human Feedback (arXiv:2305.10425). Hinge.
Paper: SimPO: Simple Preference Optimization with a Reference-Free Reward (arXiv:2405.14734).
Paper: Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance (arXiv:2401.08417). CPO.
Paper: ORPO: Monolithic Preference Optimization without Reference Model (arXiv:2403.07691).
Paper: KTO: Model Alignment as Prospect Theoretic Optimization (arXiv:2402.01306).
Paper: Noise Contrastive Alignment of Language Models with Explicit Rewards (arXiv:2402.05369). NCA.
Paper: Binary Classifier Optimization for Large Language Model Alignment (arXiv:2404.04656). BCO.
Paper: Towards Efficient Exact Optimization of Language Model Alignment (arXiv:2402.00856). EXO.
Paper: Self-Play Preference Optimization for Language Model Alignment (arXiv:2405.00675). SPPO.
Paper: Distributional Preference Alignment of LLMs via Optimal Transport (arXiv:2406.05882). AOT.
Paper: Discovering Preference Optimization Algorithms with and for Large Language Models (arXiv:2406.08414). DiscoPOP.

The policy that maximises a reward under a KL penalty is the reference tilted by the exponential of the reward. Solved
for the reward and put into the Bradley-Terry model of human choices, this gives a loss on pairs of answers that needs
neither a reward model nor sampling. The family below changes the function of the margin, or what the margin is made of.

Equation:
    $$ \rho_w = \log\frac{\pi(y_w \mid x)}{\pi_{\mathrm{ref}}(y_w \mid x)}, \quad r_w = \beta \rho_w,
       \quad u = r_w - r_l, \qquad L_{\mathrm{DPO}} = -\log\sigma(u) \tag{1} $$
    $$ L_{\mathrm{IPO}} = \Bigl(\rho_w - \rho_l - \frac{1}{2\beta}\Bigr)^2 \tag{2} $$
    $$ L_{\mathrm{cDPO}} = -(1 - \epsilon) \log\sigma(u) - \epsilon \log\sigma(-u), \qquad
       L_{\mathrm{robust}} = \frac{-(1 - \epsilon) \log\sigma(u) + \epsilon \log\sigma(-u)}{1 - 2\epsilon} \tag{3} $$
    $$ L_{\mathrm{hinge}} = \max(0, 1 - u) \tag{4} $$
    $$ L_{\mathrm{EXO}} = \sigma(u) \log\frac{\sigma(u)}{1 - \epsilon} + \sigma(-u) \log\frac{\sigma(-u)}{\epsilon},
       \qquad L_{\mathrm{DiscoPOP}} = -(1 - \sigma(u / \tau)) \log\sigma(u) + \sigma(u / \tau)\, e^{-u} \tag{5} $$
    $$ L_{\mathrm{NCA}} = -\log\sigma(r_w) - \tfrac12 \log\sigma(-r_w) - \tfrac12 \log\sigma(-r_l), \qquad
       L_{\mathrm{BCO}} = -\log\sigma(r_w) - \log\sigma(-r_l) \tag{6} $$
    $$ L_{\mathrm{SPPO}} = \Bigl(\rho_w - \frac{1}{2\beta}\Bigr)^2 + \Bigl(\rho_l + \frac{1}{2\beta}\Bigr)^2 \tag{7} $$
    AOT is (1) after the margins of policy and reference have each been sorted over the batch. Without a reference,
    with log-probabilities averaged over the tokens (SimPO, ORPO) or summed (CPO):
    $$ L_{\mathrm{SimPO}} = -\log\sigma\bigl(\beta (\log\pi_w - \log\pi_l) - \gamma\bigr), \qquad
       L_{\mathrm{CPO}} = -\log\sigma\bigl(\beta (\log\pi_w - \log\pi_l)\bigr) - \log\pi_w \tag{8} $$
    $$ L_{\mathrm{ORPO}} = -\log\pi_w - \beta \log\sigma\Bigl(\log\frac{\pi_w}{1 - \pi_w}
       - \log\frac{\pi_l}{1 - \pi_l}\Bigr) \tag{9} $$
    KTO needs no pairs, but a reference point from answers that belong to other prompts:
    $$ L_{\mathrm{KTO}} = \lambda_D \bigl(1 - \sigma(\beta (\rho - z))\bigr) \text{ if desirable, else }
       \lambda_U \bigl(1 - \sigma(\beta (z - \rho))\bigr), \qquad
       z = \max\bigl(0, \overline{\rho(y_{i+1} \mid x_i)}\bigr) \tag{10} $$

Symbols:
    pi, pi_ref: probabilities of an answer under the policy and the reference; their logarithms in nats, [batch].
    y_w, y_l: the preferred and the rejected answer to prompt x.
    beta: how dearly the policy pays for leaving the reference.
    epsilon: probability that a label is wrong.
    gamma: margin that SimPO asks for.
    lambda_D, lambda_U: weights of desirable and undesirable answers.

Defaults:
    beta: 0.1 (DPO, appendix B).
    beta of simpo_loss, gamma: 2 and 1 (the authors' settings for Llama-3-8B).
    epsilon of exo_pair_loss: 1e-3 (the default of trl).
    tau: 0.05 (DiscoPOP, section 4).
    lambda_D, lambda_U: 1 (KTO, section 4).

Deviations:
    1. IPO is stated with summed log-probabilities; its authors' runs average them over the tokens, as trl does. Both
       are here: summed, or averaged when the lengths are given.
    2. SPPO with the hard win rates 1 and 0, BCO without the running mean of rewards that it subtracts.
    3. DiscoPOP's product of a vanishing and an exploding factor is computed as one exponential, so it can't overflow.
    4. The likelihood term of CPO and ORPO is per pair and covers the answer only; trl averages it over all tokens of
       the batch, and prompts count.

Reduces to:
    logistic regression: each pair is an observation with label 1 and logit u.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mlreviews.common.checks import check_count, check_number
from mlreviews.preference.losses import PreferenceLoss, UnpairedLoss, check_logps, check_mask, log_ratio

__all__ = [
    "aot_loss",
    "bco_pair_loss",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_pair_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "kto_reference_point",
    "mismatched",
    "nca_pair_loss",
    "normalised_dpo_loss",
    "orpo_loss",
    "robust_dpo_loss",
    "simpo_loss",
    "smoothed_dpo_loss",
    "sppo_hard_loss",
]

Logps = Float[Tensor, " batch"]
Lengths = Int[Tensor, " batch"]


def dpo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """DPO, eq. (1): log 2 a pair where the policy is the reference.

    Args:
        policy_chosen_logps: [batch] log-probabilities of the preferred answers under the policy, summed over the tokens
            of the answer (see `sequence_logps`), in nats.
        policy_rejected_logps: [batch], those of the rejected answers.
        ref_chosen_logps: [batch], of the preferred answers under the reference.
        ref_rejected_logps: [batch], of the rejected answers under the reference.
        beta: strength of the KL penalty.

    Raises:
        ValueError: shapes that differ, NaN or infinity, or beta <= 0; so do all losses here.
    """
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return _loss(-logsigmoid(beta * (chosen - rejected)), chosen, rejected, beta)


def smoothed_dpo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
    label_smoothing: float,
) -> PreferenceLoss:
    """Conservative DPO (cDPO), eq. (3): the margin aims at the log odds of a label being right, not at infinity.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: strength of the KL penalty.
        label_smoothing: probability that a label is wrong, in [0, 0.5].
    """
    _check_smoothing(label_smoothing, most=0.5)
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return _loss(_smoothed(beta * (chosen - rejected), label_smoothing), chosen, rejected, beta)


def robust_dpo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
    label_smoothing: float,
) -> PreferenceLoss:
    """Robust DPO, eq. (3): over labels flipped with this probability, its expectation is the loss of the true labels.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: strength of the KL penalty.
        label_smoothing: probability that a label is wrong, in [0, 0.5).
    """
    _check_smoothing(label_smoothing)
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    u = beta * (chosen - rejected)
    losses = (label_smoothing * logsigmoid(-u) - (1 - label_smoothing) * logsigmoid(u)) / (1 - 2 * label_smoothing)
    return _loss(losses, chosen, rejected, beta)


def ipo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
    chosen_lengths: Lengths | None = None,
    rejected_lengths: Lengths | None = None,
) -> PreferenceLoss:
    """IPO, eq. (2): the margin of log ratios is regressed on 1 / (2 beta), so that it can't run away.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`: sums.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: tau of the paper.
        chosen_lengths: [batch], tokens of the preferred answers: log ratios are averaged over them, as in the authors'
            runs; None sums, as the paper is written. The rewards are of sums in either case.
        rejected_lengths: [batch], given when the other lengths are.
    """
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("chosen_lengths, rejected_lengths: expected both or neither")
    margin = chosen - rejected
    if chosen_lengths is not None and rejected_lengths is not None:
        margin = _averaged(chosen, chosen_lengths, "chosen") - _averaged(rejected, rejected_lengths, "rejected")
    return _loss((margin - 1 / (2 * beta)).square(), chosen, rejected, beta)


def normalised_dpo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
) -> PreferenceLoss:
    """DPO, eq. (1), of log ratios averaged over the tokens: answers can't win by their length.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`: sums.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: strength of the KL penalty; averages ask for a larger one than sums.
        chosen_lengths: [batch], tokens of the preferred answers.
        rejected_lengths: [batch], tokens of the rejected answers.
    """
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    margin = _averaged(chosen, chosen_lengths, "chosen") - _averaged(rejected, rejected_lengths, "rejected")
    return _loss(-logsigmoid(beta * margin), chosen, rejected, beta)


def hinge_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """Hinge, eq. (4): pairs whose margin has reached 1 have no gradient any more.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: the reciprocal of the margin in nats.
    """
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return _loss(relu(1 - beta * (chosen - rejected)), chosen, rejected, beta)


def exo_pair_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> PreferenceLoss:
    """EXO on pairs, eq. (5): the KL divergence of smoothed DPO with its arguments exchanged.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: strength of the KL penalty.
        label_smoothing: probability that a label is wrong, in (0, 0.5).
    """
    _check_smoothing(label_smoothing)
    check_number("label_smoothing", label_smoothing, above=0.0)
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    u = beta * (chosen - rejected)
    target = torch.tensor([1 - label_smoothing, label_smoothing], dtype=torch.float64).log().tolist()
    losses = u.sigmoid() * (logsigmoid(u) - target[0]) + (-u).sigmoid() * (logsigmoid(-u) - target[1])
    return _loss(losses, chosen, rejected, beta)


def discopop_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> PreferenceLoss:
    """DiscoPOP, eq. (5): logistic for pairs in the wrong order, exponential for the others.

    It is neither convex nor monotone: with the default width it rises around a margin of 0.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: strength of the KL penalty.
        tau: width of the change from one to the other, in (0, 1].
    """
    check_number("tau", tau, above=0.0)
    if tau > 1:
        raise ValueError(f"tau: expected at most 1, above which the exponential explodes, got {tau}")
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    u = beta * (chosen - rejected)
    losses = -(-u / tau).sigmoid() * logsigmoid(u) + (logsigmoid(u / tau) - u).exp()
    return _loss(losses, chosen, rejected, beta)


def nca_pair_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """NCA on pairs, eq. (6): the preferred reward is held near 0 from both sides, so it doesn't fall with the other.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: strength of the KL penalty.
    """
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    good, bad = beta * chosen, beta * rejected
    losses = -logsigmoid(good) - (logsigmoid(-good) + logsigmoid(-bad)) / 2
    return _loss(losses, chosen, rejected, beta)


def bco_pair_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """BCO on pairs, eq. (6): a binary classifier of good and bad answers, never less than DPO.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: strength of the KL penalty.
    """
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return _loss(-logsigmoid(beta * chosen) - logsigmoid(-beta * rejected), chosen, rejected, beta)


def sppo_hard_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
) -> PreferenceLoss:
    """SPPO with hard win rates, eq. (7): each log ratio is regressed on its own target.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: 1 / eta of the paper.
    """
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    target = 1 / (2 * beta)
    return _loss((chosen - target).square() + (rejected + target).square(), chosen, rejected, beta)


def aot_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """AOT on pairs: the distribution of the policy's margins over the batch is to dominate that of the reference's.

    Each quantile is compared, not each pair, so the loss of a pair depends on the whole batch: micro-batches change it.

    Args:
        policy_chosen_logps: [batch], as for `dpo_loss`.
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: strength of the KL penalty.
        label_smoothing: as for `smoothed_dpo_loss`.
    """
    _check_smoothing(label_smoothing, most=0.5)
    chosen, rejected = log_ratio(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    policy = policy_chosen_logps - policy_rejected_logps
    quantiles = (ref_chosen_logps - ref_rejected_logps).sort().values
    ranks = policy.detach().argsort(stable=True).argsort()
    return _loss(_smoothed(beta * (policy - quantiles[ranks]), label_smoothing), chosen, rejected, beta)


def simpo_loss(
    policy_chosen_logps: Logps, policy_rejected_logps: Logps, *, beta: float = 2.0, gamma: float = 1.0
) -> PreferenceLoss:
    """SimPO, eq. (8), without a reference.

    Args:
        policy_chosen_logps: [batch] log-probabilities averaged over the tokens (``sequence_logps(..., average=True)``).
        policy_rejected_logps: [batch], averaged.
        beta: scale of the rewards.
        gamma: margin by which the preferred reward is to be larger.
    """
    check_number("gamma", gamma)
    _check_free(policy_chosen_logps, policy_rejected_logps, beta)
    losses = -logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps) - gamma)
    return _loss(losses, policy_chosen_logps, policy_rejected_logps, beta)


def cpo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    *,
    beta: float = 0.1,
    chosen_nll: Logps | None = None,
) -> PreferenceLoss:
    """CPO, eq. (8): DPO under a uniform reference, and the likelihood of the preferred answer besides.

    Args:
        policy_chosen_logps: [batch], summed over the tokens.
        policy_rejected_logps: [batch], summed.
        beta: scale of the rewards.
        chosen_nll: [batch], what is added, such as an average over tokens; None: ``-policy_chosen_logps``, as written.
    """
    _check_free(policy_chosen_logps, policy_rejected_logps, beta)
    nll = -policy_chosen_logps if chosen_nll is None else chosen_nll
    check_logps(policy_chosen_logps=policy_chosen_logps, chosen_nll=nll)
    losses = nll - logsigmoid(beta * (policy_chosen_logps - policy_rejected_logps))
    return _loss(losses, policy_chosen_logps, policy_rejected_logps, beta)


def orpo_loss(policy_chosen_logps: Logps, policy_rejected_logps: Logps, *, beta: float = 0.1) -> PreferenceLoss:
    """ORPO, eq. (9): fine-tuning on the preferred answer and, in the same step, a penalty on the odds of the other.

    Args:
        policy_chosen_logps: [batch] log-probabilities averaged over the tokens, at most 0.
        policy_rejected_logps: [batch], averaged, at most 0.
        beta: weight of the odds ratio, lambda of the paper.
    """
    _check_free(policy_chosen_logps, policy_rejected_logps, beta)
    for name, logps in (("chosen", policy_chosen_logps), ("rejected", policy_rejected_logps)):
        if not torch.compiler.is_compiling() and logps.max() > 0:
            raise ValueError(f"policy_{name}_logps: expected log-probabilities, at most 0, got {float(logps.max())}")
    log_odds = _log_odds(policy_chosen_logps) - _log_odds(policy_rejected_logps)
    losses = -policy_chosen_logps - beta * logsigmoid(log_odds)
    return _loss(losses, policy_chosen_logps, policy_rejected_logps, beta)


def mismatched(batch: int) -> Int[Tensor, " batch"]:
    """Which answer to put to which prompt for KTO's reference point: each prompt gets that of its neighbour.

    A cyclic shift keeps no answer at its own prompt, at any size; a reversal keeps the middle one of an odd batch.

    Args:
        batch: how many prompts there are, at least 2.
    """
    check_count("batch", batch, least=2)
    return torch.arange(batch).roll(-1)


def kto_reference_point(policy_mismatched_logps: Logps, ref_mismatched_logps: Logps) -> Float[Tensor, ""]:
    """The reference point z of eq. (10): an estimate of the policy's divergence from the reference, detached.

    Args:
        policy_mismatched_logps: [batch] log-probabilities of answers after prompts that are not theirs (`mismatched`).
        ref_mismatched_logps: [batch], those under the reference.
    """
    check_logps(policy_mismatched_logps=policy_mismatched_logps, ref_mismatched_logps=ref_mismatched_logps)
    return (policy_mismatched_logps - ref_mismatched_logps).detach().mean().clamp(min=0)


def kto_loss(
    policy_logps: Logps,
    ref_logps: Logps,
    desirable: Bool[Tensor, " batch"],
    reference_point: Float[Tensor, ""],
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """KTO, eq. (10): single answers, each known to be good or bad.

    Args:
        policy_logps: [batch] log-probabilities of the answers under the policy, summed over the tokens.
        ref_logps: [batch], those under the reference.
        desirable: [batch], True for good answers.
        reference_point: z, from `kto_reference_point`.
        beta: how quickly gains and losses saturate.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U; the paper balances them by the numbers of answers.
    """
    check_logps(policy_logps=policy_logps, ref_logps=ref_logps)
    check_mask(desirable, policy_logps.shape, name="desirable", like="policy_logps")
    check_number("beta", beta, above=0.0)
    check_number("desirable_weight", desirable_weight, least=0.0)
    check_number("undesirable_weight", undesirable_weight, least=0.0)
    if reference_point.ndim:
        raise ValueError(f"reference_point: expected a scalar, got shape {tuple(reference_point.shape)}")
    ratios = policy_logps - ref_logps
    gains = beta * (ratios - reference_point)
    losses = torch.where(desirable, desirable_weight * (-gains).sigmoid(), undesirable_weight * gains.sigmoid())
    return UnpairedLoss(losses, beta * ratios.detach())


def _check_free(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, beta: float) -> None:
    check_logps(policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps)
    check_number("beta", beta, above=0.0)


def _check_smoothing(label_smoothing: float, *, most: float | None = None) -> None:
    check_number("label_smoothing", label_smoothing, least=0.0)
    if label_smoothing >= 0.5 and label_smoothing != most:
        raise ValueError(f"label_smoothing: expected labels right more often than wrong, got {label_smoothing}")


def _loss(losses: Tensor, chosen: Tensor, rejected: Tensor, beta: float) -> PreferenceLoss:
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def _smoothed(u: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(u) - label_smoothing * logsigmoid(-u)


def _averaged(ratios: Tensor, lengths: Tensor, which: str) -> Tensor:
    """Log ratios per token; those of an answer without tokens are 0."""
    if lengths.shape != ratios.shape or (not torch.compiler.is_compiling() and lengths.min() < 0):
        raise ValueError(f"{which}_lengths: expected {tuple(ratios.shape)} numbers of tokens, got {lengths}")
    return ratios / lengths.clamp(min=1)


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)), finite also where p rounds to 1."""
    return logps - (-torch.expm1(logps.clamp(max=-torch.finfo(logps.dtype).tiny))).log()
