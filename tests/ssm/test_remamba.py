import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlreviews.models import SequenceModel
from mlreviews.ssm.mamba import MambaBlock
from mlreviews.ssm.mingru import MinGRU
from mlreviews.ssm.remamba import Compressed, ReMamba, adapted_forward, range_to_compress, select_topk_by_query
from tests.contracts.families import Sample

BATCH, TIME, DIM, STATE, VOCAB = 2, 13, 6, 3, 11


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _ids(time: int = TIME, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (BATCH, time), generator=_rng(seed))


def _block(d_conv: int = 4, seed: int = 0) -> MambaBlock:
    """With every parameter moved away from where it begins, and steps large enough for the state to matter."""
    block = MambaBlock(DIM, STATE, d_conv, dt_rank=2, generator=_rng(seed))
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.add_(0.3 * _random(*parameter.shape, seed=seed + i, dtype=torch.float32))
        block.dt_proj.bias.fill_(-0.5)
    return block.double()


def _model(
    compress_frac: float = 0.6, ratio: float = 0.4, start: float = 0.0, mlp_ratio: float = 0.0, d_conv: int = 4
) -> ReMamba:
    mixers = [_block(d_conv, seed) for seed in (1, 2)]
    backbone = SequenceModel(VOCAB, DIM, mixers, mlp_ratio=mlp_ratio, classes=5, generator=_rng(3))
    model = ReMamba(backbone, compress_frac, ratio, start, generator=_rng(4)).double()
    with torch.no_grad():
        for i, bias in enumerate(model.ret_bias):
            bias.copy_(0.5 * _random(2 * DIM, seed=i))
    return model


CONTRACT = {"ReMamba": lambda: Sample(_model(mlp_ratio=1.5).float(), (_ids(),))}


class TestRange:
    def test_by_hand(self) -> None:
        assert range_to_compress(100, 0.18, 0.5) == (0, 18, 9)
        assert range_to_compress(101, 0.18, 0.5) == (0, 19, 10)
        assert range_to_compress(6000, 0.18, 0.009) == (0, 1080, 10)
        assert range_to_compress(10, 0.5, 0.5, 0.25) == (2, 7, 3)
        assert range_to_compress(10, 0.5, 1.0, 0.5) == (5, 10, 5)
        assert range_to_compress(1, 0.01, 0.01) == (0, 1, 1)
        assert range_to_compress(3, 0.5, 1.0, 0.5) == (1, 3, 2)
        assert range_to_compress(9, 1.0, 1.0) == (0, 9, 9)
        # Rounded up twice where it has to be, and once only where it is whole: 100 * 0.07 is 7.000000000000001.
        assert range_to_compress(100, 0.07, 1.0) == (0, 7, 7)
        assert range_to_compress(1000, 1.0, 0.007) == (0, 1000, 7)
        assert range_to_compress(100, 0.71, 1.0, 0.29) == (29, 100, 71)

    @given(st.integers(1, 500), st.integers(1, 100), st.integers(1, 100), st.integers(0, 100))
    @settings(max_examples=200)
    def test_exact_arithmetic(self, length: int, p: int, rho: int, s: int) -> None:
        s = min(s, 100 - p)
        first, last, kept = range_to_compress(length, p / 100, rho / 100, s / 100)
        assert first == s * length // 100
        assert last == min(first + -(-p * length // 100), length)
        assert kept == -(-rho * (last - first) // 100)
        assert 1 <= kept <= last - first

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="prompt_len: expected at least 1, got 0"):
            range_to_compress(0, 0.5, 0.5)
        for name in ("compress_frac", "ratio"):
            for value, what in ((0.0, "more than 0"), (1.01, "at most 1"), (math.nan, "a finite number")):
                with pytest.raises(ValueError, match=f"{name}: expected {what}"):
                    range_to_compress(9, **({"compress_frac": 0.5, "ratio": 0.5} | {name: value}))
        with pytest.raises(ValueError, match=r"start: expected at most 1 - compress_frac = 0\.7, got 0\.71"):
            range_to_compress(9, 0.3, 0.5, 0.71)
        with pytest.raises(ValueError, match="start: expected at least 0"):
            range_to_compress(9, 0.3, 0.5, -0.1)


class TestSelection:
    def test_by_hand(self) -> None:
        angles = torch.tensor([[0.3, 2.0, -0.1, 1.0, 3.0], [3.1, 0.2, 0.1, -0.3, 1.5]], dtype=torch.float64)
        lengths = _random(2, 5).exp()[..., None]
        h = torch.stack([angles.cos(), angles.sin()], 2) * lengths
        q = torch.tensor([[5.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
        indices, scores = select_topk_by_query(h, q, 3)
        assert indices.tolist() == [[0, 2, 3], [1, 2, 3]]
        torch.testing.assert_close(scores, angles.cos().gather(1, indices))

    @given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
    @settings(max_examples=30)
    def test_no_other_token_is_more_similar(self, tokens: int, K: int, seed: int) -> None:
        K = min(K, tokens)
        h, q = _random(3, tokens, 4, seed=seed), _random(3, 4, seed=seed + 100)
        indices, scores = select_topk_by_query(h, q, K)
        assert indices.shape == scores.shape == (3, K)
        assert (indices.diff(dim=1) > 0).all()
        for b in range(3):
            query = q[b].numpy()
            cosines = [np.dot(k, query) / np.linalg.norm(k) / np.linalg.norm(query) for k in h[b].numpy()]
            np.testing.assert_allclose(scores[b], [cosines[i] for i in indices[b]])
            left = [c for i, c in enumerate(cosines) if i not in indices[b].tolist()]
            assert not left or max(left) <= scores[b].min()

    def test_of_equal_tokens_the_earlier_are_kept(self) -> None:
        indices, _ = select_topk_by_query(torch.ones(1, 40, 3), torch.ones(1, 3), 4)
        assert indices.tolist() == [[0, 1, 2, 3]]

    def test_half_precision_is_compared_in_float32(self) -> None:
        h, q = _random(2, 50, 64).bfloat16(), _random(2, 64, seed=1).bfloat16()
        indices, scores = select_topk_by_query(h, q, 5)
        expected, exact = select_topk_by_query(h.double(), q.double(), 5)
        assert scores.dtype == torch.float32
        assert torch.equal(indices, expected)
        torch.testing.assert_close(scores.double(), exact, atol=1e-6, rtol=0)

    def test_gradcheck(self) -> None:
        h, q = _random(2, 5, 3).requires_grad_(), _random(2, 3, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda h, q: select_topk_by_query(h, q, 2)[1], (h, q))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        h, q = _random(2, 5, 3), _random(2, 3)
        with pytest.raises(ValueError, match="K: expected at least 1, got 0"):
            select_topk_by_query(h, q, 0)
        with pytest.raises(ValueError, match=r"h: expected .* at least K = 6 tokens, got shape \(2, 5, 3\)"):
            select_topk_by_query(h, q, 6)
        with pytest.raises(ValueError, match=r"h: expected \[batch, tokens, dim\]"):
            select_topk_by_query(q, q, 1)
        with pytest.raises(ValueError, match=r"q: expected \[2, 3\], as h has, got shape \(2, 4\)"):
            select_topk_by_query(h, _random(2, 4), 2)
        with pytest.raises(ValueError, match="q: expected"):
            select_topk_by_query(h, _random(1, 3), 2)
        assert select_topk_by_query(h, q, 5)[0].tolist() == [[0, 1, 2, 3, 4]] * 2


class TestAdaptedForward:
    """Equation (4) in one block."""

    @pytest.mark.parametrize(("first", "kept"), [(0, 1), (0, 4), (3, 5), (5, TIME - 5), (0, TIME)])
    def test_reduces_to_mamba_with_scores_one_and_no_bias(self, first: int, kept: int) -> None:
        block, x = _block(), _random(BATCH, TIME, DIM)
        ones, zeros = torch.ones(BATCH, kept).double(), torch.zeros(2 * DIM).double()
        y, state = adapted_forward(block, x, ones, first, zeros)
        expected, last = block(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(state, last)

    def test_scales_and_shifts_the_steps_of_the_kept_tokens_only(self) -> None:
        class Scaled(MambaBlock):
            """The block itself, with the step sizes changed from outside, one number at a time."""

            def selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                delta, B, C = super().selection(u)
                delta = delta.clone()
                for b in range(BATCH):
                    for i in range(4):
                        for d in range(2 * DIM):
                            delta[b, 3 + i, d] = delta[b, 3 + i, d] * weights[b, i] + bias[d]
                return delta, B, C

        weights, bias = _random(BATCH, 4, seed=5).relu(), _random(2 * DIM, seed=6)
        assert 0 < (weights == 0).sum() < 8
        block, x = _block(), _random(BATCH, TIME, DIM)
        other = copy.deepcopy(block)
        other.__class__ = Scaled
        y, state = adapted_forward(block, x, weights, 3, bias)
        expected, last = other(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(state, last)

    def test_a_token_with_weight_zero_and_a_very_negative_bias_leaves_the_state_alone(self) -> None:
        block, x = _block(d_conv=1), _random(BATCH, TIME, DIM)
        with torch.no_grad():
            block.dt_proj.bias.fill_(-800.0)
            block.x_proj.weight[:2] *= 1e4  # so that ordinary tokens still have steps of all sizes
        none, no_bias = torch.zeros(BATCH, 4).double(), torch.zeros(2 * DIM).double()
        _, before = block(x[:, :3])
        assert (before.ssm.abs().amax((1, 2)) > 0.01).all()
        _, after = adapted_forward(block, x[:, :7], none, 3, no_bias)
        torch.testing.assert_close(after.ssm, before.ssm)
        assert not torch.allclose(block(x[:, :7])[1].ssm, before.ssm)
        # So what follows is as if the tokens weren't there.
        y, end = adapted_forward(block, x, none, 3, no_bias)
        without, last = block(torch.cat([x[:, :3], x[:, 7:]], 1))
        torch.testing.assert_close(y[:, 7:], without[:, 3:])
        torch.testing.assert_close(end, last)

    def test_a_very_negative_bias_of_the_kept_tokens_does_the_same(self) -> None:
        block, x = _block(d_conv=1), _random(BATCH, TIME, DIM)
        y, end = adapted_forward(block, x, torch.ones(BATCH, 4).double(), 0, torch.full((2 * DIM,), -2e3).double())
        without, last = block(x[:, 4:])
        torch.testing.assert_close(y[:, 4:], without)
        torch.testing.assert_close(end, last)

    def test_gradcheck(self) -> None:
        block, x = _block(), _random(1, 5, DIM).requires_grad_()
        weights, bias = _random(1, 2, seed=1).requires_grad_(), _random(2 * DIM, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, w, b: adapted_forward(block, x, w, 2, b)[0], (x, weights, bias), fast_mode=True
        )

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        block, x, bias = _block(), _random(BATCH, TIME, DIM), torch.zeros(2 * DIM).double()
        with pytest.raises(ValueError, match=r"x: expected \[batch, time, 6\]"):
            adapted_forward(block, x[..., :5], x[:, :2, 0], 0, bias)
        for weights, first in ((x[:1, :2, 0], 0), (x[:, :2, 0], TIME - 1), (x[:, :2, 0], -1), (x[:, :0, 0], 0)):
            with pytest.raises(ValueError, match=r"weights: expected \[2, K\] for tokens from .* of 13, got shape"):
                adapted_forward(block, x, weights, first, bias)
        for weights in (x[:, :2], x[:, 0, 0], x[0, 0, 0]):
            with pytest.raises(ValueError, match="weights: expected"):
                adapted_forward(block, x, weights, 0, bias)
        with pytest.raises(ValueError, match=r"ret_bias: expected \[12\], got shape \(11,\)"):
            adapted_forward(block, x, x[:, :2, 0], TIME - 2, bias[1:])


class TestReMamba:
    @pytest.mark.parametrize("start", [0.0, 0.31])
    @pytest.mark.parametrize("prompt_len", [1, 7, TIME, None])
    def test_lengths_and_order(self, start: float, prompt_len: int | None) -> None:
        model = _model(start=start)
        first, last, kept = range_to_compress(prompt_len or TIME, 0.6, 0.4, start)
        found = model.compress(_ids(), prompt_len)
        assert found.first == first
        assert found.indices.shape == found.scores.shape == (BATCH, kept)
        assert (found.indices.diff(dim=1) > 0).all()
        assert first <= found.indices.min() <= found.indices.max() < last
        assert found.inputs.shape == (BATCH, TIME - (last - first) + kept, DIM)
        logits, state = model(_ids(), prompt_len)
        assert logits.shape == (BATCH, TIME - (last - first) + kept, 5)
        assert [s.ssm.shape for s in state] == [(BATCH, 2 * DIM, STATE)] * 2

    @pytest.mark.parametrize("start", [0.0, 0.31])
    def test_the_first_pass_is_the_backbones(self, start: float) -> None:
        model, ids = _model(start=start, mlp_ratio=1.5), _ids()
        model.backbone.head = nn.Identity()
        h, _ = model.backbone(ids[:, :11])
        first, last, _ = range_to_compress(11, 0.6, 0.4, start)
        inputs, scores, indices, _ = model.compress(ids, 11)
        for b in range(BATCH):
            query = model.Q_proj(h[b, 10])
            keys = model.K_proj(h[b, first:last])
            cosines = nn.functional.cosine_similarity(query.expand_as(keys), keys, dim=1).tolist()
            best = sorted(sorted(range(len(cosines)), key=lambda i: -cosines[i])[: indices.shape[1]])
            assert (indices[b] - first).tolist() == best
            torch.testing.assert_close(scores[b], torch.tensor([cosines[i] for i in best]).double())
            embedded = model.backbone.embedding.weight[ids[b]]
            values = torch.stack([model.V_proj(h[b, first + i]) for i in best])
            torch.testing.assert_close(inputs[b], torch.cat([embedded[:first], values, embedded[last:]]))

    @pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
    def test_reduces_to_mamba_on_the_embeddings(self, mlp_ratio: float) -> None:
        model, ids = _model(0.7, 1.0, mlp_ratio=mlp_ratio), _ids()
        with torch.no_grad():
            for bias in model.ret_bias:
                bias.zero_()
        _, scores, indices, first = model.compress(ids)
        assert indices.tolist() == [list(range(10))] * BATCH
        logits, state = model.second_pass(model.backbone.embedding(ids), torch.ones_like(scores), first)
        expected, last = model.backbone(ids)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(state, last)

    def test_forward_is_the_second_pass_with_relu_of_the_scores(self) -> None:
        model = _model(start=0.2)
        inputs, scores, _, first = model.compress(_ids(), 9)
        assert (scores < 0).any()
        assert (scores > 0).any()
        weights = torch.where(scores > 0, scores, 0)
        torch.testing.assert_close(model(_ids(), 9), model.second_pass(inputs, weights, first))

    def test_every_block_uses_its_own_bias_and_the_weights(self) -> None:
        model = _model()
        inputs, scores, _, first = model.compress(_ids())
        logits, _ = model.second_pass(inputs, scores, first)
        for bias in model.ret_bias:
            other = copy.deepcopy(model)
            list(other.ret_bias)[[b is bias for b in model.ret_bias].index(True)].data += 1
            assert not torch.allclose(other.second_pass(inputs, scores, first)[0], logits)
        x = inputs
        for block, bias in zip(model.backbone.blocks, model.ret_bias, strict=True):
            x = x + adapted_forward(block.mixer, block.norm(x), scores, first, bias)[0]
        torch.testing.assert_close(logits, model.backbone.head(model.backbone.norm(x)))

    @pytest.mark.parametrize("prompt_len", [9, TIME])
    def test_prefill_then_decode(self, prompt_len: int) -> None:
        model, ids = _model(), _ids(TIME + 3)
        whole, last = model(ids, prompt_len)
        logits, state = model(ids[:, :TIME], prompt_len)
        torch.testing.assert_close(logits, whole[:, :-3])
        for t in range(3):
            logits, state = model.step(ids[:, TIME + t], state)
            torch.testing.assert_close(logits, whole[:, t - 3])
        torch.testing.assert_close(state, last)

    def test_the_answer_is_not_seen_by_the_prompt(self) -> None:
        model, ids = _model(start=0.1), _ids()
        changed = ids.clone()
        changed[:, 9:] = (changed[:, 9:] + 1) % VOCAB
        one, other = model.compress(ids, 9), model.compress(changed, 9)
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.scores, other.scores)
        after = TIME - 9
        assert torch.equal(model(ids, 9)[0][:, :-after], model(changed, 9)[0][:, :-after])

    def test_gradients_reach_query_and_key_through_the_steps(self) -> None:
        model = _model()
        logits, _ = model(_ids())
        logits[:, -1].square().sum().backward()
        for projection in (model.Q_proj, model.K_proj, model.V_proj):
            assert all(p.grad.abs().max() > 1e-6 for p in projection.parameters())
        assert all(p.grad.abs().max() > 1e-6 for p in model.ret_bias)
        # ... and through nothing else: without the modulation there is none.
        model.zero_grad()
        inputs, scores, _, first = model.compress(_ids())
        model.second_pass(inputs, scores.relu().detach(), first)[0][:, -1].square().sum().backward()
        assert all(p.grad is None for q in (model.Q_proj, model.K_proj) for p in q.parameters())
        assert all(p.grad is not None for p in model.V_proj.parameters())

    def test_a_negative_score_has_weight_zero_and_no_gradient(self) -> None:
        class Contrary(ReMamba):
            def select(self, h: Tensor, query: Tensor, K: int) -> tuple[Tensor, Tensor]:
                indices, scores = super().select(h, query, K)
                return indices, -scores.abs()

        model = _model()
        model.__class__ = Contrary
        model(_ids())[0][:, -1].square().sum().backward()
        assert all((p.grad == 0).all() for q in (model.Q_proj, model.K_proj) for p in q.parameters())

    def test_other_fractions_may_be_set_later(self) -> None:
        model = _model()
        model.compress_frac, model.ratio = 1.0, 0.2
        assert model(_ids())[0].shape[1] == 3

    def test_begins_as_the_paper_says(self) -> None:
        backbone = SequenceModel(VOCAB, DIM, [MambaBlock(DIM), MambaBlock(DIM)])
        before = torch.get_rng_state()
        model = ReMamba(backbone, generator=_rng(1))
        assert torch.equal(before, torch.get_rng_state())
        assert (model.compress_frac, model.ratio, model.start) == (0.18, 0.009, 0.0)
        assert [tuple(b.shape) for b in model.ret_bias] == [(2 * DIM,)] * 2
        assert all((b == 0).all() for b in model.ret_bias)
        assert [[type(m) for m in p] for p in (model.Q_proj, model.K_proj, model.V_proj)] == [
            [nn.Linear, nn.SiLU, nn.Linear]
        ] * 3
        assert all(m.weight.shape == (DIM, DIM) and m.bias is not None for m in model.Q_proj[::2])
        assert (
            sum(p.numel() for p in model.parameters())
            == sum(p.numel() for p in backbone.parameters()) + 3 * 2 * (DIM * DIM + DIM) + 2 * 2 * DIM
        )
        same, other = ReMamba(backbone, generator=_rng(1)), ReMamba(backbone, generator=_rng(2))
        assert torch.equal(model.V_proj[2].weight, same.V_proj[2].weight)
        assert not torch.equal(model.Q_proj[0].weight, other.Q_proj[0].weight)
        assert not torch.equal(model.Q_proj[0].weight, model.K_proj[0].weight)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        model = _model()
        backbone = model.backbone
        bad: Any = _ids()[0]
        with pytest.raises(ValueError, match=r"input_ids: expected \[batch, time\] .* got shape \(13,\)"):
            model(bad)
        with pytest.raises(ValueError, match="input_ids: expected"):
            model(_ids()[:, :0])
        with pytest.raises(ValueError, match="prompt_len: expected at most the 13 tokens there are, got 14"):
            model(_ids(), 14)
        with pytest.raises(ValueError, match="prompt_len: expected at least 1, got 0"):
            model(_ids(), 0)
        with pytest.raises(TypeError, match="backbone: expected mixers of type MambaBlock, got MinGRU"):
            ReMamba(SequenceModel(VOCAB, DIM, [MambaBlock(DIM), MinGRU(DIM)]))
        with pytest.raises(ValueError, match="ratio: expected more than 0"):
            ReMamba(backbone, 0.5, 0.0)
        with pytest.raises(ValueError, match="start: expected at most"):
            ReMamba(backbone, 0.5, 0.5, 0.6)
        assert isinstance(model.compress(_ids()), Compressed)
