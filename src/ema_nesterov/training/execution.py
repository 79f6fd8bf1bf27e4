"""How the arithmetic is carried out: compiled or not, in which precision, with sums in a fixed order or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig

LONG = 200  # steps of a run that pay for compiling on a CPU


def autocast(device: torch.device, wanted: bool) -> AbstractContextManager:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" and wanted else nullcontext()


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
