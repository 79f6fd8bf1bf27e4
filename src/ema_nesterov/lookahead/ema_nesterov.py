"""EMA-Nesterov: Nesterov's lookahead along an exponential moving average of the updates.

The paper's Algorithm 1, with m_0 = 0:

    y_t     = x_t + alpha_t m_t
    x_{t+1} = A_t(y_t)                                  one step of the base optimizer
    m_{t+1} = gamma m_t + (1 - gamma) (x_{t+1} - x_t)

Neither m nor the previous x needs to be stored. Let e be the EMA of the weights themselves,
e_0 = x_0 and e_{t+1} = gamma e_t + (1 - gamma) x_{t+1}; then, for every t,

    m_t = k (x_t - e_t)    with    k = (1 - gamma) / gamma,

so the algorithm extrapolates away from the average of the weights, and a step is two interpolations:

    e <- e + (1 - gamma) (x - e)        y <- x - alpha k (e - x)

done in one pass over memory (see `fused`). Everything lies on the line from e through y:

    x + a m = e + (1 + a k) / (1 + alpha k) (y - e),

and e itself, an averaged model for free, is at a = -1/k.

Rounding in x - e is amplified by k, which is small for the averages that the method is about (0.01 for
gamma = 0.99) and large only for gamma near, but not at, 0.

With gamma = 0 (plain Nesterov) m_t = x_t - x_{t-1}: the buffer is x_{t-1}, and k = 1.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from .fused import average_and_extrapolate_
from .wrapper import Alpha, Wrapper, lerp_


class EMANesterov(Wrapper):
    """EMA-Nesterov around `base` (the paper's Algorithm 1) with one extra buffer.

    base: any `torch.optim.Optimizer`, which takes the steps.
    alpha: lookahead step size, a float or a function of the step (see `schedules.lookahead_alpha`).
    ema_decay: gamma in [0, 1), the rate of the EMA of the updates; 0 is plain Nesterov.
    warm_start: begin m at the first displacement, m_1 = x_1 - x_0, as the released code does.

    Raises ValueError when ema_decay is outside [0, 1).
    """

    _line = ("ema_decay",)

    def __init__(self, base: Optimizer, alpha: Alpha, ema_decay: float, warm_start: bool = False):
        if not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        super().__init__(base, alpha)
        self.ema_decay = ema_decay
        self.warm_start = warm_start
        self.k = (1 - ema_decay) / ema_decay if ema_decay else 1.0

    def average(self) -> list[Tensor]:
        """The buffers themselves: e_t, the EMA of the weights (x_{t-1} when ema_decay is 0)."""
        return self._anchor

    def _weight(self, position: float) -> float:
        return (1 + position * self.k) / (1 + self.alpha_t * self.k)

    def _before(self, parameters: list[Tensor]) -> None:
        if self.ema_decay == 0:  # the buffer, x_{t-1}, becomes x_t, recovered from y_t
            lerp_(self._anchor, self._wide(parameters), self._weight(0.0))

    def _after(self, parameters: list[Tensor]) -> None:
        e, extrapolation = self._anchor, -self.alpha_t * self.k
        if self.ema_decay:
            first = self.warm_start and self.taken == 1
            # m_1 = k (x_1 - e_1) is x_1 - x_0 when e_1 = x_0 + (1 - 1/k) (x_1 - x_0)
            share = 1 - 1 / self.k if first else 1 - self.ema_decay
            if self.alpha_t:
                average_and_extrapolate_(e, parameters, share, extrapolation)
            else:
                lerp_(e, self._wide(parameters), share)
        elif self.alpha_t:
            x = self._wide(parameters)
            lerp_(x, e, extrapolation)
            self._narrow(parameters, x)
