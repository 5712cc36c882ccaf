import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.preference import dpo_loss, pair_logps
from mlreviews.preference.rlcf import (
    ChecklistItem,
    ChecklistPair,
    GradedAnswers,
    checklist_pairs,
    checklist_score,
    grade,
    grade_samples,
    largest_gaps,
    train_on_pairs,
)
from tests.contracts.families import Sample


def _judge(prompt: str, answer: str, requirement: str) -> float:
    """How much of an answer is the letter that is required."""
    return 100 * answer.count(requirement) / max(len(answer), 1)


class TestGrades:
    def test_by_hand(self) -> None:
        items = [
            ChecklistItem("a", 30.0),
            ChecklistItem("b", 50.0, lambda p, a: a.endswith("\n")),
            ChecklistItem("b", 20.0, lambda p, a: p in a),
        ]
        found = grade(_judge, items, "x", "aaab", samples=3)
        assert found.tolist() == [75, 12.5, 12.5]
        assert grade(_judge, items, "x", "aa\nbxxx\n").tolist() == [25, 56.25, 56.25]
        assert float(checklist_score(found, torch.tensor([30.0, 50, 20]))) == pytest.approx(31.25)

    def test_a_failing_program_lowers_and_a_passing_one_raises(self) -> None:
        def judge(*_: str) -> float:
            return 60.0

        plain, failed, passed = (
            grade(judge, [ChecklistItem("c", verifier=v)], "x", "y", samples=1).item()
            for v in (None, lambda p, a: 0.0, lambda p, a: True)
        )
        assert (failed, plain, passed) == (30, 60, 80)

    def test_the_judge_is_asked_as_often_as_it_says(self) -> None:
        said = itertools.cycle([10.0, 0.0, 50.0, 100.0])
        assert grade(lambda *_: next(said), [ChecklistItem("c")], "x", "y", samples=4).item() == 40
        asked: list[tuple[str, ...]] = []
        grade(lambda *a: float(bool(asked.append(a))), [ChecklistItem("c"), ChecklistItem("d")], "x", "y")
        assert asked == [("x", "y", "c")] * 25 + [("x", "y", "d")] * 25

    @given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 100)), min_size=1, max_size=5), st.integers(1, 9))
    @settings(max_examples=15)
    def test_weighted_mean(self, items: list[tuple[int, int]], scale: int) -> None:
        scores, weights = torch.tensor(items, dtype=torch.float64).unbind(1)
        found = float(checklist_score(scores, weights))
        # A requirement of weight w is as good as w requirements of weight 1.
        spread = [s for s, w in items for _ in range(w)]
        assert found == pytest.approx(sum(spread) / len(spread))
        assert float(checklist_score(scores, scale * weights)) == pytest.approx(found)
        assert float(checklist_score(scores[:1], weights[:1])) == pytest.approx(items[0][0])

    def test_what_is_not_on_the_list_does_not_count(self) -> None:
        scores = torch.tensor([[10.0, 90, 40], [10, 90, 40]])
        weights = torch.tensor([[1.0, 0, 0], [0, 50, 50]])
        assert checklist_score(scores, weights).tolist() == [10, 65]

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="samples: expected at least 1"):
            grade(_judge, [ChecklistItem("c")], "x", "y", samples=0)
        with pytest.raises(ValueError, match="checklist: expected at least one"):
            grade(_judge, [], "x", "y")
        for score in (-1.0, 101.0, math.nan):
            with pytest.raises(ValueError, match="judge: expected scores from 0 to 100"):
                grade(lambda *_, score=score: score, [ChecklistItem("c")], "x", "y")
        with pytest.raises(ValueError, match="verifier: expected a verdict of 0 or 1"):
            grade(_judge, [ChecklistItem("c", verifier=lambda p, a: 0.5)], "x", "y")
        with pytest.raises(ValueError, match="weight: expected at least 0"):
            ChecklistItem("c", -1.0)
        x = torch.ones(2, 3)
        with pytest.raises(ValueError, match="weights: expected shape"):
            checklist_score(x, x[0])
        for wrong in (torch.tensor([1.0, -1, 1]), torch.zeros(3)):
            with pytest.raises(ValueError, match="weights: expected none below 0"):
                checklist_score(x[0], wrong)
        for name, values in {"scores": (x / 0, x), "weights": (x, x / 0)}.items():
            with pytest.raises(ValueError, match=f"{name}: expected finite"):
                checklist_score(*values)


def _graded(first: list[float], second: list[float], weights: list[float], name: str = "p") -> GradedAnswers:
    return GradedAnswers(
        name, (f"{name}1", f"{name}2"), torch.tensor([first, second]).float(), torch.tensor(weights).float()
    )


class TestPairs:
    GRADED = (
        _graded([50, 90], [60, 20], [90, 10], "a"),  # totals 54 and 56: the second, in spite of its lower mean
        _graded([100, 0], [0, 100], [50, 50], "b"),  # tied
        _graded([80, 80], [10, 70], [1, 1], "c"),
        _graded([0, 0, 30], [1, 2, 31], [1, 0, 0], "d"),  # requirements of no weight count for the gap
        _graded([5], [45], [20], "e"),
        _graded([30], [30], [20], "f"),  # tied
    )

    def test_what_is_preferred_and_kept(self) -> None:
        found = checklist_pairs(self.GRADED, keep=1.0)
        assert [(p.prompt, p.chosen, p.rejected) for p in found] == [
            ("c", "c1", "c2"), ("e", "e2", "e1"), ("a", "a2", "a1"), ("d", "d2", "d1")]  # fmt: skip
        assert [p.gap for p in found] == [70, 40, 10, 2]
        assert [p.margin for p in found] == pytest.approx([40, 40, 2, 1])
        for keep, count in ((0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.99, 4)):
            assert checklist_pairs(self.GRADED, keep=keep) == found[:count]
        assert checklist_pairs(self.GRADED) == found[:2]

    def test_reduces_to_dpo_on_the_score_of_a_single_requirement(self) -> None:
        graded = [_graded([float(i % 5)], [float(i * i % 7)], [3.0], str(i)) for i in range(9)]
        found = checklist_pairs(graded, keep=1.0)
        decided = [g for g in graded if g.scores[0] != g.scores[1]]
        assert {p.prompt for p in found} == {g.prompt for g in decided}
        for pair in found:
            i = int(pair.prompt)
            assert pair.margin == pair.gap == abs(i % 5 - i * i % 7)
            assert (pair.chosen == f"{i}1") == (i % 5 > i * i % 7)

    @pytest.mark.parametrize(
        ("keep", "pairs", "count"), [(0.4, 5, 2), (0.7, 10, 7), (0.4, 6, 3), (0.01, 3, 1), (1, 4, 4)]
    )
    def test_number_kept(self, keep: float, pairs: int, count: int) -> None:
        gaps = torch.randn(pairs, generator=torch.Generator().manual_seed(0))
        found = largest_gaps(gaps, keep)
        assert len(found) == count
        assert gaps[found].tolist() == sorted(gaps.tolist(), reverse=True)[:count]
        assert largest_gaps(torch.ones(pairs), keep).tolist() == list(range(count))

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        for keep in (0.0, 1.5, math.nan):
            with pytest.raises(ValueError, match="keep: expected"):
                largest_gaps(torch.ones(3), keep)
        with pytest.raises(ValueError, match="gaps: expected"):
            largest_gaps(torch.ones(0))
        for graded in ([], self.GRADED[1:2]):
            with pytest.raises(ValueError, match="graded: expected at least one"):
                checklist_pairs(graded)


PROMPTS = ["ab", "a longer one", "x", "yz"]
LOWER = ChecklistItem("small letters", 80.0, lambda p, a: any(map(str.islower, a)))
START = ChecklistItem("no digit at first", 20.0, lambda p, a: not a[0].isdigit())


def _rule(prompt: str, answer: str, requirement: str) -> float:
    """A judge that knows the programs."""
    return next(100.0 * item.verifier("", answer) for item in (LOWER, START) if item.text == requirement)


def _model(seed: int = 0) -> TinyLM:
    """A model that draws text only: all bytes but those of printed signs and the line break are impossible."""
    config = TinyLMConfig(d_model=16, layers=1, heads=2, kv_heads=1, hidden=16, tied=False)
    made = TinyLM(config, generator=torch.Generator().manual_seed(seed))
    made.lm_head.bias = torch.nn.Parameter(torch.full((259,), -30.0))
    with torch.no_grad():
        made.lm_head.bias[32:127] = 0
        made.lm_head.bias[10] = 2.5
    return made


def _sampled(generator: torch.Generator, prompts: list[str] = PROMPTS) -> list[GradedAnswers]:
    lists = [[LOWER, START]] * len(prompts)
    return grade_samples(_model(), prompts, lists, _rule, max_new_tokens=8, samples=1, generator=generator)


def _trained(generator: torch.Generator) -> list[dict[str, float]]:
    pairs = [ChecklistPair(p, f"{i}\n", "no", 1.0, 1.0) for i, p in enumerate(PROMPTS)]
    policy = _model()
    optimiser = torch.optim.SGD(policy.parameters(), lr=0.1)
    reference = _model(1).requires_grad_(False)
    return list(train_on_pairs(policy, reference, optimiser, pairs, batch_size=3, generator=generator))


CONTRACT = {
    "grade_samples": lambda: Sample(_sampled),
    "train_on_pairs": lambda: Sample(_trained),
}


class TestTraining:
    def test_answers_and_their_grades(self) -> None:
        found = _sampled(torch.Generator().manual_seed(0), PROMPTS * 5)
        assert [g.prompt for g in found] == PROMPTS * 5
        for _, answers, scores, weights in found:
            assert weights.tolist() == [80, 20]
            for answer, row in zip(answers, scores.tolist(), strict=True):
                assert row == [100.0 * any(map(str.islower, answer)), 100.0 * (not answer[0].isdigit())]
        assert sum(g.answers[0] != g.answers[1] for g in found) > 10
        assert {len(a) for g in found for a in g.answers} >= {1, 8}

    def test_the_judge_is_asked_25_times_and_a_requirement_weighs_100(self) -> None:
        asked = []
        generator = torch.Generator().manual_seed(0)
        lists = [[ChecklistItem("c")]]
        (graded,) = grade_samples(
            _model(), ["x"], lists, lambda *a: float(bool(asked.append(a))), max_new_tokens=2, generator=generator
        )
        assert [a[:2] for a in asked] == [("x", answer) for answer in graded.answers for _ in range(25)]
        assert graded.weights.tolist() == [100]

    def test_bytes_that_are_no_text_are_left_out(self) -> None:
        policy = _model()
        with torch.no_grad():
            policy.lm_head.bias[200] = 1.0
        lists = [[LOWER, START]] * 40
        found = grade_samples(
            policy, PROMPTS * 10, lists, _rule, max_new_tokens=8, generator=torch.Generator().manual_seed(0)
        )
        assert 0 < len(found) < 40
        assert all(a.isascii() for g in found for a in g.answers)

    def test_the_temperature_is_that_of_the_draws(self) -> None:
        policy = _model()
        with torch.no_grad():
            policy.lm_head.bias[ord("q")] = 9
        lists = [[LOWER]] * 4
        shares = [
            sum(a.count("q") for g in graded for a in g.answers) / sum(len(a) for g in graded for a in g.answers)
            for temperature in (1.0, 1.3, 3.0)
            for graded in [
                grade_samples(
                    policy,
                    PROMPTS,
                    lists,
                    _rule,
                    max_new_tokens=8,
                    samples=1,
                    temperature=temperature,
                    generator=torch.Generator().manual_seed(0),
                )
            ]
        ]
        assert shares[0] > 0.9 > 0.5 > shares[2]
        default = grade_samples(
            policy, PROMPTS, lists, _rule, max_new_tokens=8, samples=1, generator=torch.Generator().manual_seed(0)
        )
        assert sum(a.count("q") for g in default for a in g.answers) == pytest.approx(
            shares[1] * sum(len(a) for g in default for a in g.answers)
        )

    def test_steps_are_those_of_dpo_and_see_each_pair_once_an_epoch(self) -> None:
        policy, reference = _model(), _model(1).requires_grad_(False)
        pairs = [ChecklistPair(p, c, r, 1.0, 1.0) for p, c, r in zip(PROMPTS, "abcd", "wxyz", strict=True)]
        # A step so small that the policy stays: the losses of an epoch add up to those of all pairs.
        optimiser = torch.optim.SGD(policy.parameters(), lr=1e-12)
        run = functools.partial(train_on_pairs, policy, reference, optimiser, pairs, generator=torch.Generator())
        chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
        sides = (*pair_logps(policy, PROMPTS, chosen, rejected), *pair_logps(reference, PROMPTS, chosen, rejected))
        expected = dpo_loss(*sides)
        margins = expected.chosen_rewards - expected.rejected_rewards
        logs = list(run(batch_size=3))
        assert len(logs) == 4
        for first, last in (logs[:2], logs[2:]):
            assert 3 * first["loss"] + last["loss"] == pytest.approx(float(expected.losses.detach().sum()), rel=1e-5)
            assert 3 * first["margin"] + last["margin"] == pytest.approx(float(margins.sum()), rel=1e-4)
            assert 3 * first["accuracy"] + last["accuracy"] == pytest.approx(int((margins > 0).sum()))
        assert 0 < int((margins > 0).sum()) < 4
        assert len({round(log["loss"], 6) for log in logs}) > 2  # another order in the second epoch
        (log,) = run(batch_size=4, epochs=1, beta=0.7)
        assert log["loss"] == pytest.approx(float(dpo_loss(*sides, beta=0.7).losses.detach().mean()), rel=1e-5)

    def test_a_round_raises_what_is_on_the_list(self) -> None:
        policy, reference = _model(), _model().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        lists = [[LOWER, START]] * 240
        draw = functools.partial(
            grade_samples, policy, PROMPTS * 60, lists, _rule, max_new_tokens=8, samples=1, temperature=1.0
        )

        def rates(graded: list[GradedAnswers]) -> torch.Tensor:
            return torch.stack([g.scores.mean(0) for g in graded]).mean(0) / 100

        graded = draw(generator=generator)
        optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        pairs = checklist_pairs(graded, keep=1.0)
        logs = list(train_on_pairs(policy, reference, optimiser, pairs, batch_size=32, epochs=4, generator=generator))
        assert logs[-1]["margin"] > 0
        before, after = rates(graded), rates(draw(generator=generator))
        # Four standard deviations of the difference of two rates of 480 answers.
        noise = (2 * before * (1 - before) / 480).sqrt()
        assert (after - before)[0] > 4 * noise[0]
        assert (after - before)[1] > -4 * noise[1]

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="checklists: expected one for each of 4 prompts, got 1"):
            grade_samples(_model(), PROMPTS, [[LOWER]], _rule, max_new_tokens=2)
        policy = _model()
        optimiser = torch.optim.SGD(policy.parameters(), lr=0.1)
        good = {"pairs": [ChecklistPair("a", "b", "c", 1.0, 1.0)], "batch_size": 1, "generator": torch.Generator()}
        for name, value in {"pairs": [], "batch_size": 0, "epochs": 0}.items():
            with pytest.raises(ValueError, match=f"{name}: expected at least"):
                train_on_pairs(policy, policy, optimiser, **(good | {name: value}))  # type: ignore[arg-type]
