"""Padding of best_fit rows: its tokens, one document each, reach no other token, no loss and no gradient."""

from pathlib import Path

import pytest
import torch

from dla_train.data.batch import Batch, micro_batches
from dla_train.data.best_fit import BestFit
from dla_train.evaluate.loading import build_model
from dla_train.hydra_app import compose
from dla_train.models.loss import next_token_loss
from tests.data.conftest import numbered_files

MODELS = (["model=gated_deltanet_tiny"], ["model=mamba2_tiny"], ["model=transformer_tiny", "memory=none"])


@pytest.mark.parametrize("choice", MODELS, ids=[words[0].partition("=")[2] for words in MODELS])
def test_padding_changes_nothing_that_counts(tmp_path: Path, choice: list[str]) -> None:
    packing = BestFit(numbered_files(tmp_path, [13, 9, 21, 40]), 32)  # rows of 21 + 9, 13 + 8 and 32 of 32 tokens
    rows = packing.epoch(0, 0).cut(torch.arange(packing.rows).numpy())
    (batch,) = micro_batches(rows, packing.rows)
    padding = batch.tokens == 0
    assert 0 < padding.sum() == packing.report().padding_tokens
    assert (batch.targets[padding] == -100).all()
    config = compose(["experiment=quickstart", "model.vocab_size=320", "memory=dla", *choice])
    model = build_model(config, "cpu").train()

    if "memory=none" not in choice:
        model(batch.tokens, batch.cu_seqlens)
        decisions = model.memory_statistics()[:, :, 1].unique().tolist()
        assert decisions == [batch.tokens.numel() - (batch.cu_seqlens.numel() - 1)]  # all but documents' first tokens
        model.reset_memory_statistics()

    def run(batch: Batch, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        logits = model(tokens, batch.cu_seqlens).logits
        loss = next_token_loss(logits, batch.targets)[0]
        model.zero_grad()
        loss.backward()
        return logits[~padding], loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    logits, loss, gradients = run(batch, batch.tokens)
    # other ids at padding: a gradient into them would move from one row of the embedding to others
    others = torch.where(padding, torch.randint(300, 320, batch.tokens.shape), batch.tokens)
    for got, expected in zip(run(batch, others), (logits, loss, gradients), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
