"""Measuring trained models: loading them from a run, held-out loss and bits per byte."""
