"""The two interpolations of EMA-Nesterov in one pass over memory:

    e <- e + a (x - e)        x <- x + b (e - x)

Each reads and writes every weight; one after the other they move 6 tensors through memory, together 4.
On a GPU one compiled kernel does both. On a CPU they go tensor by tensor, so that the second finds in the
cache what the first has left there, where it fits.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def average_and_extrapolate_(averages: list[Tensor], points: list[Tensor], a: float, b: float) -> None:
    """e <- e + a (x - e), then x <- x + b (e - x), in place; x may be of lower precision than e."""
    if points[0].device.type == "cpu" or not _has_triton():
        for e, x in zip(averages, points, strict=True):
            wide = x.to(e.dtype)
            e.lerp_(wide, a)
            wide.lerp_(e, b)
            if wide is not x:
                x.copy_(wide)
        return
    # numbers would be compiled in, and compiled anew whenever a schedule moves them
    weights = [torch.tensor(weight, dtype=averages[0].dtype) for weight in (a, b)]
    _compiled()(averages, points, *weights)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _compiled() -> Any:
    return torch.compile(one_pass_, dynamic=False)


def one_pass_(averages: list[Tensor], points: list[Tensor], a: Tensor, b: Tensor) -> None:
    """What is compiled for a GPU; the weights are tensors without dimensions."""
    wide = [x.to(e.dtype) for x, e in zip(points, averages, strict=True)]
    e = torch._foreach_add(averages, torch._foreach_mul(torch._foreach_sub(wide, averages), a))
    x = torch._foreach_add(wide, torch._foreach_mul(torch._foreach_sub(e, wide), b))
    torch._foreach_copy_(averages, e)
    torch._foreach_copy_(points, x)
