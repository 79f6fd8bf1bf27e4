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
from torch.optim import Optimizer

from .newton_schulz import STEPS, newton_schulz

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "max_dim": lambda rows, columns: max(rows, columns) ** 0.5,
}


class Muon(Optimizer):
    """Muon for 2-D parameters; embeddings, heads and vectors belong to another optimizer (see `Chain`).

    Same-shape matrices go through Newton-Schulz as one batch. The state is one momentum buffer per
    parameter.

    Raises ValueError for a parameter that is not 2-D or an unknown `scale` or `ns`, TypeError for a
    DTensor: the Newton-Schulz of a shard is not that of the matrix.
    """

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
    ):
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {sorted(SCALES)}, got {scale!r}")
        if ns not in STEPS:
            raise ValueError(f"ns must be one of {sorted(STEPS)}, got {ns!r}")
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, scale=scale, ns=ns, split_qkv=split_qkv)
        self.ns_dtype = ns_dtype
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.ndim != 2:
                raise ValueError(f"{type(self).__name__} takes 2-D parameters, got shape {tuple(p.shape)}")
            if hasattr(p, "placements"):
                raise TypeError(
                    f"{type(self).__name__} does not take DTensors: Newton-Schulz of a shard is not that of the matrix"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            momenta = [self._momentum(p) for p in params]
            lr, mu = group["lr"], group["momentum"]
            torch._foreach_lerp_(momenta, grads, 1 - mu)
            updates = torch._foreach_lerp(grads, momenta, mu)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, self._directions(params, list(updates), group), alpha=-lr)
        return loss

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]

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


def by_shape(tensors: list[Tensor], key: Callable[[torch.Size], Any] = tuple) -> Iterable[tuple[Any, list[int]]]:
    """The indices of the tensors by (a function of) their shape."""
    shapes: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        shapes.setdefault(key(tensor.shape), []).append(i)
    return shapes.items()
