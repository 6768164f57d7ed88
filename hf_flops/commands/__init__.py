"""The subcommands of `hf-flops`: functions that take arguments and return the exit code."""
