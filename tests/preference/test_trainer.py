import itertools

import pytest
import torch

from mlreviews.models import TinyLM, TinyLMConfig
from mlreviews.preference import (
    PolicyLoss,
    completion_logps,
    dpo_loss,
    group_advantages,
    grpo_loss,
    pair_logps,
    prepare,
    rollout,
    train,
)

PROMPTS = ["ab", "a longer one", "x"]


def model(seed: int = 0) -> TinyLM:
    config = TinyLMConfig(d_model=16, layers=2, heads=2, kv_heads=1, hidden=16, tied=False)
    made = TinyLM(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.lm_head.weight.mul_(3)
    return made


def draw(policy, generator, **options):
    given = {"group_size": 4, "max_new_tokens": 6, "temperature": 0.7, "stop": "\x41"} | options
    return rollout(policy, PROMPTS, lambda prompt, answer: len(answer), generator=generator, **given)


def by_hand(policy, ids, temperature=1.0):
    """Log-probability of each token but the first, of one row by itself."""
    logits = policy(ids[None, :-1]).logits[0] / temperature
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]


def test_rollouts_hold_what_was_drawn() -> None:
    policy = model()
    drawn = draw(policy, torch.Generator().manual_seed(0), max_new_tokens=40)
    stop = int(drawn.ids[drawn.mask & (drawn.ids < 128)].mode().values)  # one that occurs
    drawn = draw(policy, torch.Generator().manual_seed(0), max_new_tokens=40, stop=chr(stop))
    assert drawn.ids.shape[0] == 12
    assert drawn.rewards.dtype == torch.float32  # also where a reward counts in whole numbers
    lengths = drawn.mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    for i in range(12):
        prompt = drawn.ids[i][drawn.real[i] & ~drawn.mask[i]][: len(PROMPTS[i // 4])]
        assert bytes(prompt.tolist()).decode() == PROMPTS[i // 4]
        new = drawn.ids[i][drawn.mask[i]]
        assert stop not in new[:-1].tolist()  # the stop token ends an answer, and belongs to it
        assert len(new) == 40 or int(new[-1]) == stop
        assert float(drawn.rewards[i]) == len(drawn.answers[i])
        # without padding, and at the temperature that it was drawn at
        row = torch.cat([prompt, new])
        torch.testing.assert_close(
            drawn.logp_old[i][drawn.labels_mask[i]], by_hand(policy, row, 0.7)[-len(new) :], atol=2e-5, rtol=1e-4
        )
    assert not drawn.logp_old[~drawn.labels_mask].any()


def test_prompts_alone_have_no_tokens_of_answers() -> None:
    ids, real, mask = prepare(PROMPTS)
    assert real.sum(1).tolist() == [len(prompt) for prompt in PROMPTS]
    assert real[:, -1].all()  # padded on the left
    assert mask.shape == ids.shape
    assert not mask.any()


def test_the_ratio_is_one_on_policy() -> None:
    policy = model()
    drawn = draw(policy, torch.Generator().manual_seed(1))
    # with gradient another form of attention runs, so the last bits differ
    torch.testing.assert_close(completion_logps(policy, drawn), drawn.logp_old, atol=2e-6, rtol=1e-6)
    assert not torch.allclose(completion_logps(policy, drawn, temperature=1.0), drawn.logp_old)


def test_drawing_follows_the_policy() -> None:
    policy = model(3)
    drawn = rollout(
        policy, ["q"], lambda p, a: 0.0, group_size=4000, max_new_tokens=1, generator=torch.Generator().manual_seed(0)
    )
    p = by_hand_distribution(policy)
    counts = torch.bincount(drawn.ids[:, 1], minlength=259) / 4000
    # total variation of 4,000 draws: half the sum of the binomial deviations' means, plus five deviations of it
    expected = 0.5 * (2 / torch.pi * p * (1 - p) / 4000).sqrt().sum()
    assert 0.5 * (counts - p).abs().sum() < expected + 5 * (0.25 / 4000) ** 0.5


def by_hand_distribution(policy):
    with torch.no_grad():
        return policy(torch.tensor([[ord("q")]])).logits[0, -1].softmax(-1)


def test_pairs_are_summed_without_prompt_and_padding() -> None:
    policy = model()
    chosen, rejected = ["yes\n", "no", "z"], ["a", "bcd\n", "ef"]
    found = pair_logps(policy, PROMPTS, chosen, rejected)
    for side, answers in zip(found, (chosen, rejected), strict=True):
        for i, answer in enumerate(answers):
            ids = torch.tensor(list((PROMPTS[i] + answer).encode()))
            torch.testing.assert_close(side[i], by_hand(policy, ids)[-len(answer) :].sum(), atol=2e-5, rtol=1e-4)


def losses():
    def grpo(policy):
        def loss(drawn):
            advantages = group_advantages(drawn.rewards, 4)
            return grpo_loss(completion_logps(policy, drawn), drawn.logp_old, drawn.labels_mask, advantages)

        return lambda g: draw(policy, g), loss, 2

    def dpo(policy):
        reference = model(5).requires_grad_(False)
        pairs = list(itertools.permutations(["one\n", "two\n", "three\n"], 2))

        def some(generator):
            at = torch.randint(len(pairs), (3,), generator=generator).tolist()
            return [pairs[i] for i in at]

        def loss(batch):
            sides = zip(*batch, strict=True)
            chosen, rejected = map(list, sides)
            found = pair_logps(policy, PROMPTS, chosen, rejected)
            return dpo_loss(*found, *pair_logps(reference, PROMPTS, chosen, rejected)).losses.mean()

        return some, loss, 1

    return {"grpo": grpo, "dpo": dpo}


@pytest.mark.parametrize("name", losses())
def test_a_killed_run_goes_on_with_the_same_bits(name: str, tmp_path) -> None:
    def run(path, stop=None):
        policy = model()
        optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        some, loss, updates = losses()[name](policy)
        generator = torch.Generator().manual_seed(7)
        steps = train(policy, optimiser, some, loss, steps=5, generator=generator, updates=updates, checkpoint=path)
        return policy, list(itertools.islice(steps, stop))

    whole, logs = run(None)
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 5]
    assert not torch.equal(whole.lm_head.weight, model().lm_head.weight)
    path = tmp_path / "new" / "folder" / "run.pt"
    run(path, stop=3)
    policy, rest = run(path)
    assert [log["step"] for log in rest] == [4, 5]
    assert rest == logs[3:]
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), whole.parameters(), strict=True))


def test_reinforcement_finds_what_is_rewarded() -> None:
    policy = model()
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-2)

    def share(prompt, answer):
        return answer.count("e") / max(len(answer), 1)

    def some(generator):
        return rollout(policy, PROMPTS, share, group_size=16, max_new_tokens=5, generator=generator)

    def loss(drawn):
        rewards.append(float(drawn.rewards.mean()))
        advantages = group_advantages(drawn.rewards, 16)
        return grpo_loss(completion_logps(policy, drawn), drawn.logp_old, drawn.labels_mask, advantages)

    rewards: list[float] = []
    for _ in train(policy, optimiser, some, loss, steps=25, generator=torch.Generator().manual_seed(0)):
        pass
    assert rewards[-1] > rewards[0] + 0.5


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.3}])
def test_gradients_are_clipped_and_what_the_loss_logs_is_logged(options) -> None:
    policy = model()
    weight, before = policy.lm_head.weight, policy.lm_head.weight.detach().clone()
    optimiser = torch.optim.SGD([weight], lr=1.0)

    def loss(batch):
        return PolicyLoss(100 * weight.sum(), {"batch": torch.tensor(batch)})

    (log,) = train(policy, optimiser, lambda g: 7.0, loss, steps=1, generator=torch.Generator(), **options)
    assert log["gradient_norm"] == pytest.approx(100 * weight.numel() ** 0.5, rel=1e-4)
    assert (log["batch"], log["loss"]) == (7.0, pytest.approx(100 * float(before.sum()), rel=1e-3, abs=1e-2))
    assert float((weight.detach() - before).norm()) == pytest.approx(options.get("max_norm", 1.0), rel=1e-4)


def test_what_is_not_finite_changes_nothing() -> None:
    policy = model()
    optimiser = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = policy.lm_head.weight.clone()
    steps = train(
        policy,
        optimiser,
        lambda g: None,
        lambda _: policy.lm_head.weight.sum() * float("nan"),
        steps=1,
        generator=torch.Generator(),
    )
    with pytest.raises(FloatingPointError, match="loss"):
        next(steps)
    assert torch.equal(policy.lm_head.weight, before)


def test_bad_input(unchecked) -> None:
    policy = model()
    for options, name in (
        ({"stop": "ab"}, "stop"),
        ({"group_size": 0}, "group_size"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=name):
            draw(policy, None, **options)
    with pytest.raises(ValueError, match="prompts"):
        prepare(["a", ""])
    with pytest.raises(ValueError, match="answers"):
        prepare(["a"], ["b", "c"])
