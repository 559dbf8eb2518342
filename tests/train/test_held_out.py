"""Held-out loss and bits per byte."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dla_train.config import Config
from dla_train.data.loader import Batch, BatchSource, DataSources, open_sources
from dla_train.data.tokenizer import load_tokenizer
from dla_train.evaluate.held_out import held_out_loss, target_bytes
from dla_train.models.language_model import LanguageModelOutput

CPU = torch.device("cpu")


def uniform(tokens: Tensor, cu_seqlens: Tensor) -> LanguageModelOutput:
    return LanguageModelOutput(logits=torch.zeros(*tokens.shape, 320), caches=None)


@pytest.fixture
def sources(tiny: Callable[..., Config]) -> DataSources:
    return open_sources(tiny().data, global_batch_rows=4, seed=0, vocab_size=320)


def validation(sources: DataSources) -> BatchSource:
    assert sources.validation is not None
    return sources.validation


def test_a_uniform_model_loses_log_vocabulary_per_token(sources: DataSources) -> None:
    result = held_out_loss(uniform, validation(sources).validation_batches(2), sources.tokenizer, CPU)
    assert result.loss == pytest.approx(math.log(320), rel=1e-6)
    bits = result.tokens * math.log2(320)
    assert result.bits_per_byte == pytest.approx(bits / result.text_bytes)


def test_the_result_does_not_depend_on_micro_batches_or_ranks(sources: DataSources) -> None:
    source = validation(sources)
    whole = held_out_loss(uniform, source.validation_batches(2, 0, 1, 4), sources.tokenizer, CPU)
    parts = [held_out_loss(uniform, source.validation_batches(2, rank, 2), sources.tokenizer, CPU) for rank in (0, 1)]
    assert sum(part.tokens for part in parts) == whole.tokens
    assert sum(part.text_bytes for part in parts) == whole.text_bytes


@pytest.mark.parametrize(
    "text", ["plain words and spaces", "Gr\u00fc\u00dfe, \u4f60\u597d", " leading space", "a  b\n\tc"]
)
def test_target_bytes_are_the_bytes_of_the_text_after_the_first_token(tiny: Callable[..., Config], text: str) -> None:
    tokenizer = load_tokenizer(tiny().data.tokenizer)
    ids = tokenizer.encode(text)
    targets = [*ids[1:], tokenizer.eos_id]
    batch = Batch(torch.tensor([ids]), torch.tensor([targets]), torch.tensor([0, len(ids)], dtype=torch.int32))
    assert target_bytes(batch, tokenizer) == len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())


def test_masked_targets_have_no_bytes_and_split_the_text(tiny: Callable[..., Config]) -> None:
    tokenizer = load_tokenizer(tiny().data.tokenizer)
    first, second = tokenizer.encode("line one"), tokenizer.encode("Gr\u00fc\u00dfe")
    tokens = [*first, *second]
    targets = [*first[1:], -100, *second[1:], -100]
    batch = Batch(torch.tensor([tokens]), torch.tensor([targets]), torch.tensor([0, len(tokens)], dtype=torch.int32))
    heads = len(tokenizer.decode(first[:1]).encode()) + len(tokenizer.decode(second[:1]).encode())
    assert target_bytes(batch, tokenizer) == len(b"line one") + len("Gr\u00fc\u00dfe".encode()) - heads


def test_one_pass_counts_every_byte_but_those_of_the_documents_first_tokens(sources: DataSources) -> None:
    """Rows overlap by one token, so their targets are the whole stream; a document's first token is never a target."""
    source, decode = validation(sources), sources.tokenizer.decode
    result = held_out_loss(uniform, source.validation_batches(10**6), sources.tokenizer, CPU)
    rest, expected = source.rows * source.context_tokens + 1, 0
    for index in range(source.files.documents):
        ids = source.files.read(index).tolist()[:rest]
        rest -= len(ids)
        expected += len(decode(ids).encode()) - len(decode(ids[:1]).encode())
    assert result.text_bytes == expected > 0


def test_nothing_to_predict_is_an_error(sources: DataSources) -> None:
    empty = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), -100), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="no targets"):
        held_out_loss(uniform, [[empty]], sources.tokenizer, CPU)


def test_the_loss_of_a_trained_run_is_reproduced_from_its_checkpoint(tiny: Callable[..., Config]) -> None:
    from dla_train.evaluate.loading import load_model
    from dla_train.train import train

    config = tiny("train.validation_batches=2")
    logged = train(config).validation
    model, _, _ = load_model(Path(config.run_dir))
    data = open_sources(config.data, global_batch_rows=8, seed=0, vocab_size=320)
    again = held_out_loss(model, validation(data).validation_batches(2, 0, 1, 4), data.tokenizer, CPU)
    assert again == logged
