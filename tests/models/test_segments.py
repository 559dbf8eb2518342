"""Rows in segments with carried memory: the numbers of whole rows, gradients that end where a segment begins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_train.data.batch import Batch
from dla_train.segments import SegmentedForward, segments_of
from tests.tolerances import assert_close

KINDS = [(b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")]
CPU, TOKENS, SEGMENT = torch.device("cpu"), 24, 8
CROSSING = (0, 5, 16, 24, 27, 48)
"""Two rows: documents that cross a segment's edge, begin at one, and fill a row but for its first tokens."""
INSIDE = (0, 3, 8, 16, 20, 24, 32, 40, 44, 48)
"""Documents that lie within segments."""


def batch_of(edges):
    tokens = torch.randint(0, 17, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    return Batch(tokens, tokens.roll(-1, dims=1), torch.tensor(edges, dtype=torch.int32))


def loss_of(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def in_segments(model, batch, size, backward=True):
    """Logits [B, T, vocab] of a pass in segments; gradients are added as training does."""
    found, forward = [], SegmentedForward(model, CPU)
    for segment in segments_of(batch, size):
        logits, targets = forward(segment, gate_temperature=0.7)
        if backward:
            loss_of(logits, targets).backward()
        found.append(logits.detach())
    return torch.cat(found, dim=1)


def gradients_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_logits_are_those_of_whole_rows(tiny, build, backbone, policy, training) -> None:
    model, batch = build(*tiny(backbone, policy)).train(training), batch_of(CROSSING)
    whole = model(batch.tokens, batch.cu_seqlens, gate_temperature=0.7).logits
    assert_close("logits", in_segments(model, batch, SEGMENT, backward=False), whole)


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_gradients_are_those_of_whole_rows_where_no_document_crosses(tiny, build, backbone, policy) -> None:
    model, batch = build(*tiny(backbone, policy)).train(), batch_of(INSIDE)
    loss_of(model(batch.tokens, batch.cu_seqlens, gate_temperature=0.7).logits, batch.targets).backward()
    whole = gradients_of(model)
    in_segments(model, batch, SEGMENT)
    for name, gradient in gradients_of(model).items():
        assert_close(name, gradient, whole[name])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_gradients_end_where_a_segment_begins(tiny, build, backbone, policy, recompute) -> None:
    """Those of the last segment alone, read by a second model whose memory before it was made without gradients."""
    model, memory = tiny(backbone, policy)
    segmented, plain = build(model, memory, recompute=recompute).train(), build(model, memory).train()
    batch = batch_of((0, TOKENS, 2 * TOKENS))
    *earlier, last = segments_of(batch, SEGMENT)
    forward = SegmentedForward(segmented, CPU)
    for segment in earlier:
        forward(segment, gate_temperature=0.7)
    loss_of(*forward(last, gate_temperature=0.7)).backward()
    with torch.no_grad():
        before = plain(batch.tokens[:, :-SEGMENT], gate_temperature=0.7, return_caches=True).caches
    loss_of(plain(last.batch.tokens, gate_temperature=0.7, caches=before).logits, last.batch.targets).backward()
    wanted = gradients_of(plain)
    for name, gradient in gradients_of(segmented).items():
        assert_close(name, gradient, wanted[name])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_segments_hold_every_token_with_its_document(data) -> None:
    size, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    rows, length = data.draw(st.integers(1, 3)), size * count
    starts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)))
    starts.view(rows, length)[:, 0] = True
    edges = torch.cat([starts.nonzero().flatten(), torch.tensor([rows * length])]).int()
    tokens = torch.arange(rows * length).view(rows, length)
    pieces = list(segments_of(Batch(tokens, -tokens, edges), size))
    assert [(piece.first, piece.last) for piece in pieces] == [(i == 0, i == count - 1) for i in range(count)]
    assert torch.equal(torch.cat([piece.batch.tokens for piece in pieces], dim=1), tokens)
    assert torch.equal(torch.cat([piece.batch.targets for piece in pieces], dim=1), -tokens)
    begins = []
    for piece in pieces:
        own = torch.zeros(rows * size, dtype=torch.bool)
        own[piece.batch.cu_seqlens[:-1].long()] = True
        own = own.view(rows, size)
        assert bool(own[:, 0].all()) and piece.batch.cu_seqlens[-1] == rows * size
        own[:, 0] &= ~piece.goes_on
        begins.append(own)
    assert torch.equal(torch.cat(begins, dim=1), starts.view(rows, length))


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 24 tokens do not divide into segments of 7"):
        next(segments_of(batch_of(INSIDE), 7))
