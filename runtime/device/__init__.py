"""Engines on NVIDIA GPUs: memory that stays on the device, and what is left for the host to decide."""
