"""The demo: export, run, verify and measure a real model with two tasks."""

from collections.abc import Callable

Progress = Callable[[str], None]
