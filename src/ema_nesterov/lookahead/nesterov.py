"""Nesterov's accelerated gradient around any base optimizer.

    y_t     = x_t + alpha_t (x_t - x_{t-1})
    x_{t+1} = A_t(y_t)

It is EMA-Nesterov with gamma = 0, where the average of the updates is the last update alone.
"""

from __future__ import annotations

from torch.optim import Optimizer

from .ema_nesterov import EMANesterov
from .wrapper import Alpha


class Nesterov(EMANesterov):
    """Nesterov lookahead around `base`; alpha is a float above -1 or a function of the step."""

    NAME = "Nesterov"

    def __init__(self, base: Optimizer, alpha: Alpha):
        super().__init__(base, alpha, ema_decay=0.0)
