"""Every public layer with ``forward(x, state) -> (y, state)`` and ``step``: a sequence may be cut anywhere.

In values and gradients, with steps as with parts; the future is not seen; and where a layer takes a mask or documents
packed into one row, neither padding nor neighbours have an effect. What the layer computes is for its own tests.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tests.contracts.families import Member, members

CASES = [(member, label) for member in members("recurrent") for label in member.labels()]


def _takes(case: tuple[Member, str], argument: str) -> bool:
    return argument in inspect.signature(case[0].sample().target.forward).parameters


def _each(cases: list[tuple[Member, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"{case[0].technique.slug}:{case[1]}")


each_layer = _each(CASES)
each_masked = _each([case for case in CASES if _takes(case, "mask")])
each_packed = _each([case for case in CASES if _takes(case, "cu_seqlens")])


def _make(case: tuple[Member, str], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """The layer, and an input [2, time, features]."""
    member, label = case
    sample = member.sample(label)
    layer, (x,) = sample.target.to(dtype), sample.args
    assert x.ndim == 3
    assert x.shape[0] == 2
    assert x.shape[1] >= 5
    return layer, x.to(dtype)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _is_real(leaf: Any) -> bool:
    """Whether it can have a gradient: a state may hold counts, too."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _rows(state: Any, rows: slice) -> Any:
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, state)


def _detached(state: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, state)


def _gradients(y: Tensor, state: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    loss = (y * _random(*y.shape)).sum() + sum(leaf.square().sum() for leaf in tree_leaves(state) if _is_real(leaf))
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def _steps(layer: Any, x: Tensor, state: Any) -> tuple[list[Tensor], Any]:
    outputs = []
    for x_t in x.unbind(1):
        before = _detached(state)
        y, following = layer.step(x_t, state)
        torch.testing.assert_close(_detached(state), before, rtol=0, atol=0)  # nothing is changed in place
        outputs.append(y[:, None])
        state = following
    return outputs, state


@each_layer
def test_parts_equal_the_whole_in_values_and_gradients(case: tuple[Member, str]) -> None:
    layer, x = _make(case)
    inputs = [x.requires_grad_(), *layer.parameters()]
    whole, last = layer(x)
    expected = _gradients(whole, last, inputs)
    for cut in range(1, x.shape[1]):
        first, state = layer(x[:, :cut])
        second, end = layer(x[:, cut:], state)
        parts = torch.cat([first, second], 1)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(end, last)
        torch.testing.assert_close(_gradients(parts, end, inputs), expected)


@each_layer
def test_steps_after_any_prefill_equal_the_whole(case: tuple[Member, str]) -> None:
    layer, x = _make(case)
    whole, last = layer(x)
    for prefill in range(0, x.shape[1], max(1, x.shape[1] // 7)):
        first, state = layer(x[:, :prefill]) if prefill else (None, None)
        outputs, state = _steps(layer, x[:, prefill:], state)
        stepped = torch.cat(outputs if first is None else [first, *outputs], 1)
        torch.testing.assert_close(stepped, whole)
        torch.testing.assert_close(state, last)
        if prefill == 1:
            pairs = ((stepped, state), (whole, last))
            found, expected = (_gradients(*pair, list(layer.parameters())) for pair in pairs)
            torch.testing.assert_close(found, expected)


@each_layer
def test_gradients_of_inputs_state_and_parameters(case: tuple[Member, str]) -> None:
    layer, x = _make(case)
    _, state = layer(x[:1, :3])
    leaves, tree = tree_flatten(_detached(state))
    places = [i for i, leaf in enumerate(leaves) if _is_real(leaf)]
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=False):
            filled[place] = tensor
        parameters = dict(zip(names, tensors[len(places) :], strict=True))
        y, after = torch.func.functional_call(layer, parameters, (x, tree_unflatten(filled, tree)))
        return y, *filter(_is_real, tree_leaves(after))

    inputs = [t.detach().clone().requires_grad_() for t in (x[:1, 3:6], *(leaves[i] for i in places), *values)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@each_layer
def test_the_future_is_not_seen(case: tuple[Member, str]) -> None:
    layer, x = _make(case)
    y = layer(x)[0]
    for t in range(1, x.shape[1]):
        changed = x.clone()
        changed[:, t:] += 1
        other = layer(changed)[0]
        torch.testing.assert_close(other[:, :t], y[:, :t], rtol=1e-12, atol=1e-13)
        assert (other[:, t:] != y[:, t:]).any(-1).all()


@each_layer
def test_rows_and_strides_do_not_matter(case: tuple[Member, str]) -> None:
    layer, x = _make(case)
    y, state = layer(x)
    torch.testing.assert_close(layer(x.mT.contiguous().mT)[0], y)
    alone, end = layer(x[1:])
    torch.testing.assert_close(alone, y[1:])
    torch.testing.assert_close(end, _rows(state, slice(1, None)))


@each_layer
def test_a_state_stays_when_the_parameters_change(case: tuple[Member, str]) -> None:
    layer, x = _make(case)
    with torch.no_grad():
        for state in (layer(x)[1], layer.step(x[:, 0])[1]):
            before = copy.deepcopy(state)
            for parameter in layer.parameters():
                parameter += 1
            torch.testing.assert_close(state, before, rtol=0, atol=0)


@each_layer
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own norms say so
def test_autocast(case: tuple[Member, str]) -> None:
    layer, x = _make(case, torch.float32)
    (expected, state), following = layer(x), layer(x, layer(x)[1])[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        more, _ = layer(x, state)
        one, _ = layer.step(x[:, 0], state)
    for found, exact in ((y, expected), (more, following), (one, following[:, 0])):
        assert (found - exact).norm() < 0.1 * exact.norm()


@each_masked
def test_padding_on_the_left_has_no_effect(case: tuple[Member, str]) -> None:
    layer, x = _make(case)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    padded = x.shape[1] // 2
    mask[1, :padded] = False
    y, state = layer(x, mask=mask)
    for row, padding in enumerate((0, padded)):
        alone, end = layer(x[row : row + 1, padding:])
        # A cache of keys still holds the padding, so what follows is compared; and angles of RoPE are float32.
        following = (layer(x[row : row + 1], one)[0] for one in (_rows(state, slice(row, row + 1)), end))
        for found, expected in ((y[row : row + 1, padding:], alone), following):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_packed
def test_packed_documents_equal_documents_alone(case: tuple[Member, str]) -> None:
    layer, x = _make(case)
    lengths = (3, 1, x.shape[1] - 1)
    x = x.flatten(0, 1)[None, : sum(lengths)]
    cu_seqlens = nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    y, state = layer(x, cu_seqlens=cu_seqlens.int())
    more, _ = layer(x, state, cu_seqlens=cu_seqlens)
    for i, document in enumerate(x.split(lengths, 1)):
        place = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        alone, end = layer(document)
        torch.testing.assert_close(y[:, place], alone)
        torch.testing.assert_close(_rows(state, slice(i, i + 1)), end)
        torch.testing.assert_close(more[:, place], layer(document, end)[0])
    changed = x.clone()
    changed[:, : lengths[0]] = 7
    assert torch.equal(layer(changed, cu_seqlens=cu_seqlens)[0][:, lengths[0] :], y[:, lengths[0] :])
