from collections import Counter

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from mlreviews.datasets import ADDITION_IDS, addition_problems, answer_loss, exact_match


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _texts(ids: Tensor) -> list[str]:
    return ["".join(ADDITION_IDS[i] for i in row) for row in ids.tolist()]


def _ids(*texts: str) -> Tensor:
    return torch.tensor([[ADDITION_IDS.index(symbol) for symbol in text] for text in texts])


def test_problems_are_right_and_laid_out_as_promised() -> None:
    lengths = torch.randint(1, 9, (300, 2), generator=_rng())
    ids = addition_problems(lengths, generator=_rng(1))
    assert ids.dtype == torch.int64
    assert ids.shape[1] == max(a + b + max(a, b) for a, b in lengths.tolist()) + 4
    for text, given in zip(_texts(ids), lengths.tolist(), strict=True):
        problem, answer = text.rstrip().removesuffix("$").split("=")
        numbers = problem.split("+")
        assert [len(number) for number in numbers] == given
        assert all(number == "0" or number[-1] != "0" for number in numbers)
        assert answer[::-1] == str(sum(int(number[::-1]) for number in numbers))
        assert text.rstrip().endswith("$")


def test_all_numbers_of_a_length_are_equally_likely() -> None:
    texts = _texts(addition_problems(torch.tensor([[1, 2]]).expand(9000, -1), generator=_rng()))
    one, two = (Counter(numbers) for numbers in zip(*(text.split("=")[0].split("+") for text in texts), strict=True))
    assert set(one) == set("0123456789")
    assert {number[::-1] for number in two} == {str(i) for i in range(10, 100)}
    assert all(stats.chisquare(list(counts.values())).pvalue > 1e-3 for counts in (one, two))


def test_the_longest_carry_fits() -> None:
    lengths = torch.tensor([[1, 1]]).expand(200, -1)
    ids = addition_problems(lengths, generator=_rng())
    assert ids.shape == (200, 7)
    assert "9+9=81$" in _texts(ids)
    assert "0+0=0$ " in _texts(ids)


def test_loss_and_match_look_at_answers_alone() -> None:
    ids = _ids("1+2=3$ ", "9+4=31$")
    logits = torch.randn(2, 6, len(ADDITION_IDS), generator=_rng())
    logits.requires_grad_()
    expected = nn.functional.cross_entropy(torch.cat([logits[0, 3:5], logits[1, 3:]]), _ids("3$31$")[0])
    loss = answer_loss(logits, ids)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, :3].any()
    assert not gradient[0, 5].any()
    right = 5.0 * nn.functional.one_hot(ids[:, 1:], len(ADDITION_IDS))
    assert exact_match(right, ids).tolist() == [True, True]
    for row, place, matters in [(0, 2, False), (0, 3, True), (0, 4, True), (0, 5, False), (1, 5, True), (1, 0, False)]:
        wrong = right.clone()
        wrong[row, place] = -wrong[row, place]
        expected_row = [True, True]
        expected_row[row] = not matters
        assert exact_match(wrong, ids).tolist() == expected_row


def test_the_generator_decides() -> None:
    lengths, before = torch.tensor([[5, 3]]).expand(4, -1), torch.get_rng_state()
    one, same, other = (addition_problems(lengths, generator=_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(addition_problems(lengths, generator=None), one)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(0, 2), (3,), (3, 3)])
def test_bad_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"lengths: expected \[batch, 2\]"):
        addition_problems(torch.ones(shape, dtype=torch.int64), generator=None)


def test_lengths_below_1_are_named() -> None:
    with pytest.raises(ValueError, match="lengths: expected at least 1, got 0"):
        addition_problems(torch.tensor([[2, 1], [0, 1]]), generator=None)
