"""How a missing extra is installed: the words of messages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_KIT = "adalink-kit"


def install_command(extras: str) -> str:
    """The command that installs extras, such as ``"cpu,export"``.

    pip asks the kit that is installed what they are, whether it came from a checkout or a wheel: no index has to know
    it. A checkout that is not installed at all has to be, by its folder.
    """
    try:
        version(_KIT)
    except PackageNotFoundError:
        return f"pip install '.[{extras}]' in a checkout of the kit"
    return f"pip install '{_KIT}[{extras}]'"
