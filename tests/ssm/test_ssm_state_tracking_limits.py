import math

import pytest
import torch
from torch import Tensor, nn

from mlreviews.common.matrix_scan import matrix_scan
from mlreviews.datasets import group_permutations, group_table, group_word_problem
from mlreviews.ssm.ssm_state_tracking_limits import (
    RNNSSM,
    InputDependentSSM,
    word_problem_rnn,
    word_problem_ssm,
)
from tests.contracts.families import Sample

MODES = ["full", "diag", "positive", "fixed"]
DIAGONAL = ["diag", "positive"]
GROUPS = ["Z2", "Z60", "A4xZ5", "A5"]
Layer = InputDependentSSM | RNNSSM
each_mode = pytest.mark.parametrize("mode", MODES)
each_group = pytest.mark.parametrize("group", GROUPS)


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _perturbed(layer: Layer, seed: int = 0) -> Layer:
    """The layer with random numbers in every parameter, so that none is 0 or at its initial value."""
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * _random(*parameter.shape, seed=100 * seed + i))
    return layer


def _layer(kind: str, d_in: int = 3, d_state: int = 5, d_out: int = 4) -> Layer:
    layer = RNNSSM(d_in, d_state, d_out) if kind == "rnn" else InputDependentSSM(d_in, d_state, d_out, kind)
    return _perturbed(layer).double()


each_kind = pytest.mark.parametrize("kind", [*MODES, "rnn"])

CONTRACT = {
    "InputDependentSSM": lambda: Sample(
        _perturbed(InputDependentSSM(3, 5, 4)), (_random(2, 19, 3, dtype=torch.float32),)
    ),
    **{
        f"InputDependentSSM, {mode}": lambda mode=mode: Sample(_layer(mode).float(), (_random(2, 8, 3).float(),))
        for mode in ("diag", "positive", "fixed")
    },
    "RNNSSM": lambda: Sample(_perturbed(RNNSSM(3, 5, 4)), (_random(2, 7, 3, dtype=torch.float32),)),
}


@each_kind
def test_one_step_by_hand(kind: str) -> None:
    layer = _layer(kind)
    x, state = _random(2, 3), _random(2, 5, seed=1)
    y, after = layer.step(x, state)
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    inflow = x @ weights["B.weight"].T
    if kind == "rnn":
        expected = torch.tanh(state @ weights["R.weight"].T + inflow + weights["B.bias"])
    elif kind == "fixed":
        expected = weights["transition_bias"].tanh() * state + inflow
    else:
        entries = x @ weights["transition.weight"].T + weights["transition.bias"]
        if kind == "full":
            expected = torch.stack([entries[i].reshape(5, 5) @ state[i] for i in range(2)]) + inflow
        else:  # the logistic function is the positive half of tanh
            expected = (entries.tanh() if kind == "diag" else (1 + (entries / 2).tanh()) / 2) * state + inflow
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(y, expected @ weights["C.weight"].T + x @ weights["D.weight"].T)


@each_kind
def test_layers_start_from_the_learned_state(kind: str) -> None:
    layer, x = _layer(kind), _random(2, 6, 3)
    torch.testing.assert_close(layer(x), layer(x, layer.initial_state.detach().expand(2, 5)))
    assert layer.initial_state.detach().abs().min() > 0


def test_the_first_state_begins_with_length_one() -> None:
    squares = InputDependentSSM(1, 4000, 1, "fixed").initial_state.detach().double().square()
    assert squares.sum().item() == pytest.approx(
        1, abs=6 * math.sqrt(2 / 4000)
    )  # a normal number's square has variance 2


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_diagonal_layers_are_captured_as_one_graph() -> None:  # the other two are by the contract
    layer, x = _layer("diag"), _random(2, 5, 3)
    captured = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(captured(x), layer(x))


@each_kind
def test_layers_keep_half_precision(kind: str) -> None:
    layer, x = _layer(kind), _random(2, 4, 3)
    exact, _ = layer(x)
    y, state = layer.bfloat16()(x.bfloat16())
    assert y.dtype == state.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, atol=0.2, rtol=0.1)


@each_mode
def test_transitions(mode: str) -> None:
    layer = InputDependentSSM(3, 200 if mode != "full" else 4, mode=mode)
    assert layer.d_out == 3
    at_zero = layer.transitions(torch.zeros(7, 3)).detach()
    if mode == "full":
        assert torch.equal(at_zero, torch.eye(4).expand(7, 4, 4))
        assert not torch.equal(layer.transitions(_random(7, 3, dtype=torch.float32)), at_zero)
        return
    assert at_zero.shape == (7, 200)
    logits = (at_zero[0].double() / (1 - at_zero[0])).log() if mode == "positive" else at_zero[0].double().atanh()
    assert logits.abs().max() <= 2 + 1e-5  # uniform in [-2, 2]: 200 draws reach nearly to both ends
    assert logits.min() < -1.8
    assert logits.max() > 1.8
    large = layer.transitions(100 * _random(50, 3, dtype=torch.float32)).detach()
    if mode == "fixed":
        assert torch.equal(large, at_zero[:1].expand(50, 200))
    else:
        assert large.min() == (0 if mode == "positive" else -1)
        assert large.max() == 1


def test_fixed_has_no_weights_for_the_transition() -> None:
    names = {mode: set(InputDependentSSM(3, 4, mode=mode).state_dict()) for mode in MODES}
    common = {"initial_state", "B.weight", "C.weight", "D.weight"}
    assert names.pop("fixed") == common | {"transition_bias"}
    assert set(map(frozenset, names.values())) == {frozenset(common | {"transition.weight", "transition.bias"})}


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_reduces_to_torch_rnn(activation: str) -> None:
    layer = _perturbed(RNNSSM(3, 5, 4, getattr(torch, activation))).double()
    peer = nn.RNN(3, 5, nonlinearity=activation, batch_first=True, dtype=torch.float64)
    peer.load_state_dict(
        {
            "weight_ih_l0": layer.B.weight,
            "weight_hh_l0": layer.R.weight,
            "bias_ih_l0": layer.B.bias,
            "bias_hh_l0": torch.zeros(5),
        }
    )
    x, state = _random(2, 9, 3), _random(2, 5, seed=1)
    states, final = peer(x, state[None])
    y, last = layer(x, state)
    torch.testing.assert_close(last, final[0])
    torch.testing.assert_close(y, layer.C(states) + layer.D(x))


def test_reduces_to_conv1d() -> None:
    layer, time = _layer("fixed"), 12
    x = _random(2, time, 3)
    a = layer.transitions(x)[0, 0]
    powers = a ** torch.arange(time)[:, None]
    kernel = torch.einsum("os,ts,si->oit", layer.C.weight, powers, layer.B.weight)
    kernel[..., 0] += layer.D.weight
    padded = nn.functional.pad(x.mT, (time - 1, 0))
    expected = nn.functional.conv1d(padded, kernel.flip(-1)).mT
    torch.testing.assert_close(layer(x, torch.zeros(2, 5, dtype=torch.float64))[0], expected)


@pytest.mark.parametrize("mode", DIAGONAL)
def test_diag_is_full_with_a_diagonal_matrix(mode: str) -> None:
    layer, x, state = _layer(mode), _random(2, 33, 3), _random(2, 5, seed=1)
    states, final = matrix_scan(layer.transitions(x).diag_embed(), layer.B(x), state)
    torch.testing.assert_close(layer(x, state), (layer.C(states) + layer.D(x), final))


@pytest.mark.usefixtures("unchecked")
def test_bad_layers_and_inputs() -> None:
    for size, name in enumerate(("d_in", "d_state", "d_out")):
        sizes = [3, 5, 4]
        sizes[size] = 0
        for build in (InputDependentSSM, RNNSSM):
            with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
                build(*sizes)
    with pytest.raises(ValueError, match="mode: expected one of full, diag, positive, fixed, got 'dense'"):
        InputDependentSSM(3, 5, mode="dense")
    for kind in ("full", "diag", "rnn"):
        layer, x = _layer(kind), _random(2, 6, 3)
        for bad in (x[0], x[..., :2], x[:, :0], x[:0]):
            with pytest.raises(ValueError, match=r"x: expected \[batch, time, 3\] with no empty axis, got shape"):
                layer(bad)
        for bad in (_random(5), _random(1, 5), _random(2, 4), _random(2, 5, 1)):
            with pytest.raises(ValueError, match=r"state: expected \[batch, d_state\] = \(2, 5\), got"):
                layer(x, bad)
        with pytest.raises(ValueError, match=r"x: expected \[batch, 3\], got shape \(2, 6, 3\)"):
            layer.step(x)


def test_repr_says_sizes_and_mode() -> None:
    assert "d_in=3, d_state=5, d_out=4, mode=diag" in repr(InputDependentSSM(3, 5, 4, "diag"))
    assert "d_in=3, d_state=5, d_out=4" in repr(RNNSSM(3, 5, 4))


@each_group
def test_permutation_matrices_solve_word_problems_exactly(group: str) -> None:
    tokens, products = group_word_problem(group, 1000, 2, generator=_rng())
    layer = word_problem_ssm(group)
    x = nn.functional.one_hot(tokens, layer.d_in).float()
    scores, final = layer(x)
    assert torch.equal(scores.argmax(-1), products)
    points = group_permutations(group)
    assert torch.equal(final, points[products[:, -1]] + 1.0)
    # Whole numbers, so that the margin is exact: the best score is the sum of the squares, all others are lower.
    best = scores.topk(2).values
    assert torch.equal(best[..., 0], torch.full((2, 1000), float(sum(i * i for i in range(1, points.shape[1] + 1)))))
    assert (best[..., 0] - best[..., 1]).min() >= 1


@pytest.mark.parametrize("group", ["Z2", "Z3xZ4xZ5", "A4xZ5", "A5"])
def test_relu_solves_word_problems_exactly(group: str) -> None:
    tokens, products = group_word_problem(group, 100, 2, generator=_rng())
    layer = word_problem_rnn(group)
    assert layer.d_state == group_permutations(group).shape[1] ** 2
    scores, state = layer(nn.functional.one_hot(tokens, layer.d_in).float())
    assert torch.equal(scores.argmax(-1), products)
    points = group_permutations(group)
    assert torch.equal(state.unflatten(1, (points.shape[1], -1)).sum(2), points[products[:, -1]] + 1.0)


def test_exact_layers_go_on_from_a_state() -> None:
    tokens, products = group_word_problem("A5", 40, 3, generator=_rng())
    x = nn.functional.one_hot(tokens, 60).float()
    for layer in (word_problem_ssm("A5"), word_problem_rnn("A5")):
        _, state = layer(x[:, :23])
        assert torch.equal(layer(x[:, 23:], state)[0].argmax(-1), products[:, 23:])


@pytest.mark.parametrize("mode", MODES)
def test_commuting_transitions_forget_the_order(mode: str) -> None:
    layer, x = _layer(mode), _random(2, 19, 3)
    with torch.no_grad():
        layer.B.weight.zero_()
    states = [layer(x[:, torch.randperm(19, generator=_rng(seed))])[1].detach() for seed in range(3)]
    differ = max(float((state - states[0]).abs().max()) for state in states)
    assert (differ > 1e-3) if mode == "full" else (differ < 1e-12)


@pytest.mark.parametrize("mode", DIAGONAL)
def test_a_diagonal_layer_cannot_tell_a_product_from_its_reverse(mode: str) -> None:
    table = group_table("A5")
    g, h = (table != table.T).nonzero()[0].tolist()
    x = nn.functional.one_hot(torch.tensor([[g, h], [h, g]]), 60).double()
    layer = _layer(mode, 60, 8, 60)
    with torch.no_grad():
        layer.B.weight.zero_()
    state = layer(x)[1]
    torch.testing.assert_close(state[0], state[1])
    exact = word_problem_ssm("A5").double()(x)[0][:, -1].argmax(-1)
    assert exact.tolist() == [table[g, h], table[h, g]]
    assert exact[0] != exact[1]


def test_a_negative_entry_solves_parity() -> None:
    layer = InputDependentSSM(2, 1, 2, "diag")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.transition.weight.copy_(torch.tensor([[20.0, -20.0]]))  # tanh(20) is 1 in float32
        layer.initial_state.fill_(1)
        layer.C.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    tokens, products = group_word_problem("Z2", 1000, 3, generator=_rng())
    scores, state = layer(nn.functional.one_hot(tokens, 2).float())
    assert torch.equal(scores.argmax(-1), products)
    assert torch.equal(state[:, 0], 1 - 2.0 * products[:, -1])


@pytest.mark.parametrize("seed", range(4))
def test_positive_entries_never_turn_back_on_constant_input(seed: int) -> None:
    # Parity alternates on 1, 1, 1, ...; these states go one way in ever smaller moves, so that no readout follows it.
    layer = _perturbed(InputDependentSSM(2, 6, 2, "positive"), seed).double()
    x = torch.tensor([[0.0, 1.0]]).double().expand(1, 60, 2)
    state, states = layer.initial_state.detach().expand(1, 6), []
    for t in range(60):
        _, state = layer.step(x[:, t], state)
        states.append(state[0].detach())
    moves = torch.stack(states).diff(dim=0)
    torch.testing.assert_close(moves[1:], layer.transitions(x[0, :1]).detach() * moves[:-1])
    visible = moves.abs() > 1e-9
    assert ((moves.sign() == moves[0].sign()) | ~visible).all()
    assert ((moves[1:].abs() < moves[:-1].abs()) | ~visible[1:]).all()


def test_rotations_commute_and_solve_the_abelian_word_problem() -> None:
    tokens, products = group_word_problem("Z60", 1000, 2, generator=_rng())
    angles = tokens.double() * (2 * math.pi / 60)
    cos, sin = angles.cos(), angles.sin()
    A = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    states, _ = matrix_scan(A, None, torch.tensor([[1.0, 0.0]]).double().expand(2, 2))
    found = torch.atan2(states[..., 1], states[..., 0]) * (60 / (2 * math.pi))
    assert torch.equal(found.round().long() % 60, products)
    torch.testing.assert_close(A[0, 0] @ A[0, 1], A[0, 1] @ A[0, 0])
