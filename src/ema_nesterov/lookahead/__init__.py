"""Lookahead wrappers around any `torch.optim.Optimizer`."""

from .ema_nesterov import EMANesterov
from .gpa import GPA
from .lookahead import Lookahead
from .nala import NALA
from .nesterov import Nesterov
from .snoo import SNOO
from .state import wrapper_in
from .wrapper import Wrapper

__all__ = ["GPA", "NALA", "SNOO", "EMANesterov", "Lookahead", "Nesterov", "Wrapper", "wrapper_in"]
