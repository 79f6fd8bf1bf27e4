"""The paper's models. Each file is one architecture; `build_model` picks by the config group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import nn

from ..errors import ConfigError
from ..plugins import instantiate
from .llama import Llama
from .nanogpt_124m import NanoGPT124M
from .nanogpt_162m import NanoGPT162M

__all__ = ["Llama", "NanoGPT124M", "NanoGPT162M", "build_model"]


def build_model(cfg: DictConfig, plugins: Sequence[str] = (), dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a composed model group: `model(inputs, targets)` -> loss, `model(inputs)` -> logits.

    dtype: of the activations, for models that cast their weights per product (162M). Works under
    `torch.device("meta")`. Raises ConfigError for an unknown architecture.
    """
    if "_target_" in cfg:
        return instantiate(cfg, list(plugins))
    if cfg.architecture == "nanogpt_124m":
        return NanoGPT124M(cfg.vocab_size, cfg.layers, cfg.heads, cfg.width, cfg.pad_vocab_to)
    if cfg.architecture == "nanogpt_162m":
        return NanoGPT162M(
            cfg.vocab_size,
            cfg.layers,
            cfg.width,
            cfg.head_dim,
            cfg.init,
            cfg.float32_gains,
            cfg.pad_vocab_to,
            dtype,
        )
    if cfg.architecture == "llama":
        return Llama(
            cfg.vocab_size,
            cfg.layers,
            cfg.heads,
            cfg.width,
            cfg.mlp_width,
            cfg.max_seq_len,
            cfg.padding_idx,
            cfg.pad_vocab_to,
        )
    raise ConfigError(f"unknown model.architecture={cfg.architecture}")
