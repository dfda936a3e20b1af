"""Rows of a file as prompts or texts, and their answers as rows."""
