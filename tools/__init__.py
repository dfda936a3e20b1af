"""The command line, parity checks and benchmarks of AdaLink Kit."""
