"""Starting a run on one machine or on a SLURM cluster (`dla-launch`): what would run, checked before anything does."""
