"""Speed and memory of the operations on one GPU: `python -m dla_kernels.bench`. Needs torch and triton, nothing else.

Writes kernels.json after every measurement; tables.py makes Markdown of it, `python -m dla_train.bench render` pictures
too. On a CPU, `--toy --device cpu` goes through all of it in small shapes.

One H200 measures everything in three calls of ten minutes, each from the repository's root with OUT an output folder:

    # 1. Correctness. Needs torch, triton, pytest, hypothesis.
    PYTHONPATH=kernels:.:tests python -m pytest -q -m gpu tests/kernels

    # 2. Kernels, layers and decoding. Needs torch and triton. With fla-core and einops installed fla's kernels run
    # beside ours; without them kernels.json says so and the targets fall back on our own single and log_linear.
    PYTHONPATH=kernels python -m dla_kernels.bench --minutes 9 --output "$OUT"

    # 3. Training steps of the paper's models. Needs torch, triton, hydra-core, omegaconf, antlr4-python3-runtime,
    # PyYAML, packaging, tqdm.
    PYTHONPATH=kernels:. python -m dla_train.bench training --minutes 9 --output "$OUT"

    # Afterwards, anywhere: kernels.json and training.json to docs/results/, then (needs matplotlib)
    python -m dla_train.bench render

Call 2 begins by compiling in parallel (--workers): its first minutes would otherwise go into one compiler at a time. It
then measures in the order in which targets need it and stops before --minutes; what was left out is listed.
A second call of it with --arms and --lengths fills gaps: records of the same measurement in OUT/kernels.json are
replaced, the others kept.
"""
