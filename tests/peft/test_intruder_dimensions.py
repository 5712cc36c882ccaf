import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from scipy import linalg, stats
from torch import Tensor, nn

from mlreviews.peft.intruder_dimensions import (
    count_intruders,
    effective_update_rank,
    intruder_dimensions,
    low_rank_update,
    mitigate_intruders,
    singular_similarity,
)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _planted(rows: int, columns: int, directions: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A tall W_0, W_0 with large additions outside its column space, and the added directions u, v."""
    w0 = _random(rows, columns, seed=seed)
    basis = torch.from_numpy(linalg.null_space(w0.T.numpy()))
    u = basis[:, :directions]
    v = torch.linalg.qr(_random(columns, directions, seed=seed + 1)).Q
    return w0, w0 + (u * torch.tensor([90.0, 60.0, 40.0], dtype=torch.float64)[:directions]) @ v.T, u, v


class TestIntruders:
    def test_planted_directions_are_found_in_front(self) -> None:
        for directions in (1, 3):
            w0, w1, u, _ = _planted(14, 5, directions)
            assert intruder_dimensions(w0, w1).tolist() == list(range(directions))
            leading = torch.linalg.svd(w1, full_matrices=False).U[:, :directions]
            assert ((leading * u).sum(0).abs() > 0.98).all()

    def test_none_without_a_change(self) -> None:
        w0 = _random(9, 6)
        for w1 in (w0, 3.5 * w0, -w0):
            assert intruder_dimensions(w0, w1, eps=1 - 1e-9).numel() == 0

    def test_similarity_against_scipy(self) -> None:
        for shape in ((9, 4), (4, 9)):
            w0, w1 = _random(*shape), _random(*shape, seed=1)
            u0, u1 = (linalg.svd(w.numpy(), full_matrices=False)[0] for w in (w0, w1))
            np.testing.assert_allclose(singular_similarity(w0, w1), np.abs(u1.T @ u0), atol=1e-10)

    def test_monotone_in_eps_and_top_k(self) -> None:
        w0, w1 = _random(40, 30), _random(40, 30, seed=1)
        counts = [[len(intruder_dimensions(w0, w1, k, e)) for e in (0.0, 0.3, 0.4, 0.6, 1.0)] for k in (1, 5, 12, 50)]
        assert (np.diff(counts, axis=0) >= 0).all()
        assert (np.diff(counts, axis=1) >= 0).all()
        assert [row[0] for row in counts] == [0] * 4
        assert [row[-1] for row in counts] == [1, 5, 12, 30]
        assert 0 < counts[2][2] < 12
        assert len(intruder_dimensions(w0, w1, eps=1.0)) == 10

    def test_counts_of_a_model(self) -> None:
        w0, w1, _, _ = _planted(14, 5, 2)
        before = {"a": w0, "b": w0, "bias": w0[0], "ids": torch.ones(3, 4, dtype=torch.int64)}
        assert count_intruders(before, before | {"a": w1, "bias": w1[0]}) == {"a": 2, "b": 0}
        assert count_intruders(before, {"a": w1}, top_k=1) == {"a": 1}
        assert count_intruders(before, {"a": w1}, eps=0.0) == {"a": 0}


class TestMitigation:
    def test_reduces_to_plain_fine_tuning(self) -> None:
        w0, w1, _, _ = _planted(14, 5, 2)
        assert torch.equal(mitigate_intruders(w0, w1, scale=1.0), w1)

    def test_scales_the_intruders_and_nothing_else(self) -> None:
        w0, w1, _, _ = _planted(14, 5, 2)
        u, s, vh = torch.linalg.svd(w1, full_matrices=False)
        for scale in (0.0, 0.6):
            found = u.T @ mitigate_intruders(w0, w1, scale) @ vh.T
            torch.testing.assert_close(found, torch.diag(s * torch.tensor([scale, scale, 1, 1, 1])))
        only_one = u.T @ mitigate_intruders(w0, w1, 0.5, top_k=1) @ vh.T
        torch.testing.assert_close(only_one, torch.diag(s * torch.tensor([0.5, 1, 1, 1, 1])))
        assert torch.equal(mitigate_intruders(w0, w1, 0.5, eps=0.0), w1)
        assert torch.equal(mitigate_intruders(w0, w1), mitigate_intruders(w0, w1, 0.75, 10, 0.5))

    def test_factors_give_the_update_back(self) -> None:
        w0, w1, _, _ = _planted(14, 5, 3)
        b, a = low_rank_update(w0, w1, 3)
        assert (b.shape, a.shape) == ((14, 3), (3, 5))
        torch.testing.assert_close(b @ a, w1 - w0)
        torch.testing.assert_close(b.square().sum(0), a.square().sum(1))
        u, s, vh = linalg.svd((w1 - w0).numpy(), full_matrices=False)  # Eckart and Young: the truncated SVD
        b, a = low_rank_update(w0, w1, 2)
        np.testing.assert_allclose(b @ a, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-10)

    def test_is_that_of_peft(self) -> None:
        w0 = _random(20, 12, dtype=torch.float32)
        linear = nn.Linear(12, 20, bias=False)
        linear.weight.data = w0
        config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(linear), config)
        layer = model.base_model.model[0]
        layer.lora_A["default"].weight.data = _random(3, 12, seed=1, dtype=torch.float32)
        layer.lora_B["default"].weight.data = _random(20, 3, seed=2, dtype=torch.float32)
        w1 = (w0 + layer.get_delta_weight("default")).detach()
        assert len(intruder_dimensions(w0, w1, top_k=4, eps=0.65)) in (1, 2, 3)
        reduce_intruder_dimension(
            model, top_k=4, threshold_epsilon=0.65, mitigation_lambda=0.4, logging_sink=lambda *_: None
        )
        b, a = low_rank_update(w0, mitigate_intruders(w0, w1, 0.4, top_k=4, eps=0.65), 3)
        torch.testing.assert_close(b @ a, layer.get_delta_weight("intruder_reduced"), rtol=1e-4, atol=1e-4)

    def test_half_precision(self) -> None:
        w0, w1, _, _ = (w.bfloat16() for w in _planted(14, 5, 2))
        assert intruder_dimensions(w0, w1).tolist() == [0, 1]
        mitigated = mitigate_intruders(w0, w1, 0.0)
        assert mitigated.dtype == torch.bfloat16
        torch.testing.assert_close(
            mitigated.float(), mitigate_intruders(w0.float(), w1.float(), 0.0), rtol=0.01, atol=0.1
        )


class TestEffectiveRank:
    def test_known_spectra(self) -> None:
        w0 = _random(7, 5)
        assert effective_update_rank(w0, w0) == 0
        assert effective_update_rank(w0, w0 + torch.outer(w0[:, 0], w0[0])) == pytest.approx(1, abs=1e-6)
        turn = torch.linalg.qr(_random(7, 5, seed=1)).Q
        assert effective_update_rank(w0, w0 + 4 * turn) == pytest.approx(5)
        s = np.array([8.0, 3.0, 1.0, 0.5, 0.0])
        scaled = w0 + (turn * torch.from_numpy(s)) @ torch.linalg.qr(_random(5, 5, seed=2)).Q
        assert effective_update_rank(w0, scaled) == pytest.approx(np.exp(stats.entropy(s)), rel=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    w = _random(4, 3)
    for call in (singular_similarity, intruder_dimensions, mitigate_intruders, effective_update_rank):
        with pytest.raises(ValueError, match=r"after: expected shape \(4, 3\), as before has, got \(3, 4\)"):
            call(w, w.T)
        with pytest.raises(ValueError, match="before: expected finite"):
            call(w / 0, w)
    with pytest.raises(ValueError, match="after: expected finite"):
        low_rank_update(w, w / 0, 1)
    with pytest.raises(ValueError, match="top_k: expected at least 1"):
        intruder_dimensions(w, w, 0)
    with pytest.raises(ValueError, match="eps: expected a probability"):
        intruder_dimensions(w, w, eps=1.5)
    with pytest.raises(ValueError, match="scale: expected a finite"):
        mitigate_intruders(w, w, float("inf"))
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        low_rank_update(w, w, 0)
    with pytest.raises(ValueError, match=r"rank: expected at most 3 for shape \(4, 3\), got 4"):
        low_rank_update(w, w, 4)
    with pytest.raises(ValueError, match="before: expected the matrices of after, 'b' is missing"):
        count_intruders({"a": w}, {"a": w, "b": w})
