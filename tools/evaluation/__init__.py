"""Evaluation: how good the answers of a deployment's tasks are, on rows that say what is right."""
