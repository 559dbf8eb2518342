"""Checks before a run (`dla-doctor`): what would go wrong on these machines, with these files, in these settings."""
