"""Base optimizers: each one algorithm in one file."""

from torch.optim import AdamW

from .chain import Chain
from .muon import Muon

__all__ = ["AdamW", "Chain", "Muon"]
