"""What the registered ops of the cores share.

An op picks its backend when it runs, so a compiled program sees `use_backend` too, and returns the choice as a
one-element tensor on the CPU, so that its backward uses the same one (autograd may run it in another thread).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mlreviews_kernels.backends import BACKENDS, Core, select

__all__ = ["backend_of", "chosen", "empty_choice", "gradients", "implementation", "register_scan"]


def chosen(core: Core, device: torch.device, dtype: torch.dtype | None = None) -> tuple[str, Tensor]:
    """The backend that the core uses for tensors on a device, as a name and as a tensor for the backward.

    Args:
        core: the core.
        device: of its tensors.
        dtype: that it has to compute in; None where any backend will do.
    """
    backend = select(core, device, dtype).backend
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


def register_scan(
    core: Core,
    name: str,
    kind: Any,
    options: str,
    results: Callable[[Any], tuple[Tensor, ...]],
    *,
    kept: slice = slice(0),
) -> None:
    """Registers the op ``mlreviews::<name>`` of a scan over sequences laid out one after another, and its backward.

    The module of each backend has ``<name>(given, offsets, *options)``, which returns the outputs, the final states,
    and maybe something else for the backward; and ``<name>_backward(grad_out, grad_final, given, *kept, offsets,
    *options)``, which returns the gradients of what is given, None for None. The reference's backward is autograd's.

    Args:
        core: the core.
        name: of the op.
        kind: the NamedTuple of the differentiable tensors. Those with a default may be None. ``initial``, the
            states before the first steps, has the dtype of the computation.
        options: the arguments after the offsets, as a schema, such as ``"int chunk_size"``.
        results: empty tensors like those that the op returns, from its inputs.
        kept: which of the results the backward gets.
    """
    tensors = ", ".join(f"Tensor{'?' if field in kind._field_defaults else ''} {field}" for field in kind._fields)
    number = len(kind._fields)
    returned = ", ".join(["Tensor"] * (1 + max(2, kept.stop)))  # with the choice
    schema = f"({tensors}, Tensor offsets, {options}) -> ({returned})"

    @torch.library.custom_op(f"mlreviews::{name}", mutates_args=(), schema=schema)
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        given = kind(*arguments[:number])
        backend, choice = chosen(core, given.initial.device, given.initial.dtype)
        # the inputs' dtypes decide, in every backend: products of PyTorch would be autocast otherwise
        with torch.autocast(given.initial.device.type, enabled=False):
            return *getattr(implementation(core, backend), name)(given, *arguments[number:]), choice

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        return *results(kind(*arguments[:number])), empty_choice()

    schema = f"(Tensor[] grads, {tensors}, Tensor[] kept, Tensor choice, Tensor offsets, {options}) -> Tensor[]"

    @torch.library.custom_op(f"mlreviews::{name}_backward", mutates_args=(), schema=schema)
    def backward(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
        given, (kept, choice, *rest) = kind(*arguments[:number]), arguments[number:]
        backend = backend_of(choice)
        run = implementation(core, backend)
        without_autocast = torch.autocast(given.initial.device.type, enabled=False)
        if backend != "reference":
            with without_autocast:
                found = getattr(run, f"{name}_backward")(*grads, given, *kept, *rest)
            return [grad for grad in found if grad is not None]
        present = {field: tensor for field, tensor in given._asdict().items() if tensor is not None}

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return getattr(run, name)(kind(**dict(zip(present, tensors, strict=True))), *rest)[:2]

        with without_autocast:
            return list(gradients(function, tuple(present.values()), grads))

    @backward.register_fake
    def _(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
        return [tensor.new_empty(tensor.shape) for tensor in arguments[:number] if tensor is not None]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[number + 1 :]
        ctx.save_for_backward(*inputs[: number + 1], output[-1], *output[kept])

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, (offsets, choice, *saved) = ctx.saved_tensors[:number], ctx.saved_tensors[number:]
        found = iter(backward(list(grads[:2]), *given, saved, choice, offsets, *ctx.options))
        return *(None if x is None else next(found) for x in given), *(None for _ in (offsets, *ctx.options))

    forward.register_autograd(differentiate, setup_context=save)
