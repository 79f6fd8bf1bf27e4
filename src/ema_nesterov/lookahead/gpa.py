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

import torch
from torch import Tensor
from torch.optim import Optimizer

from .wrapper import Wrapper, lerp_


class GPA(Wrapper):
    """GPA around `base`. The direction is z - x; the gradients are taken at position 1 - mu_y.

    mu_x: in [0, 1), how slowly the iterate averages. mu_y: in (0, 1], where the gradient is taken.
    Raises ValueError when either is out of range.
    """

    _line = ("mu_y",)

    def __init__(self, base: Optimizer, mu_x: float, mu_y: float):
        if not (0 <= mu_x < 1 and 0 < mu_y <= 1):
            raise ValueError(f"mu_x must be in [0, 1) and mu_y in (0, 1], got {mu_x} and {mu_y}")
        super().__init__(base, 1 - mu_y)
        self.mu_x, self.mu_y = mu_x, mu_y
        self._start: list[Tensor] = []  # y_t while the base takes its step

    def _weight(self, position: float) -> float:
        return (1 - position) / self.mu_y

    def _before(self, parameters: list[Tensor]) -> None:
        self._start = [p.detach().to(z.dtype, copy=True) for p, z in zip(parameters, self._anchor, strict=True)]

    def _after(self, parameters: list[Tensor]) -> None:
        y, z, u = self._start, self._anchor, self._wide(parameters)
        torch._foreach_sub_(u, y)
        lerp_(y, z, 1 - self.mu_x)
        torch._foreach_add_(y, u, alpha=1 - self.mu_x * self.mu_y)
        torch._foreach_add_(z, u)
        torch._foreach_copy_(parameters, y)
        self._start = []
