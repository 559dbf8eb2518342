"""What every test process begins with. Triton reads its variable when a kernel is first imported."""

import atexit
import gc
import os
import shutil
import tempfile

import torch

torch.set_num_threads(1)  # threads that wait for each other cost more than they compute at these sizes

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests import interpreter  # after the variable, for it imports Triton

    interpreter.hasten()

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules")
"""Where transformers puts code of model folders that it imports: one place a process, and not the user's."""
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Leave what collecting imported out of every later collection: a mesh collects when it ends, and took 0.4 s."""
    gc.collect()
    gc.freeze()
