"""Several processes: launching, collectives, and how updates are reduced."""
