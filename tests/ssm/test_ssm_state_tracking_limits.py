import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mlreviews.ssm.ssm_state_tracking_limits import (
    RNNSSM,
    InputDependentSSM,
    group_permutations,
    group_table,
    group_word_problem,
    matrix_scan,
    word_problem_rnn,
    word_problem_ssm,
)
from tests.contracts.families import Sample

MODES = ["full", "diag", "positive", "fixed"]
DIAGONAL = ["diag", "positive"]
GROUPS = ["Z2", "Z60", "A4xZ5", "A5"]
# Around the 16 steps of the loop, and odd and even at each level above it.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 34, 55, 100]

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
    "group_word_problem": lambda: Sample(functools.partial(group_word_problem, "A5"), (7, 3)),
}


@pytest.mark.parametrize("group", [*GROUPS, "S3", "Z1"])
def test_tables_are_groups(group: str) -> None:
    table = group_table(group)
    order = len(table)
    everything = torch.arange(order)
    assert torch.equal(table[0], everything)
    assert torch.equal(table[:, 0], everything)
    for axis in (0, 1):  # every row and column is a rearrangement: closed, and with inverses
        assert torch.equal(table.sort(axis).values, everything.expand(order, order).movedim(-1, axis))
    assert torch.equal(table[table], table[:, table])


def test_only_the_cyclic_groups_commute() -> None:
    commutes = {group: torch.equal(group_table(group), group_table(group).T) for group in GROUPS}
    assert commutes == {"Z2": True, "Z60": True, "A4xZ5": False, "A5": False}
    assert [len(group_table(group)) for group in GROUPS] == [2, 60, 60, 60]


def _commutator_subgroup(table: Tensor) -> set[int]:
    inverse = (table == 0).int().argmax(1)
    product = table[table[:, :], table[inverse][:, inverse]]  # g h g^-1 h^-1
    found = set(product.flatten().tolist())
    while True:
        members = torch.tensor(sorted(found))
        larger = set(table[members][:, members].flatten().tolist())
        if larger == found:
            return found
        found = larger


@pytest.mark.parametrize(("group", "size"), [("Z60", 1), ("A4xZ5", 4), ("A5", 60), ("S3", 3)])
def test_commutators(group: str, size: int) -> None:
    # A5 is perfect: nothing is left when it is made abelian. A4xZ5 is solvable: its commutators are Klein's four-group.
    assert len(_commutator_subgroup(group_table(group))) == size


@pytest.mark.parametrize(
    ("group", "orders"),
    [
        ("A5", {1: 1, 2: 15, 3: 20, 5: 24}),
        ("A4xZ5", {1: 1, 2: 3, 3: 8, 5: 4, 10: 12, 15: 32}),
        ("Z60", {n: sum(math.gcd(i, n) == 1 for i in range(1, n + 1)) for n in range(1, 61) if 60 % n == 0}),
    ],
)
def test_orders_of_elements(group: str, orders: dict[int, int]) -> None:
    table = group_table(group)
    found, powers = [0] * len(table), torch.arange(len(table))
    for exponent in range(1, 61):
        for g in (powers == 0).nonzero().flatten().tolist():
            found[g] = found[g] or exponent
        powers = table[powers, torch.arange(len(table))]
    assert Counter(found) == orders


@pytest.mark.parametrize("group", [*GROUPS, "S3", "A4", "S4xZ3"])
def test_products_compose_permutations(group: str) -> None:
    elements = group_permutations(group)
    # As matrices, which send point i to g(i), so that the product gh applies h first.
    matrices = nn.functional.one_hot(elements, elements.shape[1]).double().mT
    products = torch.einsum("gij,hjk->ghik", matrices, matrices)
    assert torch.equal(products, matrices[group_table(group)])


def test_permutations() -> None:
    assert group_permutations("A3").tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert group_permutations("Z4").tolist() == [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]
    assert group_permutations("Z2xS2").tolist() == [[0, 1, 2, 3], [0, 1, 3, 2], [1, 0, 2, 3], [1, 0, 3, 2]]
    for n in range(1, 6):
        symmetric = group_permutations(f"S{n}")
        assert symmetric.tolist() == [list(p) for p in itertools.permutations(range(n))]
        signs = torch.linalg.det(nn.functional.one_hot(symmetric, n).double()).round()
        assert torch.equal(group_permutations(f"A{n}"), symmetric[signs == 1])
    assert group_permutations("A6").shape == (360, 6)
    assert group_permutations("Z1000").shape == (1000, 1000)


def test_tables_can_be_changed_without_harm() -> None:
    group_table("Z2").zero_()
    assert group_table("Z2").tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("name", ["", "B3", "a5", "A", "5", "A5x", "A5 ", "Z0", "A05", "A7", "S7", "Z1001", "A5xS7"])
@pytest.mark.parametrize("function", [group_permutations, group_table, word_problem_ssm, word_problem_rnn])
def test_bad_group(function: Callable[[str], object], name: str) -> None:
    with pytest.raises(ValueError, match=r"^group: expected .*, got "):
        function(name)


@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 8, 9, 33])
def test_products_of_shifts_are_sums(time: int) -> None:
    for order in (2, 60):
        tokens, products = group_word_problem(f"Z{order}", time, 7, generator=_rng())
        assert tokens.shape == products.shape == (7, time)
        assert tokens.dtype == products.dtype == torch.int64
        assert torch.equal(products, tokens.cumsum(1) % order)


@pytest.mark.parametrize("time", [1, 2, 7, 16, 31])
def test_prefix_products(time: int) -> None:
    tokens, products = group_word_problem("A5", time, 3, generator=_rng())
    elements = group_permutations("A5").tolist()
    for row, found in zip(tokens.tolist(), products.tolist(), strict=True):
        points = list(range(5))
        for token, number in zip(row, found, strict=True):
            points = [points[i] for i in elements[token]]
            assert elements[number] == points


def test_elements_are_uniform_and_independent() -> None:
    tokens, _ = group_word_problem("A4", 50, 400, generator=_rng())
    assert stats.chisquare(tokens.flatten().bincount(minlength=12)).pvalue > 1e-5
    pairs = 12 * tokens[:, ::2] + tokens[:, 1::2]
    assert stats.chisquare(pairs.flatten().bincount(minlength=144)).pvalue > 1e-5


@pytest.mark.usefixtures("unchecked")
def test_bad_word_problems() -> None:
    with pytest.raises(ValueError, match=r"group: expected factors .*, got 'M11'"):
        group_word_problem("M11", 3, 2)
    with pytest.raises(ValueError, match="time: expected at least 1, got 0"):
        group_word_problem("A5", 0, 2)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        group_word_problem("A5", 3, 0)
    with pytest.raises(TypeError, match=r"time: expected a whole number, got 3\.0"):
        group_word_problem("A5", 3.0, 2)


def _dense(A: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """All states [batch, time, d] as the solution of one linear system, h_t - A_t h_{t-1} = b_t."""
    batch, time, d, _ = A.shape
    system = torch.eye(time * d, dtype=A.dtype).expand(batch, -1, -1).clone()
    for t in range(1, time):
        system[:, t * d : (t + 1) * d, (t - 1) * d : t * d] = -A[:, t]
    inflow = b.clone()
    inflow[:, 0] += torch.einsum("bij,bj->bi", A[:, 0], initial)
    return torch.linalg.solve(system, inflow.flatten(1)).unflatten(1, (time, d))


@pytest.mark.parametrize("time", LENGTHS)
def test_scan_solves_the_recurrence(time: int) -> None:
    A, b, initial = 0.6 * _random(2, time, 3, 3), _random(2, time, 3, seed=1), _random(2, 3, seed=2)
    states, final = matrix_scan(A, b, initial)
    torch.testing.assert_close(states, _dense(A, b, initial))
    assert torch.equal(final, states[:, -1])
    torch.testing.assert_close(matrix_scan(A, b)[0], _dense(A, b, torch.zeros_like(initial)))
    torch.testing.assert_close(matrix_scan(A, None, initial)[0], _dense(A, torch.zeros_like(b), initial))


@pytest.mark.parametrize("time", [1, 16, 37])
def test_scan_of_columns(time: int) -> None:
    A, b, initial = 0.6 * _random(2, time, 3, 3), _random(2, time, 3, 4, 5, seed=1), _random(2, 3, 4, 5, seed=2)
    states, final = matrix_scan(A, b, initial)
    assert final.shape == initial.shape
    for i, j in itertools.product(range(4), range(5)):
        torch.testing.assert_close(states[..., i, j], _dense(A, b[..., i, j], initial[..., i, j]))
    without = matrix_scan(A, None, initial[..., 0])[0]
    torch.testing.assert_close(without[..., 2], _dense(A, torch.zeros(2, time, 3).double(), initial[..., 2, 0]))
    torch.testing.assert_close(matrix_scan(A, b)[0][..., 3, 1], matrix_scan(A, b[..., 3, 1])[0])


@pytest.mark.parametrize("time", [2, 17, 50])
def test_scan_from_the_identity_gives_products(time: int) -> None:
    A = _random(1, time, 4, 4) / 2
    products, final = matrix_scan(A, None, torch.eye(4, dtype=A.dtype)[None])
    torch.testing.assert_close(final[0], torch.linalg.multi_dot(list(A[0].flip(0))))
    torch.testing.assert_close(products[0, 1], A[0, 1] @ A[0, 0])


@settings(max_examples=15)
@given(st.integers(2, 70), st.data())
def test_scan_split_anywhere(time: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, time - 1))
    A, b, initial = 0.6 * _random(2, time, 3, 3), _random(2, time, 3, seed=1), _random(2, 3, seed=2)
    whole, final = matrix_scan(A, b, initial)
    head, state = matrix_scan(A[:, :cut], b[:, :cut], initial)
    tail, last = matrix_scan(A[:, cut:], b[:, cut:], state)
    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("time", [3, 16, 17, 19, 36])
def test_scan_gradients(time: int) -> None:
    inputs = [0.6 * _random(1, time, 2, 2), _random(1, time, 2, seed=1), _random(1, 2, seed=2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert gradcheck(matrix_scan, inputs)
    if time == 3:
        assert gradgradcheck(matrix_scan, inputs)
    if time == 19:  # of the final state alone, and with singular transitions
        assert gradcheck(lambda *xs: matrix_scan(*xs)[1], [(0 * inputs[0]).detach().requires_grad_(), *inputs[1:]])


def test_scan_of_non_contiguous_inputs() -> None:
    A, b, initial = _random(3, 3, 40, 2) / 2, _random(3, 40, 2, seed=1), _random(3, 2, seed=2)
    views = A.permute(3, 2, 0, 1), b.permute(2, 1, 0), initial.T
    copies = [view.contiguous() for view in views]
    assert not any(view.is_contiguous() for view in views)
    torch.testing.assert_close(matrix_scan(*views), matrix_scan(*copies))
    weights = _random(40, 3, 2, seed=3).permute(2, 0, 1)
    grads = []
    for inputs in (views, copies):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        matrix_scan(*leaves)[0].backward(weights)
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    A, b = (0.6 * _random(2, 50, 3, 3)).to(dtype), _random(2, 50, 3, seed=1).to(dtype)
    initial = _random(2, 3, seed=2, dtype=torch.float32)
    states, final = matrix_scan(A, b, initial)
    exact = matrix_scan(A.float(), b.float(), initial)
    assert states.dtype == dtype
    assert final.dtype == torch.float32
    assert torch.equal(states, exact[0].to(dtype))
    assert torch.equal(final, exact[1])


def test_scan_stays_in_float64() -> None:
    states, final = matrix_scan(_random(1, 40, 2, 2), _random(1, 40, 2))
    assert states.dtype == final.dtype == torch.float64


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_cost_of_the_scan() -> None:
    counts = []
    for time in (256, 512, 1024):
        A, b = torch.zeros(1, time, 6, 6), torch.zeros(1, time, 6)
        with _Operations() as operations:
            matrix_scan(A, b)
        counts.append(operations.count)
        with FlopCounterMode(display=False) as flops:
            matrix_scan(A, b)
        assert flops.get_total_flops() <= 2 * time * (6**3 + 2 * 6**2)
    # The same number of operations more for each doubling: the depth grows with the logarithm of the length.
    assert 0 < counts[2] - counts[1] == counts[1] - counts[0] < 40
    assert counts[0] < 300


@pytest.mark.usefixtures("unchecked")
def test_bad_scans() -> None:
    A, b, initial = _random(2, 5, 3, 3), _random(2, 5, 3), _random(2, 3)
    with pytest.raises(TypeError, match=r"A: expected float32, .*, got torch\.int64"):
        matrix_scan(A.long(), b)
    for bad in (A[0], A[..., :2], A[:, :0], A[:0], A[:, :, :0, :0]):
        with pytest.raises(ValueError, match=r"A: expected \[batch, time, d, d\] with no empty axis, got shape"):
            matrix_scan(bad, b)
    for bad in (b[:1], b[:, :4], b[..., :2], b[0]):
        with pytest.raises(ValueError, match=r"b: expected \[batch, time, d, \.\.\.\] = .*, got"):
            matrix_scan(A, bad)
    with pytest.raises(TypeError, match=r"b: expected torch\.float64, got torch\.float32"):
        matrix_scan(A, b.float())
    for bad in (initial[:1], initial[:, :2], initial[0], initial[..., None]):
        with pytest.raises(ValueError, match=r"initial_state: expected \[batch, d, \.\.\.\] = .*, got"):
            matrix_scan(A, b, bad)
    with pytest.raises(ValueError, match=r"initial_state: expected \[batch, d, \.\.\.\] = .*, got"):
        matrix_scan(A, None, initial[:1])
    with pytest.raises(TypeError, match=r"initial_state: expected float32, .*, got torch\.int64"):
        matrix_scan(A, b, initial.long())
    with pytest.raises(ValueError, match="b, initial_state: expected at least one of them, got neither"):
        matrix_scan(A)


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
