"""Looking at training data before it is trained on: the program `dla-data` (command.py).

facts.py says what is there without reading tokens, contents.py reads them all (duplicates, damage, hashes), samples.py
shows rows as a model is fed them. Nothing here changes a token file.
"""
