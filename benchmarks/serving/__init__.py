"""Servers under load, side by side: the kit's and llama.cpp's (``python -m benchmarks.serving``)."""
