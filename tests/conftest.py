"""Kernels run in Triton's interpreter on the CPU; it reads this variable when a kernel is first imported."""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Leave what collecting imported out of every later collection: a mesh collects when it ends, and took 0.4 s."""
    gc.collect()
    gc.freeze()
