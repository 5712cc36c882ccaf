r"""RPT: the next token of a text as a question that a model reasons about, rewarded where its guess is right.

Paper: Reinforcement Pre-Training (arXiv:2506.08007)

Instead of raising the likelihood of the next token, the model is asked to think before it predicts it. Several outputs
are drawn to each position of the text; those whose prediction is what the text goes on with get the reward 1, the
others 0, and GRPO trains on that. Any text gives such questions, and the reward can't be talked into anything.

Equation:
    $$ r_i = \begin{cases} 1 & y_i = x_{\ge t}[1:l] \text{ and } l \in \mathcal{L}_t \\ 0 & \text{else} \end{cases},
       \qquad (c_i, y_i) \sim \pi(\cdot \mid x_{<t}), \quad i = 1 \dots G \tag{1} $$
    $$ L = -\frac1G \sum_i \frac{1}{\lvert o_i \rvert} \sum_k \frac{\pi(o_{ik})}{\pi_{old}(o_{ik})} A_i, \qquad
       A_i = \frac{r_i - \operatorname{mean}(r)}{\operatorname{std}(r)} \tag{2} $$
    Without a thought and without the standard deviation, the expected gradient on-policy is that of accuracy, where
    likelihood training has that of its logarithm:
    $$ \mathbb{E}[\nabla L] = -\frac{G - 1}{G} \nabla \pi(x_t \mid x_{<t}) \tag{3} $$
    Positions that a proxy model is sure of have little to teach and are left out; with q its k most likely tokens,
    $$ H_t = -\sum_{v \le k} q_v \log q_v \ge \text{threshold} \tag{4} $$

Symbols:
    x: the text; t: a position in it.
    c, y: thought and prediction, y as bytes, l of them; o: both with what stands around them.
    L_t: how many bytes the first token from t on has, the first two together, the first three ...
    G: outputs to a position.
    H_t: entropy in nats.

Defaults:
    group_size: 8, drawn at a temperature of 0.8 (section 3).
    top_k: 16 (section 3).
    dynamic_from: 500 (section 3: dynamic sampling from step 500 on).
    clip: as `grpo_loss` has it; it acts on nothing as long as a batch is used for one update, as here. No reference.

Deviations:
    1. The prediction is what follows a marker, or the whole output where there is none; the paper's stands in a box.
    2. Dynamic sampling leaves out groups without an advantage and does not draw others in their place.
    3. In eq. (4) the k probabilities are normalised, so that they are a distribution.

Reduces to:
    rloo: predictions without a thought, of a token each; without the standard deviation, times G / (G - 1).
    expected accuracy: eq. (3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_finite, check_number
from mlreviews.datasets import ByteTokenizer
from mlreviews.models import CausalLM
from mlreviews.preference.gspo import group_advantages
from mlreviews.preference.losses import PolicyLoss, check_group_size
from mlreviews.preference.open_rs import grpo_loss
from mlreviews.preference.trainer import Rollouts, as_module, completion_logps, rollout, train

__all__ = [
    "TextPosition",
    "hard_positions",
    "mixed_groups",
    "prediction_of",
    "prefix_match_reward",
    "rpt_loss",
    "text_position",
    "train_predictions",
]


class TextPosition(NamedTuple):
    """A place in a text as a question.

    Attributes:
        context: the text up to it.
        continuation: what follows, as bytes.
        boundaries: after how many bytes of the continuation a token ends.
    """

    context: str
    continuation: bytes
    boundaries: tuple[int, ...]


def text_position(tokens: Sequence[str], place: int) -> TextPosition:
    """The question that a text asks before one of its tokens.

    Args:
        tokens: the text in pieces, none of them empty.
        place: index of the token to predict, from 1 on.

    Raises:
        ValueError: a place without a token or without a context, or an empty token.
    """
    if not 1 <= place < len(tokens):
        raise ValueError(f"place: expected 1 to {len(tokens) - 1}, got {place}")
    if not all(tokens):
        raise ValueError("tokens: expected none that is empty")
    following = [token.encode() for token in tokens[place:]]
    return TextPosition("".join(tokens[:place]), b"".join(following), tuple(accumulate(map(len, following))))


def prefix_match_reward(prediction: bytes, continuation: bytes, boundaries: Collection[int]) -> float:
    """Eq. (1): 1 where the text goes on with the prediction and a token ends where it does, else 0.

    Args:
        prediction: of one token or several; an empty one gets 0.
        continuation: of the text.
        boundaries: see `TextPosition`.
    """
    return float(bool(prediction) and len(prediction) in boundaries and continuation.startswith(prediction))


def prediction_of(output: bytes, *, marker: bytes | None = None, stop: bytes = b"") -> bytes:
    """What an output predicts: all that follows its last marker; b"" where the marker is missing.

    Args:
        output: of the model.
        marker: None where the whole output is the prediction.
        stop: does not belong to the prediction where the output ends with it.

    Raises:
        ValueError: an empty marker.
    """
    output = output.removesuffix(stop)
    if marker is None:
        return output
    if not marker:
        raise ValueError("marker: expected a text, got an empty one")
    _, found, prediction = output.rpartition(marker)
    return prediction if found else b""


def hard_positions(
    logits: Float[Tensor, "*batch vocab"], *, threshold: float, top_k: int = 16
) -> Bool[Tensor, "*batch"]:
    """Where a proxy model is not sure of what comes next, eq. (4).

    Args:
        logits: [..., vocab], of the proxy.
        threshold: least entropy in nats, at least 0; 0 keeps all.
        top_k: how many of the most likely tokens count; all of them if there are fewer.

    Raises:
        ValueError: NaN or infinity, a negative threshold, or no token that counts.
    """
    check_finite("logits", logits)
    check_number("threshold", threshold, least=0.0)
    check_count("top_k", top_k)
    logp = logits.topk(min(top_k, logits.shape[-1]), -1).values.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1) >= threshold


def mixed_groups(rewards: Float[Tensor, " batch"], group_size: int) -> Bool[Tensor, " groups"]:
    """Which groups have different rewards, so that there is something to learn from them.

    Args:
        rewards: [batch], groups after one another.
        group_size: outputs to one position.

    Raises:
        ValueError: the group size does not divide the batch.
    """
    check_group_size(group_size, len(rewards))
    groups = rewards.view(-1, group_size)
    return groups.amax(1) > groups.amin(1)


def rpt_loss(
    logp: Float[Tensor, "batch time"],
    logp_old: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    rewards: Float[Tensor, " batch"],
    group_size: int,
    *,
    normalise_std: bool = True,
    dynamic_sampling: bool = False,
) -> PolicyLoss:
    """Eq. (2): GRPO without a reference.

    Args:
        logp: [batch, time], log-probabilities of outputs under the policy being trained, thoughts included.
        logp_old: [batch, time], under the policy that drew them.
        mask: [batch, time], True at the tokens of outputs.
        rewards: [batch], of `prefix_match_reward`.
        group_size: G >= 2.
        normalise_std: divide advantages by the group's standard deviation.
        dynamic_sampling: average over the outputs of mixed groups only.

    Returns:
        The loss and what `grpo_loss` logs; besides, ``accuracy``, the mean reward, and ``mixed``, the share of groups
        with different rewards.

    Raises:
        ValueError: as `group_advantages` and `grpo_loss`.
    """
    advantages = group_advantages(rewards, group_size, normalise_std=normalise_std)
    mixed = mixed_groups(rewards, group_size)
    # Outputs of other groups have no advantage: leaving them out is not counting them.
    normaliser = max(1.0, float(mixed.sum()) * group_size) if dynamic_sampling else None
    loss, stats = grpo_loss(logp, logp_old, mask, advantages, normaliser=normaliser)
    return PolicyLoss(loss, {**stats, "accuracy": rewards.mean(), "mixed": mixed.float().mean()})


def train_predictions(
    policy: CausalLM,
    optimiser: torch.optim.Optimizer,
    positions: Sequence[TextPosition],
    *,
    steps: int,
    batch: int,
    max_new_tokens: int,
    generator: torch.Generator,
    marker: str | None = None,
    stop: str = "\n",
    group_size: int = 8,
    temperature: float = 0.8,
    dynamic_from: int = 500,
    tokenizer: ByteTokenizer | None = None,
) -> Iterator[dict[str, float]]:
    """The whole procedure: positions drawn from those that are given, outputs to each, rewards, a step.

    Args:
        policy: to be trained.
        optimiser: of its parameters.
        positions: of texts, for instance where `hard_positions` says so.
        steps: how many.
        batch: positions of a step, drawn with replacement.
        max_new_tokens: of an output, thought and prediction together.
        generator: draws positions and outputs.
        marker: what the prediction follows; None where there is no thought.
        stop: one token as text, such as texts don't have; it ends an output, and is no part of the prediction.
        group_size: G, outputs to each position.
        temperature: at which they are drawn.
        dynamic_from: the first step, counted from 1, with dynamic sampling.
        tokenizer: None for `mlreviews.datasets.ByteTokenizer`.

    Yields:
        After each step, what `train` and `rpt_loss` give.

    Raises:
        ValueError: no positions, or as `rollout`.
    """
    if not positions:
        raise ValueError("positions: expected at least one")
    check_count("batch", batch)
    check_count("dynamic_from", dynamic_from)
    used = ByteTokenizer() if tokenizer is None else tokenizer
    taken = 0

    def draw(generator: torch.Generator) -> Rollouts:
        places = torch.randint(len(positions), (batch,), generator=generator).tolist()
        asked = [positions[place] for place in places]
        drawn = rollout(
            policy,
            [position.context for position in asked],
            lambda prompt, output: 0.0,  # rewarded below: one context can have several continuations
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            generator=generator,
            tokenizer=used,
        )
        rewards = []
        for i, (ids, mask) in enumerate(zip(drawn.ids, drawn.mask, strict=True)):
            _, continuation, boundaries = asked[i // group_size]
            output = used.decode_bytes(ids[mask])  # a prediction may end within a character
            sign = None if marker is None else marker.encode()
            prediction = prediction_of(output, marker=sign, stop=stop.encode())
            rewards.append(prefix_match_reward(prediction, continuation, boundaries))
        return drawn._replace(rewards=torch.tensor(rewards, device=drawn.ids.device))

    def loss(drawn: Rollouts) -> PolicyLoss:
        nonlocal taken
        taken += 1
        logp = completion_logps(policy, drawn)
        return rpt_loss(
            logp,
            drawn.logp_old,
            drawn.labels_mask,
            drawn.rewards,
            group_size,
            dynamic_sampling=taken >= dynamic_from,
        )

    yield from train(as_module(policy), optimiser, draw, loss, steps=steps, generator=generator)
