"""dla_train: pretraining of language models with Dynamic Linear Attention (arXiv 2606.10650)."""
