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

from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ..optim.contract import parameters_of
from ..optim.ranges import FRACTION, require
from ..schedules import lowest_alpha
from .fused import average_and_extrapolate_
from .wrapper import Alpha, Moved, Wrapper, lerp_


class EMANesterov(Wrapper):
    """EMA-Nesterov around `base` (the paper's Algorithm 1) with one extra buffer.

    base: any `torch.optim.Optimizer`, which takes the steps.
    alpha: lookahead step size, a float or a function of the step (see `schedules.lookahead_alpha`); 0.3 to 0.9 in
        the paper. Below 0 it looks back along the average, down to -1/k, where e lies.
    ema_decay: gamma in [0, 1), the rate of the EMA of the updates; 0 is plain Nesterov.
    warm_start: begin m at the first displacement, m_1 = x_1 - x_0, as the released code does.

    Raises ValueError when ema_decay or alpha is out of range.
    """

    NAME = "EMANesterov"
    RANGES: ClassVar = {"ema_decay": FRACTION}
    LINE = ("ema_decay",)

    def __init__(self, base: Optimizer, alpha: Alpha, ema_decay: float, warm_start: bool = False):
        require(self.RANGES, locals())
        self.ema_decay = ema_decay
        self.warm_start = warm_start
        self.k = (1 - ema_decay) / ema_decay if ema_decay else 1.0
        super().__init__(base, alpha)

    def average(self) -> list[Tensor]:
        """e_t, the EMA of the weights (x_{t-1} when ema_decay is 0): the buffers themselves, in the order of the
        parameters. A parameter that was never stepped is its own average."""
        return [self._own[p]["anchor"] if self._own.get(p) else p.detach() for p in parameters_of(self)]

    def _weight(self, position: float, alpha: float) -> float:
        return (1 + position * self.k) / (1 + alpha * self.k)

    def _lowest_alpha(self) -> float:
        return lowest_alpha(self.ema_decay)

    def _before(self, moved: Moved) -> None:
        if self.ema_decay == 0:  # the buffer, x_{t-1}, becomes x_t, recovered from y_t
            lerp_(moved.anchors, moved.wide(), self._weight(0.0, self.alpha_t))

    def _after(self, moved: Moved) -> None:
        e, extrapolation = moved.anchors, -self.alpha_t * self.k
        if self.ema_decay == 0:
            if self.alpha_t:
                x = moved.wide()
                lerp_(x, e, extrapolation)
                moved.put(x)
            return
        # m_1 = k (x_1 - e_1) is x_1 - x_0 when e_1 = x_0 + (1 - 1/k) (x_1 - x_0)
        shares = [1 - 1 / self.k if self.warm_start and new else 1 - self.ema_decay for new in moved.new]
        for share in dict.fromkeys(shares):
            part = [i for i, its in enumerate(shares) if its == share]
            averages, points = [e[i] for i in part], [moved.points[i] for i in part]
            if self.alpha_t:
                average_and_extrapolate_(averages, points, share, extrapolation)
            else:
                lerp_(averages, [x.to(a.dtype) for x, a in zip(points, averages, strict=True)], share)
