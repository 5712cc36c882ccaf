import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlreviews.models import ResidualBlock, SequenceModel

VOCAB, DIM, BATCH, TIME = 11, 6, 3, 7


class Decay(nn.Module):
    """The simplest mixer: a running sum with decay; the state is the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=_rng(5)))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = []
        for x_t in x.unbind(1):
            y, state = self.step(x_t, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = x_t if state is None else 0.5 * state + x_t
        return state @ self.weight, state


class Layout(nn.Module):
    """Says which layout arguments came."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[set[str]] = []

    def forward(self, x: Tensor, state: Any = None, **layout: Tensor) -> tuple[Tensor, int]:
        self.seen.append(set(layout))
        return torch.zeros_like(x), 0


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(depth: int = 2, **options: Any) -> SequenceModel:
    return SequenceModel(VOCAB, DIM, [Decay() for _ in range(depth)], generator=_rng(), **options).double()


def _ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape or (BATCH, TIME), generator=_rng(1))


@pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
def test_is_what_its_parts_are(mlp_ratio: float) -> None:
    model, ids = _model(mlp_ratio=mlp_ratio, classes=5), _ids()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=_rng(2)))
    x = model.embedding.weight[ids]
    for block in model.blocks:
        x = x + block.mixer(nn.functional.rms_norm(x, (DIM,), block.norm.weight))[0]
        if mlp_ratio:
            norm, first, _, last = block.mlp
            h = nn.functional.rms_norm(x, (DIM,), norm.weight) @ first.weight.T + first.bias
            x = x + nn.functional.gelu(h) @ last.weight.T + last.bias
    expected = nn.functional.rms_norm(x, (DIM,), model.norm.weight) @ model.head.weight.T
    torch.testing.assert_close(model(ids)[0], expected)
    assert expected.shape == (BATCH, TIME, 5)
    assert [b.mlp[1].out_features for b in model.blocks if len(b.mlp)] == ([9, 9] if mlp_ratio else [])


@pytest.mark.parametrize("cut", range(1, TIME))
def test_parts_equal_the_whole_in_values_and_gradients(cut: int) -> None:
    model, ids = _model(mlp_ratio=2), _ids()
    whole, last = model(ids)
    first, state = model(ids[:, :cut])
    second, end = model(ids[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)
    weights = torch.randn(whole.shape, dtype=whole.dtype, generator=_rng(3))
    expected = torch.autograd.grad((whole * weights).sum(), list(model.parameters()))
    found = torch.autograd.grad((torch.cat([first, second], 1) * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_steps_after_a_prefill_equal_the_whole(cut: int) -> None:
    model, ids = _model(mlp_ratio=2), _ids()
    whole, last = model(ids)
    state = model(ids[:, :cut])[1] if cut else None
    for t in range(cut, TIME):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, whole[:, t])
    torch.testing.assert_close(state, last)


def test_head_is_the_embedding_unless_classes_are_given() -> None:
    model = _model()
    assert model.head.weight is model.embedding.weight
    assert model(_ids())[0].shape == (BATCH, TIME, VOCAB)
    assert copy.deepcopy(model).head.weight is not model.embedding.weight
    assert _model(classes=VOCAB).head.weight is not _model().embedding.weight
    assert (
        sum(p.numel() for p in _model(classes=4).parameters()) == sum(p.numel() for p in model.parameters()) + 4 * DIM
    )


def test_there_is_no_mlp_unless_asked_for() -> None:
    assert [len(block.mlp) for block in (*_model().blocks, ResidualBlock(DIM, Decay()))] == [0, 0, 0]
    norm, first, _, last = ResidualBlock(DIM, Decay(), mlp_ratio=0.1).mlp  # 0.6 of a unit is one
    assert (norm.weight.shape, first.weight.shape, last.weight.shape) == ((DIM,), (1, DIM), (DIM, 1))


def test_the_generator_decides_the_weights() -> None:
    one, same = _model(mlp_ratio=2, classes=5), _model(mlp_ratio=2, classes=5)
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    before = torch.get_rng_state()
    _model(mlp_ratio=2, classes=5)
    assert torch.equal(before, torch.get_rng_state())
    other = SequenceModel(VOCAB, DIM, [Decay()], mlp_ratio=2, generator=_rng(9))
    assert not torch.equal(other.embedding.weight.double(), one.embedding.weight)


def test_logits_start_with_the_variance_of_one() -> None:
    wide = SequenceModel(500, 400, [nn.Identity()], generator=_rng())
    spread = wide.head(wide.norm(wide.embedding(torch.arange(500)))).flatten()
    others = spread.view(500, 500)[~torch.eye(500, dtype=bool)]
    assert others.std().item() == pytest.approx(1, abs=0.02)


def test_layout_reaches_the_mixers_only_where_given() -> None:
    mixer = Layout()
    model = SequenceModel(VOCAB, DIM, [mixer])
    mask, cu_seqlens = torch.ones(1, TIME, dtype=torch.bool), torch.tensor([0, TIME])
    model(_ids(1, TIME))
    model(_ids(1, TIME), mask=mask)
    model(_ids(1, TIME), cu_seqlens=cu_seqlens)
    assert mixer.seen == [set(), {"mask"}, {"cu_seqlens"}]


def test_learns_to_repeat() -> None:
    model = SequenceModel(VOCAB, DIM, [Decay()], mlp_ratio=2, generator=_rng())
    ids = _ids(8, TIME)
    optimiser = torch.optim.Adam(model.parameters(), 0.03)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids)[0].flatten(0, 1), ids.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    model = _model()
    with pytest.raises(TypeError, match=r"ids: expected int64 or int32, got torch.float32"):
        model(torch.ones(2, 3))
    with pytest.raises(TypeError, match="ids: expected int64"):
        model.step(torch.ones(2))
    with pytest.raises(ValueError, match=r"ids: expected \[batch, time\] with no empty axis, got shape \(3,\)"):
        model(_ids(3))
    with pytest.raises(ValueError, match=r"ids: expected \[batch, time\] with no empty axis, got shape \(3, 0\)"):
        model(_ids(3, 0))
    with pytest.raises(ValueError, match=r"ids: expected \[batch\] with no empty axis"):
        model.step(_ids())
    with pytest.raises(ValueError, match="state: expected one for each of 2 blocks, got 1"):
        model(_ids(), (None,))
    with pytest.raises(ValueError, match="mixers: expected at least one"):
        SequenceModel(VOCAB, DIM, [])
    with pytest.raises(ValueError, match="vocab_size: expected at least 1"):
        SequenceModel(0, DIM, [Decay()])
    with pytest.raises(ValueError, match="d_model: expected at least 1"):
        SequenceModel(VOCAB, 0, [Decay()])
    with pytest.raises(ValueError, match="classes: expected at least 1"):
        SequenceModel(VOCAB, DIM, [Decay()], classes=0)
    with pytest.raises(ValueError, match="mlp_ratio: expected at least 0"):
        ResidualBlock(DIM, Decay(), mlp_ratio=-1)
    with pytest.raises(ValueError, match="d_model: expected at least 1"):
        ResidualBlock(0, Decay())
