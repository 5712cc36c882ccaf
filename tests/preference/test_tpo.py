from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from scipy.optimize import minimize

from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.preference import (
    dpo_loss,
    elo_scores,
    length_controlled_scores,
    pair_logps,
    pairwise_judge,
    rollout,
    split_thought,
    thought_pairs,
    train_thoughts,
)
from tests.contracts.families import Sample

PROMPTS = ["ab", "cde"]
TEMPLATE = "{prompt}?"
# Either thought is as likely; the first one is mostly followed by a, the second one mostly by b.
TEXTS = ["t|a\n", "t|a\n", "t|b\n", "u|b\n", "u|b\n", "u|a\n", "v\n", "|\n"]


def taught() -> TinyLM:
    """A policy that thinks t or u, each half of the time, before it answers; sometimes it does neither."""
    policy = TinyLM(
        TinyLMConfig(vocab_size=259, d_model=16, layers=1, heads=2, hidden=16),
        generator=torch.Generator().manual_seed(0),
    )
    optimiser = torch.optim.Adam(policy.parameters(), lr=5e-2)
    asked = [f"{prompt}?" for prompt in PROMPTS for _ in TEXTS[::2]]
    for _ in range(40):
        loss = -torch.stack(pair_logps(policy, asked, TEXTS[::2] * 2, TEXTS[1::2] * 2))
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    return policy


@pytest.fixture(scope="module")
def policy() -> TinyLM:
    return taught()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def likes_a(prompt: str, responses: Sequence[str]) -> list[float]:
    return [float("a" in response) for response in responses]


def logs(generator: torch.Generator) -> list[list[float]]:
    model = TinyLM(TinyLMConfig(d_model=8, layers=1, heads=1, hidden=8), generator=seeded(1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    judge = pairwise_judge(lambda prompt, a, b: float(a > b))
    run = train_thoughts(
        model, optimiser, ["ab"], judge, iterations=2, updates=1, max_new_tokens=30, generator=generator,
        marker=" ", template="{prompt} ",
    )  # fmt: skip
    return [list(log.values()) for log in run] + [model.lm_head.weight.flatten().tolist()]


CONTRACT = {"train_thoughts": lambda: Sample(logs)}


def test_outputs_are_split_at_the_first_marker() -> None:
    assert split_thought(" I think\nso <R> yes <R> no\n") == ("I think\nso", "yes <R> no")
    assert split_thought("<R>yes") == ("", "yes")
    assert split_thought("only a thought") is None
    assert split_thought("thought <R> \n") is None
    assert split_thought("a|b", "|") == ("a", "b")
    with pytest.raises(ValueError, match="marker: expected"):
        split_thought("a", "")


class TestScores:
    def test_weights_of_score_and_length(self) -> None:
        scores, lengths = torch.tensor([[1.0, 2.0, 4.0, 5.0]]), torch.tensor([[3.0, 1.0, 4.0, 8.0]])
        plain = length_controlled_scores(scores, lengths, 0.0)
        torch.testing.assert_close(plain.mean(1), torch.zeros(1))
        torch.testing.assert_close(plain.square().mean(1), torch.ones(1))
        assert plain[0].tolist() == sorted(plain[0].tolist())
        # The difference that a length makes is rho standard deviations of the lengths (here 2.55).
        with_length = length_controlled_scores(scores, lengths, 0.3)
        change = (plain - with_length)[0]
        torch.testing.assert_close(change[3] - change[1], torch.tensor(0.3 * 7 / 6.5**0.5))
        assert int(length_controlled_scores(scores, lengths, 50.0).argmax()) == 1

    def test_groups_are_their_own(self) -> None:
        generator = seeded()
        scores, lengths = torch.randn(3, 2, 5, generator=generator), torch.rand(3, 2, 5, generator=generator)
        whole = length_controlled_scores(scores, lengths, 0.4)
        torch.testing.assert_close(whole[1, 1], length_controlled_scores(scores[1, 1], lengths[1, 1], 0.4))
        scaled = length_controlled_scores(3.5 * scores - 20, 2 * lengths + 1, 0.4)
        torch.testing.assert_close(scaled, whole, atol=1e-5, rtol=1e-5)

    def test_equal_values_count_as_zero(self) -> None:
        same = torch.full((7,), 0.1, dtype=torch.float64)
        assert same.mean() != same[0]
        assert not length_controlled_scores(same, same, 0.5).any()
        assert length_controlled_scores(same, torch.tensor([1.0, 2, 3, 4, 5, 6, 0]).double(), 0.5).argmax() == 6

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        one = torch.ones(2, 3)
        with pytest.raises(ValueError, match="scores, lengths: expected the same"):
            length_controlled_scores(one, one[:1], 0.0)
        with pytest.raises(ValueError, match="no empty axis"):
            length_controlled_scores(one[:, :0], one[:, :0], 0.0)
        with pytest.raises(ValueError, match="scores: expected finite"):
            length_controlled_scores(one / 0, one, 0.0)
        with pytest.raises(ValueError, match="lengths: expected finite"):
            length_controlled_scores(one, one / 0, 0.0)
        with pytest.raises(ValueError, match="rho: expected at least 0"):
            length_controlled_scores(one, one, -0.1)


class TestElo:
    def test_is_the_maximum(self) -> None:
        wins = torch.randint(0, 6, (4, 4), generator=seeded()).double()
        found = elo_scores(wins, ridge=0.3)

        def objective(scores):
            r = torch.tensor(scores)
            return -float((wins * torch.nn.functional.logsigmoid(r[:, None] - r)).sum() - 0.15 * r.square().sum())

        best = minimize(objective, [0.0] * 4, tol=1e-12).x
        torch.testing.assert_close(found, torch.tensor(best), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.sum(), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)

    def test_log_odds_of_two(self) -> None:
        found = elo_scores(torch.tensor([[5.0, 9.0], [3.0, 2.0]]), ridge=1e-7)
        torch.testing.assert_close(found[0] - found[1], torch.tensor(3.0).log(), atol=1e-5, rtol=0)

    def test_who_always_wins_has_a_finite_score(self) -> None:
        wins = 1e4 * torch.ones(5, 5).triu(1)
        found = elo_scores(wins)
        assert found.isfinite().all()
        assert found.tolist() == sorted(found.tolist(), reverse=True)
        slope = wins.sum(1) - ((wins + wins.T) * (found[:, None] - found).sigmoid()).sum(1)
        assert slope.abs().max() < 0.02 * found.abs().max() + 0.1

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        for bad in (torch.ones(2, 3), torch.ones(4), torch.ones(0, 0)):
            with pytest.raises(ValueError, match="wins: expected a square"):
                elo_scores(bad)
        with pytest.raises(ValueError, match="wins: expected at least 0"):
            elo_scores(-torch.eye(2))
        with pytest.raises(ValueError, match="wins: expected finite"):
            elo_scores(torch.full((2, 2), torch.inf))
        with pytest.raises(ValueError, match="ridge: expected more than 0"):
            elo_scores(torch.eye(2), ridge=0.0)

    def test_a_judge_of_two_plays_all_pairs_in_both_orders(self) -> None:
        seen = []

        def prefers(prompt: str, one: str, other: str) -> float:
            seen.append((prompt, one, other))
            return 1.0 if one == "first" or (one > other and other != "first") else 0.0

        scores = pairwise_judge(prefers)("p", ["b", "a", "first", "c"])
        assert len(set(seen)) == len(seen) == 12
        assert {prompt for prompt, _, _ in seen} == {"p"}
        assert sorted(range(4), key=lambda i: -scores[i]) == [2, 3, 0, 1]
        # Draws and halves: the wins of both orders, with nothing added.
        scores = pairwise_judge(lambda prompt, one, other: 0.75 if one < other else 0.5)("p", ["a", "b"])
        torch.testing.assert_close(scores, elo_scores(torch.tensor([[0, 1.25], [0.75, 0]]).double()).tolist())
        # One who prefers whatever stands first has no preference.
        assert max(map(abs, pairwise_judge(lambda *_: 1.0)("p", ["a", "b", "c"]))) < 1e-9


class TestPairs:
    def test_the_judge_sees_prompts_and_responses_only(self) -> None:
        seen = []

        def judge(prompt: str, responses: Sequence[str]) -> list[float]:
            seen.append((prompt, list(responses)))
            return [float(len(r)) for r in responses]

        outputs = ["secret <R> a", "no marker", "secret<R>ccc", "x <R> bb", "<R> d", "secret <R> eeee\n"]
        found = thought_pairs(["p", "q"], outputs, judge)
        assert seen == [("p", ["a", "ccc"]), ("q", ["bb", "d", "eeee"])]
        assert found.tolist() == [[2, 0], [5, 4]]

    def test_length_decides_where_rho_is_large(self) -> None:
        outputs = ["|aaa", "a long thought|a", "|aaaaaa", "|aa"]

        def judge(prompt: str, responses: Sequence[str]) -> list[float]:
            return [10.0 * len(r) ** 2 - 7 for r in responses]

        assert thought_pairs(["p"], outputs, judge, marker="|").tolist() == [[2, 1]]
        assert thought_pairs(["p"], outputs, judge, marker="|", rho=5.0).tolist() == [[1, 2]]

    def test_what_gives_no_pair(self) -> None:
        outputs = ["|a", "|bb", "none", "|c", "none", "none", "|x", "|z", "|y"]

        def judge(prompt: str, responses: Sequence[str]) -> list[float]:
            return [float(r in "xyz") * (1 + (r == "y")) for r in responses]

        assert thought_pairs(["p", "q", "r"], outputs, judge, marker="|").tolist() == [[8, 6]]
        # ... but a shorter response is better where the judge has no preference.
        assert thought_pairs(["p", "q", "r"], outputs, judge, marker="|", rho=0.1).tolist() == [[0, 1], [8, 6]]
        empty = thought_pairs(["p"], ["none", "none"], judge)
        assert empty.shape == (0, 2)
        assert empty.dtype == torch.int64

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="prompts: expected at least one"):
            thought_pairs([], ["|a"], likes_a)
        for outputs in ([], ["|a"] * 3):
            with pytest.raises(ValueError, match="outputs: expected as many for each of 2"):
                thought_pairs(["p", "q"], outputs, likes_a)
        with pytest.raises(ValueError, match="judge: expected 2 scores, got 1"):
            thought_pairs(["p"], ["|a", "|b"], lambda prompt, responses: [1.0], marker="|")
        with pytest.raises(ValueError, match="scores: expected finite"):
            thought_pairs(["p"], ["|a", "|b"], lambda prompt, responses: [1.0, torch.nan], marker="|")


class TestTraining:
    def test_an_iteration_reduces_to_dpo(self, policy: TinyLM) -> None:
        trained, by_hand = copy.deepcopy(policy), copy.deepcopy(policy)
        run = train_thoughts(
            trained, torch.optim.SGD(trained.parameters(), lr=0.1), PROMPTS, likes_a, iterations=1, updates=2,
            max_new_tokens=5, generator=seeded(), template=TEMPLATE, marker="|", group_size=6, beta=0.3,
        )  # fmt: skip
        (log,) = run
        asked = [TEMPLATE.replace("{prompt}", prompt) for prompt in PROMPTS]
        drawn = rollout(
            by_hand, asked, lambda *_: 0.0, group_size=6, max_new_tokens=5, temperature=0.8, generator=seeded()
        )
        pairs = thought_pairs(PROMPTS, drawn.answers, likes_a, marker="|").tolist()
        prompts, chosen, rejected = zip(
            *[(asked[i // 6], drawn.answers[i], drawn.answers[j]) for i, j in pairs], strict=True
        )
        assert any("t" in text for text in (*chosen, *rejected))
        optimiser = torch.optim.SGD(by_hand.parameters(), lr=0.1)
        with torch.no_grad():
            reference = pair_logps(by_hand, prompts, chosen, rejected)
        for _ in range(2):
            found = dpo_loss(*pair_logps(by_hand, prompts, chosen, rejected), *reference, beta=0.3)
            optimiser.zero_grad()
            found.losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            optimiser.step()
        torch.testing.assert_close(log["loss"], float(found.losses.mean().detach()), atol=1e-6, rtol=1e-5)
        margin = float((found.chosen_rewards - found.rejected_rewards).mean())
        torch.testing.assert_close(log["margin"], margin, atol=1e-6, rtol=1e-4)
        assert log["pairs"] == len(pairs) == 2
        for one, other in zip(trained.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)

    def test_a_thought_that_helps_is_learnt_from_the_answers(self, policy: TinyLM) -> None:
        trained = copy.deepcopy(policy)
        before = self.habits(policy)
        run = train_thoughts(
            trained, torch.optim.Adam(trained.parameters(), lr=3e-3), PROMPTS, likes_a, iterations=6, updates=3,
            max_new_tokens=5, generator=seeded(3), template=TEMPLATE, marker="|",
        )  # fmt: skip
        assert [log["step"] for log in run] == [1, 2, 3, 4, 5, 6]
        after = self.habits(trained)
        # Five deviations of the difference of two shares of 400 outputs.
        assert min(after[0] - before[0], after[1] - before[1]) > 5 * (0.5 / 400) ** 0.5

    def habits(self, policy: TinyLM) -> tuple[float, float]:
        """Shares of outputs that think t, and that answer a."""
        drawn = rollout(policy, ["ab?"], lambda *_: 0.0, group_size=400, max_new_tokens=5, generator=seeded(9))
        answers = drawn.answers
        return tuple(sum(text in a for a in answers) / len(answers) for text in ("t|", "|a"))  # type: ignore[return-value]

    def test_nothing_happens_without_pairs(self, policy: TinyLM) -> None:
        trained = copy.deepcopy(policy)
        (log,) = train_thoughts(
            trained, torch.optim.Adam(trained.parameters()), PROMPTS, lambda prompt, responses: [0.0] * len(responses),
            iterations=1, updates=1, max_new_tokens=5, generator=seeded(), template=TEMPLATE, marker="|",
        )  # fmt: skip
        assert log == {"step": 1, "loss": 0.0, "gradient_norm": 0.0, "pairs": 0.0, "margin": 0.0}
        assert all(map(torch.equal, trained.parameters(), policy.parameters()))

    def test_bad_input(self, policy: TinyLM) -> None:
        with pytest.raises(ValueError, match="template: expected"):
            next(
                train_thoughts(
                    policy, torch.optim.SGD(policy.parameters()), PROMPTS, likes_a, iterations=1, updates=1,
                    max_new_tokens=5, generator=seeded(), template="think",
                )
            )  # fmt: skip
