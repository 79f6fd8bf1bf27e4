"""NanoGPT 162M: the fixed architecture of modded-nanogpt's optimization track.

    x <- norm(embed[tokens])
    x <- x + Attention(norm(x))       q and k normalised, then rotated; scale 0.12
    x <- x + MLP(norm(x))             relu squared
    logits = 15 z / sqrt(z^2 + 225),  z = norm(x) W^T + b

Untied head, biases everywhere, norms with gains. There is no autocast: the embedding's dtype is the
dtype of the activations, and every other weight is float32 and cast where it is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Attend, causal_attention, language_model_loss, pad_rows, rotate


class Norm(nn.Module):
    def __init__(self, width: int, float32_gains: bool):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(width))
        self.float32_gains = float32_gains

    def forward(self, x: Tensor) -> Tensor:
        if self.float32_gains:
            return (F.rms_norm(x.float(), (x.size(-1),)) * self.gains).type_as(x)
        return F.rms_norm(x, (x.size(-1),), weight=self.gains.type_as(x))


class Linear(nn.Linear):
    """float32 weights, cast to the input's dtype for the product."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.linear(x, self.weight.type_as(x), self.bias.type_as(x))


class Rotary(nn.Module):
    """Half of the frequencies run from 1 to 1/1024, the other half are 0: no rotation."""

    angular_freq: Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        turning = (1 / 1024) ** torch.linspace(0, 1, steps=head_dim // 4, dtype=torch.float32)
        self.register_buffer("angular_freq", torch.cat([turning, turning.new_zeros(head_dim // 4)]))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return rotate(x, self.angular_freq, positions)


class Attention(nn.Module):
    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (Linear(width, width) for _ in range(4))
        self.rotary = Rotary(head_dim)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, attend: Attend = causal_attention
    ) -> Tensor:  # (batch, time, width)
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)
        q, k = (self.rotary(F.rms_norm(part, (self.head_dim,)), positions) for part in (q, k))
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=0.12)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc = Linear(width, 4 * width)
        self.proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.fc(x).relu().square())


class Block(nn.Module):
    def __init__(self, width: int, head_dim: int, float32_gains: bool):
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.mlp = MLP(width)
        self.norm1 = Norm(width, float32_gains)
        self.norm2 = Norm(width, float32_gains)

    def forward(self, x: Tensor, positions: Tensor | None = None, attend: Attend = causal_attention) -> Tensor:
        x = x + self.attn(self.norm1(x), positions, attend)
        return x + self.mlp(self.norm2(x))


class NanoGPT162M(nn.Module):
    """`model(inputs, targets)` is the mean loss over targets != -100, `model(inputs)` the logits.

    inputs, targets: (batch, time) int64 tokens below vocab_size. dtype: of the embedding, hence of the
    activations. The record sums its loss over the tokens of a step where this takes the mean: divide
    Adam's eps by that number to match it.
    """

    def __init__(
        self,
        vocab_size: int,
        layers: int,
        width: int,
        head_dim: int,
        init: str = "normal",
        float32_gains: bool = False,
        pad_vocab_to: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList([Block(width, head_dim, float32_gains) for _ in range(layers)])
        self.proj = Linear(width, vocab_size)
        self.norm1 = Norm(width, float32_gains)
        self.norm2 = Norm(width, float32_gains)
        {"normal": self.initialize, "record30": self.initialize_record30}[init]()
        self.embed.to(dtype)
        for module, name in ((self.embed, "weight"), (self.proj, "weight"), (self.proj, "bias")):
            setattr(module, name, pad_rows(getattr(module, name), pad_vocab_to))

    @torch.no_grad()
    def initialize(self) -> None:
        """Output projections 0, embedding N(0, 1), other matrices N(0, 0.33 / fan_in), biases 0, gains 1."""
        for name, p in self.named_parameters():
            if "gains" in name:
                p.fill_(1.0)
            elif "proj" in name or "bias" in name:
                p.zero_()
            elif "embed" in name:
                p.normal_()
            else:
                p.normal_(std=(0.33 / p.size(1)) ** 0.5)

    @torch.no_grad()
    def initialize_record30(self) -> None:
        """torch's own, but output projections 0, the MLP's first matrix smaller with depth, and the gains of a
        block's two norms split by random signs s: 1 - 0.14 s before attention, 1 + 0.14 s before the MLP."""
        for name, p in self.named_parameters():
            if "proj" in name:
                p.zero_()
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.mlp.fc.weight.mul_(1 - 0.3 * i / max(1, len(self.blocks) - 1))
            signs = 2.0 * torch.randint(0, 2, block.norm1.gains.shape, device=block.norm1.gains.device) - 1
            block.norm1.gains.copy_(1 - 0.14 * signs)
            block.norm2.gains.copy_(1 + 0.14 * signs)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.norm1(self.embed(inputs))
        for block in self.blocks:
            x = block(x)
        logits = self.logits(self.norm2(x))
        return logits if targets is None else language_model_loss(logits, targets)

    def logits(self, x: Tensor) -> Tensor:
        """x: what the last norm gives."""
        z = self.proj(x)[..., : self.vocab_size].float()
        return 15 * z * torch.rsqrt(z.square() + 15**2)
