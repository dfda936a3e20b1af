"""Size: what a base takes on the disk and in memory, from 0.1 to 8 billion parameters."""
