"""The configuration class of an exported model. This file is copied into every exported folder."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class DLAConfig(PretrainedConfig):
    """A DLA language model: `architecture` is dla_train's `ModelConfig`, `memory` its `MemoryConfig`, by field."""

    model_type = "dla"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        memory: dict[str, Any] | None = None,
        use_cache: bool = True,
        **kwargs: Any,  # transformers hands its own settings through here, and the base class checks them
    ) -> None:
        self.architecture = dict(architecture or {})
        self.memory = dict(memory or {})
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = False  # a tied model has one matrix, which it reads in both directions
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.architecture["vocab_size"])

    @property
    def hidden_size(self) -> int:
        """D, the model width."""
        return int(self.architecture["width"])

    @property
    def num_hidden_layers(self) -> int:
        """Residual blocks."""
        return int(self.architecture["num_layers"])

    @property
    def num_attention_heads(self) -> int:
        """H, heads of a mixer."""
        return int(self.architecture["num_heads"])
