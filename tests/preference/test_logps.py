from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlreviews.preference import (
    linear_sequence_logps,
    linear_token_logps,
    logps,
    sequence_logps,
    shifted,
    token_logps,
)

VOCAB, DIM = 23, 5


def head(dtype: torch.dtype = torch.float64, *, batch: int = 3, time: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(batch, time, DIM, dtype=torch.float64, generator=generator)
    weight = torch.randn(VOCAB, DIM, dtype=torch.float64, generator=generator)
    bias = torch.randn(VOCAB, dtype=torch.float64, generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def tokens(batch: int = 3, time: int = 7) -> tuple[Tensor, Tensor]:
    """Labels, -100 where they don't count, and a mask with a row of nothing and one of everything."""
    generator = torch.Generator().manual_seed(8)
    labels = torch.randint(VOCAB, (batch, time), generator=generator)
    mask = torch.rand(batch, time, generator=generator) < 0.6
    mask[1], mask[2] = False, True
    labels[2, :2] = torch.tensor([0, VOCAB - 1])
    return torch.where(mask, labels, -100), mask


def by_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    """What torch's own loss says of each label; 0 where the label is -100."""
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    return -torch.nn.functional.cross_entropy(logits.mT, tokens()[0], reduction="none")


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (4, 0.7), (23, 0.7), (64, 1.0), (None, 0.7)])
def test_value_and_gradient_of_each_token_are_those_of_torchs_cross_entropy(
    frozen: bool, chunk: int | None, temperature: float
) -> None:
    hidden, weight, bias = head()
    labels, mask = tokens()
    upstream = torch.randn(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_(), bias.requires_grad_()])
    found = linear_token_logps(hidden, weight, labels, mask, bias=bias, temperature=temperature, chunk=chunk)
    wanted = by_cross_entropy(hidden, weight, bias, temperature)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_any_part_of_the_head_can_be_trained(trained: tuple[int, ...]) -> None:
    inputs = head()
    leaves = [inputs[i].requires_grad_() for i in trained]
    labels, mask = tokens()
    found = linear_token_logps(*inputs[:2], labels, mask, bias=inputs[2], chunk=6).square().sum()
    wanted = by_cross_entropy(*inputs).square().sum()
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk", [2, 23])
def test_half_precision_is_summed_in_single(chunk: int) -> None:
    """The error is that of rounding the inputs and the result once, and doesn't grow with the number of chunks."""
    hidden, weight, _ = (t.requires_grad_() for t in head(torch.bfloat16))
    labels, mask = tokens()
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(3))
    found = linear_token_logps(hidden, weight, labels, mask, chunk=chunk)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = by_cross_entropy(*exact, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted.float())
    gradients = torch.autograd.grad(found, (hidden, weight), upstream)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, exact, upstream.double()), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs.bfloat16(), rtol=2**-7, atol=1e-5)  # one step of rounding


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, _ = head()
    labels, mask = tokens()
    hidden = (hidden * 1e4).requires_grad_()
    found = linear_token_logps(hidden, weight, labels, mask, chunk=3)
    torch.testing.assert_close(found, by_cross_entropy(hidden, weight, None))
    assert torch.autograd.grad(found.sum(), hidden)[0].isfinite().all()


def test_sequences_are_sums_or_averages_of_their_tokens() -> None:
    hidden, weight, bias = head()
    labels, mask = tokens()
    logits = hidden @ weight.mT + bias
    per_token = by_cross_entropy(hidden, weight, bias)
    counts = torch.tensor([max(1, len(row[row >= 0])) for row in labels])
    for average, wanted in ((False, per_token.sum(1)), (True, per_token.sum(1) / counts)):
        torch.testing.assert_close(sequence_logps(logits, labels, mask, average=average), wanted)
        torch.testing.assert_close(
            linear_sequence_logps(hidden, weight, labels, mask, bias=bias, average=average, chunk=7), wanted
        )


@pytest.mark.parametrize("average", [False, True])
def test_an_answer_without_tokens_has_logp_0_and_no_gradient(average: bool) -> None:
    hidden, weight, _ = head(torch.float32)
    labels, mask = tokens()
    hidden.requires_grad_()
    for found in (
        linear_sequence_logps(hidden, weight, labels, mask, average=average),
        sequence_logps(hidden @ weight.mT, labels, mask, average=average),
        linear_sequence_logps(hidden, weight, labels, torch.zeros_like(mask), average=average),
    ):
        assert found[1] == 0
        assert torch.autograd.grad(found.sum(), hidden)[0][1].abs().max() == 0


def test_an_answer_of_one_token_has_its_logp_as_its_average() -> None:
    hidden, weight, _ = head(batch=1, time=1)
    label, mask = torch.tensor([[VOCAB - 1]]), torch.tensor([[True]])
    wanted = (hidden[0] @ weight.mT).log_softmax(-1)[:, -1]
    torch.testing.assert_close(sequence_logps(hidden @ weight.mT, label, mask, average=True), wanted)
    torch.testing.assert_close(linear_sequence_logps(hidden, weight, label, mask, average=True), wanted)


def test_no_rows_have_no_logps() -> None:
    hidden, weight, _ = head(batch=0)
    labels = torch.empty(0, 7, dtype=torch.int64)
    assert token_logps(hidden @ weight.mT, labels).shape == (0, 7)
    assert linear_sequence_logps(hidden, weight, labels, labels.bool()).shape == (0,)


@pytest.mark.parametrize(("entries", "words"), [(1, 256), (21 * 300, 300), (21 * 301 - 1, 300), (2**21, 640)])
def test_a_tile_has_its_entries_and_256_words_at_least(
    monkeypatch: pytest.MonkeyPatch, entries: int, words: int
) -> None:
    widths: list[int] = []

    def tiles(*args):  # type: ignore[no-untyped-def]
        for tile in made(*args):
            widths.append(tile[2].shape[1])
            yield tile

    made = logps._tiles
    monkeypatch.setattr(logps, "TILE", entries)
    monkeypatch.setattr(logps, "_tiles", tiles)
    hidden, _, _ = head()
    weight = torch.randn(640, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels, mask = torch.zeros(3, 7, dtype=torch.int64), torch.ones(3, 7, dtype=torch.bool)
    linear_token_logps(hidden, weight, labels, mask)
    assert max(widths) == words
    assert sum(widths) == 640


def test_what_padding_holds_and_on_which_side_it_is_never_matters() -> None:
    """Masked positions are not even computed: their states may be NaN."""
    hidden, weight, _ = head()
    labels, mask = tokens()
    wanted = linear_sequence_logps(hidden, weight, labels, mask)
    spoilt = torch.where(mask[..., None], hidden, torch.nan)
    torch.testing.assert_close(linear_sequence_logps(spoilt, weight, labels, mask), wanted)
    logits = hidden @ weight.mT
    other = torch.where(mask[..., None], logits, -logits * 3)
    torch.testing.assert_close(sequence_logps(other, torch.where(mask, labels, 5), mask), wanted)
    moved = [t.roll(3, dims=1) for t in (logits, labels, mask)]
    torch.testing.assert_close(sequence_logps(*moved), wanted)


def test_labels_are_shifted_with_their_mask() -> None:
    """The last token of the answer counts, end of text included; the first token of a row has no prediction."""
    ids = torch.tensor([[9, 3, 4, 2], [5, 6, 2, 2]])  # 2 ends the text and pads
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    inputs, labels, counted = shifted(ids, mask)
    assert inputs.tolist() == [[9, 3, 4], [5, 6, 2]]
    assert labels[counted].tolist() == [4, 2, 6, 2]
    table = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).log_softmax(1)  # predicts from one token
    found = sequence_logps(table[inputs], labels, counted)
    torch.testing.assert_close(found, torch.stack([table[3, 4] + table[4, 2], table[5, 6] + table[6, 2]]))


def test_strided_inputs_and_int32_labels() -> None:
    hidden, weight, _ = head()
    labels, mask = tokens()
    wanted = linear_token_logps(hidden, weight, labels, mask)
    strided = torch.stack([hidden, hidden], -1)[..., 0], weight.mT.contiguous().mT, labels.mT.contiguous().mT.int()
    torch.testing.assert_close(linear_token_logps(*strided, mask, chunk=9), wanted)


def test_autocast_does_not_round_the_products() -> None:
    hidden, weight, _ = head(torch.float32)
    labels, mask = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_token_logps(hidden, weight, labels, mask)
    assert torch.equal(found, linear_token_logps(hidden, weight, labels, mask))


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    hidden, weight, bias = head()
    labels, mask = tokens()
    logits = hidden @ weight.mT
    with pytest.raises(ValueError, match=r"mask: .*of bool"):
        sequence_logps(logits, labels, mask.long())
    with pytest.raises(ValueError, match="mask"):
        linear_token_logps(hidden, weight, labels, mask[:, 1:])
    with pytest.raises(ValueError, match=r"labels: .*\[0, 23\).* -100 to"):
        token_logps(logits, labels)
    with pytest.raises(ValueError, match=r"labels: .*\[0, 23\).* to 23"):
        linear_token_logps(hidden, weight, labels.clamp(min=0) + 1, mask)
    with pytest.raises(ValueError, match=r"labels: .*\[0, 23\).* got 23 to 23"):
        token_logps(logits[:1, :1], torch.tensor([[VOCAB]]))
    with pytest.raises(ValueError, match=r"labels: .*as logits has"):
        sequence_logps(logits[:, 1:], labels, mask)
    with pytest.raises(ValueError, match="weight"):
        linear_token_logps(hidden, weight.mT, labels.clamp(max=4), mask)
    with pytest.raises(ValueError, match="bias"):
        linear_token_logps(hidden, weight, labels, mask, bias=bias[1:])
    with pytest.raises(ValueError, match="temperature"):
        linear_token_logps(hidden, weight, labels, mask, temperature=0.0)
    with pytest.raises(ValueError, match="chunk"):
        linear_token_logps(hidden, weight, labels, mask, chunk=0)
    with pytest.raises(ValueError, match=r"ids: expected at least 2"):
        shifted(labels[:, :1], mask[:, :1])
    with pytest.raises(ValueError, match=r"mask: .*as ids has"):
        shifted(labels, mask[:, :1])
