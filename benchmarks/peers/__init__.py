"""One script for each peer, run in a process and an environment of its own."""
