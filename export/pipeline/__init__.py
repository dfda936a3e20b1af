"""A graph with the tasks before an unmodified base: what hosts of several graphs share."""
