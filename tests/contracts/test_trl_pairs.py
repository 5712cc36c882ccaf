"""Losses of preference pairs and of single answers give the numbers of trl's own trainers on the same batch.

The trainers are made without their constructors, which would ask for data sets: their losses read the attributes below.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlreviews import preference as ours

# trl asks transformers for something by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

VOCAB, PAD, WIDTH, BETA = 29, 0, 12, 0.4  # PAD also ends the text


@pytest.fixture(scope="module")
def trl() -> Any:
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo.cpo_trainer import CPOTrainer
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.kto_trainer import KTOTrainer
        from trl.trainer.utils import add_fused_lm_head
    return SimpleNamespace(cpo=CPOTrainer, orpo=ORPOTrainer, dpo=DPOTrainer, kto=KTOTrainer, fuse=add_fused_lm_head)


@pytest.fixture(scope="module")
def models(trl: Any) -> tuple[Any, Any]:
    """A policy and a reference that differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, pad_token_id=PAD, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = LlamaForCausalLM(config)
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        reference = copy.deepcopy(policy)
        for parameter in reference.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    for model in (policy, reference):
        trl.fuse(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return policy, reference.requires_grad_(False)


def batch(side: str, rows: int = 6) -> dict[str, Tensor]:
    """Prompts of 2 to 4 tokens with answers of 1 to 6, one of them empty; the first half are the chosen ones."""
    generator = torch.Generator().manual_seed(3)
    ids, attended, completed = (torch.zeros(rows, WIDTH, dtype=torch.long) for _ in range(3))
    for row, (prompt, answer) in enumerate([(2, 6), (4, 1), (3, 5), (2, 3), (4, 0), (3, 4)][:rows]):
        start = 1 if side == "right" else WIDTH - prompt - answer
        end = start + prompt + answer
        ids[row, start:end] = torch.randint(1, VOCAB, (end - start,), generator=generator)
        ids[row, end - 1] = PAD  # the end of the text, which counts, is the padding's token
        attended[row, start:end] = 1
        completed[row, start + prompt : end] = 1
    return {"input_ids": ids, "attention_mask": attended, "completion_mask": completed}


def logps(model: Any, inputs: dict[str, Tensor], prefix: str = "", average: bool = False) -> Tensor:
    """From hidden states, with our own projection in tiles."""
    ids, attended, completed = (inputs[prefix + n] for n in ("input_ids", "attention_mask", "completion_mask"))
    _, labels, mask = ours.shifted(ids, completed.bool())
    hidden = model.model(input_ids=ids, attention_mask=attended).last_hidden_state[:, :-1]
    return ours.linear_sequence_logps(hidden, model.lm_head.weight, labels, mask, chunk=8, average=average)


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def trainer(kind: type, models: tuple[Any, Any], **attributes: Any) -> Any:
    made = kind.__new__(kind)
    same = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    common = {
        "accelerator": same, "model": models[0], "ref_model": models[1], "beta": BETA, "label_smoothing": 0.0,
        "aux_loss_enabled": False, "precompute_ref_logps": False, "ld_alpha": None, "use_weighting": False,
        "f_divergence_type": "reverse_kl", "loss_weights": [1.0], "_total_train_tokens": 0, "_tp_size": 1,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
    }  # fmt: skip
    for name, value in (common | attributes).items():
        setattr(made, name, value)
    return made


PAIRED: dict[str, tuple[Callable[..., ours.PreferenceLoss], dict[str, float]]] = {
    "sigmoid": (ours.dpo_loss, {}),
    "hinge": (ours.hinge_loss, {}),
    "ipo": (ours.ipo_loss, {}),
    "sigmoid_norm": (ours.normalised_dpo_loss, {}),
    "robust": (ours.robust_dpo_loss, {"label_smoothing": 0.2}),
    "exo_pair": (ours.exo_pair_loss, {"label_smoothing": 0.01}),
    "nca_pair": (ours.nca_pair_loss, {}),
    "bco_pair": (ours.bco_pair_loss, {}),
    "sppo_hard": (ours.sppo_hard_loss, {}),
    "aot": (ours.aot_loss, {"label_smoothing": 0.2}),
    "discopop": (ours.discopop_loss, {}),
    "apo_zero": (ours.apo_zero_loss, {}),
    "apo_down": (ours.apo_down_loss, {}),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", PAIRED)
def test_pairs(kind: str, side: str, trl: Any, models: tuple[Any, Any]) -> None:
    """Value, gradient and logged rewards; an empty answer among the pairs, and padding that is the end of text."""
    loss, options = PAIRED[kind]
    inputs = batch(side)
    theirs = trainer(trl.dpo, models, loss_types=[kind], label_smoothing=options.get("label_smoothing", 0.0))
    wanted = theirs._compute_loss(models[0], inputs, return_outputs=False)
    policy, reference = (logps(model, inputs) for model in models)
    if kind in ("ipo", "sigmoid_norm"):
        lengths = inputs["completion_mask"].sum(1)
        options = {"chosen_lengths": lengths[:3], "rejected_lengths": lengths[3:]}  # type: ignore[dict-item]
    found = loss(*policy.chunk(2), *reference.chunk(2), beta=BETA, **options)
    torch.testing.assert_close(found.losses.mean(), wanted)
    assert wanted.item() > 0.1
    for mine, other in zip(gradients(models[0], found.losses.mean()), gradients(models[0], wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    logged = theirs._metrics["train" if models[0].training else "eval"]
    margins = found.chosen_rewards - found.rejected_rewards
    for name, value in {
        "rewards/chosen": found.chosen_rewards,
        "rewards/rejected": found.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": policy.detach()[:3],
    }.items():
        assert logged[name] == pytest.approx([value.mean().item()], rel=1e-4), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_kto(side: str, trl: Any, models: tuple[Any, Any]) -> None:
    inputs = batch(side)
    order = ours.mismatched(6)  # the same batch stands in for mismatched prompts and answers
    for name in list(inputs):
        inputs[f"KL_{name}"] = inputs[name][order]
    inputs["label"] = torch.tensor([True, True, False, True, False, False])
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    theirs = trainer(trl.kto, models, loss_type="kto", calculate_KL=True, **weights)
    wanted = theirs._compute_loss(models[0], inputs, return_outputs=False)
    policy, reference = (logps(model, inputs) for model in models)
    with torch.no_grad():
        point = ours.kto_reference_point(*(logps(model, inputs, "KL_") for model in models))
    found = ours.kto_loss(policy, reference, inputs["label"], point, beta=BETA, **weights)
    torch.testing.assert_close(found.losses.mean(), wanted)
    for mine, other in zip(gradients(models[0], found.losses.mean()), gradients(models[0], wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    logged = theirs._metrics["train" if models[0].training else "eval"]
    assert logged["kl"] == pytest.approx([point.item()], rel=1e-4, abs=1e-7)
    assert logged["rewards/chosen"] == pytest.approx([found.rewards[inputs["label"]].mean().item()], rel=1e-4)
    assert logged["rewards/rejected"] == pytest.approx([found.rewards[~inputs["label"]].mean().item()], rel=1e-4)


def test_losses_without_a_reference(trl: Any, models: tuple[Any, Any]) -> None:
    """trl adds the likelihood term elsewhere; it is taken off ours."""
    inputs = {name: tensor[:4] for name, tensor in batch("left").items()}  # no empty answer, whose odds are infinite
    summed = logps(models[0], inputs)
    averaged = logps(models[0], inputs, average=True)
    cpo = trainer(trl.cpo, models, loss_type="sigmoid", alpha=0.0)
    simpo = trainer(trl.cpo, models, loss_type="simpo", alpha=0.0, simpo_gamma=0.6)
    orpo = trainer(trl.orpo, models)
    cases: list[tuple[Tensor, ours.PreferenceLoss, tuple[Tensor, Tensor, Tensor]]] = [
        (summed, ours.cpo_loss(*summed.chunk(2), beta=BETA, chosen_nll=torch.zeros(2)), cpo.cpo_loss(*summed.chunk(2))),
        (averaged, ours.simpo_loss(*averaged.chunk(2), beta=BETA, gamma=0.6), simpo.cpo_loss(*averaged.chunk(2))),
    ]
    found = ours.orpo_loss(*averaged.chunk(2), beta=BETA)
    ratio, *rewards = orpo.odds_ratio_loss(*averaged.chunk(2))[:3]
    cases.append((averaged, found._replace(losses=found.losses + averaged[:2]), (-ratio, *rewards)))
    for at, mine, theirs in cases:
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other)
        slopes = (torch.autograd.grad(x[0].sum(), at, retain_graph=True)[0] for x in (mine, theirs))
        torch.testing.assert_close(*slopes)
