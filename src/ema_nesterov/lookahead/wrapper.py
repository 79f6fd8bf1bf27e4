"""What every lookahead wrapper shares: an anchor for each parameter, positions on a line, modes and state.

While training, the parameters hold the lookahead point y_t, where gradients are taken. Each wrapper
keeps one more copy of the weights, its anchor, chosen such that the iterate x_t, the lookahead
point y_t and every position x_t + a d_t lie on the line from the anchor through y_t:

    x_t + a d_t = anchor + w(a) (y_t - anchor)

An algorithm is therefore a few small methods: `_weight` (w above), `_gradient_position` (the a of y_t), and
`_before` and `_after`, what happens to the anchor and the parameters around the base optimizer's step.

A parameter without a gradient is left alone: x and anchor stay, and only y follows alpha along the line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim.contract import State, eager, local, parameters_of, with_gradients
from ..optim.ranges import Range, number
from .state import Remembering

Alpha = float | Callable[[int], float]


def lerp_(target: list[Tensor], end: list[Tensor], weight: float) -> None:
    """target <- target + weight (end - target) for lists of tensors; each pair shares its dtype."""
    torch._foreach_lerp_(target, end, weight)


@dataclass
class Moved:
    """The parameters that a step moves, and what its first half keeps for the second."""

    parameters: list[Tensor]
    buffers: list[State]  # of each; see `Wrapper._own`
    new: list[bool]  # whether this is a parameter's first step
    kept: Any = None
    points: list[Tensor] = field(init=False)  # the parameters; of DTensors this rank's part
    anchors: list[Tensor] = field(init=False)
    mixed: bool = field(init=False)  # some parameter is of lower precision than its buffers

    def __post_init__(self) -> None:
        self.points, self.anchors = [local(p) for p in self.parameters], self.of("anchor")
        self.mixed = any(p.dtype != a.dtype for p, a in zip(self.points, self.anchors, strict=True))

    def of(self, name: str) -> list[Tensor]:
        """A buffer of each parameter."""
        return [local(buffers[name]) for buffers in self.buffers]

    def wide(self, copy: bool = False) -> list[Tensor]:
        """The parameters in their buffers' dtype: themselves, or copies where one is of lower precision."""
        if not (self.mixed or copy):
            return self.points
        return [p.detach().to(a.dtype, copy=copy) for p, a in zip(self.points, self.anchors, strict=True)]

    def put(self, values: list[Tensor]) -> None:
        """Round values in the buffers' dtype into the parameters."""
        if values is not self.points:
            torch._foreach_copy_(self.points, values)


class Wrapper(Remembering):
    """Base of the lookahead wrappers: a real `torch.optim.Optimizer` around another one.

    `param_groups` is the base's own list, so a learning-rate scheduler on either moves both. The wrapper's state
    is its own: nothing is ever written into the base's, and `state` and `state_dict()` show both as one. `alpha`
    is a float or a function of the number of completed steps; what the line allows depends on the wrapper.
    Buffers are made at a parameter's first step.
    """

    RANGES: ClassVar[dict[str, Range]] = {}

    def __init__(self, base: Optimizer, alpha: Alpha):
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        self.alpha = alpha
        super().__init__(base)
        if not callable(alpha):
            self._require_alpha(alpha)

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

    def _weight(self, position: float, alpha: float) -> float:
        """w such that x_t + position d_t = anchor + w (y_t - anchor), for the y_t that `alpha` made."""
        raise NotImplementedError

    def _gradient_position(self, alpha: float) -> float:
        """The position of y_t, where the gradient is taken."""
        return alpha

    def _alpha_after(self, alpha: float) -> float:
        """The alpha in force after the step just counted, where the schedule says `alpha`."""
        return alpha

    def _before(self, moved: Moved) -> Any:
        """What must be kept of y_t before the base optimizer overwrites it."""

    def _after(self, moved: Moved) -> None:
        """Given x_{t+1} in the parameters, move the anchor and leave y_{t+1} there."""
        raise NotImplementedError

    def _lowest_alpha(self) -> float:
        """Above it y_t and the anchor give x_t: an alpha below 0 looks back along the line, but not past the anchor."""
        return -math.inf

    def _require_alpha(self, alpha: float) -> None:
        if not number(alpha) or alpha <= self._lowest_alpha():
            raise ValueError(f"alpha must be a number above {self._lowest_alpha():g}, got {alpha}")

    # --- one step -----------------------------------------------------------------------------

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """From y_t with gradients taken there to y_{t+1}.

        Raises RuntimeError while the parameters hold another position (`eval()`, `at_position`), ValueError for an
        alpha out of range; nothing has moved then.
        """
        if closure is None and self._only_allocates():
            return None
        if self._now.position is not None:
            raise RuntimeError("step() needs the lookahead point in the parameters: call train() first")
        alpha = self.alpha(self.steps + 1) if callable(self.alpha) else self.alpha
        if callable(self.alpha):
            self._require_alpha(alpha)
        self._start_step()
        if closure is None:
            moved = self._begin()
            loss = self.base.step()
        else:
            first: list[Moved] = []
            loss = self.base.step(self._then_begin(closure, first))
            moved = first[0] if first else self._begin()
        before = self.alpha_t
        self._now.steps += 1
        self._now.alpha_t = self._alpha_after(alpha)
        if moved.parameters:
            self._after(moved)
        if self._gradient_position(before) != self._gradient_position(self.alpha_t):
            self._follow(set(moved.parameters), before)
        return loss

    def _begin(self) -> Moved:
        params = with_gradients(parameters_of(self))
        new = [not self._own.get(p) for p in params]
        if any(new):
            self._add_buffers([p for p, is_new in zip(params, new, strict=True) if is_new])
        moved = Moved(params, [self._own[p] for p in params], new)
        for buffers in moved.buffers:
            buffers.pop("x", None)  # that of a frozen one; it goes on from y
        if params:
            moved.kept = self._before(moved)
        return moved

    def _then_begin(self, closure: Callable[[], Any], first: list[Moved]) -> Callable[[], Any]:
        """The closure, followed the first time by `_begin`: where it fails, nothing has changed."""

        def evaluate() -> Any:
            loss = closure()
            if not first:
                with torch.no_grad():
                    first.append(self._begin())
            return loss

        return evaluate

    def _follow(self, moved: set[Tensor], before: float) -> None:
        """y of the parameters that the step has not moved goes where the new alpha puts it. Their x is kept, as it is
        not recovered from y to the last bit."""
        frozen = [p for p in parameters_of(self) if p not in moved and self._own.get(p)]
        if not frozen:
            return
        points, anchors = [local(p) for p in frozen], [local(self._own[p]["anchor"]) for p in frozen]
        for p, point, anchor in zip(frozen, points, anchors, strict=True):
            if "x" not in self._own[p]:
                x = self._own[p]["x"] = torch.empty_like(self._own[p]["anchor"])
                local(x).copy_(torch.lerp(anchor, point.to(anchor.dtype), self._weight(0.0, before)))
        weight = self._weight(self._gradient_position(self.alpha_t), 0.0)
        xs = [local(self._own[p]["x"]) for p in frozen]
        torch._foreach_copy_(points, torch._foreach_lerp(anchors, xs, weight))

    def skip(self, steps: int = 1) -> None:
        """Count steps that are not taken, as where a gradient is not finite: schedules go on, nothing else moves."""
        self._now.steps += steps
        self._now.skipped += steps
        if hasattr(self.base, "skip"):
            self.base.skip(steps)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the weights as they are, as after others have written them: they are x and y, the next
        step makes new buffers, and the parameters are in train mode. The base's state and the step count go on."""
        self._own.clear()
        self._now.position = None
        self._now.alpha_t = 0.0
        if hasattr(self.base, "restart"):
            self.base.restart()

    # --- positions ----------------------------------------------------------------------------

    @contextmanager
    def at_position(self, position: float) -> Iterator[None]:
        """Hold x_t + position d_t in the parameters; leaving restores what they held, bit for bit.

        Raises RuntimeError, on leaving, where others have written the weights meanwhile.
        """
        outer = self._now.position
        self._move(float(position))
        try:
            yield
        except BaseException:
            self._move(outer, check=False)
            raise
        self._move(outer)

    def at_iterate(self):
        """Hold the iterate x_t in the parameters: the weights to evaluate, report and export."""
        return self.at_position(0.0)

    def eval(self) -> None:
        """Put the iterate x_t into the parameters until `train()`. Calling it twice is harmless."""
        self._move(0.0)

    def train(self) -> None:
        """Put the lookahead point y_t back into the parameters, bit for bit.

        Raises RuntimeError where others have written the weights since `eval()`: what they wrote would be lost.
        """
        self._move(None)

    @torch.no_grad()
    def _move(self, position: float | None, check: bool = True) -> None:
        if position == self._now.position:
            return
        held = [p for p in parameters_of(self) if self._own.get(p)]
        points = [local(p) for p in held]
        if self._now.position is not None and check:
            self._require_untouched(points, self._at(held, self._now.position))
        if position is None:
            ys = [local(self._own[p].pop("y")) for p in held]
            if ys:
                torch._foreach_copy_(points, ys)
        else:
            if self._now.position is None:
                for p in held:
                    self._own[p]["y"] = p.detach().clone()
            if held:
                torch._foreach_copy_(points, self._at(held, position))
        self._now.position = position

    def _at(self, held: list[Tensor], position: float) -> list[Tensor]:
        """x_t + position d_t of parameters that have buffers, as new tensors."""
        buffers = [self._own[p] for p in held]
        anchors = [local(b["anchor"]) for b in buffers]
        ys: list[Tensor] = [b.get("y", p) for b, p in zip(buffers, held, strict=True)]
        ends = [local(b.get("x", y)).to(a.dtype) for b, y, a in zip(buffers, ys, anchors, strict=True)]
        # a frozen parameter's x is what alpha = 0 would have left
        weights = [self._weight(position, 0.0 if "x" in b else self.alpha_t) for b in buffers]
        if len(set(weights)) == 1:
            return list(torch._foreach_lerp(anchors, ends, weights[0]))
        return [torch.lerp(a, end, w) for a, end, w in zip(anchors, ends, weights, strict=True)]

    def _require_untouched(self, points: list[Tensor], ours: list[Tensor]) -> None:
        pairs = zip(points, (o.to(p.dtype) for p, o in zip(points, ours, strict=True)), strict=True)
        differ = [((p != o) & ~(p.isnan() & o.isnan())).any().cpu() for p, o in pairs]
        if differ and bool(torch.stack(differ).any()):
            raise RuntimeError(
                "the weights were changed while they were at the iterate (eval mode), and going back to the lookahead "
                "point would undo it; call restart() to begin anew from the weights as they are"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(alpha={self.alpha}, base={self.base})"
