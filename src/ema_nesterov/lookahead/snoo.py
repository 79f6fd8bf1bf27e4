"""SNOO: a Nesterov momentum step on the displacement of every k steps (Kallusky et al. 2025).

    fast <- A(fast)                    k times, then
    s    = slow - fast
    b    <- mu b + s
    slow <- slow - lr (mu b + s),  fast <- slow

With mu = 0 it is Lookahead with alpha = lr. Syncs come after exactly k steps (the released code's
first comes after k + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from .wrapper import Wrapper


class SNOO(Wrapper):
    """SNOO around `base`. x is slow, position 1 is fast.

    lr: of the outer step. momentum: mu of the outer step, in [0, 1). k: inner steps to a sync.
    Raises ValueError when momentum or k is out of range.
    """

    def __init__(self, base: Optimizer, lr: float, momentum: float, k: int):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        super().__init__(base, 1.0)
        self.lr, self.momentum, self.k = lr, momentum, k
        self._b: list[Tensor] = []

    def _weight(self, position: float) -> float:
        return position

    def _after(self, parameters: list[Tensor]) -> None:
        if self.taken % self.k:
            return
        slow, move = self._anchor, self._wide(parameters)
        torch._foreach_sub_(move, slow)  # fast - slow, that is -s
        if not self._b:
            self._b[:] = [torch.zeros_like(a) for a in slow]
        torch._foreach_mul_(self._b, self.momentum)
        torch._foreach_sub_(self._b, move)
        torch._foreach_add_(slow, move, alpha=self.lr)
        torch._foreach_add_(slow, self._b, alpha=-self.lr * self.momentum)
        torch._foreach_copy_(parameters, slow)

    def _add_buffers(self, parameters: list[Tensor]) -> None:
        super()._add_buffers(parameters)
        if self._b:
            self._b += [torch.zeros_like(a) for a in self._anchor[len(self._b) :]]

    def _buffers(self) -> dict[str, list[Tensor]]:
        return {"anchor": self._anchor, "b": self._b}
