"""The levels of parity with PyTorch (docs/concepts/parity.md)."""
