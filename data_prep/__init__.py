"""Text to token files, outside training: text sources, tokenizer training, tokenisation, the newcomer's corpus.

The console script is `dla-prepare` (prepare.py); every sub-command is one function here in Python: `train_tokenizer`,
`write_tokens` and `write_stdlib_corpus` in the modules of those names.

A source gives raw records (records.py, sources.py, huggingface.py), processes make token ids of them (encoding.py), one
process writes shards (shards.py) and what a restart needs (state.py, seen.py), and in the end a report (report.py).
"""
