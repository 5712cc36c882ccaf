from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlreviews_kernels import use_backend
from mlreviews_kernels.compiled import without_compiled_code
from mlreviews_kernels.delta_rule import delta_rule, delta_rule_step
from tests.kernels.scan_cases import Inputs, ScanCase


def _inputs(batch: int, time: int, generator: torch.Generator) -> Inputs:
    return drawn(batch, time, 3, 4, 5, generator)


def drawn(
    batch: int, time: int, heads: int, dim_k: int, dim_v: int, generator: torch.Generator | None = None
) -> Inputs:
    """Keys of about length 1, rates between 0 and 1, some of them 0."""
    generator = generator or torch.Generator().manual_seed(time + dim_v)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    beta = torch.rand((batch, time, heads), generator=generator, dtype=torch.float64)
    beta[torch.rand(beta.shape, generator=generator) < 0.1] = 0.0
    return {
        "q": draw(batch, time, heads, dim_k),
        "k": normalize(draw(batch, time, heads, dim_k), dim=-1) * (0.5 + beta[..., None]),
        "v": draw(batch, time, heads, dim_v),
        "beta": beta,
        "initial_state": draw(batch, heads, dim_k, dim_v),
    }


TOKENS = ("q", "k", "v", "beta")
OPTIONS = {
    "delta_rule": {"chunk_size": 16},
    "delta_rule-3": {"chunk_size": 16, "mini_batch": 3},  # chunks of 15
    "delta_rule-20": {"chunk_size": 16, "mini_batch": 20},  # chunks of 16 and 4, from one W_base
}
CASES = [
    ScanCase(
        name,
        delta_rule,
        _inputs,
        TOKENS,
        options=options,
        split_every=options.get("mini_batch", 1),
        half_in_interpreter=False,
    )
    for name, options in OPTIONS.items()
]


def using(backend: str) -> object:
    return without_compiled_code() if backend == "vectorised" else use_backend(backend)


BACKENDS = ["reference", "cpu", "vectorised", "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def precise(backend: str) -> torch.dtype:
    return torch.float32 if backend in ("cpu", "triton") else torch.float64


def assert_near(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 if found.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * expected.abs().max().item())


@every_backend
def test_equals_products_of_matrices(backend: str) -> None:
    # W_t = (I - beta k k^T) W_{t-1} + beta k v^T, unrolled: every input through the product of what follows it
    values = drawn(2, 9, 2, 3, 4)
    with using(backend):  # type: ignore[attr-defined]
        out, final = delta_rule(**{name: x.to(precise(backend)) for name, x in values.items()}, chunk_size=4)
    for b in range(2):
        for h in range(2):
            q, k, v, beta = (values[name][b, :, h] for name in TOKENS)
            steps = torch.eye(3, dtype=torch.float64) - beta[:, None, None] * k[:, :, None] * k[:, None, :]
            for t in range(9):
                W = torch.linalg.multi_dot([*steps[: t + 1].flip(0), values["initial_state"][b, h]])
                for s in range(t + 1):
                    written = beta[s] * torch.outer(k[s], v[s])
                    W = W + torch.linalg.multi_dot([*steps[s + 1 : t + 1].flip(0), torch.eye(3).double(), written])
                assert_near(out[b, t, h], W.T @ q[t])
            assert_near(final[b, h], W)


@every_backend
@pytest.mark.parametrize("mini_batch", [2, 4, 5, 7])
def test_is_gradient_descent_on_the_square_error(backend: str, mini_batch: int) -> None:
    # autograd takes the gradient of each token's loss at the start of its mini-batch
    values = drawn(1, 9, 2, 3, 4)
    kind = precise(backend)
    with using(backend):  # type: ignore[attr-defined]
        out, _ = delta_rule(**{n: x.to(kind) for n, x in values.items()}, mini_batch=mini_batch, chunk_size=4)
    for h in range(2):
        q, k, v, beta = (values[name][0, :, h] for name in TOKENS)
        W = values["initial_state"][0, h].clone()
        for t in range(9):
            if t % mini_batch == 0:
                base = W.detach().requires_grad_()
            loss = 0.5 * (base.T @ k[t] - v[t]).square().sum()
            W = W - beta[t] * torch.autograd.grad(loss, base)[0]
            assert_near(out[0, t, h], W.T @ q[t])


@every_backend
def test_one_mini_batch_from_zero_is_linear_attention(backend: str) -> None:
    values = drawn(1, 9, 2, 3, 4)
    ones = torch.ones(1, 9, 2, dtype=torch.float64)
    inputs = {name: values[name].to(precise(backend)) for name in ("q", "k", "v")}
    with using(backend):  # type: ignore[attr-defined]
        out, _ = delta_rule(**inputs, beta=ones.to(precise(backend)), mini_batch=9, chunk_size=4)
    scores = torch.einsum("bthk,bshk->bhts", values["q"], values["k"]).tril()
    assert_near(out, torch.einsum("bhts,bshv->bthv", scores, values["v"]))


@every_backend
def test_orthonormal_keys_give_back_their_values(backend: str) -> None:
    # written with rate 1, in any state, and overwritten by the second writing
    generator = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    v = torch.randn(1, 10, 1, 3, generator=generator)
    k = torch.cat([keys, keys])[None, :, None]
    state = torch.randn(1, 1, 5, 3, generator=generator)
    with using(backend):  # type: ignore[attr-defined]
        out, final = delta_rule(k, k, v, torch.ones(1, 10, 1), initial_state=state, chunk_size=4)
    torch.testing.assert_close(out, v, rtol=0, atol=2e-6)
    torch.testing.assert_close(keys @ final[0, 0], v[0, 5:, 0], rtol=0, atol=2e-6)


@every_backend
def test_without_learning_the_state_is_read(backend: str) -> None:
    values = {name: x.float() for name, x in drawn(1, 6, 2, 3, 4).items()}
    values["beta"] = torch.zeros(1, 6, 2)
    with using(backend):  # type: ignore[attr-defined]
        out, final = delta_rule(**values, chunk_size=4)
    torch.testing.assert_close(out, torch.einsum("bhkv,bthk->bthv", values["initial_state"], values["q"]))
    torch.testing.assert_close(final, values["initial_state"])


@every_backend
def test_the_same_key_again_and_again(backend: str) -> None:
    # I + A is then all ones below the diagonal: a solve by powers of A would lose its digits
    k = torch.zeros(1, 60, 1, 3)
    k[..., 0] = 1.0
    v = torch.arange(60.0).reshape(1, 60, 1, 1)
    with using(backend):  # type: ignore[attr-defined]
        out, _ = delta_rule(k, k, v, torch.ones(1, 60, 1))
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize(("mini_batch", "chunk_size"), [(1, 64), (2, 64), (7, 64), (30, 64), (100, 64), (1, 200)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 33, 17), (3, 16, 64)])
@pytest.mark.parametrize("backend", ["cpu", "vectorised"])
def test_sizes_around_the_tiles(backend: str, sizes: tuple[int, int, int], mini_batch: int, chunk_size: int) -> None:
    values = drawn(1, 133, *sizes)
    values["beta"] /= 2 * mini_batch  # the step of a whole mini-batch must not overshoot
    names = list(values)
    results = []
    for used, kind, size in (("vectorised", torch.float64, 5), (backend, torch.float32, chunk_size)):
        leaves = [values[name].to(kind).requires_grad_() for name in names]
        with using(used):  # type: ignore[attr-defined]
            out, final = delta_rule(**dict(zip(names, leaves, strict=True)), mini_batch=mini_batch, chunk_size=size)
            results.append((out, final, *torch.autograd.grad(out.sin().sum() + final.cos().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.double(), one, rtol=0, atol=3e-5 * max(one.abs().max().item(), 1.0))


def test_keys_in_several_blocks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlreviews_kernels.delta_rule.gpu.BLOCK", 16)
    values = drawn(1, 18, 1, 20, 3)
    results = []
    for backend, kind in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = {name: value.to(kind).requires_grad_() for name, value in values.items()}
        with using(backend):  # type: ignore[attr-defined]
            out, final = delta_rule(**leaves, mini_batch=2)
            results.append(torch.autograd.grad(out.sin().sum() + final.cos().sum(), list(leaves.values())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other.double(), one, rtol=0, atol=2e-5 * max(one.abs().max().item(), 1.0))


@pytest.mark.parametrize("mini_batch", [1, 3])
def test_steps_continue_a_prefill(mini_batch: int) -> None:
    values = drawn(2, 8, 2, 3, 4)
    whole, last = delta_rule(**values, mini_batch=mini_batch)
    for prefill in (0, 3, 6):
        head = {name: x[:, :prefill] if name in TOKENS else x for name, x in values.items()}
        _, state = delta_rule(**head, mini_batch=mini_batch)
        for t in range(prefill, 8):
            if t % mini_batch == 0:
                base = state
            inputs = (values[name][:, t] for name in TOKENS)
            out, state = delta_rule_step(*inputs, state, None if mini_batch == 1 else base)
            assert_near(out, whole[:, t])
        assert_near(state, last)


def test_a_step_keeps_the_types() -> None:
    values = {name: x[:, 0].bfloat16() for name, x in drawn(2, 1, 2, 3, 4).items() if name in TOKENS}
    out, state = delta_rule_step(**values, state=torch.zeros(2, 2, 3, 4))
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    written = (
        values["beta"].float()[..., None, None] * values["k"].float()[..., None] * values["v"].float()[..., None, :]
    )
    torch.testing.assert_close(state, written)


def test_rates_may_be_float32_beside_bfloat16() -> None:
    values = {name: x.bfloat16().requires_grad_() for name, x in drawn(1, 6, 2, 3, 4).items()}
    values["beta"] = values["beta"].detach().float().requires_grad_()
    out, final = delta_rule(**values)
    (out.float().sum() + final.sum()).backward()
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    for name, value in values.items():
        assert value.grad is not None, name
        assert value.grad.dtype == value.dtype, name


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", torch.zeros(2, 6, 3), ValueError, r"q: expected \[batch, time, heads, dim_k\]"),
        ("k", torch.zeros(2, 6, 2, 4), ValueError, r"k: expected q's shape = \(2, 6, 2, 3\)"),
        ("v", torch.zeros(2, 6, 4), ValueError, r"v: expected \[batch, time, heads, dim_v\]"),
        ("v", torch.zeros(2, 6, 1, 4), ValueError, r"v: expected \[batch, time, heads, dim_v\]"),
        ("v", torch.zeros(2, 6, 2, 4).half(), TypeError, "v: expected torch.float32"),
        ("beta", torch.zeros(2, 6, 2, 1), ValueError, r"beta: expected \[batch, time, heads\] = \(2, 6, 2\)"),
        ("beta", torch.zeros(2, 6, 2).half(), TypeError, "beta: expected torch.float32 or torch.float32"),
        ("beta", torch.zeros(2, 6, 2, device="meta"), ValueError, "beta: expected a tensor on cpu"),
        ("mini_batch", 0, ValueError, "mini_batch: expected at least 1, got 0"),
        ("chunk_size", 0, ValueError, "chunk_size: expected at least 1, got 0"),
        ("initial_state", torch.zeros(2, 2, 3, 4).int(), TypeError, "initial_state: expected float32"),
    ],
)
def test_arguments_are_checked(name: str, value: object, error: type[Exception], message: str) -> None:
    values = {key: x.float() for key, x in drawn(2, 6, 2, 3, 4).items()}
    with pytest.raises(error, match=message):
        delta_rule(**{**values, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", torch.zeros(2, 1, 2, 3), ValueError, r"q: expected \[batch, heads, dim_k\]"),
        ("k", torch.zeros(2, 2, 4), ValueError, r"k: expected q's shape = \(2, 2, 3\)"),
        ("state", torch.zeros(2, 2, 4, 3), ValueError, r"state: expected \[batch, heads, dim_k, dim_v\]"),
        ("base", torch.zeros(2, 2, 4, 3), ValueError, r"base: expected \[batch, heads, dim_k, dim_v\]"),
        ("state", torch.zeros(2, 2, 3, 4).int(), TypeError, "state: expected float32"),
        ("base", torch.zeros(2, 2, 3, 4, device="meta"), ValueError, "base: expected a tensor on cpu"),
    ],
)
def test_arguments_of_a_step_are_checked(name: str, value: Tensor, error: type[Exception], message: str) -> None:
    values = {key: x[:, 0].float() for key, x in drawn(2, 6, 2, 3, 4).items() if key in TOKENS}
    values["state"] = torch.zeros(2, 2, 3, 4)
    with pytest.raises(error, match=message):
        delta_rule_step(**{**values, name: value})


@pytest.mark.parametrize(("heads", "dim_k", "dim_v", "name"), [(0, 3, 4, "q"), (2, 0, 4, "q"), (2, 3, 0, "v")])
def test_an_empty_axis_is_refused(heads: int, dim_k: int, dim_v: int, name: str) -> None:
    q, v = torch.zeros(2, 6, heads, dim_k), torch.zeros(2, 6, heads, dim_v)
    with pytest.raises(ValueError, match=f"^{name}: expected at least 1 along every axis but time"):
        delta_rule(q, q, v, torch.zeros(2, 6, heads))
