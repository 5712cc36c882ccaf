"""Losses of sampled answers give the numbers of trl's GRPO and RLOO trainers: value, gradient, logged statistics.

The trainers are made without their constructors; their losses read the attributes below, and the log-probabilities that
they would take from a model.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlreviews import preference as ours

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
LEFT = MASK.flip(1)
LONGEST = 9


@pytest.fixture(scope="module")
def trl() -> Any:
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.rloo_trainer import RLOOTrainer
    return SimpleNamespace(grpo=GRPOTrainer, rloo=RLOOTrainer)


def _random(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _trainer(kind: Any, logp: Tensor, **settings: Any) -> Any:
    trainer = kind.__new__(kind)
    trainer.accelerator = SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
    )
    trainer.model = SimpleNamespace(training=False)
    trainer._metrics = {"eval": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)
    trainer.args = SimpleNamespace(use_bias_correction_kl=False, delta=None)
    standard = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "max_completion_length": LONGEST,
        "_entropy_bonus_enabled": False,
    }
    for name, value in (standard | settings).items():
        setattr(trainer, name, value)
    return trainer


def _inputs(mask: Tensor, **more: Tensor) -> dict[str, Tensor]:
    ids = torch.zeros_like(mask, dtype=torch.long)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.long(),
        **more,
    }


@pytest.mark.parametrize("mask", [MASK, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "ppo"])
def test_grpo_trainer(trl: Any, name: str, beta: float, mask: Tensor) -> None:
    old, ref, rewards = _random(4, 5, seed=1), _random(4, 5, seed=2), _random(4, seed=3)
    logp = _random(4, 5, seed=0).requires_grad_()
    advantages = ours.group_advantages(rewards, 2, normalise_std=name != "dr_grpo")
    level = "sequence" if name == "gspo" else "token"
    clips = (3e-4, 4e-4) if name == "gspo" else (0.2, 0.25)
    if name in ("gspo", "ppo"):
        beta, clips = 0.0, clips if name == "gspo" else (0.2, 0.2)  # neither has a term for the reference
    trainer = _trainer(
        trl.grpo,
        logp,
        loss_type={"gspo": "grpo", "ppo": "bnpo"}.get(name, name),
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=clips[0],
        epsilon_high=clips[1],
    )
    inputs = _inputs(mask, advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref)
    theirs = trainer._compute_loss(None, inputs)
    reference: dict[str, Any] = {"logp_ref": ref, "beta": beta} if beta else {}
    both: dict[str, Any] = {"clip_low": clips[0], "clip_high": clips[1]}
    if name == "grpo":
        loss, stats = ours.grpo_loss(logp, old, mask, advantages, **both, **reference)
    elif name == "dr_grpo":
        loss, stats = ours.dr_grpo_loss(logp, old, mask, advantages, max_length=LONGEST, **both, **reference)
    elif name == "gspo":
        loss, stats = ours.gspo_loss(logp, old, mask, advantages, **both)
    else:
        loss, stats = ours.ppo_clip_loss(logp, old, advantages[:, None].expand_as(logp), mask, clip=clips[0])
    torch.testing.assert_close(loss, theirs)
    found, expected = (torch.autograd.grad(x, logp)[0] for x in (loss, theirs))
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0
    metrics = trainer._metrics["eval"]
    assert float(stats["clip_fraction"]) == pytest.approx(metrics["clip_ratio/region_mean"][0])
    if beta:
        assert float(stats["reference_kl"]) == pytest.approx(metrics["kl"][0], rel=1e-5)


@pytest.mark.parametrize("mask", [MASK, LEFT], ids=["right", "left"])
def test_rloo_trainer(trl: Any, mask: Tensor) -> None:
    old, rewards = _random(4, 5, seed=1), _random(4, seed=3)
    logp = _random(4, 5, seed=0).requires_grad_()
    trainer = _trainer(trl.rloo, logp, epsilon_low=0.2, epsilon_high=0.2)
    # What the trainer does before its loss is not a function of its own: see `rloo_advantages`.
    advantages = (rewards.view(2, 2) - rewards.view(2, 2).flip(1)).flatten()
    theirs = trainer._compute_loss(None, _inputs(mask, advantages=advantages, old_logps=(old * mask).sum(1)))
    loss, stats = ours.rloo_clip_loss((logp * mask).sum(1), (old * mask).sum(1), rewards, 2)
    torch.testing.assert_close(loss, theirs)
    found, expected = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, theirs))
    torch.testing.assert_close(found, expected)
    assert float(stats["clip_fraction"]) == pytest.approx(trainer._metrics["eval"]["clip_ratio/region_mean"][0])
