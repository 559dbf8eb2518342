"""Hugging Face model folders: writing them from runs (`dla-export`), making them of foreign checkpoints (`dla-import`).

There is one folder format, and training starts from it too (`train.initial`), whoever made it.
"""
