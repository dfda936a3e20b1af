"""The engines of a parity run: opened once, and without rounding."""
