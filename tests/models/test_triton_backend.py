"""A language model whose memory runs in Triton: the loss, gradients and decoded tokens of the torch backend."""

import pytest
import torch
from tolerances import RMS_FLOAT32, assert_rms_close

from dla_train.generate import prefill
from dla_train.models import next_token_loss

pytest.importorskip("triton", reason="needs Triton")

OFFSETS = torch.tensor([0, 5, 19, 20, 38])


def tokens_of(*shape):
    return torch.randint(0, 17, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("backbone", "recompute"), [("mamba2", False), ("gated_deltanet", True)])
def test_loss_and_gradients_equal_those_of_torch(tiny, build, backbone, recompute):
    results = []
    for backend in ("torch", "triton"):
        model, memory = tiny(backbone, "dla", backend=backend, chunk_tokens=16, num_layers=1)
        lm = build(model, memory, dtype=torch.float32, recompute=recompute).train()
        output = lm(tokens_of(2, 19), OFFSETS)
        loss = next_token_loss(output.logits, tokens_of(2, 19))[0]
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}))
    assert_rms_close("loss", results[1][0], results[0][0], RMS_FLOAT32)
    assert results[0][1].keys() == results[1][1].keys()
    for name, expected in results[0][1].items():
        # layers of float32 sums in another order, through gates that are steep in their scores
        assert_rms_close(name, results[1][1][name], expected, 100 * RMS_FLOAT32)


@pytest.mark.parametrize("backbone", ["mamba2", "gated_deltanet"])
@torch.no_grad()
def test_prefill_and_steps_equal_those_of_torch(tiny, build, backbone):
    outputs, tokens = [], tokens_of(2, 24)
    for backend in ("torch", "triton"):
        model, memory = tiny(backbone, "dla", backend=backend, chunk_tokens=16, num_layers=1)
        lm = build(model, memory, dtype=torch.float32).eval()
        logits, caches = prefill(lm, tokens[:, :19], lm.empty_caches(2, 24), chunk_tokens=10)
        outputs.append(torch.stack([logits, *(lm.step(tokens[:, t], caches) for t in range(19, 24))]))
    assert_rms_close("logits", outputs[1], outputs[0], 10 * RMS_FLOAT32)
