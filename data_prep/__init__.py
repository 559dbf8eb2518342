"""Text to token files, outside training: text sources, tokenizer training, tokenisation, the newcomer's corpus.

The console script is `dla-prepare` (prepare.py); every sub-command is one function here in Python: `train_tokenizer`,
`write_tokens` and `write_stdlib_corpus` in the modules of those names.
"""
