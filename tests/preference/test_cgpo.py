import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.preference import brackets_balance, line_parses, rollout
from mlreviews.preference.cgpo import (
    CGPOTask,
    calibrated_rewards,
    codpo_loss,
    codpo_pairs,
    crpg_loss,
    crpg_rewards,
    crraft_loss,
    judge_answers,
    judge_rollouts,
    train_cgpo,
)
from mlreviews.preference.dpo import dpo_loss
from mlreviews.preference.losses import PolicyLoss
from mlreviews.preference.rloo import raft_loss, rloo_loss
from tests.contracts.families import Sample

YES = torch.ones(6, dtype=torch.bool)
LENGTHS = torch.tensor([3, 1, 4, 2, 0, 7])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _answers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under policy and reference, and calibrated rewards, of six answers."""
    logps, ref = -5 + _random(2, 6, seed=seed)
    return logps.requires_grad_(), ref, _random(6, seed=seed + 1).sigmoid()


def _slope(loss: PolicyLoss, logps: Tensor) -> Tensor:
    return torch.autograd.grad(loss.loss, logps, retain_graph=True)[0]


class TestJudges:
    def test_one_objection_is_enough(self) -> None:
        prompts, answers = ["x = ", "x = ", "f(", "y = "], ["1\n", "(1\n", "2)\n", "]\n"]
        assert judge_answers(prompts, answers, [line_parses]).tolist() == [True, False, True, False]
        assert judge_answers(prompts, answers, [lambda p, a: p == "x = ", line_parses]).tolist() == [
            True, False, False, False]  # fmt: skip
        assert judge_answers(prompts, answers, [line_parses, brackets_balance]).tolist() == [True, False, True, False]
        assert judge_answers(prompts, answers, []).tolist() == [True] * 4

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="answers: expected one for each of 2 prompts, got 1"):
            judge_answers(["a", "b"], ["c"], [])
        with pytest.raises(ValueError, match="judges: expected verdicts of 0 or 1"):
            judge_answers(["a"], ["c"], [lambda p, a: 0.5])


class TestCalibration:
    @given(st.sets(st.integers(-80, 80), min_size=2, max_size=5), st.integers(-80, 80), st.integers(-30, 30))
    @settings(max_examples=6)
    def test_properties(self, values: set[int], known: int, shift: int) -> None:
        rewards = torch.tensor([known, *sorted(values)], dtype=torch.float64) / 10
        known, shift = known / 10, shift / 10
        found = calibrated_rewards(rewards, torch.full_like(rewards, known))
        assert found[0] == 0.5
        assert ((found > 0) & (found < 1)).all()
        assert (found[1:].diff() > 0).all()
        moved = calibrated_rewards(rewards + shift, torch.full_like(rewards, known + shift))
        torch.testing.assert_close(moved, found)

    def test_it_is_the_win_rate_of_bradley_terry(self) -> None:
        # Odds of 3 to 1 are a difference of log 3; and no gradient goes to the reward model.
        rewards = torch.tensor([math.log(3.0)], requires_grad=True)
        found = calibrated_rewards(rewards, torch.zeros(1))
        torch.testing.assert_close(found, torch.tensor([0.75]))
        assert not found.requires_grad


class TestCRPG:
    def test_rewards_by_hand(self) -> None:
        logps = torch.tensor([-1.0, -2.0, -6.0, -1.0, -3.0])
        ref = torch.tensor([-2.0, -2.0, -2.0, -4.0, -3.0])
        calibrated = torch.tensor([0.5, 0.25, 0.5, 0.75, 0.9])
        satisfied = torch.tensor([True, True, True, True, False])
        found = crpg_rewards(logps, ref, calibrated, satisfied, kl_max=2.0)
        assert found.tolist() == [0.25, 0.25, 1.5, 0.0, 0.0]
        assert torch.equal(crpg_rewards(logps, ref, calibrated, satisfied), calibrated * satisfied)

    def test_reduces_to_rloo_for_one_prompt_without_violations(self) -> None:
        logps, ref, calibrated = _answers()
        found = crpg_loss(logps, ref, calibrated, YES)
        torch.testing.assert_close(_slope(found, logps), 5 / 6 * _slope(rloo_loss(logps, calibrated, 6), logps))
        assert float(found.stats["satisfied"]) == 1

    def test_gradient_is_the_covariance_with_the_shaped_reward(self) -> None:
        logps, ref, calibrated = _answers()
        satisfied = torch.tensor([True, False, True, True, False, True])
        found = crpg_loss(logps, ref, calibrated, satisfied, kl_max=1.7)
        shaped = [
            float(c) * max(0.0, 1 - float(p - r) / 1.7) if s else 0.0
            for p, r, c, s in zip(logps.detach(), ref, calibrated, satisfied, strict=True)
        ]
        expected = [(sum(shaped) / 6 - r) / 6 for r in shaped]
        torch.testing.assert_close(_slope(found, logps), torch.tensor(expected, dtype=torch.float64))
        assert float(found.stats["satisfied"]) == pytest.approx(4 / 6)

    @given(st.integers(0, 500))
    @settings(max_examples=6)
    def test_a_violation_is_never_worth_more(self, seed: int) -> None:
        logps, ref, calibrated = _answers(seed)
        satisfied = _random(6, seed=seed + 2) > 0
        raised = -_slope(crpg_loss(logps, ref, calibrated, satisfied, kl_max=1.0), logps)
        shaped = crpg_rewards(logps, ref, calibrated, satisfied, kl_max=1.0)
        if not satisfied.all() and (shaped > 0).any():
            assert raised[~satisfied].max() < raised[shaped > 0].min()
            assert raised[~satisfied].max() < 0

    def test_microbatches_add_up(self) -> None:
        logps, ref, calibrated = _answers()
        satisfied = torch.tensor([True, False, True, True, False, True])
        whole = crpg_loss(logps, ref, calibrated, satisfied, kl_max=3.0)
        centre = float(crpg_rewards(logps, ref, calibrated, satisfied, kl_max=3.0).mean())
        parts = [
            crpg_loss(logps[i], ref[i], calibrated[i], satisfied[i], kl_max=3.0, baseline=centre, normaliser=6).loss
            for i in (slice(2), slice(2, 6))
        ]
        torch.testing.assert_close(torch.autograd.grad(sum(parts), logps)[0], _slope(whole, logps))


class TestCODPO:
    #                         kept: best 2, worst violating 0 | none kept | all kept: 7 over 8 | all kept and equal
    REWARDS = torch.tensor([-9.0, -3, -2, 1, 2, 3, 0, 5, -4, 7, 7, 7])
    KEPT = torch.tensor([False, True, True, False, False, False, True, True, True, True, True, True])

    def test_pairs(self) -> None:
        chosen, rejected = codpo_pairs(self.REWARDS, self.KEPT, 3)
        assert chosen.tolist() == [2, 7]
        assert rejected.tolist() == [0, 8]
        # Also where a violation has the best reward, and where equals are told apart by the judges only.
        mixed = codpo_pairs(torch.tensor([5.0, -1, 5, 5]), torch.tensor([False, True, False, True]), 2)
        assert [x.tolist() for x in mixed] == [[1, 3], [0, 2]]

    def test_reduces_to_dpo_on_the_pair(self) -> None:
        logps, ref = (-4 + _random(2, 12)).unbind()
        logps.requires_grad_()
        lengths = torch.full((12,), 4)
        rewards = self.REWARDS.double()
        found = codpo_loss(logps, ref, lengths, rewards, self.KEPT, 3, beta=0.7, nll=0.0)
        rows = ([2, 7], [0, 8])
        pair = dpo_loss(*(x[i] for x in (logps, ref) for i in rows), beta=0.7)
        torch.testing.assert_close(found.loss, pair.losses.mean())
        torch.testing.assert_close(found.stats["margin"], (pair.chosen_rewards - pair.rejected_rewards).mean())
        assert int(found.stats["pairs"]) == 2
        default = codpo_loss(logps, ref, lengths, rewards, self.KEPT, 3)
        standard = dpo_loss(*(x[i] for x in (logps, ref) for i in rows)).losses.mean()
        torch.testing.assert_close(default.loss, standard - logps[[2, 7]].mean() / 4)

    def test_likelihood_is_per_token(self) -> None:
        logps, ref, rewards = _answers()
        kept = torch.tensor([False, True, False, False, True, True])  # an empty answer may be among the chosen
        rewards = torch.tensor([0.0, 1, 0, 0, 2, 1], dtype=torch.float64)
        with_nll, without = (
            codpo_loss(logps, ref, LENGTHS, rewards, kept, 3, nll=nll, normaliser=1.0) for nll in (0.5, 0.0)
        )
        slope = _slope(with_nll, logps) - _slope(without, logps)
        assert slope.tolist() == pytest.approx([0, -0.5, 0, 0, -0.5, 0])
        longer = LENGTHS.clone()
        longer[1] = 5
        slope = _slope(codpo_loss(logps, ref, longer, rewards, kept, 3, nll=0.5, normaliser=1.0), logps)
        assert float(slope[1] - _slope(without, logps)[1]) == pytest.approx(-0.1)

    def test_microbatches_and_no_pair_at_all(self) -> None:
        logps, ref, rewards = _answers()
        kept = torch.tensor([True, False, True, True, False, False])
        whole = codpo_loss(logps, ref, LENGTHS, rewards, kept, 3)
        assert int(whole.stats["pairs"]) == 2
        parts = [
            codpo_loss(logps[i], ref[i], LENGTHS[i], rewards[i], kept[i], 3, normaliser=2).loss
            for i in (slice(3), slice(3, 6))
        ]
        torch.testing.assert_close(torch.autograd.grad(sum(parts), logps)[0], _slope(whole, logps))
        none = codpo_loss(logps, ref, LENGTHS, rewards, ~YES, 3)
        assert none.loss.item() == 0
        assert (_slope(none, logps) == 0).all()
        assert int(none.stats["pairs"]) == 0
        assert float(none.stats["margin"]) == 0


class TestCRRAFT:
    def test_reduces_to_raft_without_violations(self) -> None:
        logps, ref, calibrated = _answers()
        found = crraft_loss(logps, ref, torch.ones_like(calibrated), YES, 3)
        raft = raft_loss(logps, torch.ones_like(calibrated), 3)
        torch.testing.assert_close(found.loss, raft.loss)
        assert int(found.stats["groups"]) == 2
        weighed = crraft_loss(logps, ref, calibrated, YES, 2)
        best = [2 * i + int(calibrated[2 * i + 1] > calibrated[2 * i]) for i in range(3)]
        expected = torch.zeros(6, dtype=torch.float64)
        expected[best] = -calibrated[best] / 3
        torch.testing.assert_close(_slope(weighed, logps), expected)
        free = calibrated.clone().requires_grad_()  # the reward model is not trained along
        assert torch.autograd.grad(crraft_loss(logps, ref, free, YES, 2).loss, free, allow_unused=True) == (None,)

    def test_only_what_is_admissible(self) -> None:
        ref = torch.full((9,), -4.0)
        logps = torch.tensor([-2.0, -3, -4, -1, -4, -4, -4, -4, -4]).requires_grad_()
        calibrated = torch.tensor([0.9, 0.6, 0.3, 0.9, 0.8, 0.8, 0.5, 0.7, 0.6])
        kept = torch.tensor([True, True, True, True, False, False, True, False, True])
        # The first drifted by 2 nats and the fourth by 3: of the groups one has an admissible answer at exactly K,
        # one has none, and one loses its best answer to a judge.
        found = crraft_loss(logps, ref, calibrated, kept, 3, kl_max=1.0)
        slope = _slope(found, logps)
        torch.testing.assert_close(slope, torch.tensor([0, -0.6, 0, 0, 0, 0, 0, 0, -0.6]) / 2)
        assert int(found.stats["groups"]) == 2
        parts = [
            crraft_loss(logps[i], ref[i], calibrated[i], kept[i], 3, kl_max=1.0, normaliser=2.0).loss
            for i in (slice(3), slice(3, 9))
        ]
        torch.testing.assert_close(sum(parts), found.loss)
        none = crraft_loss(logps, ref, calibrated, torch.zeros(9, dtype=torch.bool), 3)
        assert none.loss.item() == 0
        assert (_slope(none, logps) == 0).all()


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    x, good = torch.zeros(6), {"group_size": 3}
    calls = {
        "crpg": lambda **k: crpg_loss(**{"seq_logps": x, "ref_seq_logps": x, "calibrated": x, "satisfied": YES} | k),
        "crraft": lambda **k: crraft_loss(
            **{"seq_logps": x, "ref_seq_logps": x, "calibrated": x, "satisfied": YES} | good | k
        ),
        "codpo": lambda **k: codpo_loss(
            **{"seq_logps": x, "ref_seq_logps": x, "lengths": LENGTHS, "rewards": x, "satisfied": YES} | good | k
        ),
    }
    for name, call in calls.items():
        call()
        wrong = {"seq_logps": x / 0, "ref_seq_logps": x[:5], "satisfied": x, "normaliser": 0.0}
        wrong |= {"rewards" if name == "codpo" else "calibrated": x[:5]}
        wrong |= {"beta": 0.0, "nll": -1.0, "lengths": -LENGTHS} if name == "codpo" else {"kl_max": 0.0}
        wrong |= {} if name == "crpg" else {"group_size": 4}
        for argument, value in wrong.items():
            if name == "codpo" and argument == "normaliser":  # looked at also where there is no pair
                with pytest.raises(ValueError, match="normaliser"):
                    call(normaliser=0.0, satisfied=~YES)
            with pytest.raises(ValueError, match=argument):
                call(**{argument: value})
    with pytest.raises(ValueError, match="kl_max"):
        calls["crpg"](kl_max=math.nan)
    with pytest.raises(ValueError, match="lengths"):
        calls["codpo"](lengths=LENGTHS[:5])
    with pytest.raises(ValueError, match="group_size"):
        codpo_pairs(x, YES, 1)
    with pytest.raises(ValueError, match="baseline_rewards"):
        calibrated_rewards(x, x[:1])


def _bandit(method: str) -> Tensor:
    """What a softmax over five answers becomes: rewards rise, but the last one, of the highest reward, is forbidden."""
    generator = torch.Generator().manual_seed(0)
    rewards, known = torch.tensor([0.0, 0.5, 1.0, 1.5, 4.0]), torch.tensor(0.5)
    logits = torch.zeros(5, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        logps = logits.log_softmax(0)
        arms = torch.multinomial(logps.exp().detach(), 16, replacement=True, generator=generator)
        r, kept, ref = rewards[arms], arms != 4, torch.full((16,), -math.log(5))
        lengths, calibrated = torch.ones_like(arms), calibrated_rewards(r, known.expand(16))
        loss = {
            "rloo": lambda p, r=r: rloo_loss(p, r, 16),
            "crpg": lambda p, c=calibrated, f=ref, k=kept: crpg_loss(p, f, c, k),
            "codpo": lambda p, n=lengths, r=r, f=ref, k=kept: codpo_loss(p, f, n, r, k, 4),
            "crraft": lambda p, c=calibrated, f=ref, k=kept: crraft_loss(p, f, c, k, 4),
        }[method](logps[arms]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return logits.detach().softmax(0)


@pytest.mark.parametrize("method", ["rloo", "crpg", "codpo", "crraft"])
def test_an_exploit_that_the_judge_rejects(method: str) -> None:
    found = _bandit(method)
    if method == "rloo":
        assert found[4] > 0.95
    else:
        assert found[4] < 0.05
        assert found[3] > 0.5


PROMPTS = ["ab", "a longer one", "x"]


def _model(seed: int = 0) -> TinyLM:
    config = TinyLMConfig(d_model=16, layers=1, heads=2, kv_heads=1, hidden=16, tied=False)
    made = TinyLM(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.lm_head.weight.mul_(3)
    return made


def _letters(prompt: str, answer: str) -> float:
    """The number of small letters, and three for a digit, which is what a policy should not find out."""
    return float(sum(3 * c.isdigit() + c.islower() for c in answer))


def _task(**changes: object) -> CGPOTask:
    given = {"prompts": PROMPTS, "baselines": ["ok\n", "No.\n", "fine\n"], "reward": _letters}
    given |= {"judges": [lambda p, a: not any(map(str.isdigit, a))], "group_size": 8, "max_new_tokens": 5}
    given |= {"loss": lambda a: crpg_loss(a.seq_logps, a.ref_seq_logps, a.calibrated, a.satisfied)}
    return CGPOTask(**given | changes)  # type: ignore[arg-type]


def _trained(*tasks: CGPOTask, generator: torch.Generator, steps: int = 1) -> list[dict[str, float]]:
    policy, reference = _model(), _model().requires_grad_(False)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=2e-2)
    return list(train_cgpo(policy, reference, optimiser, tasks, steps=steps, generator=generator))


CONTRACT = {"train_cgpo": lambda: Sample(functools.partial(_trained, _task()))}


class TestTraining:
    def test_what_is_judged(self) -> None:
        policy, reference, task = _model(), _model(1).requires_grad_(False), _task(group_size=12)
        drawn = rollout(
            policy, PROMPTS, _letters, group_size=12, max_new_tokens=5, generator=torch.Generator().manual_seed(1)
        )
        judged = judge_rollouts(policy, reference, task, drawn)
        assert judged.group_size == 12
        assert 0 < judged.satisfied.sum() < 36
        assert judged.lengths.tolist() == drawn.mask.sum(1).tolist()
        for i in (0, 13, 35):
            assert bool(judged.satisfied[i]) == (not any(map(str.isdigit, drawn.answers[i])))
            known = _letters("", task.baselines[i // 12])
            odds = math.exp(_letters("", drawn.answers[i]) - known)
            assert float(judged.calibrated[i]) == pytest.approx(odds / (1 + odds), rel=1e-5)
            row = drawn.ids[i][drawn.real[i]][: len(PROMPTS[i // 12]) + int(judged.lengths[i])]
            for model, sums in ((policy, judged.seq_logps), (reference, judged.ref_seq_logps)):
                logps = model(row[None, :-1]).logits[0].log_softmax(-1)[torch.arange(len(row) - 1), row[1:]]
                torch.testing.assert_close(sums[i], logps[-int(judged.lengths[i]) :].sum(), atol=2e-5, rtol=1e-4)
        assert judged.seq_logps.requires_grad
        assert not judged.ref_seq_logps.requires_grad

    def test_the_judge_keeps_the_policy_from_the_exploit(self) -> None:
        logs, free = (
            _trained(task, generator=torch.Generator().manual_seed(0), steps=14) for task in (_task(), _task(judges=[]))
        )

        def mean(logs: list[dict[str, float]], name: str) -> float:
            return sum(log[f"0/{name}"] for log in logs) / len(logs)

        assert mean(free[-3:], "reward") > 5  # which five letters can't have without a digit
        assert mean(logs[-3:], "reward") > mean(logs[:3], "reward") + 0.5
        assert mean(logs[-3:], "satisfied") > mean(logs[:3], "satisfied")

    def test_tasks_are_added_up_by_their_weights(self) -> None:
        def constant(value: float) -> object:
            return lambda a: PolicyLoss(value + 0 * a.seq_logps.sum(), {"groups": torch.tensor(a.group_size)})

        tasks = (
            _task(loss=constant(3.0), weight=0.5),
            _task(loss=constant(5.0), weight=2.0, group_size=4, prompts=PROMPTS[:2], baselines=["a", "b"]),
        )
        (log,) = _trained(*tasks, generator=torch.Generator().manual_seed(0))
        assert log["loss"] == pytest.approx(11.5)
        assert log["0/groups"] == 8
        assert log["1/groups"] == 4
        assert {f"{i}/{name}" for i, name in itertools.product((0, 1), ("reward", "satisfied"))} <= log.keys()

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="tasks: expected at least one"):
            _trained(generator=torch.Generator())
        with pytest.raises(ValueError, match="baselines: expected one for each of 3 prompts, got 1"):
            _trained(_task(baselines=["a"]), generator=torch.Generator())
