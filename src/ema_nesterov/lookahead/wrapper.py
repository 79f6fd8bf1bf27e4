"""What every lookahead wrapper shares: an anchor buffer, positions on a line, modes and state.

While training, the parameters hold the lookahead point y_t, where gradients are taken. Each wrapper
keeps one more copy of the weights, its anchor, chosen such that the iterate x_t, the lookahead
point y_t and every position x_t + a d_t lie on the line from the anchor through y_t:

    x_t + a d_t = anchor + w(a) (y_t - anchor)

An algorithm is therefore three small methods: `_weight` (w above), and `_before` and `_after`, what
happens to the anchor and the parameters around the base optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim.match import load_own, require_match

Alpha = float | Callable[[int], float]


def buffer_dtype(parameter: Tensor) -> torch.dtype:
    """Buffers are float32, or float64 for float64 parameters: bfloat16 would lose the small updates."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def lerp_(target: list[Tensor], end: list[Tensor], weight: float) -> None:
    """target <- target + weight (end - target) for lists of tensors; each pair shares its dtype."""
    torch._foreach_lerp_(target, end, weight)


@dataclass
class Now:
    """What moves with the steps and the modes: one object, since proxies of an optimizer copy its attributes."""

    steps: int = 0  # completed
    skipped: int = 0  # of them, not taken
    alpha_t: float = 0.0  # the alpha that made y_t
    y: list[Tensor] | None = None  # copy of y_t while the parameters hold another position
    position: float | None = None  # that position; None: the parameters hold y_t
    mixed: bool = False  # some parameter is of lower precision than its buffer


class Wrapper(Optimizer):
    """Base of the lookahead wrappers: a real `torch.optim.Optimizer` around another one.

    `param_groups` is the base's own list, so a learning-rate scheduler on either moves both. The
    wrapper's state is its own: nothing is ever written into the base's. `alpha` is a float or a
    function of the number of completed steps. Buffers are made at the first `step()`.
    """

    _line: tuple[str, ...] = ()  # the settings that decide where on the line y_t lies: a state fits no others

    def __init__(self, base: Optimizer, alpha: Alpha):
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        if not callable(alpha) and not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self.base: Any = SimpleNamespace()  # takes the list that Optimizer.__init__ assigns
        super().__init__(base.param_groups, {})
        self.base = base
        self.defaults = base.defaults  # some of torch's schedulers look into it
        self.alpha = alpha
        self._anchor: list[Tensor] = []
        self._now = Now()

    @property
    def steps(self) -> int:
        """Completed steps, the t of y_t."""
        return self._now.steps

    @property
    def taken(self) -> int:
        """Completed steps that moved the weights."""
        return self._now.steps - self._now.skipped

    @property
    def alpha_t(self) -> float:
        """The alpha that made y_t."""
        return self._now.alpha_t

    # --- the algorithm, given by the subclass -------------------------------------------------

    def _weight(self, position: float) -> float:
        """w such that x_t + position d_t = anchor + w (y_t - anchor)."""
        raise NotImplementedError

    def _before(self, parameters: list[Tensor]) -> None:
        """What must be kept of y_t before the base optimizer overwrites it."""

    def _after(self, parameters: list[Tensor]) -> None:
        """Given x_{t+1} in the parameters, move the anchor and leave y_{t+1} there."""
        raise NotImplementedError

    def _wide(self, parameters: list[Tensor]) -> list[Tensor]:
        """The parameters in their buffers' dtype: themselves, or a copy where one is of lower precision."""
        if not self._now.mixed:
            return parameters
        return [p.to(a.dtype) for p, a in zip(parameters, self._anchor, strict=True)]

    def _narrow(self, parameters: list[Tensor], values: list[Tensor]) -> None:
        """Round what `_wide` had to copy, and has changed since, back into the parameters."""
        if self._now.mixed:
            torch._foreach_copy_(parameters, values)

    # --- one step -----------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """From y_t with gradients taken there to y_{t+1}.

        Raises RuntimeError while the parameters hold another position (`eval()`, `at_position`).
        """
        if self._now.position is not None:
            raise RuntimeError("step() needs the lookahead point in the parameters: call train() first")
        parameters = self._parameters()
        if not parameters:
            return self.base.step(closure)
        if len(self._anchor) < len(parameters):  # at the start, or a group was added to the base itself
            self._add_buffers(parameters[len(self._anchor) :])
        if closure is None:
            self._before(parameters)
        else:
            closure = self._then_begin(closure, parameters)
        loss = self.base.step(closure)
        self._now.steps += 1
        self._now.alpha_t = self.alpha(self.steps) if callable(self.alpha) else self.alpha
        self._after(parameters)
        return loss

    def skip(self, steps: int = 1) -> None:
        """Count steps that are not taken, as where a gradient is not finite: schedules go on, nothing else moves."""
        self._now.steps += steps
        self._now.skipped += steps
        if isinstance(self.base, Wrapper):
            self.base.skip(steps)

    def _then_begin(self, closure: Callable[[], Any], parameters: list[Tensor]) -> Callable[[], Any]:
        """The closure, followed the first time by `_before`: where it fails, nothing has changed."""
        begun = False

        def evaluate() -> Any:
            nonlocal begun
            loss = closure()
            if not begun:
                with torch.no_grad():
                    self._before(parameters)
            begun = True
            return loss

        return evaluate

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    # --- positions ----------------------------------------------------------------------------

    @contextmanager
    def at_position(self, position: float) -> Iterator[None]:
        """Hold x_t + position d_t in the parameters; leaving restores what they held, bit for bit."""
        outer = self._now.position
        self._move(float(position))
        try:
            yield
        finally:
            self._move(outer)

    def at_iterate(self):
        """Hold the iterate x_t in the parameters: the weights to evaluate, report and export."""
        return self.at_position(0.0)

    def eval(self) -> None:
        """Put the iterate x_t into the parameters until `train()`. Calling it twice is harmless."""
        self._move(0.0)

    def train(self) -> None:
        """Put the lookahead point y_t back into the parameters, bit for bit."""
        self._move(None)

    @torch.no_grad()
    def _move(self, position: float | None) -> None:
        parameters = self._parameters()
        if position == self._now.position or not parameters:  # also where others have written the parameters since
            return
        if position is None:
            if self._now.y is not None:
                torch._foreach_copy_(parameters, self._now.y)
            self._now.y = self._now.position = None
            return
        if self._now.y is None:
            self._now.y = [p.detach().clone() for p in parameters]
        torch._foreach_copy_(parameters, self._point(position))
        self._now.position = position

    def _point(self, position: float) -> list[Tensor]:
        """x_t + position d_t as new tensors; before the first step d_0 = 0 and all positions are x_0."""
        y = self._now.y if self._now.y is not None else self._parameters()
        if not self._anchor:
            return [p.detach().clone() for p in y]
        return list(torch._foreach_lerp(self._anchor, self._wide(y), self._weight(position)))

    def _add_buffers(self, parameters: list[Tensor]) -> None:
        for p in parameters:
            if p.is_complex() or hasattr(p, "placements"):
                kind = "complex parameters" if p.is_complex() else "DTensors"
                raise TypeError(f"{type(self).__name__} does not take {kind}")
        self._anchor += [p.detach().to(buffer_dtype(p), copy=True) for p in parameters]
        self._now.mixed = self._now.mixed or any(p.dtype != buffer_dtype(p) for p in parameters)

    # --- parameters and groups ----------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not isinstance(self.base, Optimizer):  # still inside Optimizer.__init__
            return super().add_param_group(param_group)
        if self._now.position is not None:
            raise RuntimeError("add_param_group() needs train mode: call train() first")
        known = len(self._parameters())
        self.base.add_param_group(param_group)
        if self._anchor:
            self._add_buffers(self._parameters()[known:])

    # --- state --------------------------------------------------------------------------------

    def _buffers(self) -> dict[str, list[Tensor]]:
        """The buffers that a checkpoint holds, by name; one tensor per parameter."""
        return {"anchor": self._anchor}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers: base, buffers, counter, mode and the alpha in force."""
        return {
            "wrapper": type(self).__name__,
            **{name: getattr(self, name) for name in self._line},
            "base_type": type(self.base).__name__,
            "base": self.base.state_dict(),
            "steps": self.steps,
            "skipped": self._now.skipped,
            "alpha_t": self.alpha_t,
            "position": self._now.position,
            "y": self._now.y,
            "buffers": self._buffers(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`; the parameters themselves are restored with the model.

        Raises ValueError, naming the first mismatch, when the wrapper, the base or the model differs.
        """
        require_match(self, state_dict.get("wrapper"), state_dict)
        require_match(self.base, state_dict.get("base_type"), state_dict["base"])
        for name in self._line:
            if state_dict.get(name) != getattr(self, name):
                raise ValueError(f"{name} is {state_dict.get(name)} in the state, {getattr(self, name)} here")
        parameters = self._parameters()
        lists = {**state_dict["buffers"], "y": state_dict["y"] or []}
        for name, tensors in lists.items():
            if tensors and len(tensors) != len(parameters):
                raise ValueError(f"{name} holds {len(tensors)} tensors for {len(parameters)} parameters")
            for i, (tensor, p) in enumerate(zip(tensors, parameters, strict=False)):
                if tensor.shape != p.shape:
                    raise ValueError(f"{name}[{i}] is {tuple(tensor.shape)}, its parameter is {tuple(p.shape)}")
        load_own(self.base, state_dict["base"])
        self._now.steps = state_dict["steps"]
        self._now.skipped = state_dict.get("skipped", 0)
        self._now.alpha_t = state_dict["alpha_t"]
        self._now.position = state_dict["position"]
        self._now.y = state_dict["y"] and [y.to(p, copy=True) for y, p in zip(state_dict["y"], parameters, strict=True)]
        for name, held in self._buffers().items():
            loaded = state_dict["buffers"][name]
            held[:] = [b.to(p.device, buffer_dtype(p), copy=True) for b, p in zip(loaded, parameters, strict=False)]
        self._now.mixed = any(p.dtype != buffer_dtype(p) for p in parameters)

    def __getstate__(self) -> dict[str, Any]:
        # a learning-rate scheduler leaves a patched step() on the instance, which cannot be pickled
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(alpha={self.alpha}, base={self.base})"
