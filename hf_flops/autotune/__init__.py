"""What a run finds out by trying it with its first batches."""
