"""Long-context diagnostics (`dla-diagnose`): loss and perplexity of checkpoints by position, compared in pairs.

All arms read the same documents, each from its beginning and alone. A document is the unit of every interval:
positions of one document are not independent of each other, documents are.
"""
