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

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .muon import by_shape

MOMENTS = ("exp_avg", "exp_avg_sq")  # M' and V, in the parameter's shape; the rest is (blocks, side, side)


class SOAP(Optimizer):
    """SOAP for parameters of one or two dimensions; same-shape matrices are worked on as one batch.

    split_qkv: a matrix of three times as many rows as columns is three square ones.
    Raises ValueError for a parameter of more dimensions, TypeError for a DTensor.
    """

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
    ):
        if precondition_frequency < 1:
            raise ValueError(f"precondition_frequency must be at least 1, got {precondition_frequency}")
        defaults: dict[str, Any] = dict(lr=lr, betas=betas, precondition_frequency=precondition_frequency)
        defaults |= dict(weight_decay=weight_decay, split_qkv=split_qkv, eps=eps, max_dim=max_dim)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not 1 <= p.ndim <= 2:
                raise ValueError(f"SOAP takes parameters of one or two dimensions, got shape {tuple(p.shape)}")
            if hasattr(p, "placements"):
                raise TypeError("SOAP does not take DTensors: the eigenbasis of a shard is not that of the matrix")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for _, members in by_shape(params):
                ages: dict[int, list[Tensor]] = {}  # of one age they share a bias correction and a refresh
                for i in members:
                    ages.setdefault(self.state[params[i]].get("step", -1), []).append(params[i])
                for age, same in ages.items():
                    (self._start if age < 0 else self._update)(same, group)
        return loss

    def _start(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """The first call: covariances of this gradient and their eigenbases, no update."""
        g = self._gradients(params, group)
        beta2 = group["betas"][1]
        started: dict[str, Tensor] = {"exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
        for side, outer in self._covariances(g, params[0], group).items():
            started[side] = (1 - beta2) * outer
            identity = torch.eye(outer.size(-1), dtype=outer.dtype, device=outer.device)
            started[f"{side}_basis"] = torch.linalg.eigh(started[side] + 1e-30 * identity).eigenvectors.flip(-1)
        for i, p in enumerate(params):
            self.state[p]["step"] = 0
            for name, batch in started.items():
                part = batch.chunk(len(params))[i].clone()
                self.state[p][name] = part.view(p.shape) if name in MOMENTS else part

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        g = self._gradients(params, group)
        states = [self.state[p] for p in params]
        s = {
            name: torch.cat(
                [state[name].view(-1, *g.shape[1:]) if name in MOMENTS else state[name] for state in states]
            )
            for name in states[0]
            if name != "step"
        }
        left, right = s.get("rows_basis"), s.get("columns_basis")
        (beta1, beta2), lr = group["betas"], group["lr"]
        t = states[0]["step"] + 1

        turned = rotate(g, left, right)
        s["exp_avg"].lerp_(turned, 1 - beta1)
        s["exp_avg_sq"].lerp_(turned.square(), 1 - beta2)
        update = rotate_back(s["exp_avg"] / (s["exp_avg_sq"].sqrt() + group["eps"]), left, right)
        step_size = lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        updates = [u.reshape(p.shape).to(p.dtype) for u, p in zip(update.chunk(len(params)), params, strict=True)]
        torch._foreach_add_(params, updates, alpha=-step_size)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])

        for side, outer in self._covariances(g, params[0], group).items():
            s[side].lerp_(outer, 1 - beta2)
        if t % group["precondition_frequency"] == 0:
            self._turn_bases(s)
        for name, batch in s.items():
            held = [state[name] for state in states]
            torch._foreach_copy_(held, [b.view_as(h) for b, h in zip(batch.chunk(len(params)), held, strict=True)])
        for state in states:
            state["step"] = t

    def _turn_bases(self, s: dict[str, Tensor]) -> None:
        """One power step of each basis; V is sorted with it and M' turned into it."""
        momentum = rotate_back(s["exp_avg"], s.get("rows_basis"), s.get("columns_basis"))
        for side, dim in (("rows", -2), ("columns", -1)):
            if side not in s:
                continue
            basis = s[f"{side}_basis"]
            order = (basis * (s[side] @ basis)).sum(-2).argsort(dim=-1, descending=True)  # diag(Q^T L Q)
            along = order.unsqueeze(-1 if dim == -2 else -2)
            s["exp_avg_sq"] = s["exp_avg_sq"].gather(dim, along.expand_as(s["exp_avg_sq"]))
            sorted_basis = basis.gather(-1, order.unsqueeze(-2).expand_as(basis))
            s[f"{side}_basis"] = torch.linalg.qr(s[side] @ sorted_basis).Q
        s["exp_avg"] = rotate(momentum, s.get("rows_basis"), s.get("columns_basis"))

    def _gradients(self, params: list[Tensor], group: dict[str, Any]) -> Tensor:
        """The gradients of same-shape parameters as one batch of blocks (n, rows, columns), float32 at least."""
        rows, columns = params[0].shape if params[0].ndim == 2 else (1, params[0].numel())
        if group["split_qkv"] and rows == 3 * columns:
            rows = columns
        g = torch.cat([p.grad.reshape(-1, rows, columns) for p in params if p.grad is not None])
        return g if g.dtype == torch.float64 else g.float()

    def _covariances(self, g: Tensor, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """G G^T and G^T G for the sides that are preconditioned."""
        outers: dict[str, Tensor] = {}
        if p.ndim == 2 and g.size(-2) <= group["max_dim"]:
            outers["rows"] = g @ g.mT
        if p.ndim == 2 and g.size(-1) <= group["max_dim"]:
            outers["columns"] = g.mT @ g
        return outers


def rotate(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Q_L^T X Q_R; None is the identity."""
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def rotate_back(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Q_L X Q_R^T; None is the identity."""
    x = x if left is None else left @ x
    return x if right is None else x @ right.mT
