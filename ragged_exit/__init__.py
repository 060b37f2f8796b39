"""Early-exit encoders that are fast in batches. The public names, and nothing else."""
