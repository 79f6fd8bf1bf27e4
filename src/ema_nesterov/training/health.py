"""Whether a step may be taken: agreed by all ranks with one small all-reduce and one read of the device a step."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distributed import Ranks


class Health(NamedTuple):
    """The same on every rank."""

    loss: float  # mean over the global batch
    norm: float  # of the whole gradient
    bad_ranks: list[int]  # whose loss is not finite
    stop: bool  # some rank was asked to stop

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def examine(loss: Tensor, norm: Tensor, stop: bool, ranks: Ranks) -> Health:
    """loss: of this rank, such that the mean over the ranks is that of the global batch.  norm: of the averaged
    gradient, the same on every rank."""
    report = torch.zeros(ranks.size + 2, device=ranks.device)
    report[0] = loss
    report[1] = float(stop)
    report[2 + ranks.rank] = ~loss.isfinite()
    total, stops, *bad, size = torch.cat([ranks.sum(report), norm.reshape(1)]).tolist()  # waits for the device
    return Health(total / ranks.size, size, [rank for rank, count in enumerate(bad) if count], stops > 0)


class Watch:
    """What a run remembers of its losses.

    window: losses that the next one is compared with.  skip_spikes: standard deviations above their mean from which
    a step is not taken (None: all are).
    """

    def __init__(self, window: int, skip_spikes: float | None):
        self.losses: deque[float] = deque(maxlen=window)
        self.skip_spikes = skip_spikes
        self.skipped = 0  # steps not taken, in all
        self.in_a_row = 0  # of them, the last ones, that were not finite
        self.zscore: float | None = None  # of the last loss; None: too few before it

    def judge(self, health: Health) -> str:
        """Why the step must not be taken; empty: it may."""
        self.zscore = None
        if not health.finite:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            return f"loss {health.loss}" if not math.isfinite(health.loss) else f"gradient norm {health.norm}"
        self.in_a_row = 0
        if len(self.losses) == self.losses.maxlen:
            mean = fmean(self.losses)
            spread = math.sqrt(fmean((loss - mean) ** 2 for loss in self.losses)) or math.inf
            self.zscore = (health.loss - mean) / spread
        self.losses.append(health.loss)  # a spike, too: a lasting shift is none for long
        if self.zscore is not None and self.skip_spikes is not None and self.zscore > self.skip_spikes:
            self.skipped += 1
            return f"loss {health.loss:.4f} is {self.zscore:.1f} standard deviations above those before"
        return ""

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def resume(self, state: dict[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
