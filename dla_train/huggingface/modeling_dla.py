"""The model class of an exported folder: `LanguageModel` behind the interface of transformers.

This file is copied into every exported folder with all modules it needs (bundle.py). Decoding keeps this project's
caches, which for recurrent mixers have a fixed size. Left padding of a batch is a document of its own in front of the
text, so that what is read after it does not depend on it; padding anywhere else would enter the memory and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dla_train.config import MemoryConfig, ModelConfig
from dla_train.huggingface.configuration_dla import DLAConfig
from dla_train.models.attention import KeyValueCache
from dla_train.models.language_model import LanguageModel
from dla_train.models.loss import next_token_loss
from dla_train.models.mixer import Cache
from dla_train.models.recurrent import RecurrentMixer

KEPT_IN_FLOAT32 = ("mixer_norm", "mlp_norm", "final_norm", "norm", "conv", "decay", "reader")
"""Parts that the model reads in float32 whatever it computes in: rounded to 16 bits, decays and thresholds change."""


class DLACache:
    """Decode memory of all layers. Made by a forward with `use_cache`; continued in place by a forward of one token."""

    def __init__(self, layers: list[Cache], tokens: int) -> None:
        self.layers, self.tokens = layers, tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding in front included."""
        return self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' caches."""
        return sum(layer.nbytes for layer in self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences `beam_idx` [B], in that order (beam search)."""
        self.layers = [layer.take(beam_idx.to(layer.position.device)) for layer in self.layers]

    def make_room(self) -> None:
        """Double softmax attention's keys and values where they are full; recurrent memories do not grow."""
        for layer in self.layers:
            if isinstance(layer, KeyValueCache) and layer.length == layer.keys.shape[1]:
                layer.keys, layer.values = (torch.cat([x, torch.zeros_like(x)], 1) for x in (layer.keys, layer.values))


class DLAForCausalLM(PreTrainedModel, GenerationMixin):
    """Token ids to next-token logits, for `AutoModelForCausalLM`, `generate` and pipelines."""

    config_class = DLAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _is_stateful = True

    def __init__(self, config: DLAConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(
            ModelConfig(**config.architecture),
            MemoryConfig(**config.memory),
            compute_dtype=torch.get_default_dtype(),  # transformers sets it to the dtype asked for
        )
        parts = {part for name, _ in self.named_parameters() for part in name.split(".")}
        self._keep_in_fp32_modules_strict = [name for name in KEPT_IN_FLOAT32 if name in parts]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DLACache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids [B, T] -> logits [B, T, vocab]; with `labels` [B, T] (-100 is not counted) also the mean loss.

        attention_mask: 1 at text and 0 at padding, which must lie in front; of a continued cache only the last T
        columns are read. Raises ValueError for padding elsewhere.
        """
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        tokens, past = input_ids.shape[1], past_key_values
        offsets = _documents(attention_mask, tokens, continued=past is not None)
        if past is not None:
            past.make_room()
        if past is not None and tokens == 1 and use_cache and not torch.is_grad_enabled():
            logits = self.model.step(input_ids[:, 0], past.layers)[:, None]
            past.tokens += 1
        else:
            before = past.layers if past is not None else None
            kept = _last(input_ids, logits_to_keep)
            out = self.model(input_ids, offsets, caches=before, return_caches=use_cache, positions=kept)
            logits = out.logits.view(len(input_ids), -1, out.logits.shape[-1])
            seen = past.tokens if past is not None else 0
            past = DLACache(out.caches, seen + tokens) if out.caches is not None else None
        loss = _loss(logits, labels) if labels is not None else None
        if return_dict is False:
            return tuple(x for x in (loss, logits, past) if x is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past if use_cache else None)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: DLACache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,  # positions and the like: each release of transformers hands over others, a memory needs none
    ) -> dict[str, Any]:
        """What `generate` gives to forward: the tokens that the cache has not read yet."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The cache is made by the first forward, never by `generate`."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: the vocabulary is part of the model's description."""
        raise ValueError(
            "the vocabulary of a DLA model cannot be changed after training; train with another vocab_size"
        )

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where the embedding is read backwards instead."""
        return self.model.head

    def _init_weights(self, module: nn.Module) -> None:
        """Counters are in no file; everything else is."""
        if isinstance(module, RecurrentMixer):
            module.statistics.zero_()


def _documents(mask: Tensor | None, tokens: int, *, continued: bool) -> Tensor | None:
    """Offsets that make the padding in front of every row a document of its own; None where there is none."""
    if mask is None or bool((mask := mask[:, -tokens:].bool()).all()):
        return None
    if continued or not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError(
            "attention_mask has zeros behind a row's first token, where padding would be written into the memory; "
            "pad on the left (tokenizer.padding_side='left')"
        )
    starts = torch.arange(mask.shape[0] + 1, device=mask.device) * tokens
    return torch.cat([starts, starts[:-1] + (~mask).sum(1)]).unique()


def _last(tokens: Tensor, count: int) -> Tensor | None:
    """Where the last `count` tokens of every row are among all tokens [B, T]; None stands for all of them."""
    if not count:
        return None
    return torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)[:, -count:].flatten()


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    nats, _, count = next_token_loss(logits[:, :-1], labels[:, -logits.shape[1] :][:, 1:])
    return nats / count
