"""Sweeps: many runs of one experiment, settings by seeds, that end in a report (`dla-sweep`, docs/sweeps.md).

definition.py says what is swept, sampling.py and tpe.py which settings that makes, points.py their runs and folders,
launchers.py how a run is started, runner.py drives them, report.py and its figures read the folder afterwards. A sweep
keeps no state of its own beside the points' folders (and Optuna's study), so killing it loses nothing.
"""
