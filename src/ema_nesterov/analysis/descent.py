"""Optimizers on small problems: the real wrappers around a real base, in float64, and where they went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ..lookahead import Wrapper
from ..schedules import Schedule

Gradient = Callable[[Tensor], Tensor]
Make = Callable[[nn.Parameter], Optimizer]  # e.g. lambda p: EMANesterov(SGD([p], lr=0.1), 0.5, 0.9)


@dataclass(frozen=True)
class Path:
    """x[t] and y[t], the iterate and the lookahead point after t steps; for an optimizer without a wrapper the same."""

    x: Tensor  # (steps + 1, *shape)
    y: Tensor
    d: Tensor = field(default_factory=lambda: torch.empty(0))  # the wrapper's direction; empty unless asked for


@torch.no_grad()
def descend(
    make: Make,
    gradient: Gradient,
    start: Tensor,
    steps: int,
    lr: Schedule | None = None,
    directions: bool = False,
) -> Path:
    """Steps from `start`, with the gradient taken at y. Independent copies of a problem go as one tensor, since
    every wrapper works element by element: start may be (copies, dimensions). lr: factor on the base's learning rate,
    of the step 0, 1, ...; directions: keep d too, the wrapper's position 1 less its position 0."""
    parameter = nn.Parameter(start.to(torch.float64).clone())
    optimizer = make(parameter)
    rate = optimizer.param_groups[0]["lr"]
    xs, ys = [parameter.detach().clone()], [parameter.detach().clone()]
    ds = [torch.zeros_like(xs[0])] if directions else [torch.empty(0)]
    for t in range(steps):
        if lr is not None:
            optimizer.param_groups[0]["lr"] = rate * lr(t)
        parameter.grad = gradient(parameter.detach())
        optimizer.step()
        ys.append(parameter.detach().clone())
        if isinstance(optimizer, Wrapper):
            with optimizer.at_iterate():
                xs.append(parameter.detach().clone())
            if directions:
                with optimizer.at_position(1.0):
                    ds.append(parameter.detach() - xs[-1])
        else:
            xs.append(ys[-1])
    return Path(torch.stack(xs), torch.stack(ys), torch.stack(ds))


def around(lr: float, wrapper: Callable[..., Wrapper] | None = None, *args: Any, momentum: float = 0.0) -> Make:
    """Gradient descent, or heavy ball, inside a wrapper: around(0.1, EMANesterov, 0.5, 0.9)."""

    def make(parameter: nn.Parameter) -> Optimizer:
        base = SGD([parameter], lr=lr, momentum=momentum)
        return wrapper(base, *args) if wrapper is not None else base

    return make
