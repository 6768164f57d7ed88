"""Several processes: how they are started, what they tell each other, and in which order."""
