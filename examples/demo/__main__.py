"""``python -m examples.demo``."""

from examples.demo.run import command

if __name__ == "__main__":
    command(prog_name="python -m examples.demo")
