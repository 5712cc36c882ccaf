from __future__ import annotations

import math

import torch
from torch import Tensor

from mlreviews_kernels.linear_scan import linear_scan, log_linear_scan
from tests.kernels.scan_cases import Inputs, ScanCase


def _inputs(batch: int, time: int, generator: torch.Generator) -> Inputs:
    """Factors of either sign, some zero; two axes after time."""
    shape = (batch, time, 5, 7)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    a[torch.rand(shape, generator=generator) < 0.1] = 0.0
    b = torch.randn(shape, generator=generator, dtype=torch.float64)
    state = torch.randn((batch, 5, 7), generator=generator, dtype=torch.float64)
    return {"a": a, "b": b, "initial_state": state}


def _log_inputs(batch: int, time: int, generator: torch.Generator) -> Inputs:
    a, b = torch.randn((2, batch, time, 35), generator=generator, dtype=torch.float64)
    state = torch.randn((batch, 35), generator=generator, dtype=torch.float64)
    return {"log_a": a, "log_b": 2 * b, "log_initial_state": state}


LENGTHS = (1, 2, 31, 32, 33, 103)  # around the tiles of the GPU; 103 = 10 chunks of 10 and a rest of 3 on the CPU
CASES = [
    ScanCase("linear_scan", linear_scan, _inputs, ("a", "b"), lengths=LENGTHS),
    ScanCase("linear_scan-reverse", linear_scan, _inputs, ("a", "b"), options={"reverse": True}, lengths=LENGTHS),
    ScanCase(
        "log_linear_scan",
        log_linear_scan,
        _log_inputs,
        ("log_a", "log_b"),
        state="log_initial_state",
        lengths=LENGTHS,
        empty=-math.inf,
    ),
]


def dense(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """h_t = sum_s (prod_{s<r<=t} a_r) b_s + (prod_{r<=t} a_r) h_0 as one matrix a channel."""
    time = a.shape[1]
    matrix = torch.zeros(a.shape[0], time, time + 1, *a.shape[2:], dtype=a.dtype)
    for t in range(time):
        for s in range(t + 2):  # column 0 is the initial state, column s the input s - 1
            matrix[:, t, s] = a[:, s : t + 1].prod(1)
    inputs = torch.cat([initial[:, None], b], 1)
    return torch.einsum("nts...,ns...->nt...", matrix, inputs)
