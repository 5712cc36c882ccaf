"""Chunks of time for the Triton kernels of the scan cores: sequences whose lengths are only known on the GPU.

Chunk k of sequence i, which begins at token s, has the row ``s // size + i + k`` of whatever has one row a chunk. So
there are `rows` of them at most, whatever the offsets; some stay unused. A program finds its chunk from its row, and a
sequence its first row, without a sum over the sequences before, and nobody waits for the GPU.
"""

# Triton functions are not annotated: their arguments are pointers and compile-time constants.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

MANY = tl.constexpr(32)  # sequences that a program looks at at once


def rows(tokens: int, sequences: int, size: int) -> int:
    """How many rows are enough for chunks of ``size`` tokens, however the sequences are cut."""
    return tokens // size + sequences


@triton.jit
def chunk_at(row, most, offsets, sequences, size):
    """Of the chunk in a row out of ``most``: its sequence, where that begins and ends, and the chunk's start in it.

    That start counts from the sequence's; it may lie behind the end, where a row is not used.
    """
    row = row.to(tl.int32)
    low = tl.maximum(row - (most - sequences).to(tl.int32), 0)
    high = tl.minimum(row, sequences - 1)
    # the last sequence whose first row is not behind this one: a search that leaves one in MANY at each step
    while low < high:
        step = (high - low + MANY) // MANY
        number = low + step * tl.arange(0, MANY)
        known = number <= high
        first = tl.load(offsets + number, mask=known, other=0) // size + number
        found = low + (tl.sum((known & (first <= row)).to(tl.int32), 0) - 1) * step
        high = tl.minimum(high, found + step - 1)
        low = found
    sequence = low.to(tl.int64)
    begin, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    return sequence, begin, end, (row - begin // size - sequence) * size


@triton.jit
def first_row(sequence, begin, size):
    """Of a sequence's chunks."""
    return begin // size + sequence
