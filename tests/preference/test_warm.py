import pytest
import torch
from torch import Tensor, nn

from mlreviews.preference.regularised_rm_ensembles import mean_reward
from mlreviews.preference.warm import average_weights, lmc_curve


def _state(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 2, generator=generator, dtype=torch.float64).to(dtype),
        "count": torch.tensor(10 * seed),
    }


class TestAverage:
    def test_by_hand(self) -> None:
        a, b, c = (_state(seed) for seed in (1, 2, 3))
        found = average_weights([a, b, c])
        torch.testing.assert_close(found["w"], (a["w"] + b["w"] + c["w"]) / 3)
        assert found["count"] == 30
        torch.testing.assert_close(average_weights([a, b], [3, 1])["w"], 0.75 * a["w"] + 0.25 * b["w"])
        torch.testing.assert_close(average_weights([a, b], [1, 0])["w"], a["w"])

    def test_copies_give_themselves_back_and_share_nothing(self) -> None:
        a = _state(1)
        found = average_weights([a, a, a])
        torch.testing.assert_close(found["w"], a["w"])
        found["w"].zero_(), found["count"].zero_()
        assert a["w"].abs().min() > 0
        assert torch.equal(average_weights([a])["w"], a["w"])
        assert not average_weights([dict(nn.Linear(3, 2).named_parameters())] * 2)["weight"].requires_grad
        assert a["count"] == 10

    def test_half_precision_is_rounded_once(self) -> None:
        members = [_state(seed, torch.bfloat16) for seed in range(8)]
        found = average_weights(members)["w"]
        assert found.dtype == torch.bfloat16
        exact = torch.stack([m["w"].double() for m in members]).mean(0)
        assert torch.equal(found, exact.float().bfloat16())

    def test_loads_into_a_model_with_batch_normalisation(self) -> None:
        models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
        for steps, model in enumerate(models, 2):
            for _ in range(steps):
                model(torch.randn(5, 3))
        found = average_weights([model.state_dict() for model in models])
        models[0].load_state_dict(found)
        assert models[0][1].num_batches_tracked == 3

    def test_reduces_to_the_mean_of_rewards_where_models_are_linear(self) -> None:
        heads, features = [nn.Linear(6, 1).double() for _ in range(4)], torch.randn(9, 6).double()
        mean = nn.Linear(6, 1).double()
        mean.load_state_dict(average_weights([head.state_dict() for head in heads]))
        rewards = torch.stack([head(features)[:, 0] for head in heads])
        torch.testing.assert_close(mean(features)[:, 0], mean_reward(rewards))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        a, b = _state(1), _state(2)
        with pytest.raises(ValueError, match="members: expected a state dict"):
            average_weights([])
        with pytest.raises(ValueError, match="members: expected tensors of the same names"):
            average_weights([a, {"w": b["w"]}])
        with pytest.raises(ValueError, match="members: expected tensors of the same names"):
            average_weights([a, b | {"w": b["w"][:2]}])
        with pytest.raises(ValueError, match="weights: expected one for each of 2"):
            average_weights([a, b], [1.0])
        for weights in ([0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]):
            with pytest.raises(ValueError, match="weights: expected numbers of at least 0"):
                average_weights([a, b], weights)
        with pytest.raises(ValueError, match="points: expected at least 2"):
            lmc_curve(a, b, lambda _: 0.0, points=1)


class TestCurve:
    def test_a_score_that_bends(self) -> None:
        ends = {"x": torch.tensor(0.0)}, {"x": torch.tensor(2.0)}
        up = lmc_curve(*ends, lambda state: 1 - float(state["x"] - 0.5) ** 2, points=5)
        assert up.places == [0, 0.25, 0.5, 0.75, 1]
        assert up.scores == pytest.approx([0.75, 1.0, 0.75, 0.0, -1.25])
        assert up.chords == pytest.approx([0.75, 0.25, -0.25, -0.75, -1.25])
        assert up.gap == 0  # at the ends
        down = lmc_curve(*ends, lambda state: float(state["x"] - 0.5) ** 2, points=5)
        assert down.gap == pytest.approx(-1.0)

    def test_eleven_points(self) -> None:
        assert len(lmc_curve(_state(1), _state(2), lambda _: 0.5).places) == 11
