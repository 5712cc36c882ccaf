import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import pairwise_distances_argmin
from torch import Tensor, nn

from mlreviews.common.layers import linear
from mlreviews.peft.lora import LoRALinear
from mlreviews.peft.slim import SlidingClusters, SLIMLinear, grouped_lora, lora_mixture
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _layer(*, seen: bool = True, filled: bool = False, **options: object) -> SLIMLinear:
    settings = {"n_lora": 3, "n_identity": 2, "rank": 2, "alpha": 3.0, "n_clusters": 4} | options
    layer = SLIMLinear(linear(5, 6, generator=_rng()), **settings, generator=_rng(1))
    if seen:
        layer.clusters.update(_random(30, 5, seed=2))
    if filled:
        layer.lora_B.data = _random(*layer.lora_B.shape, seed=3)
    return layer.eval()


def _clusters() -> SlidingClusters:
    clusters = SlidingClusters(3, 4)
    clusters.update(_random(20, 4))
    return clusters.eval()


CONTRACT = {
    "SLIMLinear": lambda: Sample(_layer(), (_random(2, 7, 5),)),
    "SlidingClusters": lambda: Sample(_clusters(), (_random(7, 4),)),
}


class TestMixture:
    def test_both_forms_are_the_loop_over_tokens(self) -> None:
        x, a, b = _random(9, 5).double(), _random(4, 2, 5).double(), _random(4, 3, 2).double()
        experts = torch.tensor([[0, 2], [2, 0], [2, 3], [3, 2], [0, 3], [0, 2], [3, 0], [2, 0], [3, 2]])  # 1 unused
        weights = _random(9, 2, seed=4).double()
        expected = torch.stack(
            [sum(weights[t, k] * b[e] @ (a[e] @ x[t]) for k, e in enumerate(experts[t])) for t in range(9)]
        )
        torch.testing.assert_close(grouped_lora(x, a, b, experts, weights), expected)
        dense = torch.zeros(9, 4).double().scatter(1, experts, weights)
        torch.testing.assert_close(lora_mixture(x, a, b, dense), expected)

    def test_same_gradients(self) -> None:
        x, a, b = (t.double().requires_grad_() for t in (_random(6, 5), _random(4, 2, 5), _random(4, 3, 2)))
        weights = torch.rand(6, 2, generator=_rng()).double().requires_grad_()
        experts = torch.rand(6, 4, generator=_rng(1)).topk(2, 1).indices
        inputs = (x, a, b, weights)
        grouped = torch.autograd.grad(grouped_lora(x, a, b, experts, weights).sin().sum(), inputs)
        dense = lora_mixture(x, a, b, torch.zeros(6, 4).double().scatter(1, experts, weights))
        for one, other in zip(grouped, torch.autograd.grad(dense.sin().sum(), inputs), strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_expert(self) -> None:
        for wrong in (4, -1):
            with pytest.raises(ValueError, match="experts: expected numbers from 0 to 3"):
                grouped_lora(
                    torch.ones(1, 5),
                    torch.ones(4, 2, 5),
                    torch.ones(4, 3, 2),
                    torch.tensor([[wrong]]),
                    torch.ones(1, 1),
                )


class TestClusters:
    def test_first_update_starts_at_inputs(self) -> None:
        h = _random(9, 4)
        clusters = SlidingClusters(3, 4, momentum=1.0)
        clusters.update(h)
        assert torch.equal(clusters.centres, h[[0, 4, 8]])
        torch.testing.assert_close(clusters.variances, h.var(0, correction=0).expand(3, 4))

    def test_centres_slide_to_the_means_of_their_inputs(self) -> None:
        h = torch.cat([_random(40, 3, seed=k) * 0.1 + 5 * k for k in range(3)])
        clusters = SlidingClusters(3, 3, momentum=0.8)
        clusters.update(h)
        before, spread = clusters.centres.clone(), clusters.variances.clone()
        near = torch.from_numpy(pairwise_distances_argmin(h.numpy(), before.numpy()))
        assert torch.equal(clusters.nearest(h), near)
        clusters.update(h)
        for k in range(3):
            own = h[near == k]
            torch.testing.assert_close(clusters.centres[k], 0.8 * before[k] + 0.2 * own.mean(0))
            about = (own - before[k]).square().mean(0)
            torch.testing.assert_close(clusters.variances[k], 0.8 * spread[k] + 0.2 * about, rtol=1e-4, atol=1e-5)
        still = clusters.centres.clone()
        clusters.update(torch.full((3, 3), 10.0))  # near the third centre only
        assert torch.equal(clusters.centres[:2], still[:2])
        assert not torch.equal(clusters.centres[2], still[2])
        own, before, spread = torch.full((1, 3), 11.0), clusters.centres[2].clone(), clusters.variances[2].clone()
        clusters.update(own)  # one input alone
        torch.testing.assert_close(clusters.centres[2], 0.8 * before + 0.2 * own[0])
        torch.testing.assert_close(
            clusters.variances[2], 0.8 * spread + 0.2 * (own[0] - before) ** 2, rtol=1e-4, atol=0
        )
        for _ in range(60):
            clusters.update(h)
        torch.testing.assert_close(clusters.centres, torch.stack([h[near == k].mean(0) for k in range(3)]))

    def test_distance_is_the_largest_deviation_above_one(self) -> None:
        clusters = _clusters()
        clusters.centres.copy_(torch.tensor([[0.0] * 4, [10.0] * 4, [-30.0] * 4]))
        clusters.variances.copy_(torch.tensor([[4.0, 1, 1, 9], [1.0] * 4, [1.0] * 4]))
        h = torch.tensor([[5.0, 0, 0, 0], [0, 0, 0, -4.5], [0.5, 0.5, -0.9, 1], [10, 12.5, 10, 9]])
        torch.testing.assert_close(clusters.distance(h), torch.tensor([1.5, 0.5, 0, 1.5]))

    def test_nothing_moves_in_evaluation_and_nothing_is_far_at_first(self) -> None:
        clusters = SlidingClusters(3, 4).eval()
        clusters(_random(8, 4) + 50)
        assert not clusters.started
        assert clusters(_random(8, 4) + 50).tolist() == [0] * 8
        clusters.train()(_random(8, 4))
        state = {name: x.clone() for name, x in clusters.eval().state_dict().items()}
        assert clusters(_random(8, 4) + 50).min() > 1
        assert all(torch.equal(x, state[name]) for name, x in clusters.state_dict().items())

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="clusters: expected at least 1"):
            SlidingClusters(0, 3)
        with pytest.raises(ValueError, match="dim: expected at least 1"):
            SlidingClusters(3, 0)
        with pytest.raises(ValueError, match="momentum: expected a probability"):
            SlidingClusters(3, 2, 1.5)


class TestLayer:
    def test_against_a_loop(self) -> None:
        layer, x = _layer(filled=True, top_k=2), _random(2, 7, 5)
        layer.router.data *= 3
        y = layer(x).detach().numpy()
        distances = layer.clusters.distance(x.flatten(0, 1)).numpy().reshape(2, 7)
        for row, t in np.ndindex(2, 7):
            token = x[row, t].numpy()
            w = softmax(layer.router.detach().numpy() @ token)
            w[3:] *= 1 + distances[row, t]
            best = sorted(range(5), key=lambda i: -w[i])[:2]
            out = layer.base(x[row, t]).detach().numpy()
            for i in best:
                if i < 3:
                    a, b = layer.lora_A[i].detach().numpy(), layer.lora_B[i].detach().numpy()
                    out = out + w[i] / sum(w[j] for j in best) * 1.5 * b @ (a @ token)
            np.testing.assert_allclose(y[row, t], out, atol=1e-5)

    def test_reduces_to_lora(self) -> None:
        slim = _layer(n_lora=1, n_identity=0, top_k=1, filled=True)
        lora = LoRALinear(linear(5, 6, generator=_rng()), 2, 3.0)
        lora.lora_A["default"].data, lora.lora_B["default"].data = slim.lora_A.data[0], slim.lora_B.data[0]
        x = _random(4, 5)
        torch.testing.assert_close(slim(x), lora(x))

    def test_reduces_to_torch_linear(self) -> None:
        layer, x = _layer(filled=True), _random(4, 5).abs()
        layer.router.data[3:] = 50.0
        assert torch.equal(layer(x), layer.base(x))

    def test_far_inputs_go_to_identity(self) -> None:
        layer = _layer(filled=True, n_identity=1, top_k=4)
        layer.router.data.zero_()  # so that nothing but the distance decides
        direction = torch.tensor([0.0, 0, 1, 0, 0])
        share = torch.stack([layer.routing(s * direction[None])[0, 3] for s in (3.0, 6.0, 20.0, 1e3, 1e6)])
        assert (share.diff() > 0).all()
        far = 1e6 * direction[None]
        assert (layer.change(far) / layer.base(far)).abs().max() < 1e-4
        assert share[-1] > 1 - 1e-5
        near = SLIMLinear(linear(5, 6, generator=_rng()), 3, 1, 2, generator=_rng()).eval()
        near.router.data.zero_()
        torch.testing.assert_close(near.routing(far).sort().values, torch.tensor([[0, 0, 0.5, 0.5]]))

    def test_clusters_follow_in_training_only(self) -> None:
        layer, x = _layer(), _random(3, 4, 5) + 2
        before = layer.clusters.centres.clone()
        layer(x)
        assert torch.equal(layer.clusters.centres, before)
        layer.train()(x)
        assert not torch.equal(layer.clusters.centres, before)

    def test_dropping(self) -> None:
        layer, x = _layer(filled=True, drop=0.36, n_lora=1, n_identity=0, top_k=1), _random(4, 5)
        expected = layer(x)
        whole = _layer(filled=True).train()
        assert whole._dropped()[0] is whole.lora_A  # nothing is drawn where nothing is dropped
        layer.train()
        draws = torch.stack([layer.change(x) for _ in range(200)]).detach()
        error = draws.std(0) / 200**0.5
        assert ((layer.base(x) + draws.mean(0) - expected).abs() < 4.5 * error).all()
        a, b = layer._dropped()
        torch.testing.assert_close(a[a != 0], (layer.lora_A / 0.8)[a != 0])
        assert ((a == 0).all(1) == (a == 0).any(1)).all()  # whole columns of A, whole rows of B
        assert ((b == 0).all(2) == (b == 0).any(2)).all()
        zeros = [
            float((torch.einsum("eor,eri->eoi", *layer._dropped()[::-1]) == 0).double().mean()) for _ in range(300)
        ]
        assert abs(np.mean(zeros) - 0.36) < 4 * np.std(zeros) / 300**0.5

    def test_penalty(self) -> None:
        layer = _layer(filled=True)
        expected = np.abs(layer.lora_A.detach().numpy()).mean() + np.abs(layer.lora_B.detach().numpy()).mean()
        assert layer.penalty().item() == pytest.approx(expected, rel=1e-6)

    def test_defaults(self) -> None:
        layer = SLIMLinear(nn.Linear(70, 7))
        assert layer.router.shape == (10, 70)
        assert layer.lora_A.shape == (8, 16, 70)
        assert layer.lora_B.shape == (8, 7, 16)
        assert (layer.scaling, layer.top_k, layer.drop, layer.clusters.momentum) == (2, 2, 0, 0.99)
        assert layer.clusters.centres.shape == (64, 70)
        assert not layer.lora_B.any()
        for drawn in (layer.router, layer.lora_A):
            assert 0.9 < drawn.max() * 70**0.5 < 1
            assert -1 < drawn.min() * 70**0.5 < -0.9

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        base = nn.Linear(3, 2)
        for name in ("n_lora", "rank", "top_k"):
            with pytest.raises(ValueError, match=f"{name}: expected at least 1"):
                SLIMLinear(base, **{name: 0})
        with pytest.raises(ValueError, match="n_identity: expected at least 0"):
            SLIMLinear(base, n_identity=-1)
        with pytest.raises(ValueError, match="top_k, drop: expected at most 10 experts"):
            SLIMLinear(base, top_k=11)
        with pytest.raises(ValueError, match="drop below 1"):
            SLIMLinear(base, drop=1.0)
        with pytest.raises(ValueError, match="drop: expected a probability"):
            SLIMLinear(base, drop=1.1)
