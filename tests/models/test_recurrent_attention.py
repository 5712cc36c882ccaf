import pytest
import torch
from torch import Tensor

from mlreviews.models import FixedState, RecurrentAttention
from mlreviews.models.recurrent_attention import Rotate, Tokens, check_heads, hidden, repeated


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Last(RecurrentAttention):
    """Gives the rotated keys, and remembers the last one."""

    def recur(self, tokens: Tokens, rotate: Rotate, state: FixedState | None = None) -> tuple[Tensor, FixedState]:
        _, k = rotate(tokens.q, hidden(tokens.k, tokens.mask))
        length = k.shape[1] + (0 if state is None else state.length)
        return repeated(k, self.heads), FixedState(k[:, -1:].transpose(1, 2), length)


def test_positions_go_on_from_the_state_and_padding_is_hidden() -> None:
    layer = Last(12, 6, kv_heads=3, generator=torch.Generator().manual_seed(0)).double()
    x, mask = _random(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    y, state = layer(x)
    _, k, _ = layer.project(x, 0)
    torch.testing.assert_close(y, layer.o_proj(k.repeat_interleave(2, 2).flatten(2)))
    first, before = layer(x[:, :3])
    torch.testing.assert_close(torch.cat([first, layer(x[:, 3:], before)[0]], 1), y)
    assert (before.length, state.length) == (3, 5)
    shifted, _ = layer(x, positions=torch.arange(4, 9))
    torch.testing.assert_close(shifted, layer.o_proj(layer.project(x, 4)[1].repeat_interleave(2, 2).flatten(2)))
    padded, _ = layer(x, mask=mask)
    torch.testing.assert_close(padded[1, 2:], y[1, 2:])
    assert torch.equal(padded[1, :2], torch.zeros_like(padded[1, :2]))


def test_rows_of_a_state() -> None:
    state = FixedState(_random(3, 2, 4, 5), 7, _random(3, 2, 4, 1), _random(3, 2))
    rows = state.rows(torch.tensor([2, 0, 2]))
    assert rows.length == 7
    for name in ("memory", "normaliser", "log_scale"):
        assert torch.equal(getattr(rows, name), getattr(state, name)[[2, 0, 2]])
    assert FixedState(state.memory, 7).rows(torch.tensor([1])).normaliser is None


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    q, k, v = _random(2, 5, 4, 3), _random(2, 5, 2, 3), _random(2, 5, 2, 6)
    check_heads(q, k, v)
    check_heads(q[:, 2:], k, v, causal=False)
    for args, match in (
        ((q[0], k, v), r"q: expected \[batch, time, heads, features\]"),
        ((q[:, 2:], k, v), r"k: expected \[2, 3, kv_heads, 3\]"),
        ((q, k[1:], v), r"k: expected \[2, 5, kv_heads, 3\]"),
        ((q, k[..., :2], v), r"k: expected \[2, 5, kv_heads, 3\]"),
        ((q[:, :, :3], k, v), "k: expected a number of heads that divides 3"),
        ((q, k, v[:, :, :1]), r"v: expected \[2, 5, 2\] and dim"),
    ):
        with pytest.raises(ValueError, match=match):
            check_heads(*args)
    with pytest.raises(NotImplementedError):
        RecurrentAttention(12, 6)(torch.ones(1, 2, 12))
