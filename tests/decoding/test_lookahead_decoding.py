"""Lookahead decoding: the exact law, plain greedy tokens, and trees whose branches are computed one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mlreviews.decoding.lookahead_decoding import NGramPool, _Lookahead, lookahead_decode, lookahead_tree
from mlreviews.models import Sampler, TinyLM, TinyLMConfig, from_transformers, generate
from mlreviews_kernels.tree_masked_attention import ancestor_mask
from tests.contracts.families import Sample
from tests.decoding.models import TableLM, assert_same_law, exact_law, law_of_chain

CONTRACT = {
    "lookahead_decode": lambda: Sample(
        lookahead_decode,
        (TableLM.random(5, 0), torch.tensor([[1, 2], [3, 0]]), 6),
        {"sampler": Sampler(temperature=1.0), "window": 2, "ngram": 3, "guesses": 2},
    )
}


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _model(scale: float = 6.0) -> TinyLM:
    config = TinyLMConfig(vocab_size=11, d_model=12, layers=2, heads=2, hidden=16, tied=False)
    model = TinyLM(config, generator=_rng()).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def _ids(batch: int = 3, time: int = 6) -> Tensor:
    return torch.randint(11, (batch, time), generator=_rng(5))


def _cycle(period: int) -> TableLM:
    """Each token is the one before plus 1, round and round."""
    table = torch.full((period + 1, period, period), -9.0)
    table[:, torch.arange(period), torch.arange(1, period + 1) % period] = 9.0
    return TableLM(table)


@pytest.mark.parametrize(("window", "ngram", "guesses"), [(1, 2, 1), (4, 3, 3), (2, 5, 0), (7, 4, 6)])
def test_greedy_tokens_are_those_of_plain_decoding(window: int, ngram: int, guesses: int) -> None:
    model, ids = _model(), _ids()
    expected = generate(model, ids, 25, stop_tokens=[2])
    for prompt_ngrams in (True, False):
        found = lookahead_decode(
            model,
            ids,
            25,
            window=window,
            ngram=ngram,
            guesses=guesses,
            prompt_ngrams=prompt_ngrams,
            stop_tokens=[2],
            generator=_rng(),
        )
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.lengths, expected.lengths)
        assert found.target_calls <= expected.target_calls


def test_transformers_models_take_it() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=40, n_embd=12, n_layer=2, n_head=2, initializer_range=1.0)
    model = from_transformers(GPT2LMHeadModel(config).double().eval())
    ids = _ids(2, 8)
    expected = generate(model, ids, 32)  # up to the model's last position
    assert torch.equal(lookahead_decode(model, ids, 32, window=3, ngram=3, guesses=2).tokens, expected.tokens)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(temperature=0.8, top_k=2),
        Sampler(temperature=1.2, top_p=0.8),
        Sampler(temperature=1.0, repetition_penalty=1.6),
    ],
)
def test_the_law_is_the_model_s(sampler: Sampler) -> None:
    model, ids = TableLM.random(3, 2, scale=1.0), torch.tensor([[0, 1, 0, 1, 2]])
    if sampler.repetition_penalty != 1.0:
        return _assert_penalised_law(model, ids, sampler)
    found = exact_law(
        lambda: lookahead_decode(model, ids, 4, window=2, ngram=3, guesses=2, sampler=sampler, generator=_rng()).tokens
    )
    assert_same_law(found, law_of_chain(model, ids, 4, sampler))


def _assert_penalised_law(model: TableLM, ids: Tensor, sampler: Sampler) -> None:
    found = exact_law(
        lambda: lookahead_decode(model, ids, 3, window=2, ngram=3, guesses=2, sampler=sampler, generator=_rng()).tokens
    )
    assert_same_law(found, exact_law(lambda: generate(model, ids, 3, sampler=sampler).tokens))


def test_the_law_of_a_batch_is_the_model_s_for_each_row() -> None:
    model, sampler = TableLM.random(2, 4, scale=1.0), Sampler(temperature=1.0)
    ids = torch.tensor([[0, 1, 1], [1, 0, 0]])
    found = exact_law(
        lambda: lookahead_decode(model, ids, 3, window=2, ngram=2, guesses=1, sampler=sampler, generator=_rng()).tokens
    )
    first, second = (law_of_chain(model, ids[i : i + 1], 3, sampler) for i in (0, 1))
    assert_same_law(found, {(a[0], b[0]): p * q for a, p in first.items() for b, q in second.items()})


def test_a_cycle_is_taken_n_tokens_at_a_time() -> None:
    model, ids = _cycle(12), torch.tensor([[0]])
    expected = [i % 12 for i in range(1, 61)]
    for ngram in (3, 4):
        found = lookahead_decode(model, ids, 60, window=12, ngram=ngram, guesses=4, prompt_ngrams=False)
        assert found.row(0).tolist() == expected
        # the window's n-grams begin with the text's last token, so that they help when the cycle comes round
        assert found.accepted is not None
        assert (found.accepted[13:-1] >= ngram - 1).all()
        assert found.target_calls <= 1 + 13 + -(-47 // ngram) + 1


def test_reduces_to_plain_decoding() -> None:
    """Window and guesses that are never right: the model always repeats what is neither in the prompt nor guessed."""
    table = torch.full((4, 3, 3), -9.0)
    table[:, 0, 1] = table[:, 1, 0] = 9.0
    model = TableLM(table)
    found = lookahead_decode(model, torch.tensor([[0, 1, 0]]), 9, window=1, ngram=2, guesses=0, prompt_ngrams=False)
    assert found.row(0).tolist() == [1, 0] * 4 + [1]
    never = lookahead_decode(_Stubborn(5), torch.tensor([[0, 0]]), 8, window=1, ngram=2, guesses=3)
    assert never.target_calls == 8
    assert never.tokens_per_call == 1


class _Stubborn(TableLM):
    """Counts up where it decodes, and says 0 at all places that are only guessed: nothing guessed is ever right."""

    def __init__(self, vocab: int) -> None:
        super().__init__(torch.zeros(vocab + 1, vocab, vocab))
        self.said = 0

    def forward(self, ids: Tensor, cache: Any = None, **layout: Any) -> Any:
        out = super().forward(ids, cache, **{**layout, "hidden_states": True})
        logits = torch.zeros_like(out.logits)
        logits[..., 0] = 1.0
        self.said = self.said % (self.vocab_size - 1) + 1
        place = 0 if cache is not None else -1
        logits[:, place, self.said] = 2.0
        return out._replace(logits=logits)


def test_branches_see_the_text_and_themselves_alone() -> None:
    model, text = _model(), _ids(1, 5)
    guesses, window = [(3, 1, 4), (3, 1, 5), (9, 2)], [[6, 7], [8, 0], [1, 2]]
    tokens, parents = lookahead_tree(int(text[0, -1]), guesses, window)
    assert tokens == [int(text[0, -1]), 3, 1, 4, 5, 9, 2, 6, 7, 8, 0, 1, 2]
    assert parents == [-1, 0, 1, 2, 2, 0, 5, 0, 7, 7, 8, 9, 10]
    mask = ancestor_mask(torch.tensor(parents))
    depth = mask.sum(-1) - 1
    out = model(torch.tensor([tokens]), model(text[:, :-1]).cache, positions=text.shape[1] - 1 + depth, tree=mask)
    branches = {4: (3, 1, 5), 6: (9, 2), 3: (3, 1, 4), 11: (6, 8, 1), 12: (6, 7, 0, 2)}
    for node, branch in branches.items():
        alone = model(torch.cat([text, torch.tensor([branch])], 1)).logits[0, -1]
        torch.testing.assert_close(out.logits[0, node], alone)


def test_the_window_s_levels_are_jacobi_s_iterations() -> None:
    """What the model sees in each pass, against equation (1) computed column by column."""
    seen: list[Tensor] = []

    class Watched(TinyLM):
        def forward(self, ids: Tensor, cache: Any = None, **layout: Any) -> Any:
            if cache is not None:
                seen.append(ids[0])
            return super().forward(ids, cache, **layout)

    config = TinyLMConfig(vocab_size=11, d_model=12, layers=2, heads=2, hidden=16)
    model = Watched(config, generator=_rng()).double().eval()
    prompt = _ids(1, 4)
    found = lookahead_decode(model, prompt, 12, window=3, ngram=4, guesses=0)
    steps = [step for step in seen if len(step) > 1]
    texts = torch.cat([prompt, found.tokens], 1)
    assert found.accepted is not None
    length = 4
    for i, (now, later) in enumerate(itertools.pairwise(steps)):
        window, moved = now[1:].reshape(3, 3), later[1:].reshape(3, 3)
        assert torch.equal(moved[:2], window[1:])
        for j in range(3):
            line = torch.cat([texts[0, : length + 1], window[0, : j + 1], window[1:, j]])
            assert int(moved[2, j]) == int(TinyLM.forward(model, line[None]).logits[0, -1].argmax())
        length += int(found.accepted[i, 0]) + 1


def test_the_window_s_nodes_in_a_batch_with_unequal_guesses() -> None:
    """Columns go on from the level before, level 0 from the root, whatever number of guesses a row has."""
    drafter = _Lookahead(2, 4, 5, True, Sampler(), torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3, 4, 1], [5, 6, 7, 8, 9]])  # in the first row alone something followed the last token
    drafted = drafter(torch.empty(2, 5, 3), ids, None, torch.empty(0), 4)
    window = drafter.window
    assert window.shape == (2, 3, 2)  # levels, columns
    assert drafted.tokens[:, -6:].equal(window.flatten(1))
    assert drafted.tokens[0, :4].tolist() == [1, 2, 3, 4]
    assert drafted.tree.parents[0].tolist() == [-1, 0, 1, 2, 0, 4, 4, 5, 6, 7]
    assert drafted.tree.parents[1].tolist() == [-1, 0, 0, 0, 0, 4, 4, 5, 6, 7]


def test_n_grams_come_from_the_window_once_its_levels_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[tuple[int, ...]] = []
    monkeypatch.setattr(NGramPool, "add", lambda self, ngram: added.append(tuple(ngram)))
    model = _cycle(7)
    lookahead_decode(model, torch.tensor([[3, 3]]), 5, window=2, ngram=4, guesses=5, prompt_ngrams=False)
    # three passes with a window; only in the third are all levels but the first the model's, each token 1 more
    assert len(added) == 2
    for ngram in added:
        assert ngram[0] in (3, 4)
        assert list(ngram) == [(ngram[0] + i) % 7 for i in range(4)]
    added.clear()
    lookahead_decode(model, torch.tensor([[3, 4, 5, 1]]), 1, ngram=3, guesses=5)
    assert added == []  # no token is guessed


def test_the_pool_keeps_the_newest() -> None:
    pool = NGramPool(2)
    for ngram in ([1, 2, 3], [1, 4, 5], [2, 0, 0], [1, 2, 3], [1, 6, 7]):
        pool.add(ngram)
    assert pool.after(1) == [(6, 7), (2, 3)]
    assert pool.after(2) == [(0, 0)]
    assert pool.after(9) == []


def test_the_prompt_s_n_grams_help_from_the_start() -> None:
    model, ids = _cycle(9), torch.arange(20)[None] % 9
    options: dict[str, Any] = {"window": 1, "ngram": 5, "guesses": 2}
    found = lookahead_decode(model, ids, 25, **options)
    assert found.accepted is not None
    assert found.accepted[:-1].flatten().tolist() == [4] * (len(found.accepted) - 1)
    assert found.target_calls < lookahead_decode(model, ids, 25, prompt_ngrams=False, **options).target_calls
    padded = torch.cat([torch.full((1, 3), 5), ids], 1)
    mask = torch.arange(23)[None] >= 3
    assert torch.equal(lookahead_decode(model, padded, 25, mask=mask, **options).tokens, found.tokens)


def test_defaults_are_15_columns_5_grams_and_15_guesses() -> None:
    table = torch.zeros(22, 21, 21)
    table[..., 0] = 9.0  # 0 follows whatever came
    prompt = torch.tensor([[0, *(token for first in range(1, 21) for token in (0, first, 7, 7, 7))]])
    for options, guesses in (({}, 15), ({"prompt_ngrams": False}, 0)):
        found = lookahead_decode(TableLM(table), prompt, 30, **options)  # type: ignore[arg-type]
        assert found.drafted is not None
        assert int(found.drafted[0, 0]) == 4 * guesses + (5 - 1) * 15


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    model, ids = TableLM.random(4, 0), torch.tensor([[1]])
    for name, bad in (("window", 0), ("ngram", 1), ("guesses", -1)):
        options: dict[str, Any] = {name: bad}
        with pytest.raises(ValueError, match=name):
            lookahead_decode(model, ids, 3, **options)
    with pytest.raises(ValueError, match="size"):
        NGramPool(-1)
    with pytest.raises(ValueError, match="input_ids"):
        lookahead_decode(model, ids[:, :0], 3)
    with pytest.raises(ValueError, match="logits"):
        lookahead_decode(TableLM(model.table * torch.nan), ids, 3)
