import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mlreviews.decoding import (
    Cascade,
    Draft,
    PromptLookup,
    acceptance_probability,
    expected_speedup,
    expected_tokens,
    speculative_generate,
    speculative_verify,
)
from mlreviews.decoding.drafters import Previous, Reader
from mlreviews.models import Sampler, TinyLM, TinyLMConfig, draw, from_transformers, generate
from tests.contracts.families import Sample
from tests.decoding.models import TableLM, assert_same_law, exact_law, law_of_chain


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _laws(*shape: int, seed: int = 0) -> Tensor:
    return (1.5 * torch.randn(*shape, generator=_rng(seed))).softmax(-1)


def _tiny(seed: int = 0, vocab: int = 11) -> TinyLM:
    config = TinyLMConfig(vocab_size=vocab, d_model=16, layers=2, heads=4, kv_heads=2)
    model = TinyLM(config, generator=_rng(seed)).double()
    for parameter in model.parameters():
        parameter.data.mul_(2)  # tokens matter to each other
    return model


TARGET = TableLM.random(3, 0)
DRAFT = TableLM.random(3, 1, near=TARGET, distance=1.0)

CONTRACT = {
    "speculative_verify": lambda: Sample(
        speculative_verify, (_laws(9, 4, 5), _laws(9, 3, 5, seed=1), torch.arange(27).reshape(9, 3) % 5)
    ),
    "speculative_generate": lambda: Sample(
        speculative_generate, (TARGET, DRAFT, torch.tensor([[0, 1], [2, 0]]), 12), {"sampler": Sampler(1.0)}
    ),
}


@pytest.mark.parametrize("length", [1, 2])
def test_verified_drafts_have_the_target_s_law(length: int) -> None:
    p, q = _laws(length + 1, 4), _laws(length, 4, seed=1)

    def run() -> list[int]:
        drafted = draw(q)
        accepted, following = speculative_verify(p, q, drafted)
        return [*drafted[: int(accepted)].tolist(), int(following)]

    found = exact_law(run)
    # the first token's law is p_1 whatever q; that of the next p_2 and so on, wherever there is a next
    expected: dict[Any, float] = {}
    overlap, missing = torch.minimum(p[:-1], q), (p[:-1] - q).clamp(min=0)
    for count in range(length + 1):
        for tokens in itertools.product(range(4), repeat=count + 1):
            chance = math.prod(float(overlap[i, tokens[i]]) for i in range(count))
            expected[tokens] = chance * float((p[-1] if count == length else missing[count])[tokens[-1]])
    assert_same_law(found, expected)
    first = [sum(w for tokens, w in found.items() if tokens[0] == x) for x in range(4)]
    torch.testing.assert_close(torch.tensor(first), p[0], atol=1e-5, rtol=1e-5)
    accepted = sum(w for tokens, w in found.items() if len(tokens) > 1)
    assert abs(accepted - float(acceptance_probability(p[0], q[0]))) < 1e-5


def test_certain_drafts_are_accepted_with_the_target_s_probability() -> None:
    p, drafted = _laws(3, 4), torch.tensor([2, 0])

    def run() -> list[int]:
        accepted, following = speculative_verify(p, None, drafted)
        return [*drafted[: int(accepted)].tolist(), int(following)]

    expected: dict[Any, float] = {(x,): float(p[0, x]) for x in (0, 1, 3)}
    expected |= {(2, x): float(p[0, 2] * p[1, x]) for x in (1, 2, 3)}
    expected |= {(2, 0, x): float(p[0, 2] * p[1, 0] * p[2, x]) for x in range(4)}
    assert_same_law(exact_law(run), expected)
    # the same as a distribution that has everything in one place
    certain = torch.eye(4)[drafted]
    for seed in range(5):
        pair = [speculative_verify(p, q, drafted, _rng(seed)) for q in (None, certain)]
        assert pair[0] == pair[1]


@pytest.mark.parametrize("rejected", range(4))
def test_every_place_of_the_rejection(rejected: int) -> None:
    drafted, best = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3, 4])
    best[rejected] = 0
    p, q = torch.eye(5)[best], torch.full((3, 5), 0.2)
    accepted, following = speculative_verify(p, q, drafted, _rng())
    assert (int(accepted), int(following)) == (rejected, 0)
    p, q = p.expand(2, 4, 5), q.expand(2, 3, 5)
    offered = torch.tensor([3, 1])
    accepted, following = speculative_verify(p, q, drafted.expand(2, 3), _rng(), offered)
    # of the second row one token counts: the one after it is the target's own
    assert accepted.tolist() == [rejected, min(rejected, 1)]
    assert following.tolist() == [0, int(best[min(rejected, 1)])]


def test_where_fewer_tokens_count_the_next_one_is_drawn_from_p() -> None:
    p, q, drafted = _laws(1, 3, 4), _laws(1, 2, 4, seed=1), torch.tensor([[0, 1]])
    found = exact_law(lambda: speculative_verify(p, q, drafted, None, torch.tensor([0]))[1])
    assert_same_law(found, {(x,): float(p[0, 0, x]) for x in range(4)})
    nothing = speculative_verify(p[:, :1], None, drafted[:, :0], _rng())
    assert nothing[0].tolist() == [0]


def test_rounding_leaves_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    monkeypatch.setattr(torch, "bernoulli", lambda chance, **_: torch.zeros_like(chance))
    assert [int(x) for x in speculative_verify(p, p[:1], torch.tensor([1]))] == [0, 1]


def test_the_law_stays_with_any_settings_of_the_sampler() -> None:
    ids = torch.tensor([[0, 2]])
    for sampler, draft, length in (
        (Sampler(0.7), DRAFT, 1),
        (Sampler(1.0, top_k=2), DRAFT, 2),
        (Sampler(1.2, top_p=0.7), DRAFT, 2),
        (Sampler(1.0, min_p=0.3, repetition_penalty=1.8), DRAFT, 2),
        (Sampler(1.0, top_p=0.9), PromptLookup(2, 1), 2),
        (Sampler(1.0, repetition_penalty=0.6), PromptLookup(1, 1), 2),
        (Sampler(0.9, repetition_penalty=1.2), Cascade(PromptLookup(1, 1), DRAFT, 1), 2),
    ):

        def run(sampler: Sampler = sampler, draft: Any = draft, length: int = length) -> Tensor:
            options: dict[str, Any] = {"sampler": sampler, "draft_length": length, "stop_tokens": [1]}
            return speculative_generate(TARGET, draft, ids, 3, **options).row(0)[None]

        assert_same_law(exact_law(run), law_of_chain(TARGET, ids, 3, sampler, stop=1))


def test_rows_of_a_batch_are_independent() -> None:
    ids, mask = torch.tensor([[1, 0], [2, 2]]), torch.tensor([[True, True], [False, True]])
    sampler = Sampler(0.8, top_k=2)
    found = exact_law(
        lambda: speculative_generate(TARGET, DRAFT, ids, 2, mask=mask, sampler=sampler, draft_length=1).tokens
    )
    laws = [law_of_chain(TARGET, prompt, 2, sampler) for prompt in (ids[:1], ids[1:, 1:])]
    expected = {(a[0], b[0]): v * w for a, v in laws[0].items() for b, w in laws[1].items()}
    assert_same_law(found, expected)


def test_a_cascade_drafts_row_by_row() -> None:
    """The n-gram (1) is known in the first row alone, whose draft is longer, and certain."""
    ids, sampler = torch.tensor([[1, 1], [0, 2]]), Sampler(0.8, top_k=2)
    cascade = Cascade(PromptLookup(1, 1), DRAFT, 1)
    found = exact_law(lambda: speculative_generate(TARGET, cascade, ids, 2, sampler=sampler).tokens)
    laws = [law_of_chain(TARGET, prompt, 2, sampler) for prompt in (ids[:1], ids[1:])]
    assert_same_law(found, {(a[0], b[0]): v * w for a, v in laws[0].items() for b, w in laws[1].items()})
    draft = cascade.begin(ids, None, sampler, _rng()).propose(3)
    assert draft.counts.tolist() == [3, 1]
    assert draft.tokens[0].tolist() == [1, 1, 1]
    assert draft.q is not None
    torch.testing.assert_close(draft.q[0], torch.eye(3)[1].expand(3, 3))
    torch.testing.assert_close(draft.q[1, 0], sampler.probabilities(DRAFT(ids).logits[1, 1]))


def test_a_cascade_asks_the_second_drafter_where_the_first_has_nothing() -> None:
    """Of a text that repeats itself the lookup drafts all but the first steps; the model then reads what it missed."""
    target, draft = _tiny(), _tiny()
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1]])
    calls: list[int] = []
    forward = draft.forward
    draft.forward = lambda *args, **options: calls.append(args[0].shape[1]) or forward(*args, **options)  # type: ignore
    result = speculative_generate(target, Cascade(PromptLookup(4, 3), draft, 2), ids, 30, draft_length=4)
    assert result.tokens.equal(generate(target, ids, 30).tokens)
    assert result.drafted is not None
    assert result.accepted is not None
    by_model = result.drafted[:, 0] == 2
    assert bool((result.drafted[:-2, 0][~by_model[:-2]] == 4).all())
    # the model is the target here: what it drafts is taken, which it could not be, had it missed a token
    assert bool((result.accepted[by_model] == 2).all())
    assert 0 < len(calls) <= 2 * int(by_model.sum())
    assert max(calls[1:]) > 2, "it was not asked for a step or more, then caught up"


def test_many_draws_have_the_law_of_the_chain() -> None:
    """Several steps with uneven acceptance in one batch; the chains are too long to enumerate the draws."""
    target, count = TableLM.random(4, 5), 3000
    draft = TableLM.random(4, 6, near=target, distance=1.5)
    ids = torch.tensor([[3, 1]])
    found = speculative_generate(target, draft, ids.expand(count, 2), 4, sampler=Sampler(1.0), generator=_rng(1))
    law = law_of_chain(target, ids, 4, Sampler(1.0))
    for place in range(4):
        expected = torch.zeros(4, dtype=torch.float64)
        for (tokens,), weight in law.items():
            expected[tokens[place]] += weight
        observed = found.tokens[:, place].bincount(minlength=4)
        chi_square = ((observed - count * expected) ** 2 / (count * expected)).sum()
        assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand


@pytest.mark.parametrize(("kind", "length"), [("near", 3), ("far", 1), ("far", 8), ("lookup", 3), ("cascade", 3)])
def test_greedy_is_plain_greedy(kind: str, length: int) -> None:
    target = _tiny()
    near = _tiny()
    for parameter in near.parameters():
        parameter.data.add_(0.03 * torch.randn(parameter.shape, generator=_rng(4)))
    cascade = Cascade(PromptLookup(4, 2), near, 2)
    draft: Any = {"near": near, "far": _tiny(7), "lookup": PromptLookup(4, 1), "cascade": cascade}[kind]
    ids = torch.randint(11, (4, 7), generator=_rng(3))
    mask = torch.arange(7) >= torch.tensor([0, 2, 5, 6])[:, None]
    stop = int(generate(target, ids, 5, mask=mask).tokens[2, 4])
    settings: list[dict[str, Any]] = [{"stop_tokens": [stop], "pad": 99}, {"sampler": Sampler(repetition_penalty=1.5)}]
    for options in settings:
        expected = generate(target, ids, 17, mask=mask, **options)
        found = speculative_generate(target, draft, ids, 17, mask=mask, draft_length=length, **options)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.lengths.tolist() == expected.lengths.tolist()
        assert found.target_calls <= expected.target_calls
        assert found.accepted is not None
        assert found.drafted is not None
        assert bool((found.accepted <= found.drafted).all())
        # every step yields what it accepted and one token more
        steps = (found.accepted >= 0).sum(0)
        whole = found.accepted.clamp(min=0).sum(0) + steps
        assert bool((whole >= found.lengths).all())
        assert bool((whole <= found.lengths + 1).all())
        assert (found.accepted < 0).equal(found.drafted < 0)


def test_a_context_that_is_just_long_enough() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=7, n_positions=12, n_embd=8, n_layer=1, n_head=2)
        config.bos_token_id = config.eos_token_id = None
        models = [from_transformers(GPT2LMHeadModel(config)) for _ in range(2)]
    for model in models:
        model.eval().double()
        for parameter in model.parameters():
            parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=_rng(1)))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    stop = int(generate(models[0], ids, 9).tokens[0, 1])
    options: dict[str, Any] = {"stop_tokens": [stop]}
    found = speculative_generate(models[0], models[1], ids, 9, draft_length=4, **options)
    assert found.tokens.tolist() == generate(models[0], ids, 9, **options).tokens.tolist()
    assert found.lengths[0] < found.lengths[1]  # the first row ran on idle


@pytest.mark.parametrize("batch", [1, 2])
def test_the_target_as_its_own_draft_has_everything_accepted(batch: int) -> None:
    ids = torch.tensor([[0, 1], [2, 1]])[:batch]
    for sampler in (Sampler(), Sampler(1.0), Sampler(1.0, repetition_penalty=2.0)):
        found = speculative_generate(TARGET, TARGET, ids, 12, draft_length=3, sampler=sampler, generator=_rng())
        assert (found.target_calls, found.tokens_per_call, found.acceptance_rate) == (3, 4.0, 1.0)
        assert found.accepted is not None
        assert found.accepted.tolist() == [[3] * batch] * 3


def test_budgets_and_calls() -> None:
    ids = torch.tensor([[0, 1]])
    for budget in range(7):
        TARGET.calls = DRAFT.calls = 0
        found = speculative_generate(TARGET, TARGET, ids, budget, draft_length=3)
        assert (found.lengths.tolist(), found.target_calls) == ([budget], -(-budget // 4))
        assert found.drafted is not None
        assert found.drafted.sum() == budget - found.target_calls  # never more than there is room for


def test_reduces_to_plain_decoding() -> None:
    ids = torch.tensor([[0, 1], [1, 1]])
    options: dict[str, Any] = {"sampler": Sampler(1.0), "generator": _rng(2)}
    found = speculative_generate(TARGET, DRAFT, ids, 1, **options)
    assert found.tokens.equal(generate(TARGET, ids, 1, sampler=Sampler(1.0), generator=_rng(2)).tokens)
    lone = PromptLookup(9, 9)  # finds nothing
    options["generator"] = _rng(2)
    found = speculative_generate(TARGET, lone, ids, 6, **options)
    assert found.tokens.equal(generate(TARGET, ids, 6, sampler=Sampler(1.0), generator=_rng(2)).tokens)
    assert found.target_calls == 6


@torch.no_grad()
def test_a_cache_after_a_rollback_is_a_fresh_one() -> None:
    model, ids = _tiny(), torch.randint(11, (2, 9), generator=_rng(3))
    alone = Reader(model, ids[:1])
    alone.read(ids[:1, :5])
    alone.read(ids[:1, 5:])
    alone.rewind(5, [2])
    torch.testing.assert_close(alone.cache, model(ids[:1, :7]).cache)
    both = Reader(model, ids)
    both.read(ids[:, :5], torch.arange(5) >= torch.tensor([[2], [0]]))
    both.read(ids[:, 5:])
    both.rewind(5, [1, 3])
    found = both.read(ids[:, :2], torch.tensor([[False, True], [True, True]]))
    for row, text in enumerate(([*ids[0, 2:6], ids[0, 1]], [*ids[1, :8], *ids[1, :2]])):
        expected = model(torch.stack(text)[None]).logits[0, -1]
        torch.testing.assert_close(found[row, -1], expected, rtol=1e-5, atol=1e-6)
    assert both.place.flatten().tolist() == [5, 10]


def test_what_comes_before_each_drafted_token() -> None:
    previous = Previous(torch.tensor([[5, 6], [7, 8]]), torch.tensor([[True, True], [False, True]]))
    previous.add([[1], [2, 3]])
    found = previous.after(torch.tensor([[9], [4]]))
    assert found.tolist() == [
        [[5, 6, 1, -1, -1], [5, 6, 1, -1, 9]],
        [[-1, 8, 2, 3, -1], [-1, 8, 2, 3, 4]],
    ]


def test_drafts_are_ended_early() -> None:
    ids = torch.tensor([[0, 1], [2, 2]])
    seen: list[Tensor] = []

    def after_two(logits: Tensor) -> Tensor:
        seen.append(logits)
        return torch.tensor([len(seen) % 2 == 0, True])

    found = speculative_generate(TARGET, TARGET, ids, 9, draft_length=5, stop_drafting=after_two)
    assert found.tokens.equal(generate(TARGET, ids, 9).tokens)
    assert found.drafted is not None
    assert found.drafted[0].tolist() == [2, 1]
    torch.testing.assert_close(seen[0], TARGET(ids).logits[:, -1])


def _lookup(longest: int, shortest: int, length: int, *rows: list[int]) -> Draft:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[i >= width - len(row) for i in range(width)] for row in rows])
    return PromptLookup(longest, shortest).begin(ids, mask, Sampler(), None).propose(length)


def test_prompt_lookup() -> None:
    # the last of two places; the longer n-gram goes first
    assert _lookup(2, 1, 2, [1, 2, 7, 8, 1, 2, 5, 6, 1, 2]).tokens.tolist() == [[5, 6]]
    assert _lookup(2, 1, 2, [4, 2, 7, 8, 9, 2, 5, 6, 4, 2]).tokens.tolist() == [[7, 8]]
    # a copy that reaches the end goes on with itself
    assert _lookup(3, 1, 7, [9, 1, 2, 3, 1]).tokens.tolist() == [[2, 3, 1, 2, 3, 1, 2]]
    assert _lookup(3, 2, 4, [1, 2, 3, 1]).tokens.shape == (1, 0)
    found = _lookup(2, 1, 3, [5, 6, 5], [1, 2, 3])
    assert found.tokens[0].tolist() == [6, 5, 6]
    assert found.offered is not None
    assert found.offered.tolist() == [3, 0]
    assert found.q is None
    assert (PromptLookup().longest, PromptLookup().shortest) == (12, 2)
    session = PromptLookup(2, 2).begin(torch.tensor([[1, 2, 3]]), None, Sampler(), None)
    session.accept([[1, 2]], [1])
    assert session.propose(2).tokens.tolist() == [[3, 1]]


def test_expected_tokens_and_speedup() -> None:
    for a, k in ((0.8, 4), (0.3, 1), (0.99, 9)):
        assert expected_tokens(a, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a))
        assert expected_speedup(a, k, 0.1) == pytest.approx((1 - a ** (k + 1)) / (1 - a) / (1 + 0.1 * k))
    assert (expected_tokens(1.0, 4), expected_tokens(0.0, 4), expected_tokens(0.7, 0)) == (5, 1, 1)
    for name, arguments in (("acceptance", (1.1, 2, 0.1)), ("draft_length", (0.5, -1, 0.1)), ("cost", (0.5, 2, -0.1))):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            expected_speedup(*arguments)


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    ids = torch.tensor([[0, 1, 2]])
    short = TableLM(TARGET.table, max_length=6)
    nan = TableLM(torch.full((4, 3, 3), math.nan))
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, "draft: expected the target's vocabulary of 3, got 4", (TARGET, TableLM.random(4, 0), ids, 5), {}),
        (ValueError, r"input_ids: expected \[batch, time\] with a token", (TARGET, DRAFT, ids[:, :0], 5), {}),
        (ValueError, "input_ids: expected ids from 0 to 2 of the target", (TARGET, DRAFT, ids + 1, 5), {}),
        (ValueError, "max_new_tokens: the target sees 6", (short, DRAFT, ids, 4), {}),
        (ValueError, "max_new_tokens: the draft sees 6", (TARGET, short, ids, 4), {}),
        (ValueError, "max_new_tokens: expected at least 0", (TARGET, DRAFT, ids, -1), {}),
        (ValueError, "draft_length: expected fewer than the 6", (short, DRAFT, ids, 3), {"draft_length": 6}),
        (ValueError, "draft_length: expected at least 1", (TARGET, DRAFT, ids, 3), {"draft_length": 0}),
        (ValueError, "logits: expected numbers", (nan, DRAFT, ids, 3), {}),
        (ValueError, "logits: expected numbers", (TARGET, nan, ids, 3), {"sampler": Sampler(1.0)}),
        (TypeError, "stop_drafting: expected a draft model", (TARGET, PromptLookup(), ids, 3), {"stop_drafting": abs}),
    ]
    for error, match, arguments, options in cases:
        with pytest.raises(error, match=match):
            speculative_generate(*arguments, **options)
    found = speculative_generate(short, DRAFT, ids, 3, draft_length=5)
    assert found.tokens.equal(generate(short, ids, 3).tokens)
    for p, q in ((torch.ones(2, 3), None), (torch.ones(3, 3), torch.ones(2, 4))):
        with pytest.raises(ValueError, match="p: expected"):
            speculative_verify(p, q, torch.tensor([0, 1]))
    for arguments, name in (((2, 3), "longest"), ((2, 0), "shortest")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            PromptLookup(*arguments)
