r"""CGPO: answers are rewarded for being better than a reference answer, and only if judges find no fault with them.

Paper: The Perfect Blend: Redefining RLHF with Mixture of Judges (arXiv:2409.20370)

A policy that is trained against a reward model finds what the model overrates. CGPO adds judges, rules or other models,
that say whether an answer keeps its constraints; an answer that one of them rejects counts as no good, however high its
reward. Rewards are compared with that of a known good answer to the same prompt, which makes those of different
prompts comparable. Three ways to improve the policy use both; several tasks may have their own rewards and judges.

Equation:
    $$ v(s, a) = \prod_h v_h(s, a) \in \{0, 1\}, \qquad R(s, a) = \sigma(r(s, a) - r(s, \bar a)) \tag{1} $$
    $$ \tilde R(s, a) = v(s, a)\, R(s, a)\, \max\Bigl(0, 1 - \frac{1}{K} \log \frac{\pi(a | s)}{\pi_{ref}(a | s)}\Bigr)
       \tag{2} $$
    CRPG, a policy gradient with the mean over the batch as baseline:
    $$ \nabla J = \frac{1}{n} \sum_i \Bigl[\tilde R(s_i, a_i) - \frac{1}{n} \sum_j \tilde R(s_j, a_j)\Bigr]
       \nabla \log \pi(a_i | s_i) \tag{3} $$
    CODPO, DPO between the best answer $a^+$ of those that keep the constraints and the worst $a^-$ of those that don't:
    $$ L = -\log \sigma\Bigl(\beta \log \frac{\pi(a^+)}{\pi_{ref}(a^+)}
       - \beta \log \frac{\pi(a^-)}{\pi_{ref}(a^-)}\Bigr) - \frac{\lambda}{|a^+|} \log \pi(a^+) \tag{4} $$
    CRRAFT, likelihood of the best answer $a^*$ with $v = 1$ and $\log (\pi / \pi_{ref}) \le K$ only:
    $$ L = -R(s, a^*) \log \pi(a^* | s) \tag{5} $$

Symbols:
    s, a: prompt and answer; groups of answers to one prompt stand together.
    a-bar: a known good answer to the prompt, such as that of the fine-tuning data.
    v_h: verdict of a judge, 1 where the answer keeps its constraint.
    r: reward of a reward model; R: calibrated reward, in (0, 1), 1/2 for a-bar itself.
    K: largest log-ratio to the reference that is still rewarded, in nats (kl_max).
    lambda: weight of the likelihood in CODPO, per token (nll).

Defaults:
    kl_max: infinite (ours); the caller's choice, as in the paper.
    beta: 0.1 (as DPO).
    nll: 1 (ours); the public implementation in trl's pull request 2190 has 5.
    group_size: none; 4 in the same implementation.

Deviations:
    1. Where all answers to a prompt keep the constraints, CODPO rejects the one of lowest reward, as that
       implementation does; where their rewards are equal as well, there is no pair. A prompt none of whose answers
       keeps the constraints is skipped by CODPO and CRRAFT, and both average over the others.
    2. The known good answer is not trained on where all others fail; for that, make it one more answer of its group.
    3. $\tilde R$ counts as a reward, without a gradient of its own.

Reduces to:
    rloo: one prompt, no violation, infinite K: CRPG has RLOO's gradient for R, times (k - 1) / k.
    dpo: CODPO with lambda = 0, on the pairs selected.
    reward-ranked fine-tuning (RAFT): CRRAFT, no violation, infinite K, weighed by R.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_number
from mlreviews.models import CausalLM
from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.losses import PolicyLoss, check_group_size, check_logps, check_mask, masked_sum
from mlreviews.preference.rewards import Reward
from mlreviews.preference.rloo import reinforce_loss
from mlreviews.preference.trainer import Rollouts, completion_logps, rollout, train

__all__ = [
    "CGPOTask",
    "JudgedAnswers",
    "calibrated_rewards",
    "codpo_loss",
    "codpo_pairs",
    "crpg_loss",
    "crpg_rewards",
    "crraft_loss",
    "judge_answers",
    "judge_rollouts",
    "train_cgpo",
]

Judge = Callable[[str, str], float]


def judge_answers(prompts: Sequence[str], answers: Sequence[str], judges: Sequence[Judge]) -> Bool[Tensor, " batch"]:
    """The verdicts of all judges together, eq. (1): True where none of them has an objection.

    Args:
        prompts: texts.
        answers: one for each prompt.
        judges: from a prompt and an answer to True or 1 where its constraint is kept, else False or 0; the rules of
            `mlreviews.preference.rewards` will do. A later judge is not asked where an earlier one objects.

    Raises:
        ValueError: another number of answers, or a judge that says neither 0 nor 1.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"answers: expected one for each of {len(prompts)} prompts, got {len(answers)}")

    def verdict(judge: Judge, prompt: str, answer: str) -> bool:
        said = judge(prompt, answer)
        if said not in (0, 1):
            raise ValueError(f"judges: expected verdicts of 0 or 1, got {said!r}")
        return bool(said)

    kept = [all(verdict(j, p, a) for j in judges) for p, a in zip(prompts, answers, strict=True)]
    return torch.tensor(kept, dtype=torch.bool)


def calibrated_rewards(
    rewards: Float[Tensor, " batch"], baseline_rewards: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """R of eq. (1): the probability, as the reward model has it, that the answer beats the known good one.

    Args:
        rewards: [batch], of the reward model.
        baseline_rewards: [batch], its rewards of the known good answers to the same prompts.

    Raises:
        ValueError: shapes differ, or NaN or infinite rewards.
    """
    check_logps(rewards=rewards, baseline_rewards=baseline_rewards)
    return (rewards - baseline_rewards).detach().sigmoid()


def crpg_rewards(
    seq_logps: Float[Tensor, " batch"],
    ref_seq_logps: Float[Tensor, " batch"],
    calibrated: Float[Tensor, " batch"],
    satisfied: Bool[Tensor, " batch"],
    *,
    kl_max: float = math.inf,
) -> Float[Tensor, " batch"]:
    """The rewards of eq. (2), without gradient; 0 for what violates a constraint.

    Args:
        seq_logps: [batch], log-probabilities of the answers, summed over their tokens, in nats.
        ref_seq_logps: [batch], under the reference.
        calibrated: [batch], of `calibrated_rewards`.
        satisfied: [batch], of `judge_answers`.
        kl_max: K > 0. Answers that are likelier than under the reference by this much have no reward; those that are
            less likely have more than R.

    Raises:
        ValueError: shapes differ, NaN or infinite values, verdicts that are not boolean, or K that is not positive.
    """
    check_logps(seq_logps=seq_logps, ref_seq_logps=ref_seq_logps, calibrated=calibrated)
    check_mask(satisfied, seq_logps.shape, name="satisfied", like="seq_logps")
    _check_kl_max(kl_max)
    near = (1 - (seq_logps - ref_seq_logps) / kl_max).clamp(min=0)
    return torch.where(satisfied, calibrated * near, 0.0).detach()


def crpg_loss(
    seq_logps: Float[Tensor, " batch"],
    ref_seq_logps: Float[Tensor, " batch"],
    calibrated: Float[Tensor, " batch"],
    satisfied: Bool[Tensor, " batch"],
    *,
    kl_max: float = math.inf,
    baseline: float | None = None,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The loss whose gradient is minus eq. (3). The answers are those of the policy itself.

    Args:
        seq_logps: [batch], with gradient, as for `crpg_rewards`.
        ref_seq_logps: [batch], under the reference.
        calibrated: [batch], of `calibrated_rewards`.
        satisfied: [batch], of `judge_answers`.
        kl_max: K > 0.
        baseline: what is subtracted, the same for all micro-batches; None for the mean of `crpg_rewards` here.
        normaliser: what the sum is divided by, the same for all micro-batches; None for the batch size.

    Returns:
        The loss, ``baseline_gap``, the mean size of the advantages, and ``satisfied``, the share without violations.

    Raises:
        ValueError: as `crpg_rewards`, or a normaliser that is not positive.
    """
    rewards = crpg_rewards(seq_logps, ref_seq_logps, calibrated, satisfied, kl_max=kl_max)
    centre = float(rewards.mean()) if baseline is None else baseline
    loss, stats = reinforce_loss(seq_logps, rewards, centre, normaliser=normaliser)
    return PolicyLoss(loss, stats | {"satisfied": satisfied.float().mean()})


def codpo_pairs(
    rewards: Float[Tensor, " batch"], satisfied: Bool[Tensor, " batch"], group_size: int
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Which answers of each group CODPO compares; groups without such a pair are left out.

    Args:
        rewards: [batch], calibrated or not: the order within a group decides.
        satisfied: [batch], of `judge_answers`.
        group_size: k >= 2 answers to one prompt, which stand together.

    Returns:
        The rows of the preferred and of the rejected answers.

    Raises:
        ValueError: shapes differ, NaN or infinite rewards, verdicts that are not boolean, or a group size that is too
            small or doesn't divide the batch.
    """
    check_logps(rewards=rewards)
    check_mask(satisfied, rewards.shape, name="satisfied", like="rewards")
    check_group_size(group_size, len(rewards), least=2)
    kept, r = satisfied.view(-1, group_size), rewards.view(-1, group_size)
    best = r.masked_fill(~kept, -math.inf).argmax(1)
    # Without a violation all answers are candidates for the worse one.
    worst = r.masked_fill(kept & ~kept.all(1, keepdim=True), math.inf).argmin(1)
    starts = torch.arange(0, len(rewards), group_size, device=rewards.device)
    paired = kept.any(1) & (best != worst)
    return (starts + best)[paired], (starts + worst)[paired]


def codpo_loss(
    seq_logps: Float[Tensor, " batch"],
    ref_seq_logps: Float[Tensor, " batch"],
    lengths: Int[Tensor, " batch"],
    rewards: Float[Tensor, " batch"],
    satisfied: Bool[Tensor, " batch"],
    group_size: int,
    *,
    beta: float = 0.1,
    nll: float = 1.0,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The loss of eq. (4) on the pairs of `codpo_pairs`; 0 where there is none.

    Args:
        seq_logps: [batch], log-probabilities of the answers, summed over their tokens, with gradient.
        ref_seq_logps: [batch], under the reference.
        lengths: [batch], tokens of the answers.
        rewards: [batch], as for `codpo_pairs`.
        satisfied: [batch], of `judge_answers`.
        group_size: k >= 2.
        beta: of DPO, > 0.
        nll: lambda, at least 0.
        normaliser: what the sum over pairs is divided by, the same for all micro-batches; None for their number.

    Returns:
        The loss, ``pairs``, how many there are, and ``margin``, their mean difference of implicit rewards.

    Raises:
        ValueError: as `codpo_pairs`, a negative length or nll, or beta or a normaliser that are not positive.
    """
    check_logps(seq_logps=seq_logps, ref_seq_logps=ref_seq_logps, rewards=rewards)
    check_number("beta", beta, above=0.0)
    check_number("nll", nll, least=0.0)
    if lengths.shape != seq_logps.shape or (lengths < 0).any():
        raise ValueError(f"lengths: expected {tuple(seq_logps.shape)} numbers of tokens, got {lengths}")
    chosen, rejected = codpo_pairs(rewards, satisfied, group_size)
    count = torch.tensor(len(chosen))
    divisor = _divisor(len(chosen), normaliser)
    if not len(chosen):
        return PolicyLoss(0 * seq_logps.sum(), {"pairs": count, "margin": torch.tensor(0.0)})
    both = (x[rows] for x in (seq_logps, ref_seq_logps) for rows in (chosen, rejected))
    losses, good, bad = dpo_loss(*both, beta=beta)
    losses = losses - nll * seq_logps[chosen] / lengths[chosen].clamp(min=1)
    return PolicyLoss(losses.sum() / divisor, {"pairs": count, "margin": (good - bad).mean()})


def crraft_loss(
    seq_logps: Float[Tensor, " batch"],
    ref_seq_logps: Float[Tensor, " batch"],
    calibrated: Float[Tensor, " batch"],
    satisfied: Bool[Tensor, " batch"],
    group_size: int,
    *,
    kl_max: float = math.inf,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The loss of eq. (5) on the best admissible answer of each group; 0 where there is none.

    Args:
        seq_logps: [batch], log-probabilities of the answers, summed over their tokens, with gradient.
        ref_seq_logps: [batch], under the reference.
        calibrated: [batch], of `calibrated_rewards`. Of several best answers the first is taken.
        satisfied: [batch], of `judge_answers`.
        group_size: k >= 1.
        kl_max: K > 0.
        normaliser: what the sum is divided by, the same for all micro-batches; None for the number of groups that have
            an admissible answer.

    Returns:
        The loss and ``groups``, how many have an admissible answer.

    Raises:
        ValueError: as `crpg_rewards`, a group size that doesn't divide the batch, or a normaliser that is not positive.
    """
    check_logps(seq_logps=seq_logps, ref_seq_logps=ref_seq_logps, calibrated=calibrated)
    check_mask(satisfied, seq_logps.shape, name="satisfied", like="seq_logps")
    check_group_size(group_size, len(seq_logps))
    _check_kl_max(kl_max)
    admissible = satisfied & ((seq_logps - ref_seq_logps) <= kl_max)
    ranked = calibrated.detach().masked_fill(~admissible, -math.inf).view(-1, group_size)
    best, index = ranked.max(1, keepdim=True)
    logps = seq_logps.view(-1, group_size).gather(1, index)
    found = best.isfinite()
    groups = found.sum()
    weighted = torch.where(found, best, 0.0) * logps
    return PolicyLoss(-weighted.sum() / _divisor(int(groups), normaliser), {"groups": groups})


class JudgedAnswers(NamedTuple):
    """What the losses take of a batch of answers; each [batch], groups stand together.

    Attributes:
        seq_logps: log-probabilities under the policy, with gradient.
        ref_seq_logps: under the reference.
        lengths: tokens of each answer.
        calibrated: rewards of eq. (1).
        satisfied: verdicts of eq. (1).
        group_size: answers to each prompt.
    """

    seq_logps: Float[Tensor, " batch"]
    ref_seq_logps: Float[Tensor, " batch"]
    lengths: Int[Tensor, " batch"]
    calibrated: Float[Tensor, " batch"]
    satisfied: Bool[Tensor, " batch"]
    group_size: int


@dataclass(frozen=True)
class CGPOTask:
    """One of the tasks that a policy is trained on, with rewards, judges and a loss of its own.

    Attributes:
        prompts: texts.
        baselines: a known good answer to each, with its stop token.
        reward: of the reward model.
        judges: as of `judge_answers`.
        loss: such as ``lambda a: crpg_loss(a.seq_logps, a.ref_seq_logps, a.calibrated, a.satisfied, kl_max=5.0)``.
        group_size: answers to each prompt.
        max_new_tokens: of each answer.
        weight: of the task's gradient in the sum.
    """

    prompts: Sequence[str]
    baselines: Sequence[str]
    reward: Reward
    judges: Sequence[Judge]
    loss: Callable[[JudgedAnswers], PolicyLoss]
    group_size: int
    max_new_tokens: int
    weight: float = 1.0


def judge_rollouts(policy: CausalLM, reference: CausalLM, task: CGPOTask, drawn: Rollouts) -> JudgedAnswers:
    """What the task's loss takes, for answers to all of its prompts.

    Args:
        policy: which drew them.
        reference: without gradient.
        task: whose reward they have.
        drawn: of `rollout`, with the task's group size.

    Raises:
        ValueError: another number of known good answers than of prompts.
    """
    if len(task.baselines) != len(task.prompts):
        raise ValueError(f"baselines: expected one for each of {len(task.prompts)} prompts, got {len(task.baselines)}")
    baselines = [task.reward(prompt, answer) for prompt, answer in zip(task.prompts, task.baselines, strict=True)]
    known = drawn.rewards.new_tensor(baselines).repeat_interleave(task.group_size)
    prompts = [prompt for prompt in task.prompts for _ in range(task.group_size)]
    with torch.no_grad():
        ref_seq_logps = masked_sum(completion_logps(reference, drawn), drawn.labels_mask)
    return JudgedAnswers(
        masked_sum(completion_logps(policy, drawn), drawn.labels_mask),
        ref_seq_logps,
        drawn.labels_mask.sum(1),
        calibrated_rewards(drawn.rewards, known),
        judge_answers(prompts, drawn.answers, task.judges).to(drawn.ids.device),
        task.group_size,
    )


def train_cgpo(
    policy: CausalLM,
    reference: CausalLM,
    optimiser: torch.optim.Optimizer,
    tasks: Sequence[CGPOTask],
    *,
    steps: int,
    generator: torch.Generator,
) -> Iterator[dict[str, float]]:
    """Trains a policy on several tasks at once: each step draws answers to all prompts and adds up the gradients.

    Args:
        policy: in the mode that it is to be trained in.
        reference: its copy from before the training, without gradient.
        optimiser: of the policy's parameters.
        tasks: at least one.
        steps: how many.
        generator: draws the answers.

    Yields:
        As `train`; statistics of task i, with its mean ``reward`` and ``satisfied`` share, have the prefix ``i/``.

    Raises:
        ValueError: no task, or what the functions above raise.
    """
    if not tasks:
        raise ValueError("tasks: expected at least one")

    def draw(generator: torch.Generator) -> list[Rollouts]:
        sample = functools.partial(rollout, policy, generator=generator)
        return [sample(t.prompts, t.reward, group_size=t.group_size, max_new_tokens=t.max_new_tokens) for t in tasks]

    def loss(batch: list[Rollouts]) -> PolicyLoss:
        total, stats = torch.tensor(0.0), dict[str, Tensor]()
        for i, (task, drawn) in enumerate(zip(tasks, batch, strict=True)):
            judged = judge_rollouts(policy, reference, task, drawn)
            found, logged = task.loss(judged)
            total = total + task.weight * found
            logged = logged | {"reward": drawn.rewards.mean(), "satisfied": judged.satisfied.float().mean()}
            stats |= {f"{i}/{name}": value for name, value in logged.items()}
        return PolicyLoss(total, stats)

    return train(cast(nn.Module, policy), optimiser, draw, loss, steps=steps, generator=generator)


def _check_kl_max(kl_max: float) -> None:
    if math.isnan(kl_max) or kl_max <= 0:
        raise ValueError(f"kl_max: expected more than 0, got {kl_max}")


def _divisor(count: int, normaliser: float | None) -> float:
    if normaliser is None:
        return max(1, count)
    check_number("normaliser", normaliser, above=0.0)
    return normaliser
