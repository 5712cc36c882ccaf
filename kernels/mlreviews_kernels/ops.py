"""What the registered ops of the cores share.

An op picks its backend when it runs, so a compiled program sees `use_backend` too, and returns the choice as a
one-element tensor on the CPU, so that its backward uses the same one (autograd may run it in another thread).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from mlreviews_kernels.backends import BACKENDS, Core, select

__all__ = ["backend_of", "chosen", "empty_choice", "gradients", "implementation"]


def chosen(core: Core, device: torch.device) -> tuple[str, Tensor]:
    """The backend that the core uses for tensors on a device, as a name and as a tensor for the backward."""
    backend = select(core, device).backend
    return backend, torch.tensor([BACKENDS.index(backend)], dtype=torch.int8)


def empty_choice() -> Tensor:
    """What stands for the choice while an op is only traced."""
    return torch.empty(1, dtype=torch.int8, device="cpu")


def backend_of(choice: Tensor) -> str:
    """The backend's name."""
    return BACKENDS[int(choice)]


def implementation(core: Core, backend: str) -> ModuleType:
    """The module of a core that has a backend's functions; triton is imported here, when it is first needed."""
    module = {"reference": "reference", "cpu": "cpu", "triton": "gpu"}[backend]
    return importlib.import_module(f"mlreviews_kernels.{core.name}.{module}")


def gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The vector-Jacobian products of a function in plain PyTorch: the backward of a reference.

    Args:
        function: of the inputs.
        inputs: its arguments.
        grads: one for each output.
    """
    outputs, pullback = torch.func.vjp(function, *inputs)[:2]
    cotangents = tuple(grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True))
    # a gradient may be another one itself (of a sum, say); what an op returns may not share memory
    return tuple(grad.clone() for grad in pullback(cotangents))
