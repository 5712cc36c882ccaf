"""CLLM: trajectories against plain greedy decoding, and losses against torch's and scipy's."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from mlreviews.decoding.cllm import autoregressive_loss, cllm_loss, collect_jacobi_trajectory, consistency_loss
from mlreviews.models import TinyLM, TinyLMConfig, generate
from tests.contracts.families import Sample
from tests.decoding.models import TableLM

CONTRACT = {
    "collect_jacobi_trajectory": lambda: Sample(
        collect_jacobi_trajectory, (TableLM.random(5, 0), torch.tensor([[1, 2, 4], [3, 0, 0]]), 6)
    )
}


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model() -> TinyLM:
    config = TinyLMConfig(vocab_size=11, d_model=12, layers=2, heads=2, hidden=16, tied=False, context=30)
    model = TinyLM(config, generator=_rng()).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    return model


def _ids(time: int, seed: int = 5) -> Tensor:
    return torch.randint(11, (3, time), generator=_rng(seed))


@pytest.mark.parametrize("time", [1, 4])
def test_a_trajectory_is_jacobi_s_and_ends_in_greedy_decoding(time: int) -> None:
    model, prompt = _model(), _ids(time)
    states = collect_jacobi_trajectory(model, prompt, 7, generator=_rng(1))
    assert torch.equal(states[-1], generate(model, prompt, 7).tokens)
    assert 3 < len(states) <= 8
    assert torch.isin(states[0], prompt).all()
    for before, after in itertools.pairwise(states):
        assert not torch.equal(before, after)
        for i in range(7):
            said = model(torch.cat([prompt, before[:, :i]], 1)).logits[:, -1].argmax(-1)
            assert torch.equal(said, after[:, i])


def test_a_guess_that_is_right_needs_no_iteration() -> None:
    table = torch.full((4, 3, 3), -9.0)
    table[:, :, 1] = 9.0
    assert collect_jacobi_trajectory(TableLM(table), torch.tensor([[1, 1]]), 4).tolist() == [[[1, 1, 1, 1]]]
    assert collect_jacobi_trajectory(TableLM(table), torch.tensor([[2, 2]])).shape == (2, 1, 16)


def test_the_consistency_loss_is_the_mean_divergence() -> None:
    model, prompt, state, wanted = _model(), _ids(4), _ids(5, 6), _ids(5, 7)
    with torch.no_grad():
        teacher = model(torch.cat([prompt, wanted], 1)).logits[:, 3:-1].softmax(-1)
        student = model(torch.cat([prompt, state], 1)).logits[:, 3:-1].softmax(-1)
        expected = entropy(teacher.numpy(), student.numpy(), axis=-1).mean()
        assert float(consistency_loss(model, prompt, state, wanted)) == pytest.approx(float(expected))
        assert float(consistency_loss(model, prompt, wanted, state)) != pytest.approx(float(expected))


def test_at_the_fixed_point_there_is_no_loss_and_no_gradient() -> None:
    model, prompt = _model(), _ids(4)
    fixed = collect_jacobi_trajectory(model, prompt, 5)[-1]
    loss = consistency_loss(model, prompt, fixed, fixed)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-15)
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-14


def test_the_teacher_gets_no_gradient() -> None:
    """The gradient is that of the cross-entropy with the teacher's distribution as a constant."""
    model, prompt, state, wanted = _model(), _ids(4), _ids(5, 6), _ids(5, 7)
    consistency_loss(model, prompt, state, wanted).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    constant = model(torch.cat([prompt, wanted], 1)).logits[:, 3:-1].softmax(-1).detach()
    logits = model(torch.cat([prompt, state], 1)).logits[:, 3:-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), constant.flatten(0, 1)).backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters() if p.grad is not None])
    assert len(found) == len(list(model.parameters()))


def test_reduces_to_next_token_training() -> None:
    model, prompt, y = _model(), _ids(4), _ids(5, 6)
    logits = model(torch.cat([prompt, y], 1)).logits[:, 3:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(autoregressive_loss(model, prompt, y), expected)
    torch.testing.assert_close(cllm_loss(model, prompt, y, y, ar_weight=3.0), 3 * expected)
    state = _ids(5, 7)
    torch.testing.assert_close(
        cllm_loss(model, prompt, state, y) - 10 * expected, consistency_loss(model, prompt, state, y)
    )
    torch.testing.assert_close(
        cllm_loss(model, prompt, state, y, ar_weight=0.0), consistency_loss(model, prompt, state, y)
    )


def test_half_precision_is_compared_in_float32() -> None:
    model, prompt = _model().bfloat16(), _ids(4)
    assert consistency_loss(model, prompt, _ids(5, 6), _ids(5, 7)).dtype == torch.float32


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    model, prompt = _model(), _ids(4)
    with pytest.raises(ValueError, match="n: expected"):
        collect_jacobi_trajectory(model, prompt, 0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        collect_jacobi_trajectory(model, prompt, 27)
    with pytest.raises(ValueError, match="state"):
        consistency_loss(model, prompt, _ids(3), _ids(5))
    with pytest.raises(ValueError, match="ar_weight"):
        cllm_loss(model, prompt, _ids(3), _ids(3), ar_weight=-1.0)
