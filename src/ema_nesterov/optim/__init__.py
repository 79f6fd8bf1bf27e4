"""Base optimizers: each one algorithm in one file."""

from torch.optim import AdamW

from .aurora import Aurora
from .chain import Chain
from .muon import Muon
from .normuon import NorMuon
from .record30 import Record30
from .soap import SOAP

__all__ = ["SOAP", "AdamW", "Aurora", "Chain", "Muon", "NorMuon", "Record30"]
