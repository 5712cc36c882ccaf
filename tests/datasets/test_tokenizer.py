import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlreviews.datasets import ByteTokenizer

TOKENIZER = ByteTokenizer()
PAD, BOS, EOS = 258, 256, 257


def _bytes_or_text() -> st.SearchStrategy[str | bytes]:
    return st.text(max_size=20) | st.binary(max_size=20)


class TestEncode:
    def test_the_ids_are_fixed_for_ever(self) -> None:
        assert (TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.pad, TOKENIZER.vocab_size) == (256, 257, 258, 259)
        assert TOKENIZER.encode(bytes(range(256))).tolist() == list(range(256))

    def test_text_is_encoded_as_utf8(self) -> None:
        assert TOKENIZER.encode("a€").tolist() == [0x61, 0xE2, 0x82, 0xAC]

    def test_special_ids_are_added_only_where_asked_for(self) -> None:
        assert TOKENIZER.encode("a").tolist() == [97]
        assert TOKENIZER.encode("a", bos=True).tolist() == [BOS, 97]
        assert TOKENIZER.encode("a", eos=True).tolist() == [97, EOS]
        assert TOKENIZER.encode("", bos=True, eos=True).tolist() == [BOS, EOS]

    def test_the_empty_text_has_no_ids(self) -> None:
        ids = TOKENIZER.encode("")
        assert ids.shape == (0,)
        assert ids.dtype == torch.int64
        assert TOKENIZER.decode(ids) == ""

    def test_a_lone_surrogate_has_no_bytes(self) -> None:
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            TOKENIZER.encode("a\ud800")

    @pytest.mark.usefixtures("unchecked")
    def test_other_types_are_refused(self) -> None:
        with pytest.raises(TypeError, match=r"text: expected str or bytes, got list"):
            TOKENIZER.encode([97])  # type: ignore[arg-type]


class TestDecode:
    @given(st.text())
    def test_every_text_comes_back(self, text: str) -> None:
        assert TOKENIZER.decode(TOKENIZER.encode(text), errors="strict") == text

    @given(st.binary())
    def test_all_bytes_come_back(self, raw: bytes) -> None:
        assert TOKENIZER.decode_bytes(TOKENIZER.encode(raw)) == raw

    @given(st.text())
    def test_special_ids_stand_for_nothing(self, text: str) -> None:
        ids = [PAD, *TOKENIZER.encode(text, bos=True, eos=True).tolist(), PAD]
        assert TOKENIZER.decode(ids, errors="strict") == text

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
    def test_ids_of_any_integer_type(self, dtype: torch.dtype) -> None:
        assert TOKENIZER.decode(torch.tensor([104, 105], dtype=dtype)) == "hi"
        assert TOKENIZER.decode(iter((104, 105))) == "hi"

    def test_a_view_with_strides(self) -> None:
        assert TOKENIZER.decode(TOKENIZER.encode("h.i.")[::2]) == "hi"

    def test_what_is_not_utf8_is_replaced_unless_told_otherwise(self) -> None:
        ids = [97, 0xFF, 98]
        assert TOKENIZER.decode(ids) == "a\ufffdb"
        assert TOKENIZER.decode(ids, errors="ignore") == "ab"
        with pytest.raises(UnicodeDecodeError):
            TOKENIZER.decode(ids, errors="strict")

    @pytest.mark.parametrize("wrong", [-1, 259, 100_000])
    def test_an_id_out_of_range_is_named_with_its_place(self, wrong: int) -> None:
        for ids in ([97, 258, wrong], torch.tensor([97, 258, wrong])):
            with pytest.raises(ValueError, match=rf"ids: expected 0 to 258, got {wrong} at position 2"):
                TOKENIZER.decode(ids)

    def test_a_batch_is_not_one_sequence(self) -> None:
        with pytest.raises(ValueError, match=r"ids: expected one sequence, .* got shape \(2, 3\)"):
            TOKENIZER.decode(torch.zeros(2, 3, dtype=torch.int64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
    def test_ids_are_integers(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=r"ids: expected integers, got torch\."):
            TOKENIZER.decode(torch.zeros(3, dtype=dtype))


class TestEncodeBatch:
    def test_padding_goes_to_the_right(self) -> None:
        ids, mask = TOKENIZER.encode_batch(["a", b"bcd", ""])
        assert ids.tolist() == [[97, PAD, PAD], [98, 99, 100], [PAD, PAD, PAD]]
        assert mask.tolist() == [[True, False, False], [True, True, True], [False, False, False]]
        assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)

    def test_or_to_the_left(self) -> None:
        ids, mask = TOKENIZER.encode_batch(["ab", "cde"], side="left", bos=True, eos=True)
        assert ids.tolist() == [[PAD, BOS, 97, 98, EOS], [BOS, 99, 100, 101, EOS]]
        assert mask.tolist() == [[False, True, True, True, True], [True] * 5]

    def test_special_ids_are_added_only_where_asked_for(self) -> None:
        assert TOKENIZER.encode_batch(["a"], bos=True)[0].tolist() == [[BOS, 97]]
        assert TOKENIZER.encode_batch(["a"], eos=True)[0].tolist() == [[97, EOS]]

    @given(st.lists(_bytes_or_text(), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
    def test_the_mask_picks_out_each_text(self, texts: list[str | bytes], side: str) -> None:
        ids, mask = TOKENIZER.encode_batch(texts, side=side)  # type: ignore[arg-type]
        for text, row, real in zip(texts, ids, mask, strict=True):
            assert torch.equal(row[real], TOKENIZER.encode(text))
            assert (row[~real] == PAD).all()

    def test_bad_input(self, unchecked: None) -> None:
        with pytest.raises(ValueError, match="texts: expected at least one"):
            TOKENIZER.encode_batch([])
        with pytest.raises(TypeError, match="texts: expected a sequence of texts, got one str"):
            TOKENIZER.encode_batch("abc")
        with pytest.raises(ValueError, match=r"side: expected 'left' or 'right', got 'top'"):
            TOKENIZER.encode_batch(["abc"], side="top")  # type: ignore[arg-type]


class TestStream:
    @given(st.lists(st.binary(max_size=6) | st.text(max_size=3), max_size=8), st.sampled_from(["replace", "ignore"]))
    def test_the_pieces_make_the_whole(self, pieces: list[str | bytes], errors: str) -> None:
        stream = TOKENIZER.stream(errors=errors)
        ids = [TOKENIZER.encode(piece) for piece in pieces]
        text = "".join([*map(stream.feed, ids), stream.finish()])
        assert text == TOKENIZER.decode([i for piece in ids for i in piece.tolist()], errors=errors)

    def test_a_character_is_held_back_until_it_is_complete(self) -> None:
        stream = TOKENIZER.stream()
        euro = TOKENIZER.encode("€").tolist()
        assert [stream.feed([i]) for i in [97, *euro[:2], EOS, euro[2]]] == ["a", "", "", "", "€"]
        assert stream.finish() == ""

    def test_an_incomplete_end_is_an_error_and_then_forgotten(self) -> None:
        stream = TOKENIZER.stream()
        assert stream.feed([0xE2]) == ""
        assert stream.finish() == "\ufffd"
        assert stream.feed(TOKENIZER.encode("ok")) == "ok"
        strict = TOKENIZER.stream(errors="strict")
        strict.feed([0xE2])
        with pytest.raises(UnicodeDecodeError):
            strict.finish()

    def test_ids_out_of_range_are_errors_here_too(self) -> None:
        with pytest.raises(ValueError, match="got 259 at position 0"):
            TOKENIZER.stream().feed([259])
