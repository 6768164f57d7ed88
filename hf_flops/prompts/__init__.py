"""What is trained before, after or around a frozen model: prompts, adapters of black boxes."""
