"""A linear head on the mean of an encoder's hidden states, as a model of transformers.

The file imports nothing of Lorica: `save_pretrained` copies it beside the weights, so that transformers can load a
merged model where Lorica is not installed (`trust_remote_code=True`).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledConfig(PreTrainedConfig):  # type: ignore[misc]
    """The encoder's configuration as `text_config`, and beside it the labels."""

    model_type = "mean-pooled-classifier"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(self, text_config: PreTrainedConfig | dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        # Afterwards: the line above would reset the encoder's kind of attention.
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config


class MeanPooledClassifier(PreTrainedModel):  # type: ignore[misc]
    """An encoder with a linear head on the mean of its last hidden states, without padding.

    `logits = W · (Σ_t m_t h_t / Σ_t m_t) + c` with the attention mask `m (n, t)` and hidden states `h (n, t, d)`.

    Args:
        encoder: the loaded encoder; by default it is made from `config.text_config`, with new weights.
    """

    config_class = MeanPooledConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: MeanPooledConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.text_config) if encoder is None else encoder
        self.supports_gradient_checkpointing = self.encoder.supports_gradient_checkpointing
        self.classifier = nn.Linear(self.encoder.config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(mean))


# A copy of this file, beside a merged model, registers its own classes.
AutoConfig.register(MeanPooledConfig.model_type, MeanPooledConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MeanPooledConfig, MeanPooledClassifier, exist_ok=True)
MeanPooledConfig.register_for_auto_class()
MeanPooledClassifier.register_for_auto_class("AutoModelForSequenceClassification")
