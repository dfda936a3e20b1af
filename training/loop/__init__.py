"""The training loop: the Hugging Face ``Trainer`` with checkpoints, curves, early stopping and resumption."""
