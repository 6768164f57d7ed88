"""A run in a few bytes per query, and how to rebuild its adapter; see docs/trajectory.md.

`framing` keeps records apart and whole, `records` says what is in them, `recorder` writes them
while a run trains, `replay` rebuilds the adapter, `verify` compares a checkpoint with what was
logged.
"""

LOG_FILE = "trajectory.log"
