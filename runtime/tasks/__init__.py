"""Tasks: registry, adapter mapping of a batch, soft prompts, folded tasks."""
