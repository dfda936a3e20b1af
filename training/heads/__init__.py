"""Heads: tasks with labels on an encoder. Training, a linear probe, label texts, and how well a head does."""
