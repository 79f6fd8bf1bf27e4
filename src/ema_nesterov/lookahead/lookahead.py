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

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..optim.contract import Composite, State, local, parameters_of
from ..optim.matrix import MatrixOptimizer
from ..optim.ranges import AT_LEAST_0, COUNT, SWITCH, one_of, require
from .wrapper import Alpha, Moved, Wrapper, lerp_

COUNTERS = ("step", "mu_product", "mu", "eta")  # in the states of torch's optimizers
SYNCED = "synced."  # a moment of the base as it was at the last sync


class Lookahead(Wrapper):
    """Lookahead around `base`. x is slow, position 1 is fast; alpha above 1 extrapolates.

    alpha: of the slow step, at least 0; the smallest one when adaptive. k: fast steps to a sync.
    inner_state: "maintain", "interpolate" or "reset" the base's moments (never its step counters).
    adaptive: choose alpha by Proposition 1; the base must keep a second moment, as Adam does.

    Raises ValueError for a setting out of range, a base whose moments cannot be reached or interpolated, or, in the
    step of the first sync, an adaptive base without a second moment.
    """

    NAME = "Lookahead"
    RANGES: ClassVar = {"k": COUNT, "inner_state": one_of(("maintain", "interpolate", "reset")), "adaptive": SWITCH}

    def __init__(self, base: Optimizer, alpha: Alpha, k: int, inner_state: str = "maintain", adaptive: bool = False):
        require(self.RANGES, locals())
        self.k, self.inner_state, self.adaptive = k, inner_state, adaptive
        if inner_state != "maintain" and isinstance(base, Optimizer):
            for member in members(base):
                _require_open(member, inner_state)
        super().__init__(base, alpha)

    def _require_alpha(self, alpha: float) -> None:
        require({"alpha": AT_LEAST_0}, {"alpha": alpha})

    def _weight(self, position: float, alpha: float) -> float:
        return position

    def _gradient_position(self, alpha: float) -> float:
        return 1.0

    def _before(self, moved: Moved) -> None:
        if self.adaptive and any(hasattr(p, "placements") for p in moved.parameters):
            raise TypeError("an adaptive alpha is a sum over whole parameters: it does not take DTensors")
        if self.inner_state != "maintain" and self.taken:
            for member in members(self.base):
                if not any(member.state.values()) and not isinstance(member, SGD):
                    raise ValueError(
                        f"{type(member).__name__} keeps no state that Lookahead can reach: inner_state must be maintain"
                    )

    def _after(self, moved: Moved) -> None:
        if any(moved.new):
            self._start_moments({p for p, new in zip(moved.parameters, moved.new, strict=True) if new})
        if self.taken % self.k:
            return
        slow, fast = moved.anchors, moved.wide()
        if self.adaptive:
            alpha = self._best_alpha(moved.parameters, slow, fast)
            torch._foreach_add_(slow, torch._foreach_mul(torch._foreach_sub(fast, slow), alpha))
        else:
            lerp_(slow, fast, self.alpha_t)
        torch._foreach_copy_(moved.points, slow)
        self._sync_moments(set(moved.parameters))

    def _best_alpha(self, parameters: list[Tensor], slow: list[Tensor], fast: list[Tensor]) -> Tensor:
        """alpha* as a tensor without dimensions, so that no device is waited for."""
        slope = torch.zeros((), device=parameters[0].device, dtype=torch.float64)
        curvature = torch.zeros_like(slope)
        displacement = dict(zip(parameters, torch._foreach_sub(fast, slow), strict=True))  # that is -d
        for p, state, group in inner_states(self.base):
            if p not in displacement or p.grad is None:
                continue
            if "exp_avg_sq" not in state:
                raise ValueError("an adaptive alpha needs a base that keeps a second moment (exp_avg_sq), as Adam does")
            on_device = isinstance(state["step"], Tensor) and state["step"].device == p.device  # as a fused Adam's
            correction = 1 - group["betas"][1] ** (state["step"] if on_device else float(state["step"]))
            slope -= (p.grad * displacement[p]).sum()
            curvature += (state["exp_avg_sq"] / correction * displacement[p].square()).sum()
        alpha = 1 + slope / curvature
        return torch.where(curvature > 0, alpha, torch.ones_like(alpha)).clamp(self.alpha_t, 1).to(slow[0].dtype)

    def _sync_moments(self, moved: set[Tensor]) -> None:
        if self.inner_state == "maintain":
            return
        held = [(p, moments(p, state)) for p, state, _ in inner_states(self.base) if p in moved]
        now = [local(value) for _, values in held for value in values.values()]
        if not now:  # a base without memory
            return
        if self.inner_state == "reset":
            torch._foreach_zero_(now)
            return
        synced = [local(self._own[p][SYNCED + k]) for p, values in held for k in values]
        torch._foreach_lerp_(now, synced, 1 - self.alpha_t)
        torch._foreach_copy_(synced, now)

    def _start_moments(self, new: set[Tensor]) -> None:
        """There were none at the start."""
        if self.inner_state == "interpolate":
            for p, state, _ in inner_states(self.base):
                if p in new:
                    self._own[p] |= {SYNCED + k: torch.zeros_like(v) for k, v in moments(p, state).items()}

    def _allocate(self) -> None:
        super()._allocate()
        self._start_moments(set(self._own))

    def _pack(self) -> dict[str, Any]:
        saved, ids = super()._pack(), {p: i for i, p in enumerate(parameters_of(self))}
        for member in members(self.base):  # one that shares its state over ranks knows how to complete it
            if isinstance(member, MatrixOptimizer) and self.inner_state == "interpolate":
                held = {p: synced(self._own[p]) for p in parameters_of(member) if p in self._own}
                for p, values in member.gather(held).items():
                    saved["state"][ids[p]] |= {self._prefix + k: v for k, v in values.items()}
        return saved

    def _unpack(self, saved: Mapping[str, Any]) -> None:
        super()._unpack(saved)
        for p, state, _ in inner_states(self.base):
            now, buffers = moments(p, state), self._own.get(p, {})
            for name in synced(buffers):
                moment = now.get(name.removeprefix(SYNCED))
                if moment is None:  # another rank's
                    del buffers[name]
                else:  # the base may have cast it
                    buffers[name] = buffers[name].to(moment.dtype)


def moments(p: Tensor, state: State) -> dict[str, Tensor]:
    """What a state remembers per weight or per row: tensors of as many dimensions as the parameter."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim == p.ndim and k not in COUNTERS}


def synced(buffers: State) -> State:
    return {k: v for k, v in buffers.items() if k.startswith(SYNCED)}


def _require_open(member: Optimizer, inner_state: str) -> None:
    """Raise ValueError unless the moments of a base can be reached, and keep their meaning."""
    name = type(member).__name__
    if inner_state == "interpolate" and not getattr(member, "INTERPOLATES", True):
        raise ValueError(f"{name}'s moments turn with its bases and cannot be interpolated: maintain or reset them")
    if any(isinstance(value, Optimizer) for value in vars(member).values()):  # as ZeroRedundancyOptimizer's
        raise ValueError(f"{name} hides the state of the optimizer in it, which cannot be {inner_state}: maintain it")


def members(optimizer: Any) -> Iterator[Optimizer]:
    """The optimizers that take the steps, through chains and wrappers."""
    if isinstance(optimizer, Composite):
        for member in optimizer._members:
            yield from members(member)
    else:
        yield optimizer


def inner_states(optimizer: Any) -> Iterator[tuple[Tensor, State, dict[str, Any]]]:
    """(parameter, state, group) of each parameter of a base; the state has no tensors on ranks that do not own it."""
    for member in members(optimizer):
        for group in member.param_groups:
            for p in group["params"]:
                yield p, member.state.get(p) or {}, group
