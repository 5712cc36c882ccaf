r"""Flexora: learns by validation loss which layers LoRA should train, and trains only those.

Paper: Flexora: Flexible Low Rank Adaptation for Large Language Models (arXiv:2408.10774).

The LoRA update of each layer is multiplied by a gate, and the gates share a fixed total. LoRA's weights follow the
training loss, the gates the validation loss after some such steps, differentiated through them. Then layers whose alpha
has grown keep LoRA, all others lose it, and the rest is fine-tuned anew without gates.

Equation:
    $$ h = W_0 x + \hat\alpha_i\, \gamma B_i A_i x, \qquad \hat\alpha = N \operatorname{softmax}(\alpha) \tag{1} $$
    $$ \min_\alpha\; L_{\mathrm{val}}(\theta^*(\alpha), \alpha), \qquad
       \theta^*(\alpha) = \operatorname*{arg\,min}_\theta L_{\mathrm{train}}(\theta, \alpha) \tag{2} $$
    $$ \theta_{k+1} = \theta_k - \eta_\theta \nabla_\theta L_{\mathrm{train}}(\theta_k, \alpha), \qquad
       g = \frac{d}{d\alpha} L_{\mathrm{val}}(\theta_K(\alpha), \alpha) \tag{3} $$

Symbols:
    x: [*batch, in_features], the layer's input.
    alpha: [N], 0 at first, so that all gates are 1 and the model is that of LoRA.
    theta: the LoRA weights A and B of all layers.
    gamma: the scale of LoRA.
    N: how many gates there are: of layers or of groups of them, such as transformer blocks.
    K: steps of the inner loop that eq. (3) differentiates through.

Defaults:
    rank: 8 (authors' code), alpha of LoRA 16 (authors' code: twice the rank), on queries and values.
    lr_alpha: 0.01 (authors' code, Adam).
    lr_theta: 1e-4 (authors' code).
    inner_steps: 1 (ours).
    threshold: 0 (authors' code: layers whose alpha has grown).

Deviations:
    1. Inner steps are those of plain gradient descent, as in eq. (3); the authors' code has AdamW there, and takes the
       partial derivative by alpha at the weights after a step, which is eq. (3) with K = 0. Here K = 0 is that as well.
    2. The authors' code multiplies what goes into A and what goes into B, each by the gate; here the update is
       multiplied once, as in the paper.

Reduces to:
    lora: alpha = 0, where every gate is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlreviews.common.adapter import adapters
from mlreviews.common.checks import check_count, check_number
from mlreviews.peft.lora import LoRALinear

__all__ = [
    "FlexoraSearch",
    "GatedLoRALinear",
    "drop_adapters",
    "flexora_search",
    "flexora_select",
    "hypergradient",
    "layer_gates",
]

Weights = Mapping[str, Tensor]
Loss = Callable[[Weights, Tensor], Tensor]


def layer_gates(alpha: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
    """The gates of eq. (1): positive numbers whose mean is 1.

    Args:
        alpha: [layers], any numbers; equal ones give gates of 1.
    """
    return alpha.softmax(-1) * len(alpha)


class GatedLoRALinear(LoRALinear):
    """A linear layer whose low-rank update is multiplied by a gate, which is a buffer and 1 at first.

    Args:
        base: torch.nn.Linear, or what has its attributes, or transformers' Conv1D.
        rank: r.
        alpha: of LoRA's scale.
        generator: draws the weights; None is the global one.
    """

    gate: Tensor

    def __init__(
        self, base: nn.Module, rank: int = 8, alpha: float = 16.0, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, rank, alpha, generator=generator)
        self.register_buffer("gate", torch.ones((), device=self.base.weight.device))

    def _down(self, x: Tensor, name: str, scale: float) -> Tensor:
        down = super()._down(x, name, scale)
        return down * self.gate.to(down.dtype)

    def _update(self, name: str) -> Tensor:
        update = super()._update(name)
        return update * self.gate.to(update.dtype)


def hypergradient(
    train_losses: Sequence[Loss], val_loss: Loss, theta: Weights, alpha: Float[Tensor, " layers"], lr: float
) -> tuple[Float[Tensor, " layers"], dict[str, Tensor], Tensor]:
    """The gradient g of eq. (3), by differentiating through K steps.

    Args:
        train_losses: one for each of the K steps, of that step's batch; each is called as ``loss(theta, alpha)``.
        val_loss: called likewise.
        theta: the weights before the steps.
        alpha: [layers].
        lr: step size of the steps.

    Returns:
        ``(g, theta_K, loss)``, all detached; the loss is that of validation, at theta_K.

    Raises:
        ValueError: a step size that isn't positive, or a validation loss that isn't finite.
    """
    check_number("lr", lr, above=0.0)
    alpha = alpha.detach().requires_grad_()
    weights = {name: x.detach().requires_grad_() for name, x in theta.items()}
    for loss in train_losses:
        weights = _step(loss, weights, alpha, lr)
    value = val_loss(weights, alpha)
    check_number("val_loss", float(value.detach()))
    (g,) = torch.autograd.grad(value, [alpha])
    return g, {name: x.detach() for name, x in weights.items()}, value.detach()


def _step(loss: Loss, weights: dict[str, Tensor], alpha: Tensor, lr: float) -> dict[str, Tensor]:
    slopes = torch.autograd.grad(loss(weights, alpha), list(weights.values()), create_graph=True)
    return {name: x - lr * slope for (name, x), slope in zip(weights.items(), slopes, strict=True)}


class FlexoraSearch(NamedTuple):
    """What a search found.

    Attributes:
        alpha: name of a group of layers -> its alpha in the end.
        history: [rounds, groups], alpha after each round.
        val_losses: the validation loss of each round.
    """

    alpha: dict[str, float]
    history: Tensor
    val_losses: list[float]


def flexora_search(
    model: nn.Module,
    loss: Callable[[Callable[..., Any], Any], Tensor],
    train: Iterator[Any],
    validation: Iterator[Any],
    rounds: int,
    *,
    inner_steps: int = 1,
    lr_theta: float = 1e-4,
    lr_alpha: float = 0.01,
    group: Callable[[str], str] = lambda path: path,
) -> FlexoraSearch:
    """Trains LoRA and the gates by turns.

    Args:
        model: with `GatedLoRALinear` layers; in the end it has the weights and gates of the last round.
        loss: from something that is called as the model, and a batch, to the loss.
        train: batches, one for each inner step.
        validation: batches, one for each round.
        rounds: updates of alpha.
        inner_steps: K. With 0, a step of LoRA still follows each update of alpha, but isn't differentiated.
        lr_theta: step size of the inner steps.
        lr_alpha: step size of Adam for alpha.
        group: from the path of a layer to the name of its group, which has one gate.

    Raises:
        ValueError: a number out of range, or a model without such layers.
    """
    check_count("rounds", rounds)
    check_count("inner_steps", inner_steps, least=0)
    layers = {path: layer for path, layer in adapters(model).items() if isinstance(layer, GatedLoRALinear)}
    if not layers:
        raise ValueError("model: expected layers of GatedLoRALinear, found none")
    names = list(dict.fromkeys(map(group, layers)))
    place = {path: names.index(group(path)) for path in layers}
    own = dict(model.named_parameters())
    theta: dict[str, Tensor] = {name: p.detach() for name, p in own.items() if p.requires_grad}

    def on(batch: Any) -> Loss:
        def value(weights: Weights, alpha: Tensor) -> Tensor:
            gates = layer_gates(alpha)
            swapped = dict(weights) | {f"{path}.gate": gates[place[path]] for path in layers}
            return loss(lambda *args, **kw: torch.func.functional_call(model, swapped, args, kw), batch)

        return value

    alpha = torch.zeros(len(names), device=next(iter(layers.values())).gate.device)
    optimiser = torch.optim.Adam([alpha], lr=lr_alpha)
    history, losses = [], []
    for _ in range(rounds):
        steps = [on(next(train)) for _ in range(inner_steps)]
        alpha.grad, theta, value = hypergradient(steps, on(next(validation)), theta, alpha, lr_theta)
        optimiser.step()
        if not inner_steps:
            weights = {name: x.requires_grad_() for name, x in theta.items()}
            theta = {n: x.detach() for n, x in _step(on(next(train)), weights, alpha, lr_theta).items()}
        history.append(alpha.clone())
        losses.append(float(value))
    with torch.no_grad():
        for name, x in theta.items():
            own[name].copy_(x)
        for path, layer in layers.items():
            layer.gate.copy_(layer_gates(alpha)[place[path]])
    return FlexoraSearch(dict(zip(names, alpha.tolist(), strict=True)), torch.stack(history), losses)


def flexora_select(alpha: Mapping[str, float], threshold: float = 0.0) -> list[str]:
    """The groups that keep LoRA: those with alpha above the threshold.

    Args:
        alpha: of `flexora_search`.
        threshold: 0 is where every alpha began.

    Raises:
        ValueError: none is above it.
    """
    kept = [name for name, value in alpha.items() if value > threshold]
    if not kept:
        raise ValueError(f"threshold: expected less than the largest alpha, {max(alpha.values())}, got {threshold}")
    return kept


def drop_adapters(model: nn.Module, paths: Sequence[str]) -> None:
    """Takes the adapters off some layers, which then are as they were before.

    Args:
        model: changed in place.
        paths: of layers with adapters.

    Raises:
        ValueError: a layer has no adapter; nothing has changed.
    """
    found = adapters(model)
    missing = [path for path in paths if path not in found]
    if missing:
        raise ValueError(f"paths: expected layers with adapters, got {missing}")
    for path in paths:
        if found[path].merged:
            found[path].unmerge()
        model.set_submodule(path, found[path].base)
