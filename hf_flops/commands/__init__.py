"""One module for each subcommand of `hf-flops`: `main(arguments)` returns the exit code."""
