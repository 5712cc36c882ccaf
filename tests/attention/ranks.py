"""Threads in place of processes: distributed code tested inside one process, quickly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]


class Ranks:
    """Stands for `torch.distributed` in the modules under test; each thread is a rank.

    Attributes:
        volume: elements that rank 0 has handed to a reduction.
    """

    ReduceOp = dist.ReduceOp
    ProcessGroup = dist.ProcessGroup

    def __init__(self, world: int) -> None:
        self.world, self.volume = world, 0
        self._barrier, self._mine = threading.Barrier(world, timeout=60), threading.local()
        self._slots: list[Tensor] = [torch.empty(0)] * world

    def get_rank(self, group: object = None) -> int:
        return self._mine.rank

    def get_world_size(self, group: object = None) -> int:
        return self.world

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: object = None) -> None:
        assert tensor.is_contiguous()
        self._slots[self.get_rank()] = tensor.clone()
        self.volume += tensor.numel() * (self.get_rank() == 0)
        self._barrier.wait()
        stacked = torch.stack(self._slots)
        self._barrier.wait()
        tensor.copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0))

    def run(
        self, monkeypatch: pytest.MonkeyPatch, modules: Sequence[ModuleType], work: Callable[[int], Any]
    ) -> list[Any]:
        """What ``work(rank)`` returns on each rank, where the modules' ``dist`` is this."""
        for module in modules:
            monkeypatch.setattr(module, "dist", self)

        def start(rank: int) -> Any:
            self._mine.rank = rank
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.world) as pool:
            futures = [pool.submit(start, rank) for rank in range(self.world)]
        errors = [error for future in futures if (error := future.exception())]
        if errors:  # the others' barriers broke because of the first
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]
