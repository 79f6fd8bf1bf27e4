"""NALA: Nesterov's lookahead taken every k steps, along the displacement of those k steps.

    y_t     = x_t + alpha_t (x_t - x_{t-k})    when t is a multiple of k, else y_t = x_t
    x_{t+1} = A_t(y_t)

(the paper's equation 6). The buffer holds x at the last multiple of k; k = 1 is plain Nesterov.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from .wrapper import Alpha, Wrapper, lerp_


class NALA(Wrapper):
    """K-step Nesterov lookahead around `base`; the direction is x_t minus x at the last sync.

    alpha: lookahead step size, a float or a function of the step. k: steps from sync to sync.
    Raises ValueError when k is below 1.
    """

    def __init__(self, base: Optimizer, alpha: Alpha, k: int):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        super().__init__(base, alpha)
        self.k = k

    def _weight(self, position: float) -> float:
        return (1 + position) / (1 + self.alpha_t)

    def _before(self, parameters: list[Tensor]) -> None:
        if self.taken % self.k == 0:  # a sync: the buffer becomes x_t, recovered from y_t
            lerp_(self._anchor, self._wide(parameters), self._weight(0.0))

    def _after(self, parameters: list[Tensor]) -> None:
        if self.taken % self.k:
            self._now.alpha_t = 0.0
        if self.alpha_t:
            y = self._wide(parameters)
            lerp_(y, self._anchor, -self.alpha_t)
            self._narrow(parameters, y)
