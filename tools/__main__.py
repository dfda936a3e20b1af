"""``python -m adalink.tools``: the command line, where the ``adalink`` script is not on the path."""

from adalink.tools.cli import main

if __name__ == "__main__":
    main(prog_name="adalink")
