import functools
import inspect
import itertools
import math

import pytest
import torch

from mlreviews.preference.ppo import clipped_surrogate
from mlreviews.preference.rloo import rloo_loss
from mlreviews.preference.spurious_rewards import (
    expected_clipped_surrogate,
    format_reward,
    incorrect_reward,
    majority_reward,
    random_reward,
    train_bandit,
    truth_reward,
)
from tests.contracts.families import Sample

ARMS = torch.tensor([[0.3, -0.2, 0.9], [1.2, 0.0, -0.5]], dtype=torch.float64)
CONTRACT = {
    "random_reward": lambda: Sample(random_reward, (torch.arange(40),)),
    "train_bandit": lambda: Sample(
        functools.partial(train_bandit, steps=3, group_size=4), (ARMS, lambda arms: (arms == 0).float())
    ),
}


class TestRewards:
    def test_by_hand(self) -> None:
        answers, gold = torch.tensor([3, 5, 5, 1, 2, 2]), torch.tensor([3, 3, 3, 1, 1, 1])
        assert truth_reward(answers, gold).tolist() == [1, 0, 0, 1, 0, 0]
        assert majority_reward(answers, 3).tolist() == [0, 1, 1, 0, 1, 1]
        assert incorrect_reward(answers, gold, 3).tolist() == [0, 1, 1, 0, 1, 1]
        assert incorrect_reward(torch.tensor([7, 7, 7, 2, 4, 2]), torch.tensor([7] * 3 + [2] * 3), 3).tolist() == [
            0, 0, 0, 0, 1, 0]  # fmt: skip
        assert incorrect_reward(torch.tensor([5, 3, 5, 2, 1, 2]), gold, 3).tolist() == [1, 0, 1, 1, 0, 1]
        assert majority_reward(torch.tensor([9, 4]), 2).tolist() == [0, 1]

    def test_right_majorities_are_the_truth(self) -> None:
        answers = torch.tensor([4, 4, 1, 4, 0, 0, 0, 2])
        gold = torch.tensor([4] * 4 + [0] * 4)
        assert torch.equal(majority_reward(answers, 4), truth_reward(answers, gold))

    def test_coin(self) -> None:
        coins = random_reward(torch.zeros(100, 200, dtype=torch.int64), 0.3, generator=torch.Generator().manual_seed(0))
        assert set(coins.unique().tolist()) == {0.0, 1.0}
        assert abs(float(coins.mean()) - 0.3) < 5 * math.sqrt(0.21 / 20_000)
        assert random_reward(torch.arange(9), 1.0).tolist() == [1.0] * 9

    def test_format(self) -> None:
        texts = [r"so \boxed{12}", r"\boxed{}", r"\boxed{ }", "boxed{3}", r"\boxed{ \frac{1}{2}} done"]
        assert format_reward(texts).tolist() == [1, 0, 0, 0, 1]

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = torch.arange(4)
        with pytest.raises(ValueError, match="gold: expected shape"):
            truth_reward(x, x[:2])
        with pytest.raises(ValueError, match="group_size: expected a divisor"):
            majority_reward(x, 3)
        with pytest.raises(ValueError, match="group_size: expected a divisor"):
            incorrect_reward(x, x, 3)
        with pytest.raises(ValueError, match="p: expected a probability"):
            random_reward(x, 1.5)


class TestExpectation:
    def test_mean_over_both_signs(self) -> None:
        ratio = torch.tensor([0.3, 0.8, 0.95, 1.0, 1.25, 1.3, 4.0], dtype=torch.float64, requires_grad=True)
        found = expected_clipped_surrogate(ratio, 0.7, 0.2, 0.3)
        up, down = (clipped_surrogate(ratio, torch.full_like(ratio, s * 0.7), 0.2, 0.3) for s in (1, -1))
        torch.testing.assert_close(found, (up + down) / 2)
        (slope,) = torch.autograd.grad(found.sum(), ratio)
        torch.testing.assert_close(slope, torch.tensor([0.35, 0, 0, 0, 0, 0, -0.35], dtype=torch.float64))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        one = torch.ones(1)
        for name in ("a", "clip_low", "clip_high"):
            with pytest.raises(ValueError, match=f"{name}: expected at least 0"):
                expected_clipped_surrogate(one, **{"a": 1.0, name: -1.0})


def _outcomes() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All arms that a group of three can draw from three, with all coins."""
    return list(itertools.product(itertools.product(range(3), repeat=3), itertools.product(range(2), repeat=3)))


def _after(
    monkeypatch: pytest.MonkeyPatch, arms: torch.Tensor, coins: torch.Tensor, **settings: object
) -> torch.Tensor:
    """Log-probabilities after a step on given arms [runs, 3] and coins."""
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: arms)
    start = ARMS[:1].expand(len(arms), 3)
    return train_bandit(start, lambda _: coins, steps=1, group_size=3, rate=0.5, **settings)[-1].log()  # type: ignore[arg-type]


class TestBandit:
    def test_one_epoch_on_coins_changes_nothing_on_average(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn, coins = (torch.tensor(x) for x in zip(*_outcomes(), strict=True))
        start = ARMS[0].log_softmax(0)
        weights = start.exp()[drawn].prod(1) / 8
        change = _after(monkeypatch, drawn, coins.double()) - start
        change = change - change.mean(1, keepdim=True)  # of the logits: they sum to a constant
        torch.testing.assert_close(weights @ change, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
        several = _after(monkeypatch, drawn, coins.double(), epochs=6) - start
        assert (weights @ (several - several.mean(1, keepdim=True))).abs().max() > 1e-4

    def test_reduces_to_rloo_in_the_first_epoch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        arms, rewards = torch.tensor([[0, 2, 2]]), torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64)
        found = _after(monkeypatch, arms, rewards, normalise_std=False)[0]
        logits = ARMS[0].clone().requires_grad_()
        loss = rloo_loss(logits.log_softmax(0)[arms[0]], rewards[0], 3).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(found, (ARMS[0] - 0.5 * gradient * 2 / 3).log_softmax(0))

    def test_a_true_reward_is_learnt_and_the_clip_holds_back(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.zeros(40, 3, dtype=torch.float64)
        history = train_bandit(logits, lambda arms: (arms == 1).float(), steps=12, generator=generator)
        assert history.shape == (13, 40, 3)
        assert torch.equal(history[0], torch.full((40, 3), 1 / 3, dtype=torch.float64))
        assert history[-1, :, 1].mean() > 0.9
        torch.testing.assert_close(history.sum(-1), torch.ones(13, 40, dtype=torch.float64))
        far, near = (
            train_bandit(logits, lambda arms: (arms == 1).float(), steps=1, epochs=20, clip=clip, generator=generator)[
                -1, :, 1
            ].mean()
            for clip in (math.inf, 0.2)
        )
        assert near < 0.5 * (1 / 3 + far)

    def test_the_policies_that_are_given_stay_as_they_are(self) -> None:
        logits = ARMS.clone().requires_grad_()
        history = train_bandit(logits, lambda arms: arms.float(), steps=2, group_size=4)
        assert not history.requires_grad
        assert torch.equal(logits, ARMS)

    def test_defaults_are_the_papers(self) -> None:
        given = inspect.signature(train_bandit).parameters
        names = ("group_size", "epochs", "rate", "clip", "normalise_std")
        assert [given[name].default for name in names] == [16, 1, 1.0, 0.2, True]
        assert inspect.signature(random_reward).parameters["p"].default == 0.5
        ratio = torch.tensor([0.5, 2.0])
        torch.testing.assert_close(expected_clipped_surrogate(ratio, 1.0), torch.tensor([-0.15, -0.4]))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        for name, value in {"steps": 0, "epochs": 0, "rate": 0.0, "clip": 0.0, "group_size": 1}.items():
            with pytest.raises(ValueError, match=f"{name}: expected"):
                train_bandit(ARMS, lambda arms: arms.float(), **{"steps": 1, name: value})  # type: ignore[arg-type]
