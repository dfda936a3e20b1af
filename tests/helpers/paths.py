"""Where the checkout is, for tests of committed files."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
