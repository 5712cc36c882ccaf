from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from scipy.stats import entropy

from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.preference import (
    TextPosition,
    completion_logps,
    group_advantages,
    grpo_loss,
    hard_positions,
    mixed_groups,
    pair_logps,
    prediction_of,
    prefix_match_reward,
    rloo_loss,
    rollout,
    rpt_loss,
    text_position,
    train_predictions,
)
from tests.contracts.families import Sample

POSITIONS = [text_position(["ab", "c", "de"], 1), text_position(["ab", "de", "c", "x"], 1)]
# Whoever thinks t mostly predicts c, whoever thinks u more often d.
TEXTS = ["t|c\n", "t|c\n", "t|c\n", "t|d\n", "u|d\n", "u|d\n", "u|c\n", "u\n"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def policy() -> TinyLM:
    made = TinyLM(TinyLMConfig(d_model=16, layers=1, heads=2, hidden=16), generator=seeded())
    optimiser = torch.optim.Adam(made.parameters(), lr=5e-2)
    for _ in range(40):
        loss = -torch.stack(pair_logps(made, ["ab"] * 4, TEXTS[::2], TEXTS[1::2])).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return made


def logs(generator: torch.Generator) -> list[list[float]]:
    model = TinyLM(TinyLMConfig(d_model=8, layers=1, heads=1, hidden=8), generator=seeded(1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    every = [TextPosition("ab", bytes([value]), (1,)) for value in range(256)]
    run = train_predictions(
        model, optimiser, every, steps=3, batch=40, max_new_tokens=1, generator=generator, stop="\0"
    )  # fmt: skip
    return [list(log.values()) for log in run] + [model.lm_head.weight.flatten().tolist()]


CONTRACT = {"train_predictions": lambda: Sample(logs)}


class TestReward:
    @pytest.mark.parametrize(
        ("prediction", "reward"),
        [
            (b" the", 1),  # the next token
            (b" the cat", 1),  # two tokens
            (b" the cats", 1),  # all there is
            (b" th", 0),  # cut within a token
            (b" the ca", 0),
            (b"", 0),
            (b" thx", 0),
            (b" tha cat", 0),
            (b"the", 0),
            (b" the cats.", 0),  # beyond the end
            (b" the dog", 0),  # overshoots
        ],
    )
    def test_prefixes(self, prediction: bytes, reward: float) -> None:
        context, continuation, boundaries = text_position(["I", " saw", " the", " cat", "s"], 2)
        assert (context, continuation, boundaries) == ("I saw", b" the cats", (4, 8, 9))
        assert prefix_match_reward(prediction, continuation, boundaries) == reward

    def test_lengths_are_bytes(self) -> None:
        position = text_position(["x", "ä", "€b"], 1)
        assert position == TextPosition("x", "ä€b".encode(), (2, 6))
        assert prefix_match_reward("ä".encode(), *position[1:]) == 1
        assert prefix_match_reward("ä".encode()[:1], *position[1:]) == 0
        assert prefix_match_reward(b"", b"ab", (0, 1)) == 0

    def test_what_is_predicted(self) -> None:
        assert prediction_of(b"maybe|no, rather|yes\n", marker=b"|", stop=b"\n") == b"yes"
        assert prediction_of(b"yes|\n", marker=b"|", stop=b"\n") == b""
        assert prediction_of(b"yes\n", marker=b"|", stop=b"\n") == b""
        assert prediction_of(b"a|b\n\n") == b"a|b\n\n"
        assert prediction_of(b"a\n\n", stop=b"\n") == b"a\n"
        with pytest.raises(ValueError, match="marker: expected"):
            prediction_of(b"a", marker=b"")

    def test_bad_places(self) -> None:
        for place in (0, 2, -1):
            with pytest.raises(ValueError, match="place: expected 1 to 1"):
                text_position(["a", "b"], place)
        with pytest.raises(ValueError, match="tokens: expected none"):
            text_position(["a", "", "b"], 1)


class TestFilter:
    def test_entropy_of_the_most_likely(self) -> None:
        logits = 2 * torch.randn(3, 5, 20, generator=seeded(), dtype=torch.float64)
        for top_k in (1, 4, 16, 50):
            p = logits.softmax(-1).sort(-1, descending=True).values[..., :top_k]
            wanted = torch.tensor(entropy(p.numpy(), axis=-1))  # scipy normalises
            for threshold in (0.4, 1.0, 1.4):
                found = hard_positions(logits, threshold=threshold, top_k=top_k)
                assert torch.equal(found, wanted >= threshold)
            assert hard_positions(logits, threshold=0.0, top_k=top_k).all()
        flat = torch.zeros(20)  # log 16 = 2.773 by default, log 17 = 2.833
        assert hard_positions(flat, threshold=2.77)
        assert not hard_positions(flat, threshold=2.78)

    def test_one_certain_token(self) -> None:
        sure = torch.tensor([0.0, 1e4, 0.0])
        assert hard_positions(sure, threshold=0.0)
        assert not hard_positions(sure, threshold=1e-6)
        assert hard_positions(torch.zeros(2, 9), threshold=2.19).all()  # log 9 = 2.197

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        x = torch.zeros(2, 3)
        with pytest.raises(ValueError, match="logits: expected finite"):
            hard_positions(x / 0, threshold=1.0)
        with pytest.raises(ValueError, match="threshold: expected at least 0"):
            hard_positions(x, threshold=-1.0)
        with pytest.raises(ValueError, match="top_k: expected at least 1"):
            hard_positions(x, threshold=1.0, top_k=0)
        with pytest.raises(ValueError, match="group_size: expected a divisor"):
            mixed_groups(torch.zeros(4), 3)


class TestLoss:
    def test_the_expected_gradient_reduces_to_that_of_expected_accuracy(self) -> None:
        logits = torch.tensor([0.3, -0.9, 1.1], dtype=torch.float64, requires_grad=True)
        size, right = 3, 1
        p = logits.softmax(0)
        (accuracy,) = torch.autograd.grad(p[right], logits, retain_graph=True)
        expected = torch.zeros_like(logits)
        for group in itertools.product(range(3), repeat=size):
            drawn = torch.tensor(group)
            logp = logits.log_softmax(0)[drawn][:, None]
            rewards = (drawn == right).double()
            loss = rpt_loss(logp, logp.detach(), torch.ones(size, 1) > 0, rewards, size, normalise_std=False).loss
            (gradient,) = torch.autograd.grad(loss, logits)
            expected += p.detach()[drawn].prod() * gradient
        torch.testing.assert_close(expected, -(size - 1) / size * accuracy)

    def test_one_token_reduces_to_rloo(self) -> None:
        logp = torch.randn(8, 1, generator=seeded(), dtype=torch.float64).requires_grad_()
        rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1], dtype=torch.float64)
        loss = rpt_loss(logp, logp.detach(), torch.ones(8, 1) > 0, rewards, 4, normalise_std=False).loss
        (found,) = torch.autograd.grad(loss, logp)
        (wanted,) = torch.autograd.grad(rloo_loss(logp[:, 0], rewards, 4).loss, logp)
        torch.testing.assert_close(found * 4 / 3, wanted)

    def test_equal_rewards_teach_nothing(self) -> None:
        logp = torch.randn(6, 5, generator=seeded()).requires_grad_()
        mask = torch.rand(6, 5, generator=seeded(1)) < 0.7
        for dynamic in (False, True):
            rewards = torch.tensor([1.0, 1, 1, 0, 0, 0])
            found = rpt_loss(logp, logp.detach(), mask, rewards, 3, dynamic_sampling=dynamic)
            (gradient,) = torch.autograd.grad(found.loss, logp)
            assert found.loss == 0
            assert not gradient.any()
            assert found.stats["accuracy"] == 0.5
            assert found.stats["mixed"] == 0
        assert mixed_groups(torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 1]), 2).tolist() == [False, True, False, True]

    def test_dynamic_sampling_is_the_loss_of_the_mixed_groups(self) -> None:
        logp = torch.randn(9, 4, generator=seeded())
        old = logp + 0.1 * torch.randn(9, 4, generator=seeded(1))
        mask = torch.arange(4) < torch.tensor([1, 2, 3, 4, 4, 3, 2, 1, 1])[:, None]
        rewards = torch.tensor([0.0, 0, 0, 1, 0, 0, 1, 1, 0])
        found = rpt_loss(logp, old, mask, rewards, 3, dynamic_sampling=True)
        rest = slice(3, None)
        wanted = rpt_loss(logp[rest], old[rest], mask[rest], rewards[rest], 3)
        assert wanted.loss.abs() > 1e-3
        torch.testing.assert_close(found.loss, wanted.loss)
        plain = rpt_loss(logp, old, mask, rewards, 3)
        torch.testing.assert_close(plain.loss, wanted.loss * 2 / 3)
        torch.testing.assert_close(found.stats["mixed"], torch.tensor(2 / 3))
        torch.testing.assert_close(found.stats["accuracy"], torch.tensor(1 / 3))
        assert "clip_fraction" in found.stats

    def test_thoughts_count_like_predictions_and_advantages_are_normalised(self) -> None:
        logp = torch.zeros(2, 3, requires_grad=True)
        mask = torch.tensor([[True, True, False], [True, False, False]])
        loss = rpt_loss(logp, logp.detach(), mask, torch.tensor([1.0, 0.0]), 2).loss
        (gradient,) = torch.autograd.grad(loss, logp)
        assert gradient[0, 0] == gradient[0, 1] < 0 == gradient[0, 2]
        # An advantage of 1 / sqrt(2) by the sample's standard deviation; answers are averaged.
        torch.testing.assert_close(gradient[1, 0], torch.tensor(0.5 * 0.5**0.5), atol=1e-3, rtol=0)


class TestTraining:
    def test_a_step_is_grpo_with_this_reward(self, policy: TinyLM) -> None:
        trained, by_hand = copy.deepcopy(policy), copy.deepcopy(policy)
        (log,) = train_predictions(
            trained, torch.optim.SGD(trained.parameters(), lr=0.1), POSITIONS, steps=1, batch=5, max_new_tokens=4,
            generator=seeded(2), marker="|", group_size=4,
        )  # fmt: skip
        generator = seeded(2)
        places = torch.randint(2, (5,), generator=generator).tolist()
        assert set(places) == {0, 1}
        drawn = rollout(
            by_hand, ["ab"] * 5, lambda *_: 0.0, group_size=4, max_new_tokens=4, temperature=0.8, generator=generator
        )
        goes_on = [["c", "cde"], ["de", "dec", "decx"]]
        texts = [answer.removesuffix("\n").rpartition("|") for answer in drawn.answers]
        rewards = torch.tensor([float(bool(t[1]) and t[2] in goes_on[places[i // 4]]) for i, t in enumerate(texts)])
        assert log["accuracy"] == float(rewards.mean())
        assert 0 < log["accuracy"] < 1
        optimiser = torch.optim.SGD(by_hand.parameters(), lr=0.1)
        advantages = group_advantages(rewards, 4)
        grpo_loss(completion_logps(by_hand, drawn), drawn.logp_old, drawn.labels_mask, advantages).loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimiser.step()
        for one, other in zip(trained.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)

    def test_predictions_get_right_and_dynamic_sampling_begins_when_asked(
        self, policy: TinyLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlreviews.preference import rpt

        seen = []

        def spy(*args, dynamic_sampling, **options):
            seen.append(dynamic_sampling)
            return rpt_loss(*args, dynamic_sampling=dynamic_sampling, **options)

        monkeypatch.setattr(rpt, "rpt_loss", spy)
        trained, place = copy.deepcopy(policy), text_position(["ab", "d"], 1)
        run = train_predictions(
            trained, torch.optim.Adam(trained.parameters(), lr=5e-3), [place], steps=12, batch=8,
            max_new_tokens=5, generator=seeded(), marker="|", dynamic_from=9,
        )  # fmt: skip
        accuracies = [log["accuracy"] for log in run]
        assert seen == [False] * 8 + [True] * 4
        assert all((64 * accuracy).is_integer() for accuracy in accuracies)  # eight outputs to a position
        # Five deviations of the difference of two shares of 64 outputs.
        assert accuracies[-1] - accuracies[0] > 5 * (2 * 0.25 / 64) ** 0.5

    def test_defaults_are_the_papers(self) -> None:
        given = inspect.signature(train_predictions).parameters
        assert [given[name].default for name in ("group_size", "temperature", "dynamic_from")] == [8, 0.8, 500]

    def test_bad_input(self, policy: TinyLM) -> None:
        optimiser = torch.optim.SGD(policy.parameters())
        for name, value in {"positions": [], "batch": 0, "dynamic_from": 0}.items():
            options = {"positions": POSITIONS, "batch": 1, "dynamic_from": 1} | {name: value}
            run = train_predictions(policy, optimiser, steps=1, max_new_tokens=1, generator=seeded(), **options)
            with pytest.raises(ValueError, match=f"{name}: expected at least"):
                next(run)
