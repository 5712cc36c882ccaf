r"""SCoRe: a model learns to correct its own answers by reinforcement learning on two attempts, in two stages.

Paper: Training Language Models to Self-Correct via Reinforcement Learning (arXiv:2409.12917)

Asked to check its answer, a model changes little, or right answers to wrong ones. Fine-tuning on corrections doesn't
help: they correct answers that another policy gave. SCoRe draws both attempts from the model. The first stage trains
the second attempt alone and holds the first one where it was, so that there is something to correct; the second stage
trains both, with a bonus for attempts that improve on the first one, so that repeating it is no way out.

Equation:
    $$ J_1 = E\bigl[r(y_2) - \beta_2 \operatorname{KL}[\pi_\theta(\cdot | x_1) \| \pi_{ref}(\cdot | x_1)]
       - \beta_1 \operatorname{KL}[\pi_\theta(\cdot | x_2) \| \pi_{ref}(\cdot | x_2)]\bigr] \tag{1} $$
    $$ J_2 = E\Bigl[r(y_1) + r(y_2) + b - \beta_1 \sum_{t = 1}^2
       \operatorname{KL}[\pi_\theta(\cdot | x_t) \| \pi_{ref}(\cdot | x_t)]\Bigr], \qquad
       b = \alpha (r(y_2) - r(y_1)) \tag{2} $$
    The gradient of an attempt is that of `rloo` with the return
    $$ G_2 = r(y_2) + b - \beta \log \frac{\pi_\theta(y_2 | x_2)}{\pi_{ref}(y_2 | x_2)}, \qquad
       G_1 = r(y_1) - \beta \log \frac{\pi_\theta(y_1 | x_1)}{\pi_{ref}(y_1 | x_1)} + \gamma G_2 \tag{3} $$
    in stage I without r(y_1) and b. With gamma = 1 it is the gradient of eqs. (1) and (2). Then, for alpha > 1, a first
    attempt that is wrong and can be corrected pays more than one that is right. With gamma = 0 each attempt answers for
    itself, and b is a baseline and a weight of 1 + alpha for the second attempt.

Symbols:
    x_1: a question; x_2: the question, the first attempt and an instruction to correct it.
    y_1, y_2: the attempts; r: their rewards, 0 or 1.
    first, second: [batch], log-probabilities of the attempts, in nats; groups of attempts at one question together.
    alpha: weight of the bonus.
    beta1, beta2: reward per nat of divergence from the first policy.
    gamma: share of the second attempt's return that the first one is credited with.

Defaults:
    alpha: 10 (table 5).
    beta1: 0.01 (table 5).
    beta2: 0.1 (table 5, mathematics; 0.25 for code).
    gamma: 0 (the "instantaneous" rewards of the appendix, as other implementations report; not checked by us).
    temperature: 1 (table 5).
    group_size: none, the caller's choice.

Deviations:
    1. The divergences are estimated from the attempts drawn and count as rewards, as in `rloo`; in expectation the
       gradient is the same.
    2. In stage I the first attempt has the weight beta2 alone; the paper adds the small beta1.
    3. The baseline of a second attempt is the mean over other first attempts at the same question.

Reduces to:
    rloo: for the first attempt in stage II with gamma = 0, and for both with alpha = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_number, check_probability
from mlreviews.datasets import ByteTokenizer
from mlreviews.models import CausalLM
from mlreviews.preference.losses import PolicyLoss, check_logps, masked_sum
from mlreviews.preference.rewards import Reward
from mlreviews.preference.rloo import kl_shaped_rewards, rloo_loss
from mlreviews.preference.trainer import Rollouts, as_module, completion_logps, frozen, rollout, train

__all__ = [
    "Attempts",
    "SCoRe",
    "SelfCorrection",
    "correction_bonus",
    "score_first_stage_loss",
    "score_second_stage_loss",
    "self_correction",
]


def correction_bonus(
    first_rewards: Float[Tensor, " batch"], second_rewards: Float[Tensor, " batch"], alpha: float = 10.0
) -> Float[Tensor, " batch"]:
    """b of eq. (2): alpha where a wrong attempt was corrected, -alpha where a right one was spoilt.

    Args:
        first_rewards: [batch], of the first attempts.
        second_rewards: [batch], of the second ones.
        alpha: at least 0.

    Raises:
        ValueError: shapes differ, NaN or infinite rewards, or a negative weight.
    """
    check_logps(first_rewards=first_rewards, second_rewards=second_rewards)
    check_number("alpha", alpha, least=0.0)
    return alpha * (second_rewards - first_rewards)


def score_first_stage_loss(
    first: Float[Tensor, " batch"],
    second: Float[Tensor, " batch"],
    first_ref: Float[Tensor, " batch"],
    second_ref: Float[Tensor, " batch"],
    second_rewards: Float[Tensor, " batch"],
    group_size: int,
    *,
    beta1: float = 0.01,
    beta2: float = 0.1,
    gamma: float = 0.0,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The loss whose expected gradient is minus that of eq. (1): better second attempts, the first ones as they were.

    Args:
        first: [batch], log-probabilities of the first attempts, with gradient.
        second: [batch], of the second attempts, with gradient.
        first_ref: [batch], of the first attempts under the reference.
        second_ref: [batch], of the second attempts under the reference.
        second_rewards: [batch].
        group_size: attempts at one question, at least 2.
        beta1: weight of the second attempt's divergence, at least 0.
        beta2: of the first attempt's, at least 0.
        gamma: of eq. (3), in [0, 1].
        normaliser: what sums over attempts are divided by, the same for all micro-batches; None for the batch size.

    Returns:
        The loss, and ``first_kl`` and ``second_kl``, the mean log-ratios to the reference in nats.

    Raises:
        ValueError: shapes differ, values are NaN or infinite, a group is too small or does not divide the batch, or a
            weight is outside of its range.
    """
    nothing = torch.zeros_like(second_rewards)
    return _both(
        (first, second),
        (first_ref, second_ref),
        (nothing, second_rewards),
        (beta2, beta1),
        group_size,
        gamma,
        normaliser,
    )


def score_second_stage_loss(
    first: Float[Tensor, " batch"],
    second: Float[Tensor, " batch"],
    first_ref: Float[Tensor, " batch"],
    second_ref: Float[Tensor, " batch"],
    first_rewards: Float[Tensor, " batch"],
    second_rewards: Float[Tensor, " batch"],
    group_size: int,
    *,
    alpha: float = 10.0,
    beta1: float = 0.01,
    gamma: float = 0.0,
    normaliser: float | None = None,
) -> PolicyLoss:
    """The loss whose expected gradient is minus that of eq. (2) for gamma = 1: both attempts, and the bonus.

    Args:
        first: [batch], log-probabilities of the first attempts, with gradient.
        second: [batch], of the second attempts, with gradient.
        first_ref: [batch], of the first attempts under the reference.
        second_ref: [batch], of the second attempts under the reference.
        first_rewards: [batch].
        second_rewards: [batch].
        group_size: attempts at one question, at least 2.
        alpha: of the bonus, at least 0.
        beta1: weight of both divergences, at least 0.
        gamma: of eq. (3), in [0, 1].
        normaliser: as of `score_first_stage_loss`.

    Returns:
        As `score_first_stage_loss`.

    Raises:
        ValueError: as `score_first_stage_loss`.
    """
    rewards = first_rewards, second_rewards + correction_bonus(first_rewards, second_rewards, alpha)
    return _both((first, second), (first_ref, second_ref), rewards, (beta1, beta1), group_size, gamma, normaliser)


Pair = tuple[Tensor, Tensor]


def _both(
    logps: Pair,
    ref_logps: Pair,
    rewards: Pair,
    betas: tuple[float, float],
    group_size: int,
    gamma: float,
    normaliser: float | None,
) -> PolicyLoss:
    """RLOO on the returns of eq. (3), of both attempts."""
    check_probability("gamma", gamma)
    first, second = (
        kl_shaped_rewards(r, p, ref, beta=beta)
        for r, p, ref, beta in zip(rewards, logps, ref_logps, betas, strict=True)
    )
    returns = first + gamma * second, second
    losses = [rloo_loss(p, g, group_size, normaliser=normaliser).loss for p, g in zip(logps, returns, strict=True)]
    ratios = [(p - ref).detach().mean() for p, ref in zip(logps, ref_logps, strict=True)]
    return PolicyLoss(losses[0] + losses[1], {"first_kl": ratios[0], "second_kl": ratios[1]})


class SelfCorrection(NamedTuple):
    """How two attempts compare, as shares of the questions.

    Attributes:
        first: right at the first attempt (Acc@t1).
        second: right at the second (Acc@t2).
        gain: their difference (Delta).
        corrected: wrong at first, then right (Delta i to c).
        spoilt: right at first, then wrong (Delta c to i).
    """

    first: float
    second: float
    gain: float
    corrected: float
    spoilt: float


def self_correction(first: Bool[Tensor, " batch"], second: Bool[Tensor, " batch"]) -> SelfCorrection:
    """The paper's metrics of self-correction.

    Args:
        first: [batch], whether the first attempts are right.
        second: [batch], whether the second ones are.

    Raises:
        ValueError: shapes differ, nothing to count, or another dtype than bool.
    """
    for name, verdicts in (("first", first), ("second", second)):
        if verdicts.dtype != torch.bool or verdicts.ndim != 1 or not len(verdicts) or verdicts.shape != first.shape:
            came = f"{tuple(verdicts.shape)} of {verdicts.dtype}"
            raise ValueError(f"{name}: expected a boolean [batch], as long as first and not empty, got {came}")
    corrected, spoilt = float((~first & second).double().mean()), float((first & ~second).double().mean())
    right = float(first.double().mean())
    return SelfCorrection(right, float(second.double().mean()), corrected - spoilt, corrected, spoilt)


class Attempts(NamedTuple):
    """Two attempts at each of some questions, drawn from the policy.

    Attributes:
        first: the first attempts; those at one question stand together.
        second: one for each first attempt.
        group_size: attempts at one question.
    """

    first: Rollouts
    second: Rollouts
    group_size: int

    def metrics(self) -> SelfCorrection:
        """Of attempts that are right where their reward is 1."""
        return self_correction(self.first.rewards == 1, self.second.rewards == 1)


@dataclass
class SCoRe:
    """Both stages around a policy::

        score = SCoRe(policy, reward, "{question}{answer}There may be an error. Again: ", max_new_tokens=40)
        optimiser = AdamW(policy.parameters(), 5e-6)
        for stage in (score.first_stage_loss, score.second_stage_loss):
            for log in score.run(stage, optimiser, questions, steps=1500, group_size=8, generator=generator):
                print(log["second_kl"], log["gain"])

    Args:
        policy: any `mlreviews.models.CausalLM` that is an `nn.Module`; a frozen copy of it is the reference.
        reward: from a question and an attempt to a number; 1 is right.
        instruction: what the second attempt is drawn from, with ``{question}`` and ``{answer}``, or a function that
            makes it from both.
        max_new_tokens: of each attempt.
        alpha: weight of the bonus, at least 0.
        beta1: reward per nat of divergence, at least 0.
        beta2: that of the first attempt in the first stage, at least 0.
        gamma: share of the second attempt's return that the first one is credited with, in [0, 1].
        temperature: at which attempts are drawn.
        stop: one token as text, which ends an attempt and belongs to it.
        tokenizer: None for `mlreviews.datasets.ByteTokenizer`.

    Raises:
        ValueError: a number outside of its range.
        TypeError: a policy that is not an `nn.Module`.
    """

    policy: CausalLM
    reward: Reward
    instruction: str | Callable[[str, str], str]
    max_new_tokens: int
    alpha: float = 10.0
    beta1: float = 0.01
    beta2: float = 0.1
    gamma: float = 0.0
    temperature: float = 1.0
    stop: str = "\n"
    tokenizer: ByteTokenizer | None = None
    reference: CausalLM = field(init=False)

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        for name in ("alpha", "beta1", "beta2"):
            check_number(name, getattr(self, name), least=0.0)
        check_probability("gamma", self.gamma)
        self.reference = frozen(self.policy)

    def collect(
        self, questions: Sequence[str], *, group_size: int, generator: torch.Generator | None = None
    ) -> Attempts:
        """Draws two attempts, the second one with the first one before it.

        Args:
            questions: texts.
            group_size: pairs of attempts at each.
            generator: draws them; None is the global one.
        """
        asked = [question for question in questions for _ in range(group_size)]
        first = self._attempt(questions, asked, group_size, generator)
        again = [self._again(question, answer) for question, answer in zip(asked, first.answers, strict=True)]
        return Attempts(first, self._attempt(again, asked, 1, generator), group_size)

    def first_stage_loss(self, attempts: Attempts) -> PolicyLoss:
        """`score_first_stage_loss` of attempts that the policy has just drawn, with their `metrics` to log.

        Args:
            attempts: of `collect`.
        """
        found = score_first_stage_loss(
            *self._logps(attempts),
            attempts.second.rewards,
            attempts.group_size,
            beta1=self.beta1,
            beta2=self.beta2,
            gamma=self.gamma,
        )
        return _with_metrics(found, attempts)

    def second_stage_loss(self, attempts: Attempts) -> PolicyLoss:
        """`score_second_stage_loss` of attempts that the policy has just drawn, with their `metrics` to log.

        Args:
            attempts: of `collect`.
        """
        found = score_second_stage_loss(
            *self._logps(attempts),
            attempts.first.rewards,
            attempts.second.rewards,
            attempts.group_size,
            alpha=self.alpha,
            beta1=self.beta1,
            gamma=self.gamma,
        )
        return _with_metrics(found, attempts)

    def run(
        self,
        stage: Callable[[Attempts], PolicyLoss],
        optimiser: torch.optim.Optimizer,
        questions: Sequence[str],
        *,
        steps: int,
        batch_size: int = 32,
        group_size: int = 4,
        generator: torch.Generator,
        checkpoint: str | Path | None = None,
    ) -> Iterator[dict[str, float]]:
        """Trains on-policy, one update on each batch.

        Args:
            stage: `first_stage_loss` or `second_stage_loss`.
            optimiser: of the policy's parameters.
            questions: texts.
            steps: batches.
            batch_size: questions at most, in each.
            group_size: pairs of attempts at each question, at least 2.
            generator: draws questions and attempts.
            checkpoint: as of `mlreviews.preference.train`; the reference is not part of it.

        Yields:
            What `mlreviews.preference.train` logs, with the stage's statistics.
        """
        check_count("batch_size", batch_size)

        def draw(generator: torch.Generator) -> Attempts:
            some = torch.randperm(len(questions), generator=generator)[:batch_size].tolist()
            return self.collect([questions[i] for i in some], group_size=group_size, generator=generator)

        policy = as_module(self.policy)
        yield from train(policy, optimiser, draw, stage, steps=steps, generator=generator, checkpoint=checkpoint)

    def _again(self, question: str, answer: str) -> str:
        if callable(self.instruction):
            return self.instruction(question, answer)
        return self.instruction.format(question=question, answer=answer)

    def _attempt(
        self, prompts: Sequence[str], asked: Sequence[str], group_size: int, generator: torch.Generator | None
    ) -> Rollouts:
        """Answers to prompts, rewarded as answers to what was asked at first."""
        drawn = rollout(
            self.policy,
            prompts,
            lambda prompt, answer: 0.0,
            group_size=group_size,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop=self.stop,
            generator=generator,
            tokenizer=self.tokenizer,
        )
        rewards = [float(self.reward(q, a)) for q, a in zip(asked, drawn.answers, strict=True)]
        return drawn._replace(rewards=drawn.rewards.new_tensor(rewards))

    def _logps(self, attempts: Attempts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First and second attempts under the policy, then under the reference, [batch] each."""
        drawn = attempts.first, attempts.second
        policy = [masked_sum(completion_logps(self.policy, x), x.labels_mask) for x in drawn]
        with torch.no_grad():
            reference = [masked_sum(completion_logps(self.reference, x), x.labels_mask) for x in drawn]
        return policy[0], policy[1], reference[0], reference[1]


def _with_metrics(found: PolicyLoss, attempts: Attempts) -> PolicyLoss:
    metrics = {name: torch.tensor(value) for name, value in attempts.metrics()._asdict().items()}
    return PolicyLoss(found.loss, found.stats | metrics)
