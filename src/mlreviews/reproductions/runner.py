"""Runs reproductions and writes ``<slug>.json``, ``<slug>.svg`` and ``<slug>.png``: all three, or nothing at all.

Whatever can be checked before an experiment is. Files are made in a hidden folder inside the output folder and moved
into place together, so an error, a full disk or Ctrl-C leaves what was there before. A lock per slug keeps a second
process away. Importing this module imports no torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

import mlreviews
from mlreviews.catalogue import Technique
from mlreviews.reproductions.figures import style
from mlreviews.reproductions.protocol import Outcome, Record, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ReproductionError", "check_environment", "reproduce", "reproduce_many"]

# Optional packages, and the extra that installs each.
EXTRAS = {"matplotlib": "plots", "sklearn": "data", "transformers": "transformers", "triton": "triton"}
# Packages whose version may explain a difference; the name under which they are imported, where that is another.
_VERSIONED = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib", "transformers", "triton")
_IMPORTED_AS = {"scikit-learn": "sklearn"}
_SECONDS_TO_STOP = 5.0


class ReproductionError(RuntimeError):
    """A reproduction could not be run, or what it found could not be written.

    Attributes:
        record: what was measured, when the experiment itself had succeeded.
    """

    record: Record | None = None


def check_environment(settings: Settings, out: Path) -> None:
    """Checks what every reproduction needs: matplotlib, the device, and a folder that can be written to.

    Args:
        settings: names the device.
        out: the output folder; made when it is not there.

    Raises:
        ReproductionError: one of them is missing; the message says which.
    """
    _import("matplotlib", "drawing the figures")
    torch = _import("torch", "every reproduction")
    try:
        torch.empty(0, device=settings.device)
    except Exception as error:
        raise ReproductionError(f"device {settings.device!r} can't be used: {_first_line(error)}") from error
    with _writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out, prefix=".mlreviews-"):
            pass


def reproduce(technique: Technique, settings: Settings, out: Path) -> Record:
    """Runs the reproduction of a technique and writes its record and figure.

    Args:
        technique: must have a reproduction.
        settings: how to run it.
        out: the output folder; made when it is not there. Files of the same technique in it are replaced.

    Returns:
        The record, as written to ``<slug>.json``.

    Raises:
        ReproductionError: it can't be run or its results can't be written; the files in ``out`` are as before.
    """
    if not technique.reproduced:
        raise ReproductionError(f"{technique.slug} is {technique.status}: it has no reproduction")
    check_environment(settings, out)
    with _exclusive(technique.slug, out) as staging:
        experiment = _import(technique.reproduction, technique.slug)
        record = _run(technique.slug, experiment, settings)
        try:
            _write(record, experiment, staging)
            _publish(staging, out)
        except Exception as error:
            failure = _failure(technique.slug, error, f"its results can't be drawn and written to {out}")
            failure.record = record
            raise failure from error
    return record


def _run(slug: str, experiment: ModuleType, settings: Settings) -> Record:
    """Measures. Torch's default random generators are seeded for the experiment, and put back after it."""
    import torch

    started = datetime.now(UTC)
    clock = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(settings.seed)
            outcome = experiment.run(settings)
        seconds = time.perf_counter() - clock
        if not isinstance(outcome, Outcome):
            raise TypeError(f"run returned {type(outcome).__name__}, expected an Outcome")
        record = Record(
            slug=slug,
            outcome=outcome,
            full=settings.full,
            seed=settings.seed,
            device=settings.device,
            seconds=seconds,
            started=started.isoformat(timespec="seconds"),
            versions=_versions(),
            machine=_machine(settings.device),
        )
        record.to_json()  # what can't be stored is an error of the experiment
    except Exception as error:
        raise _failure(slug, error, "the experiment failed") from error
    return record


def _write(record: Record, experiment: ModuleType, folder: Path) -> None:
    """Writes the three files; the same record gives the same bytes."""
    (folder / f"{record.slug}.json").write_text(record.to_json(), encoding="utf-8")
    with style():
        figure: Figure = experiment.draw(record.outcome)
        figure.savefig(folder / f"{record.slug}.svg", metadata={"Date": None, "Creator": None})
        figure.savefig(folder / f"{record.slug}.png", metadata={"Software": None}, dpi=150)


def _publish(staging: Path, out: Path) -> None:
    """Moves all files of a folder to another; when one can't be moved, the former ones are put back."""
    names = sorted(file.name for file in staging.iterdir())
    former = staging / "former"
    former.mkdir()
    for name in names:
        if (out / name).exists():
            shutil.copy2(out / name, former / name)
    with _signals_held():
        try:
            for name in names:
                os.replace(staging / name, out / name)
        except OSError:
            for name in names:
                if (former / name).exists():
                    os.replace(former / name, out / name)
                else:
                    (out / name).unlink(missing_ok=True)
            raise


@contextmanager
def _exclusive(slug: str, out: Path) -> Iterator[Path]:
    """A hidden, empty folder in ``out`` for the files of one slug, held by one process at a time."""
    lock, staging = out / f".{slug}.lock", out / f".{slug}.tmp"
    with _writing_to(out):
        handle = _lock(lock)
    try:
        with _writing_to(out):
            shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
            staging.mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # Windows keeps open files
            lock.unlink()
        os.close(handle)


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise ReproductionError(f"can't write to the output folder {out}: {reason}") from error


def _lock(path: Path) -> int:
    """Opens a file and locks it; the lock ends with the process, however that ends."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_handle(handle)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise ReproductionError(f"another process is writing this reproduction: it holds {path}") from None
        except FileNotFoundError:
            pass
        except OSError:  # some network file systems have no locks
            os.close(handle)
            raise
        os.close(handle)  # its former holder removed the file between our opening and locking it


def _lock_handle(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keeps back what would interrupt the block, Ctrl-C and SIGTERM, until it is done."""
    if threading.current_thread() is not threading.main_thread():  # others are never interrupted
        yield
        return
    came: list[int] = []
    former = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for held, handler in former.items():
            signal.signal(held, handler)
        for number in came:
            signal.raise_signal(number)


def _import(module: str, needed_for: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise _failure(needed_for, error, f"{module} can't be imported") from error


def _failure(subject: str, error: Exception, what: str) -> ReproductionError:
    """One line that says what went wrong, and which extra is missing where that is it."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in EXTRAS:
        return ReproductionError(f"{subject} needs {package}: pip install 'mlreviews[{EXTRAS[package]}]'")
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return ReproductionError(f"{subject}: {what}: {error.strerror}{where}")
    return ReproductionError(f"{subject}: {what}: {type(error).__name__}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _versions() -> dict[str, str]:
    versions = {"mlreviews": mlreviews.__version__, "python": platform.python_version()}
    for package in _VERSIONED:
        if _IMPORTED_AS.get(package, package) in sys.modules:
            with suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
    return versions


def _machine(device: str) -> dict[str, str | int]:
    import torch

    machine: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reproduce_many(
    techniques: Sequence[Technique], settings: Settings, out: Path, jobs: int = 1
) -> Generator[tuple[Technique, Record | ReproductionError]]:
    """Runs several reproductions, each whatever becomes of the others.

    Args:
        techniques: which; in order when there is one job.
        settings: how to run them. With several jobs their progress is not tracked.
        out: the output folder.
        jobs: how many processes at a time; 1 means this one. They share the processor's cores evenly.

    Yields:
        Each technique with its record, or with the error that stopped it, as soon as it is done. Closing the iterator
        stops what is still running.

    Raises:
        ReproductionError: none of them could run (see `check_environment`).
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    check_environment(settings, out)
    jobs = min(jobs, len(techniques))
    if jobs <= 1:
        for technique in techniques:
            yield technique, _attempt(technique, settings, out)
        return
    waiting = deque(techniques)
    running: dict[Connection, tuple[SpawnProcess, Technique]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                _start(waiting.popleft(), settings, out, max(1, _cores() // jobs), running)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                process, technique = running[connection]
                result = _receive(connection, process, technique)
                del running[connection]
                yield technique, result
    finally:
        _stop(running, out)


def _attempt(technique: Technique, settings: Settings, out: Path) -> Record | ReproductionError:
    try:
        return reproduce(technique, settings, out)
    except ReproductionError as error:
        return error


def _start(
    technique: Technique,
    settings: Settings,
    out: Path,
    threads: int,
    running: dict[Connection, tuple[SpawnProcess, Technique]],
) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    plain = Settings(settings.full, settings.seed, settings.device)  # a tracker draws in this process
    process = context.Process(target=_work, args=(sender, technique, plain, out, threads), daemon=True)
    with _signals_held(), _interrupts_blocked():
        process.start()
        running[receiver] = process, technique
    sender.close()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started in the block never get a terminal's Ctrl-C: `_stop` ends them, at any stage and quietly."""
    if sys.platform == "win32":
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _work(sender: Connection, technique: Technique, settings: Settings, out: Path, threads: int) -> None:
    """What a child process does. SIGTERM ends it the way Ctrl-C ends a program, with everything cleaned up."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, str(threads))
    import torch

    torch.set_num_threads(min(threads, torch.get_num_threads()))
    try:
        result = _attempt(technique, settings, out)
    except KeyboardInterrupt:
        sys.exit(130)
    if isinstance(result, ReproductionError):
        # Tracebacks don't travel between processes, their text does.
        result.add_note("".join(traceback.format_exception(result)))
    sender.send(result)


def _end_with(parent: int) -> None:
    wait([parent])
    os._exit(1)


def _receive(connection: Connection, process: SpawnProcess, technique: Technique) -> Record | ReproductionError:
    try:
        result: Record | ReproductionError = connection.recv()
    except EOFError:
        process.join()
        result = ReproductionError(f"{technique.slug}: its process ended with exit code {process.exitcode}")
    process.join()
    connection.close()
    return result


def _stop(running: dict[Connection, tuple[SpawnProcess, Technique]], out: Path) -> None:
    for process, _ in running.values():
        process.terminate()
    end = time.monotonic() + _SECONDS_TO_STOP
    for process, technique in running.values():
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        with suppress(ReproductionError), _exclusive(technique.slug, out):
            pass  # takes away what a killed process left
