"""What can be known of a Triton kernel without a GPU: it compiles, its registers, spills, shared memory, tensor cores.

Each core's ``gpu.py`` lists the configurations that can be chosen in ``launches()``. They are compiled ahead of time
for the chips of `TARGETS`, and read back with the tools that come with triton. triton must not be in interpreter mode.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mlreviews_kernels.backends import Core, cores

__all__ = ["MEASURED_SPILLS", "SHARED_MEMORY", "TARGETS", "Launch", "Resources", "analyse", "chips", "launches"]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# bytes of shared memory that one block may have: CUDA programming guide, table of compute capabilities; CDNA3 ISA guide
SHARED_MEMORY = MappingProxyType({"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024})

# bytes that ptxas may spill in tiles that were the fastest of all measured ones
MEASURED_SPILLS = 256

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}


@dataclass(frozen=True)
class Launch:
    """A kernel in one configuration.

    Attributes:
        kernel: the jitted function.
        constants: its compile-time arguments.
        dtype: of the tensors with a time axis.
        states: the pointer arguments that are float32 whatever the dtype.
        integers: pointer arguments to int64.
        bytes: pointer arguments to uint8, such as masks.
        scalars: arguments that are numbers (int32), not pointers.
        floats: arguments that are float32 numbers.
        absent: pointer arguments that are None in this configuration.
        warps: warps of a block.
        wavefronts: the same on AMD; as many as warps if 0.
        stages: of the software pipeline; 1 on AMD, whose blocks have little shared memory.
        chips: of `TARGETS`, on which it is chosen.
        spills: bytes of registers that it may spill: where that was measured to be faster than what spills none, or
            where nothing else was found.
        label: what tells it from others of the same kernel and dtype.
        matmul: whether it must use the tensor cores (with half-precision inputs).
    """

    kernel: Any
    constants: Mapping[str, Any]
    dtype: torch.dtype
    states: tuple[str, ...] = ()
    integers: tuple[str, ...] = ("offsets",)
    bytes: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ("channels",)
    floats: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    warps: int = 4
    wavefronts: int = 0
    stages: int = 1
    chips: tuple[str, ...] = TARGETS
    spills: int = 0
    label: str = ""
    matmul: bool = False

    @property
    def name(self) -> str:
        """Kernel, label and dtype."""
        return " ".join(filter(None, (self.kernel.__name__, self.label, _NAMES[self.dtype])))

    def signature(self) -> dict[str, str]:
        """Triton's type of every argument."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def _type(self, name: str) -> str:
        if name in self.constants or name in self.absent:
            return "constexpr"
        if name in self.scalars or name in self.floats:
            return "i32" if name in self.scalars else "fp32"
        if name in self.bytes:
            return "*u8"
        dtype = torch.int64 if name in self.integers else torch.float32 if name in self.states else self.dtype
        return f"*{_NAMES[dtype]}"


@dataclass(frozen=True)
class Resources:
    """What a compiled configuration takes.

    Attributes:
        core: the kernel core.
        launch: its name.
        target: the chip.
        registers: per thread.
        spilled: bytes per thread in local memory.
        shared: bytes of shared memory per block.
        tensor_cores: the matrix instruction it uses, or "".
    """

    core: str
    launch: str
    target: str
    registers: int
    spilled: int
    shared: int
    tensor_cores: str = field(default="")


def chips(hopper: bool, measured: bool) -> tuple[str, ...]:
    """Where a configuration is chosen that has (or is) a counterpart with tiles that were measured on Hopper."""
    return ("sm_90",) if hopper else tuple(target for target in TARGETS if target != "sm_90" or not measured)


def launches(core: Core, target: str | None = None) -> list[Launch]:
    """The configurations of a core, on one chip or on all; none where it has no Triton kernels."""
    if "gpu.py" not in core.files:
        return []
    found: list[Launch] = importlib.import_module(f"mlreviews_kernels.{core.name}.gpu").launches()
    return [launch for launch in found if target is None or target in launch.chips]


def analyse(names: tuple[str, ...] = (), targets: tuple[str, ...] = TARGETS, *, every: int = 1) -> Iterator[Resources]:
    """Compiles every configuration for every chip.

    Args:
        names: of cores; all if empty.
        targets: of `TARGETS`.
        every: for a sample, only each so-manieth of a core's `launches`, from the first on.

    Yields:
        One result a configuration and chip.

    Raises:
        RuntimeError: triton runs as an interpreter in this process.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("static analysis compiles kernels: run it in a process without TRITON_INTERPRET=1")
    for core in cores():
        if not names or core.name in names:
            for target in targets:
                for launch in launches(core, target)[::every]:
                    yield _compile(core.name, launch, target)


def _compile(core: str, launch: Launch, target: str) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuda = target.startswith("sm_")
    chip = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    signature = launch.signature()
    constants = {**launch.constants, **dict.fromkeys(launch.absent)}
    # as at run time: memory from torch is aligned, and sizes are mostly multiples of 16
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in launch.scalars
    }
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=aligned)
    warps = launch.warps if cuda else launch.wavefronts or launch.warps
    options = {"num_warps": warps, "num_stages": launch.stages if cuda else 1}
    compiled = triton.compile(source, target=chip, options=options)
    read = _read_cuda if cuda else _read_amd
    return Resources(core, launch.name, target, *read(compiled))


def _read_cuda(compiled: Any) -> tuple[int, int, int, str]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    matrix = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "")
    return usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, matrix


def _read_amd(compiled: Any) -> tuple[int, int, int, str]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly doesn't tell {name}")
        return int(found.group(1))

    matrix = "mfma" if "v_mfma" in text else ""
    return number("vgpr_count"), number("private_segment_fixed_size"), compiled.metadata.shared, matrix
