"""How fast this machine copies and multiplies, and what that makes of an optimizer's step; used by bench.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ema_nesterov.optim.newton_schulz import STEPS


@dataclass
class Machine:
    copy: float  # bytes per ms: read and written
    matmul: dict[torch.dtype, float]  # operations per ms

    def traffic(self, tensors: float, numel: int) -> float:
        """ms to move that many float32 tensors of the weights' size through memory."""
        return 4 * tensors * numel / self.copy


def measure_machine(device: torch.device) -> Machine:
    big = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    other = torch.ones_like(big)
    copy = min(timed(lambda: big.copy_(other), 3, device) for _ in range(5))
    side = 8192 if device.type == "cuda" else 1536
    rates = {}
    for dtype in {ns_dtype(device), torch.float32}:
        a = torch.randn(side, side, device=device).to(dtype)
        rates[dtype] = 2 * side**3 / min(timed(partial(torch.matmul, a, a), 3, device) for _ in range(5))
    return Machine(2 * 4 * big.numel() / copy, rates)


def ns_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def ns_operations(shapes: list[torch.Size], method: str, split_qkv: bool = False) -> float:
    """Operations of Newton-Schulz on matrices of these shapes."""
    total = 0.0
    for rows, columns in shapes:
        blocks, rows = (3, columns) if split_qkv and rows == 3 * columns else (1, rows)
        short, long = sorted((rows, columns))
        total += blocks * len(STEPS[method]) * (4 * short**2 * long + 2 * short**3)
    return total


def soap_operations(shapes: list[torch.Size], frequency: int, max_dim: int, split_qkv: bool) -> float:
    """Operations of a SOAP step on average: covariances, two rotations, and the bases' power step and QR."""
    total = 0.0
    for shape in shapes:
        if len(shape) < 2:
            continue
        rows, columns = shape
        blocks, rows = (3, columns) if split_qkv and rows == 3 * columns else (1, rows)
        for side, other in ((rows, columns), (columns, rows)):
            if side <= max_dim:
                total += blocks * (6 * side**2 * other + (2 + 8 / 3) * side**3 / frequency)
    return total


def timed(work: Callable[[], Any], calls: int, device: torch.device) -> float:
    """ms per call; over ranks, the slowest one's."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    ms = torch.tensor(1000 * (time.perf_counter() - begin) / calls, device=device)
    if dist.is_initialized():
        dist.all_reduce(ms, dist.ReduceOp.MAX)
    return float(ms)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()
