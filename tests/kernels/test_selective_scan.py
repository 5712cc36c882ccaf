from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from mlreviews_kernels import use_backend
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.selective_scan import cpu, selective_scan, selective_scan_step
from mlreviews_kernels.selective_scan.reference import CHUNK, border_rows
from tests.kernels.scan_cases import Inputs, ScanCase

CHANNELS, STATES, GROUPS = 6, 3, 2


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(batch: int, time: int, generator: torch.Generator) -> Inputs:
    """All arguments; decays from nearly 0 to nearly 1."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (batch, time)
    return {
        "u": normal(*tokens, CHANNELS),
        "delta": normal(*tokens, CHANNELS),
        "A": -normal(CHANNELS, STATES).exp(),
        "B": normal(*tokens, GROUPS, STATES),
        "C": normal(*tokens, GROUPS, STATES),
        "D": normal(CHANNELS),
        "z": normal(*tokens, CHANNELS),
        "delta_bias": normal(CHANNELS),
        "initial_state": normal(batch, CHANNELS, STATES),
    }


def _bare_inputs(batch: int, time: int, generator: torch.Generator) -> Inputs:
    """Without what is optional; positive step sizes, one group without an axis of its own."""
    values = _inputs(batch, time, generator)
    for name in ("D", "z", "delta_bias"):
        del values[name]
    return {**values, "delta": values["delta"].abs(), "B": values["B"][:, :, 1], "C": values["C"][:, :, 0]}


TOKENS = ("u", "delta", "B", "C")
TILES = {"CHUNK": 8, "ROWS": 4, "COLUMNS": 4, "GRAD_COLUMNS": 4, "WIDTH": 8}
LENGTHS = (1, 3, 4, CHUNK, CHUNK + 1, 5, 17)  # the interpreter takes the first and the last two
CASES = [
    ScanCase(
        "selective_scan",
        selective_scan,
        _inputs,
        (*TOKENS, "z"),
        options={"delta_softplus": True},
        lengths=LENGTHS,
        interpreter_tiles=TILES,
    ),
    ScanCase(
        "selective_scan-slices",  # of the state, on a GPU
        selective_scan,
        _inputs,
        (*TOKENS, "z"),
        options={"delta_softplus": True},
        lengths=(1, 9),
        interpreter_tiles={**TILES, "WIDEST": 2},
    ),
    ScanCase("selective_scan-bare", selective_scan, _bare_inputs, TOKENS, lengths=(1, 17), interpreter_tiles=TILES),
]


def values(batch: int, time: int, seed: int = 0) -> Inputs:
    return _inputs(batch, time, torch.Generator().manual_seed(seed))


def bare(batch: int, time: int, seed: int = 0) -> Inputs:
    return _bare_inputs(batch, time, torch.Generator().manual_seed(seed))


def run(how: str, inputs: Inputs, **options: object) -> tuple[Tensor, Tensor]:
    with use_backend("reference" if how == "reference" else "cpu"):
        if how == "vectorised":
            with without_compiled_code():
                return selective_scan(**inputs, **options)  # type: ignore[arg-type]
        return selective_scan(**inputs, **options)  # type: ignore[arg-type]


def with_gradients(how: str, inputs: Inputs, dtype: torch.dtype, **options: object) -> dict[str, Tensor]:
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    y, final = run(how, leaves, **options)
    cotangents = _random(*y.shape, seed=8).to(y.dtype), _random(*final.shape, seed=9).to(final.dtype)
    grads = torch.autograd.grad((y, final), list(leaves.values()), cotangents)
    return {"y": y.detach(), "final": final.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        error = (found[name].double() - x.double()).abs().max() if x.numel() else torch.tensor(0.0)
        assert error <= tolerance * max(1.0, x.abs().max().item() if x.numel() else 0.0), f"{name}: off by {error:.1e}"


def quadratic(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """y_t = sum_s C_t exp(A (delta_{s+1} + ... + delta_t)) delta_s B_s u_s, every pair of times at once."""
    u, A, time = inputs["u"], inputs["A"], inputs["u"].shape[1]
    per_group = CHANNELS // GROUPS
    group = [c // per_group for c in range(CHANNELS)]
    B, C = inputs["B"][:, :, group], inputs["C"][:, :, group]
    delta = torch.log1p((inputs["delta"] + inputs["delta_bias"]).exp())
    total = delta.cumsum(1)
    span = total[:, :, None] - total[:, None]  # [batch, t, s, channels]
    seen = torch.ones(time, time).tril().bool()
    weight = torch.where(seen[None, :, :, None, None], (span[..., None] * A).exp(), 0.0)
    h = torch.einsum("btscn,bsc,bscn->btcn", weight, delta * u, B)
    h = h + (total[..., None] * A).exp() * inputs["initial_state"][:, None]
    y = (h * C).sum(-1) + inputs["D"] * u
    return y * inputs["z"] / (1 + (-inputs["z"]).exp()), h[:, -1]


HOW = pytest.mark.parametrize("how", ["reference", "compiled", "vectorised"])


def dtype_of(how: str) -> tuple[torch.dtype, float]:
    return (torch.float32, 3e-6) if how == "compiled" else (torch.float64, 1e-12)


@HOW
def test_equals_the_quadratic_form(how: str) -> None:
    dtype, tolerance = dtype_of(how)
    inputs = values(2, 11)
    y, final = run(how, {name: x.to(dtype) for name, x in inputs.items()}, delta_softplus=True)
    expected_y, expected_final = quadratic(inputs)
    assert_close({"y": y, "final": final}, {"y": expected_y, "final": expected_final}, tolerance)


@HOW
def test_constant_inputs_are_a_sum_of_recursive_filters(how: str) -> None:
    dtype, _ = dtype_of(how)
    u, A = _random(1, 100, 1), torch.tensor([[-0.3, -2.0, 0.1]], dtype=torch.float64)
    B, C = _random(3, seed=1), _random(3, seed=2)
    expected = sum(
        lfilter([0.2 * b * c], [1.0, -math.exp(0.2 * a)], u[0, :, 0].numpy())
        for a, b, c in zip(A[0].tolist(), B.tolist(), C.tolist(), strict=True)
    )
    inputs = {"u": u, "delta": torch.full_like(u, 0.2), "A": A, "B": B.expand(1, 100, 3), "C": C.expand(1, 100, 3)}
    y, _ = run(how, {name: x.to(dtype) for name, x in inputs.items()})
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y[0, :, 0].double().numpy(), expected, atol=scale * dtype_of(how)[1])


@HOW
def test_one_state_with_softplus_is_a_gated_leaky_integrator(how: str) -> None:
    # theorem 1 of the paper: with A = -1 the decay is 1 - sigmoid(delta); its input matrix is 1 - exp(-delta), where
    # the code of the paper has delta, so u carries the quotient
    dtype, tolerance = dtype_of(how)
    x, logit = _random(1, 30, 2), _random(1, 30, 2, seed=1)
    gate = 1 / (1 + (-logit).exp())
    u = x * gate / -torch.log(1 - gate)
    one = torch.ones(1, 30, 1, dtype=torch.float64)
    inputs = {"u": u, "delta": logit, "A": -torch.ones(2, 1, dtype=torch.float64), "B": one, "C": one}
    y, _ = run(how, {name: x.to(dtype) for name, x in inputs.items()}, delta_softplus=True)
    h = torch.zeros(2, dtype=torch.float64)
    for t in range(30):
        h = (1 - gate[0, t]) * h + gate[0, t] * x[0, t]
        torch.testing.assert_close(y[0, t].double(), h, rtol=10 * tolerance, atol=tolerance)


@HOW
def test_reduces_to_unnormalised_linear_attention_without_decay(how: str) -> None:
    dtype, tolerance = dtype_of(how)
    inputs = bare(1, 9)
    inputs |= {"A": torch.zeros_like(inputs["A"]), "delta": torch.ones_like(inputs["delta"])}
    inputs["initial_state"] = torch.zeros_like(inputs["initial_state"])
    y, _ = run(how, {name: x.to(dtype) for name, x in inputs.items()})
    scores = (inputs["C"][0] @ inputs["B"][0].T).tril()
    assert_close({"y": y[0]}, {"y": scores @ inputs["u"][0]}, tolerance)


@cache
def many_channels(channels: int) -> tuple[Inputs, dict[str, Tensor]]:
    """Inputs of more than two chunks, and what the reference makes of them."""
    time = 2 * CHUNK + 5
    inputs = {"u": _random(1, time, channels), "delta": _random(1, time, channels, seed=1)}
    inputs |= {"A": -_random(channels, 2, seed=2).exp(), "z": _random(1, time, channels, seed=3)}
    inputs |= {"B": _random(1, time, 1, 2, seed=4), "C": _random(1, time, 1, 2, seed=5)}
    return inputs, with_gradients("reference", inputs, torch.float64, delta_softplus=True)


@pytest.mark.parametrize("how", ["compiled", "vectorised"])
@pytest.mark.parametrize("channels", [16, 70, 300])  # below, between and above the widths of blocks
def test_many_channels_and_chunks(how: str, channels: int) -> None:
    dtype, tolerance = dtype_of(how)
    inputs, expected = many_channels(channels)
    assert_close(with_gradients(how, inputs, dtype, delta_softplus=True), expected, tolerance)


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias", "delta_softplus"])
@pytest.mark.parametrize("how", ["compiled", "vectorised"])
def test_each_option_alone(how: str, missing: str) -> None:
    dtype, tolerance = dtype_of(how)
    inputs = values(2, 5)
    softplus = missing != "delta_softplus"
    inputs.pop(missing, None)
    inputs["delta"] = inputs["delta"] / 3  # without a softplus, steps back in time grow the state
    expected = with_gradients("reference", inputs, torch.float64, delta_softplus=softplus)
    assert_close(with_gradients(how, inputs, dtype, delta_softplus=softplus), expected, tolerance)


@pytest.mark.parametrize("how", ["compiled", "vectorised"])
def test_packed_sequences_of_all_lengths(how: str) -> None:
    dtype, tolerance = dtype_of(how)
    bounds = [0, 0, 3, 3 + CHUNK, 4 + 2 * CHUNK, 5 + 2 * CHUNK, 6 + 2 * CHUNK]
    inputs = values(1, bounds[-1]) | {"initial_state": _random(6, CHANNELS, STATES, seed=5)}
    packed = {"delta_softplus": True, "cu_seqlens": torch.tensor(bounds)}
    expected = with_gradients("reference", inputs, torch.float64, **packed)
    assert_close(with_gradients(how, inputs, dtype, **packed), expected, tolerance)
    torch.testing.assert_close(expected["final"][0], inputs["initial_state"][0])


def test_vectorised_pieces_of_any_size_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = values(3, 2 * CHUNK + 1)
    expected = with_gradients("reference", inputs, torch.float64, delta_softplus=True)
    for together, piece in ((1, 1), (2 * CHANNELS * STATES, 40), (10**6, 10**6)):
        monkeypatch.setattr(cpu, "TOGETHER", together)
        monkeypatch.setattr(cpu, "PIECE", piece)
        assert_close(with_gradients("vectorised", inputs, torch.float64, delta_softplus=True), expected, 1e-12)


@pytest.mark.parametrize(("most", "expected"), [(9, [(0, 2), (2, 3), (3, 6)]), (2, [(0, 2), (2, 3), (3, 5), (5, 6)])])
def test_sequences_of_one_length_run_together(most: int, expected: list[tuple[int, int]]) -> None:
    batches = list(cpu._batches([0, 70, 140, 141, 143, 145, 147], most))
    assert [(b.sequences.start, b.sequences.stop) for b in batches] == expected
    assert [(b.tokens.start, b.time) for b in batches][:3] == [(0, 70), (140, 1), (141, 2)]
    assert torch.cat([b.rows for b in batches]).tolist() == [
        0,
        70 // CHUNK + 1,
        140 // CHUNK + 2,
        *(2 + i for i in (3, 4, 5)),
    ]


def test_steps_equal_the_whole() -> None:
    inputs = values(2, 6)
    y, final = run("reference", inputs, delta_softplus=True)
    state = inputs["initial_state"]
    kept = state.clone()
    for t in range(6):
        now = {name: inputs[name][:, t] for name in (*TOKENS, "z")}
        constant = {name: inputs[name] for name in ("A", "D", "delta_bias")}
        out, state = selective_scan_step(**now, **constant, delta_softplus=True, state=state)
        torch.testing.assert_close(out, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)
    assert torch.equal(inputs["initial_state"], kept)


def test_bare_step_in_half_precision() -> None:
    inputs = bare(2, 1)
    state = inputs["initial_state"].float()
    now = {name: inputs[name][:, 0].bfloat16() for name in TOKENS}
    y, after = selective_scan_step(**now, A=inputs["A"].float(), state=state)
    u, delta, B, C = (now[name].double() for name in TOKENS)
    decay = (delta[..., None] * inputs["A"].float()).exp()  # no softplus unless asked for
    expected = decay * state + torch.einsum("bc,bn->bcn", delta * u, B)
    assert y.dtype == torch.bfloat16
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, expected.float())
    torch.testing.assert_close(y, torch.einsum("bcn,bn->bc", expected, C).bfloat16())


@pytest.mark.parametrize("how", ["reference", "compiled", "vectorised"])
def test_extreme_step_sizes(how: str) -> None:
    # decays from 1 down to exp(-1e30), and softplus of numbers far from 0: neither NaN nor a lost input
    delta = torch.tensor([0.0, 1e30, 90.0, -90.0, -1e30, 30.0]).reshape(1, 6, 1)
    one = torch.ones(1, 6, 1)
    inputs = {"u": one, "delta": delta, "A": -torch.ones(1, 1), "B": one, "C": one}
    found = with_gradients(how, inputs, torch.float32, delta_softplus=True)
    for name, x in found.items():
        assert torch.isfinite(x).all(), name
    steps = [math.log(2), 1e30, 90.0, math.exp(-90), 0.0, 30.0]
    torch.testing.assert_close(found["y"][0, :, 0], torch.tensor([steps[0], 1e30, 90.0, 90.0, 90.0, 30.0]))


@pytest.mark.parametrize("how", ["compiled", "vectorised"])
def test_decay_is_the_exponential_over_its_whole_range(how: str) -> None:
    x = torch.cat([torch.linspace(-120, 95, 4001), torch.tensor([-1e-3, -1e-6, 0.0, 1e-6, -math.inf, math.inf])])
    one = torch.ones(1, 1, len(x))
    inputs = {"u": 0 * one, "delta": one, "A": x[:, None], "B": one[..., :1], "C": one[..., :1]}
    y, _ = run(how, inputs | {"initial_state": torch.ones(1, len(x), 1)})
    exact = x.double().exp()
    expected = torch.where(exact > torch.finfo(torch.float32).max, math.inf, exact).float()
    infinite = torch.isinf(expected)
    assert torch.equal(torch.isinf(y[0, 0]), infinite)
    # an exponent of x has an error of x times the precision of float32
    bound = (4e-7 + 1.3e-7 * x.abs().clamp(max=200)) * expected + 1.2e-38
    assert ((y[0, 0] - expected).abs() <= bound)[~infinite].all()


def test_nan_stays_in_its_own_sequence_and_channel() -> None:
    inputs = {name: x.float() for name, x in values(2, 5).items()}
    inputs["u"][0, 2, 1] = math.nan
    y, final = run("compiled", inputs, delta_softplus=True)
    bad = torch.zeros(2, 5, CHANNELS, dtype=torch.bool)
    bad[0, 2:, 1] = True
    assert torch.equal(torch.isnan(y), bad)
    assert torch.isnan(final).nonzero()[:, :2].unique(dim=0).tolist() == [[0, 1]]


def test_matrices_of_other_dtypes_are_used_in_the_states() -> None:
    inputs = {name: x.bfloat16() for name, x in values(1, 4).items()}
    inputs |= {name: inputs[name].float() for name in ("A", "D")} | {"initial_state": inputs["initial_state"].double()}
    found = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, final = selective_scan(**found, delta_softplus=True)  # type: ignore[arg-type]
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    for name, grad in zip(found, torch.autograd.grad(y.float().sum() + final.sum(), list(found.values())), strict=True):
        assert grad.dtype == inputs[name].dtype


def test_memory_of_borders_and_partial_sums() -> None:
    # every sequence's rows, however they are cut, lie behind those of the one before and within the bound
    for lengths in ([5, 0, 64, 65, 128, 1], [0, 0, 0], [63] * 9, [64 * 5]):
        bounds = np.cumsum([0, *lengths])
        end = 0
        for i, length in enumerate(lengths):
            row = bounds[i] // CHUNK + i
            assert row >= end
            end = row + -(-length // CHUNK)
        assert end <= border_rows(int(bounds[-1]), len(lengths))
    for states in (1, 16, 17, 64, 100, 256):
        width = cpu.task_width(states)
        assert width % 32 == 0
        assert width >= max(64, 4 * states)
        assert width < max(64, 4 * states) + 32


WRONG = [
    ({"u": torch.zeros(2, 6)}, ValueError, r"u: expected \[batch, time, channels\], got \(2, 6\)"),
    ({"u": torch.zeros(2, 3, 6, dtype=torch.int64)}, TypeError, "u: expected float32"),
    ({"delta": torch.zeros(2, 3, 5)}, ValueError, r"delta: expected \[batch, time, channels\] = \(2, 3, 6\)"),
    ({"delta": torch.zeros(2, 3, 6).double()}, TypeError, "delta: expected torch.float32"),
    ({"A": torch.zeros(5, 3)}, ValueError, r"A: expected \[channels, state\] with channels = 6, got \(5, 3\)"),
    ({"A": torch.zeros(6, 3, 1)}, ValueError, "A: expected"),
    ({"A": torch.zeros(6, 0)}, ValueError, "A: expected"),
    ({"A": torch.zeros(6, 3, dtype=torch.int32)}, TypeError, "A: expected float32"),
    ({"A": torch.zeros(6, 3, device="meta")}, ValueError, "A: expected a tensor on cpu"),
    ({"B": torch.zeros(2, 3, 4, 3)}, ValueError, "B: expected a number of groups that divides the 6 channels, got 4"),
    ({"B": torch.zeros(2, 3, 0, 3)}, ValueError, "B: expected a number of groups"),
    ({"B": torch.zeros(2, 3, 3, 3)}, ValueError, r"C: expected \[batch, time, groups, state\] = \(2, 3, 3, 3\)"),
    ({"B": torch.zeros(2, 3, 4)}, ValueError, r"B: expected \[batch, time, state\] = \(2, 3, 3\), got \(2, 3, 4\)"),
    ({"C": torch.zeros(2, 3, 2, 3).double()}, TypeError, "C: expected torch.float32"),
    ({"D": torch.zeros(1)}, ValueError, r"D: expected \[channels\] = \(6,\)"),
    ({"D": torch.zeros(6, dtype=torch.int64)}, TypeError, "D: expected float32"),
    ({"z": torch.zeros(2, 3, 1)}, ValueError, "z: expected"),
    ({"delta_bias": torch.zeros(6, 1)}, ValueError, "delta_bias: expected"),
    ({"delta_bias": torch.zeros(6, device="meta")}, ValueError, "delta_bias: expected a tensor on cpu"),
    ({"initial_state": torch.zeros(2, 3, 6)}, ValueError, r"initial_state: expected \[sequences, channels, state\]"),
    ({"initial_state": torch.zeros(2, 6, 3).long()}, TypeError, "initial_state: expected float32"),
    ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: packed sequences lie in one row"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    inputs = {name: x.float() for name, x in values(2, 3).items()} | change
    with pytest.raises(error, match=message):
        selective_scan(**inputs)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.zeros(2, 1, 6)}, ValueError, r"u: expected \[batch, channels\]"),
        ({"B": torch.zeros(2, 3, 2)}, ValueError, r"B: expected \[batch, groups, state\] = \(2, 3, 3\)"),
        ({"B": torch.zeros(2, 4)}, ValueError, r"B: expected \[batch, state\] = \(2, 3\)"),
        ({"state": torch.zeros(6, 3)}, ValueError, r"state: expected \[batch, channels, state\] = \(2, 6, 3\)"),
        ({"state": torch.zeros(2, 6, 3).int()}, TypeError, "state: expected float32"),
        ({"state": torch.zeros(2, 6, 3, device="meta")}, ValueError, "state: expected a tensor on cpu"),
    ],
)
def test_wrong_arguments_of_a_step(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    inputs = {name: x.float() for name, x in values(2, 1).items()}
    now = {name: x[:, 0] if name in (*TOKENS, "z") else x for name, x in inputs.items()}
    now["state"] = now.pop("initial_state")
    with pytest.raises(error, match=message):
        selective_scan_step(**now | change)


def test_bad_offsets() -> None:
    inputs = {name: x.float() for name, x in bare(1, 5).items()}
    for how in ("reference", "compiled"):
        with pytest.raises(ValueError, match="cu_seqlens: expected numbers that rise from 0 to the time length 5"):
            run(how, inputs, cu_seqlens=torch.tensor([0, 4]))
