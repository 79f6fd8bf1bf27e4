"""Lookahead (Zhang et al. 2019): k fast steps forward, one slow step back.

    fast <- A(fast)                            k times, then
    slow <- slow + alpha (fast - slow),  fast <- slow

What the base keeps about the past (momentum, second moments) may be maintained over a sync,
interpolated with its value at the last one, or reset.

The adaptive alpha (their Proposition 1) minimises a quadratic model of the loss between slow and fast.
With d = slow - fast, g the last inner gradient and A the base's bias-corrected second moment,

    alpha* = clip((d + A^-1 g)^T A d / d^T A d, alpha, 1) = clip(1 + g^T d / d^T A d, alpha, 1).

Syncs come after exactly k steps (the released code's first comes after k + 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim.matrix import MatrixOptimizer
from .wrapper import Alpha, Wrapper, lerp_

COUNTERS = ("step", "mu_product", "mu", "eta")  # in the states of torch's optimizers


class Lookahead(Wrapper):
    """Lookahead around `base`. x is slow, position 1 is fast; alpha above 1 extrapolates.

    alpha: of the slow step; the smallest one when adaptive. k: fast steps to a sync.
    inner_state: "maintain", "interpolate" or "reset" the base's moments (never its step counters).
    adaptive: choose alpha by Proposition 1; the base must keep a second moment, as Adam does.
    Raises ValueError for another inner_state, k below 1, or an adaptive base without a second moment.
    """

    def __init__(self, base: Optimizer, alpha: Alpha, k: int, inner_state: str = "maintain", adaptive: bool = False):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if inner_state not in ("maintain", "interpolate", "reset"):
            raise ValueError(f"inner_state must be maintain, interpolate or reset, got {inner_state!r}")
        super().__init__(base, alpha)
        self.k, self.inner_state, self.adaptive = k, inner_state, adaptive
        self._moments: dict[Tensor, dict[str, Tensor]] = {}  # the base's at the last sync, if they are interpolated

    def _weight(self, position: float) -> float:
        return position

    def _after(self, parameters: list[Tensor]) -> None:
        if self.taken % self.k:
            return
        slow, fast = self._anchor, self._wide(parameters)
        if self.adaptive:
            alpha = self._best_alpha(parameters, slow, fast)
            move = torch._foreach_mul(torch._foreach_sub(fast, slow), alpha)
            torch._foreach_add_(slow, move)
        else:
            lerp_(slow, fast, self.alpha_t)
        torch._foreach_copy_(parameters, slow)
        self._sync_moments()

    def _best_alpha(self, parameters: list[Tensor], slow: list[Tensor], fast: list[Tensor]) -> Tensor:
        """alpha* as a tensor without dimensions, so that no device is waited for."""
        slope = torch.zeros((), device=parameters[0].device, dtype=torch.float64)
        curvature = torch.zeros_like(slope)
        displacement = dict(zip(parameters, torch._foreach_sub(fast, slow), strict=True))  # that is -d
        for p, state, group in inner_states(self.base):
            if p.grad is None:
                continue
            if "exp_avg_sq" not in state:
                raise ValueError("an adaptive alpha needs a base that keeps a second moment (exp_avg_sq), as Adam does")
            on_device = isinstance(state["step"], Tensor) and state["step"].device == p.device  # as a fused Adam's
            correction = 1 - group["betas"][1] ** (state["step"] if on_device else float(state["step"]))
            slope -= (p.grad * displacement[p]).sum()
            curvature += (state["exp_avg_sq"] / correction * displacement[p].square()).sum()
        alpha = 1 + slope / curvature
        return torch.where(curvature > 0, alpha, torch.ones_like(alpha)).clamp(self.alpha_t, 1).to(slow[0].dtype)

    def _sync_moments(self) -> None:
        if self.inner_state == "maintain":
            return
        held = [(p, moments(p, state)) for p, state, _ in inner_states(self.base)]
        now = [value for _, values in held for value in values.values()]
        if not now:  # a base without memory
            return
        if self.inner_state == "reset":
            torch._foreach_zero_(now)
            return
        if any(name.startswith("rotated") for _, values in held for name in values):
            raise ValueError("SOAP's moments turn with its bases and cannot be interpolated: maintain or reset them")
        # there were none at the start
        before = [self._moments.get(p, {}).get(k, torch.zeros_like(v)) for p, m in held for k, v in m.items()]
        torch._foreach_lerp_(now, before, 1 - self.alpha_t)
        self._moments = {p: {k: v.clone() for k, v in values.items()} for p, values in held if values}

    def state_dict(self) -> dict[str, Any]:
        index = {p: i for i, p in enumerate(self._parameters())}
        complete: dict[Tensor, dict[str, Tensor]] = {}
        for member in members(self.base):  # one that shares its state over ranks knows how to complete it
            own = {p: self._moments[p] for group in member.param_groups for p in group["params"] if p in self._moments}
            complete |= member.gather(own) if isinstance(member, MatrixOptimizer) else own
        return {**super().state_dict(), "moments": {index[p]: values for p, values in complete.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        held = {p for p, state, _ in inner_states(self.base) if state}
        self._moments = {
            p: {k: v.to(p.device, copy=True) for k, v in state_dict["moments"][i].items()}
            for i, p in enumerate(self._parameters())
            if i in state_dict["moments"] and p in held
        }


def moments(p: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    """What a state remembers per weight or per row: tensors of as many dimensions as the parameter."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim == p.ndim and k not in COUNTERS}


def members(optimizer: Any) -> Iterator[Optimizer]:
    """The optimizers that take the steps, through chains and wrappers."""
    if hasattr(optimizer, "optimizers"):
        for member in optimizer.optimizers:
            yield from members(member)
    elif isinstance(optimizer, Wrapper):
        yield from members(optimizer.base)
    else:
        yield optimizer


def inner_states(optimizer: Any) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
    """(parameter, state, group) of each parameter of a base; the state is empty on ranks that do not own it."""
    for member in members(optimizer):
        for group in member.param_groups:
            for p in group["params"]:
                yield p, member.state.get(p, {}), group
