"""Text corpora as bytes, with a fixed split by file, and windows of them for language models.

::

    corpus = python_source()                        # or text_corpus("mine", {"a/b.txt": b"...", ...}, "what it is")
    for window in corpus.train.batches(length=128, batch_size=16, generator=generator):   # endless
        inputs, targets = window[:, :-1], window[:, 1:]
    for window in corpus.validation.sweep(length=128, batch_size=16):                     # every byte once
        ...

Windows hold ids of `mlreviews.datasets.ByteTokenizer`: bytes, and `ByteTokenizer.eos` after each document.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from mlreviews.common.checks import check_count
from mlreviews.datasets.tokenizer import ByteTokenizer

__all__ = ["TextCorpus", "TextSplit", "text_corpus"]


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Documents one after another, as bytes. A byte 0 ends each document; no document contains one.

    Attributes:
        data: uint8 [bytes], all documents with their ends. Shared between callers: do not change it in place.
        offsets: int64 [documents + 1]; document i, with its end, is ``data[offsets[i] : offsets[i + 1]]``.
        files: the path of each document inside the corpus, sorted.
    """

    data: UInt8[Tensor, " bytes"]
    offsets: Int64[Tensor, " documents_plus_1"]
    files: tuple[str, ...]

    def document(self, file: str) -> bytes:
        """The bytes of one of the `files`, without the 0 at its end.

        Raises:
            KeyError: no such file.
        """
        if file not in self.files:
            raise KeyError(f"file: {file!r} is not in this split of {len(self.files)} files")
        index = self.files.index(file)
        return bytes(self.data[self.offsets[index] : self.offsets[index + 1] - 1].numpy())

    def batches(
        self, length: int, batch_size: int, generator: torch.Generator, *, within_documents: bool = False
    ) -> Iterator[Int64[Tensor, "batch window"]]:
        """Random windows without end, for training. All windows that exist are equally likely.

        Args:
            length: tokens to predict in a window (targets).
            batch_size: windows in a batch.
            generator: a CPU generator; the same seed gives the same windows.
            within_documents: only windows that lie in one document (its end included).

        Yields:
            int64 ids [batch_size, length + 1]: ``window[:, :-1]`` are the inputs, ``window[:, 1:]`` the targets.

        Raises:
            ValueError: length or batch_size below 1, or nothing here is long enough for a window.
        """
        check_count("length", length)
        check_count("batch_size", batch_size)
        bounds = self.offsets if within_documents else self.offsets[[0, -1]]
        starts = (bounds.diff() - length).clamp(min=0)  # how many windows begin in each stretch
        total = int(starts.sum())
        if total == 0:
            what = "document" if within_documents else "text"
            longest = int(bounds.diff().max())
            raise ValueError(f"length: expected less than the longest {what}, {longest} bytes, got {length}")
        up_to = starts.cumsum(0)

        def draw() -> Int64[Tensor, "batch window"]:
            number = torch.randint(total, (batch_size,), generator=generator)
            stretch = torch.searchsorted(up_to, number, right=True)
            return self._windows(bounds[stretch] + number - (up_to - starts)[stretch], length)

        return (draw() for _ in itertools.count())

    def sweep(self, length: int, batch_size: int) -> Iterator[Int64[Tensor, "batch window"]]:
        """The whole split in order, for evaluation: over all windows each token but the first is a target exactly once.

        Args:
            length: tokens to predict in a window (targets).
            batch_size: windows in a batch.

        Yields:
            int64 ids [batch_size, length + 1]; towards the end a batch of fewer windows, and last, where the length
            does not divide the split, one shorter window [1, rest + 1].

        Raises:
            ValueError: length or batch_size below 1.
        """
        check_count("length", length)
        check_count("batch_size", batch_size)
        whole, rest = divmod(len(self.data) - 1, length)
        groups = (torch.arange(whole) * length).split(batch_size) if whole else ()
        last = [(torch.tensor([whole * length]), rest)] if rest else []
        return (self._windows(start, size) for start, size in [*((group, length) for group in groups), *last])

    def _windows(self, start: Int64[Tensor, " batch"], length: int) -> Int64[Tensor, "batch window"]:
        ids = self.data[start[:, None] + torch.arange(length + 1)].long()
        return ids.masked_fill_(ids == 0, ByteTokenizer.eos)


@dataclass(frozen=True, eq=False)
class TextCorpus:
    """A text corpus with a fixed split by file.

    Attributes:
        name: short name, for tables and figures.
        description: what the text is, from which version, how much of it, and its licence; to be put beside numbers
            measured on it.
        train: about seven eighths of the files.
        validation: the rest.
    """

    name: str
    description: str
    train: TextSplit
    validation: TextSplit


def text_corpus(name: str, documents: Mapping[str, bytes], description: str) -> TextCorpus:
    """A corpus from documents of one's own.

    A file belongs to validation when the SHA-256 hash of its path begins with a byte below 32: an eighth of all paths.
    So it stays on its side when other files come or go, and two corpora made from the same files are split alike.

    Args:
        name: short name.
        documents: contents by path, with "/" between folders. Empty documents are left out.
        description: what the text is; the sizes of the two parts are added to it.

    Raises:
        TypeError: a document is not bytes.
        ValueError: a document holds a byte 0, or one of the two parts would have no document.
    """
    parts: dict[str, dict[str, bytes]] = {"train": {}, "validation": {}}
    for path, text in sorted(documents.items()):
        if not isinstance(text, bytes):
            raise TypeError(f"documents: expected bytes, got {type(text).__name__} for {path!r}")
        if b"\0" in text:
            raise ValueError(f"documents: {path!r} holds a byte 0, which ends documents")
        if text:
            held_out = hashlib.sha256(path.encode()).digest()[0] < 32
            parts["validation" if held_out else "train"][path] = text
    for part, chosen in parts.items():
        if not chosen:
            raise ValueError(f"documents: none of the {len(documents)} falls into the {part} part")
    sizes = "; ".join(f"{p}: {len(c)} files, {sum(map(len, c.values())):,} bytes" for p, c in parts.items())
    return TextCorpus(name, f"{description} ({sizes})", _split(parts["train"]), _split(parts["validation"]))


def _split(documents: Mapping[str, bytes]) -> TextSplit:
    joined = bytearray().join(text + b"\0" for text in documents.values())
    ends = itertools.accumulate((len(text) + 1 for text in documents.values()), initial=0)
    return TextSplit(torch.frombuffer(joined, dtype=torch.uint8), torch.tensor(list(ends)), tuple(documents))
