"""What experiments share: the training loop, and how a pass forward and back is timed."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mlreviews.datasets import TextSplit

__all__ = ["median_seconds", "next_token_loss", "training"]


def median_seconds(call: Callable[[], Tensor], device: str, repeats: int = 7) -> float:
    """Median seconds of a pass forward and back, after two that aren't counted; the machine must be idle.

    Args:
        call: the forward pass; the sum of what it gives is differentiated.
        device: where it runs.
        repeats: passes that are counted.
    """
    import torch

    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call().sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def next_token_loss(model: Callable[[Tensor], tuple[Tensor, Any]], window: Tensor) -> Tensor:
    """Mean cross-entropy in nats of every id of a window but the first.

    Args:
        model: from ids to logits and a state.
        window: ids, [batch, time].
    """
    import torch

    return torch.nn.functional.cross_entropy(model(window[:, :-1])[0].flatten(0, 1), window[:, 1:].flatten())


def training(
    model: nn.Module,
    loss: Callable[[], Tensor],
    updates: int,
    rate: float,
    *,
    weight_decay: float = 0.0,
    slower: Callable[[str], bool] = lambda name: False,
    groups: list[dict[str, Any]] | None = None,
) -> Iterator[tuple[int, float]]:
    """AdamW with gradients of norm 1 at most, and a rate that rises over a tenth of the updates and falls to 0.

    Args:
        model: its parameters are trained.
        loss: draws a batch and gives its loss.
        updates: how many.
        rate: the highest step size.
        weight_decay: of AdamW.
        slower: whether a parameter, by its name, takes a hundredth of the rate.
        groups: parameters with their highest step sizes, in the place of rate and slower.

    Yields:
        After each update: its number, from 1 on, and the loss before it.
    """
    import torch

    if groups is None:
        groups = [{"params": [], "lr": rate}, {"params": [], "lr": rate / 100}]
        for name, parameter in model.named_parameters():
            groups[slower(name)]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    # Models are so small that the time of an update goes into calls: one for all parameters is several times quicker.
    optimiser = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, [group["lr"] for group in groups], total_steps=updates, pct_start=0.1
    )
    for update in range(1, updates + 1):
        found = loss()
        optimiser.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimiser.step()
        schedule.step()
        yield update, float(found.detach())


def bits_per_byte(model: nn.Module, split: TextSplit, length: int, tested: int) -> float:
    """Mean cross-entropy in bits over the first bytes of a split, in windows of the given length.

    Args:
        model: from ids of `mlreviews.datasets.ByteTokenizer` to logits and more.
        split: the text.
        length: of a window.
        tested: about how many bytes.
    """
    import torch

    device = next(model.parameters()).device
    total, count = 0.0, 0
    with torch.no_grad():
        for window in itertools.islice(split.sweep(length, 32), max(1, tested // (32 * length))):
            targets = window[:, 1:].numel()
            total += targets * float(next_token_loss(model, window.to(device)))
            count += targets
    return total / count / math.log(2)
