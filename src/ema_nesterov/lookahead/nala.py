"""NALA: Nesterov's lookahead taken every k steps, along the displacement of those k steps.

    y_t     = x_t + alpha_t (x_t - x_{t-k})    when t is a multiple of k, else y_t = x_t
    x_{t+1} = A_t(y_t)

(the paper's equation 6). The buffer holds x at the last multiple of k; k = 1 is plain Nesterov.
"""

from __future__ import annotations

from typing import ClassVar

from torch.optim import Optimizer

from ..optim.ranges import COUNT, require
from ..schedules import lowest_alpha
from .wrapper import Alpha, Moved, Wrapper, lerp_


class NALA(Wrapper):
    """K-step Nesterov lookahead around `base`; the direction is x_t minus x at the last sync.

    alpha: lookahead step size above -1, a float or a function of the step. k: steps from sync to sync.
    Raises ValueError when k is no whole number of at least 1.
    """

    NAME = "NALA"
    RANGES: ClassVar = {"k": COUNT}

    def __init__(self, base: Optimizer, alpha: Alpha, k: int):
        require(self.RANGES, locals())
        self.k = k
        super().__init__(base, alpha)

    def _weight(self, position: float, alpha: float) -> float:
        return (1 + position) / (1 + alpha)

    def _lowest_alpha(self) -> float:
        return lowest_alpha(0.0)

    def _alpha_after(self, alpha: float) -> float:
        return 0.0 if self.taken % self.k else alpha

    def _before(self, moved: Moved) -> None:
        if self.taken % self.k == 0:  # a sync: the buffer becomes x_t, recovered from y_t
            lerp_(moved.anchors, moved.wide(), self._weight(0.0, self.alpha_t))

    def _after(self, moved: Moved) -> None:
        if self.alpha_t:
            y = moved.wide()
            lerp_(y, moved.anchors, -self.alpha_t)
            moved.put(y)
