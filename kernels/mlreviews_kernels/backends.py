"""Which of its implementations a kernel core uses: asked for by name, or picked by device.

A core is a folder of this package. Its files say which backends it has: ``reference.py`` is the equation in plain
PyTorch, ``cpu.cpp`` and ``cpu.py`` the fast CPU path (compiled, and in PyTorch where there is no compiler),
``gpu.py`` the Triton kernels. Nothing here imports triton before somebody asks whether it works.

An op calls `select` once per forward and hands the choice to its backward: autograd runs backward in threads of its
own, where a `use_backend` around the forward is not seen.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType

import torch

__all__ = [
    "BACKENDS",
    "BackendError",
    "Choice",
    "Core",
    "compiler",
    "compiler_command",
    "cores",
    "is_hopper",
    "select",
    "triton_problem",
    "use_backend",
]

BACKENDS = ("reference", "cpu", "triton")
VARIABLE = "MLREVIEWS_BACKEND"

_FILES = MappingProxyType({"reference": ("reference.py",), "cpu": ("cpu.cpp", "cpu.py"), "triton": ("gpu.py",)})
_asked: ContextVar[str | None] = ContextVar("backend", default=None)


class BackendError(RuntimeError):
    """A backend that was asked for by name can't be used; the message says why."""


@dataclass(frozen=True)
class Core:
    """A kernel core and the files that implement it.

    Attributes:
        name: of its folder.
        files: the implementation files it has; ``reference.py`` must be among them.
    """

    name: str
    files: frozenset[str]

    def __post_init__(self) -> None:
        known = {file for files in _FILES.values() for file in files}
        if unknown := sorted(self.files - known):
            raise ValueError(f"core {self.name}: {unknown[0]!r} is no backend's file; they are {sorted(known)}")
        if "reference.py" not in self.files:
            raise ValueError(f"core {self.name}: has no reference.py, which every other backend is compared with")

    @cached_property
    def backends(self) -> tuple[str, ...]:
        """The backends that the core has, whether or not they can be used on this machine."""
        return tuple(backend for backend, files in _FILES.items() if self.files.intersection(files))

    @classmethod
    def read(cls, folder: Path) -> Core:
        """The core in a folder, from the files that are there.

        Raises:
            ValueError: there is no ``reference.py``.
        """
        files = (file for files in _FILES.values() for file in files)
        return cls(folder.name, frozenset(file for file in files if (folder / file).is_file()))


@dataclass(frozen=True)
class Choice:
    """The backend that a core uses, and why that one."""

    backend: str
    reason: str


def cores(package: Path = Path(__file__).parent) -> list[Core]:
    """The cores of a package in alphabetical order: its subpackages."""
    return [Core.read(file.parent) for file in sorted(package.glob("*/__init__.py"))]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """All kernels called in this block, in this thread or task, use one backend; they raise where they can't.

    It goes before the environment variable ``MLREVIEWS_BACKEND``, and an inner block before an outer one.

    Args:
        name: ``"reference"``, ``"cpu"`` or ``"triton"``.

    Raises:
        BackendError: there is no such backend.
    """
    _check_name(name, "use_backend")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def select(core: Core, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
    """The backend that a core uses for tensors on a device.

    Args:
        core: the core.
        device: where the tensors are.
        dtype: that has to be computed in: no Triton kernel computes in float64, so that the default on a GPU is the
            reference then. None: any.

    Raises:
        BackendError: a backend was asked for by name and can't be used here.
    """
    name, origin = _asked.get(), "use_backend"
    if name is None:
        name, origin = os.environ.get(VARIABLE) or None, VARIABLE
    if name is not None:
        _check_name(name, origin)
        if problem := _problem(core, name, device, dtype):
            raise BackendError(f"{core.name}: the backend {name!r} asked for by {origin} can't be used: {problem}")
        return Choice(name, f"asked for by {origin}")
    fast = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    if fast is None:
        return Choice("reference", f"no other backend runs on {device.type}")
    if problem := _problem(core, fast, device, dtype):
        return Choice("reference", problem)
    return Choice(fast, _reason(core, fast))


def _check_name(name: str, origin: str) -> None:
    if name not in BACKENDS:
        raise BackendError(f"{origin}: there is no backend {name!r}; they are {', '.join(BACKENDS)}")


def _problem(core: Core, backend: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why the core can't use a backend on a device; None when it can."""
    if backend not in core.backends:
        return f"{core.name} has no {' or '.join(_FILES[backend])}"
    if backend == "triton":
        problem = "the Triton kernels compute in float32, these are float64"
        return problem if dtype == torch.float64 else triton_problem(device)
    if backend == "cpu":
        if device.type != "cpu":
            return f"it needs tensors on the CPU, these are on {device.type}"
        if "cpu.py" not in core.files and compiler() is None:
            return "no C++ compiler was found"
    return None


def _reason(core: Core, backend: str) -> str:
    if backend == "triton":
        return "the default on a GPU"
    if "cpu.cpp" not in core.files:
        return "the default on a CPU: vectorised PyTorch"
    found = compiler()
    return f"the default on a CPU: compiled with {found}" if found else "vectorised PyTorch: no C++ compiler was found"


def triton_problem(device: torch.device) -> str | None:
    """Why Triton kernels can't run on tensors of a device; None when they can."""
    if problem := _triton_import_problem():
        return problem
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"triton needs tensors on a GPU (or TRITON_INTERPRET=1), these are on {device.type}"
    return None if torch.cuda.is_available() else "torch sees no GPU"


@cache
def _triton_import_problem() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return "triton is not installed" if error.name == "triton" else f"triton can't be imported: {error}"
    return None


def is_hopper(device: torch.device) -> bool:
    """Whether tensors on a device are worked on by a GPU such as the H100, which some tiles were measured on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def compiler() -> str | None:
    """The C++ compiler that ``CXX`` names, else the first of c++, g++ and clang++ on the path; None if none is."""
    return _compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


def compiler_command() -> list[str] | None:
    """How to call the compiler: `compiler` with the launcher and the flags that ``CXX`` has around it."""
    found = compiler()
    if found is None:
        return None
    return shlex.split(os.environ.get("CXX", "")) or [found]


@cache
def _compiler(named: str, path: str) -> str | None:
    # CXX may carry a launcher and flags, such as "ccache g++ -m64".
    candidates = shlex.split(named)[:1] or ["c++", "g++", "clang++"]
    return next((name for name in candidates if shutil.which(name, path=path)), None)
