import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlreviews.attention.abacus_embeddings import AbacusEmbedding, AbacusState, abacus_positions
from mlreviews.datasets import ADDITION_IDS, addition_problems, exact_match
from mlreviews.models import TinyLM, TinyLMConfig
from tests.contracts.families import Sample

DIGITS = torch.arange(10)
CONFIG = TinyLMConfig(vocab_size=len(ADDITION_IDS), d_model=12, layers=2, heads=2, hidden=16)


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ids(*texts: str) -> Tensor:
    return torch.tensor([[ADDITION_IDS.index(symbol) for symbol in text] for text in texts])


def _embedding(**options: Any) -> AbacusEmbedding:
    return AbacusEmbedding(range(10), 6, **{"max_length": 40, "max_offset": 9, "generator": _rng()} | options)


CONTRACT = {"AbacusEmbedding": lambda: Sample(_embedding(generator=None), (_ids("12+345=", "=1+2+34"),))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12+345=", [1, 2, 0, 1, 2, 3, 0]),
        ("=12", [0, 1, 2]),
        ("123", [1, 2, 3]),
        ("+=+", [0, 0, 0]),
        ("1+2+3=", [1, 0, 1, 0, 1, 0]),
        ("++12==3", [0, 0, 1, 2, 0, 0, 1]),
        ("7", [1]),
    ],
)
def test_positions_by_hand(text: str, expected: list[int]) -> None:
    found = abacus_positions(_ids(text), DIGITS)
    assert found.tolist() == [expected]
    assert found.dtype == torch.int64


def test_positions_of_all_texts_count_digits_back_to_a_border() -> None:
    texts = ["".join(text) for text in itertools.product("3+", repeat=5)]
    run = torch.arange(len(texts)) % 4
    alone = abacus_positions(_ids(*texts), DIGITS)
    after = abacus_positions(_ids(*texts), DIGITS, run)
    for text, before, row, later in zip(texts, run.tolist(), alone.tolist(), after.tolist(), strict=True):
        for t in range(5):
            for places, past in ((row, ""), (later, "3" * before)):
                so_far = past + text[: t + 1]
                assert places[t] == len(so_far) - len(so_far.rstrip("3"))


def test_any_ids_can_be_digits() -> None:
    ids = torch.tensor([[40, 7, 12, 7, 7]], dtype=torch.int32)
    assert abacus_positions(ids, torch.tensor([7, 40])).tolist() == [[1, 2, 0, 1, 2]]
    assert abacus_positions(ids.mT.contiguous().mT, torch.tensor([12])).tolist() == [[0, 0, 1, 0, 0]]


def test_the_same_place_has_the_same_vector_in_all_numbers() -> None:
    embedding = _embedding().eval()
    vectors, _ = embedding(_ids("123+456=", "=9+12345"))
    torch.testing.assert_close(vectors[0, :3], vectors[0, 4:7])
    torch.testing.assert_close(vectors[0, :3], vectors[1, 3:6])
    torch.testing.assert_close(vectors[0, 3], vectors[1, 0])
    assert torch.equal(vectors[1, 3:8], embedding.embedding.weight[1:6])
    assert torch.equal(vectors[0, 3], embedding.embedding.weight[0])


def test_evaluation_has_no_offset_and_draws_nothing() -> None:
    generator = _rng()
    embedding = _embedding(generator=generator).eval()
    before = generator.get_state()
    one, other = (embedding(_ids("12+345="))[0] for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(one, embedding.embedding.weight[[1, 2, 0, 1, 2, 3, 0]][None])
    assert torch.equal(generator.get_state(), before)


def test_training_shifts_all_digits_of_a_batch_by_one_offset() -> None:
    embedding, ids = _embedding(max_offset=3), _ids("12+345=", "=1+2+34")
    places, seen = abacus_positions(ids, DIGITS), set()
    for _ in range(40):
        vectors, state = embedding(ids)
        k = int(state.offset)
        seen.add(k)
        torch.testing.assert_close(vectors, embedding.embedding.weight[torch.where(places > 0, places + k, 0)])
        assert torch.equal(state.positions, places.to(torch.int16))
    assert seen == {0, 1, 2, 3}  # missing one of them has a probability of 4 * 0.75**40 < 5e-5


def test_reduces_to_learned_absolute_positions() -> None:
    embedding, ids = _embedding().eval(), torch.randint(10, (3, 8), generator=_rng())
    assert torch.equal(embedding(ids)[0], embedding.embedding.weight[1:9].expand(3, -1, -1))


@pytest.mark.parametrize("training", [True, False])
def test_parts_equal_the_whole_with_the_offset_of_the_first(training: bool) -> None:
    ids = _ids("12+345=579", "=1+2+34123", "0123456789")
    embedding = _embedding().train(training)
    for cut in range(1, 10):
        embedding.generator = _rng(cut)
        whole, end = embedding(ids)
        embedding.generator = _rng(cut)
        first, state = embedding(ids[:, :cut])
        second, last = embedding(ids[:, cut:], state)
        assert torch.equal(torch.cat([first, second], 1), whole)
        assert torch.equal(last.positions, end.positions)
        assert last.length == 10
        back = end.crop(cut)
        assert torch.equal(embedding(ids[:, cut:], back)[0], second)
        index = torch.tensor([2, 0, 0])
        assert torch.equal(embedding(ids[index, cut:], back.rows(index))[0], second[index])
    assert torch.equal(embedding(ids, end.crop(0))[0], whole)


def test_greedy_decoding_with_the_cache_gives_what_one_pass_says() -> None:
    embedding = AbacusEmbedding(range(10), 12, max_length=30, max_offset=5, generator=_rng())
    model = TinyLM(CONFIG, position_embedding=embedding, generator=_rng(1)).double()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    train = addition_problems(torch.tensor([[2, 2]]).expand(4, -1), generator=_rng(2))
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(train[:, :-1]).logits[:, 5:].flatten(0, 1), train[:, 6:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    fresh = addition_problems(torch.tensor([[2, 2]]).expand(4, -1), generator=_rng(3))
    ids = torch.cat([train, fresh])
    out, found = model(ids[:, :6]), []
    for _ in range(4):
        found.append(out.logits[:, -1].argmax(-1))
        out = model(found[-1][:, None], out.cache)
    decoded = torch.stack(found, 1)
    texts, answers = (["".join(ADDITION_IDS[i] for i in row) for row in x.tolist()] for x in (decoded, ids[:, 6:]))
    right = torch.tensor([a.startswith(b.rstrip()) for a, b in zip(texts, answers, strict=True)])
    assert torch.equal(exact_match(model(ids[:, :-1]).logits, ids), right)
    assert right.any()
    assert not right.all()


def test_too_long_a_number_names_the_ids() -> None:
    embedding = _embedding(max_length=6, max_offset=2).eval()
    vectors, state = embedding(_ids("12345+1"))
    assert torch.equal(vectors[0, 4], embedding.embedding.weight[5])
    with pytest.raises(ValueError, match=r"ids: expected numbers of at most 5 digits .*got 6"):
        embedding(_ids("123456"))
    with pytest.raises(ValueError, match="ids: expected numbers of at most 5 digits"):
        embedding(_ids("23456"), embedding(_ids("1"))[1])
    assert embedding(_ids("2345"), state)[1].length == 11
    train = AbacusState(torch.zeros(1, 0, dtype=torch.int16), torch.tensor(2))
    with pytest.raises(ValueError, match=r"at most 3 digits \(max_length 6, offset 2\), got 4"):
        embedding(_ids("1234"), train)


def test_defaults_are_the_authors() -> None:
    embedding = AbacusEmbedding(range(10), 4, generator=_rng())
    assert embedding.embedding.weight.shape == (1024, 4)
    assert embedding.max_offset == 99
    weight = embedding.embedding.weight.detach()
    assert abs(float(weight.square().mean()) - 1 / 4) < 4 * (2 / 4096) ** 0.5 / 4
    assert list(embedding.state_dict()) == ["embedding.weight"]
    again = AbacusEmbedding([3, 4], 4, generator=_rng())
    assert torch.equal(again.embedding.weight, weight)
    assert "max_offset=99" in repr(embedding)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="digit_ids"):
        AbacusEmbedding([], 4)
    with pytest.raises(ValueError, match="dim: expected at least 1"):
        AbacusEmbedding(range(10), 0)
    with pytest.raises(ValueError, match="max_offset: expected at least 0"):
        AbacusEmbedding(range(10), 4, max_offset=-1)
    with pytest.raises(ValueError, match="max_length: expected at least 12, got 11"):
        AbacusEmbedding(range(10), 4, max_length=11, max_offset=10)
    embedding = _embedding(max_length=11, max_offset=9)
    state = embedding(_ids("1+2", "+12"))[1]
    with pytest.raises(ValueError, match="state: expected a batch of 1, as ids have, got 2"):
        embedding(_ids("1"), state)
    for length in (-1, 4):
        with pytest.raises(ValueError, match=f"length: expected 0 to 3, the tokens held, got {length}"):
            state.crop(length)
