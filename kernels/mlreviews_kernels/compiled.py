"""C++ loops, compiled when they are first used and kept: ``load(source)`` gives the library that ctypes calls.

The sources are plain C++ on pointers, with OpenMP and no header of torch: they compile in a second or two, and a new
version of torch needs no new build. A library lies in the user's cache under a name made of everything it depends
on, and is moved there in one step, so that processes which build it at the same time don't disturb each other.
Without a compiler, or where it fails, `load` says so once and returns None: the caller falls back to PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mlreviews_kernels.backends import compiler_command

__all__ = ["VARIABLE", "cache_folder", "load", "pointer", "without_compiled_code"]

VARIABLE = "MLREVIEWS_CACHE"

# Contraction to fused multiply-adds is wanted; the three others let loops vectorise.  Never -ffast-math: linked into
# a shared library it switches the whole process to flush denormals to zero.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_enabled: ContextVar[bool] = ContextVar("compiled", default=True)


@contextmanager
def without_compiled_code() -> Iterator[None]:
    """The CPU backend runs in vectorised PyTorch in this block, as it does where there is no compiler."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def load(source: Path) -> ctypes.CDLL | None:
    """The compiled library of a C++ source; None, after one warning, when there is no compiler or it fails.

    Args:
        source: the file; it may include ``vector.h`` of this package.
    """
    return _load(source) if _enabled.get() else None


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a contiguous tensor's data, as an argument of a compiled function; null for None.

    Raises:
        ValueError: it isn't contiguous, which the loops take for granted.
    """
    if tensor is None:
        return ctypes.c_void_p(None)
    if not tensor.is_contiguous():
        raise ValueError("only contiguous tensors can be handed to compiled code")
    return ctypes.c_void_p(tensor.data_ptr())


def cache_folder() -> Path:
    """Where compiled libraries are kept: ``MLREVIEWS_CACHE``, or ``mlreviews`` in the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlreviews"


@cache
def _load(source: Path) -> ctypes.CDLL | None:
    command = compiler_command()
    if command is None:
        _warn(f"{source.parent.name}: no C++ compiler was found; the slower vectorised PyTorch form is used")
        return None
    try:
        return ctypes.CDLL(str(_build(source, command)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:3]
        _warn(f"{source.parent.name}: compiling failed ({' '.join(reason)}); the slower PyTorch form is used")
        return None


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _build(source: Path, command: list[str]) -> Path:
    """Compiles unless the cache has it; falls back to flags that every compiler knows."""
    failure: subprocess.CalledProcessError | None = None
    for tuning in (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ()):
        arguments = [*command, *FLAGS, *tuning, *(_openmp() if "-fopenmp" in tuning else ())]
        target = cache_folder() / f"{source.parent.name}-{_fingerprint(source, arguments)}.so"
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            whole = [*arguments[: len(command)], str(source), *arguments[len(command) :], "-o", str(built)]
            try:
                subprocess.run(whole, check=True, capture_output=True, text=True, timeout=300)
            except subprocess.CalledProcessError as error:
                failure = failure or error
                continue
            built.replace(target)
            return target
    assert failure is not None
    raise failure


def _openmp() -> list[str]:
    """Links to torch's own OpenMP runtime where it has one: two pools of threads would fight for the cores."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(found[0]), f"-Wl,-rpath,{found[0].parent}"] if found else []


def _fingerprint(source: Path, arguments: list[str]) -> str:
    headers = sorted(Path(__file__).parent.glob("*.h"))
    texts = (*(file.read_text() for file in (source, *headers)), *arguments)
    digest = hashlib.sha256("\0".join((*texts, platform.machine(), _processor(), _version(arguments[0]))).encode())
    return digest.hexdigest()[:16]


@cache
def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk may be seen by different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


@cache
def _version(command: str) -> str:
    result = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    return result.stdout
