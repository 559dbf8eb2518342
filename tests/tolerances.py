"""How close two computations must be, per dtype, in one place and with the reason.

Compared is max |a - b| / max(1, max |b|). float64 paths differ in summation order only; float32 keeps 7 digits, and a
chunk of sums over a few hundred tokens loses up to two of them; bfloat16 keeps 8 bits.
"""

import torch
from torch import Tensor

RELATIVE = {
    torch.float64: 1e-10,  # reordered sums of O(1) terms over at most a few hundred tokens
    torch.float32: 2e-5,  # about 100 units in the last place
    torch.bfloat16: 2e-2,  # about 5 units in the last place
}
SCORE_ABSOLUTE = 2e-3
"""Drift near 0 is sqrt(2 - 2 cos): an error e in the cosine, 1e-7 in float32, becomes sqrt(2 e) there."""


def assert_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Fails with the name and the error where two tensors differ by more than their dtype's tolerance."""
    assert actual.shape == expected.shape, f"{name}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite"
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    error = (actual.double() - expected.double()).abs().max().item() / scale if expected.numel() else 0.0
    limit = RELATIVE[dtype or actual.dtype]
    assert error <= limit, f"{name}: relative error {error:.3g} exceeds {limit:.3g}"


RMS_FLOAT32 = 1e-5
"""Kernels against float64, as RMS error over RMS of the expected: sums in another order."""
RMS_HALF = {"o": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dlog_decay": 2e-2, "dbeta": 2e-2, "dread_weights": 2e-2}
"""The same for bfloat16 and float16 inputs: operands of matrix products are rounded to 16 bits, gates sum many."""
RMS_TWICE_ROUNDED = {torch.float16: 8e-3, torch.bfloat16: 1e-2}
"""The same of a sum over two products that is rounded to 16 bits between them; bfloat16 keeps 8 bits, float16 11."""


def assert_rms_close(name: str, actual: Tensor, expected: Tensor, limit: float) -> None:
    """Fails with the name and the error where RMS(actual - expected) exceeds `limit` times RMS(expected)."""
    assert actual.shape == expected.shape, f"{name}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name}: not finite"
    wide, target = actual.double(), expected.double()
    error = (wide - target).square().mean().sqrt() / target.square().mean().sqrt().clamp_min(1e-30)
    absolute = (wide - target).abs().max()
    assert error <= limit or absolute <= 1e-6, f"{name}: relative RMS error {error:.3g} exceeds {limit:.3g}"


TRAINING = {
    # sums in another order, amplified by three steps; the largest seen is a third of this
    "float32": {"loss": 1e-5, "norm": 1e-5, "logits": 1e-5, "gradient": 1e-5, "parameter": 1e-5},
    # 8 bits; a decision of a memory that falls the other way moves the gradients of its head, and Adam makes steps of
    # equal size of small gradients, so that parameters that began at zero differ most
    "bfloat16": {"loss": 2e-3, "norm": 0.1, "logits": 2e-2, "gradient": 8e-2, "parameter": 0.15},
}
"""Divided training against one rank over three steps: |difference| / |expected| of numbers and of whole tensors."""
