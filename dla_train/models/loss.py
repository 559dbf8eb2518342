"""Next-token cross-entropy, summed, with the optional square of the log-partition (z-loss, PaLM section 5).

Sums and a count, not means: the mean over a global batch is then the same however the batch is divided.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_train.parallel.vocab import IGNORED


def next_token_loss(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of nats, sum of z-loss, count), float32 scalars, of logits [..., vocab] and targets [...] int64.

    Targets of IGNORED count nothing. The second is `z_loss` * sum of log(Z)^2, already weighted, so that
    (first + second) / count is what is minimised.
    """
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    nats = F.cross_entropy(wide, wanted, ignore_index=IGNORED, reduction="sum")
    counted = wanted != IGNORED
    partition = torch.zeros_like(nats)
    if z_loss:
        partition = z_loss * (wide.logsumexp(-1).square() * counted).sum()
    return nats, partition, counted.sum().to(wide.dtype)


def next_token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of every target, float32 like targets: logits [..., vocab], targets [...] int64; 0 where one is IGNORED."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.view(targets.shape)
