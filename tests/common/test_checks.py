"""Checks of arguments: what just passes, what just doesn't, and what the message says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mlreviews.common.checks import (
    check_count,
    check_finite,
    check_matrix,
    check_number,
    check_probability,
    check_same_length,
    check_sequence,
)

pytestmark = pytest.mark.usefixtures("unchecked")
X, YES = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("check", "arguments", "options"),
    [
        (check_matrix, ("m", torch.ones(1, 1)), {}),
        (check_matrix, ("m", torch.ones(1, dtype=torch.float16)), {"dims": (1, 3)}),
        (check_matrix, ("m", X), {"dims": (1, 3)}),
        (check_finite, ("f", torch.tensor([3.4e38, -3.4e38])), {}),
        (check_finite, ("f", torch.ones(0)), {}),
        (check_same_length, (), {"a": torch.ones(3, 2), "b": torch.ones(3)}),
        (check_count, ("c", 1), {}),
        (check_count, ("c", 0), {"least": 0}),
        (check_number, ("n", -1e300), {}),
        (check_number, ("n", 0.0), {"least": 0.0}),
        (check_number, ("n", 1e-300), {"above": 0.0}),
        (check_probability, ("p", 0.0), {}),
        (check_probability, ("p", 1.0), {}),
        (check_sequence, (X, 4), {}),
        (check_sequence, (X, 4, YES), {}),
    ],
)
def test_what_just_passes(check: Callable[..., None], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    check(*arguments, **options)


@pytest.mark.parametrize(
    ("check", "arguments", "options", "error", "match"),
    [
        (check_matrix, ("m", [[1.0]]), {}, TypeError, "m: expected a floating-point tensor, got list"),
        (check_matrix, ("m", torch.ones(1, 1).long()), {}, TypeError, "m: expected a floating.*got torch.int64"),
        (check_matrix, ("m", torch.ones(1, 1) * 1j), {}, TypeError, "m: expected a floating.*got torch.complex64"),
        (check_matrix, ("m", torch.ones(2)), {}, ValueError, r"m: expected 2 dimensions, got shape \(2,\)"),
        (check_matrix, ("m", torch.ones(2, 2)), {"dims": (1, 3)}, ValueError, "m: expected 1 or 3 dimensions"),
        (check_matrix, ("m", torch.ones(2, 0)), {}, ValueError, "m: expected at least one entry"),
        (check_matrix, ("m", torch.tensor([[math.nan]])), {}, ValueError, "m: expected finite values"),
        (check_finite, ("f", torch.tensor([1, math.nan, -math.inf])), {}, ValueError, "infinity in 2 of 3 entries"),
        (check_same_length, (), {"a": torch.ones(2), "b": torch.ones(3)}, ValueError, "a, b: .* a has 2, b has 3"),
        (check_count, ("c", 0), {}, ValueError, "c: expected at least 1, got 0"),
        (check_count, ("c", 2), {"least": 3}, ValueError, "c: expected at least 3, got 2"),
        (check_count, ("c", 1.0), {}, TypeError, "c: expected a whole number, got 1.0"),
        (check_count, ("c", True), {}, TypeError, "c: expected a whole number, got True"),
        (check_number, ("n", math.nan), {}, ValueError, "n: expected a finite number, got nan"),
        (check_number, ("n", -math.inf), {}, ValueError, "n: expected a finite number, got -inf"),
        (check_number, ("n", -1e-300), {"least": 0.0}, ValueError, "n: expected at least 0.0"),
        (check_number, ("n", 0.0), {"above": 0.0}, ValueError, "n: expected more than 0.0, got 0.0"),
        (check_probability, ("p", -1e-9), {}, ValueError, r"p: expected a probability in \[0, 1\]"),
        (check_probability, ("p", 1.0 + 1e-9), {}, ValueError, "p: expected a probability"),
        (check_probability, ("p", math.nan), {}, ValueError, "p: expected a probability"),
        (check_sequence, (X, 3), {}, ValueError, r"x: expected \[batch, time, 3\] .* got shape \(2, 3, 4\)"),
        (check_sequence, (X[0], 4), {}, ValueError, r"x: expected \[batch, time, 4\]"),
        (check_sequence, (X[:, :0], 4), {"name": "y"}, ValueError, r"y: expected \[batch, time, 4\] with no empty"),
        (check_sequence, (X, 4, YES[:, 1:]), {}, ValueError, r"mask: expected \[2, 3\], as x has, of bool"),
        (check_sequence, (X, 4, YES.float()), {}, ValueError, "mask: expected .* of torch.float32"),
    ],
)
def test_what_just_does_not(
    check: Callable[..., None],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    match: str,
) -> None:
    with pytest.raises(error, match=match):
        check(*arguments, **options)
