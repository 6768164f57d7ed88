"""The command `hf-flops`: a module for each subcommand with `main(arguments)`, which returns the
exit code.
"""
