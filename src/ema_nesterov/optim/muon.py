"""Muon: momentum, orthogonalized (Jordan et al. 2024).

For a matrix W with gradient G and momentum M:

    M <- mu M + (1 - mu) G
    O  = NewtonSchulz((1 - mu) G + mu M)                Nesterov's form of the momentum
    W <- (1 - lr wd) W - lr s O

with the scale s = sqrt(max(1, rows / columns)) ("spectral") or sqrt(max(rows, columns)) ("max_dim").
The variants of the paper's experiments:

    nanogpt   scale="max_dim", split_qkv=True    a fused QKV matrix is three matrices
    llama     scale="spectral"
    track3    scale="spectral", ns="polar12"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .matrix import MatrixOptimizer, by_shape, gradients
from .newton_schulz import STEPS, newton_schulz
from .ranges import AT_LEAST_0, FRACTION, SWITCH, one_of

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "max_dim": lambda rows, columns: max(rows, columns) ** 0.5,
}


class Muon(MatrixOptimizer):
    """Muon for 2-D parameters; embeddings, heads and vectors belong to another optimizer (see `Chain`).

    Same-shape matrices go through Newton-Schulz as one batch. The state is one momentum buffer per
    parameter. ns_dtype: of the products, see `newton_schulz`. group: shares work and state over ranks,
    see `MatrixOptimizer`, whose errors are Muon's too.

    Raises ValueError for a setting outside of `RANGES`, in the constructor or in a group.
    """

    RANGES = MatrixOptimizer.RANGES | {
        "momentum": FRACTION,
        "weight_decay": AT_LEAST_0,
        "scale": one_of(SCALES),
        "ns": one_of(STEPS),
        "split_qkv": SWITCH,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        scale: str = "spectral",
        ns: str = "quintic5",
        split_qkv: bool = False,
        ns_dtype: torch.dtype | None = None,
        group: ProcessGroup | None = None,
    ):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, scale=scale, ns=ns, split_qkv=split_qkv)
        self.ns_dtype = ns_dtype
        super().__init__(params, defaults, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, mu = group["lr"], group["momentum"]
        grads = gradients(params)
        momenta = [self._momentum(p, g) for p, g in zip(params, grads, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - mu)
        updates = list(torch._foreach_lerp(grads, momenta, mu))
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, self._directions(params, updates, group), alpha=-lr)

    def _momentum(self, p: Tensor, gradient: Tensor) -> Tensor:
        if not self.state.get(p):
            self.state[p] = {"momentum": gradient.new_zeros(p.shape)}
        return self.state[p]["momentum"]

    def _directions(self, params: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """s O for each update, all blocks of a shape as one batch."""

        def block(shape: torch.Size) -> tuple[int, int]:
            rows, columns = shape
            return (columns, columns) if group["split_qkv"] and rows == 3 * columns else (rows, columns)

        directions = list(updates)
        for (rows, columns), members in by_shape(updates, block):
            blocks = [updates[i].reshape(-1, rows, columns) for i in members]
            batch = self._orthogonalize(torch.cat(blocks), group).to(blocks[0].dtype)
            batch *= SCALES[group["scale"]](rows, columns)
            for i, part in zip(members, batch.split([b.size(0) for b in blocks]), strict=True):
                directions[i] = part.reshape(updates[i].shape)
        return directions

    def _orthogonalize(self, batch: Tensor, group: dict[str, Any]) -> Tensor:
        """O for a batch of matrices (n, rows, columns)."""
        return newton_schulz(batch, group["ns"], self.ns_dtype)
