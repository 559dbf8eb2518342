"""Measuring programs: `python -m dla_train.bench [WORD]`, words in __main__.py; without a word, this CPU's.

cpu.py measures PyTorch's path and the trainer on a CPU, training.py whole training steps of the paper's models on one
GPU, `dla_kernels.bench` the operations. All write JSON, which render.py turns into the pages of docs/results.
"""
