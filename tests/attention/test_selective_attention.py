import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlreviews.attention import selective_attention as module
from mlreviews.attention.selective_attention import (
    BudgetStep,
    SelectiveAttention,
    accumulated_selection,
    keys_within_budget,
    memory_loss,
    memory_size,
    search_budgets,
    selection_mask,
    set_budgets,
)
from mlreviews.models import CausalAttention, TinyLM, TinyLMConfig
from tests.contracts.families import Sample

DIM, HEADS, KV_HEADS, BATCH, TIME = 24, 6, 3, 2, 11


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=_rng(seed))


def _layer(layer_class: type[CausalAttention] = SelectiveAttention, **options: Any) -> Any:
    """With logits large enough for much to be selected."""
    layer = layer_class(DIM, HEADS, kv_heads=KV_HEADS, generator=_rng(), **options).double()
    with torch.no_grad():
        layer.q_proj.weight *= 3
        layer.k_proj.weight *= 3
    return layer


def _x(time: int = TIME, seed: int = 1) -> Tensor:
    return _random(BATCH, time, DIM, seed=seed)


CONTRACT = {
    "SelectiveAttention": lambda: Sample(
        SelectiveAttention(8, 4, kv_heads=2, generator=_rng()), (_random(2, 7, 8, dtype=torch.float32),)
    ),
    "SelectiveAttention, with a budget": lambda: Sample(
        SelectiveAttention(8, 4, selector=3, budget=4, generator=_rng()), (_random(2, 8, 8, dtype=torch.float32),)
    ),
}


def _by_definition(logits: Tensor) -> Tensor:
    """F of one sequence, from what tokens strictly between key and query have selected."""
    time = len(logits)
    F = torch.zeros_like(logits)
    for i in range(time):
        for j in range(1, time):
            F[i, j] = sum(max(0.0, float(logits[k, j])) for k in range(j + 1, i))
    return F


def test_selection_by_its_definition() -> None:
    logits = _random(2, 8, 8)
    F = selection_mask(logits)
    for row in range(2):
        torch.testing.assert_close(F[row], _by_definition(logits[row]))
    total = accumulated_selection(logits)
    longer = accumulated_selection(torch.cat([_random(2, 8, 2), logits], 2)[:, 5:], _random(2, 10, seed=3).abs())
    assert total.shape == (2, 9, 8)
    assert longer.shape == (2, 4, 10)
    # going on from the middle: the sums so far are all that is needed
    torch.testing.assert_close(accumulated_selection(logits[:, 5:], total[:, 5]), total[:, 5:])


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_selection_never_shrinks_and_spares_the_first_and_the_last_two(time: int, seed: int) -> None:
    F = selection_mask(3 * _random(1, time, time, seed=seed))[0]
    assert (F >= 0).all()
    assert (F.diff(dim=0) >= 0).all()
    assert not F[:, 0].any()
    assert not F.triu(-1).any()


def test_padding_neither_selects_nor_is_selected() -> None:
    logits = _random(1, 7, 7).abs()
    mask = torch.tensor([[False, False, True, True, True, True, True]])
    total = accumulated_selection(logits, mask=mask)
    torch.testing.assert_close(total[:, 2:, 2:], accumulated_selection(logits[:, 2:, 2:]))
    assert not total[:, :, :2].any()


def test_the_layer_is_torchs_attention_with_the_selection_subtracted() -> None:
    layer, x = _layer(selector=4, rope_base=None), _x()
    q, k, v = (proj(x).unflatten(2, (-1, 4)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    logits = (q[:, 4] @ k[:, 2].mT / 2).detach()
    F = torch.stack([_by_definition(row) for row in logits])
    assert (F > 1).float().mean() > 0.15  # much is forgotten
    later = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    bias = (-F).masked_fill(later, -torch.inf)[:, None]
    expected = scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    y, state = layer(x)
    torch.testing.assert_close(y, layer.o_proj(expected.transpose(1, 2).flatten(2)))
    after = F[:, -1] + logits[:, -1].relu() * torch.tensor([0.0, *[1.0] * (TIME - 2), 0.0])
    torch.testing.assert_close(state.selection, after.double())
    torch.testing.assert_close(state.memory, memory_size(F).amax(1))
    assert state.length == TIME


def _never_selecting(**options: Any) -> tuple[SelectiveAttention, CausalAttention, Tensor]:
    layer, standard = _layer(rope_base=None, **options), _layer(CausalAttention, rope_base=None)
    with torch.no_grad():
        for one in (layer, standard):
            one.k_proj.weight.abs_()  # with positive inputs all keys are positive, all queries of head 0 negative
            one.q_proj.weight[:4] = -one.q_proj.weight[:4].abs()
    return layer, standard, _x().abs()


def test_reduces_to_scaled_dot_product_attention_where_nothing_is_selected() -> None:
    layer, standard, x = _never_selecting()
    y, state = layer(x)
    torch.testing.assert_close(y, standard(x)[0], rtol=1e-12, atol=1e-12)
    assert not state.selection.any()
    assert state.memory.tolist() == [TIME] * BATCH
    assert memory_loss([state, state], TIME).item() == 1


def test_reduces_to_scaled_dot_product_attention_of_first_token_and_window() -> None:
    layer, _, x = _never_selecting(budget=4)
    q, k, v = (proj(x).unflatten(2, (-1, 4)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    seen = torch.ones(TIME, TIME, dtype=torch.bool).tril().triu(-2)
    seen[:, 0] = True
    expected = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    y, state = layer(x)
    torch.testing.assert_close(y, layer.o_proj(expected.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(state.kept.keys, k.transpose(1, 2)[:, [0, -3, -2, -1]])
    assert state.memory.tolist() == [4.0] * BATCH


def _held_by_lists(F: Tensor, budget: int) -> list[list[int]]:
    """The tokens in the cache at each query of one sequence, by one decision after another."""
    held: list[int] = []
    found = []
    for i in range(len(F)):
        while len(held) > budget - 1:
            most = max(float(F[i, j]) for j in held if j > 0)
            held.remove(next(j for j in held if j > 0 and F[i, j] == most))
        held.append(i)
        found.append(list(held))
    return found


@pytest.mark.parametrize("budget", [2, 3, 5, 10, 11, 99])
def test_tokens_leave_one_after_another(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES", 3)  # blocks: 3, 3, 3, 2
    layer, x = _layer(budget=budget), _x()
    q, k, v = (t.transpose(1, 2) for t in layer.project(x, 0))
    F = selection_mask((q[:, 0] @ k[:, 0].mT / 2).detach())
    held = [_held_by_lists(row, budget) for row in F]
    seen = torch.zeros(BATCH, TIME, TIME, dtype=torch.bool)
    for row in range(BATCH):
        for i, tokens in enumerate(held[row]):
            seen[row, i, tokens] = True
    assert torch.equal(keys_within_budget(F, budget)[0], seen)
    bias = (-F).masked_fill(~seen, -torch.inf)[:, None]
    expected = scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    y, state = layer(x)
    torch.testing.assert_close(y, layer.o_proj(expected.transpose(1, 2).flatten(2)))
    for row in range(BATCH):
        torch.testing.assert_close(state.kept.keys[row], k[row, :, held[row][-1]].transpose(0, 1))
        torch.testing.assert_close(state.kept.values[row], v[row, :, held[row][-1]].transpose(0, 1))
    memory = ((1 - F.clamp(max=1)) * seen).sum(-1)
    torch.testing.assert_close(state.memory, memory.amax(1))
    assert state.length == TIME
    if budget >= TIME:
        torch.testing.assert_close(y, _layer()(x)[0])


def test_a_budget_that_is_lowered_counts_from_the_next_call_on() -> None:
    layer, x = _layer(), _x()
    _, state = layer(x)
    layer.budget = 4
    after, shorter = layer(_x(1, seed=5), state)
    least = [sorted(range(1, TIME), key=lambda j: (row[j], -j))[:2] for row in state.selection.tolist()]
    kept = [sorted([0, *tokens]) for tokens in least]
    for row in range(BATCH):
        torch.testing.assert_close(shorter.kept.keys[row, :3], state.kept.keys[row, kept[row]])
    assert shorter.kept.length == 4
    assert shorter.length == TIME + 1
    layer.budget = None
    assert layer(x, shorter)[1].kept.length == 4 + TIME
    assert state.kept.length == TIME  # a branch goes on from the old one
    assert after.isfinite().all()


@pytest.mark.parametrize("budget", [None, 4])
@pytest.mark.parametrize("prompt", [1, 5, 8])
def test_padded_rows_are_as_alone(budget: int | None, prompt: int) -> None:
    layer, x = _layer(budget=budget), _x()
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[1, :3] = False
    first, state = layer(x[:, :prompt], mask=mask[:, :prompt])
    y = [first]
    for t in range(prompt, TIME):
        out, state = layer(x[:, t : t + 1], state, mask=mask[:, t : t + 1])
        y.append(out)
    found = torch.cat(y, 1)
    assert found.isfinite().all()
    for row, start in enumerate((0, 3)):
        alone, end = layer(x[row : row + 1, start:])
        torch.testing.assert_close(found[row, start:], alone[0], rtol=1e-5, atol=1e-5)  # angles are float32
        torch.testing.assert_close(state.memory[row], end.memory[0], rtol=1e-5, atol=1e-5)


def test_rows_of_a_cache() -> None:
    layer, x = _layer(), _x()
    state = layer(x, mask=torch.arange(TIME) >= torch.tensor([[0], [2]]))[1]
    index = torch.tensor([1, 1, 0])
    more = _x(1, seed=4)[index]
    y, after = layer(more, state.rows(index))
    expected, end = layer(_x(1, seed=4), state)
    torch.testing.assert_close(y, expected[index])
    torch.testing.assert_close(after.selection, end.selection[index])
    torch.testing.assert_close(after.memory, end.memory[index])
    assert after.length == TIME + 1


def test_memory_counts_what_is_not_forgotten() -> None:
    time = 5
    F = torch.zeros(1, time, time, dtype=torch.float64)
    assert memory_size(F)[0].tolist() == [1, 2, 3, 4, 5]
    F[0, 4, 1], F[0, 4, 2], F[0, 3, 4] = 0.5, 7.0, 9.0  # the last is of a later token, which is not seen anyway
    assert memory_size(F)[0].tolist() == [1, 2, 3, 4, 3.5]
    assert memory_size(F, tau=2.0)[0].tolist() == [1, 2, 3, 4, 3.75]
    more = F.clone()
    sizes = []
    for _ in range(4):
        more = more + 0.4 * torch.ones_like(F)
        sizes.append(memory_size(more).sum().item())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 0


def test_memory_loss_is_the_mean_share_of_tokens() -> None:
    layer, x = _layer(tau=30.0), _x()
    mask = torch.arange(TIME) >= torch.tensor([[0], [2]])
    states = [layer(x, mask=mask)[1], layer(_x(seed=2), mask=mask)[1]]
    loss = memory_loss(states, mask.sum(1))
    expected = sum(state.memory[row].item() / (2 * n) for state in states for row, n in enumerate((TIME, TIME - 2))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    F = selection_mask(torch.einsum("bid,bjd->bij", *(t[:, :, 0] for t in layer.project(x, 0)[:2]))[:1] / 2)
    torch.testing.assert_close(states[0].memory[:1], memory_size(F, 30.0).amax(1))
    loss.backward()
    gradient = layer.k_proj.weight.grad
    assert gradient[:4].abs().max() > 0  # the keys of the head that selects
    assert not gradient[4:].any()


def _model() -> TinyLM:
    config = TinyLMConfig(vocab_size=9, d_model=8, layers=3, heads=2, hidden=16)
    return TinyLM(config, SelectiveAttention, generator=_rng())


def test_budgets_of_a_whole_model() -> None:
    model = _model()
    ids = torch.randint(9, (2, 12), generator=_rng())
    everything = model(ids).logits
    set_budgets(model, [4, None, 12])
    cache = model(ids).cache
    assert [state.kept.length for state in cache.layers] == [4, 12, 12]
    assert cache.length == 12
    set_budgets(model, [None] * 3)
    assert torch.equal(model(ids).logits, everything)


def test_search_takes_from_the_cheapest_layer() -> None:
    model = _model()
    layers = [m for m in model.modules() if isinstance(m, SelectiveAttention)]
    prices, asked = (5.0, 1.0, 2.0), []

    def loss() -> float:
        budgets = [layer.budget for layer in layers]
        asked.append(tuple(budgets))
        return sum(price * (8 - budget) ** 2 for price, budget in zip(prices, budgets, strict=True))

    path = search_budgets(model, loss, start=8, step=3, limit=70.0)
    assert path == [
        BudgetStep((8, 8, 8), 0.0),
        BudgetStep((8, 5, 8), 9.0),
        BudgetStep((8, 5, 5), 27.0),  # 18 more, rather than 27 for the second layer again
        BudgetStep((8, 2, 5), 54.0),
    ]
    # next: 45 more from the first layer, 54 from the third, none from the second, which would fall below 2
    assert asked[-2:] == [(5, 2, 5), (8, 2, 2)]
    assert [layer.budget for layer in layers] == [8, 2, 5]
    assert len(search_budgets(model, loss, start=3, step=1, limit=1e9)) == 4  # until all are at 2
    assert search_budgets(model, loss, start=4, step=1, limit=1.0) == []
    assert [layer.budget for layer in layers] == [4] * 3


def test_half_precision_is_as_near_as_its_rounding() -> None:
    for budget in (None, 5):
        layer = SelectiveAttention(DIM, HEADS, rope_base=None, budget=budget, generator=_rng()).bfloat16()
        x = _x().bfloat16()
        y, state = layer(x)
        exact = layer.double()(x.double())[0]
        assert y.dtype == torch.bfloat16
        assert state.selection.dtype == state.memory.dtype == torch.float32
        # q, k, v, heads and y are rounded, each by 2^-9 at most
        assert (y - exact).norm() < 3 * 2**-8 * exact.norm()


def test_what_is_selected_is_summed_up_in_single_precision_at_least() -> None:
    layer, x = SelectiveAttention(DIM, HEADS, budget=5, generator=_rng()), _x()
    y, exact = layer(x.float())[0], copy.deepcopy(layer).double()(x)[0]
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        state = layer(x.float())[1]
    assert state.kept.keys.dtype == torch.bfloat16
    assert state.selection.dtype == torch.float32


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument() -> None:
    for options, message in (
        ({"selector": 6}, "selector: expected a head from 0 to 5, got 6"),
        ({"selector": -1}, "selector: expected a head"),
        ({"tau": 0.0}, "tau: expected more than 0"),
        ({"budget": 1}, "budget: expected at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            _layer(**options)
    with pytest.raises(ValueError, match="x: expected"):
        _layer()(_random(2, 3, DIM + 1))
    with pytest.raises(ValueError, match="state: expected a cache"):
        _layer()(_x(), SelectiveAttention(DIM, HEADS, generator=_rng()).double()(_x())[1])
    with pytest.raises(ValueError, match="logits: expected no more queries than keys"):
        accumulated_selection(_random(1, 3, 2))
    with pytest.raises(ValueError, match="F: expected no more queries than keys"):
        keys_within_budget(_random(1, 3, 2), 2)
    with pytest.raises(ValueError, match="budget: expected at least 2, got 1"):
        keys_within_budget(_random(1, 2, 2), 1)
    with pytest.raises(ValueError, match="tau: expected more than 0"):
        memory_size(_random(1, 2, 2), tau=-1.0)
    with pytest.raises(ValueError, match="states: expected one"):
        memory_loss([], 3)
    model = _model()
    with pytest.raises(ValueError, match="budgets: expected one for each of 3 selective layers, got 2"):
        set_budgets(model, [2, 2])
    with pytest.raises(ValueError, match="budgets: expected at least 2, got 1"):
        set_budgets(model, [3, 3, 1])
    assert [m.budget for m in model.modules() if isinstance(m, SelectiveAttention)] == [None] * 3
    with pytest.raises(ValueError, match="start: expected at least 2"):
        search_budgets(model, lambda: 0.0, start=1, step=1, limit=1.0)
    with pytest.raises(ValueError, match="step: expected at least 1"):
        search_budgets(model, lambda: 0.0, start=4, step=0, limit=1.0)
    with pytest.raises(TypeError, match="SelectiveCache has no crop"):
        model(torch.zeros(1, 4, dtype=torch.int64)).cache.crop(2)


def test_defaults() -> None:
    layer = SelectiveAttention(8, 2)
    assert (layer.selector, layer.tau, layer.budget) == (0, 1.0, None)
