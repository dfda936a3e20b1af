"""What several steps measure: parity with PyTorch, swaps, decode steps, plans."""
