"""Kernels run in Triton's interpreter on the CPU; it reads this variable when a kernel is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
