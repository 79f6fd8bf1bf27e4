"""NanoGPT 124M: the GPT-2 small shape of modded-nanogpt's first Muon record.

    x <- wte[tokens]
    x <- x + s Attention(rms(x)),  s = 1 / sqrt(2 layers)
    x <- x + MLP(rms(x))                                    for each block
    logits = rms(x) wte^T

No biases, no norm weights, rotary positions, one tied table. Module names are those of the released
code, so its state dicts load.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Attend, causal_attention, language_model_loss, pad_rows, rotate


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last dimension, computed in float32."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=1e-6).type_as(x)


class Rotary(nn.Module):
    inv_freq: Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        self.register_buffer("inv_freq", (1 / 10000) ** (torch.arange(0, head_dim, 2) / head_dim))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return rotate(x, self.inv_freq, positions)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.rotary = Rotary(width // heads)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, attend: Attend = causal_attention
    ) -> Tensor:  # (batch, time, width)
        batch, time, width = x.shape
        q, k, v = (part.view(batch, time, self.heads, -1) for part in self.c_attn(x).split(width, dim=-1))
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.c_proj(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = MLP(width)
        self.attn_scale = 1 / math.sqrt(2 * layers)

    def forward(self, x: Tensor, positions: Tensor | None = None, attend: Attend = causal_attention) -> Tensor:
        x = x + self.attn_scale * self.attn(rms(x), positions, attend)
        return x + self.mlp(rms(x))


class Transformer(nn.Module):
    def __init__(self, vocab_size: int, layers: int, heads: int, width: int):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, width)
        self.h = nn.ModuleList([Block(width, heads, layers) for _ in range(layers)])

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.wte(inputs)
        for block in self.h:
            x = block(x)
        return x


class NanoGPT124M(nn.Module):
    """`model(inputs, targets)` is the mean loss over targets != -100, `model(inputs)` the logits.

    inputs, targets: (batch, time) int64 tokens below vocab_size. `pad_vocab_to` rounds the rows of the
    table up to a multiple; the added rows start at zero, never enter the loss and never move.
    Initialised as PyTorch does: every weight uniform in +-1/sqrt(fan_in), the table included.
    """

    def __init__(self, vocab_size: int, layers: int, heads: int, width: int, pad_vocab_to: int = 1):
        super().__init__()
        self.vocab_size = vocab_size
        self.transformer = Transformer(vocab_size, layers, heads, width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight = pad_rows(self.lm_head.weight, pad_vocab_to)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.logits(rms(self.transformer(inputs)))
        return logits if targets is None else language_model_loss(logits, targets)

    def logits(self, x: Tensor) -> Tensor:
        """x: what the last norm gives."""
        return self.lm_head(x)[..., : self.vocab_size].float()
