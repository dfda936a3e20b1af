"""One script for each peer, each run in a separate process and environment."""
