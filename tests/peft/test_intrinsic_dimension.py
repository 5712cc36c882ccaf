import copy

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from mlreviews.peft.intrinsic_dimension import (
    DenseProjection,
    FastfoodProjection,
    IntrinsicWrapper,
    fastfood,
    intrinsic_dimension,
    walsh_hadamard,
)
from tests.contracts.families import Sample


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _wrapper(**options: object) -> IntrinsicWrapper:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return IntrinsicWrapper(model, 7, generator=_rng(), **options)


CONTRACT = {
    "IntrinsicWrapper": lambda: Sample(_wrapper(structure_aware=True), (_random(5, 4, dtype=torch.float32),)),
    "FastfoodProjection": lambda: Sample(FastfoodProjection(5, 11, generator=_rng()), (torch.arange(5.0),)),
    "DenseProjection": lambda: Sample(DenseProjection(5, 11, generator=_rng()), (torch.arange(5.0),)),
}


class TestWalshHadamard:
    @pytest.mark.parametrize("n", [1, 2, 8, 16, 64, 512])
    def test_against_scipy(self, n: int) -> None:
        x = _random(3, n, 2).mT  # not contiguous
        np.testing.assert_allclose(walsh_hadamard(x), x.numpy() @ hadamard(n), atol=1e-10)

    def test_is_its_own_inverse_but_for_n(self) -> None:
        x = _random(2, 4096)
        torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)) / 4096, x)

    def test_gradient(self) -> None:
        assert torch.autograd.gradcheck(walsh_hadamard, _random(2, 32).requires_grad_())

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("n", [0, 3, 24])
    def test_bad_input(self, n: int) -> None:
        with pytest.raises(ValueError, match="x: expected a power of two"):
            walsh_hadamard(torch.ones(2, n))


class TestFastfood:
    @pytest.mark.parametrize(("dim", "out_dim"), [(5, 16), (3, 13), (12, 9), (1, 1)])
    def test_is_the_explicit_product(self, dim: int, out_dim: int) -> None:
        projection = FastfoodProjection(dim, out_dim, generator=_rng())
        n = len(projection.signs)
        assert n // 2 < out_dim <= n
        assert set(projection.signs.tolist()) <= {-1.0, 1.0}
        assert sorted(projection.permutation.tolist()) == list(range(n))
        h = hadamard(n).astype(np.float64)
        g, b = (np.diag(x.double().numpy()) for x in (projection.gaussian, projection.signs))
        pi = np.eye(n)[projection.permutation.numpy()]
        matrix = (h @ g @ pi @ h @ b)[:out_dim, :dim] / (np.linalg.norm(np.diag(g)) * n**0.5)
        v = _random(dim)
        np.testing.assert_allclose(projection(v), matrix @ v.numpy(), atol=1e-10)
        # half precision is that of what goes in and what comes out only
        half = v.bfloat16()
        assert torch.equal(projection(half), projection(half.float()).bfloat16())

    def test_keeps_the_norm(self) -> None:
        dim, out_dim, draws = 20, 100, 400
        v = _random(dim)
        squares = [float(FastfoodProjection(dim, out_dim, generator=_rng(s))(v).square().sum()) for s in range(draws)]
        # deviation 1: the cut from 128 to 100 entries leaves that part of the squared norm
        error = np.std(squares) / draws**0.5
        assert abs(np.mean(squares) - 100 / 128 * float(v.square().sum())) < 4 * error
        dense = [float(DenseProjection(dim, out_dim, generator=_rng(s))(v).square().sum()) for s in range(draws)]
        # a chi-squared variable with out_dim degrees of freedom, over out_dim
        assert abs(np.mean(dense) / float(v.square().sum()) - 1) < 4 * (2 / out_dim / draws) ** 0.5

    def test_dense_is_its_matrix(self) -> None:
        projection = DenseProjection(3, 7, generator=_rng())
        v = _random(3)
        np.testing.assert_allclose(projection(v), projection.matrix.double().numpy() @ v.numpy(), rtol=1e-12)

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        for projection in (FastfoodProjection, DenseProjection):
            with pytest.raises(ValueError, match="dim: expected at least 1"):
                projection(0, 5)
            with pytest.raises(ValueError, match="out_dim: expected at least 1"):
                projection(1, 0)
        with pytest.raises(ValueError, match="dim: expected at most 16 for out_dim 9, got 17"):
            FastfoodProjection(17, 9)
        for d, out_dim in ((5, 4), (4, 5), (4, 0)):
            with pytest.raises(ValueError, match=f"out_dim: expected v and out_dim within 1 and 4, got {d} and"):
                fastfood(torch.ones(d), torch.ones(4), torch.arange(4), torch.ones(4), out_dim)


class TestWrapper:
    @pytest.mark.parametrize("structure_aware", [False, True])
    def test_starts_as_the_model_and_trains_d_numbers(self, structure_aware: bool) -> None:
        wrapper, x = _wrapper(structure_aware=structure_aware), _random(5, 4, dtype=torch.float32)
        assert torch.equal(wrapper(x), wrapper.model(x))
        trained = [p for p in wrapper.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == 7
        wrapper(x).square().sum().backward()
        assert wrapper.theta.grad.abs().min() > 0

    def test_gradient_of_theta_and_scales(self) -> None:
        wrapper, x = _wrapper(structure_aware=True).double(), _random(5, 4)
        with torch.no_grad():
            wrapper.theta.copy_(_random(3))
            wrapper.scales.copy_(_random(4, seed=1))

        def run(theta: Tensor, scales: Tensor) -> Tensor:
            return torch.func.functional_call(wrapper, {"theta": theta, "scales": scales}, (x,))

        assert torch.autograd.gradcheck(run, (wrapper.theta, wrapper.scales))

    def test_moves_every_tensor_by_its_part_times_its_scale(self) -> None:
        wrapper = _wrapper(structure_aware=True)
        with torch.no_grad():
            wrapper.theta.copy_(torch.tensor([0.5, -2.0, 1.0]))
            wrapper.scales.copy_(torch.tensor([2.0, 0.0, -1.0, 3.0]))
        parts = wrapper.projection(wrapper.theta).split([12, 3, 6, 2])
        moved = wrapper.weights()
        start = dict(wrapper.model.named_parameters())
        assert list(moved) == list(start)
        for (name, weight), part, scale in zip(moved.items(), parts, (2.0, 0.0, -1.0, 3.0), strict=True):
            torch.testing.assert_close((weight - start[name]).flatten(), scale * part)

    def test_reduces_to_full_fine_tuning(self) -> None:
        def identity(dim: int, out_dim: int, generator: object) -> nn.Module:
            assert dim == out_dim
            return nn.Identity()

        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        wrapper = IntrinsicWrapper(copy.deepcopy(model), 23, projection=identity).double()
        x = _random(5, 4)
        optimisers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, wrapper)]
        for _ in range(3):
            for m, optimiser in zip((model, wrapper), optimisers, strict=True):
                optimiser.zero_grad()
                m(x).square().sum().backward()
                optimiser.step()
        for name, weight in wrapper.weights().items():
            torch.testing.assert_close(weight, model.get_parameter(name))

    def test_half_precision_model_keeps_float32_directions(self) -> None:
        wrapper = IntrinsicWrapper(nn.Linear(4, 3).bfloat16(), 5, generator=_rng())
        with torch.no_grad():
            wrapper.theta.fill_(1.0)
        assert wrapper(torch.ones(2, 4).bfloat16()).dtype == torch.bfloat16
        assert wrapper.theta.dtype == torch.float32

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="dim: expected more than the 2 scales of the model's tensors, got 2"):
            IntrinsicWrapper(nn.Linear(4, 3), 2, structure_aware=True)
        with pytest.raises(ValueError, match="dim: expected at least 1"):
            IntrinsicWrapper(nn.Linear(4, 3), 0)
        with pytest.raises(ValueError, match="model: expected floating-point parameters, found none in Tanh"):
            IntrinsicWrapper(nn.Tanh(), 2)


class TestIntrinsicDimension:
    @pytest.mark.parametrize("projection", [FastfoodProjection, DenseProjection])
    def test_of_ten_constraints_is_ten(self, projection: type[nn.Module]) -> None:
        # Li et al., section 2: 1000 weights in 10 groups, each of which has to sum to a number of its own
        targets, tried = torch.arange(1.0, 11.0, dtype=torch.float64), []

        def train(dim: int) -> float:
            tried.append(dim)
            directions = projection(dim, 1000, generator=_rng(dim))
            sums = torch.stack([directions(row).view(10, 100).sum(1) for row in torch.eye(dim, dtype=torch.float64)], 1)
            theta = torch.linalg.lstsq(sums, targets).solution
            return 1 - float((sums @ theta - targets).square().sum() / targets.square().sum())

        assert intrinsic_dimension(train, range(1, 30), 1.0, 1.0) == 10
        assert tried == list(range(1, 11))

    def test_threshold(self) -> None:
        assert intrinsic_dimension(lambda d: d / 100, range(100), 0.5) == 45
        assert intrinsic_dimension(lambda d: d / 100, range(100), 0.5, 0.5) == 25
        assert intrinsic_dimension(lambda d: d / 100, range(40), 0.5) is None
        assert intrinsic_dimension(lambda d: 0.1 * 3, [1], 1.0, 0.3) == 1
        with pytest.raises(ValueError, match="full_score: expected more than 0"):
            intrinsic_dimension(lambda d: 1.0, [1], 0.0)
        with pytest.raises(ValueError, match="fraction: expected more than 0"):
            intrinsic_dimension(lambda d: 1.0, [1], 1.0, 0.0)
