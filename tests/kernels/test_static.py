"""Every Triton kernel, in every configuration that can be chosen, compiled ahead of time: no GPU is needed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from mlreviews_kernels.backends import cores
from mlreviews_kernels.static import SHARED_MEMORY, TARGETS, Resources, analyse

CORES = [core.name for core in cores() if "triton" in core.backends]

CODE = """
import dataclasses, json, sys, warnings
warnings.filterwarnings("ignore")
from mlreviews_kernels.static import analyse, launches
from mlreviews_kernels.backends import cores
core, target, every = *sys.argv[1:3], int(sys.argv[3])
chosen = launches(next(c for c in cores() if c.name == core), target)[::every]
found = [dataclasses.asdict(resources) for resources in analyse((core,), (target,), every=every)]
print(json.dumps([found, [launch.matmul for launch in chosen], [launch.spills for launch in chosen]]))
"""


def compiled(core: str, target: str, every: int) -> tuple[list[Resources], list[bool], list[int]]:
    """What was found of each configuration, whether it multiplies matrices, and the bytes it may spill.

    In a process of its own: in this one triton interprets.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE, core, target, str(every)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found, matmul, spills = json.loads(result.stdout)
    return [Resources(**fields) for fields in found], matmul, spills


# By default a third of the configurations for one chip; all of them take as long as all other tests together.
CHIPS = [("sm_90", 3), *((target, 1) for target in TARGETS)]
chips = pytest.mark.parametrize(
    ("target", "every"), [pytest.param(*chip, marks=[pytest.mark.slow] * (chip[1] == 1)) for chip in CHIPS]
)


@chips
@pytest.mark.parametrize("core", CORES)
def test_no_spills_but_measured_ones_and_within_the_chip(core: str, target: str, every: int) -> None:
    found, matmul, spills = compiled(core, target, every)
    assert len(found) == len(matmul) > 0
    for resources, uses_matrices, permitted in zip(found, matmul, spills, strict=True):
        assert resources.spilled <= permitted, resources
        assert 0 < resources.registers <= (512 if target == "gfx942" else 255), resources
        assert resources.shared <= SHARED_MEMORY[target], resources
        if uses_matrices and "fp32" not in resources.launch:
            # tiles of fewer than 64 rows have mma.sync on every chip
            expected = {"sm_80": "mma.sync", "sm_90": "mma", "sm_100": "mma", "gfx942": "mfma"}[target]
            assert expected in resources.tensor_cores, resources
    if target == "sm_90" and any(matmul):
        assert any(resources.tensor_cores == "wgmma" for resources in found), "no tile is as high as wgmma's"


def test_there_are_cores() -> None:
    assert "linear_scan" in CORES


def test_an_interpreter_compiles_nothing() -> None:
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        next(analyse())


def test_results_are_plain_records() -> None:
    record = Resources("core", "kernel fp32", "sm_90", 32, 0, 1024)
    assert dataclasses.asdict(record)["tensor_cores"] == ""
