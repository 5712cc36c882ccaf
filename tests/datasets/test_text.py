import dataclasses
import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlreviews.datasets import ByteTokenizer, TextSplit, text_corpus

EOS = ByteTokenizer.eos
# The hash of the path decides, so these sides may never change.
TRAIN = {"train/b.txt": b"hello", "train/a.txt": b"", "os.py": b"import abc\n", "138.txt": b"z"}
VALIDATION = {"enum.py": b"class Enum:\n", "190.txt": b"y"}


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def _training_names() -> list[str]:
    names = [f"{i:04}" for i in range(100)]
    return list(text_corpus("", {**VALIDATION, **dict.fromkeys(names, b"x")}, "").train.files)


def _split(*documents: bytes) -> TextSplit:
    """A training part with these documents, in this order."""
    train = dict(zip(_training_names(), documents, strict=False))
    return text_corpus("made up", {**train, **VALIDATION}, "").train


def _ids(split: TextSplit) -> list[int]:
    """The tokens of the whole split, from its documents."""
    return [i for file in split.files for i in [*split.document(file), EOS]]


class TestCorpus:
    def test_the_split_of_a_path_is_fixed_for_ever(self) -> None:
        corpus = text_corpus("made up", {**TRAIN, **VALIDATION}, "Some text")
        assert corpus.name == "made up"
        assert corpus.train.files == ("138.txt", "os.py", "train/b.txt")
        assert corpus.validation.files == ("190.txt", "enum.py")

    def test_documents_come_back_and_are_sorted_whatever_the_order(self) -> None:
        one = text_corpus("", {**TRAIN, **VALIDATION}, "").train
        other = text_corpus("", {**VALIDATION, **dict(reversed(TRAIN.items()))}, "").train
        assert torch.equal(one.data, other.data)
        assert {file: one.document(file) for file in one.files} == {k: v for k, v in TRAIN.items() if v}
        assert bytes(one.data.tolist()) == b"z\0import abc\n\0hello\0"
        assert one.offsets.tolist() == [0, 2, 14, 20]
        assert (one.data.dtype, one.offsets.dtype) == (torch.uint8, torch.int64)

    def test_the_description_says_how_much_there_is(self) -> None:
        long = {**TRAIN, "train/b.txt": b"x" * 12_345}
        text = text_corpus("", {**long, **VALIDATION}, "Some text").description
        assert text == "Some text (train: 3 files, 12,357 bytes; validation: 2 files, 13 bytes)"

    def test_an_eighth_of_all_paths_is_held_out(self) -> None:
        n = 10_000
        corpus = text_corpus("", {f"folder/{i}.py": b"x" for i in range(n)}, "")
        assert len(corpus.validation.files) + len(corpus.train.files) == n
        assert abs(len(corpus.validation.files) - n / 8) < 5 * math.sqrt(n * (1 / 8) * (7 / 8))

    def test_is_frozen_and_compared_by_identity(self) -> None:
        corpus = text_corpus("", {**TRAIN, **VALIDATION}, "")
        for thing, field in ((corpus, "name"), (corpus.train, "files")):
            assert thing == thing
            assert thing != dataclasses.replace(thing)
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, field, ())

    def test_bad_documents(self, unchecked: None) -> None:
        with pytest.raises(ValueError, match=r"documents: 'a\.txt' holds a byte 0"):
            text_corpus("", {"a.txt": b"1\0002"}, "")
        with pytest.raises(TypeError, match=r"documents: expected bytes, got str for 'a\.txt'"):
            text_corpus("", {"a.txt": "text"}, "")  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="documents: none of the 2 falls into the train part"):
            text_corpus("", VALIDATION, "")
        with pytest.raises(ValueError, match="documents: none of the 4 falls into the validation part"):
            text_corpus("", TRAIN, "")

    def test_a_file_that_is_not_there(self) -> None:
        corpus = text_corpus("", {**TRAIN, **VALIDATION}, "")
        with pytest.raises(KeyError, match=r"file: 'enum\.py' is not in this split of 3 files"):
            corpus.train.document("enum.py")


class TestBatches:
    @pytest.mark.parametrize("length", [1, 3, 8])
    @pytest.mark.parametrize("within", [False, True])
    def test_every_window_is_as_likely(self, length: int, within: bool) -> None:
        split = _split(b"abcdefghi", b"jk", b"lmnopqrstu", b"v")
        stretches = [[*split.document(f), EOS] for f in split.files] if within else [_ids(split)]
        windows = [tuple(s[i : i + length + 1]) for s in stretches for i in range(len(s) - length)]
        assert len(set(windows)) == len(windows)
        draws = 400 * len(windows)
        (batch,) = itertools.islice(split.batches(length, draws, _rng(), within_documents=within), 1)
        assert batch.shape == (draws, length + 1)
        assert batch.dtype == torch.int64
        seen, counts = batch.unique(dim=0, return_counts=True)
        assert {tuple(row) for row in seen.tolist()} == set(windows)
        assert (counts - 400).abs().max() < 5 * math.sqrt(400)

    def test_windows_cross_documents_unless_told_otherwise(self) -> None:
        split = _split(b"abc", b"def")
        windows = torch.cat(list(itertools.islice(split.batches(3, 20, _rng()), 5)))
        assert (windows[:, :-1] == EOS).any()

    def test_the_seed_decides_and_batches_differ(self) -> None:
        split = _split(bytes(range(1, 256)))
        first, again, other = (
            torch.stack(list(itertools.islice(split.batches(9, 5, _rng(seed)), 3))) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first[0], first[1])

    def test_the_longest_window(self) -> None:
        split = _split(b"abcd", b"ef")
        (whole,) = next(split.batches(7, 1, _rng()))
        assert whole.tolist() == [*b"abcd", EOS, *b"ef", EOS]
        (document,) = next(split.batches(4, 1, _rng(), within_documents=True))
        assert document.tolist() == [*b"abcd", EOS]
        with pytest.raises(ValueError, match="length: expected less than the longest text, 8 bytes, got 8"):
            split.batches(8, 1, _rng())
        with pytest.raises(ValueError, match="length: expected less than the longest document, 5 bytes, got 5"):
            split.batches(5, 1, _rng(), within_documents=True)

    def test_bad_input_is_an_error_at_once(self) -> None:
        split = _split(b"abcd")
        with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
            split.batches(0, 1, _rng())
        with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
            split.batches(1, 0, _rng())


class TestSweep:
    @given(st.binary(min_size=1, max_size=30), st.integers(1, 35), st.integers(1, 6))
    @settings(max_examples=60)
    def test_every_token_but_the_first_is_a_target_once(self, text: bytes, length: int, batch_size: int) -> None:
        split = _split(text.replace(b"\0", b"0"), b"end")
        ids = _ids(split)
        batches = list(split.sweep(length, batch_size))
        assert [i for batch in batches for i in batch[:, 1:].flatten().tolist()] == ids[1:]
        assert [i for batch in batches for i in batch[:, :-1].flatten().tolist()] == ids[:-1]
        assert all(batch.dtype == torch.int64 for batch in batches)

    def test_shapes(self) -> None:
        def shapes(text: bytes, length: int) -> list[tuple[int, ...]]:
            return [tuple(batch.shape) for batch in _split(text).sweep(length, 2)]

        assert shapes(b"x" * 12, 4) == [(2, 5), (1, 5)]
        assert shapes(b"x" * 14, 4) == [(2, 5), (1, 5), (1, 3)]
        assert shapes(b"x" * 3, 4) == [(1, 4)]
        assert shapes(b"x" * 4, 4) == [(1, 5)]

    def test_bad_input_is_an_error_at_once(self) -> None:
        split = _split(b"abcd")
        with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
            split.sweep(0, 1)
        with pytest.raises(ValueError, match="batch_size: expected at least 1, got -1"):
            split.sweep(1, -1)
