"""Recall experiments: synthetic tasks that ask a small model for what it was given earlier."""
