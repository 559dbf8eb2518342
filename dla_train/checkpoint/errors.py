"""Errors of checkpoints and run directories, all shown to the user as one paragraph.

Damage is told apart from every other fault, because only damage may be answered by going back to an older checkpoint:
a folder that may not be read, or one of another version, is somebody's to mend and not to pass over.
"""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used: damaged, absent, unreadable, or of another model."""


class DamagedError(CheckpointError):
    """Files of a checkpoint are not what was written: changed, cut short, absent, or nonsense."""


class RunDirectoryError(ValueError):
    """run_dir holds another run, one that may not be continued, or one that another process is training."""
