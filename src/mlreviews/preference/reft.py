r"""ReFT: a short supervised warm-up on reasoning chains, then PPO on chains of the model's own, for the same questions.

Paper: ReFT: Reasoning with Reinforced Fine-Tuning (arXiv:2401.08967)

Supervised fine-tuning sees one annotated chain of thought a question. ReFT stops it early, lets the model draw chains
for the same questions, and rewards those that end in the right answer, so that many ways of reasoning are learnt and
wrong ones are learnt from. The answers are the only supervision of the second stage.

Equation:
    $$ L_{SFT} = -E_{(x, e)} \sum_t \log \pi_\theta(a_t | s_t) \tag{1} $$
    $$ r_t = \begin{cases} 1 & \text{the answer is right} \\ 0.1 & \text{an answer, but a wrong one} \\
       0 & \text{no answer} \end{cases} \quad \text{at the last token}, \qquad
       r_t \leftarrow r_t - \beta \log \frac{\pi_{old}(a_t | s_t)}{\pi^{(0)}(a_t | s_t)} \tag{2} $$
    $$ A_t = \sum_l (\gamma \lambda)^l \delta_{t + l}, \quad \delta_t = r_t + \gamma V_\phi(s_{t + 1}) - V_\phi(s_t),
       \quad R_t = A_t + V_\phi(s_t), \quad V_\phi(s_{L + 1}) = 0 \tag{3} $$
    $$ L = L_{policy} + \alpha L_{value} \tag{4} $$
    with the clipped losses of `ppo`. The value is a linear function of the policy's last hidden state, and its gradient
    reaches all of the policy.

Symbols:
    x: a question; e: its annotated chain of thought; both texts.
    s_t: the question and the chain's tokens before a_t.
    pi^(0): the policy after the warm-up.
    r, A, R, V: [batch, labels], rewards, advantages, returns and values of tokens.
    beta: reward per nat of divergence.
    alpha: weight of the value loss, which has the factor 1/2.

Defaults:
    beta: 0.05 (section 4.3, for chains in natural language; 0.01 for programs).
    gamma, lam: 1 and 0.95 (the authors' scripts; section 4.3 has the same two numbers with the names exchanged, under
        which a reward 100 tokens ahead would count 0.006).
    clip: 0.2, of ratios and of values (section 4.3).
    value_weight: 5 (section 4.3, alpha).
    updates: 2 on each batch (section 4.3, U).
    partial: 0.1 (section 3.1, where all answers are numbers; else 0).
    group_size: 1 chain a question and batch (algorithm 1).

Deviations:
    1. The divergence in eq. (2) is its estimate from the token drawn, as in the authors' code.
    2. Advantages are normalised over the batch, which the authors' code does and the paper does not mention.
    3. Both losses are means over the tokens of the batch; the authors' code takes the mean over each chain first.
    4. The clipped value loss is that of `ppo` and of the authors' code; the paper's formula clips V - R around +A
       where R = A + V_old asks for -A.

Reduces to:
    rloo: its REINFORCE without a baseline, at the first update of a batch, with beta = 0, gamma = lam = 1, values of 0
        and advantages that are not normalised.
    supervised fine-tuning: the warm-up alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number, check_probability
from mlreviews.datasets import ByteTokenizer
from mlreviews.models import CausalLM
from mlreviews.preference.dpo_vs_ppo import ppo_rlhf_loss, rlhf_advantages, token_rewards
from mlreviews.preference.losses import PolicyLoss, masked_sum
from mlreviews.preference.rewards import Reward
from mlreviews.preference.trainer import (
    Rollouts,
    as_module,
    completion_logps,
    frozen,
    head_logps,
    last_states,
    prepare,
    rollout,
    train,
)

__all__ = ["Experience", "ReFT", "answer_reward", "chain_loss"]


def answer_reward(extract: Callable[[str], object], right: Callable[[str], object], *, partial: float = 0.1) -> Reward:
    """The reward of eq. (2) without its penalty: a rule that looks at the answer of a chain, never at its steps.

    Args:
        extract: from a chain to its answer; None where it has none.
        right: from a question to its answer.
        partial: reward of a wrong answer, in [0, 1); 0 where there are few possible answers.

    Returns:
        From a question and a chain to 1, `partial` or 0.

    Raises:
        ValueError: a partial reward outside of [0, 1).
    """
    check_probability("partial", partial)
    if partial == 1:
        raise ValueError("partial: expected less than 1, the reward of a right answer")

    def reward(question: str, chain: str) -> float:
        found = extract(chain)
        if found is None:
            return 0.0
        return 1.0 if found == right(question) else partial

    return reward


def chain_loss(
    policy: CausalLM, questions: Sequence[str], chains: Sequence[str], *, tokenizer: ByteTokenizer | None = None
) -> Float[Tensor, ""]:
    """The supervised loss of eq. (1): minus the log-probability of a chain, mean over the chains, in nats.

    Args:
        policy: being trained.
        questions: texts.
        chains: one for each question; the stop token belongs to it.
        tokenizer: None for `mlreviews.datasets.ByteTokenizer`.

    Raises:
        ValueError: no questions, an empty one, or another number of chains.
    """
    ids, real, mask = (x.to(policy.lm_head.weight.device) for x in prepare(questions, chains, tokenizer=tokenizer))
    logps = head_logps(policy, last_states(policy, ids, real), ids, mask, 1.0)
    return -masked_sum(logps, mask[:, 1:]).mean()


class Experience(NamedTuple):
    """Chains that the policy drew, with all that both losses need of the time at which it drew them.

    Attributes:
        drawn: the chains, their rewards (without the penalty) and log-probabilities.
        values: [batch, labels], V of the state before each token.
        advantages: [batch, labels]; 0 at questions and padding.
        returns: [batch, labels], likewise.
        divergence: [batch], log-ratio of each chain to the reference, in nats.
    """

    drawn: Rollouts
    values: Float[Tensor, "batch labels"]
    advantages: Float[Tensor, "batch labels"]
    returns: Float[Tensor, "batch labels"]
    divergence: Float[Tensor, " batch"]


@dataclass
class ReFT:
    """Both stages around a policy::

        reft = ReFT(policy, linear(128, 1), answer_reward(last_number, answers.get), max_new_tokens=40)
        for log in reft.warm_up(AdamW(reft.parameters(), 1e-5), questions, chains, steps=300, generator=generator):
            ...
        for log in reft.reinforce(AdamW(reft.parameters(), 3e-7), questions, steps=5000, generator=generator):
            print(log["reward"], log["clip_fraction"])

    Args:
        policy: any `mlreviews.models.CausalLM` that is an `nn.Module`.
        value_head: from a state to one number, such as `mlreviews.common.layers.linear(d_model, 1)`.
        reward: from a question and a chain to a number, such as `answer_reward` makes.
        max_new_tokens: of a chain.
        beta: reward per nat of divergence from the policy after the warm-up, at least 0.
        gamma: discount in [0, 1].
        lam: of generalised advantage estimation, in [0, 1].
        clip: of ratios and of values, > 0.
        value_weight: alpha, at least 0.
        normalise: the advantages, over the batch.
        temperature: at which chains are drawn.
        stop: one token as text, which ends a chain and belongs to it.
        tokenizer: None for `mlreviews.datasets.ByteTokenizer`.

    Raises:
        ValueError: a number outside of its range.
        TypeError: a policy that is not an `nn.Module`.
    """

    policy: CausalLM
    value_head: nn.Module
    reward: Reward
    max_new_tokens: int
    beta: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_weight: float = 5.0
    normalise: bool = True
    temperature: float = 1.0
    stop: str = "\n"
    tokenizer: ByteTokenizer | None = None
    reference: CausalLM = field(init=False)

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        check_number("beta", self.beta, least=0.0)
        check_probability("gamma", self.gamma)
        check_probability("lam", self.lam)
        check_number("clip", self.clip, above=0.0)
        check_number("value_weight", self.value_weight, least=0.0)
        self.freeze_reference()

    def parameters(self) -> list[Tensor]:
        """Those of the policy and of the value head, for an optimiser."""
        return list(self._trained().parameters())

    def freeze_reference(self) -> None:
        """Makes the policy as it is now the reference, pi^(0) of eq. (2)."""
        self.reference = frozen(self.policy)

    def warm_up(
        self,
        optimiser: torch.optim.Optimizer,
        questions: Sequence[str],
        chains: Sequence[str],
        *,
        steps: int,
        batch_size: int = 48,
        generator: torch.Generator,
    ) -> Iterator[dict[str, float]]:
        """The first stage, supervised; its end is the reference of the second.

        Args:
            optimiser: of `parameters`.
            questions: all that there are for training.
            chains: one for each.
            steps: batches, each drawn without repetition.
            batch_size: questions at most.
            generator: draws the batches.

        Yields:
            What `mlreviews.preference.train` logs.
        """

        def loss(rows: list[int]) -> Tensor:
            some = [questions[i] for i in rows], [chains[i] for i in rows]
            return chain_loss(self.policy, *some, tokenizer=self.tokenizer)

        draw = _batches(len(questions), batch_size)
        yield from train(self._trained(), optimiser, draw, loss, steps=steps, generator=generator)
        self.freeze_reference()

    def reinforce(
        self,
        optimiser: torch.optim.Optimizer,
        questions: Sequence[str],
        *,
        steps: int,
        batch_size: int = 32,
        group_size: int = 1,
        updates: int = 2,
        generator: torch.Generator,
        checkpoint: str | Path | None = None,
    ) -> Iterator[dict[str, float]]:
        """The second stage, PPO on the policy's own chains.

        Args:
            optimiser: of `parameters`.
            questions: those of the first stage, in the paper.
            steps: batches of chains.
            batch_size: questions at most, in each.
            group_size: chains for each question.
            updates: on each batch.
            generator: draws questions and chains.
            checkpoint: as of `mlreviews.preference.train`; the reference is not part of it.

        Yields:
            What `mlreviews.preference.train` logs; see `loss`.
        """
        some = _batches(len(questions), batch_size)

        def draw(generator: torch.Generator) -> Experience:
            return self.collect([questions[i] for i in some(generator)], group_size=group_size, generator=generator)

        yield from train(
            self._trained(),
            optimiser,
            draw,
            self.loss,
            steps=steps,
            updates=updates,
            generator=generator,
            checkpoint=checkpoint,
        )

    def collect(
        self, questions: Sequence[str], *, group_size: int = 1, generator: torch.Generator | None = None
    ) -> Experience:
        """Draws chains and computes eqs. (2) and (3).

        Args:
            questions: texts.
            group_size: chains for each.
            generator: draws them; None is the global one.
        """
        drawn = rollout(
            self.policy,
            questions,
            self.reward,
            group_size=group_size,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop=self.stop,
            generator=generator,
            tokenizer=self.tokenizer,
        )
        mask = drawn.labels_mask
        with torch.no_grad():
            values = self._values(last_states(self.policy, drawn.ids, drawn.real))
            reference = completion_logps(self.reference, drawn)
            rewards = token_rewards(drawn.rewards, drawn.logp_old, reference, mask, beta=self.beta)
        advantages, returns = rlhf_advantages(
            rewards, values, mask, gamma=self.gamma, lam=self.lam, normalise=self.normalise
        )
        return Experience(drawn, values, advantages, returns, masked_sum(drawn.logp_old - reference, mask))

    def loss(self, collected: Experience) -> PolicyLoss:
        """Eq. (4), from one pass of the policy and its value head.

        Args:
            collected: of `collect`.

        Returns:
            The loss, what `mlreviews.preference.ppo_rlhf_loss` logs, and means over the chains drawn: ``reward``, and
            ``reference_kl`` in nats.
        """
        drawn = collected.drawn
        states = last_states(self.policy, drawn.ids, drawn.real)
        loss, stats = ppo_rlhf_loss(
            head_logps(self.policy, states, drawn.ids, drawn.mask, drawn.temperature),
            drawn.logp_old,
            self._values(states),
            collected.values,
            collected.advantages,
            collected.returns,
            drawn.labels_mask,
            clip=self.clip,
            value_clip=self.clip,
            value_weight=self.value_weight,
        )
        means = {"reward": drawn.rewards.mean(), "reference_kl": collected.divergence.mean()}
        return PolicyLoss(loss, stats | means)

    def _values(self, states: Tensor) -> Tensor:
        values: Tensor = self.value_head(states)[..., 0]
        return values

    def _trained(self) -> nn.ModuleList:
        return nn.ModuleList([as_module(self.policy), self.value_head])


def _batches(count: int, batch_size: int) -> Callable[[torch.Generator], list[int]]:
    """Draws some of `count` rows, each at most once."""
    check_count("batch_size", batch_size)
    return lambda generator: torch.randperm(count, generator=generator)[:batch_size].tolist()
