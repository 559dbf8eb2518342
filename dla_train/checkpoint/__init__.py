"""Checkpoints of a run: logical tensors, folders that exist only when complete, and the identity of a run directory."""

from dla_train.checkpoint.checkpointer import Checkpointer, Resumed
from dla_train.checkpoint.folders import CheckpointError, complete_steps
from dla_train.checkpoint.run_directory import RunDirectoryError, check_run_directory, run_identity, write_run_files

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Resumed",
    "RunDirectoryError",
    "check_run_directory",
    "complete_steps",
    "run_identity",
    "write_run_files",
]
