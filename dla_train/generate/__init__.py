"""Sampling from trained models: prompts by the parallel forward in chunks, then token by token on the caches.

A recurrent model's caches are preallocated and never grow, so prompts of any lengths are decoded as one batch without
padding. Boundaries are hard. The program is command.py (`dla-generate`).
"""

from dla_train.generate.decoding import Continuation, Continued, generate, prefill
from dla_train.generate.errors import GenerationError
from dla_train.generate.sampling import Sampling

__all__ = ["Continuation", "Continued", "GenerationError", "Sampling", "generate", "prefill"]
