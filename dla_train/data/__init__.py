"""From token files on disk to a rank's batches: tokenizer, Megatron token files, order, packing, loader.

Import from the modules: the tokenizer and the token files are used by data_prep's worker processes, which must not
pay for importing torch, so this package imports nothing itself.
"""
