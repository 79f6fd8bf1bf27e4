"""NanoGPT 124M and 162M as transformers has its models; scripts/export_hf.py writes this file beside the weights.

Loading needs `trust_remote_code=True` and nothing of this package but the files that are imported here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .nanogpt_124m import NanoGPT124M
from .nanogpt_162m import NanoGPT162M


class NanoGPTConfig(PretrainedConfig):
    """architecture: nanogpt_124m | nanogpt_162m. max_position_embeddings: the length of the rows it was trained on;
    nothing in the model is bound to it."""

    model_type = "ema_nesterov_nanogpt"
    attribute_map = {  # noqa: RUF012  (transformers reads it of the class)
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
        **kwargs: Any,
    ):
        self.architecture = architecture
        self.vocab_size = vocab_size
        self.layers = layers
        self.heads = heads
        self.width = width
        self.float32_gains = float32_gains
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = False
        kwargs.setdefault("tie_word_embeddings", architecture == "nanogpt_124m")
        super().__init__(**kwargs)


class NanoGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """`model(input_ids, labels=input_ids)` has the loss, shifted inside, and the logits in float32.

    Batches are padded on the right, where causal attention does not see it. Padding on the left is not supported,
    and refused by its mask: texts of different lengths are generated from one at a time. There is no cache of keys
    and values: every token that is generated runs the model over the whole text.
    """

    config_class = NanoGPTConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
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

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        """labels: the input ids, -100 where no loss is taken. Raises ValueError for padding on the left."""
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("this model takes padding on the right alone; set padding_side='right'")
        logits = self.model(input_ids)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The whole text each time, also for a caller that asks for a cache."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}
