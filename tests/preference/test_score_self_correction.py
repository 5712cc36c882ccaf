import copy
import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.preference import (
    SCoRe,
    correction_bonus,
    rloo_loss,
    score_first_stage_loss,
    score_second_stage_loss,
    self_correction,
)
from tests.preference.models import Bigram

FIRSTS, SECONDS = 3, 2
REWARDS = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64)  # of first attempts
AGAIN = torch.tensor([[0.1, 0.8], [0.5, 0.3], [0.7, 0.6]], dtype=torch.float64)  # of second ones, after each first one


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Table:
    """A policy over three first attempts and two second ones after each, and another one as the reference."""

    def __init__(self) -> None:
        self.first, self.second = _random(FIRSTS).requires_grad_(), _random(FIRSTS, SECONDS, seed=1).requires_grad_()
        self.first_ref = _random(FIRSTS, seed=2).log_softmax(0)
        self.second_ref = _random(FIRSTS, SECONDS, seed=3).log_softmax(1)

    def logps(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, second = self.first.log_softmax(0), self.second.log_softmax(1)
        return first[one], second[one, two], self.first_ref[one], self.second_ref[one, two]

    def expected(self, loss) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        """Mean gradient of a loss over all groups of two pairs of attempts, each with its probability."""
        total = [torch.zeros_like(self.first), torch.zeros_like(self.second)]
        episodes = list(itertools.product(range(FIRSTS), range(SECONDS)))
        for group in itertools.product(episodes, repeat=2):
            one, two = (torch.tensor(x) for x in zip(*group, strict=True))
            logps = self.logps(one, two)
            chance = (logps[0] + logps[1]).sum().exp().detach()
            for t, g in zip(total, torch.autograd.grad(loss(logps, one, two), (self.first, self.second)), strict=True):
                t += chance * g
        return total[0], total[1]

    def objective(self, rewards: Tensor, again: Tensor, beta: float, beta_again: float, gamma: float) -> Tensor:
        """What the gradient should be of: closed form, over all attempts; each attempt's own variables alone learn."""
        first, second = self.first.log_softmax(0), self.second.log_softmax(1)
        value = (second.exp() * (again - beta_again * (second - self.second_ref))).sum(1)
        own = (first.exp() * (rewards - beta * (first - self.first_ref))).sum()
        return own + gamma * (first.exp() * value.detach()).sum() + (first.detach().exp() * value).sum()

    def check(self, found: tuple[Tensor, Tensor], objective: Tensor) -> None:
        for ours, wanted in zip(found, torch.autograd.grad(objective, (self.first, self.second)), strict=True):
            torch.testing.assert_close(ours, -wanted)


class TestGradients:
    """RLOO's expected gradient over everything that can be drawn is that of the objective."""

    @pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
    def test_second_stage(self, gamma: float) -> None:
        table = Table()
        found = table.expected(
            lambda logps, one, two: (
                score_second_stage_loss(
                    *logps, REWARDS[one], AGAIN[one, two], 2, alpha=3.0, beta1=0.2, gamma=gamma
                ).loss
            )
        )
        shaped = AGAIN + 3 * (AGAIN - REWARDS[:, None])
        table.check(found, table.objective(REWARDS, shaped, 0.2, 0.2, gamma))

    @pytest.mark.parametrize("gamma", [0.0, 1.0])
    def test_first_stage(self, gamma: float) -> None:
        table = Table()
        found = table.expected(
            lambda logps, one, two: (
                score_first_stage_loss(*logps, AGAIN[one, two], 2, beta1=0.2, beta2=0.7, gamma=gamma).loss
            )
        )
        table.check(found, table.objective(torch.zeros_like(REWARDS), AGAIN, 0.7, 0.2, gamma))

    def test_without_bonus_it_is_the_sum_of_rewards_of_two_turns(self) -> None:
        table = Table()
        found = table.expected(
            lambda logps, one, two: (
                score_second_stage_loss(*logps, REWARDS[one], AGAIN[one, two], 2, alpha=0.0, beta1=0.0, gamma=1.0).loss
            )
        )
        joint = table.first.softmax(0)[:, None] * table.second.softmax(1)
        for ours, wanted in zip(
            found,
            torch.autograd.grad((joint * (REWARDS[:, None] + AGAIN)).sum(), (table.first, table.second)),
            strict=True,
        ):
            torch.testing.assert_close(ours, -wanted)

    def test_credited_apart_the_bonus_scales_the_second_attempt_alone(self) -> None:
        table = Table()

        def gradient(alpha: float) -> tuple[Tensor, Tensor]:
            return table.expected(
                lambda logps, one, two: (
                    score_second_stage_loss(*logps, REWARDS[one], AGAIN[one, two], 2, alpha=alpha, beta1=0.0).loss
                )
            )

        plain, shaped = gradient(0.0), gradient(4.0)
        torch.testing.assert_close(shaped[0], plain[0])
        torch.testing.assert_close(shaped[1], 5 * plain[1])

    def test_reduces_to_rloo_without_bonus(self) -> None:
        first, second = _random(6).requires_grad_(), _random(6, seed=1).requires_grad_()
        r1, r2 = _random(6, seed=2), _random(6, seed=3)
        same = first.detach(), second.detach()
        loss = score_second_stage_loss(first, second, *same, r1, r2, 3, alpha=0.0).loss
        torch.testing.assert_close(loss, rloo_loss(first, r1, 3).loss + rloo_loss(second, r2, 3).loss)
        bonus = score_second_stage_loss(first, second, *same, r1, r2, 3, alpha=7.0).loss
        for of, reward in ((first, r1), (second, 8 * r2 - 7 * r1)):
            (ours,) = torch.autograd.grad(bonus, of, retain_graph=True)
            torch.testing.assert_close(ours, torch.autograd.grad(rloo_loss(of, reward, 3).loss, of)[0])

    def test_micro_batches_defaults_and_statistics(self) -> None:
        x = [_random(6, seed=i).requires_grad_(i < 2) for i in range(6)]
        for loss, wanted in (
            (lambda *a, **k: score_second_stage_loss(*a, **k), {"alpha": 10.0, "beta1": 0.01, "gamma": 0.0}),
            (
                lambda *a, **k: score_first_stage_loss(*a[:4], *a[5:], **k),
                {"beta1": 0.01, "beta2": 0.1, "gamma": 0.0},
            ),
        ):
            whole = loss(*x, 3)
            torch.testing.assert_close(loss(*x, 3, **wanted).loss, whole.loss)
            parts = [loss(*(t[i] for t in x), 3, normaliser=6.0).loss for i in (slice(3), slice(3, 6))]
            torch.testing.assert_close(sum(parts), whole.loss)
            torch.testing.assert_close(whole.stats["first_kl"], (x[0] - x[2]).mean().detach())
            torch.testing.assert_close(whole.stats["second_kl"], (x[1] - x[3]).mean().detach())
            assert not any(value.requires_grad for value in whole.stats.values())


def test_a_strong_penalty_holds_the_first_attempt_while_the_second_learns() -> None:
    table, generator = Table(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        table.first.copy_(table.first_ref)
        table.second.copy_(table.second_ref)
    optimiser = torch.optim.Adam([table.first, table.second], lr=0.2)
    for _ in range(40):
        one = torch.multinomial(table.first.detach().softmax(0), 32, replacement=True, generator=generator)
        two = torch.multinomial(table.second.detach().softmax(1)[one], 1, generator=generator)[:, 0]
        loss = score_first_stage_loss(*table.logps(one, two), AGAIN[one, two], 32, beta2=50.0).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    first, second = table.first.detach().log_softmax(0), table.second.detach().softmax(1)
    assert float((first.exp() * (first - table.first_ref)).sum()) < 0.01
    assert float((first.exp() * ((second * AGAIN).sum(1) - AGAIN.amax(1))).sum()) > -0.03


class TestMeasures:
    def test_bonus_of_each_transition(self) -> None:
        first, second = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
        assert correction_bonus(first, second, 4.0).tolist() == [4.0, -4.0, 0.0, 0.0]
        assert correction_bonus(first, second).tolist() == [10.0, -10.0, 0.0, 0.0]
        assert not correction_bonus(first, second, 0.0).any()

    def test_metrics_of_all_ways_to_answer_five_questions(self) -> None:
        for bits in itertools.product((False, True), repeat=10):
            first, second = torch.tensor(bits[:5]), torch.tensor(bits[5:])
            found = self_correction(first, second)
            assert found.gain == pytest.approx(found.second - found.first)
            assert found.gain == pytest.approx(found.corrected - found.spoilt)
            assert found.first == pytest.approx(sum(bits[:5]) / 5)
            assert found.corrected == pytest.approx(
                sum(b and not a for a, b in zip(bits[:5], bits[5:], strict=True)) / 5
            )

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        yes, x = torch.tensor([True, False]), _random(4)
        for first, second, name in ((yes.float(), yes, "first"), (yes, yes[:1], "second"), (yes[:0], yes[:0], "first")):
            with pytest.raises(ValueError, match=f"{name}: expected a boolean"):
                self_correction(first, second)
        with pytest.raises(ValueError, match="second: expected a boolean"):
            self_correction(yes, yes.float())
        with pytest.raises(ValueError, match="alpha: expected at least 0"):
            correction_bonus(x, x, -1.0)
        with pytest.raises(ValueError, match="second_rewards: expected shape"):
            correction_bonus(x, x[:2])
        with pytest.raises(ValueError, match="gamma: expected a probability"):
            score_second_stage_loss(x, x, x, x, x, x, 2, gamma=1.5)
        with pytest.raises(ValueError, match="beta: expected at least 0"):
            score_first_stage_loss(x, x, x, x, x, 2, beta2=-1.0)
        with pytest.raises(ValueError, match="group_size: expected at least 2"):
            score_first_stage_loss(x, x, x, x, x, 1)
        score = _score()
        for name, value in {"alpha": -1.0, "beta1": -1.0, "beta2": math.nan, "gamma": 2.0, "max_new_tokens": 0}.items():
            with pytest.raises(ValueError, match=f"{name}: expected"):
                replace(score, **{name: value})
        with pytest.raises(TypeError, match=r"policy: expected an nn\.Module"):
            replace(score, policy=object())


def _low(question: str, answer: str) -> float:
    return float(answer < "a" and len(question) > 1)


def _score(**options) -> SCoRe:  # type: ignore[no-untyped-def]
    config = TinyLMConfig(d_model=16, layers=1, heads=2, hidden=16, tied=False)
    policy = TinyLM(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.lm_head.weight.mul_(4)
    given = {"instruction": "{question}{answer}?", "max_new_tokens": 3, "stop": "A", "reward": _low} | options
    return SCoRe(policy, **given)


class TestProcedure:
    def test_second_attempts_follow_the_first_ones_and_are_rewarded_for_the_question(self) -> None:
        seen = []
        score = _score(reward=lambda question, answer: seen.append((question, answer)) or float(len(seen)))
        found = score.collect(["qq", "p"], group_size=2, generator=torch.Generator().manual_seed(0))
        asked = ["qq", "qq", "p", "p"]
        assert seen == [*zip(asked, found.first.answers, strict=True), *zip(asked, found.second.answers, strict=True)]
        assert found.first.rewards.tolist() == [1, 2, 3, 4]
        assert found.second.rewards.tolist() == [5, 6, 7, 8]
        assert found.group_size == 2
        for i, question in enumerate(asked):
            prompt = found.second.ids[i][found.second.real[i] & ~found.second.mask[i]]
            wanted = f"{question}{found.first.answers[i]}?".encode()
            assert bytes(prompt.tolist())[: len(wanted)] == wanted
        other = _score(instruction=lambda question, answer: answer + "|" + question)
        again = other.collect(["qq"], group_size=2, generator=torch.Generator().manual_seed(0))
        start = f"{again.first.answers[0]}|qq".encode()
        assert bytes(again.second.ids[0][again.second.real[0]].tolist()).startswith(start)

    def test_losses_are_those_of_the_attempts_log_probabilities(self) -> None:
        score = _score(alpha=2.0, beta1=0.3, beta2=0.6, gamma=0.5, temperature=0.8)
        with torch.no_grad():
            score.policy.lm_head.weight.mul_(1.1)
        found = score.collect(["qq", "p"], group_size=3, generator=torch.Generator().manual_seed(1))

        def logps(model: TinyLM, rows) -> Tensor:  # type: ignore[no-untyped-def]
            total = []
            for ids, real, mask in zip(rows.ids, rows.real, rows.mask, strict=True):
                answer, row = ids[mask], ids[real & (mask | (mask.cumsum(0) == 0))]
                law = (model(row[None, :-1]).logits[0] / 0.8).log_softmax(-1)
                total.append(law[torch.arange(len(row) - 1), row[1:]][-len(answer) :].sum())
            return torch.stack(total)

        values = [logps(m, rows) for m in (score.policy, score.reference) for rows in (found.first, found.second)]
        r1, r2 = found.first.rewards, found.second.rewards
        one = score_first_stage_loss(*values, r2, 3, beta1=0.3, beta2=0.6, gamma=0.5)
        two = score_second_stage_loss(*values, r1, r2, 3, alpha=2.0, beta1=0.3, gamma=0.5)
        for ours, wanted in ((score.first_stage_loss(found), one), (score.second_stage_loss(found), two)):
            torch.testing.assert_close(ours.loss, wanted.loss, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.stats["second_kl"], wanted.stats["second_kl"], atol=1e-4, rtol=1e-4)
            assert float(ours.stats["gain"]) == pytest.approx(float((r2 - r1).mean()), abs=1e-6)

    def test_first_stage_then_second(self) -> None:
        policy = Bigram()
        score = SCoRe(
            policy, lambda question, answer: float(answer < "<"), "{question}{answer}?", 1, beta2=3.0, alpha=3.0
        )
        optimiser = torch.optim.Adam(policy.parameters(), lr=3e-2)
        generator = torch.Generator().manual_seed(0)
        questions, reference = ["p", "q", "r"], copy.deepcopy(policy.state_dict())
        sizes = {"batch_size": 2, "group_size": 16, "generator": generator}
        start = score.collect(questions, group_size=60, generator=generator).metrics()
        logs = list(score.run(score.first_stage_loss, optimiser, questions, steps=20, **sizes))
        held = score.collect(questions, group_size=60, generator=generator).metrics()
        assert len(logs) == 20
        assert abs(held.first - start.first) < 0.15
        assert held.second > start.second + 0.3
        for _ in score.run(score.second_stage_loss, optimiser, questions, steps=15, **sizes):
            pass
        both = score.collect(questions, group_size=60, generator=generator).metrics()
        assert both.first > held.first + 0.3
        assert both.second > 0.8
        assert all(torch.equal(reference[name], value) for name, value in score.reference.state_dict().items())

    def test_a_killed_run_goes_on_with_the_same_bits(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        ends = []
        for stops in ((3,), (1, 3)):
            for steps in stops:
                policy = Bigram()
                score = SCoRe(policy, _low, "{question}{answer}?", 1)
                optimiser = torch.optim.SGD(policy.parameters(), lr=0.1)
                generator, path = torch.Generator().manual_seed(4), tmp_path / str(stops) / "run.pt"
                rest = list(
                    score.run(
                        score.second_stage_loss,
                        optimiser,
                        ["a", "bb"],
                        steps=steps,
                        generator=generator,
                        checkpoint=path,
                    )
                )
            ends.append(policy.state_dict())
        assert [log["step"] for log in rest] == [2, 3]
        assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))

    def test_defaults_are_the_papers(self) -> None:
        score = _score()
        assert (score.alpha, score.beta1, score.beta2, score.gamma, score.temperature) == (10.0, 0.01, 0.1, 0.0, 1.0)
        given = inspect.signature(SCoRe.run).parameters
        assert (given["batch_size"].default, given["group_size"].default, score.stop) == (32, 4, "A")
