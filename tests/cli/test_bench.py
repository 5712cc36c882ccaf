from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mlreviews import catalogue
from mlreviews.cli.commands import app

SCRIPT = '''"""Time of a scan.

And more.
"""
import sys
from pathlib import Path

Path(__file__).with_suffix(".args").write_text(repr(sys.argv[1:]))
sys.exit(int(sys.argv[-1]) if sys.argv[1:] else 0)
'''


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "80"})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "bench_scan.py").write_text(SCRIPT)
    (folder / "bench_attention.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n")
    (folder / "harness.py").write_text('"""Shared."""\n')
    monkeypatch.setattr(catalogue, "CHECKOUT", tmp_path)
    return folder


def test_without_a_name_they_are_listed(checkout: Path) -> None:
    result = run()
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["benchmark  what it measures", "attention", "scan       Time of a scan."]


@pytest.mark.parametrize("name", ["scan", "bench_scan", "bench_scan.py"])
def test_arguments_and_exit_code_are_the_scripts(checkout: Path, name: str) -> None:
    assert run(name, "--device", "cuda", "--sizes=1,2", "-v", "--", "--help", "7").exit_code == 7
    noted = (checkout / "bench_scan.args").read_text()
    assert noted == "['--device', 'cuda', '--sizes=1,2', '-v', '--help', '7']"


def test_no_arguments(checkout: Path) -> None:
    assert run("scan").exit_code == 0
    assert (checkout / "bench_scan.args").read_text() == "[]"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_script_that_is_killed(checkout: Path) -> None:
    assert run("attention").exit_code == 128 + 9


def test_unknown_names(checkout: Path) -> None:
    result = run("atention")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: no benchmark is called 'atention'; did you mean attention?\n"


@pytest.mark.parametrize("arguments", [(), ("scan",)])
def test_an_installed_package_has_none(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setattr(catalogue, "CHECKOUT", None)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: the benchmarks are in the source checkout, and this is an installed package\n"


def test_a_checkout_without_benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalogue, "CHECKOUT", tmp_path)
    assert (run().exit_code, run().stderr) == (1, f"Error: there is no benchmark in {tmp_path / 'benchmarks'}\n")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.run", stop)
    return lambda: None


def test_ctrl_c(checkout: Path, interrupted: object) -> None:
    assert run("scan").exit_code == 130
