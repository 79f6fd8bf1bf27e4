"""How the arithmetic is carried out: compiled or not, in which precision, with sums in a fixed order or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ..models import build_model

LONG = 200  # steps of a run that pay for compiling on a CPU


def bfloat16(cfg: DictConfig, device: torch.device) -> bool:
    """Whether products are in bfloat16: on a GPU, unless trainer.bfloat16 decides. All else stays float32."""
    wanted = cfg.trainer.get("bfloat16")  # config.yaml of an older run has no such key
    return device.type == "cuda" if wanted is None else wanted


def model_on(cfg: DictConfig, device: torch.device) -> nn.Module:
    """The model of the config; where it has no autocast, its activations have the dtype of its products."""
    with device:
        return build_model(cfg.model, cfg.plugins, torch.bfloat16 if bfloat16(cfg, device) else torch.float32)


def autocast(cfg: DictConfig, device: torch.device) -> AbstractContextManager:
    wanted = bfloat16(cfg, device) and cfg.model.get("autocast", True)
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def eval_autocast(cfg: DictConfig, device: torch.device) -> AbstractContextManager:
    return nullcontext() if cfg.model.get("eval_float32", True) else autocast(cfg, device)


def compiles(cfg: DictConfig, device: torch.device) -> bool:
    """Whether the model is compiled: on a GPU, and on a CPU for a long run where a C++ compiler works, unless the
    config decides."""
    if cfg.trainer.compile is not None:
        return cfg.trainer.compile
    return device.type == "cuda" or (cfg.steps >= LONG and compiler_works())


@cache
def compiler_works() -> bool:
    try:
        torch.compile(torch.neg)(torch.ones(8))
    except Exception:  # what is missing: a compiler, a header, a folder that can be written
        return False
    return True


@contextmanager
def determinism(cfg: DictConfig, device: torch.device) -> Iterator[None]:
    """The same bits at every repetition: on a CPU, and on a GPU where trainer.deterministic asks for it."""
    wanted = cfg.trainer.deterministic
    if wanted is None:  # what is not compiled repeats its bits on a CPU anyway, and asking imports the compiler
        wanted = device.type == "cpu" and compiles(cfg, device)
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options: Any = torch.utils.deterministic
    enabled, fills = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.fill_uninitialized_memory = False  # a help in finding errors, at a cost
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        options.fill_uninitialized_memory = fills
