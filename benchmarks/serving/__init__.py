"""Servers under load, side by side: the kit's, llama.cpp's, and one process a task (``python -m benchmarks.serving``)."""
