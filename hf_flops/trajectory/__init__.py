"""The trajectory of a run in a few bytes per query, and what rebuilds the adapter from it; see
docs/trajectory.md.

`framing` keeps records apart and whole, `records` says what is in them, `recorder` writes them
while a run trains, `replay` rebuilds the adapter, `verify` compares a checkpoint with what was
logged.
"""

LOG_FILE = "trajectory.log"
