"""Do the coefficients of the unified view give each method's own gradient, on the parameters of a language model?

The shipped byte model, moved a little from its own weights so that policy and reference differ, on lines of Python. The
gradient of the weighted likelihood is compared with that of the method's loss. The figure shows the coefficients of
preference losses against the margin.
Quick and full are the same: ten seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlreviews.datasets import python_source
from mlreviews.models import load_pretrained
from mlreviews.preference.apo import apo_down_loss, apo_zero_loss
from mlreviews.preference.dpo import dpo_loss, hinge_loss, ipo_loss, nca_pair_loss
from mlreviews.preference.logps import token_logps
from mlreviews.preference.losses import PreferenceLoss
from mlreviews.preference.ppo import ppo_clip_loss
from mlreviews.preference.rloo import rloo_loss
from mlreviews.preference.unified_preference_gradient import (
    dpo_coefficients,
    ipo_coefficients,
    ppo_coefficients,
    reinforce_coefficients,
    sequence_coefficients,
    sft_coefficients,
    unified_preference_loss,
)
from mlreviews.reproductions.figures import panels
from mlreviews.reproductions.protocol import Outcome, Settings, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SURVEY = "arXiv:2409.02795"
BETA = 0.1
PAIRED: dict[str, Callable[..., PreferenceLoss]] = {
    "DPO": dpo_loss,
    "IPO": ipo_loss,
    "hinge": hinge_loss,
    "NCA": nca_pair_loss,
    "APO-zero": apo_zero_loss,
    "APO-down": apo_down_loss,
}


def run(settings: Settings) -> Outcome:
    """Measures the relative difference of both gradients for each method, and coefficients along the margin."""
    differences = _differences(settings)
    margins = torch.linspace(-60, 60, 121, dtype=torch.float64)
    curves = {name: _along(loss, margins) for name, loss in PAIRED.items()}
    dpo, ipo = curves["DPO"], curves["IPO"]
    claims = [
        measure(
            f"The weighted likelihood has the gradient of {name} (relative difference, all parameters)",
            f"{SURVEY}, section 3",
            value,
            at_most=1e-4,
        )
        for name, value in differences.items()
    ]
    claims += [
        measure(
            "DPO's coefficient vanishes for pairs that are won (at a margin of 60 nats, relative to 0)",
            f"{SURVEY}, table of gradient coefficients",
            float(dpo[-1] / dpo[60]),
            at_most=0.01,
        ),
        measure(
            "IPO's changes its sign: pairs beyond the target are pulled back (at 60 nats, relative to 0)",
            "arXiv:2310.12036, section 5",
            float(ipo[-1] / ipo[60]),
            at_most=-1,
        ),
    ]
    series = {"margin": margins.tolist()} | {f"coefficient, {name}": curve.tolist() for name, curve in curves.items()}
    series["relative difference"] = list(differences.values())
    return Outcome(claims, series)


def _differences(settings: Settings) -> dict[str, float]:
    generator = settings.generator()
    reference = load_pretrained("python-draft").requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    ids = next(python_source().validation.batches(32, 8, generator))
    mask = torch.arange(32) >= torch.tensor([8, 20, 4, 12, 30, 16, 8, 24])[:, None]  # answers of 2 to 28 bytes
    inputs, labels = ids[:, :-1], ids[:, 1:]
    rewards = torch.randn(8, generator=generator)
    advantages = rewards[:, None].expand(8, 32).contiguous()
    with torch.no_grad():
        ref = token_logps(reference(inputs).logits, labels)
    logps = token_logps(policy(inputs).logits, labels)
    total, ref_total = ((x * mask).sum(1) for x in (logps, ref))
    lengths = mask.sum(1)
    others = (rewards.view(2, 4).sum(1, keepdim=True) - rewards.view(2, 4)).flatten() / 3
    tokens = float(mask.sum())
    apo = apo_zero_loss(*total.chunk(2), *ref_total.chunk(2), beta=BETA).losses.sum()

    def weighted(coefficients: Tensor, normaliser: float | None = None) -> Tensor:
        return unified_preference_loss(logps, mask, coefficients, normaliser=normaliser)

    pairs = total.detach(), ref_total, mask
    cases = {
        "fine-tuning": (weighted(sft_coefficients(mask)), -((logps * mask).sum(1) / lengths).mean()),
        "RLOO": (
            weighted(reinforce_coefficients(rewards, others, mask) * lengths[:, None]),
            rloo_loss(total, rewards, 4).loss,
        ),
        "PPO": (
            weighted(ppo_coefficients(logps, ref, advantages, mask) * lengths[:, None], tokens),
            ppo_clip_loss(logps, ref, advantages, mask).loss,
        ),
        "DPO": (
            weighted(dpo_coefficients(*pairs, beta=BETA), 4.0),
            dpo_loss(*total.chunk(2), *ref_total.chunk(2), beta=BETA).losses.mean(),
        ),
        "IPO": (
            weighted(ipo_coefficients(*pairs, beta=BETA), 4.0),
            ipo_loss(*total.chunk(2), *ref_total.chunk(2), beta=BETA).losses.mean(),
        ),
        "APO-zero": (weighted(sequence_coefficients(apo, total, mask), 1.0), apo),
    }
    found = {}
    parameters = list(policy.parameters())
    for name, losses in settings.track(cases.items(), "methods"):
        one, other = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
            for loss in losses
        )
        found[name] = float((one - other).norm() / other.norm())
    return found


def _along(loss: Callable[..., PreferenceLoss], margins: Tensor) -> Tensor:
    """Coefficient of a preferred answer of one token; log ratios are half of the margin and minus that."""
    chosen = (margins / 2).requires_grad_()
    zero = torch.zeros_like(margins)
    slopes = torch.autograd.grad(loss(chosen, -margins / 2, zero, zero, beta=BETA).losses.sum(), chosen)[0]
    return -slopes


def draw(outcome: Outcome) -> Figure:
    """Coefficient of the preferred answer against the margin, each relative to its largest size."""
    figure, (axis,) = panels(1, width=6.4, height=4)
    for name in PAIRED:
        values = outcome.series[f"coefficient, {name}"]
        largest = max(map(abs, values))
        axis.plot(outcome.series["margin"], [value / largest for value in values], label=name)
    axis.axhline(0, color="0.4", linestyle=":", linewidth=1)
    axis.set(
        title="What pushes a preferred answer up",
        xlabel="margin of log ratios, split evenly (nats)",
        ylabel="coefficient / its largest size",
    )
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
