"""How long a run takes: elapsed seconds, tokens per second, and the share of the hardware's peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig
from torch import nn

from ..models.common import own
from .distributed import Ranks

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the datasheets


def flops_per_token(model: nn.Module, layers: int, width: int, seq_len: int) -> int:
    """6 x the weights of matrix products (the head's too) + 12 layers width seq_len for attention."""
    weights = sum(own(m.weight).numel() for m in model.modules() if isinstance(m, nn.Linear))
    return 6 * weights + 12 * layers * width * seq_len


class Clock:
    """Seconds of the run, and of training alone: evaluation and saving are left out of the speed."""

    def __init__(self, cfg: DictConfig, model: nn.Module, ranks: Ranks):
        self.earlier = 0.0  # seconds of the run before it was resumed
        self.ranks = ranks
        self.tokens_per_step = cfg.batch_size * cfg.seq_len
        self.flops_per_token = flops_per_token(
            model, cfg.model.get("layers", 0), cfg.model.get("width", 0), cfg.seq_len
        )
        name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
        self.peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
        self.began = time.monotonic()
        self.first: float | None = None  # seconds of the first step, until they are logged
        self.start(0)

    def start(self, step: int) -> None:
        """Measure the speed from here, `step` steps being completed."""
        self.step, self.mark, self.away = step, time.monotonic(), 0.0

    def first_done(self, step: int) -> None:
        """The first step compiled: it is told apart, and the speed is that of the steps after it."""
        self._synchronize()
        self.first = time.monotonic() - self.mark - self.away
        self.start(step)

    def seconds(self) -> float:
        """Since the run began, all its restarts together."""
        return round(self.earlier + time.monotonic() - self.began, 3)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training."""
        self._synchronize()
        before = time.monotonic()
        yield
        self._synchronize()
        self.away += time.monotonic() - before

    def speed(self, step: int) -> dict[str, float]:
        """The speed since the last call; call it when the device is done with the step."""
        steps, seconds = step - self.step, time.monotonic() - self.mark - self.away
        seconds = seconds / steps if steps else self.first or 0.0
        self.start(step)
        rate = self.tokens_per_step / seconds
        speed = {"perf/step_ms": seconds * 1000, "perf/tokens_per_second": rate}
        if self.first is not None:
            speed["perf/first_step_s"], self.first = self.first, None
        if self.peak is not None:
            speed["perf/mfu"] = rate * self.flops_per_token / (self.peak * self.ranks.size)
        return speed

    def _synchronize(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
