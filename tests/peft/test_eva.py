import copy
import inspect

import numpy as np
import peft
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from mlreviews.common.adapter import trainable_parameters
from mlreviews.peft.eva import IncrementalSVD, allocate_ranks, eva_start, inject_eva
from mlreviews.peft.lora import LoRALinear


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _low_rank(rows: int, dim: int, rank: int, seed: int = 0) -> Tensor:
    """Rows of double precision in an affine subspace, far from the origin, with decaying variances."""
    scales = 2.0 ** -torch.arange(rank, dtype=torch.float64)
    parts = [_random(rows, rank, seed=seed, dtype=torch.float64) * scales, _random(rank, dim, seed=50).double()]
    return parts[0] @ parts[1] + 3


class Branches(nn.Module):
    """Three layers with the same input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(*size, bias=False) for size in [(8, 5)] * 3 + [(5, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))


class TestIncrementalSVD:
    @pytest.mark.parametrize("chunks", [[40], [7, 20, 13], [5] + [1] * 35])
    def test_chunks_are_the_whole(self, chunks: list[int]) -> None:
        x = _low_rank(40, 9, 4)
        svd = IncrementalSVD(5)
        for chunk in x.split(chunks):
            svd.partial_fit(chunk)
        pca = PCA(n_components=4).fit(x.numpy())
        assert svd.seen == 40
        np.testing.assert_allclose(svd.singular_values[:4], pca.singular_values_, rtol=1e-8)
        np.testing.assert_allclose(svd.explained_variance_ratio[:4], pca.explained_variance_ratio_, rtol=1e-8)
        cosines = (svd.components[:4].numpy() * pca.components_).sum(1)
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-8)
        torch.testing.assert_close(svd.components @ svd.components.T, torch.eye(5, dtype=torch.float64))
        assert (svd.components.gather(1, svd.components.abs().argmax(1, keepdim=True)) > 0).all()

    def test_the_share_of_what_is_dropped_stays_in_the_total(self) -> None:
        x = _random(500, 6, dtype=torch.float64) * torch.tensor([5.0, 3, 1, 1, 1, 1])
        svd = IncrementalSVD(2)
        for chunk in x.split(100):
            svd.partial_fit(chunk)
        expected = PCA(n_components=2).fit(x.numpy()).explained_variance_ratio_
        np.testing.assert_allclose(svd.explained_variance_ratio, expected, rtol=1e-3)

    def test_convergence(self) -> None:
        first, second = torch.tensor([[4.0, 0, 0], [-4, 0, 0], [0, 1, 0], [0, -1, 0]]), torch.eye(3)[[2, 2]] * 5
        second[1] *= -1
        svd = IncrementalSVD(2)
        svd.partial_fit(first)
        assert svd.converged is None
        svd.partial_fit(first)
        assert svd.converged.tolist() == [True, True]
        svd.partial_fit(second)  # 50 along the third axis beside 64 along the first and 4 along the second
        assert svd.converged.tolist() == [True, False]
        turned = torch.tensor([[1.0, 0.2], [-1, -0.2]])
        for tau, converged in ((0.9, True), (0.999, False)):
            svd = IncrementalSVD(1, tau)
            svd.partial_fit(torch.tensor([[1.0, 0], [-1, 0]]))
            svd.partial_fit(turned)
            assert svd.converged.tolist() == [converged]

    def test_nothing_varies(self) -> None:
        svd = IncrementalSVD(2)
        svd.partial_fit(torch.ones(3, 4))
        assert svd.explained_variance_ratio.tolist() == [0, 0]

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="components: expected at least 1"):
            IncrementalSVD(0)
        for tau in (-1.0, 1.5):
            with pytest.raises(ValueError, match="tau: expected"):
                IncrementalSVD(2, tau)
        svd = IncrementalSVD(3)
        with pytest.raises(ValueError, match=r"x: expected at least 3 columns, got shape \(4, 2\)"):
            svd.partial_fit(torch.ones(4, 2))
        with pytest.raises(ValueError, match="x: expected at least 3 rows in the first batch, got 2"):
            svd.partial_fit(torch.ones(2, 4))
        with pytest.raises(ValueError, match="x: expected finite"):
            svd.partial_fit(torch.full((4, 4), torch.nan))
        svd.partial_fit(_random(4, 4))
        with pytest.raises(ValueError, match=r"x: expected 4 columns, got shape \(4, 5\)"):
            svd.partial_fit(torch.ones(4, 5))


class TestAllocation:
    def test_by_hand(self) -> None:
        ratios = {"a": torch.tensor([0.9, 0.05, 0.01]), "b": torch.tensor([0.4, 0.3, 0.2]), "c": torch.tensor([0.1])}
        assert allocate_ranks(ratios, 1) == {"a": 1, "b": 0, "c": 0}
        assert allocate_ranks(ratios, 5) == {"a": 1, "b": 3, "c": 1}
        assert allocate_ranks(ratios, 7) == {"a": 3, "b": 3, "c": 1}
        assert allocate_ranks({"b": ratios["b"], "a": ratios["b"]}, 3) == {"b": 1, "a": 2}  # "a" before "b" in a tie

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="budget: expected at most the 2 components"):
            allocate_ranks({"a": torch.ones(2)}, 3)
        with pytest.raises(ValueError, match="budget: expected at least 1"):
            allocate_ranks({}, 0)


class TestStart:
    def _toy(self) -> tuple[nn.Sequential, Tensor]:
        """The input of the first layer has rank 1, that of the second a flat spectrum."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3))
        model.insert(2, Noise())
        return model, torch.outer(_random(64), _random(6, seed=1))

    def test_budget_goes_to_the_flat_spectrum(self) -> None:
        model, x = self._toy()
        start = eva_start(model, [x] * 3, ["0", "3"], 3)
        assert start.rank == 3
        assert {path: len(a) for path, a in start.rows.items()} == {"0": 1, "3": 5}
        cosine = start.rows["0"][0] @ nn.functional.normalize(_random(6, seed=1), dim=0)
        assert abs(cosine) > 1 - 1e-5
        assert model.training
        assert not model[0]._forward_pre_hooks
        uniform = eva_start(model, [x] * 3, ["0", "3"], 3, rho=1.0)
        assert [len(a) for a in uniform.rows.values()] == [3, 3]
        for a in uniform.rows.values():
            torch.testing.assert_close(a @ a.T, torch.eye(3))

    def test_components_are_those_of_each_layers_input(self) -> None:
        model, x = Branches(), _random(3, 40, 8) * torch.arange(1, 9)
        inside = torch.tanh(model.q(x)) * model.k(x) + model.v(x)
        start = eva_start(model, [x] * 4, "[qkvo]", 2, rho=2.0)
        assert start.converged
        assert start.batches == 2
        assert sum(len(a) for a in start.rows.values()) == 8
        for path, seen in (("q", x), ("k", x), ("v", x), ("o", inside)):
            rank = len(start.rows[path])
            expected = PCA(n_components=rank).fit(seen.detach().flatten(0, 1).numpy()).components_
            np.testing.assert_allclose(np.abs((start.rows[path].numpy() * expected).sum(1)), 1, atol=1e-4)

    def test_ranks_are_those_of_peft(self) -> None:
        torch.manual_seed(1)
        model, x = Branches(), _random(3, 40, 8) * 2.0 ** torch.arange(-4, 4)
        start = eva_start(copy.deepcopy(model), [x] * 4, "[qvo]", 3, rho=1.5)
        config = peft.LoraConfig(
            r=3, target_modules=["q", "v", "o"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.5)
        )
        found = peft.get_eva_state_dict(
            model,
            [x],
            config,
            forward_fn=lambda m, batch: m(batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        # q and v get the same input, so which of them gets the greater rank is chance
        theirs, ours = ({path: len(a) for path, a in rows.items()} for rows in (found, start.rows))
        assert theirs["o"] == ours["o"] != 3
        assert theirs["q"] + theirs["v"] == ours["q"] + ours["v"]
        cosines = (start.rows["o"] * found["o"].float()).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(len(cosines)), atol=1e-3, rtol=0)

    def test_whitening_masks_and_other_ways_to_run(self) -> None:
        model, x = nn.Sequential(nn.Linear(4, 2)), _random(2, 9, 4) * torch.arange(1, 5)
        padded = torch.cat([x, torch.full((2, 3, 4), 99.0)], 1)
        plain = eva_start(model, [x] * 2, "0", 2)
        kept = eva_start(
            model,
            [{"x": padded}] * 2,
            "0",
            2,
            run=lambda m, batch: m(batch["x"]),
            keep=lambda batch: batch["x"][..., 0] != 99,
        )
        torch.testing.assert_close(kept.rows["0"], plain.rows["0"])
        white = eva_start(model, [x], "0", 2, whiten=True)
        assert not white.converged
        one = eva_start(model, [x], "0", 2)
        sigma = PCA(n_components=2).fit(x.flatten(0, 1).numpy()).singular_values_
        np.testing.assert_allclose(white.rows["0"].numpy() * sigma[:, None] ** 0.5, one.rows["0"], rtol=1e-4, atol=1e-5)

    def test_defaults(self) -> None:
        defaults = {name: p.default for name, p in inspect.signature(eva_start).parameters.items()}
        assert (defaults["rank"], defaults["rho"], defaults["tau"]) == (16, 2, 0.99)
        assert IncrementalSVD(1).tau == 0.99

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        model, x = nn.Sequential(nn.Linear(4, 2)), _random(9, 4)
        with pytest.raises(ValueError, match="batches: expected at least one"):
            eva_start(model, [], "0", 2)
        with pytest.raises(ValueError, match="rank: expected at least 1"):
            eva_start(model, [x], "0", 0)
        with pytest.raises(ValueError, match="rho: expected at least 1"):
            eva_start(model, [x], "0", 2, rho=0.5)
        with pytest.raises(ValueError, match="x: expected at least 6 columns"):
            eva_start(model, [x], "0", 3)
        assert not model[0]._forward_pre_hooks
        assert model.training


class Noise(nn.Module):
    """Throws its input away: what follows sees a flat spectrum."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=_rng(7))


class TestInjection:
    def test_changes_nothing_before_training(self) -> None:
        model, x = Branches(), _random(3, 40, 8) * torch.arange(1, 9)
        before = model(x)
        start = eva_start(model, [x] * 2, "[qkvo]", 2)
        start.rows["k"] = start.rows["k"][:0]
        torch.manual_seed(5)
        state = torch.get_rng_state()
        assert inject_eva(model, start, alpha=3.0) == ["q", "v", "o"]
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(model(x), before)
        assert type(model.k) is nn.Linear
        assert {layer.settings["default"].scaling for layer in (model.q, model.v, model.o)} == {1.5}
        assert torch.equal(model.q.lora_A["default"], start.rows["q"])
        assert all("lora" in name for name in trainable_parameters(model))
        other = eva_start(Branches(), [x] * 2, "q", 2)
        fresh = Branches()
        inject_eva(fresh, other)
        assert fresh.q.settings["default"].scaling == 16 * len(other.rows["q"]) / 2 / len(other.rows["q"])

    def test_reduces_to_lora(self) -> None:
        model, x = nn.Sequential(nn.Linear(6, 4)), _random(20, 6)
        usual = nn.Sequential(LoRALinear(copy.deepcopy(model[0]), 3, 5.0))
        start = eva_start(model, [x] * 2, "0", 3, rho=1.0)
        inject_eva(model, start, 5.0)
        usual[0].lora_A["default"].data = start.rows["0"].clone()
        for m in (model, usual):
            optimiser = torch.optim.SGD(trainable_parameters(m).values(), 0.1)
            for _ in range(2):
                optimiser.zero_grad()
                m(x).square().sum().backward()
                optimiser.step()
        assert torch.equal(model(x), usual(x))

    def test_the_first_step_moves_outputs_further_than_a_random_start_of_equal_norm(self) -> None:
        spectrum = torch.tensor([4.0, 2, 1, 0.5, 0.25, 0.1, 0.1])
        x, y = _random(200, 7) * spectrum, _random(200, 3, seed=1)
        moved = []
        for seed in range(-1, 20):
            model = nn.Sequential(nn.Linear(7, 3))
            nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
            start = eva_start(model, [x] * 2, "0", 2, rho=1.0)
            if seed >= 0:
                a = _random(2, 7, seed=seed)
                start.rows["0"] = a / a.norm() * start.rows["0"].norm()
            inject_eva(model, start)
            (model(x) * y).sum().backward()
            model[0].lora_B["default"].data -= model[0].lora_B["default"].grad
            moved.append(float((x @ model[0].delta_weight().detach().T).square().sum()))
        assert moved[0] > 1.5 * sum(moved[1:]) / 20
