"""Evaluating trained models on published tasks: the program `dla-evaluate` (command.py), on lm-evaluation-harness.

settings.py says what is evaluated; catalogue.yaml the tasks, local files and metrics; documents.py and fetch.py the
local copies; needles.py RULER's needle tasks; scoring.py and decoding.py do the model's work, model.py is their face to
lm_eval; evaluation.py goes through the tasks, with journal.py for what was answered before; report.py, published.yaml
and heat_map.py are what is left at the end.
"""
