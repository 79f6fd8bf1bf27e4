"""Work done by several real processes that gloo joins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns on each of `size` processes of one gloo group."""
    mp.start_processes(_enter, (size, folder, work), nprocs=size, start_method="fork")
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


def _enter(rank: int, size: int, folder: Path, work: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{size}.init", rank=rank, world_size=size)
    try:
        torch.save(work(rank), folder / f"{size}-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None
