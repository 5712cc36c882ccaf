"""What the losses of this area return, and the checks of arguments that they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlreviews.common.checks import check_count, check_finite, check_number

__all__ = ["PolicyLoss", "PreferenceLoss", "UnpairedLoss"]


class PreferenceLoss(NamedTuple):
    """What a loss of preferred and rejected answers returns.

    Attributes:
        losses: [batch], one a pair, not reduced: the caller takes the mean, or weighs them.
        chosen_rewards: [batch], implicit rewards of the preferred answers (nats times beta), detached.
        rejected_rewards: [batch], those of the rejected answers, detached.
    """

    losses: Float[Tensor, " batch"]
    chosen_rewards: Float[Tensor, " batch"]
    rejected_rewards: Float[Tensor, " batch"]


class UnpairedLoss(NamedTuple):
    """What a loss of single answers with a verdict each returns.

    Attributes:
        losses: [batch], one an answer, not reduced.
        rewards: [batch], implicit rewards of the answers (nats times beta), detached.
    """

    losses: Float[Tensor, " batch"]
    rewards: Float[Tensor, " batch"]


class PolicyLoss(NamedTuple):
    """What a loss of sampled answers and their rewards returns.

    Attributes:
        loss: the scalar to minimise.
        stats: what there is to log, by name; detached.
    """

    loss: Float[Tensor, ""]
    stats: dict[str, Tensor]


def check_logps(ndim: int = 1, **logps: Tensor) -> None:
    """Raises unless all tensors are floating point, of the same non-empty shape with `ndim` axes, and finite.

    Under `torch.compile` the values are not looked at.

    Args:
        ndim: 1 for sums over answers ([batch]), 2 for tokens ([batch, time]).
        **logps: the arguments by name.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: a shape that differs from the first, the wrong number of axes, no entries, NaN or infinity.
    """
    wanted = next(iter(logps.values())).shape
    for name, tensor in logps.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.ndim != ndim or tensor.numel() == 0:
            axes = "[batch]" if ndim == 1 else "[batch, time]"
            raise ValueError(f"{name}: expected {axes} with no empty axis, got shape {tuple(tensor.shape)}")
        if tensor.shape != wanted:
            first = next(iter(logps))
            raise ValueError(f"{name}: expected shape {tuple(wanted)}, as {first} has, got {tuple(tensor.shape)}")
        if not torch.compiler.is_compiling():
            check_finite(name, tensor)


def log_ratio(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The log ratios of preferred and rejected answers, [batch] each, after the checks that every loss of pairs needs.

    Args:
        policy_chosen_logps: [batch].
        policy_rejected_logps: [batch].
        ref_chosen_logps: [batch].
        ref_rejected_logps: [batch].
        beta: of the loss, checked only.
    """
    check_logps(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    check_number("beta", beta, above=0.0)
    return policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps


def check_mask(mask: Tensor, shape: torch.Size, *, name: str = "mask", like: str = "logp") -> None:
    """Raises unless the mask is of bool and has the given shape.

    Args:
        mask: the argument.
        shape: what it has to have.
        name: the argument's name, for the message.
        like: the argument that has this shape, for the message.

    Raises:
        ValueError: another dtype or shape.
    """
    if mask.dtype != torch.bool or mask.shape != shape:
        wanted = f"{tuple(shape)}, as {like} has, of bool"
        raise ValueError(f"{name}: expected {wanted}, got shape {tuple(mask.shape)} of {mask.dtype}")


def check_group_size(group_size: int, batch: int, *, least: int = 1) -> None:
    """Raises unless the batch is made of whole groups of at least ``least`` answers.

    Args:
        group_size: answers to one prompt.
        batch: how many answers there are.
        least: the smallest group that makes sense.

    Raises:
        TypeError: not a whole number.
        ValueError: too small a group, or one that does not divide the batch.
    """
    check_count("group_size", group_size, least=least)
    if batch % group_size:
        raise ValueError(f"group_size: expected a divisor of the batch of {batch}, got {group_size}")


def masked_sum(values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Sum over the tokens that count, in float32 at least; what stands under the mask, NaN included, never matters.

    Args:
        values: [batch, time].
        mask: [batch, time], True where a token counts. A row without any sums to 0.
    """
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum(1, dtype=torch.promote_types(values.dtype, torch.float32))
