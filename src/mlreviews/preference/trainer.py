"""What it takes to run the losses of this area on a language model: rollouts, their log-probabilities, a training loop.

::

    policy, reference = load_pretrained("python-target"), load_pretrained("python-target").requires_grad_(False)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=3e-5)

    def draw(generator):                                                # GRPO, on-policy
        return rollout(policy, prompts, line_parses, group_size=8, max_new_tokens=40, generator=generator)

    def loss(drawn):
        advantages = group_advantages(drawn.rewards, 8)
        return grpo_loss(completion_logps(policy, drawn), drawn.logp_old, drawn.labels_mask, advantages)

    for log in train(policy, optimiser, draw, loss, steps=100, generator=generator, checkpoint=folder / "run.pt"):
        print(log["step"], log["loss"])

Offline losses of pairs take `pair_logps`. A run that is killed goes on from its last finished step when it is started
again with the same arguments, and ends with the same bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number
from mlreviews.datasets import ByteTokenizer
from mlreviews.models import CausalLM, Sampler, generate
from mlreviews.preference.logps import linear_token_logps
from mlreviews.preference.losses import PolicyLoss, masked_sum
from mlreviews.preference.rewards import Reward

__all__ = ["Rollouts", "completion_logps", "pair_logps", "prepare", "rollout", "train"]

Batch = TypeVar("Batch")


class Rollouts(NamedTuple):
    """Answers that a policy drew, with their prompts; the answers to one prompt stand one after another.

    Attributes:
        ids: [batch, time], prompts padded on the left, answers on the right.
        real: [batch, time], False at the padding on the left.
        mask: [batch, time], True at the tokens of answers, a stop token included.
        rewards: [batch].
        logp_old: [batch, time - 1], log-probabilities of ``ids[:, 1:]`` under the policy and temperature that drew
            them; 0 where `labels_mask` is False.
        temperature: at which they were drawn.
        answers: the texts.
    """

    ids: Int[Tensor, "batch time"]
    real: Bool[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    rewards: Float[Tensor, " batch"]
    logp_old: Float[Tensor, "batch labels"]
    temperature: float
    answers: tuple[str, ...]

    @property
    def labels_mask(self) -> Bool[Tensor, "batch labels"]:
        """The mask of what is predicted, ``ids[:, 1:]``."""
        return self.mask[:, 1:]


def prepare(
    prompts: Sequence[str], answers: Sequence[str] | None = None, *, tokenizer: ByteTokenizer | None = None
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Texts as a batch: prompts padded on the left, answers (if any) on the right.

    Args:
        prompts: at least one, none empty.
        answers: one for each prompt; a stop token or line break belongs into the text.
        tokenizer: None for `mlreviews.datasets.ByteTokenizer`.

    Returns:
        ids, real (False at the padding on the left) and mask (True at the tokens of answers), all [batch, time].

    Raises:
        ValueError: no prompts, an empty one, or another number of answers.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    if not prompts or not all(prompts):
        raise ValueError("prompts: expected at least one, and none that is empty")
    ids, real = tokenizer.encode_batch(list(prompts), side="left")
    if answers is None:
        return ids, real, torch.zeros_like(real)
    if len(answers) != len(prompts):
        raise ValueError(f"answers: expected one for each of {len(prompts)} prompts, got {len(answers)}")
    behind, mask = tokenizer.encode_batch(list(answers), side="right")
    whole = torch.ones_like(mask)  # what is behind an answer is seen by nothing that counts
    return torch.cat([ids, behind], 1), torch.cat([real, whole], 1), torch.cat([torch.zeros_like(real), mask], 1)


def completion_logps(
    model: CausalLM, drawn: Rollouts, *, temperature: float | None = None
) -> Float[Tensor, "batch labels"]:
    """Log-probabilities of the answers' tokens under a model, with gradient; 0 elsewhere. No logits are held.

    Args:
        model: the policy, or a reference.
        drawn: of `rollout`.
        temperature: None for that at which the answers were drawn, so that ratios are 1 on-policy.

    Returns:
        [batch, time - 1], aligned with ``drawn.logp_old``.
    """
    temperature = drawn.temperature if temperature is None else temperature
    return _logps(model, drawn.ids, drawn.real, drawn.mask, temperature)


def pair_logps(
    model: CausalLM,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    tokenizer: ByteTokenizer | None = None,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Log-probabilities of preferred and of rejected answers, summed over their tokens, in one pass over both.

    Args:
        model: the policy, or the reference under `torch.no_grad`.
        prompts: texts, as of `prepare`.
        chosen: one for each prompt.
        rejected: one for each prompt.
        tokenizer: as of `prepare`.

    Returns:
        Two tensors [batch], in nats.
    """
    ids, real, mask = prepare([*prompts, *prompts], [*chosen, *rejected], tokenizer=tokenizer)
    device = model.lm_head.weight.device
    ids, real, mask = (x.to(device) for x in (ids, real, mask))
    sums = masked_sum(_logps(model, ids, real, mask, 1.0), mask[:, 1:])
    return sums[: len(prompts)], sums[len(prompts) :]


def _logps(model: CausalLM, ids: Tensor, real: Tensor, mask: Tensor, temperature: float) -> Tensor:
    return head_logps(model, last_states(model, ids, real), ids, mask, temperature)


def last_states(
    model: CausalLM, ids: Int[Tensor, "batch time"], real: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch labels dim"]:
    """The states from which a model predicts each token but the first; a value head reads them, too.

    Args:
        model: the policy, or a reference.
        ids: [batch, time], as of `Rollouts`.
        real: [batch, time], likewise.
    """
    left = None if bool(real.all()) else real[:, :-1]
    hidden = model(ids[:, :-1], mask=left, hidden_states=True).hidden_states
    assert hidden is not None
    return hidden[-1]


def head_logps(
    model: CausalLM,
    states: Float[Tensor, "batch labels dim"],
    ids: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    temperature: float,
) -> Float[Tensor, "batch labels"]:
    """Log-probabilities of ``ids[:, 1:]`` from the states of `last_states`; 0 where the mask is False.

    Args:
        model: whose head is used.
        states: [batch, time - 1, dim].
        ids: [batch, time].
        mask: [batch, time], True at the tokens of answers.
        temperature: of the distribution.
    """
    head = model.lm_head
    bias = getattr(head, "bias", None)
    return linear_token_logps(states, head.weight, ids[:, 1:], mask[:, 1:], bias=bias, temperature=temperature)


def rollout(
    policy: CausalLM,
    prompts: Sequence[str],
    reward: Reward,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop: str = "\n",
    generator: torch.Generator | None = None,
    tokenizer: ByteTokenizer | None = None,
) -> Rollouts:
    """Draws answers to prompts and rewards them.

    Args:
        policy: a byte-level model, or any with a tokenizer that is given.
        prompts: texts.
        reward: from a prompt and an answer, both texts, to a number.
        group_size: answers to each prompt.
        max_new_tokens: of each answer.
        temperature: above 0. Nothing is cut off the distribution, so that `logp_old` are its log-probabilities.
        stop: one token as text; it ends an answer and belongs to it.
        generator: draws the answers; None is the global one.
        tokenizer: as of `prepare`.

    Returns:
        ``len(prompts) * group_size`` rows.

    Raises:
        ValueError: no prompts, a group size or temperature that makes no sense, or a stop that isn't one token.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    check_count("group_size", group_size)
    check_number("temperature", temperature, above=0.0)
    stop_tokens = tokenizer.encode(stop).tolist()
    if len(stop_tokens) != 1:
        raise ValueError(f"stop: expected one token, got {stop!r}")
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    device = policy.lm_head.weight.device
    ids, real, _ = (x.to(device) for x in prepare(repeated, tokenizer=tokenizer))
    result = generate(
        policy,
        ids,
        max_new_tokens,
        sampler=Sampler(temperature=temperature),
        mask=None if bool(real.all()) else real,
        generator=generator,
        stop_tokens=stop_tokens,
    )
    new = result.tokens.to(device)
    answered = torch.arange(new.shape[1], device=device) < result.lengths.to(device)[:, None]
    whole = torch.cat([ids, new], 1)
    real = torch.cat([real, torch.ones_like(answered)], 1)
    mask = torch.cat([torch.zeros_like(ids, dtype=torch.bool), answered], 1)
    answers = tuple(tokenizer.decode(result.row(i)) for i in range(len(repeated)))
    rewards = torch.tensor([float(reward(*pair)) for pair in zip(repeated, answers, strict=True)])
    with torch.no_grad():
        logp_old = _logps(policy, whole, real, mask, temperature)
    return Rollouts(whole, real, mask, rewards.to(device), logp_old, temperature, answers)


def as_module(policy: object) -> nn.Module:
    """The policy, if it has parameters to train; raises TypeError where it is no `nn.Module`."""
    if not isinstance(policy, nn.Module):
        raise TypeError(f"policy: expected an nn.Module, got {type(policy).__name__}")
    return policy


def frozen(policy: CausalLM) -> CausalLM:
    """A copy of the policy as it is now, without gradient: a reference. Raises TypeError where it is no `nn.Module`."""
    as_module(policy)
    reference = copy.deepcopy(policy)
    as_module(reference).requires_grad_(False)
    return reference


def train(
    policy: nn.Module,
    optimiser: torch.optim.Optimizer,
    draw: Callable[[torch.Generator], Batch],
    loss: Callable[[Batch], Tensor | PolicyLoss],
    *,
    steps: int,
    generator: torch.Generator,
    updates: int = 1,
    max_norm: float = 1.0,
    checkpoint: str | Path | None = None,
) -> Iterator[dict[str, float]]:
    """Runs a loss: draw a batch, differentiate, clip, step.

    Args:
        policy: in the mode that it is to be trained in.
        optimiser: of the policy's trained parameters.
        draw: makes a step's batch: pairs, or rollouts; all its randomness comes from the generator that it is given.
        loss: of a batch: a scalar, or a `PolicyLoss`.
        steps: how many.
        generator: goes on from step to step; its state is part of the checkpoint.
        updates: from each batch, as PPO takes several.
        max_norm: of the gradient.
        checkpoint: file that is replaced after each step. Where it exists, the run goes on from it.

    Yields:
        After each step, of its last update: its number as ``step``, ``loss``, ``gradient_norm`` before clipping, and
        what the loss logs.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; parameters are then those before the update.
    """
    check_count("updates", updates)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    path, start = None if checkpoint is None else Path(checkpoint), 0
    if path is not None and path.exists():
        saved = torch.load(path, weights_only=True)
        policy.load_state_dict(saved["policy"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.set_state(saved["generator"])
        start = saved["step"]
    for step in range(start + 1, steps + 1):
        batch = draw(generator)
        for _ in range(updates):
            log = _update(optimiser, parameters, loss(batch), max_norm)
        if path is not None:
            state = {"policy": policy.state_dict(), "optimiser": optimiser.state_dict()}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "generator": generator.get_state(), "step": step}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        yield {"step": step, **log}


def _update(
    optimiser: torch.optim.Optimizer, parameters: list[Tensor], found: Tensor | PolicyLoss, max_norm: float
) -> dict[str, float]:
    loss, stats = (found.loss, found.stats) if isinstance(found, PolicyLoss) else (found, {})
    optimiser.zero_grad()
    loss.backward()
    value, norm = float(loss.detach()), float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    if not math.isfinite(value) or not math.isfinite(norm):
        raise FloatingPointError(f"loss: expected finite numbers, got {value} with a gradient of norm {norm:.3g}")
    optimiser.step()
    return {"loss": value, "gradient_norm": norm, **{name: float(x) for name, x in stats.items()}}
