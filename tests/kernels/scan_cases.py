"""What the battery over all scan cores (tests/contracts/test_scan.py) has to know of one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class ScanCase:
    """A scan core with some of its options.

    Attributes:
        name: shown in the tests' ids.
        function: the public op; returns (outputs, final state) and takes ``cu_seqlens``.
        make: (batch, time, generator) -> all tensor arguments by name in float64, the initial state included; sizes
            of all axes different, values where every gradient counts.
        tokens: the names of the arguments that have a time axis (axis 1).
        state: the name of the initial state.
        options: further arguments, such as a chunk size.
        lengths: time lengths around the edges of the chunks.
        split_every: cuts may fall on multiples of this.
        empty: the value of the initial state that is meant when none is given.
        half_in_interpreter: whether Triton's interpreter can run bfloat16 (it can't multiply matrices of it).
        interpreter_tiles: constants of the core's ``gpu.py`` and small values for them.
        tolerance: relative error of float32 values, and of gradients, against the reference in float64.
    """

    name: str
    function: Callable[..., tuple[Tensor, Tensor]]
    make: Callable[[int, int, torch.Generator], Inputs]
    tokens: tuple[str, ...]
    state: str = "initial_state"
    options: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 2, 15, 16, 17, 55)
    split_every: int = 1
    empty: float = 0.0
    half_in_interpreter: bool = True
    interpreter_tiles: Mapping[str, int] = field(default_factory=dict)
    tolerance: float = 2e-5
