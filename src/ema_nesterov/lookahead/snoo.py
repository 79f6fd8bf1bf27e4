"""SNOO: a Nesterov momentum step on the displacement of every k steps (Kallusky et al. 2025).

    fast <- A(fast)                    k times, then
    s    = slow - fast
    b    <- mu b + s
    slow <- slow - lr (mu b + s),  fast <- slow

With mu = 0 it is Lookahead with alpha = lr. Syncs come after exactly k steps (the released code's
first comes after k + 1).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim.contract import State
from ..optim.ranges import COUNT, FRACTION, NUMBER, require
from .wrapper import Moved, Wrapper


class SNOO(Wrapper):
    """SNOO around `base`. x is slow, position 1 is fast.

    lr: of the outer step. momentum: mu of the outer step, in [0, 1). k: inner steps to a sync.
    Raises ValueError when one of them is out of range.
    """

    NAME = "SNOO"
    RANGES: ClassVar = {"lr": NUMBER, "momentum": FRACTION, "k": COUNT}
    BUFFERS = ("anchor", "b")

    def __init__(self, base: Optimizer, lr: float, momentum: float, k: int):
        require(self.RANGES, locals())
        self.lr, self.momentum, self.k = lr, momentum, k
        super().__init__(base, 1.0)

    def _weight(self, position: float, alpha: float) -> float:
        return position

    def _gradient_position(self, alpha: float) -> float:
        return 1.0

    def _buffers_for(self, p: Tensor) -> State:
        buffers = super()._buffers_for(p)
        return {**buffers, "b": torch.zeros_like(buffers["anchor"])}

    def _after(self, moved: Moved) -> None:
        if self.taken % self.k:
            return
        slow, b, move = moved.anchors, moved.of("b"), moved.wide()
        torch._foreach_sub_(move, slow)  # fast - slow, that is -s
        torch._foreach_mul_(b, self.momentum)
        torch._foreach_sub_(b, move)
        torch._foreach_add_(slow, move, alpha=self.lr)
        torch._foreach_add_(slow, b, alpha=-self.lr * self.momentum)
        torch._foreach_copy_(moved.points, slow)
