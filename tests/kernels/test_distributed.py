"""Two processes on the CPU (gloo), each with a piece of the sequence, against one process with the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn  # type: ignore[attr-defined]

from mlreviews_kernels.distributed import distributed_linear_scan, distributed_ssd
from mlreviews_kernels.linear_scan import linear_scan
from mlreviews_kernels.ssd import ssd

Values = dict[str, Tensor]
CUTS = {2: (0, 5, 12), 3: (0, 1, 9, 12)}  # pieces of unequal lengths
TOKENS = ("a", "b", "x", "log_a", "B", "C")


def _values(name: str) -> Values:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if name == "linear_scan":
        a = normal(2, 12, 3)
        a[0, 7, 1] = 0.0
        return {"a": a, "b": normal(2, 12, 3), "initial_state": normal(2, 3)}
    log_a = -normal(2, 12, 4).square()
    log_a[1, 6, 2] = -torch.inf
    tokens = {"x": normal(2, 12, 4, 3), "log_a": log_a, "B": normal(2, 12, 2, 5), "C": normal(2, 12, 2, 5)}
    return {**tokens, "D": normal(4), "initial_state": normal(2, 4, 5, 3)}


WHOLE = {"linear_scan": linear_scan, "ssd": ssd}
SPLIT = {"linear_scan": distributed_linear_scan, "ssd": distributed_ssd}


def _loss(out: Tensor, final: Tensor, first: int) -> Tensor:
    """Different for each position; the final state's part counts on the last rank only (its final is the whole's)."""
    time = torch.arange(first, first + out.shape[1], dtype=out.dtype) + 1.0
    return (out.sin() * time.view(1, -1, *[1] * (out.ndim - 2))).sum() + final.square().sum()


def _work(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    start, stop = CUTS[world][rank], CUTS[world][rank + 1]
    found: dict[str, Any] = {}
    for name, function in SPLIT.items():
        mine = {k: (v[:, start:stop] if k in TOKENS else v).clone() for k, v in _values(name).items()}
        leaves = {k: v.requires_grad_() for k, v in mine.items() if k != "initial_state" or rank == 0}
        out, final = function(**leaves)
        _loss(out, final if rank == world - 1 else final * 0, start).backward()
        found[name] = {"out": out.detach(), "final": final.detach(), **{k: v.grad for k, v in leaves.items()}}
    if rank:
        with pytest.raises(ValueError, match="initial_state: expected None on rank"):
            distributed_linear_scan(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))
    torch.save(found, Path(folder) / f"{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_pieces_on_several_ranks_are_the_whole(world: int, tmp_path: Path) -> None:
    spawn(_work, args=(world, str(tmp_path)), nprocs=world)
    pieces = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
    for name, function in WHOLE.items():
        leaves = {k: v.requires_grad_() for k, v in _values(name).items()}
        out, final = function(**leaves)
        _loss(out, final, 0).backward()
        mine = [piece[name] for piece in pieces]
        torch.testing.assert_close(torch.cat([piece["out"] for piece in mine], 1), out.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mine[-1]["final"], final.detach(), rtol=1e-10, atol=1e-10)
        for key, leaf in leaves.items():
            if key in TOKENS:
                grad = torch.cat([piece[key] for piece in mine], 1)
            elif key == "D":  # a parameter of all ranks: gradients are summed, as in data-parallel training
                grad = torch.stack([piece[key] for piece in mine]).sum(0)
            else:
                grad = mine[0][key]
            torch.testing.assert_close(grad, leaf.grad, rtol=1e-9, atol=1e-9, msg=f"{name}: gradient of {key}")
