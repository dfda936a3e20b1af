"""Cheap mistakes, found before PyTorch or an engine is loaded."""
