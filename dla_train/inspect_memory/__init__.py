"""`dla-inspect`: what the memories of a checkpoint do with a text, as pictures and as one page to look through."""
