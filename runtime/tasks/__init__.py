"""Tasks: which are loaded, and which rows of a batch use which."""
