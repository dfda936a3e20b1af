"""Methods that implement a protocol say so, and take its documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def implements(protocol: type) -> Callable[[F], F]:
    """Mark a method as the implementation of a protocol's method of the same name, whose docstring it takes.

    Protocols are structural, so a class need not inherit them; ``typing.override`` wants that it does.

    Args:
        protocol: the protocol; without a method of that name, ``AttributeError`` is raised where the class is made.
    """

    def mark(method: F) -> F:
        method.__doc__ = getattr(protocol, method.__name__).__doc__
        return method

    return mark
