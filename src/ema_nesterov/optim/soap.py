"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's preconditioner (Vyas et al. 2024).

For a matrix W with gradient G, covariances L and R of its rows and columns, and their eigenbases Q_L, Q_R:

    G' = Q_L^T G Q_R
    M' <- beta1 M' + (1 - beta1) G'
    V  <- beta2 V + (1 - beta2) G'^2
    W  <- W - lr sqrt(1 - beta2^t) / (1 - beta1^t) Q_L [M' / (sqrt(V) + eps)] Q_R^T,  then W <- W - lr wd W
    L  <- beta2 L + (1 - beta2) G G^T,  R <- beta2 R + (1 - beta2) G^T G

and every `precondition_frequency` steps the bases take one power step each: sort by the estimated
eigenvalues diag(Q^T L Q), V with them, then Q <- qr(L Q), and M' turns into the new basis.

The first call only starts L, R and, by eigh, the bases: W does not move. A side longer than `max_dim` is
left as it is, and so are vectors: where neither side turns, SOAP is Adam.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .matrix import MatrixOptimizer, gradients
from .ranges import AT_LEAST_0, COUNT, FRACTIONS, SWITCH

SIDES = {"rows": -2, "columns": -1}


class SOAP(MatrixOptimizer):
    """SOAP for parameters of one or two dimensions; same-shape matrices are worked on as one batch.

    The state is M' and V in the parameter's shape, and the covariances and bases as (blocks, side, side).
    split_qkv: a matrix of three times as many rows as columns is three square ones. group: shares work
    and state over ranks, see `MatrixOptimizer`.
    Raises ValueError for a setting outside of `RANGES` or a parameter of more dimensions, TypeError for a DTensor.
    """

    DIMENSIONS = (1, 2)
    ENTRIES = ("step", "rotated_avg", "rotated_avg_sq")
    INTERPOLATES = False  # its moments lie in bases that turn
    RANGES = MatrixOptimizer.RANGES | {
        "betas": FRACTIONS,
        "precondition_frequency": COUNT,
        "weight_decay": AT_LEAST_0,
        "split_qkv": SWITCH,
        "eps": AT_LEAST_0,
        "max_dim": COUNT,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.95, 0.95),
        precondition_frequency: int = 10,
        weight_decay: float = 0.0,
        split_qkv: bool = False,
        eps: float = 1e-8,
        max_dim: int = 10_000,
        group: ProcessGroup | None = None,
    ):
        defaults: dict[str, Any] = dict(lr=lr, betas=betas, precondition_frequency=precondition_frequency)
        defaults |= dict(weight_decay=weight_decay, split_qkv=split_qkv, eps=eps, max_dim=max_dim)
        super().__init__(params, defaults, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for alike in self._alike(params):
            g, age = self._gradients(alike, group), self.state[alike[0]].get("step")
            if age is None:
                self._start(alike, g, group)
            else:
                self._move(alike, g, age + 1, group)

    def _start(self, params: list[Tensor], g: Tensor, group: dict[str, Any]) -> None:
        """The first call: covariances of this gradient and their eigenbases, no update."""
        beta2 = group["betas"][1]
        started: dict[str, Tensor] = {}
        for side, outer in self._covariances(g, params[0], group).items():
            started[side] = (1 - beta2) * outer
            started[f"{side}_basis"] = eigenbasis(started[side])
        for i, p in enumerate(params):
            self.state[p] = {name: batch.chunk(len(params))[i] for name, batch in started.items()}
            self.state[p] |= {"step": 0, "rotated_avg": g.new_zeros(p.shape), "rotated_avg_sq": g.new_zeros(p.shape)}

    def _move(self, params: list[Tensor], g: Tensor, t: int, group: dict[str, Any]) -> None:
        s = self._batch(params, *g.shape[1:])
        left, right = s.get("rows_basis"), s.get("columns_basis")
        (beta1, beta2), lr = group["betas"], group["lr"]

        turned = rotate(g, left, right)
        s["rotated_avg"].lerp_(turned, 1 - beta1)
        s["rotated_avg_sq"].lerp_(turned.square_(), 1 - beta2)
        update = rotate_back(s["rotated_avg"] / (s["rotated_avg_sq"].sqrt() + group["eps"]), left, right)
        step_size = lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        updates = [u.reshape(p.shape) for u, p in zip(update.chunk(len(params)), params, strict=True)]
        torch._foreach_add_(params, updates, alpha=-step_size)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])

        for side, outer in self._covariances(g, params[0], group).items():
            s[side].lerp_(outer, 1 - beta2)
        if t % group["precondition_frequency"] == 0:
            momentum = rotate_back(s["rotated_avg"], left, right)
            turn_bases(s, "rotated_avg_sq")
            s["rotated_avg"].copy_(rotate(momentum, left, right))
        for p in params:
            self.state[p]["step"] = t

    def _gradients(self, params: list[Tensor], group: dict[str, Any]) -> Tensor:
        """The gradients of same-shape parameters as one batch of blocks (n, rows, columns)."""
        rows, columns = params[0].shape if params[0].ndim == 2 else (1, params[0].numel())
        if group["split_qkv"] and rows == 3 * columns:
            rows = columns
        return torch.cat([g.reshape(-1, rows, columns) for g in gradients(params)])

    def _covariances(self, g: Tensor, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """G G^T and G^T G for the sides that are preconditioned."""
        outers: dict[str, Tensor] = {}
        if p.ndim == 2 and g.size(-2) <= group["max_dim"]:
            outers["rows"] = g @ g.mT
        if p.ndim == 2 and g.size(-1) <= group["max_dim"]:
            outers["columns"] = g.mT @ g
        return outers


def eigenbasis(covariances: Tensor) -> Tensor:
    """The eigenvectors of a batch of covariances, by falling eigenvalue."""
    regular = covariances + 1e-30 * torch.eye(covariances.size(-1), dtype=covariances.dtype, device=covariances.device)
    try:
        basis = torch.linalg.eigh(regular).eigenvectors
    except torch.linalg.LinAlgError:  # float32 does not always converge
        basis = torch.linalg.eigh(regular.double()).eigenvectors.to(regular.dtype)
    return basis.flip(-1)


def turn_bases(s: dict[str, Tensor], second_moment: str) -> None:
    """One power step of each basis in a batch of states, in place; the second moment is sorted with it."""
    for side, dim in SIDES.items():
        if side not in s:
            continue
        basis = s[f"{side}_basis"]
        product = s[side] @ basis
        order = (basis * product).sum(-2).argsort(dim=-1, descending=True)  # diag(Q^T L Q)
        along = order.unsqueeze(-1 if dim == -2 else -2)
        s[second_moment].copy_(s[second_moment].gather(dim, along.expand_as(s[second_moment])))
        basis.copy_(torch.linalg.qr(product.gather(-1, order.unsqueeze(-2).expand_as(product))).Q)


def rotate(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Q_L^T X Q_R; None is the identity."""
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def rotate_back(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Q_L X Q_R^T; None is the identity."""
    x = x if left is None else left @ x
    return x if right is None else x @ right.mT
