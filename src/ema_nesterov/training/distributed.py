"""The ranks of a run: one process, or all that torchrun started."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, one_line

PATIENCE = timedelta(minutes=10)  # with a rank that no longer answers; above the longest that one keeps others waiting


@dataclass(frozen=True)
class Ranks:
    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks, to share an optimizer's work and state; None when there is one."""
        return dist.group.WORLD if self.size > 1 else None

    @property
    def hardware(self) -> str:
        """Such as 8 x NVIDIA H200."""
        cpu = self.device.type == "cpu"
        return f"{self.size} x {cpu_name() if cpu else torch.cuda.get_device_name(self.device)}"

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: object) -> list:
        """The values of all ranks, on all ranks."""
        values: list = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def world_size() -> int:
    """The number of ranks that torchrun started, or 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def cpu_name() -> str:
    """As Linux tells it, or the kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def choose_device(wanted: str) -> torch.device:
    """The device of this process. Raises ConfigError when it wants a GPU and there is none."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise ConfigError("trainer.device=cuda, but no GPU was found; type trainer.device=cpu")
    if local >= gpus:
        raise ConfigError(f"more ranks than the {gpus} GPUs of this node; type --nproc-per-node={gpus}")
    return torch.device("cuda", local)


def lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL error")
    return isinstance(error, dist.DistBackendError) or any(text in str(error) for text in texts)


def end_with_torchrun() -> None:
    """torchrun, once killed, can end its workers no more: each looks after that itself."""
    torchrun = os.getppid()

    def follow() -> None:
        while os.getppid() == torchrun:
            time.sleep(1)
        os.write(2, b"error: torchrun was killed; type the same command to go on\n")
        os._exit(1)

    Thread(target=follow, daemon=True).start()


@contextmanager
def ranks(wanted_device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun describes, if any, and leave it at the end."""
    device = choose_device(wanted_device)
    size = world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield Ranks(0, 1, device)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_torchrun()
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, device_id=device if backend == "nccl" else None, timeout=PATIENCE)
    except (dist.DistError, ValueError) as e:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(f"the ranks cannot meet at {place} ({one_line(e)}); start them with torchrun") from None
    try:
        yield Ranks(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()
