from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mlreviews_kernels import BackendError, backends, use_backend
from mlreviews_kernels.backends import BACKENDS, Core, compiler, cores, select

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
FULL = Core("scan", frozenset({"reference.py", "cpu.cpp", "cpu.py", "gpu.py"}))
COMPILED_ONLY = Core("scan", frozenset({"reference.py", "cpu.cpp"}))
PYTHON_ONLY = Core("scan", frozenset({"reference.py", "cpu.py"}))
BARE = Core("scan", frozenset({"reference.py"}))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MLREVIEWS_BACKEND", "TRITON_INTERPRET", "CXX"):
        monkeypatch.delenv(name, raising=False)
    backends._triton_import_problem.cache_clear()
    backends._compiler.cache_clear()
    yield
    backends._triton_import_problem.cache_clear()
    backends._compiler.cache_clear()


def executable(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch saw a GPU and triton were installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    executable(tmp_path / "bin", "g++")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def make_core(package: Path, name: str, *files: str) -> Path:
    folder = package / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).touch()
    return folder


def test_import_loads_torch_but_not_triton() -> None:
    code = "import sys, mlreviews_kernels; print(*(n in sys.modules for n in ('torch', 'triton', 'mlreviews')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False", "False"]


def test_a_core_is_described_by_its_files(tmp_path: Path) -> None:
    files = ("__init__.py", "reference.py", "gpu.py", "README.md", "notes.py")
    core = Core.read(make_core(tmp_path, "linear_scan", *files))
    assert core == Core("linear_scan", frozenset({"reference.py", "gpu.py"}))
    assert core.backends == ("reference", "triton")
    assert (FULL.backends, BARE.backends) == (BACKENDS, ("reference",))
    assert COMPILED_ONLY.backends == PYTHON_ONLY.backends == ("reference", "cpu")


def test_a_core_without_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"core attention: has no reference\.py"):
        Core.read(make_core(tmp_path, "attention", "gpu.py"))


def test_a_core_with_a_foreign_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"core ssd: 'tpu\.py' is no backend's file"):
        Core("ssd", frozenset({"reference.py", "tpu.py"}))


def test_descriptions_can_not_be_changed() -> None:
    for description, name in ((FULL, "name"), (select(BARE, CPU), "backend")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(description, name, "other")


def test_cores_are_the_subpackages(tmp_path: Path) -> None:
    make_core(tmp_path, "ssd", "__init__.py", "reference.py")
    make_core(tmp_path, "attention", "__init__.py", "reference.py", "cpu.py")
    make_core(tmp_path, "__pycache__")
    assert [(core.name, core.backends) for core in cores(tmp_path)] == [
        ("attention", ("reference", "cpu")),
        ("ssd", ("reference",)),
    ]


def test_the_package_has_only_valid_cores() -> None:
    package = Path(backends.__file__).parent
    assert {core.name for core in cores()} == {file.parent.name for file in package.glob("*/reference.py")}


@pytest.mark.usefixtures("a_compiler")
def test_default_on_cpu_is_the_cpu_backend() -> None:
    assert select(FULL, CPU) == backends.Choice("cpu", "the default on a CPU: compiled with g++")
    assert select(PYTHON_ONLY, CPU) == backends.Choice("cpu", "the default on a CPU: vectorised PyTorch")
    assert select(BARE, CPU) == backends.Choice("reference", "scan has no cpu.cpp or cpu.py")


@pytest.mark.usefixtures("no_compiler")
def test_default_on_cpu_without_a_compiler() -> None:
    assert select(FULL, CPU) == backends.Choice("cpu", "vectorised PyTorch: no C++ compiler was found")
    assert select(COMPILED_ONLY, CPU) == backends.Choice("reference", "no C++ compiler was found")


@pytest.mark.usefixtures("gpu")
def test_float64_on_a_gpu_is_the_reference_unless_triton_is_asked_for() -> None:
    assert select(FULL, CUDA, torch.float32).backend == "triton"
    found = select(FULL, CUDA, torch.float64)
    assert found == backends.Choice("reference", "the Triton kernels compute in float32, these are float64")
    with use_backend("triton"), pytest.raises(BackendError, match=r"asked for by use_backend .* these are float64"):
        select(FULL, CUDA, torch.float64)


@pytest.mark.usefixtures("gpu")
def test_default_on_a_gpu_is_triton() -> None:
    assert select(FULL, CUDA) == backends.Choice("triton", "the default on a GPU")
    assert select(BARE, CUDA) == backends.Choice("reference", "scan has no gpu.py")


def test_default_without_a_gpu_or_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert select(FULL, CUDA) == backends.Choice("reference", "torch sees no GPU")
    assert select(FULL, META) == backends.Choice("reference", "no other backend runs on meta")


@pytest.mark.usefixtures("a_compiler")
def test_a_backend_asked_for_by_name_is_used() -> None:
    with use_backend("reference"):
        assert select(FULL, CPU) == backends.Choice("reference", "asked for by use_backend")
    with use_backend("cpu"):
        assert select(COMPILED_ONLY, CPU).backend == "cpu"
    assert select(FULL, CPU).backend == "cpu"


@pytest.mark.parametrize(
    ("core", "backend", "device", "reason"),
    [
        (BARE, "cpu", CPU, r"scan has no cpu\.cpp or cpu\.py"),
        (BARE, "triton", CPU, r"scan has no gpu\.py"),
        (FULL, "cpu", META, "it needs tensors on the CPU, these are on meta"),
        (COMPILED_ONLY, "cpu", CPU, r"no C\+\+ compiler was found"),
    ],
)
@pytest.mark.usefixtures("no_compiler")
def test_a_backend_asked_for_by_name_is_never_replaced(
    core: Core, backend: str, device: torch.device, reason: str
) -> None:
    message = f"scan: the backend '{backend}' asked for by use_backend can't be used: {reason}"
    with use_backend(backend), pytest.raises(BackendError, match=message):
        select(core, device)


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    with use_backend("triton"):
        with pytest.raises(BackendError, match=r"triton needs tensors on a GPU .*these are on cpu"):
            select(FULL, CPU)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(BackendError, match="triton needs tensors on a GPU"):
            select(FULL, CPU)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert select(FULL, CPU).backend == "triton"
        # The interpreter is no GPU.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(BackendError, match="torch sees no GPU"):
            select(FULL, CUDA)
        with pytest.raises(BackendError, match="these are on meta"):
            select(FULL, META)


def test_missing_and_broken_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    # A None in sys.modules makes the import fail as if nothing were installed.
    assert backends.triton_problem(CPU) == "triton is not installed"

    def broken(name: str) -> None:
        raise ImportError("libcuda.so.1: cannot open", name="triton._C")

    backends._triton_import_problem.cache_clear()
    monkeypatch.setattr(backends.importlib, "import_module", broken)
    assert backends.triton_problem(CPU) == "triton can't be imported: libcuda.so.1: cannot open"


def test_the_variable_asks_by_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLREVIEWS_BACKEND", "reference")
    assert select(FULL, CPU) == backends.Choice("reference", "asked for by MLREVIEWS_BACKEND")
    with use_backend("cpu"):  # goes before the variable
        assert select(PYTHON_ONLY, CPU) == backends.Choice("cpu", "asked for by use_backend")
    monkeypatch.setenv("MLREVIEWS_BACKEND", "cpu")
    with pytest.raises(BackendError, match="asked for by MLREVIEWS_BACKEND can't be used"):
        select(BARE, CPU)
    monkeypatch.setenv("MLREVIEWS_BACKEND", "")
    assert select(BARE, CPU).backend == "reference"


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="use_backend: there is no backend 'cuda'; they are reference, cpu, triton"):
        use_backend("cuda").__enter__()
    monkeypatch.setenv("MLREVIEWS_BACKEND", "gpu")
    with pytest.raises(BackendError, match="MLREVIEWS_BACKEND: there is no backend 'gpu'"):
        select(FULL, CPU)


def test_blocks_nest_and_are_left_by_an_error() -> None:
    def fail_inside(name: str) -> None:
        with use_backend(name):
            seen.append(select(PYTHON_ONLY, CPU).backend)
            raise KeyError

    seen: list[str] = []
    with use_backend("reference"):
        with pytest.raises(KeyError):
            fail_inside("cpu")
        seen.append(select(PYTHON_ONLY, CPU).backend)
    seen.append(select(PYTHON_ONLY, CPU).backend)
    assert seen == ["cpu", "reference", "cpu"]


def test_blocks_of_two_threads_do_not_meet() -> None:
    both_inside = threading.Barrier(2)
    seen: dict[str, str] = {}

    def work(name: str) -> None:
        with use_backend(name):
            both_inside.wait()
            seen[name] = select(PYTHON_ONLY, CPU).backend
            both_inside.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "cpu")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"reference": "reference", "cpu": "cpu"}


def test_blocks_of_two_tasks_do_not_meet() -> None:
    async def work(name: str) -> str:
        with use_backend(name):
            await asyncio.sleep(0)
            return select(PYTHON_ONLY, CPU).backend

    async def both() -> list[str]:
        return await asyncio.gather(work("reference"), work("cpu"))

    assert asyncio.run(both()) == ["reference", "cpu"]


def test_the_compiler_named_by_cxx_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("clang++", "g++", "ccache"):
        executable(tmp_path / "bin", name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert compiler() == "g++"
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert compiler() == "ccache"
    monkeypatch.setenv("CXX", "icpx g++")  # named, so not replaced by another one
    assert compiler() is None
