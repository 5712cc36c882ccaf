"""A tokenizer without a vocabulary file: id 0 to 255 is the byte of that value, and three special ids follow.

::

    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve")                     # tensor([110, 97, 195, 175, 118, 101])
    tokenizer.decode(ids)                               # "naïve"
    ids, mask = tokenizer.encode_batch(["a", "bcd"])    # [2, 3] each; mask is True at real tokens
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

__all__ = ["ByteTokenizer", "StreamDecoder"]

_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class ByteTokenizer:
    """Text as UTF-8 bytes, one id a byte. It has no state and no settings; the ids never change.

    Attributes:
        bos: 256, the begin of a sequence.
        eos: 257, the end of a document; windows of `mlreviews.datasets.TextSplit` end each document with it.
        pad: 258, fills the shorter rows of a batch.
        vocab_size: 259, the number of ids.
    """

    bos = 256
    eos = 257
    pad = 258
    vocab_size = 259

    def encode(self, text: str | bytes, *, bos: bool = False, eos: bool = False) -> Int64[Tensor, " length"]:
        """The ids of a text, one a byte of its UTF-8 form.

        Args:
            text: a string, or bytes of any content.
            bos: put the id `bos` in front.
            eos: put the id `eos` behind.

        Returns:
            int64 ids [length]; nothing is added unless asked for.

        Raises:
            UnicodeEncodeError: the string holds a lone surrogate, which UTF-8 has no bytes for.
        """
        if not isinstance(text, str | bytes):
            raise TypeError(f"text: expected str or bytes, got {type(text).__name__}")
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return torch.tensor([self.bos] * bos + list(raw) + [self.eos] * eos, dtype=torch.int64)

    def encode_batch(
        self,
        texts: Sequence[str | bytes],
        *,
        side: Literal["left", "right"] = "right",
        bos: bool = False,
        eos: bool = False,
    ) -> tuple[Int64[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
        """The ids of several texts, padded to the longest.

        Args:
            texts: at least one string or bytes.
            side: where the padding goes: "right" for training, "left" for generation.
            bos: begin every text with the id `bos`.
            eos: end every text with the id `eos`.

        Returns:
            int64 ids [batch, length], and a mask [batch, length] that is True at real tokens and False at padding.

        Raises:
            ValueError: no texts, or another side.
            TypeError: one text instead of a sequence of them.
        """
        if isinstance(texts, str | bytes):
            raise TypeError(f"texts: expected a sequence of texts, got one {type(texts).__name__}")
        if len(texts) == 0:
            raise ValueError("texts: expected at least one text, got none")
        if side not in ("left", "right"):
            raise ValueError(f"side: expected 'left' or 'right', got {side!r}")
        rows = [self.encode(text, bos=bos, eos=eos) for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        place = torch.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        if side == "left":
            mask = mask.flip(1)
        ids = torch.full(mask.shape, self.pad)
        ids[mask] = torch.cat(rows)
        return ids, mask

    def decode_bytes(self, ids: Tensor | Iterable[int]) -> bytes:
        """The bytes that ids stand for. Special ids stand for nothing and are left out.

        Args:
            ids: one sequence of ids: an integer tensor [length], or integers.

        Returns:
            the bytes; for every ``raw`` of type bytes, ``decode_bytes(encode(raw)) == raw``.

        Raises:
            ValueError: an id is not in 0 to 258, or the tensor has not one dimension.
            TypeError: the ids are not integers.
        """
        if isinstance(ids, Tensor):
            if ids.ndim != 1:
                raise ValueError(f"ids: expected one sequence, a tensor [length], got shape {tuple(ids.shape)}")
            if ids.dtype not in _INTEGERS:
                raise TypeError(f"ids: expected integers, got {ids.dtype}")
            ids = ids.tolist()
        values = list(ids)
        for position, value in enumerate(values):
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"ids: expected 0 to {self.vocab_size - 1}, got {value} at position {position}")
        return bytes(value for value in values if value < self.bos)

    def decode(self, ids: Tensor | Iterable[int], *, errors: str = "replace") -> str:
        """The text that ids stand for. Special ids are left out.

        Args:
            ids: one sequence of ids: an integer tensor [length], or integers.
            errors: what becomes of bytes that are not UTF-8, which a model may well sample: "replace" (by U+FFFD),
                "strict" (raises UnicodeDecodeError), "ignore", "backslashreplace" ... as in `bytes.decode`.

        Returns:
            the text; for every ``text`` of type str, ``decode(encode(text)) == text``.

        Raises:
            ValueError: an id is not in 0 to 258, or the tensor has not one dimension.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def stream(self, *, errors: str = "replace") -> StreamDecoder:
        """A decoder for ids that arrive a few at a time, as a model generates them; errors as in `decode`."""
        return StreamDecoder(self, errors)


class StreamDecoder:
    """Decodes ids that arrive in pieces and holds back a character until its last byte is there.

    The pieces of text, joined, are what `ByteTokenizer.decode` makes of all the ids at once. Made by
    `ByteTokenizer.stream`::

        stream = tokenizer.stream()
        for piece in generated:
            print(stream.feed(piece), end="")
        print(stream.finish())
    """

    def __init__(self, tokenizer: ByteTokenizer, errors: str) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def feed(self, ids: Tensor | Iterable[int]) -> str:
        """The text that is complete after these further ids: "" while a character is incomplete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is left of an incomplete character at the end, treated as an error; the decoder can then start anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
