import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlreviews.ssm.ttt_layers import TTTMLP, TTTLinear, affine_dual, norm_loss_gradient, ttt_linear_dual
from mlreviews_kernels.delta_rule import delta_rule
from tests.contracts.families import Sample

BATCH, TIME, DIM, HEADS, MINI = 2, 8, 8, 2, 3

Layer = TTTLinear | TTTMLP
each_kind = pytest.mark.parametrize("kind", [TTTLinear, TTTMLP])


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _layer(kind: type[Layer] = TTTLinear, *args: Any, dim: int = DIM, mini: int = MINI, eta_base: float = 2.5) -> Layer:
    """With no parameter where it starts, and inner steps so large that they show."""
    layer = kind(dim, HEADS, mini, eta_base, *args, generator=_rng()).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter += 0.4 * _random(*parameter.shape, seed=100 + i)
        layer.learnable_token_idx.copy_(_random(mini, seed=5) * 0.2)
    return layer


CONTRACT = {
    "TTTLinear": lambda: Sample(_layer().float(), (_random(BATCH, TIME, DIM, dtype=torch.float32),)),
    "TTTMLP": lambda: Sample(_layer(TTTMLP).float(), (_random(BATCH, TIME, DIM, dtype=torch.float32),)),
}


def _rotate(x: Tensor, place: int) -> Tensor:
    """RoPE of one vector, by complex numbers."""
    half = x.numel() // 2
    turns = torch.tensor([place * 10000 ** (-i / half) for i in range(half)], dtype=torch.float64)
    return torch.view_as_real(torch.view_as_complex(x.reshape(half, 2)) * torch.polar(turns * 0 + 1, turns)).flatten()


def _primal(layer: Layer, x: Tensor) -> Tensor:
    """Equations (1), (3) and (5) token by token and head by head; autograd gives the inner gradients. One row."""
    p, dim, mlp = dict(layer.named_parameters()), layer.head_dim, isinstance(layer, TTTMLP)
    heads = []
    for h in range(HEADS):
        rows = slice(h * dim, (h + 1) * dim)

        def predict(inputs: Tensor, weights: list[Tensor], h: int = h) -> Tensor:
            z = inputs @ weights[0] + weights[1][0]
            if mlp:
                z = nn.functional.gelu(z, approximate="tanh") @ weights[2] + weights[3][0]
            if layer.inner_ln:
                z = nn.functional.layer_norm(z, (dim,), p["ttt_norm_weight"][h], p["ttt_norm_bias"][h], 1e-6)
            return inputs + z if layer.inner_residual else z

        weights = [p[name][h] for name in (("W1", "b1", "W2", "b2") if mlp else ("W1", "b1"))]
        outputs = []
        for t in range(len(x)):
            place = t % layer.mini_batch
            if place == 0:
                base, summed = weights, [torch.zeros_like(w) for w in weights]
            q, k, v = (p[f"{name}_proj.weight"][rows] @ x[t] for name in "qkv")
            q, k = _rotate(q, place), _rotate(k, place)
            logit = p["learnable_ttt_lr_weight"][h, 0] @ x[t] + p["learnable_ttt_lr_bias"][h, 0]
            rate = layer.eta_base / (1 + torch.exp(-logit)) / dim
            half_loss = (predict(k, base) - v).square().sum() / 2
            found = torch.autograd.grad(half_loss, base, create_graph=True)
            summed = [s + rate * g for s, g in zip(summed, found, strict=True)]
            scale = max(1 / (place + 1) + p["learnable_token_idx"][place].item(), 0.0)
            weights = [w - scale * s for w, s in zip(base, summed, strict=True)]
            outputs.append(predict(q, weights))
        heads.append(torch.stack(outputs))
    joined = torch.cat(heads, 1)
    normed = nn.functional.layer_norm(joined, (DIM,), p["post_norm.weight"], p["post_norm.bias"], 1e-6)
    return normed @ p["o_proj.weight"].T


@each_kind
class TestLayers:
    @pytest.mark.parametrize("mini", [1, 3, TIME, 20])
    def test_dual_form_equals_gradient_descent_token_by_token(self, kind: type[Layer], mini: int) -> None:
        layer, x = _layer(kind, mini=mini), _random(BATCH, TIME, DIM)
        y, state = layer(x)
        for b in range(BATCH):
            torch.testing.assert_close(y[b], _primal(layer, x[b]), rtol=1e-9, atol=1e-11)
        assert state.position == TIME % mini
        still = copy.deepcopy(layer)
        still.eta_base = 0.0
        assert (still(x)[0] - y).abs().max() > 1e-2  # what is learned while reading shows

    @pytest.mark.parametrize(("norm", "residual"), [(False, False), (True, False), (False, True)])
    def test_without_parts_of_the_inner_model(self, kind: type[Layer], norm: bool, residual: bool) -> None:
        layer, x = _layer(kind, norm, residual, eta_base=0.5), _random(1, TIME, DIM)
        torch.testing.assert_close(layer(x)[0][0], _primal(layer, x[0]), rtol=1e-9, atol=1e-11)
        assert hasattr(layer, "ttt_norm_weight") == norm

    @pytest.mark.parametrize("prefill", [1, 3, 5])
    def test_steps_after_a_prefill_equal_the_whole(self, kind: type[Layer], prefill: int) -> None:
        layer, x = _layer(kind), _random(BATCH, TIME, DIM)
        whole, last = layer(x)
        _, state = layer(x[:, :prefill])
        for t in range(prefill, TIME):
            y, state = layer.step(x[:, t], state)
            torch.testing.assert_close(y, whole[:, t])
        torch.testing.assert_close(state, last)

    def test_without_inner_steps_there_is_no_memory(self, kind: type[Layer]) -> None:
        layer, x = _layer(kind, eta_base=0.0), _random(BATCH, TIME, DIM)
        y, state = layer(x)
        for start in range(0, TIME, MINI):  # every mini-batch by itself: the rotation starts anew
            torch.testing.assert_close(y[:, start : start + MINI], layer(x[:, start : start + MINI])[0])
        torch.testing.assert_close(state.weights, layer.initial_state(BATCH).weights)
        q, *_ = layer.project(x)
        z = layer.predict(q, layer.inner_parameters()).transpose(1, 2).flatten(2)
        torch.testing.assert_close(y, layer.o_proj(layer.post_norm(z)))

    def test_a_token_weight_below_zero_counts_as_zero(self, kind: type[Layer]) -> None:
        layer = _layer(kind)
        with torch.no_grad():
            layer.learnable_token_idx.copy_(torch.tensor([-0.25, -0.75, -0.25]))
        torch.testing.assert_close(layer.token_scale().tolist(), [0.75, 0.0, 1 / 3 - 0.25])

    def test_in_bfloat16_states_are_float32(self, kind: type[Layer]) -> None:
        layer, x = _layer(kind, eta_base=0.5).bfloat16(), _random(BATCH, 50, DIM).bfloat16()
        exact = copy.deepcopy(layer).double()(x.double())[0]
        y, state = layer(x)
        assert y.dtype == torch.bfloat16
        assert {t.dtype for t in (*state.weights, *state.gradients)} == {torch.float32}
        assert (y.double() - exact).norm() < 0.03 * exact.norm()
        assert layer.step(x[:, 0], state)[0].dtype == torch.bfloat16

    def test_the_generator_decides_the_weights(self, kind: type[Layer]) -> None:
        before = torch.get_rng_state()
        one, same, other = (kind(DIM, HEADS, generator=_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert all(map(torch.equal, one.parameters(), same.parameters()))
        assert not any(map(torch.equal, [one.W1, one.q_proj.weight], [other.W1, other.q_proj.weight]))

    def test_starts_where_the_paper_does(self, kind: type[Layer]) -> None:
        layer = kind(64, 2, generator=_rng())
        assert (layer.mini_batch, layer.eta_base) == (16, 1.0 if kind is TTTLinear else 0.1)
        assert layer.inner_ln
        assert layer.inner_residual
        torch.testing.assert_close(layer.token_scale(), 1 / torch.arange(1.0, 17))
        for name, values in layer.named_parameters():
            if "bias" in name or "token" in name or name in ("b1", "b2"):
                assert not values.any()
            elif name in ("W1", "W2", "learnable_ttt_lr_weight"):
                assert values.std().item() == pytest.approx(0.02, rel=0.3)
            elif "norm" in name:
                assert (values == 1).all()
        # Names and shapes of the authors' code, so that its layers load.
        shapes = {f"{name}_proj.weight": (64, 64) for name in "qkvo"} | {"learnable_token_idx": (16,)}
        shapes |= {"learnable_ttt_lr_weight": (2, 1, 64), "learnable_ttt_lr_bias": (2, 1)}
        shapes |= {
            "ttt_norm_weight": (2, 32),
            "ttt_norm_bias": (2, 32),
            "post_norm.weight": (64,),
            "post_norm.bias": (64,),
        }
        if kind is TTTLinear:
            shapes |= {"W1": (2, 32, 32), "b1": (2, 1, 32)}
        else:
            shapes |= {"W1": (2, 32, 128), "b1": (2, 1, 128), "W2": (2, 128, 32), "b2": (2, 1, 32)}
        assert {name: tuple(values.shape) for name, values in layer.state_dict().items()} == shapes

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self, kind: type[Layer]) -> None:
        layer, x = _layer(kind), _random(BATCH, TIME, DIM)
        with pytest.raises(ValueError, match=r"x: expected \[batch, time, 8\] .* got shape \(2, 8, 7\)"):
            layer(x[..., :7])
        with pytest.raises(ValueError, match=r"x_t: expected \[batch, 8\], got shape \(2, 8, 8\)"):
            layer.step(x)
        state = layer(x)[1]
        with pytest.raises(ValueError, match=r"state: expected weights of shapes \[\(1, 2, 4, "):
            layer(x[:1], state)
        with pytest.raises(ValueError, match="state: expected gradients of shapes"):
            layer(x, state._replace(gradients=state.weights[:1]))
        for position in (-1, 3):
            with pytest.raises(ValueError, match=rf"state: expected a position in \[0, 3\), got {position}"):
                layer(x, state._replace(position=position))
        with pytest.raises(ValueError, match=r"d_model: expected a multiple of 2 n_heads = 4 \(for RoPE\), got 6"):
            kind(6, 2)
        with pytest.raises(ValueError, match="mini_batch: expected at least 1, got 0"):
            kind(8, 2, 0)
        with pytest.raises(ValueError, match="n_heads: expected at least 1, got 0"):
            kind(8, 0)
        with pytest.raises(ValueError, match="eta_base: expected at least 0"):
            kind(8, 2, eta_base=-1.0)


class TestReductions:
    """What TTT is without its inner norm, and with it."""

    @staticmethod
    def _inputs(time: int = 7, seed: int = 0) -> tuple[Tensor, ...]:
        q, k = _random(2, time, 3, 4, seed=seed), _random(2, time, 3, 4, seed=seed + 1)
        v, eta = _random(2, time, 3, 5, seed=seed + 2), 0.2 * _random(2, time, 3, seed=seed + 3).exp()
        return q, k, v, _random(2, 3, 4, 5, seed=seed + 4), eta

    def test_reduces_to_causal_linear_attention(self) -> None:
        q, k, v, W0, eta = self._inputs()
        z, W = ttt_linear_dual(q, k, v, torch.zeros_like(W0), torch.full_like(eta, 0.5), mini_batch=q.shape[1])
        weights = torch.einsum("bihd,bjhd->bhij", q, k).tril()
        torch.testing.assert_close(z, torch.einsum("bhij,bjhe->bihe", weights, v), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(W, torch.einsum("bihd,bihe->bhde", k, v), rtol=1e-12, atol=1e-12)

    def test_reduces_to_delta_rule(self) -> None:
        q, k, v, W0, eta = self._inputs()
        z, last = ttt_linear_dual(q, k, v, W0, eta, mini_batch=1)
        W = W0.mT.clone()  # columns, as the paper has them
        for t in range(q.shape[1]):
            error = torch.einsum("bhed,bhd->bhe", W, k[:, t]) - v[:, t]
            W = W - 2 * torch.einsum("bh,bhe,bhd->bhed", eta[:, t], error, k[:, t])
            torch.testing.assert_close(z[:, t], torch.einsum("bhed,bhd->bhe", W, q[:, t]), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(last, W.mT, rtol=1e-11, atol=1e-12)

    def test_layer_reduces_to_delta_rule_over_keys_with_a_one(self) -> None:
        layer, x = _layer(TTTLinear, False, False, mini=1), _random(BATCH, TIME, DIM)
        with torch.no_grad():
            layer.learnable_token_idx.zero_()
        q, k, v, rate = layer.project(x)
        q, k = (nn.functional.pad(t, (0, 1), value=1.0).transpose(1, 2) for t in (q, k))
        start = torch.cat([layer.W1, layer.b1], 1).expand(BATCH, -1, -1, -1)
        z, W = delta_rule(q, k, v.transpose(1, 2), rate.transpose(1, 2), initial_state=start)
        y, state = layer(x)
        torch.testing.assert_close(y, layer.o_proj(layer.post_norm(z.flatten(2))))
        torch.testing.assert_close(torch.cat(state.weights, 2), W)

    def test_affine_dual_is_ttt_linear_dual_in_its_parts(self) -> None:
        q, k, v, W0, eta = self._inputs()
        z, W = ttt_linear_dual(q, k, v, W0, eta, mini_batch=q.shape[1])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        errors = 2 * eta.mT[..., None] * (k @ W0 - v)
        none = torch.zeros(2, 3, 1, 5, dtype=torch.float64)
        # The bias adds the plain sum of the errors, and nothing else.
        out, (dW, db) = affine_dual(q, k, errors, torch.ones(7).double(), (W0, none), (torch.zeros_like(W0), none))
        torch.testing.assert_close(out + errors.cumsum(2), z.transpose(1, 2))
        torch.testing.assert_close(W0 - dW, W)
        torch.testing.assert_close(db, errors.sum(2, keepdim=True))

    @given(st.integers(1, 11), st.integers(1, 12), st.integers(0, 99))
    @settings(max_examples=25)
    def test_dual_equals_autograd_on_the_loss_of_the_paper(self, time: int, mini: int, seed: int) -> None:
        q, k, v, W0, eta = self._inputs(time, seed)
        z, last = ttt_linear_dual(q, k, v, W0, eta, mini)
        W = W0
        for t in range(time):
            base = W.detach().requires_grad_() if t % mini == 0 else base
            loss = (torch.einsum("bhd,bhde->bhe", k[:, t], base) - v[:, t]).square().sum()
            W = W - eta[:, t, :, None, None] * torch.autograd.grad(loss, base)[0]
            torch.testing.assert_close(z[:, t], torch.einsum("bhd,bhde->bhe", q[:, t], W), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(last, W, rtol=1e-8, atol=1e-9)

    def test_mini_batches_of_the_dual_have_16_tokens(self) -> None:
        inputs = self._inputs(18)
        torch.testing.assert_close(ttt_linear_dual(*inputs), ttt_linear_dual(*inputs, mini_batch=16), rtol=0, atol=0)

    def test_without_steps_the_dual_is_a_linear_map(self) -> None:
        q, k, v, W0, eta = self._inputs()
        z, W = ttt_linear_dual(q, k, v, W0, 0 * eta, mini_batch=2)
        torch.testing.assert_close(z, torch.einsum("bthd,bhde->bthe", q, W0))
        assert torch.equal(W, W0)

    def test_gradcheck_of_the_dual(self) -> None:
        inputs = [t.requires_grad_() for t in self._inputs(4)]
        assert torch.autograd.gradcheck(lambda *args: ttt_linear_dual(*args, mini_batch=3), inputs, fast_mode=True)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input_to_the_dual(self) -> None:
        q, k, v, W0, eta = self._inputs()
        with pytest.raises(ValueError, match="mini_batch: expected at least 1, got 0"):
            ttt_linear_dual(q, k, v, W0, eta, 0)
        with pytest.raises(ValueError, match="initial_state: expected"):
            ttt_linear_dual(q, k, v, W0[:1], eta)
        assert ttt_linear_dual(q, k, v, W0, eta)[0].equal(ttt_linear_dual(q, k, v, W0, eta, 16)[0])


class TestNorm:
    def test_gradient_by_the_formula_is_autograds(self) -> None:
        z, target = _random(3, 5, seed=1).requires_grad_(), _random(3, 5, seed=2)
        weight, bias = _random(5, seed=3), _random(5, seed=4)
        loss = (nn.functional.layer_norm(z, (5,), weight, bias, 1e-6) - target).square().sum() / 2
        torch.testing.assert_close(
            norm_loss_gradient(z, target, weight, bias), torch.autograd.grad(loss, z)[0], rtol=1e-10, atol=1e-11
        )

    def test_gradient_where_all_entries_are_nearly_equal(self) -> None:
        z = (1e-3 * _random(2, 4)).requires_grad_()
        loss = (nn.functional.layer_norm(z, (4,), None, None, 1e-6) - 1).square().sum() / 2
        found = norm_loss_gradient(z, torch.ones_like(z), torch.ones(4).double(), torch.zeros(4).double())
        torch.testing.assert_close(found, torch.autograd.grad(loss, z)[0], rtol=1e-8, atol=1e-6)
        assert norm_loss_gradient(z * 0, z, z[0], z[0]).isfinite().all()

    def test_scale_of_the_loss_is_half(self) -> None:
        one, zero = torch.ones(2).double(), torch.zeros(2).double()
        # The normed (-1, 1) can't move: what is left along it is lost, and the rest is the mean.
        found = norm_loss_gradient(torch.tensor([-3.0, 3.0]).double(), zero, one, zero)
        assert found.abs().max() < 1e-6
        assert math.isclose(float(norm_loss_gradient(torch.tensor([0.0, 1e-9]).double(), one, one, zero).sum()), 0.0)
