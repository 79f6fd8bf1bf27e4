"""Lookahead wrappers around any `torch.optim.Optimizer`."""

from .ema_nesterov import EMANesterov
from .nesterov import Nesterov
from .wrapper import Wrapper

__all__ = ["EMANesterov", "Nesterov", "Wrapper"]
