"""Synthetic recall tasks, generated while training: vectorised over rows, the same batches for the same generator.

task.py is what a task is; registry.py makes one from plain values, as an experiment's file gives them; streams.py turns
a seed and a split into a generator; drawing.py and filler.py hold what the tasks share. One file per family of tasks.
"""
