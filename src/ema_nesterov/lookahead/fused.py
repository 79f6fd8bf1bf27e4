"""The two interpolations of EMA-Nesterov in one pass over memory:

    e <- e + a (x - e)        x <- x + b (e - x)

Each reads and writes every weight; one after the other they move 6 tensors through memory, together 4.
On a GPU one compiled kernel does both. On a CPU the weights are worked on in pieces that stay in its
cache from the first interpolation to the second.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 18  # elements: two float32 pieces are 2 MiB


def average_and_extrapolate_(averages: list[Tensor], points: list[Tensor], a: float, b: float) -> None:
    """e <- e + a (x - e), then x <- x + b (e - x), in place; x may be of lower precision than e."""
    if points[0].device.type == "cpu" or find_spec("triton") is None:
        for e, x in zip(averages, points, strict=True):
            _in_pieces(e, x, a, b)
        return
    # numbers would be compiled in, and compiled anew whenever a schedule moves them
    weights = [torch.tensor(weight, dtype=averages[0].dtype) for weight in (a, b)]
    _compiled()(averages, points, *weights)


def _in_pieces(e: Tensor, x: Tensor, a: float, b: float) -> None:
    flat = e.is_contiguous() and x.is_contiguous()
    pieces = zip(e.view(-1).split(PIECE), x.view(-1).split(PIECE), strict=True) if flat else [(e, x)]
    for e_piece, x_piece in pieces:
        wide = x_piece.to(e.dtype)
        e_piece.lerp_(wide, a)
        if wide is x_piece:
            x_piece.lerp_(e_piece, b)
        else:
            x_piece.copy_(wide.lerp_(e_piece, b))


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
