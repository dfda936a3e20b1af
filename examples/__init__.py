"""Example adapters, and the demo."""
