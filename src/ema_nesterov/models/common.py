"""The few pieces that the models share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def rotate(x: Tensor, frequencies: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotary positions on x (batch, time, heads, dim), half-split: (x1, x2) turned by -position * frequency.

    frequencies: (dim / 2,) radians per position. positions: (batch or 1, time), default 0, 1, ... In float32, and
    rounded once, as in the reference files.
    """
    if positions is None:
        positions = torch.arange(x.size(1), device=x.device, dtype=torch.float32)
    angle = (positions[..., None] * frequencies).unsqueeze(-2)  # (..., time, 1, dim / 2)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).type_as(x)


def slow_in_bfloat16(q: Tensor) -> bool:
    """SDPA's backward pass on a CPU takes 5 times as long in bfloat16 as in float32 (torch 2.13, with AMX)."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


Attend = Callable[..., Tensor]  # called as `causal_attention` is; modeling_nanogpt.py has one with a mask and a cache


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v over the past and present, or where the mask is True; scale: 1 / sqrt(dim).

    q, k, v: (batch, heads, time, dim). mask: (batch or 1, 1, time of q, time of k).
    """
    if slow_in_bfloat16(q):
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float(), scale, mask).type_as(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the targets that are not -100; logits (batch, time, vocab) in float32."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def pad_rows(weight: Tensor, multiple: int) -> nn.Parameter:
    """The weight with zero rows appended up to a multiple: fast matrix shapes, the same values."""
    padded = nn.Parameter(F.pad(weight.detach(), (0, 0) * (weight.ndim - 1) + (0, -weight.size(0) % multiple)))
    padded.own_rows = weight.size(0)  # type: ignore[attr-defined]
    return padded


def own(parameter: Tensor) -> Tensor:
    """The parameter without the rows that `pad_rows` appended."""
    return parameter[: parameter.own_rows] if hasattr(parameter, "own_rows") else parameter


def count_parameters(model: nn.Module) -> int:
    return sum(own(p).numel() for p in model.parameters())


def checkpoint_blocks(model: nn.Module) -> None:
    """Activation checkpointing: a block keeps nothing but its input, and the backward pass computes the rest again.

    Blocks are what the model holds in a ModuleList. Raises ValueError when there are none.
    """
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks in a ModuleList")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
