"""A fully connected network with one hidden layer that can be widened, and full-batch gradient descent for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.checks import check_count, check_number

__all__ = ["TwoLayerNet", "gradient_descent"]


class TwoLayerNet(nn.Module):
    """ReLU network with H hidden units and (d + 1) H + (H + 1) k parameters, Glorot-uniform with zero biases.

    Args:
        dim: d, of the inputs.
        hidden: H.
        outputs: k.
        generator: draws the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        outputs: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, value in {"dim": dim, "hidden": hidden, "outputs": outputs}.items():
            check_count(name, value)
        self.first = nn.utils.skip_init(nn.Linear, dim, hidden, dtype=dtype)
        self.second = nn.utils.skip_init(nn.Linear, hidden, outputs, dtype=dtype)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """The outputs."""
        return self.second(torch.relu(self.first(x)))

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def widened(self, hidden: int, *, std: float, generator: torch.Generator | None = None) -> TwoLayerNet:
        """A network with the units of this one and further ones with normal weights.

        Args:
            hidden: units of the new network, at least as many as here.
            std: standard deviation of the new weights.
            generator: draws them.

        Raises:
            ValueError: fewer units than here.
        """
        kept = self.first.out_features
        check_count("hidden", hidden, least=kept)
        net = TwoLayerNet(
            self.first.in_features, hidden, self.second.out_features, generator=generator, dtype=self.first.weight.dtype
        )
        for new in (net.first.weight, net.first.bias, net.second.weight):
            new.normal_(std=std, generator=generator)
        net.first.weight[:kept] = self.first.weight
        net.first.bias[:kept] = self.first.bias
        net.second.weight[:, :kept] = self.second.weight
        net.second.bias.copy_(self.second.bias)
        return net


def gradient_descent(
    net: nn.Module,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n k"],
    *,
    steps: int,
    lr: float,
    momentum: float,
    decay: float = 1.0,
    decay_every: int = 1,
) -> Iterator[int]:
    """Trains a network in place on the mean squared error of all points.

    Args:
        net: any network from x to y.
        x: inputs.
        y: targets.
        steps: how many.
        lr: step size.
        momentum: heavy-ball momentum in [0, 1).
        decay: factor on the step size after every ``decay_every`` steps.
        decay_every: see ``decay``.

    Returns:
        An iterator that makes a step and yields how many have been made; stop it to stop training.

    Raises:
        ValueError: no steps, or a step size that is not positive.
    """
    check_count("steps", steps)
    check_number("lr", lr, above=0.0)
    return _steps(net, x, y, torch.optim.SGD(net.parameters(), lr, momentum), steps, decay, decay_every)


def _steps(
    net: nn.Module, x: Tensor, y: Tensor, optimiser: torch.optim.Optimizer, steps: int, decay: float, decay_every: int
) -> Iterator[int]:
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, decay_every, decay)
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimiser.step()
        schedule.step()
        yield step
