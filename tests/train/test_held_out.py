"""Held-out loss and bits per byte."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dla_train.config import Config
from dla_train.data.loader import Batch, BatchSource, DataSources, open_sources
from dla_train.data.tokenizer import load_tokenizer
from dla_train.evaluate.bands import Bands
from dla_train.evaluate.held_out import held_out_loss, target_bytes
from dla_train.evaluate.loading import load_model
from dla_train.models.language_model import LanguageModelOutput
from dla_train.train import train
from tests.train.runs import numbers_of

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
    config = tiny("train.validation_batches=2")
    logged = train(config).validation
    model, _, _ = load_model(Path(config.run_dir))
    data = open_sources(config.data, global_batch_rows=8, seed=0, vocab_size=320)
    again = held_out_loss(model, validation(data).validation_batches(2, 0, 1, 4), data.tokenizer, CPU)
    assert logged is not None
    assert again == dataclasses.replace(logged, bands=(), soft_loss=None)


def loss_of_position(tokens: Tensor, cu_seqlens: Tensor) -> LanguageModelOutput:
    """Logits under which a target at position p of its document costs log(1 + 319 exp(-p)) nats, whatever it is."""
    logits = torch.zeros(*tokens.shape, 320)
    starts = set(cu_seqlens.tolist())
    position = 0
    for row, ids in enumerate(tokens.tolist()):
        for column in range(len(ids)):
            position = 0 if row * len(ids) + column in starts else position + 1
            if column + 1 < len(ids):
                logits[row, column, ids[column + 1]] = position
    return LanguageModelOutput(logits=logits, caches=None)


def test_bands_are_of_positions_in_the_document_and_add_up_to_the_whole(sources: DataSources) -> None:
    batches = [
        [
            Batch(
                torch.tensor([[1, 2, 3, 4, 5, 6]]),
                torch.tensor([[2, 3, -100, 5, 6, -100]]),
                torch.tensor([0, 3, 6], dtype=torch.int32),
            )
        ]
    ]
    result = held_out_loss(loss_of_position, batches, sources.tokenizer, CPU, bands=Bands.of(6, [1, 2]))
    at = [math.log(1 + 319 * math.exp(-position)) for position in range(2)]
    assert [(band.first, band.end, band.tokens) for band in result.bands] == [(0, 1, 2), (1, 2, 2)]
    assert [band.loss for band in result.bands] == pytest.approx(at, rel=1e-6)
    assert result.loss == pytest.approx(sum(at) / 2, rel=1e-6)
    numbers = result.numbers()
    assert numbers["validation_loss_1_2"] == result.bands[1].loss and "validation_loss_2_6" not in numbers


def test_a_soft_forward_is_run_on_the_same_rows_and_its_gap_reported(sources: DataSources) -> None:
    seen: list[Tensor] = []

    def soft(tokens: Tensor, cu_seqlens: Tensor) -> LanguageModelOutput:
        seen.append(tokens)
        return loss_of_position(tokens, cu_seqlens)

    batches = list(validation(sources).validation_batches(2))
    result = held_out_loss(uniform, batches, sources.tokenizer, CPU, soft_forward=soft)
    alone = held_out_loss(loss_of_position, batches, sources.tokenizer, CPU)
    assert result.soft_loss == pytest.approx(alone.loss, rel=1e-9)
    assert result.gate_gap == pytest.approx(math.log(320) - alone.loss, rel=1e-6)
    assert all(torch.equal(a, b.tokens) for a, b in zip(seen, [b for part in batches for b in part], strict=True))


def test_a_run_logs_its_bands_and_what_hard_boundaries_cost(tiny: Callable[..., Config]) -> None:
    config = tiny("train.validation_batches=2", "train.validation_band_edges_tokens=[4]")
    result = train(config).validation
    assert result is not None and result.gate_gap is not None and result.gate_gap != 0
    [(_, first, rest, soft, gap)] = numbers_of(
        config.run_dir, "validation_loss_0_4", "validation_loss_4_32", "validation_soft_loss", "validation_gate_gap"
    )
    assert sum(band.loss * band.tokens for band in result.bands) / result.tokens == pytest.approx(result.loss)
    assert [first, rest] == [band.loss for band in result.bands]
    model, data = load_model(config.run_dir)[0], open_sources(config.data, global_batch_rows=8, seed=0, vocab_size=320)
    batches = list(validation(data).validation_batches(2, 0, 1, 4))
    by_hand = held_out_loss(model.train(), batches, data.tokenizer, CPU)
    assert soft == pytest.approx(by_hand.loss, rel=1e-6)
    assert gap == pytest.approx(result.loss - soft, rel=1e-6)


@pytest.mark.parametrize("memory", [["memory.gate=straight_through"], ["memory=single"], ["memory=fixed"]])
def test_where_training_reads_boundaries_as_inference_does_there_is_no_gap(
    tiny: Callable[..., Config], memory: list[str]
) -> None:
    result = train(tiny("train.validation_batches=1", "train.steps=2", *memory)).validation
    assert result is not None and result.soft_loss is None
    assert "validation_gate_gap" not in result.numbers()
