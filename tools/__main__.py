"""``python -m adalink.tools``: the command line, where the ``adalink`` script is not on the path."""

import os
import sys


def _leave_out_current_folder() -> None:
    """Take no module from the current folder, which ``python -m`` put first, unless the kit itself lies there."""
    # Not pathlib, which might lie there too.
    try:
        first, current = os.path.abspath(sys.path[0]), os.getcwd()  # noqa: PTH100, PTH109
    except OSError:  # the current folder is gone
        return
    kit = os.path.join(current, "adalink", "tools", "__main__.py")  # noqa: PTH118
    if not getattr(sys.flags, "safe_path", False) and first == current and os.path.abspath(__file__) != kit:  # noqa: PTH100
        del sys.path[0]


if __name__ == "__main__":
    _leave_out_current_folder()

    from adalink.tools.cli import main

    main(prog_name="adalink")
