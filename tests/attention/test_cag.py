from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mlreviews.attention.cag import CacheAugmentedGenerator, CascadeAttention, PrefixedCache, cascade_attention
from mlreviews.models import CausalAttention, KVCache, LMCache, LMOutput, TinyLM, TinyLMConfig
from tests.contracts.families import Sample

VOCABULARY = 13


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_rng(seed))


CONTRACT = {
    "CascadeAttention": lambda: Sample(
        CascadeAttention(8, 4, kv_heads=2, generator=_rng()), (_random(2, 7, 8).float(),)
    )
}


def _model(attention: Any = CausalAttention, seed: int = 0, layers: int = 2) -> TinyLM:
    # a head of its own: with a tied one, an untrained model repeats its last token
    config = TinyLMConfig(VOCABULARY, 16, layers, 4, kv_heads=2, tied=False)
    return TinyLM(config, attention, generator=_rng(seed)).double().eval()


def _ids(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = _rng(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def _recomputed(model: TinyLM, ids: Tensor, new: int, eos: int | None = None) -> Tensor:
    """Greedy decoding that reads everything again for every token, without a cache."""
    start = len(ids)
    while len(ids) < start + new and not (len(ids) > start and ids[-1] == eos):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids[start:]


each_attention = pytest.mark.parametrize("attention", [CausalAttention, CascadeAttention])
DOCUMENTS, QUERIES = _ids(5, 1, 6), _ids(3, 1, 4, 3, seed=2)
READ = 12


class TestCascade:
    @pytest.mark.parametrize("queries", [1, 3, 4])
    def test_a_shared_prefix_reduces_to_attention_over_all(self, queries: int) -> None:
        q, k, v = _random(3, queries, 6, 4), _random(3, 9, 2, 4, seed=1), _random(3, 9, 2, 5, seed=2)
        k, v = (torch.cat([x[:1, :5].expand(3, -1, -1, -1), x[:, 5:]], 1) for x in (k, v))  # one prefix for all rows
        mask = torch.ones(3, 9, dtype=torch.bool)
        mask[1, 5:7] = False
        seen = (torch.arange(9) <= torch.arange(9 - queries, 9)[:, None]) & mask[:, None]
        expected = nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen[:, None], enable_gqa=True
        )
        found = cascade_attention(q, k[:1, :5], v[:1, :5], k[:, 5:], v[:, 5:], mask=mask[:, 5:])
        torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-10, atol=1e-10)
        unmasked = cascade_attention(q[:1], k[:1, :5], v[:1, :5], k[:1, 5:], v[:1, 5:])
        torch.testing.assert_close(unmasked, found[:1])

    def test_rows_share_the_prefix_and_own_the_rest(self) -> None:
        prefix, own = KVCache(*_random(2, 1, 5, 2, 4).unbind()), KVCache(*_random(2, 3, 4, 2, 4).unbind())
        cache = PrefixedCache(prefix, own)
        assert cache.length == 9
        assert cache.append(own.keys[:, :2], own.values[:, :2]).length == 11
        assert torch.equal(cache.rows(torch.tensor([2, 2])).own.keys, own.keys[[2, 2]])
        assert cache.crop(7).own.length == 2
        assert cache.crop(5).length == 5
        for length in (4, 10):
            with pytest.raises(ValueError, match="length: expected 5, the prefix, to 9, got"):
                cache.crop(length)


class TestGenerator:
    def test_logits_of_the_query_are_those_of_documents_and_query_read_together(self) -> None:
        model = _model()
        generator = CacheAugmentedGenerator(model, DOCUMENTS)
        generator.preload()
        found = model(QUERIES[0][None], generator.cache).logits
        whole = model(torch.cat([*DOCUMENTS, QUERIES[0]])[None]).logits
        torch.testing.assert_close(found, whole[:, READ:], rtol=1e-10, atol=1e-10)

    @each_attention
    def test_answers_are_those_of_reading_everything_again(self, attention: Any) -> None:
        model = _model(attention)
        generator = CacheAugmentedGenerator(model, DOCUMENTS)
        expected = [_recomputed(model, torch.cat([*DOCUMENTS, query]), 6) for query in QUERIES]
        assert len({tuple(answer.tolist()) for answer in expected}) > 2
        found = generator.answer(QUERIES, 6)
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, generator.answer(QUERIES[::3], 6), expected[::3]))  # of one length, without padding
        assert torch.equal(generator.answer(QUERIES[1:2], 6)[0], expected[1])
        for i in (2, 0, 1, 0):  # one by one, in any order
            assert torch.equal(generator.generate(QUERIES[i], 6), expected[i])
            generator.reset()

    def test_reset_leaves_the_documents_as_they_were_read(self) -> None:
        generator = CacheAugmentedGenerator(_model(), DOCUMENTS)
        generator.reset()  # nothing to cut back yet
        generator.preload()
        before = [(state.keys.clone(), state.values.clone()) for state in generator.cache.layers]
        generator.generate(QUERIES[0], 4)
        assert generator.cache.length == READ + 3 + 4
        generator.reset()
        assert generator.cache.length == READ
        for state, (keys, values) in zip(generator.cache.layers, before, strict=True):
            assert torch.equal(state.keys, keys)
            assert torch.equal(state.values, values)

    def test_without_a_reset_earlier_queries_and_answers_are_seen(self) -> None:
        model = _model()
        generator = CacheAugmentedGenerator(model, DOCUMENTS)
        first = generator.generate(QUERIES[0], 4)
        second = generator.generate(QUERIES[1], 4)
        expected = _recomputed(model, torch.cat([*DOCUMENTS, QUERIES[0], first, QUERIES[1]]), 4)
        assert torch.equal(second, expected)
        assert torch.equal(
            generator.answer(QUERIES[1:2], 4)[0], _recomputed(model, torch.cat([*DOCUMENTS, QUERIES[1]]), 4)
        )

    @each_attention
    @pytest.mark.parametrize("length", [4, 40])
    def test_a_query_forwards_its_tokens_and_those_of_the_answer(self, attention: Any, length: int) -> None:
        generator = CacheAugmentedGenerator(_model(attention), _ids(length))
        generator.preload()
        assert generator.forwarded == length
        generator.generate(QUERIES[0], 5)
        assert generator.forwarded == length + 3 + 5
        generator.answer(QUERIES[::3], 5)  # nobody needs what follows the last tokens
        assert generator.forwarded == length + 3 + 5 + 2 * (3 + 4)

    def test_an_answer_ends_with_its_end(self) -> None:
        model = _model()
        longest = [_recomputed(model, torch.cat([*DOCUMENTS, query]), 8) for query in QUERIES]
        eos = int(longest[0][2])
        expected = [_recomputed(model, torch.cat([*DOCUMENTS, query]), 8, eos) for query in QUERIES]
        assert len({len(answer) for answer in expected}) > 1
        generator = CacheAugmentedGenerator(model, DOCUMENTS, eos=eos)
        assert all(map(torch.equal, generator.answer(QUERIES, 8), expected))
        assert torch.equal(generator.generate(QUERIES[0], 8), expected[0])
        before = generator.forwarded
        generator.answer(QUERIES[:1], 8)
        assert generator.forwarded - before == 3 + len(expected[0]) - 1

    def test_rows_share_one_copy_of_the_documents_where_the_attention_can(self) -> None:
        for attention, kind in ((CausalAttention, KVCache), (CascadeAttention, PrefixedCache)):
            seen = []

            class Watching(attention):  # type: ignore[misc,valid-type]
                def mix(self, q: Tensor, cache: Any) -> Tensor:
                    seen.append(cache)  # noqa: B023
                    return super().mix(q, cache)

            generator = CacheAugmentedGenerator(_model(Watching), DOCUMENTS)
            generator.preload()
            seen.clear()
            generator.answer(QUERIES, 2)
            assert {type(cache) for cache in seen} == {kind}

    def test_any_model_with_a_cache_will_do(self) -> None:
        class Last:
            """Knows the sum of all ids so far."""

            def __init__(self, total: Tensor, length: int, before: "Last | None") -> None:
                self.total, self.length, self.before = total, length, before

            def crop(self, length: int) -> "Last":
                return self if self.length == length or self.before is None else self.before.crop(length)

            def rows(self, index: Tensor) -> "Last":
                return Last(self.total[index], self.length, None)

        def model(ids: Tensor, cache: Last | None) -> tuple[Tensor, Last]:
            total = ids.sum(1) + (0 if cache is None else cache.total)
            logits = nn.functional.one_hot(total % VOCABULARY, VOCABULARY)[:, None]
            return logits, Last(total, ids.shape[1] + (0 if cache is None else cache.length), cache)

        generator = CacheAugmentedGenerator(model, [torch.tensor([3, 4])])
        assert generator.generate(torch.tensor([5]), 3).tolist() == [12, 11, 9]
        generator.reset()
        assert [a.tolist() for a in generator.answer([torch.tensor([5]), torch.tensor([6])], 2)] == [[12, 11], [0, 0]]
        with pytest.raises(TypeError, match="cache: expected keys and values of every layer alone, got Last"):
            generator.save("nowhere")

    @pytest.mark.usefixtures("unchecked")
    def test_bad_input(self) -> None:
        model = _model()
        for documents in ([], [torch.tensor([1]), torch.tensor([], dtype=torch.int64)], [torch.ones(2, 3).long()]):
            with pytest.raises(ValueError, match="documents"):
                CacheAugmentedGenerator(model, documents)
        with pytest.raises(TypeError, match=r"documents\[0\]: expected int64 or int32, got torch.float32"):
            CacheAugmentedGenerator(model, [torch.ones(3)])
        with pytest.raises(ValueError, match="documents: expected at most 11 tokens, the window, got 0"):
            CacheAugmentedGenerator(model, DOCUMENTS, window=11)
        CacheAugmentedGenerator(model, DOCUMENTS, window=READ)  # fits
        generator = CacheAugmentedGenerator(model, DOCUMENTS, window=18)
        assert len(generator.answer(QUERIES[:1], 3)[0]) == len(generator.generate(QUERIES[0], 3)) == 3
        with pytest.raises(ValueError, match=r"query: expected at most 18 tokens, .* got 18 in the cache, 1 new"):
            generator.generate(QUERIES[1], 1)
        generator.reset()
        assert len(generator.generate(QUERIES[0], 3)) == 3
        with pytest.raises(ValueError, match="queries: expected at most 18 tokens, the window, got 12 in the cache, 3"):
            generator.answer(QUERIES[:1], 4)
        for call, name in ((generator.generate, "query"), (lambda q, n: generator.answer([q], n), r"queries\[0\]")):
            with pytest.raises(ValueError, match=f"{name}: expected ids"):
                call(torch.tensor([], dtype=torch.int64), 2)
            with pytest.raises(TypeError, match=f"{name}: expected int64 or int32"):
                call(torch.ones(2), 2)
            with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
                call(QUERIES[0], 0)
        with pytest.raises(ValueError, match="queries: expected at least one, got none"):
            generator.answer([], 2)


class TestFiles:
    @each_attention
    def test_a_cache_from_a_file_gives_the_same_answers(self, attention: Any, tmp_path: Path) -> None:
        model, path = _model(attention), tmp_path / "documents.safetensors"
        generator = CacheAugmentedGenerator(model, DOCUMENTS)
        generator.save(path)
        generator.generate(QUERIES[0], 2)
        generator.save(tmp_path / "again.safetensors")  # what came after the documents isn't saved
        assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
        loaded = CacheAugmentedGenerator.load(model, path, window=18)
        assert torch.equal(loaded.documents, generator.documents)
        assert loaded.forwarded == 1
        assert all(map(torch.equal, loaded.answer(QUERIES[:1], 3), generator.answer(QUERIES[:1], 3)))
        assert loaded.forwarded == 1 + 3 + 2
        for mine, theirs in zip(loaded.cache.layers, generator.cache.crop(READ).layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)
        with pytest.raises(ValueError, match="the window"):
            loaded.answer(QUERIES[:1], 4)
        assert CacheAugmentedGenerator.load(model, path, eos=7).eos == 7

    def test_files_of_other_models_and_other_things_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "documents.safetensors"
        CacheAugmentedGenerator(_model(), DOCUMENTS).save(path)
        nearly = _model()
        with torch.no_grad():
            nearly.layers[1].self_attn.v_proj.weight[0, 0] += 1e-3
        for model in (_model(seed=1), _model(layers=1), _model(layers=3), _model().float(), nearly):
            with pytest.raises(ValueError, match="holds the cache of another model"):
                CacheAugmentedGenerator.load(model, path)
        save_file({"documents": torch.ones(1, 3).long()}, tmp_path / "other")
        with pytest.raises(ValueError, match=r"was not written by CacheAugmentedGenerator\.save"):
            CacheAugmentedGenerator.load(_model(), tmp_path / "other")
        with pytest.raises(FileNotFoundError):
            CacheAugmentedGenerator.load(_model(), tmp_path / "none")

    def test_states_that_are_not_keys_and_values_are_not_saved(self, tmp_path: Path) -> None:
        class Other(PrefixedCache):
            def crop(self, length: int) -> "Other":
                return self

        def model(ids: Tensor, cache: Any) -> LMOutput:
            whole = KVCache(*torch.zeros(2, 1, 3, 1, 1).unbind())
            return LMOutput(torch.zeros(1, 1, 2), LMCache((Other(whole, whole),)))

        with pytest.raises(TypeError, match="cache: expected states of type KVCache, got Other"):
            CacheAugmentedGenerator(model, DOCUMENTS).save(tmp_path / "none")
