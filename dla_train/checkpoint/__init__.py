"""Checkpoints of a run: logical tensors, folders that exist only when complete, and the identity of a run directory."""

from dla_train.checkpoint.checkpointer import Checkpointer, Resumed
from dla_train.checkpoint.errors import CheckpointError, DamagedError, RunDirectoryError
from dla_train.checkpoint.folders import complete_steps
from dla_train.checkpoint.run_directory import check_run_directory, hold_run_directory, run_identity, write_run_files
from dla_train.checkpoint.stored import StoredCheckpoint, open_step

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DamagedError",
    "Resumed",
    "RunDirectoryError",
    "StoredCheckpoint",
    "check_run_directory",
    "complete_steps",
    "hold_run_directory",
    "open_step",
    "run_identity",
    "write_run_files",
]
