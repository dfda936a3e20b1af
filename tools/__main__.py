"""``python -m adalink.tools``: the command line, where the ``adalink`` script is not on the path."""

import os
import sys


def _leave_out_current_folder() -> None:
    """Take no module from the current folder, which ``python -m`` put first, unless the kit itself lies there."""
    package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    if not getattr(sys.flags, "safe_path", False) and sys.path and os.path.abspath(sys.path[0]) != package_root:  # noqa: PTH100
        del sys.path[0]


if __name__ == "__main__":
    _leave_out_current_folder()

    from adalink.tools.cli import main

    main(prog_name="adalink")
