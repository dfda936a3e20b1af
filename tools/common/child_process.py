"""Child processes of Python that take no module from the current folder.

``python -m`` and ``python -c`` put the current folder first on the path: a file ``onnxruntime.py`` that happens to lie
there would be run. Every child of the kit is started through ``python_command`` and ``child_environment``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

# Python 3.10 has no option -P. There the current folder is the first entry of the path, and nothing has been imported
# from it yet; ``sys`` is part of the interpreter.
_CLEAN_PATH = "import sys\nif not getattr(sys.flags, 'safe_path', False): del sys.path[0]\n"
_RUN_MODULE = "import runpy\nrunpy.run_module({!r}, run_name='__main__', alter_sys=True)\n"
HAS_SAFE_PATH = sys.version_info >= (3, 11)


def python_command(*, module: str | None = None, code: str = "", arguments: tuple[str, ...] = ()) -> list[str]:
    """Command line of a child.

    Args:
        module: the module to run; or else
        code: the code to run.
        arguments: what follows in ``sys.argv``.
    """
    if HAS_SAFE_PATH:
        run = ["-P", "-m", module] if module is not None else ["-P", "-c", code]
    else:
        run = ["-c", _CLEAN_PATH + (code if module is None else _RUN_MODULE.format(module))]
    return [sys.executable, *run, *arguments]


def child_environment(**changes: str) -> Mapping[str, str]:
    """This process's environment with ``changes``, for a child and its own children.

    An empty entry of ``PYTHONPATH`` means the current folder and is left out; other entries are the user's wish.
    """
    environment = {**os.environ, **changes, "PYTHONSAFEPATH": "1"}
    if "PYTHONPATH" in environment:
        entries = [entry for entry in environment["PYTHONPATH"].split(os.pathsep) if entry]
        environment["PYTHONPATH"] = os.pathsep.join(entries)
    return environment
