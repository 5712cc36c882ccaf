"""What the Triton kernels cost, without a GPU: resources of every configuration, bytes moved, and the roofline time.

Resources come from ahead-of-time compilation: registers and bytes spilled a thread, shared memory a block, the matrix
instruction. Bytes are counted by running the kernels in Triton's interpreter at a small shape with their real tiles:
all that each program loads or stores, counting an address once a program ("moved") or once a kernel (what memory has to
give when the second-level cache serves the programs that read the same), against the compulsory minimum, every input
read and every output written once. The roofline is that of an H100 (SXM: 3.35 TB/s; 989 TFLOP/s in bfloat16 matrices,
67 TFLOP/s in float32) at the shape of the CPU benchmarks times 16 sequences, bfloat16, with as many times the
compulsory bytes as were counted once a kernel: a lower bound for the time, not a prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlreviews_kernels import use_backend
from mlreviews_kernels.adaptive_temperature_attention import adaptive_temperature_attention
from mlreviews_kernels.attention import attention
from mlreviews_kernels.backends import BackendError, cores
from mlreviews_kernels.delta_rule import delta_rule
from mlreviews_kernels.differential_attention import differential_attention
from mlreviews_kernels.linear_scan import linear_scan
from mlreviews_kernels.selective_attention import selective_attention
from mlreviews_kernels.selective_scan import selective_scan
from mlreviews_kernels.ssd import ssd
from mlreviews_kernels.static import TARGETS, Resources, analyse
from mlreviews_kernels.tree_masked_attention import tree_masked_attention

BANDWIDTH, MATRIX_RATE, VECTOR_RATE = 3.35e12, 989e12, 67e12
Make = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Work:
    """One call to count.

    Attributes:
        function: the public op.
        make: its tensor arguments, from the sizes.
        small: sizes for the interpreter.
        full: sizes for the roofline.
        operations: floating-point operations of forward and backward at the full sizes.
        rate: operations a second of the units that do most of them.
    """

    function: Callable[..., tuple[Tensor, Any]]
    make: Make
    small: tuple[int, ...]
    full: tuple[int, ...]
    operations: tuple[float, float]
    rate: float


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.1


def _linear(batch: int, time: int, channels: int) -> dict[str, Tensor]:
    return {"a": _normal(batch, time, channels), "b": _normal(batch, time, channels)}


def _selective(batch: int, time: int, channels: int, state: int) -> dict[str, Tensor]:
    tokens = {"u": _normal(batch, time, channels), "delta": _normal(batch, time, channels).abs()}
    shared = {"B": _normal(batch, time, state), "C": _normal(batch, time, state), "D": _normal(channels)}
    return {**tokens, "A": -_normal(channels, state).abs(), **shared, "z": _normal(batch, time, channels)}


def _ssd(batch: int, time: int, heads: int, dim: int, state: int) -> dict[str, Tensor]:
    tokens = {"x": _normal(batch, time, heads, dim), "log_a": -_normal(batch, time, heads).abs()}
    return {**tokens, "B": _normal(batch, time, 1, state), "C": _normal(batch, time, 1, state)}


def _delta(batch: int, time: int, heads: int, dim: int) -> dict[str, Tensor]:
    q, k, v = (_normal(batch, time, heads, dim) for _ in range(3))
    return {"q": q, "k": k, "v": v, "beta": _normal(batch, time, heads).sigmoid()}


def _attention(batch: int, time: int, heads: int, dim: int) -> dict[str, Tensor]:
    return {name: _normal(batch, time, heads, dim) for name in "qkv"}


def _tree(batch: int, tree: int, context: int, heads: int, kv_heads: int, dim: int) -> dict[str, Tensor]:
    caches = {f"{name}_cache": _normal(batch, context, kv_heads, dim) for name in "kv"}
    new = {name: _normal(batch, tree, kv_heads, dim) for name in "kv"}
    return {"q": _normal(batch, tree, heads, dim), **new, **caches}


def _chain_attention(**values: Tensor) -> tuple[Tensor, Tensor]:
    """The shape of the tree makes no difference."""
    tree = values["q"].shape[1]
    return tree_masked_attention(**values, tree_mask=torch.ones(tree, tree, dtype=torch.bool).tril())


def _adaptive_operations(batch: int, time: int, heads: int, dim: int) -> tuple[float, float]:
    product = 2.0 * batch * heads * time * time / 2 * dim  # half of the pairs are seen
    return 3 * product, 8 * product


def _tree_operations(batch: int, tree: int, context: int, heads: int, _: int, dim: int) -> tuple[float, float]:
    product = 2.0 * batch * heads * tree * (context + tree) * dim
    return 2 * product, 5 * product


def _selective_operations(batch: int, time: int, channels: int, state: int) -> tuple[float, float]:
    updates = batch * time * channels * state
    return 7.0 * updates, 20.0 * updates  # an exp counted as one; backward computes the states again


def _ssd_operations(batch: int, time: int, heads: int, dim: int, state: int, chunk: int = 64) -> tuple[float, float]:
    # states and their outputs: 2 x 2 N P a token and head; inside chunks: C B^T once a group, its product with x
    forward = 2.0 * batch * time * (heads * (2 * state * dim + chunk * dim) + chunk * state)
    return forward, 2.5 * forward


def _delta_operations(batch: int, time: int, heads: int, dim: int, chunk: int = 64) -> tuple[float, float]:
    forward = 2.0 * batch * time * heads * (3 * dim * dim + 4 * chunk * dim)
    return forward, 2.5 * forward


def _attention_operations(
    batch: int, time: int, heads: int, forward: float, backward: float, dim: int = 64
) -> tuple[float, float]:
    """Operations in units of dim a query, key below the diagonal and head."""
    pairs = batch * heads * time * time / 2.0 * dim
    return forward * pairs, backward * pairs


def _differential_inputs(batch: int, time: int, heads: int, dim: int) -> dict[str, Tensor]:
    wide = {"v": _normal(batch, time, heads, 2 * dim), "lam": _normal(heads)}
    return {name: _normal(batch, time, heads, dim) for name in ("q1", "k1", "q2", "k2")} | wide


def _differential(**given: Tensor) -> tuple[Tensor, None]:
    return differential_attention(**given), None


WORK = {
    "linear_scan": Work(
        linear_scan, _linear, (1, 256, 64), (64, 4096, 512), (2.0 * 64 * 4096 * 512, 4.0 * 64 * 4096 * 512), VECTOR_RATE
    ),
    "selective_scan": Work(
        selective_scan,
        _selective,
        (1, 64, 64, 16),
        (16, 2048, 1536, 16),
        _selective_operations(16, 2048, 1536, 16),
        VECTOR_RATE,
    ),
    "ssd": Work(
        ssd, _ssd, (1, 256, 8, 64, 128), (16, 2048, 24, 64, 128), _ssd_operations(16, 2048, 24, 64, 128), MATRIX_RATE
    ),
    "delta_rule": Work(
        delta_rule, _delta, (1, 256, 2, 64), (16, 2048, 16, 64), _delta_operations(16, 2048, 16, 64), MATRIX_RATE
    ),
    "adaptive_temperature_attention": Work(
        adaptive_temperature_attention,
        _attention,
        (1, 256, 2, 64),
        (16, 2048, 8, 64),
        _adaptive_operations(16, 2048, 8, 64),
        MATRIX_RATE,
    ),
    "attention": Work(
        attention,
        _attention,
        (1, 256, 2, 64),
        (16, 2048, 8, 64),
        _attention_operations(16, 2048, 8, 4, 10),
        MATRIX_RATE,
    ),
    "differential_attention": Work(
        _differential,
        _differential_inputs,
        (1, 128, 2, 64),
        (16, 2048, 4, 64),
        _attention_operations(16, 2048, 4, 12, 36),
        MATRIX_RATE,
    ),
    "selective_attention": Work(
        selective_attention,
        _attention,
        (1, 256, 2, 64),
        (16, 2048, 8, 64),
        # and the selector's logits: once forward, twice backward
        _attention_operations(16, 2048, 8, 4 + 2 / 8, 22 + 4 / 8),
        MATRIX_RATE,
    ),
    "tree_masked_attention": Work(
        _chain_attention,
        _tree,
        (1, 16, 512, 8, 2, 64),
        (16, 64, 8192, 32, 8, 64),
        _tree_operations(16, 64, 8192, 32, 8, 64),
        MATRIX_RATE,
    ),
}


class Compulsory(TorchDispatchMode):
    """Bytes of all tensors that go into and come out of this library's ops, each op for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "mlreviews":
            tensors = {id(x): x for x in tree_leaves((args, results)) if isinstance(x, Tensor)}
            self.bytes.append(sum(x.numel() * x.element_size() for x in tensors.values()))
        return results


class Moved:
    """Counts what kernels load and store in the interpreter: each address once a program, and once a kernel."""

    def __init__(self) -> None:
        self.program: object = None
        # "loaded" or "stored", bytes of an element -> addresses
        self.of_program: dict[tuple[str, int], list[np.ndarray]] = {}
        self.of_kernel: dict[tuple[str, int], list[np.ndarray]] = {}
        self.kernels: list[dict[str, Any]] = []

    def begin(self, kernel: str) -> None:
        """A kernel is launched."""
        self.close()
        self.kernels.append({"kernel": kernel, "moved": 0, "once": 0})

    def note(self, what: str, program: object, addresses: np.ndarray, size: int) -> None:
        """A program loads or stores."""
        if program != self.program:
            self._close_program()
            self.program = program
        self.of_program.setdefault((what, size), []).append(addresses.ravel())

    def _close_program(self) -> None:
        for (what, size), parts in self.of_program.items():
            addresses = np.unique(np.concatenate(parts))
            self.kernels[-1]["moved"] += size * addresses.size
            self.of_kernel.setdefault((what, size), []).append(addresses)
        self.of_program.clear()

    def close(self) -> list[dict[str, Any]]:
        """What the kernels since the last call of this have moved."""
        self._close_program()
        for (_, size), parts in self.of_kernel.items():
            self.kernels[-1]["once"] += size * np.unique(np.concatenate(parts)).size
        self.of_kernel.clear()
        self.program = None
        return self.kernels

    def taken(self) -> list[dict[str, Any]]:
        """The kernels so far, which are then forgotten."""
        found, self.kernels = self.close(), []
        return found


def _count(name: str) -> dict[str, list[Any]]:
    """Bytes that each kernel moves and compulsory ones, forward and backward, at the small shape, interpreting."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    counter = Moved()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch = GridExecutor.__call__

    def counting_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.begin(self.fn.__name__)
        return launch(self, *args, **kwargs)

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found = load(self, pointers, mask, *rest)
        counter.note("loaded", self.grid_idx, pointers.data[mask.data.astype(bool)], found.data.itemsize)
        return found

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.note("stored", self.grid_idx, pointers.data[mask.data.astype(bool)], value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counting_load, counting_store
    GridExecutor.__call__ = counting_launch
    work = WORK[name]
    leaves = {key: value.requires_grad_() for key, value in work.make(*work.small).items()}
    with use_backend("triton"), Compulsory() as compulsory:
        out, _ = work.function(**leaves)
        forward = counter.taken()
        with contextlib.suppress(BackendError):  # there may be no kernels for it
            out.backward(torch.ones_like(out))
        return {"kernels": [forward, counter.taken()], "compulsory": compulsory.bytes}


def _full_bytes(name: str) -> list[int]:
    """Compulsory bytes at the full shape in bfloat16, from shapes alone."""
    work = WORK[name]
    with FakeTensorMode(), Compulsory() as compulsory:
        leaves = {key: value.bfloat16().requires_grad_() for key, value in work.make(*work.full).items()}
        out, _ = work.function(**leaves)
        out.backward(torch.ones_like(out))
    return compulsory.bytes


def _other_process(environment: dict[str, str], *arguments: str) -> Any:
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def traffic(names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in track(names, "counting bytes", console=Console(stderr=True), transient=True):
        counted = _other_process({"TRITON_INTERPRET": "1"}, "--count", name)
        for i, direction in enumerate(("forward", "backward")):
            kernels = counted["kernels"][i]
            if not kernels:
                continue  # only PyTorch does it
            compulsory = counted["compulsory"][i]
            ratio, once = (sum(kernel[key] for kernel in kernels) / compulsory for key in ("moved", "once"))
            size, operations = _full_bytes(name)[i], WORK[name].operations[i]
            times = {"memory": once * size / BANDWIDTH, "arithmetic": operations / WORK[name].rate}
            bound = max(times, key=lambda key: times[key])
            rows.append(
                {
                    "core": name,
                    "direction": direction,
                    "moved / compulsory": round(ratio, 3),
                    "once a kernel / compulsory": round(once, 3),
                    "compulsory MB": round(size / 1e6, 1),
                    "GFLOP": round(operations / 1e9, 2),
                    "roofline µs": round(times[bound] * 1e6, 1),
                    "bound by": bound,
                    "kernels": {
                        f"{place} {kernel['kernel']}": [round(kernel[key] / compulsory, 3) for key in ("moved", "once")]
                        for place, kernel in enumerate(kernels, 1)
                    },
                }
            )
    return rows


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    columns = [key for key in rows[0] if key != "kernels"]
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    Console().print(table)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="only sm_90, and nothing is written")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON record")
    options.add_argument("--count", choices=WORK, help=argparse.SUPPRESS)
    options.add_argument("--traffic", action="store_true", help="count bytes alone; compile nothing")
    options.add_argument("cores", nargs="*", help="only these kernel cores")
    arguments = options.parse_args()
    if arguments.count:
        print(json.dumps(_count(arguments.count)))
        return
    names = [core.name for core in cores() if "triton" in core.backends and core.name in (arguments.cores or WORK)]
    found: list[Resources] = []
    targets = ("sm_90",) if arguments.quick else TARGETS
    console = Console(stderr=True)
    if not arguments.traffic:
        found = list(track(analyse(tuple(names), targets), "compiling", console=console, transient=True))
        _print("resources", [dataclasses.asdict(resources) for resources in found])
    traffic_rows = traffic(names)
    _print("bytes and roofline on an H100", traffic_rows)
    if found:
        spilling = [r for r in found if r.spilled]
        print(f"{len(found)} compiled configurations, {len(spilling)} with spilled registers")
    if not arguments.quick:
        path = arguments.out / "gpu_static.json"
        # the cores that were not asked for keep their rows
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        rows = {"resources": [dataclasses.asdict(resources) for resources in found], "traffic": traffic_rows}
        if arguments.traffic:
            rows["resources"] = [row for row in before.get("resources", []) if row["core"] in names]
        for key, new in rows.items():
            rows[key] = [*(row for row in before.get(key, []) if row["core"] not in names), *new]
        record = {
            "benchmark": "gpu_static",
            "when": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": versions(),
            **rows,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
