"""Jacobi decoding: linear systems with a known solution, and plain decoding with the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from mlreviews.decoding import gs_jacobi_solve, jacobi_decode, jacobi_gs_solve, jacobi_solve
from mlreviews.models import Sampler, TinyLM, TinyLMConfig, generate
from tests.contracts.families import Sample
from tests.decoding.models import TableLM, law_of_chain

TIME, REST = 7, 3
FREE = Sampler(temperature=0.9, top_k=4, top_p=0.95)

CONTRACT = {
    "jacobi_decode": lambda: Sample(
        jacobi_decode, (TableLM.random(5, 0), torch.tensor([[1, 2], [3, 0]]), 6), {"sampler": Sampler(temperature=1.0)}
    )
}


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _system(batch: int = 2) -> tuple[Tensor, Tensor]:
    """A strictly lower triangular matrix and a right side, [time, time] and [batch, time, rest]."""
    lower = torch.randn(TIME, TIME, generator=_rng(), dtype=torch.float64).tril(-1)
    return lower, torch.randn(batch, TIME, REST, generator=_rng(1), dtype=torch.float64)


def _model(scale: float = 6.0) -> TinyLM:
    config = TinyLMConfig(vocab_size=11, d_model=12, layers=2, heads=2, hidden=16, tied=False)
    model = TinyLM(config, generator=_rng()).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def _ids(batch: int = 3, time: int = 4) -> Tensor:
    return torch.randint(11, (batch, time), generator=_rng(5))


@pytest.mark.parametrize("block_size", [1, 3, TIME])
def test_reduces_to_solve_triangular(block_size: int) -> None:
    lower, right = _system()
    expected = torch.linalg.solve_triangular(torch.eye(TIME).double() + lower, right, upper=False)
    init = torch.randn(2, TIME, REST, generator=_rng(2), dtype=torch.float64)

    def step(x: Tensor) -> Tensor:
        return right - lower @ x

    solution, iterations = jacobi_solve(step, init)
    torch.testing.assert_close(solution, expected)
    assert iterations == TIME
    torch.testing.assert_close(gs_jacobi_solve(step, init, block_size)[0], expected)


def test_after_k_iterations_the_first_k_unknowns_are_right() -> None:
    lower, right = _system()
    expected = torch.linalg.solve_triangular(torch.eye(TIME).double() + lower, right, upper=False)
    for k in range(1, TIME + 1):
        found, iterations = jacobi_solve(lambda x: right - lower @ x, torch.full_like(right, 9.0), max_iters=k)
        assert iterations == k
        torch.testing.assert_close(found[:, :k], expected[:, :k])
        if k < TIME:
            assert float((found[:, k] - expected[:, k]).abs().min()) > 1e-3


def test_what_does_not_depend_is_found_at_once_and_checked_once() -> None:
    _, right = _system()
    assert jacobi_solve(lambda x: right, torch.zeros_like(right))[1] == 2
    assert jacobi_solve(lambda x: right, right)[1] == 1
    assert jacobi_solve(lambda x: right, right + 1e-3, atol=1e-2)[1] == 1
    assert jacobi_solve(lambda x: right, right + 1e-3, atol=1e-4)[1] == 2


def test_blocks_lie_between_the_sequential_computation_and_jacobi() -> None:
    lower, right = _system()
    lower, right = lower[:6, :6], right[:, :6]
    expected = torch.linalg.solve_triangular(torch.eye(6).double() + lower, right, upper=False)
    calls = []

    def step(x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return right.repeat_interleave(len(x) // 2, 0) - lower @ x

    init = torch.zeros_like(right)
    for size, blocks in ((1, 6), (2, 3), (3, 2), (6, 1)):
        calls.clear()
        found, iterations = jacobi_gs_solve(step, init, size)
        torch.testing.assert_close(found, expected)
        assert iterations == blocks
        assert calls == [2 * blocks] * (size * blocks)
    # each block sees of the others what the last iteration left
    once = jacobi_gs_solve(step, init, 3)[0]
    torch.testing.assert_close(once, expected)
    calls.clear()
    found, iterations = gs_jacobi_solve(step, init, 1)
    assert iterations == 6 == len(calls)
    assert gs_jacobi_solve(step, init, 6)[1] == jacobi_solve(step, init)[1]
    assert gs_jacobi_solve(step, init, 4)[1] == 4 + 2


def test_blocks_in_parallel_use_old_values_of_each_other() -> None:
    """The second block's unknown is the first one's plus 1; after one iteration it still has the first guess plus 1."""
    seen = []

    def step(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.cat([torch.full_like(x[:, :1], 5.0), x[:, :-1] + 1], 1)

    found, iterations = jacobi_gs_solve(step, torch.zeros(1, 4), 2)
    assert found.tolist() == [[5.0, 6.0, 7.0, 8.0]]
    assert iterations == 2
    assert seen[2].tolist() == [[5.0, 6.0, 1.0, 2.0]] * 2  # the copies at the begin of the second iteration


@pytest.mark.parametrize("block_size", [1, 3, 8, 50])
@pytest.mark.parametrize("init", ["random", "last"])
def test_greedy_tokens_are_those_of_plain_decoding(block_size: int, init: Any) -> None:
    model, ids = _model(), _ids()
    expected = generate(model, ids, 20, stop_tokens=[2], pad=9)
    found = jacobi_decode(model, ids, 20, block_size=block_size, init=init, stop_tokens=[2], pad=9, generator=_rng())
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    assert len(set(found.lengths.tolist())) > 1  # rows end at different times
    assert found.target_calls <= expected.target_calls
    assert found.accepted is not None
    assert found.drafted is not None
    assert found.accepted.shape == (found.target_calls, 3)
    assert torch.equal(found.accepted < 0, found.drafted < 0)
    assert bool((found.accepted <= found.drafted).all())


def test_guesses_that_are_right_save_passes() -> None:
    table = torch.full((6, 5, 5), -9.0)
    table[:, torch.arange(5), torch.arange(5)] = 9.0  # each token repeats itself
    found = jacobi_decode(TableLM(table), torch.tensor([[3]]), 20, block_size=8)
    assert found.row(0).tolist() == [3] * 20
    assert found.target_calls == 3
    assert found.accepted is not None
    assert found.drafted is not None
    assert found.accepted.flatten().tolist() == found.drafted.flatten().tolist() == [8, 8, 4]
    assert jacobi_decode(TableLM(table), torch.tensor([[3]]), 40).drafted[:, 0].tolist() == [16, 16, 8]  # type: ignore[index]
    # of a prompt of other tokens the last one alone is right
    prompt = torch.tensor([[0, 1, 2, 4, 0, 1, 2, 3]])
    calls = [jacobi_decode(TableLM(table), prompt, 20, block_size=8, init=i).target_calls for i in ("last", "random")]
    assert calls[0] == 3 < calls[1]
    wrong = jacobi_decode(TableLM(table.roll(1, 2)), torch.tensor([[3]]), 10, block_size=5)
    assert wrong.row(0).tolist() == [4, 0, 1, 2, 3, 4, 0, 1, 2, 3]  # each is the one before plus 1: nothing to guess
    assert wrong.target_calls <= 10


@pytest.mark.parametrize("sampler", [FREE, Sampler(temperature=1.3, repetition_penalty=1.7)])
def test_reduces_to_plain_decoding_with_the_same_noise(sampler: Sampler) -> None:
    model, ids = _model(3.0), _ids()
    one = jacobi_decode(model, ids, 12, block_size=1, sampler=sampler, generator=_rng(8))
    assert one.target_calls == 12
    for block_size in (4, 12):
        found = jacobi_decode(model, ids, 12, block_size=block_size, sampler=sampler, generator=_rng(8))
        assert torch.equal(found.tokens, one.tokens)
    assert not torch.equal(one.tokens, jacobi_decode(model, ids, 12, sampler=sampler, generator=_rng(9)).tokens)


def test_the_penalty_of_repetitions_counts_the_tokens_before_alone() -> None:
    model, ids = _model(3.0), _ids()
    sampler = Sampler(repetition_penalty=1.5)
    expected = generate(model, ids, 12, sampler=sampler)
    assert torch.equal(jacobi_decode(model, ids, 12, block_size=5, sampler=sampler).tokens, expected.tokens)
    assert not torch.equal(expected.tokens, generate(model, ids, 12).tokens)


def test_the_law_is_the_model_s() -> None:
    model, rows = TableLM.random(3, 1, scale=0.7), 4000
    sampler = Sampler(temperature=0.8, top_p=0.9)
    ids = torch.tensor([[2, 0]])
    law = law_of_chain(model, ids, 3, sampler)
    found = jacobi_decode(model, ids.expand(rows, -1), 3, block_size=3, sampler=sampler, generator=_rng()).tokens
    counts = {key: 0 for key in law}
    for row in found.tolist():
        counts[(tuple(row),)] += 1
    assert chisquare(list(counts.values()), [rows * p for p in law.values()]).pvalue > 1e-3


def test_padding_on_the_left_changes_nothing() -> None:
    model, ids = _model(), _ids(1, 6)
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1), torch.arange(9)[None] >= 3
    for sampler in (Sampler(), Sampler(repetition_penalty=1.5)):
        expected = generate(model, ids, 9, sampler=sampler).tokens
        assert torch.equal(jacobi_decode(model, padded, 9, block_size=4, mask=mask, sampler=sampler).tokens, expected)


def test_no_budget_no_pass() -> None:
    found = jacobi_decode(_model(), _ids(), 0)
    assert (found.tokens.shape, found.target_calls) == ((3, 0), 0)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named() -> None:
    model = TableLM.random(4, 0, scale=1.0)
    ids, init = torch.tensor([[1]]), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="block_size"):
        jacobi_decode(model, ids, 3, block_size=0)
    with pytest.raises(ValueError, match="init"):
        jacobi_decode(model, ids, 3, init="zeros")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input_ids"):
        jacobi_decode(model, ids[:, :0], 3)
    with pytest.raises(ValueError, match="logits"):
        jacobi_decode(TableLM(model.table * torch.nan), ids, 3)
    with pytest.raises(ValueError, match="init"):
        jacobi_solve(lambda x: x, init[0])
    with pytest.raises(ValueError, match="init"):
        jacobi_solve(lambda x: x, init[:, :0])
    with pytest.raises(ValueError, match="max_iters"):
        jacobi_solve(lambda x: x, init, max_iters=0)
    with pytest.raises(ValueError, match="atol"):
        gs_jacobi_solve(lambda x: x, init, 2, atol=-1.0)
    with pytest.raises(ValueError, match="block_size"):
        gs_jacobi_solve(lambda x: x, init, 0)
    with pytest.raises(ValueError, match="block_size"):
        jacobi_gs_solve(lambda x: x, init, 3)
