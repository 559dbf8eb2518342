"""A language model over a recall task's tokens: the project's layers, with an embedding for tokens of several parts.

A paired token is a key and a value at once; its columns are one id in mixed radix, so that every other part of the
model, its caches and its reports see a plain token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dla_train.config import Config
from dla_train.models.backbone import Decay
from dla_train.models.build import meta_model
from dla_train.models.cost import parameter_count
from dla_train.models.init import init_weights
from dla_train.models.language_model import LanguageModel


class SummedEmbedding(nn.Module):
    """Embedding of a token of several columns: the sum of one row for each; `weight` [sum of vocabulary, D]."""

    def __init__(self, vocabulary: Sequence[int], width: int) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.weight = nn.Parameter(torch.empty(sum(vocabulary), width))

    def forward(self, x: Tensor, *, dtype: torch.dtype = torch.float32, scatter_time: bool = False) -> Tensor:
        """Mixed-radix ids [...] int64 -> [..., D] in `dtype`. Time cannot be divided over ranks here."""
        assert not scatter_time
        parts, first = [], 0
        for column, size in zip(token_columns(x, self.vocabulary), self.vocabulary, strict=True):
            parts.append(self.weight[column + first])
            first += size
        return torch.stack(parts).sum(0).to(dtype)


def token_ids(inputs: Tensor, vocabulary: Sequence[int]) -> Tensor:
    """A task's inputs, [B, T] or [B, T, columns] -> one id a token [B, T]; the first column counts most."""
    if inputs.dim() == 2:
        return inputs
    ids = inputs[..., 0]
    for column, size in enumerate(vocabulary[1:], start=1):
        ids = ids * size + inputs[..., column]
    return ids


def token_columns(ids: Tensor, vocabulary: Sequence[int]) -> list[Tensor]:
    """The columns that `token_ids` made ids [...] of, each [...]."""
    columns = []
    for size in reversed(vocabulary[1:]):
        columns.append(ids % size)
        ids = ids // size
    return [ids, *reversed(columns)]


def build_recall_model(
    config: Config,
    vocabulary: Sequence[int],
    device: torch.device | str,
    decay_rate: float | None,
    step_size: float | None,
) -> LanguageModel:
    """The initialised model of one run. Parameters of one name and shape begin alike in every arm of a seed.

    decay_rate, step_size: A and dt of every head at the start; None is as in pretraining.
    """
    model = meta_model(config)
    with torch.device("meta"):
        if _own_embedding(config, vocabulary):
            model.embedding = SummedEmbedding(vocabulary, config.model.width)  # type: ignore[assignment]
    init_weights(model, config.seed, device=device)
    for module in model.modules():
        if isinstance(module, Decay):
            _begin(module.A_log, None if decay_rate is None else math.log(decay_rate))
            _begin(module.dt_bias, None if step_size is None else math.log(math.expm1(step_size)))
    return model


@torch.no_grad()
def _begin(parameter: Tensor, value: float | None) -> None:
    if value is not None:
        parameter.fill_(value)


def count_parameters(config: Config, vocabulary: Sequence[int]) -> int:
    """Parameters of one run's model."""
    other_rows = sum(vocabulary) - config.model.vocab_size if _own_embedding(config, vocabulary) else 0
    return parameter_count(config.model, config.memory) + other_rows * config.model.width


def _own_embedding(config: Config, vocabulary: Sequence[int]) -> bool:
    """Whether a token is anything else than one of the answers, which are the model's vocabulary."""
    return tuple(vocabulary) != (config.model.vocab_size,)
