"""Replays the trajectories in tests/reference: a separable quadratic with given noise.

For tensor i and step t the gradient at the parameters' present value p is
`curv_i (p - target_i) + noise_i[t]`. `y_i[t]` is p when that gradient is taken, `x_i[t]` the iterate
after the step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

REFERENCE = Path(__file__).parent / "reference"


class Trajectory:
    def __init__(self, name: str, dtype: torch.dtype):
        data = np.load(REFERENCE / f"open_{name}.npz", allow_pickle=False)
        self.meta: dict[str, Any] = json.loads(str(data["meta"]))
        self.tensors = {key: torch.from_numpy(data[key]).to(dtype) for key in data.files if key != "meta"}
        self.count = sum(key.startswith("init_") for key in data.files)
        self.steps: int = self.meta["steps"]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def lr_factor(self, step: int) -> float:
        return min(1.0, (self.steps - step) / (self.steps // 3))

    def lookahead_alpha(self, step: int) -> float:
        active = self.meta["warmup_steps"] <= step < self.steps - self.meta["rest_steps"]
        return self.meta["alpha"] * self.lr_factor(step) if active else 0.0

    def parameters(self) -> list[Tensor]:
        return [self[f"init_{i}"].clone().requires_grad_() for i in range(self.count)]

    def error(self, params: list[Tensor], optimizer: Optimizer, at_iterate: Callable[[], AbstractContextManager]):
        """The largest distance of any y_i[t] and x_i[t] from the reference, by tensor, relative to its size."""
        errors = [0.0] * self.count
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(self.steps):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * self.lr_factor(step)
            for i, p in enumerate(params):
                errors[i] = max(errors[i], self.distance(p, f"y_{i}", step))
                gradient = self[f"curv_{i}"] * (p.detach() - self[f"target_{i}"]) + self[f"noise_{i}"][step]
                p.grad = gradient.to(p.dtype)
            optimizer.step()
            with at_iterate():
                for i, p in enumerate(params):
                    errors[i] = max(errors[i], self.distance(p, f"x_{i}", step))
        return errors

    def distance(self, p: Tensor, key: str, step: int) -> float:
        return float((p.detach() - self[key][step]).abs().max() / self[key].abs().max())
