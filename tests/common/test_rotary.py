import pytest
import torch

from mlreviews.common.rotary import apply_rotary, rotary_angles

BATCH, TIME, HEADS, DIM = 2, 5, 3, 8


def _x(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(BATCH, TIME, HEADS, DIM, dtype=dtype, generator=torch.Generator().manual_seed(0))


def test_interleaved_is_multiplication_by_a_unit_complex_number() -> None:
    x, positions = _x(), torch.tensor([3, 0, 7, 1, 12])
    found = apply_rotary(x, rotary_angles(positions, DIM, base=50.0), interleaved=True)
    turn = torch.tensor([[complex(0, p * 50.0 ** (-2 * i / DIM)) for i in range(DIM // 2)] for p in positions]).exp()
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(3, (-1, 2))) * turn[:, None]).flatten(3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_base_is_ten_thousand() -> None:
    torch.testing.assert_close(rotary_angles(torch.tensor([1000, -3]), 4), torch.tensor([[1000, 10], [-3, -0.03]]))


def test_layouts_differ_by_the_known_permutation() -> None:
    x, angles = _x(), rotary_angles(torch.arange(TIME), DIM)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # entry of the half-split form at each place of the interleaved
    interleaved = apply_rotary(x[..., order], angles, interleaved=True)
    torch.testing.assert_close(interleaved, apply_rotary(x, angles)[..., order])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_differences_of_positions(interleaved: bool) -> None:
    q, k = _x()[:, :1], _x()[:, 1:2]

    def score(i: int, j: int) -> torch.Tensor:
        one, other = (rotary_angles(torch.tensor([p]), DIM) for p in (i, j))
        rotated = apply_rotary(q, one, interleaved=interleaved) * apply_rotary(k, other, interleaved=interleaved)
        return rotated.sum(-1)

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=1e-5, atol=1e-5)
    assert (score(9, 4) - score(9, 5)).abs().min() > 1e-3


def test_the_rest_of_a_partly_rotated_head_stays() -> None:
    x = _x()
    found = apply_rotary(x, rotary_angles(torch.arange(TIME), 4))
    assert torch.equal(found[..., 4:], x[..., 4:])
    torch.testing.assert_close(found[..., :4], apply_rotary(x[..., :4], rotary_angles(torch.arange(TIME), 4)))
    assert not torch.allclose(found[:, 1:, :, :4], x[:, 1:, :, :4])


def test_positions_may_differ_by_row() -> None:
    x, positions = _x(), torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    found = apply_rotary(x, rotary_angles(positions, DIM))
    for row in range(BATCH):
        alone = apply_rotary(x[row : row + 1], rotary_angles(positions[row], DIM))
        assert torch.equal(found[row : row + 1], alone)


def test_half_precision_rounds_once() -> None:
    x = _x(torch.bfloat16)
    angles = rotary_angles(torch.arange(1000, 1000 + TIME), DIM)
    found = apply_rotary(x, angles)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, apply_rotary(x.double(), angles).to(torch.bfloat16))


def test_errors() -> None:
    for dim in (0, 3):
        with pytest.raises(ValueError, match="dim: expected an even number"):
            rotary_angles(torch.arange(2), dim)
    with pytest.raises(ValueError, match="angles: expected at most 4"):
        apply_rotary(_x(), rotary_angles(torch.arange(TIME), 10))
