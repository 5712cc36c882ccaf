"""What the attention cores share; that they compute the right thing is for the tests of each core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlreviews_kernels import BackendError, softmaxes, use_backend
from mlreviews_kernels.attention.reference import allowed
from mlreviews_kernels.backends import Choice, Core
from mlreviews_kernels.softmaxes import Geometry, check_scale, chosen_for, flat_mask, library_for, offsets_of_both
from tests.kernels.test_attention import drawn, hostile_memory

__all__ = ["hostile_memory"]  # a fixture of all tests here
CORE = Core("some", frozenset({"reference.py", "cpu.py", "gpu.py"}))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 20])
@pytest.mark.parametrize(("q_offsets", "k_offsets"), [([0, 5, 5, 12], [0, 9, 11, 14]), ([0, 7], [0, 7])])
def test_blocks_hold_all_that_is_seen_and_no_other_key(
    causal: bool, window: int, q_offsets: list[int], k_offsets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmaxes, "ROWS", 3)
    found = torch.zeros(q_offsets[-1], k_offsets[-1], dtype=torch.bool)
    for sequence, rows, keys, seen in Geometry(q_offsets, k_offsets, causal, window).blocks():
        assert q_offsets[sequence] <= rows.start < rows.stop <= min(rows.start + 3, q_offsets[sequence + 1])
        assert k_offsets[sequence] <= keys.start <= keys.stop <= k_offsets[sequence + 1]
        found[rows, keys] = True if seen is None else seen
        assert seen is None or not seen.all()
        if seen is not None and window < 20:
            assert seen[:, 0].any()  # the first key is somebody's
            assert seen[:, -1].any()
    expected = torch.zeros_like(found)
    for i in range(len(q_offsets) - 1):
        spans = slice(q_offsets[i], q_offsets[i + 1]), slice(k_offsets[i], k_offsets[i + 1])
        expected[spans] = allowed(i, spans, None, causal=causal, window=window, device=torch.device("cpu"))
    assert torch.equal(found, expected)


def test_masks_of_keys_are_laid_out_like_the_keys() -> None:
    q, k, _ = drawn(3, 4)
    mask = torch.rand(2, 4) > 0.5
    flat = flat_mask(mask, q, k)
    assert flat is not None
    assert torch.equal(flat, torch.cat([mask[0], mask[1]]))
    assert flat_mask(None, q, k) is None
    pairs = torch.ones(2, 3, 4, dtype=torch.bool)
    assert flat_mask(pairs, q, k) is pairs


def test_offsets_of_rows_of_different_lengths() -> None:
    q, k, _ = drawn(3, 4)
    assert [x.tolist() for x in offsets_of_both(q, k, None)] == [[0, 3, 6], [0, 4, 8]]
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected as many keys as queries, got 4 and 3"):
        offsets_of_both(q[:1], k[:1], torch.tensor([0, 3]))


def test_offsets_stay_when_the_caller_changes_his() -> None:
    q, cu_seqlens = drawn(3, 3)[0][:1], torch.tensor([0, 1, 3])
    found = offsets_of_both(q, q, cu_seqlens)
    cu_seqlens[1] = 2
    assert [x.tolist() for x in found] == [[0, 1, 3], [0, 1, 3]]


def test_the_scale_is_that_of_the_width_unless_given() -> None:
    assert check_scale(None, 16) == 0.25
    assert check_scale(2, 16) == 2.0


@pytest.mark.parametrize(("dtype", "width", "fits"), [
    (torch.float32, 128, True), (torch.bfloat16, 128, True), (torch.float32, 129, False), (torch.float64, 4, False),
])  # fmt: skip
def test_what_triton_takes(dtype: torch.dtype, width: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, dtype=dtype)
    monkeypatch.setattr(softmaxes, "select", lambda *_: Choice("triton", "the default on a GPU"))
    backend, choice = chosen_for(CORE, q, width)
    assert backend == ("triton" if fits else "cpu")
    assert choice.tolist() == [2 if fits else 1]
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        if fits:
            assert chosen_for(CORE, q, width)[0] == "triton"
        else:
            with pytest.raises(BackendError, match="asked for by use_backend can't be used: they compute in float32"):
                chosen_for(CORE, q, width)
    with use_backend("reference"):
        assert chosen_for(CORE, q, width)[0] == "reference"


def test_a_backward_that_triton_lacks_is_left_to_pytorch_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1)
    monkeypatch.setattr(softmaxes, "select", lambda *_: Choice("triton", "the default on a GPU"))
    backend, choice = chosen_for(CORE, q, 4, backward=False)
    assert (backend, choice.tolist()) == ("triton", [1])
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, expected in (("reference", 0), ("triton", 2)):
        with use_backend(name):
            backend, choice = chosen_for(CORE, q, 4, backward=False)
        assert (backend, choice.tolist()) == (name, [expected])


def test_a_few_queries_over_a_cache_are_not_worth_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(softmaxes, "load", loaded.append)
    two = Geometry([0, 4, 8], [0, 9, 514], True, 0)
    q = torch.zeros(8, 1, 1)
    library_for(Path("cpu.cpp"), q, two)
    assert not loaded
    library_for(Path("cpu.cpp"), torch.zeros(9, 1, 1, dtype=torch.float64), two)
    library_for(Path("cpu.cpp"), torch.zeros(9, 1, 1, device="meta"), two)
    assert not loaded
    library_for(Path("cpu.cpp"), torch.zeros(9, 1, 1), two)
    assert loaded == [Path("cpu.cpp")]
    library_for(Path("cpu.cpp"), q, Geometry([0, 4, 8], [0, 9, 512], True, 0))  # few keys: a loop would cost more
    assert len(loaded) == 2
