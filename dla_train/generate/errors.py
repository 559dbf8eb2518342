"""What a user of generation can do wrong."""

from __future__ import annotations


class GenerationError(ValueError):
    """A prompt or setting that cannot be used: names the value, the rule and the mend."""
