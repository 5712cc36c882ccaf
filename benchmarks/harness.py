"""Compares candidates side by side: interleaved times, peak memory in fresh processes, one table, one JSON record.

A benchmark script gives its candidates as top-level functions with plain arguments (they are called again in a new
process, which has to be able to import them)::

    CANDIDATES = [Candidate("new", solve, (1000,)), Candidate("old", solve_slowly, (1000,))]

    if __name__ == "__main__":
        arguments = parser(__doc__).parse_args()
        report("solve", measure(CANDIDATES, rounds=5), arguments, settings={"n": 1000})

Every round runs each candidate once, so a machine that slows down half-way slows all of them. Reported are the median
and the range over the rounds. A result holds no paths and no names of hosts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
VERSIONED = ("mlreviews", "torch", "numpy", "scipy", "scikit-learn", "triton")


@dataclass(frozen=True)
class Candidate:
    """One way to do the job.

    Attributes:
        name: for the table.
        function: a top-level function of the script; what it returns is handed to the checks of the script.
        arguments: of the call; they can be pickled.
        prepare: a top-level function that makes the first argument (data, say), whose cost is not measured.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    prepare: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        return self.bound()()

    def bound(self) -> Callable[[], Any]:
        """The call that is measured, with its data prepared."""
        first = () if self.prepare is None else (self.prepare(),)
        return lambda: self.function(*first, *self.arguments)


@dataclass
class Measurement:
    """What was measured of a candidate.

    Attributes:
        name: of the candidate.
        seconds: one for each round.
        peak_mib: the most resident memory that one call adds in a fresh process; None where that can't be told.
        result: of the last call.
        notes: further numbers of the script's own, such as deviations from a reference.
    """

    name: str
    seconds: list[float]
    peak_mib: float | None
    result: Any = None
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def measure(
    candidates: Sequence[Candidate], *, rounds: int, warm_up: int = 1, memory: bool = True
) -> list[Measurement]:
    """Runs all candidates in turn, round after round.

    Args:
        candidates: with different names.
        rounds: how many are timed.
        warm_up: rounds before that, which are not.
        memory: whether to measure the peak memory as well, by one more call of each in a process of its own.
    """
    calls = [candidate.bound() for candidate in candidates]
    found = [Measurement(candidate.name, [], None) for candidate in candidates]
    steps = [(turn, i) for turn in range(warm_up + rounds) for i in range(len(calls))]
    for turn, i in track(steps, "timing", console=Console(stderr=True), transient=True):
        _release_memory()
        _synchronise()
        start = time.perf_counter()
        found[i].result = calls[i]()
        _synchronise()
        if turn >= warm_up:
            found[i].seconds.append(time.perf_counter() - start)
    if memory:
        for candidate, measurement in zip(candidates, found, strict=True):
            measurement.peak_mib = _peak_memory(candidate)
    return found


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--quick", action="store_true", help="small sizes: seconds; nothing is written unless --out is given"
    )
    options.add_argument("--rounds", type=int, help="timed rounds (an odd number has a median that was measured)")
    options.add_argument("--threads", type=int, help="threads of torch; default: what torch chooses")
    options.add_argument(
        "--no-growth", action="store_true", help="only the main shapes, not the growth with the length"
    )
    options.add_argument("--out", type=Path, help=f"folder for the JSON record; default: benchmarks/{RESULTS.name}")
    return options


def lengths(arguments: argparse.Namespace) -> tuple[int, ...]:
    """The sequence lengths of tables that show growth."""
    if arguments.no_growth:
        return ()
    return (128, 512) if arguments.quick else (1024, 4096, 16384, 65536)


def use_threads(threads: int | None) -> None:
    """Sets the number of threads, here and in the processes that measure memory."""
    if threads is not None:
        torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def report(
    name: str, measurements: Sequence[Measurement], arguments: argparse.Namespace, *, settings: Mapping[str, Any]
) -> None:
    """Prints the table, and writes the record unless the run was a quick one without --out.

    Args:
        name: of the benchmark; the record is ``<name>.json``.
        measurements: "relative" times are relative to the last one.
        arguments: of the command line.
        settings: what was run, in words and numbers.
    """
    reference = measurements[-1]
    table = Table("candidate", title=f"{name}: {', '.join(f'{value} {key}' for key, value in settings.items())}")
    for heading in ("median", "range", "relative", "memory", *reference.notes):
        table.add_column(heading, justify="right")
    for m in measurements:
        spread = f"{min(m.seconds):.2g}-{max(m.seconds):.2g}"
        memory = "" if m.peak_mib is None else f"{m.peak_mib:.0f} MiB"
        notes = [_number(m.notes[key]) if key in m.notes else "" for key in reference.notes]
        table.add_row(m.name, f"{m.median:.3g} s", spread, f"{m.median / reference.median:.2f}", memory, *notes)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in {**machine(), **versions()}.items()), style="dim")
    out = arguments.out or (None if arguments.quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "benchmark": name,
            "quick": arguments.quick,
            "when": datetime.now(UTC).strftime("%Y-%m-%d"),
            "settings": dict(settings),
            "machine": machine(),
            "versions": versions(),
            "candidates": [_row(m) for m in measurements],
        }
        path = out / f"{name}.json"
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        console.print(f"written: {path}", soft_wrap=True)


def machine() -> dict[str, str | int]:
    """Processor, cores and threads, and the GPU where there is one."""
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here, as far as they are installed."""
    installed = {d.name: d.version for d in metadata.distributions() if d.name in VERSIONED}
    return {"python": platform.python_version()} | {name: installed[name] for name in VERSIONED if name in installed}


def _row(measurement: Measurement) -> dict[str, Any]:
    return {
        "name": measurement.name,
        "median_seconds": _rounded(measurement.median),
        "seconds": [_rounded(value) for value in measurement.seconds],
        "peak_mib": None if measurement.peak_mib is None else _rounded(measurement.peak_mib),
        **{key: _rounded(value) for key, value in measurement.notes.items()},
    }


def _number(value: float) -> str:
    """With three digits; errors, which are small, as a power of ten."""
    return f"{value:.3g}" if value == 0 or not abs(value) < 1e-3 else f"{value:.0e}"


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _release_memory() -> None:
    """Gives freed memory back, so that no candidate works in pages that the one before has touched."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory(candidate: Candidate) -> float | None:
    if sys.platform == "win32":
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_added_memory, (candidate,))


def _added_memory(candidate: Candidate) -> float:
    """By how much one call raises the process's largest resident memory, in MiB."""
    call = candidate.bound()
    call()  # libraries that are loaded on first use are not the candidate's
    _release_memory()  # nor is what the first call left for the second to use
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the largest so far is now the present one
    before = _largest_memory()
    call()
    return _largest_memory() - before


def _largest_memory() -> float:
    if sys.platform == "linux":  # its ru_maxrss would begin with that of the parent process
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
        return int(status["VmHWM"].split()[0]) / 2**10
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10  # bytes there, KiB elsewhere
