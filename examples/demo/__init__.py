"""The demo: export, run, verify and measure a real model with two tasks."""
