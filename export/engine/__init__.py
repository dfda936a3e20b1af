"""Portable graph to compiled engine."""
