"""The command `hf-flops`: each subcommand is a module with `main(arguments) -> exit code`."""
