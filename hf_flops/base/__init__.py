"""The ground that everything stands on: torch, numpy and the errors, nothing else."""
