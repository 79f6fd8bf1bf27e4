"""Llama at the sizes of the paper's C4 experiments: transformers' own model behind our two calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .common import causal_attention, language_model_loss, pad_rows


class Llama(nn.Module):
    """`model(inputs, targets)` is the mean loss over targets != -100, `model(inputs)` the logits.

    inputs, targets: (batch, time) int64 tokens below vocab_size; targets are already shifted. Linear
    and embedding weights start at N(0, 0.02^2), and the embedding row `padding_idx` stays 0 and takes
    no gradient, as in the released code. `self.llama` is a `transformers.LlamaForCausalLM`.
    """

    def __init__(
        self,
        vocab_size: int,
        layers: int,
        heads: int,
        width: int,
        mlp_width: int,
        max_seq_len: int,
        padding_idx: int | None,
        pad_vocab_to: int = 1,
    ):
        super().__init__()
        from transformers import (  # slow to import: only Llama runs pay
            AttentionInterface,
            LlamaConfig,
            LlamaForCausalLM,
        )

        AttentionInterface.register("causal", attention)
        self.vocab_size = vocab_size
        options: dict[str, Any] = dict(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=mlp_width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=max_seq_len,
            rms_norm_eps=1e-6,
            initializer_range=0.02,
            tie_word_embeddings=False,
            attn_implementation="causal",
            pad_token_id=padding_idx,
            bos_token_id=None,
            eos_token_id=1,
            use_cache=False,
        )
        self.llama = LlamaForCausalLM(LlamaConfig(**options))
        for table in (self.llama.model.embed_tokens, self.llama.lm_head):
            table.weight = pad_rows(table.weight, pad_vocab_to)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.llama(input_ids=inputs).logits[..., : self.vocab_size].float()
        return logits if targets is None else language_model_loss(logits, targets)


def attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """transformers' own way to SDPA builds a mask when it is compiled, which shuts out flash attention."""
    return causal_attention(q, k, v, scaling).transpose(1, 2).contiguous(), None
