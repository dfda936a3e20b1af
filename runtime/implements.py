"""Methods that implement a protocol say so, and take its documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def implements(protocol: type) -> Callable[[F], F]:
    """Mark a method as the implementation of a protocol's method of the same name, whose docstring it takes.

    Protocols are structural, so a class need not inherit them; ``typing.override`` wants that it does.

    Args:
        protocol: the protocol; without a method of that name, ``AttributeError`` is raised where the class is made,
            and ``TypeError`` if the method lacks one of its parameters.
    """

    def mark(method: F) -> F:
        promised = getattr(protocol, method.__name__)
        lacking = [name for name in _parameters(promised) if name not in _parameters(method)]
        if lacking:
            raise TypeError(f"{method.__qualname__} lacks {', '.join(lacking)} of {protocol.__name__}")
        method.__doc__ = promised.__doc__
        return method

    return mark


def _parameters(method: Any) -> tuple[str, ...]:
    code = getattr(method, "__code__", None)  # a property has none
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
