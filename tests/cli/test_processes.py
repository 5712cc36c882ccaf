"""The command line as a process: start-up, exit codes, pipes, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import mlreviews
from tests.fakes import write_package


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package with the fakes in place of its techniques, and an empty folder to run it in."""
    write_package(tmp_path / "installed")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "installed"


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not what():
        assert time.monotonic() < end, "waited for five minutes"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Start-up


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh process has loaded after it ran the code."""
    result = python("-c", f"{code}\nimport sys\nprint(*sorted(sys.modules), file=sys.stderr)")
    assert result.returncode == 0, result.stderr
    return set(result.stderr.split())


def test_importing_the_package_loads_nothing_else() -> None:
    loaded = loaded_after("import mlreviews")
    assert {name for name in loaded if name.startswith("mlreviews")} == {"mlreviews"}
    assert not loaded & {"torch", "numpy", "typer", "rich"}


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json", "lora"], ["show", "lora"], ["--version"], ["bench"]]
)
def test_commands_about_files_load_no_torch(arguments: list[str]) -> None:
    code = f"import sys; sys.argv = ['mlreviews', *{arguments}]\nfrom mlreviews.cli import main\n"
    loaded = loaded_after(code + "try: main()\nexcept SystemExit: sys.stderr = sys.stderr")
    assert "mlreviews.cli" in loaded
    assert not loaded & {"torch", "numpy", "matplotlib", "mlreviews.reproductions.runner"}
    areas = {name for name in loaded if name.count(".") == 1 and name.startswith("mlreviews.")}
    assert areas <= {"mlreviews.catalogue", "mlreviews.cli", "mlreviews.reproductions"}


def test_a_list_is_quick_as_it_loads_no_typer() -> None:
    loaded = loaded_after(
        "import sys; sys.argv = ['mlreviews', 'list', 'lora']\nfrom mlreviews.cli import main\nmain()"
    )
    assert "mlreviews.catalogue" in loaded
    assert not loaded & {"typer", "pydantic", "rich"}


@pytest.mark.parametrize("words", ["", "fake", "GOOD fake", "no such words"])
def test_with_and_without_typer_it_is_the_same_list(installed: Path, words: str) -> None:
    quick = python("-m", "mlreviews", "list", *words.split())
    other = python("-m", "mlreviews", "list", "--", *words.split())
    assert (quick.stdout, quick.stderr, quick.returncode) == (other.stdout, other.stderr, 0)
    assert quick.stdout or words == "no such words"


@pytest.mark.parametrize("options", [[], ["--"]])
def test_a_broken_catalogue_is_one_line(installed: Path, options: list[str]) -> None:
    (installed / "mlreviews" / "catalogue" / "peft.toml").write_text("[[")
    result = python("-m", "mlreviews", "list", *options)
    assert (result.stdout, result.returncode) == ("", 1)
    assert re.fullmatch(r"Error: peft\.toml: not valid TOML: .*\n", result.stderr)


def test_version_in_both_ways_to_run() -> None:
    script = Path(sys.executable).with_name("mlreviews")
    for command in ([sys.executable, "-m", "mlreviews"], [str(script)]):
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout == f"mlreviews {mlreviews.__version__}\n"


# Output


def test_a_reader_that_goes_away_is_no_error() -> None:
    for command in ("list", "list --json", "show parameter-counting"):
        with subprocess.Popen(
            [sys.executable, "-m", "mlreviews", *command.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout
            assert process.stderr
            process.stdout.close()  # before anything is written
            assert process.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_output_that_can_not_be_written_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "mlreviews", "list"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    assert result.stderr == "Error: the output: No space left on device\n"


def test_no_colours_in_a_pipe_and_any_encoding(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("TERM", "xterm-256color")
    for arguments in (["list"], ["show", "good-fake"]):
        result = python("-m", "mlreviews", *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert "\x1b" not in result.stdout
        assert "good-fake" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["list"], 0),
        (["show", "no-such-technique"], 2),
        (["reproduce", "no-such-technique"], 2),
        (["reproduce", "lora", "--jobs", "0"], 2),
        (["no-such-command"], 2),
        (["bench"], 1),  # not a checkout
    ],
)
def test_exit_codes(installed: Path, arguments: list[str], code: int) -> None:
    result = python("-m", "mlreviews", *arguments)
    assert result.returncode == code
    assert "Traceback" not in result.stderr


# Signals


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Starts the command, which hears Ctrl-C also where the tests themselves run in the background and don't."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlreviews", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def started() -> list[int]:
    """The processes of the slow experiments that have begun."""
    return [int(file.name.partition("-")[2]) for file in Path().glob("started-*")]


def test_ctrl_c_leaves_nothing(installed: Path) -> None:
    process = start("reproduce", "slow-fake")
    wait_for(lambda: started() == [process.pid])
    assert list(Path("results").iterdir())  # the lock
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert (stdout, b"Traceback" in stderr) == (b"", False)
    assert list(Path("results").iterdir()) == []


def test_ctrl_c_stops_all_processes(installed: Path) -> None:
    process = start("reproduce", "slow-fake", "slow-too-fake", "--jobs", "2")
    wait_for(lambda: len(started()) == 2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert (stdout, b"Traceback" in stderr) == (b"", False)
    assert not any(map(alive, started()))
    assert list(Path("results").iterdir()) == []


@pytest.mark.slow
def test_processes_end_when_the_one_that_started_them_is_killed(installed: Path) -> None:
    process = start("reproduce", "slow-fake", "slow-too-fake", "--jobs", "2")
    wait_for(lambda: len(started()) == 2)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, started())))
