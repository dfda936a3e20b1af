"""The engines of the comparison of sizes: one script each, run in its own environment, measured in the same way."""
