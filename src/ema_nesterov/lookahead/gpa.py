"""Generalized primal averaging (Defazio et al. 2025).

    y_t     = mu_y x_t + (1 - mu_y) z_t
    z_{t+1} = z_t + A_t(y_t) - y_t
    x_{t+1} = mu_x x_t + (1 - mu_x) z_{t+1}

Only z is kept beside y. With u = A(y) - y,

    z <- z + u        y <- mu_x y + (1 - mu_x) z_old + (1 - mu_x mu_y) u.

GPA takes its gradients where EMA-Nesterov does with alpha = mu_y, gamma = (mu_x - mu_y) / (1 - mu_y)
and base updates multiplied by 1 - mu_y; with mu_x = mu_y it is Nesterov, with mu_x = 0 the base.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim.ranges import ABOVE_0, FRACTION, require
from .wrapper import Moved, Wrapper, lerp_


class GPA(Wrapper):
    """GPA around `base`. The direction is z - x; the gradients are taken at position 1 - mu_y.

    mu_x: in [0, 1), how slowly the iterate averages. mu_y: in (0, 1], where the gradient is taken.
    Raises ValueError when either is out of range.
    """

    NAME = "GPA"
    RANGES: ClassVar = {"mu_x": FRACTION, "mu_y": ABOVE_0}
    LINE = ("mu_y",)

    def __init__(self, base: Optimizer, mu_x: float, mu_y: float):
        require(self.RANGES, locals())
        self.mu_x, self.mu_y = mu_x, mu_y
        super().__init__(base, 1 - mu_y)

    def _weight(self, position: float, alpha: float) -> float:
        return (1 - position) / self.mu_y

    def _gradient_position(self, alpha: float) -> float:
        return 1 - self.mu_y

    def _before(self, moved: Moved) -> list[Tensor]:
        return moved.wide(copy=True)  # y_t

    def _after(self, moved: Moved) -> None:
        y, z, u = moved.kept, moved.anchors, moved.wide()
        torch._foreach_sub_(u, y)
        lerp_(y, z, 1 - self.mu_x)
        torch._foreach_add_(y, u, alpha=1 - self.mu_x * self.mu_y)
        torch._foreach_add_(z, u)
        torch._foreach_copy_(moved.points, y)
