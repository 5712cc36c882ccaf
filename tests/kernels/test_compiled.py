from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mlreviews_kernels import compiled
from mlreviews_kernels.compiled import cache_folder, load, pointer, without_compiled_code

CODE = """
#include "{header}"
EXPORT void apply(const float* x, float* y, long n, int which) {{
    for (long i = 0; i < n; ++i)
        y[i] = which == 0   ? exp_f(x[i])
               : which == 1 ? log1p_unit(x[i])
               : which == 2 ? softplus_f(x[i])
                            : sigmoid_f(x[i]);
}}
"""
HEADER = Path(compiled.__file__).with_name("vector.h")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLREVIEWS_CACHE", str(tmp_path / "cache"))
    compiled._load.cache_clear()
    yield
    compiled._load.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "core" / "cpu.cpp"
    path.parent.mkdir()
    path.write_text(CODE.format(header=HEADER))
    return path


def apply(library: ctypes.CDLL, x: torch.Tensor, which: int) -> torch.Tensor:
    y = torch.empty_like(x)
    library.apply(pointer(x), pointer(y), ctypes.c_long(x.numel()), ctypes.c_int(which))
    return y


def test_elementary_functions(source: Path) -> None:
    library = load(source)
    assert library is not None
    x = torch.linspace(-86.64, 88.72, 200_001)
    torch.testing.assert_close(apply(library, x, 0).double(), x.double().exp(), rtol=2.5e-7, atol=0)
    unit = torch.cat([torch.linspace(0, 1, 100_001), torch.logspace(-38, 0, 1001)])
    torch.testing.assert_close(apply(library, unit, 1).double(), unit.double().log1p(), rtol=3e-7, atol=0)
    torch.testing.assert_close(apply(library, x, 2).double(), x.double().exp().log1p(), rtol=4e-7, atol=0)
    torch.testing.assert_close(apply(library, x, 3).double(), x.double().sigmoid(), rtol=4e-7, atol=1e-37)


def test_limits_of_the_exponential(source: Path) -> None:
    library = load(source)
    assert library is not None
    x = torch.tensor([0.0, -0.0, -torch.inf, torch.inf, -86.65, -1e30, 89.0, torch.nan])
    y = apply(library, x, 0)
    assert y[:2].tolist() == [1.0, 1.0]
    assert y[2:7].tolist() == [0.0, torch.inf, 0.0, 0.0, torch.inf]
    assert y[7].isnan()
    assert apply(library, torch.tensor([-torch.inf, torch.inf]), 2).tolist() == [0.0, torch.inf]
    assert apply(library, torch.tensor([-torch.inf, torch.inf]), 3).tolist() == [0.0, 1.0]


def test_built_once_and_kept(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(source) is load(source)
    built = list(cache_folder().glob("core-*.so"))
    assert len(built) == 1
    assert os.listdir(cache_folder()) == [built[0].name], "nothing temporary is left"
    compiled._load.cache_clear()
    ran: list[object] = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: ran.append(command) or real(command, **more))
    assert load(source) is not None
    assert not [command for command in ran if "-o" in command], "the compiler ran again"


def test_a_changed_source_means_a_new_build(source: Path) -> None:
    load(source)
    source.write_text(source.read_text() + "// changed\n")
    compiled._load.cache_clear()
    load(source)
    assert len(list(cache_folder().glob("core-*.so"))) == 2


def test_an_error_in_the_source_warns_once_and_falls_back(source: Path) -> None:
    source.write_text("this is no C++")
    with pytest.warns(RuntimeWarning, match=r"core: compiling failed \(.*cpu\.cpp.*PyTorch form is used"):
        assert load(source) is None
    assert load(source) is None  # a second warning would be an error here
    assert not list(cache_folder().iterdir())


def test_no_compiler_warns_once_and_falls_back(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(RuntimeWarning, match=r"core: no C\+\+ compiler was found"):
        assert load(source) is None
    assert load(source) is None


def test_a_compiler_with_launcher_and_flags(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env g++ -DSPECIAL=1")
    source.write_text(source.read_text() + "#ifndef SPECIAL\n#error missing\n#endif\n")
    assert load(source) is not None


def test_compiled_code_can_be_switched_off(source: Path) -> None:
    with without_compiled_code():
        assert load(source) is None
    assert load(source) is not None


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MLREVIEWS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mlreviews"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "mlreviews"


def _value(source: Path, cache: Path) -> float:
    os.environ["MLREVIEWS_CACHE"] = str(cache)
    library = load(source)
    assert library is not None
    return apply(library, torch.ones(1), 0).item()


def test_processes_may_build_at_the_same_time(source: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(_value, [(source, tmp_path / "cache")] * 2)
    assert found == pytest.approx([2.718281828] * 2)
    assert len(list(cache_folder().iterdir())) == 1


def test_one_pool_of_threads() -> None:
    """The loops run in torch's own OpenMP runtime: two would fight for the cores."""
    code = (
        "import torch; from mlreviews_kernels.linear_scan import linear_scan;"
        "linear_scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3));"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc on this system")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 1


def test_only_contiguous_memory_is_handed_over() -> None:
    assert pointer(None).value is None
    with pytest.raises(ValueError, match="contiguous"):
        pointer(torch.ones(3, 2).T)
