from __future__ import annotations

import json
import platform
import sys
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner, Result

from mlreviews.cli import doctor
from mlreviews.cli.commands import app
from mlreviews_kernels import backends
from mlreviews_kernels.backends import Core


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "80"})


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a compiler and without a GPU, and two kernel cores."""
    for name in ("MLREVIEWS_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setattr(backends, "_triton_import_problem", lambda: None)
    monkeypatch.setattr(backends, "compiler", lambda: "g++")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    scan = Core("scan", frozenset({"reference.py", "cpu.cpp", "gpu.py"}))
    monkeypatch.setattr(backends, "cores", lambda: [Core("bare", frozenset({"reference.py"})), scan])


def report() -> dict[str, object]:
    result = run("--json")
    assert result.exit_code == 0
    return dict(json.loads(result.stdout))


def test_what_the_machine_has() -> None:
    found = report()
    assert found["python"] == platform.python_version()
    assert found["torch"] == f"{torch.__version__}, {torch.get_num_threads()} threads"
    assert (found["gpu"], found["compiler"]) == ("torch sees none", "g++")
    assert str(found["triton"]).endswith(", torch sees no GPU")
    assert found["matplotlib"] == doctor._version("matplotlib")


def test_what_each_core_would_use_and_why() -> None:
    assert report()["kernels"] == {
        "bare": {
            "cpu": {"backend": "reference", "reason": "bare has no cpu.cpp or cpu.py"},
            "cuda": {"backend": "reference", "reason": "bare has no gpu.py"},
        },
        "scan": {
            "cpu": {"backend": "cpu", "reason": "the default on a CPU: compiled with g++"},
            "cuda": {"backend": "reference", "reason": "torch sees no GPU"},
        },
    }


def test_for_people() -> None:
    result = run()
    assert result.exit_code == 0
    assert "\ngpu           torch sees none\n" in result.stdout
    assert "\ncompiler      g++\n" in result.stdout
    assert (
        "\nkernel core scan\n  on cpu   cpu: the default on a CPU: compiled with g++\n  on cuda  ref" in result.stdout
    )
    assert "no kernel core" not in result.stdout


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(doctor, "_version", lambda package: "3.5" if package == "triton" else None)
    found = report()
    assert (found["gpu"], found["triton"]) == ("GPU 0, GPU 1", "3.5")
    assert found["kernels"]["scan"]["cuda"] == {"backend": "triton", "reason": "the default on a GPU"}  # type: ignore[index]


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "compiler", lambda: None)
    monkeypatch.setattr(backends, "_triton_import_problem", lambda: "triton is not installed")
    monkeypatch.setattr(backends, "cores", lambda: [])
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    found = report()
    assert str(found["compiler"]).startswith("no C++ compiler found")
    assert found["triton"] == "triton is not installed"
    assert found["scikit-learn"] == "not installed: pip install 'mlreviews[data]'"
    assert found["kernels"] == {}
    assert run().stdout.endswith("\nno kernel core is part of this version\n")


def test_a_wrong_request_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLREVIEWS_BACKEND", "abacus")
    result = run()
    assert result.exit_code == 0
    assert "on cpu   none: MLREVIEWS_BACKEND: there is no backend 'abacus'" in result.stdout


def test_torch_that_can_not_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = report()
    assert str(found["torch"]).startswith("can't be imported: ")
    assert found["kernels"] == {}
    assert "gpu" not in found
