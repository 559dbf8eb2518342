"""Decoder language models, backbone (mamba2, gated_deltanet, attention) x memory policy; initialisation, cost, loss."""

from dla_train.models.cost import FlopCount, cache_bytes, flops_per_token, parameter_count
from dla_train.models.init import InitError, init_weights, initial_value
from dla_train.models.language_model import LanguageModel, LanguageModelOutput
from dla_train.models.loss import next_token_loss

__all__ = [
    "FlopCount",
    "InitError",
    "LanguageModel",
    "LanguageModelOutput",
    "cache_bytes",
    "flops_per_token",
    "init_weights",
    "initial_value",
    "next_token_loss",
    "parameter_count",
]
