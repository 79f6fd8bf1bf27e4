"""Aurora: Muon whose orthogonal factor has rows of (nearly) equal norm (tilde-research 2026).

A semi-orthogonal m x n matrix with m > n has rows of squared norm n / m on average, but single rows
may vanish. Aurora scales the rows before taking the polar factor, such that they come out alike. With U
the Nesterov momentum of Muon (transposed if wide) and tau = n / m:

    D_i = 1 / ||U_i||
    P   = polar(D U);   D_i <- D_i (tau / ||P_i||^2)^exponent       repeated; the last P is the update
    W   <- (1 - lr wd) W - lr sqrt(max(1, rows / columns)) P

A square matrix is Muon's: all rows of an orthogonal matrix have norm 1. polar is Newton-Schulz, 12 steps
of (2, -1.5, 0.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .matrix import MatrixOptimizer
from .muon import Muon
from .newton_schulz import frobenius, newton_schulz
from .ranges import COUNT, NUMBER

EPS = 1e-7


class Aurora(Muon):
    """Aurora for 2-D parameters; state, sharing and errors are Muon's.

    iterations: polar factors per step. exponent: how far each one corrects the rows.
    """

    RANGES = Muon.RANGES | {"iterations": COUNT, "exponent": NUMBER}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 2,
        exponent: float = 0.5,
        ns_dtype: torch.dtype | None = None,
        group: ProcessGroup | None = None,
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations, exponent=exponent)
        self.ns_dtype = ns_dtype
        MatrixOptimizer.__init__(self, params, defaults | dict(scale="spectral", ns="polar12", split_qkv=False), group)

    def _orthogonalize(self, batch: Tensor, group: dict[str, Any]) -> Tensor:
        if batch.size(-2) == batch.size(-1):
            return super()._orthogonalize(batch, group)
        return even_polar(batch, group["iterations"], group["exponent"], self.ns_dtype)


def even_polar(
    matrices: Tensor,
    iterations: int,
    exponent: float,
    dtype: torch.dtype | None = None,
    norm: Callable[[Tensor], Tensor] = frobenius,
) -> Tensor:
    """The polar factors of a batch of matrices, rescaled such that the rows of their tall view come out alike."""
    tall = matrices.size(-2) > matrices.size(-1)
    u = matrices if tall else matrices.mT
    tau = u.size(-1) / u.size(-2)
    d = 1 / u.norm(dim=-1, keepdim=True).clamp_min(EPS)
    p = newton_schulz(d * u, "polar12", dtype, norm)
    for _ in range(iterations - 1):
        d = d * (tau / p.float().square().sum(-1, keepdim=True).clamp_min(EPS**2)) ** exponent
        d = d.clamp_max(1e30)  # a row of zeros would go on to infinity
        p = newton_schulz(d * u, "polar12", dtype, norm)
    return p if tall else p.mT
