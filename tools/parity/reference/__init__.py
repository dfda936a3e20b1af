"""The reference of every comparison: the checkpoint in PyTorch, and its files, read anew."""
