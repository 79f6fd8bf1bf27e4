"""NanoGPT 124M and 162M as transformers has its models; scripts/export_hf.py writes this file beside the weights.

Loading needs `trust_remote_code=True` and nothing of this package but the files that are imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .common import causal_attention
from .nanogpt_124m import NanoGPT124M, rms
from .nanogpt_162m import NanoGPT162M


class NanoGPTConfig(PretrainedConfig):
    """architecture: nanogpt_124m | nanogpt_162m. max_position_embeddings: the length of the rows it was trained on;
    nothing in the model is bound to it."""

    model_type = "ema_nesterov_nanogpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers reads it of the class)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "hidden_size": "width",
    }

    def __init__(
        self,
        architecture: str = "nanogpt_124m",
        vocab_size: int = 50257,
        layers: int = 12,
        heads: int = 12,
        width: int = 768,
        float32_gains: bool = False,
        max_position_embeddings: int = 1024,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.architecture = architecture
        self.vocab_size = vocab_size
        self.layers = layers
        self.heads = heads
        self.width = width
        self.float32_gains = float32_gains
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", architecture == "nanogpt_124m")
        super().__init__(**kwargs)


class NanoGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """`model(input_ids, labels=input_ids)` has the loss, shifted inside, and the logits in float32.

    attention_mask is 1 for tokens and 0 for padding, which may be on either side or between: a padded row has the
    logits of the row without its padding. Generation takes padding on the left.
    """

    config_class = NanoGPTConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["rotary"]  # noqa: RUF012  (positions are rounded in lower precision)
    _tied_weights_keys = {"model.lm_head.weight": "model.transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        c = config
        self.model: NanoGPT124M | NanoGPT162M
        if c.architecture == "nanogpt_124m":
            self.model = NanoGPT124M(c.vocab_size, c.layers, c.heads, c.width)
        else:
            dtype = torch.get_default_dtype()  # from_pretrained makes it the one that is asked for
            shape = (c.vocab_size, c.layers, c.width, c.width // c.heads)
            self.model = NanoGPT162M(*shape, float32_gains=c.float32_gains, dtype=dtype)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """They have begun as in training, where nothing is loaded."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte if isinstance(self.model, NanoGPT124M) else self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head if isinstance(self.model, NanoGPT124M) else self.model.proj

    def parts(self) -> tuple[Callable[[Tensor], Tensor], nn.ModuleList, Callable[[Tensor], Tensor]]:
        """What stands between the embedding and the head: a norm or nothing, the blocks, the last norm."""
        if isinstance(self.model, NanoGPT124M):
            return nn.Identity(), self.model.transformer.h, rms
        return self.model.norm1, self.model.blocks, self.model.norm2

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """labels: the input ids, -100 where no loss is taken; a token behind padding has none either.
        logits_to_keep: of how many of the last tokens, or of which ones; 0: of all.

        attention_mask covers the tokens in the cache too. It has 4 dimensions where it says which keys each token
        sees, and is then of bools. position_ids: by default, each token's number among its row's. hidden_states: what
        goes into each block, and what goes into the head. Raises ValueError for what it cannot honour.
        """
        if output_attentions or self.config.output_attentions:
            raise ValueError("this model never forms its attention weights: leave out output_attentions")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim != 1:
            raise ValueError("logits_to_keep must be a number, or a tensor of 1 dimension: the same places in each row")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("a loss takes all logits: leave out logits_to_keep, or labels")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        embedded = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        mask, positions = visible(attention_mask, embedded, seen)
        if position_ids is not None:
            positions = position_ids
        first_norm, blocks, last_norm = self.parts()
        x, states = first_norm(embedded), []
        for layer, block in enumerate(blocks):
            states += [x] if output_hidden_states else []
            x = block(x, positions, partial(attention, layer=layer, mask=mask, cache=past_key_values))
        x = last_norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(x[:, kept])

        loss = None
        if labels is not None:
            if attention_mask is not None and attention_mask.ndim == 2:  # padding foretells nothing
                before = attention_mask[:, seen:-1]
                labels = labels.masked_fill(F.pad(before, (1, 0), value=1) == 0, -100)
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states else None,
        )

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # generate() reads the signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Raises ValueError where a prompt ends in padding: its next token would be read off there."""
        mask = kwargs.get("attention_mask")
        if kwargs.get("is_first_iteration") and mask is not None and mask.ndim == 2 and not mask[:, -1].all():
            raise ValueError("a prompt ends in padding: pad on the left, with tokenizer.padding_side = 'left'")
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]


def visible(attention_mask: Tensor | None, x: Tensor, seen: int) -> tuple[Tensor | None, Tensor]:
    """The keys that each token of x sees, (batch, 1, time, seen + time), and the positions, (batch, time).

    seen: how many tokens the cache has. No mask: plain causal attention.
    """
    batch, time = x.shape[:2]
    steps = torch.arange(seen + time, device=x.device)
    past, positions = (steps <= steps[seen:, None])[None, None], steps[None, seen:]
    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool:
            raise ValueError("a mask of 4 dimensions must be of bools, as attn_implementation='sdpa' makes it")
        return attention_mask, positions
    if attention_mask is not None and attention_mask.shape != (batch, seen + time):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}: make it {(batch, seen + time)}, a column for each token,"
            " those in the cache included"
        )
    if attention_mask is None or attention_mask.all():
        return past if seen else None, positions
    tokens = attention_mask.to(x.device, torch.bool)
    return past & tokens[:, None, None], (tokens.cumsum(1) - 1).clamp(min=0)[:, seen:]


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, layer: int, mask: Tensor | None, cache: Cache | None
) -> Tensor:
    """`causal_attention` over the cache's keys and the new ones, where the mask is True."""
    if cache is not None:
        places = cache.get_seq_length(layer) + torch.arange(k.size(2), device=k.device)
        k, v = cache.update(k, v, layer, {"cache_position": places})  # a static cache of transformers 5.0 needs them
    if mask is not None:  # layers may be on several devices, and a static cache has room to spare
        mask = F.pad(mask.to(q.device), (0, max(0, k.size(2) - mask.size(3))))
    return causal_attention(q, k, v, scale, mask)
