import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as peer

from mlreviews.datasets import ByteTokenizer
from mlreviews.models import (
    GenerationResult,
    LMOutput,
    Sampler,
    Stops,
    TinyLM,
    TinyLMConfig,
    column_major,
    draw,
    flip,
    generate,
    most_likely,
    stream,
)
from tests.decoding.models import TableLM, assert_same_law, exact_law, law_of_chain

INF = math.inf


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tiny(context: int | None = None) -> TinyLM:
    config = TinyLMConfig(vocab_size=13, d_model=16, layers=2, heads=4, kv_heads=2, context=context)
    model = TinyLM(config, generator=_rng()).double()
    for parameter in model.parameters():
        parameter.data.mul_(2)  # tokens matter to each other
    return model


def _logits(*p: float) -> Tensor:
    return torch.tensor([p], dtype=torch.float64).log() + 3.0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 4}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"min_p": 0.49}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        # top-p looks at what top-k has left: 4/7 reach 0.5, of all tokens 0.4 would not
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_laws_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    sampler = Sampler(**{"temperature": 1.0, **options})
    found = sampler.probabilities(_logits(0.1, 0.4, 0.2, 0.3))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


def test_ties() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert Sampler(1.0, top_k=2).probabilities(logits).count_nonzero() == 3
    for sampler in (Sampler(), Sampler(1.0, top_p=0.5)):  # one of two has half of it
        assert sampler.probabilities(torch.tensor([[1.0, 1.0]])).tolist() == [[1.0, 0.0]]
    assert most_likely(torch.tensor([[0.0, 1.0, 1.0], [5.0, 5.0, 5.0]])).tolist() == [1, 0]


def test_repetition_penalty() -> None:
    logits, previous = torch.tensor([[2.0, -2.0, 1.0, -1.0]] * 2), torch.tensor([[0, 1, 0], [-1, -1, 2]])
    found = Sampler(1.0, repetition_penalty=2.0).probabilities(logits, previous)
    expected = torch.tensor([[1.0, -4.0, 1.0, -1.0], [2.0, -2.0, 0.5, -1.0]]).softmax(-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(Sampler(1.0, repetition_penalty=2.0).probabilities(logits), logits.softmax(-1))
    greedy = Sampler(repetition_penalty=3.0)
    assert greedy.sample(torch.tensor([[2.0, 1.0]]), torch.tensor([[0]]), None).tolist() == [1]


@settings(max_examples=25)
@given(
    st.integers(0, 999),
    st.floats(0.2, 3.0),
    st.none() | st.integers(1, 12),
    st.none() | st.floats(0.05, 1.0),
    st.none() | st.floats(0.01, 1.0),
    st.sampled_from([0.7, 1.0, 1.6]),
)
def test_laws_of_transformers(
    seed: int, temperature: float, k: int | None, p: float | None, least: float | None, penalty: float
) -> None:
    logits = 3 * torch.randn(2, 11, generator=_rng(seed), dtype=torch.float64)
    ids = torch.randint(11, (2, 4), generator=_rng(seed))
    processors: list[Any] = [
        peer.RepetitionPenaltyLogitsProcessor(penalty),
        peer.TemperatureLogitsWarper(temperature),
        *([] if k is None else [peer.TopKLogitsWarper(k)]),
        *([] if p is None else [peer.TopPLogitsWarper(p)]),
        *([] if least is None else [peer.MinPLogitsWarper(least)]),
    ]
    expected = logits
    for processor in processors:
        expected = processor(ids, expected)
    sampler = Sampler(temperature, top_k=k, top_p=p, min_p=least, repetition_penalty=penalty)
    torch.testing.assert_close(sampler.probabilities(logits, ids), expected.softmax(-1))


def test_dtypes_and_shapes() -> None:
    for dtype, wanted in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        p = Sampler(1.0, top_p=0.9).probabilities(torch.randn(2, 3, 5, generator=_rng()).to(dtype))
        assert (p.dtype, p.shape) == (wanted, (2, 3, 5))
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, dtype=wanted))
    logits = torch.randn(2, 3, 5, generator=_rng())
    for sampler in (Sampler(), Sampler(1.0, top_k=2)):  # along the last axis
        rows = torch.stack([sampler.probabilities(row) for row in logits.flatten(0, 1)])
        assert sampler.probabilities(logits).flatten(0, 1).equal(rows)
    masked = torch.tensor([[0.0, -INF, 1.0]])
    assert Sampler(1.0).probabilities(masked)[0, 1] == 0


def test_draws_have_their_law() -> None:
    p = torch.tensor([[0.2, 0.0, 0.8], [0.5, 0.5, 0.0]])
    assert_same_law(exact_law(lambda: draw(p)), {(0, 0): 0.1, (0, 1): 0.1, (2, 0): 0.4, (2, 1): 0.4})
    found = draw(p.expand(4000, 2, 3), _rng())
    assert found.shape == (4000, 2)
    frequency = (found[:, 0] == 2).double().mean()
    assert abs(frequency - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 4000)
    assert_same_law(exact_law(lambda: flip(torch.tensor([0.25, 2.0, -1.0])).int()), {(1, 1, 0): 0.25, (0, 1, 0): 0.75})
    assert torch.equal(flip(p, _rng(1)), flip(p, _rng(1)))


@torch.no_grad()
def test_greedy_is_the_loop_of_argmax() -> None:
    model = _tiny()
    ids = torch.randint(13, (3, 5), generator=_rng(1))
    found, whole = generate(model, ids, 9), ids
    for _ in range(9):
        whole = torch.cat([whole, model(whole).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert found.tokens.tolist() == whole[:, 5:].tolist()
    assert len(set(found.tokens.flatten().tolist())) > 3
    assert (found.target_calls, found.lengths.tolist(), found.tokens_per_call) == (9, [9, 9, 9], 1.0)
    assert found.accepted is None
    assert math.isnan(found.acceptance_rate)


@pytest.mark.parametrize("sampler", [Sampler(1.0), Sampler(0.7, top_k=2), Sampler(1.3, top_p=0.8)])
def test_sampling_has_the_law_of_the_chain(sampler: Sampler) -> None:
    model, ids = TableLM.random(3, seed=0), torch.tensor([[0, 2]])
    found = exact_law(lambda: generate(model, ids, 3, sampler=sampler, stop_tokens=[1], pad=7).row(0).unsqueeze(0))
    assert_same_law(found, law_of_chain(model, ids, 3, sampler, stop=1))


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0), Sampler(repetition_penalty=1.7)])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(sampler: Sampler) -> None:
    model, ids = _tiny(), torch.randint(13, (3, 6), generator=_rng(2))
    mask = torch.arange(6) >= torch.tensor([0, 3, 5])[:, None]
    together = list(stream(model, ids, 4, sampler=sampler, mask=mask, generator=_rng(5)))
    if sampler.temperature:  # rows draw from one generator: compare the laws of the first tokens
        p = [sampler.probabilities(model(ids, mask=mask).logits[:, -1])[row] for row in range(3)]
        alone = [sampler.probabilities(model(ids[i : i + 1, s:]).logits[0, -1]) for i, s in enumerate([0, 3, 5])]
        torch.testing.assert_close(torch.stack(p), torch.stack(alone), rtol=1e-5, atol=1e-6)
        return
    for row, start in enumerate([0, 3, 5]):
        alone_tokens = generate(model, ids[row : row + 1, start:], 4, sampler=sampler).row(0)
        assert torch.stack(together, 1)[row].tolist() == alone_tokens.tolist()


def _scripted(*tokens: int) -> TableLM:
    """A chain that goes round: after each of these tokens the next one."""
    table = torch.zeros(128, 127, 127)
    for before, after in zip(tokens, (*tokens[1:], tokens[0]), strict=True):
        table[:, before, after] = 9.0
    return TableLM(table)


def test_stop_tokens_end_rows_one_by_one() -> None:
    model = _scripted(1, 2, 3, 4)
    found = generate(model, torch.tensor([[1], [3]]), 6, stop_tokens=[4], pad=99)
    assert found.tokens.tolist() == [[2, 3, 4], [4, 99, 99]]
    assert generate(model, torch.tensor([[1], [3]]), 6, stop_tokens=[4]).tokens[1].tolist() == [4, 0, 0]
    assert (found.lengths.tolist(), found.target_calls) == ([3, 1], 3)
    assert found.row(1).tolist() == [4]


def test_stop_strings() -> None:
    model, tokenizer = _scripted(*b"abcde"), ByteTokenizer()
    ids = tokenizer.encode("a")[None]
    found = generate(model, ids, 20, stop_strings=["ea", "zz"], decode=tokenizer.decode)
    assert tokenizer.decode(found.row(0)) == "bcdea"
    # the prompt's own text doesn't count
    assert len(generate(model, ids, 4, stop_strings=["ab"], decode=tokenizer.decode).row(0)) == 4
    stops = Stops(1, 10, strings=["é"], decode=tokenizer.decode)
    assert stops.add(0, [0xC3, 0xA9, 65]) == 2
    assert stops.done


def test_budgets() -> None:
    model = _scripted(1, 2)
    for budget in (0, 1, 5):
        found = generate(model, torch.tensor([[1], [2]]), budget)
        assert (found.tokens.shape, found.target_calls) == ((2, budget), budget)
        assert found.tokens.dtype == torch.int64
    stops = Stops(2, 4, tokens=[5])
    assert [stops.add(0, [1, 2, 3]), stops.left(0), stops.left(1)] == [3, 1, 4]
    assert [stops.add(0, [1, 2]), stops.add(0, [1]), stops.add(1, [5, 1]), stops.done] == [1, 0, 1, True]
    found = stops.result(3, [[2, 0], [1, -1]], [[2, 2], [2, -1]])
    assert found.tokens.tolist() == [[1, 2, 3, 1], [5, 0, 0, 0]]
    assert (found.acceptance_rate, found.tokens_per_call) == (0.5, 2.5 / 3)


def test_streams_what_generate_gathers() -> None:
    model, ids = TableLM.random(5, 0), torch.tensor([[0], [3]])
    options: dict[str, Any] = {"sampler": Sampler(1.0)}
    streamed = torch.stack(list(stream(model, ids, 7, generator=_rng(4), **options)), 1)
    assert torch.equal(streamed, generate(model, ids, 7, generator=_rng(4), **options).tokens)
    assert not torch.equal(streamed, generate(model, ids, 7, generator=_rng(5), **options).tokens)
    state = torch.get_rng_state()
    first = next(iter(stream(model, ids, 7, generator=_rng(4), **options)))
    assert torch.equal(first, streamed[:, 0])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_the_last_token_is_not_run() -> None:
    """As many calls as tokens, and each but the first sees one token."""
    seen: list[int] = []

    class Watched(TableLM):
        def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> LMOutput:
            seen.append(ids.shape[1])
            return super().forward(ids, *args, **kwargs)

    generate(Watched(torch.zeros(4, 3, 3)), torch.tensor([[0, 1, 2]]), 4)
    assert seen == [3, 1, 1, 1]


def test_column_major_changes_strides_alone(tmp_path: Path) -> None:
    model, same = _tiny(), _tiny()
    assert column_major(model) is model
    weight = model.layers[0].mlp.up_proj.weight
    assert weight.stride() == (1, weight.shape[0])
    assert model.lm_head.weight is model.embed_tokens.weight, "tied"
    torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=0)
    ids = torch.randint(13, (2, 5), generator=_rng(1))
    for m in (model, same):
        m(ids).logits.square().sum().backward()
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    model.save(tmp_path)
    torch.testing.assert_close(TinyLM.load(tmp_path).state_dict(), _tiny().float().state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    model, ids = _tiny(context=8), torch.tensor([[1, 2, 3]])
    call: Callable[..., GenerationResult] = generate
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "input_ids: expected int64", (ids.int(), 2), {}),
        (ValueError, r"input_ids: expected \[batch, time\] with a token", (ids[:, :0], 2), {}),
        (ValueError, r"input_ids: expected \[batch, time\] with a token", (ids[:0], 2), {}),
        (ValueError, r"input_ids: expected \[batch, time\] with a token", (ids[0], 2), {}),
        (ValueError, "input_ids: expected ids from 0 to 12 of the model", (ids + 10, 2), {}),
        (ValueError, "input_ids: expected ids from 0 to 12", (ids - 2, 2), {}),
        (ValueError, "max_new_tokens: expected at least 0", (ids, -1), {}),
        (TypeError, "max_new_tokens: expected a whole number", (ids, 2.0), {}),
        (ValueError, "max_new_tokens: the model sees 8 tokens; a prompt of 3 and 6 more", (ids, 6), {}),
        (ValueError, "mask: expected booleans", (ids, 2), {"mask": torch.ones(1, 3)}),
        (ValueError, "mask: expected booleans", (ids, 2), {"mask": ids[:, 1:] > 0}),
        (ValueError, "mask: expected padding", (ids, 2), {"mask": ids < 2}),
        (ValueError, "mask: expected padding", (ids, 2), {"mask": ids != 2}),
        (ValueError, "decode: stop strings need", (ids, 2), {"stop_strings": ["a"]}),
        (ValueError, "stop_strings: expected no empty", (ids, 2), {"stop_strings": [""], "decode": str}),
    ]
    for error, match, args, options in cases:
        with pytest.raises(error, match=match):
            call(model, *args, **options)
    assert generate(model, ids, 5).lengths.tolist() == [5]
    bad: list[dict[str, Any]] = [{"temperature": -1.0}, {"temperature": INF}, {"top_p": 0.0}, {"top_p": 1.1}]
    for options in [*bad, {"min_p": 0.0}, {"top_k": 0}, {"repetition_penalty": 0.0}]:
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            Sampler(**options)


@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, INF], [-INF, -INF]])
def test_logits_that_are_no_numbers(bad: list[float]) -> None:
    table = torch.zeros(3, 2, 2)
    table[:, 1] = torch.tensor(bad)
    model = TableLM(table)
    for sampler in (Sampler(), Sampler(1.0), Sampler(repetition_penalty=2.0)):
        with pytest.raises(ValueError, match="logits: expected numbers"):
            generate(model, torch.tensor([[0], [1]]), 2, sampler=sampler)
