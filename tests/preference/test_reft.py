import copy
import inspect
import math

import pytest
import torch
from torch import Tensor

from mlreviews.common.layers import linear
from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.preference import ReFT, answer_reward, chain_loss, completion_logps, reinforce_loss
from mlreviews.preference.losses import masked_sum
from tests.preference.models import Bigram

QUESTIONS = ["1+2=", "7=", "30+4="]


def _policy(seed: int = 0) -> TinyLM:
    config = TinyLMConfig(d_model=16, layers=1, heads=2, hidden=16, tied=False)
    made = TinyLM(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.lm_head.weight.mul_(4)
    return made


def _reft(**options) -> ReFT:  # type: ignore[no-untyped-def]
    """With a reference that is another model, and rewards that differ between chains."""
    given = {"max_new_tokens": 5, "stop": "A"} | options
    head = linear(16, 1, generator=torch.Generator().manual_seed(3))
    made = ReFT(_policy(), head, lambda question, chain: len(question) + 0.1 * sum(map(ord, chain)), **given)
    made.reference = _policy(1).requires_grad_(False)
    return made


def _logps(model: TinyLM, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Of each token but the first, of one row without padding."""
    logits = model(ids[None, :-1]).logits[0] / temperature
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


def _grads(loss: Tensor, of: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, of, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(of, found, strict=True)]


class TestReward:
    def test_right_wrong_and_none(self) -> None:
        reward = answer_reward(lambda chain: chain.split("=")[-1] or None, {"q": "3", "p": "4"}.__getitem__)
        assert [reward("q", chain) for chain in ("1+2=3", "1+2=4", "1+2=")] == [1.0, 0.1, 0.0]
        assert reward("p", "1+2=4") == 1.0
        assert answer_reward(lambda chain: 0, lambda question: 1, partial=0.0)("q", "") == 0.0

    @pytest.mark.parametrize("partial", [-0.1, 1.0, math.nan])
    def test_bad_partial_reward(self, partial: float) -> None:
        with pytest.raises(ValueError, match="partial: expected"):
            answer_reward(str, str, partial=partial)


def test_supervised_loss_is_summed_over_the_tokens_of_chains_alone() -> None:
    policy, chains = _policy(), ["3\n", "seven", "3\n4"]
    rows = [
        _logps(policy, torch.tensor(list((q + c).encode())))[-len(c) :].sum()
        for q, c in zip(QUESTIONS, chains, strict=True)
    ]
    torch.testing.assert_close(chain_loss(policy, QUESTIONS, chains), -sum(rows) / 3)


class TestExperience:
    @pytest.mark.parametrize(("gamma", "lam"), [(0.9, 1.0), (0.9, 0.0), (0.8, 0.6)])
    def test_rewards_advantages_and_returns_of_each_chain_by_itself(self, gamma: float, lam: float) -> None:
        reft = _reft(beta=0.3, gamma=gamma, lam=lam, normalise=False, temperature=0.7)
        found = reft.collect(QUESTIONS, group_size=2, generator=torch.Generator().manual_seed(0))
        drawn = found.drawn
        assert len(drawn.answers) == 6
        for i, answer in enumerate(drawn.answers):
            question = QUESTIONS[i // 2]
            new = drawn.ids[i][drawn.mask[i]]
            row, length = torch.cat([torch.tensor(list(question.encode())), new]), len(new)
            with torch.no_grad():
                ratio = (_logps(reft.policy, row, 0.7) - _logps(reft.reference, row, 0.7))[-length:]
                states = reft.policy(row[None, :-1], hidden_states=True).hidden_states[-1]
                values = [*reft.value_head(states)[0, -length:, 0].tolist(), 0.0]  # 0 at the end
            rewards = (-0.3 * ratio).tolist()
            rewards[-1] += len(question) + 0.1 * sum(map(ord, answer))
            errors = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
            if lam == 0:
                wanted = errors
            elif lam == 1:  # discounted return minus value
                wanted = [
                    sum(gamma ** (k - t) * rewards[k] for k in range(t, length)) - values[t] for t in range(length)
                ]
            else:
                wanted = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length)) for t in range(length)]
            here = drawn.labels_mask[i]
            torch.testing.assert_close(found.advantages[i][here], torch.tensor(wanted), atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(found.values[i][here], torch.tensor(values[:-1]), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.divergence[i], ratio.sum(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.returns, torch.where(drawn.labels_mask, found.advantages + found.values, 0.0))

    def test_normalised_over_the_batch_by_default(self) -> None:
        found = _reft().collect(QUESTIONS, generator=torch.Generator().manual_seed(0))
        tokens = found.advantages[found.drawn.labels_mask]
        assert len(found.drawn.answers) == 3
        assert abs(float(tokens.mean())) < 1e-5
        assert float(tokens.std(correction=0)) == pytest.approx(1, rel=1e-4)


class TestLoss:
    def test_reduces_to_reinforce_at_the_first_update(self) -> None:
        reft = _reft(beta=0.0, lam=1.0, normalise=False)
        torch.nn.init.zeros_(reft.value_head.weight)
        torch.nn.init.zeros_(reft.value_head.bias)
        found = reft.collect(QUESTIONS, generator=torch.Generator().manual_seed(0))
        mask, weights = found.drawn.labels_mask, list(reft.policy.parameters())
        plain = reinforce_loss(
            masked_sum(completion_logps(reft.policy, found.drawn), mask),
            found.drawn.rewards,
            normaliser=int(mask.sum()),
        ).loss
        # a value head of zeros has no gradient for the states that it reads
        for ours, theirs in zip(_grads(reft.loss(found).loss, weights), _grads(plain, weights), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5 + 1e-4 * float(theirs.abs().max()), rtol=1e-4)

    def test_where_the_clip_acts_the_policy_gets_nothing(self) -> None:
        reft = _reft(value_weight=0.0)
        found = reft.collect(QUESTIONS, generator=torch.Generator().manual_seed(0))
        drawn = found.drawn
        for shift, advantage, moves in ((-0.3, 1.0, False), (-0.3, -1.0, True), (0.3, -1.0, False), (0.3, 1.0, True)):
            old = torch.where(drawn.labels_mask, drawn.logp_old + shift, 0.0)
            there = found._replace(
                drawn=drawn._replace(logp_old=old), advantages=torch.where(drawn.labels_mask, advantage, 0.0)
            )
            loss, stats = reft.loss(there)
            assert any(bool(g.any()) for g in _grads(loss, list(reft.policy.parameters()))) == moves
            assert float(stats["clip_fraction"]) == float(not moves)

    def test_values_are_learnt_through_head_and_policy(self) -> None:
        reft = _reft(temperature=0.7)
        found = reft.collect(QUESTIONS, generator=torch.Generator().manual_seed(0))
        mask = found.drawn.labels_mask
        still = found._replace(advantages=torch.zeros_like(found.advantages))
        loss, stats = reft.loss(still)
        errors = (found.values - found.returns)[mask]
        torch.testing.assert_close(loss, 5 * 0.5 * errors.square().mean())
        (slope,) = _grads(loss, [reft.value_head.bias])
        torch.testing.assert_close(slope[0], 5 * errors.mean())
        assert all(bool(g.any()) for g in _grads(loss, [reft.policy.embed_tokens.weight]))
        assert not any(bool(g.any()) for g in _grads(loss, [reft.policy.lm_head.weight]))
        torch.testing.assert_close(stats["reward"], found.drawn.rewards.mean())
        torch.testing.assert_close(stats["reference_kl"], found.divergence.mean())
        reft.clip = 1e-9  # values that have moved towards the return stop
        moved = still._replace(values=found.values - 0.1 * (found.returns - found.values).sign() * mask)
        assert not any(bool(g.any()) for g in _grads(reft.loss(moved).loss, [reft.value_head.bias]))


class TestStages:
    def _learner(self) -> ReFT:
        head = linear(8, 1, generator=torch.Generator().manual_seed(3))
        right = {"p": "a", "q": "b"}.__getitem__
        reward = answer_reward(lambda chain: chain[0] if chain[:1] in ("a", "b") else None, right)
        return ReFT(Bigram(), head, reward, max_new_tokens=2, beta=0.0)

    def test_warm_up_then_reinforcement_from_answers_alone(self) -> None:
        reft, generator = self._learner(), torch.Generator().manual_seed(0)
        questions, chains = ["p", "q", "p", "q"], ["a\n", "a\n", "b\n", "b\n"]  # half of the annotations are wrong
        start = copy.deepcopy(reft.policy.state_dict())
        optimiser = torch.optim.AdamW(reft.parameters(), lr=0.1)
        logs = list(reft.warm_up(optimiser, questions, chains, steps=40, batch_size=3, generator=generator))
        assert [log["step"] for log in logs] == list(range(1, 41))
        assert logs[-1]["loss"] < 2 < logs[0]["loss"]
        after = reft.policy.state_dict()
        assert not torch.equal(after["lm_head.weight"], start["lm_head.weight"])
        assert torch.equal(reft.reference.state_dict()["lm_head.weight"], after["lm_head.weight"])
        assert not any(p.requires_grad for p in reft.reference.parameters())
        right = [0, 0]
        frozen = copy.deepcopy(reft.reference.state_dict())
        for i, steps in enumerate((1, 25)):
            steps_taken = list(
                reft.reinforce(
                    torch.optim.AdamW(reft.parameters(), lr=2e-2),
                    ["p", "q"],
                    steps=steps,
                    group_size=8,
                    generator=generator,
                )
            )
            right[i] = float(reft.collect(["p", "q"], group_size=50, generator=generator).drawn.rewards.eq(1).sum())
        assert right[0] < 70 < 95 < right[1]
        assert len(steps_taken) == 25
        assert steps_taken[-1]["reward"] > 0.9
        assert steps_taken[-1]["reference_kl"] > 0.3  # two coins that have become certain: ln 2 a chain
        for name, tensor in frozen.items():
            assert torch.equal(reft.reference.state_dict()[name], tensor)

    def test_reduces_to_supervised_fine_tuning_without_reinforcement(self) -> None:
        reft, chains = self._learner(), ["a\n", "b\n"]
        other = copy.deepcopy(reft.policy)
        for _ in reft.warm_up(
            torch.optim.SGD(reft.parameters(), lr=0.01), ["p", "q"], chains, steps=3, generator=torch.Generator()
        ):
            loss = chain_loss(other, ["p", "q"], chains)
            grads = torch.autograd.grad(loss, list(other.parameters()))
            norm = torch.stack([g.norm() for g in grads]).norm().clamp(min=1)
            with torch.no_grad():
                for p, g in zip(other.parameters(), grads, strict=True):
                    p -= 0.01 * g / norm
        for ours, theirs in zip(reft.policy.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    def test_batches_updates_and_checkpoint(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        runs = []
        for stops in ((4,), (2, 4)):
            torch.manual_seed(sum(stops))
            path = tmp_path / str(stops) / "run.pt"
            for steps in stops:
                reft = self._learner()
                seen = []
                reft.reward = lambda question, chain, seen=seen: seen.append(question) or 0.5
                optimiser = torch.optim.SGD(reft.parameters(), lr=0.1)
                logs = list(
                    reft.reinforce(
                        optimiser, ["p", "q", "r"], steps=steps, batch_size=2, group_size=3, updates=1,
                        generator=torch.Generator().manual_seed(5), checkpoint=path,
                    )
                )  # fmt: skip
            runs.append(reft)
        assert [log["step"] for log in logs] == [3, 4]
        assert len(seen) == 2 * 2 * 3
        assert len(set(seen[:6])) == 2
        for ours, theirs in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_defaults_are_the_papers() -> None:
    reft = ReFT(_policy(), linear(16, 1), lambda question, chain: 0.0, 3)
    assert (reft.beta, reft.gamma, reft.lam, reft.clip, reft.value_weight) == (0.05, 1.0, 0.95, 0.2, 5.0)
    assert (reft.normalise, reft.temperature, reft.stop) == (True, 1.0, "\n")
    for method, sizes in ((ReFT.warm_up, {"batch_size": 48}), (ReFT.reinforce, {"group_size": 1, "updates": 2})):
        given = inspect.signature(method).parameters
        assert {name: given[name].default for name in sizes} == sizes
    assert torch.equal(reft.reference.lm_head.weight, reft.policy.lm_head.weight)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", -0.1),
        ("gamma", 1.1),
        ("lam", -0.1),
        ("clip", 0.0),
        ("value_weight", -1.0),
        ("max_new_tokens", 0),
    ],
)
def test_bad_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        _reft(**{name: value})


@pytest.mark.usefixtures("unchecked")
def test_other_bad_input() -> None:
    with pytest.raises(TypeError, match=r"policy: expected an nn\.Module, got object"):
        ReFT(object(), linear(16, 1), lambda question, chain: 0.0, 3)
    steps = _reft().reinforce(
        torch.optim.SGD(_policy().parameters()), QUESTIONS, steps=1, batch_size=0, generator=torch.Generator()
    )
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        next(steps)
    with pytest.raises(ValueError, match="answers: expected one for each"):
        chain_loss(_policy(), QUESTIONS, ["a"])
