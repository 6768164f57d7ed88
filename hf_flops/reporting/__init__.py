"""What is said of a run: accounts, progress, pictures and the model card."""
