"""``mlreviews doctor``: what this machine has, and which backend each kernel core would use."""

from __future__ import annotations

import platform
from typing import Annotated

import typer

from mlreviews.cli.output import console, print_json

__all__ = ["doctor"]

_EXTRAS = {"matplotlib": "plots", "scikit-learn": "data", "transformers": "transformers"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine has, and which backends it would use."""
    report = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    kernels: dict[str, dict[str, dict[str, str]]] = {}
    try:
        import torch
    except ImportError as error:
        report["torch"] = f"can't be imported: {error}"
    else:
        from mlreviews_kernels.backends import compiler

        report["torch"] = f"{torch.__version__}, {torch.get_num_threads()} threads"
        report["gpu"] = _gpus()
        report["triton"] = _triton()
        report["compiler"] = compiler() or "no C++ compiler found: fast CPU paths use vectorised PyTorch"
        kernels = _kernels()
    for package, extra in _EXTRAS.items():
        report[package] = _version(package) or f"not installed: pip install 'mlreviews[{extra}]'"
    if as_json:
        print_json({**report, "kernels": kernels})
        return
    screen = console()
    for name, value in report.items():
        screen.print(f"{name:14}{value}", soft_wrap=True)
    for core, choices in kernels.items():
        screen.print(f"\nkernel core {core}", style="bold")
        for device, choice in choices.items():
            screen.print(f"  on {device:5} {choice['backend']}: {choice['reason']}", soft_wrap=True)
    if not kernels:
        screen.print("\nno kernel core is part of this version")


def _version(package: str) -> str | None:
    import importlib.metadata  # slow, and imported at the start of every command if it stood above

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> str:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "torch sees none"


def _triton() -> str:
    """Whether Triton kernels can run, with the version where it is installed."""
    import torch

    from mlreviews_kernels.backends import triton_problem

    problem = triton_problem(torch.device("cuda"))
    version = _version("triton")
    return f"{version}, {problem}" if version and problem else version or problem or "importable"


def _kernels() -> dict[str, dict[str, dict[str, str]]]:
    """Core -> device -> the backend it would use there and why, or the error that a wrong request would give."""
    import torch

    from mlreviews_kernels.backends import BackendError, cores, select

    found: dict[str, dict[str, dict[str, str]]] = {}
    for core in cores():
        found[core.name] = {}
        for device in ("cpu", "cuda"):
            try:
                choice = select(core, torch.device(device))
            except BackendError as error:
                found[core.name][device] = {"backend": "none", "reason": str(error)}
            else:
                found[core.name][device] = {"backend": choice.backend, "reason": choice.reason}
    return found
