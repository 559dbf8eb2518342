"""Speed and memory of the operations on one GPU: `python -m dla_kernels.bench`. Needs torch and triton, nothing else.

Writes kernels.json after every measurement; tables.py makes Markdown of it, `python -m dla_train.bench render` pictures
too. On a CPU, `--toy --device cpu` goes through all of it in small shapes.

One H200 measures everything in three calls of ten minutes, each from the repository's root with OUT an output folder:

    # 1. Correctness at full size, in several processes, for most of the time goes into compiling. Needs torch, triton,
    # pytest, pytest-xdist.
    python -m pytest -q -m gpu -n 12 tests/kernels/test_gpu.py

    # 2. Layers, their parts, decoding. Needs torch and triton. With fla-core and einops installed fla's kernels run
    # beside ours; without them kernels.json says so and targets fall back on our own single and log_linear, as they do
    # where fla refuses (the gated delta rule's backward on Hopper with Triton from 3.4 to before 3.7.1).
    PYTHONPATH=kernels python -m dla_kernels.bench --minutes 9 --output "$OUT"

    # 3. Training steps of the paper's models. Needs torch, triton, hydra-core, omegaconf, antlr4-python3-runtime,
    # PyYAML, packaging.
    PYTHONPATH=kernels:. python -m dla_train.bench training --minutes 9 --output "$OUT"

    # Afterwards, anywhere: kernels.json and training.json to docs/results/, then (needs matplotlib)
    python -m dla_train.bench render

Calls 2 and 3 begin by compiling in parallel: their first minutes would otherwise go into one compiler at a time. They
then measure in the order in which targets need it and begin nothing beyond --minutes; what was left out is listed. A
second call 2 with --arms and --lengths fills gaps: records of the same measurement in OUT/kernels.json are replaced,
the others kept.
"""
