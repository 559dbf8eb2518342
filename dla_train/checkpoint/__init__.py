"""Checkpoints of a run: logical tensors, folders that exist only when complete, and the identity of a run directory.

Nothing is imported here: what only looks at folders (`dla-runs`) does without torch.
"""
