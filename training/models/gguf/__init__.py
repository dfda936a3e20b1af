"""GGUF files: their header, and what transformers drops of it."""
