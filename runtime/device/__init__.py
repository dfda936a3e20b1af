"""Engines on NVIDIA GPUs: device memory, and the decisions that the host makes."""
