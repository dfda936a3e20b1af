"""The levels of parity with PyTorch (docs/parity.md)."""
