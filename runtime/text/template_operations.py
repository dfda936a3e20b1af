"""Operations of a chat template: operators, methods and functions that it may use, each with its price.

What is not listed here, a template cannot call. Prices are paid before the operation runs
(`adalink.runtime.text.template_budget`).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedFormatter
from jinja2.utils import Namespace

from adalink.runtime.text.template_budget import (
    ELEMENT_COST,
    TemplateLimitError,
    bounded_integer,
    counted,
    current,
    glanced,
    measured,
    power_bits,
    shallow_size,
    size_of,
)

Function = Callable[..., Any]

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda item, values: item in values,
    "notin": lambda item, values: item not in values,
}
_TEXT_METHODS = (
    *("capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "index", "isalnum", "isalpha"),
    *("isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle"),
    *("isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind"),
    *("rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase"),
    *("title", "upper", "zfill"),
)
_METHODS: dict[type, tuple[str, ...]] = {
    str: _TEXT_METHODS,
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("copy", "count", "index"),
    tuple: ("count", "index"),
    float: ("is_integer",),
}
_SEARCHES = ("count", "find", "index", "partition", "replace", "rfind", "rindex", "rpartition", "rsplit", "split")
_SMALL_SEARCH = 30_000  # up to here, CPython's search may compare each character with all of the pattern
_NUMBER = re.compile(r"\d+")


class TemplateNamespace(Namespace):
    """``namespace(...)`` of a template: an object with attributes of its own, opaque to every other operation."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args
        attributes = dict(*given, **values)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class TemplateDict:
    """``dict(...)`` of a template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A dictionary, as Python's ``dict`` makes it."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As ``dict.fromkeys``."""
        return dict.fromkeys(*args)


class BoundedFormatter(SandboxedFormatter):
    """``str.format`` in the sandbox, at the price of what it writes."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """A field of the result."""
        current().spend(sum(map(as_number, _NUMBER.findall(format_spec))))
        measured(value)
        return str(measured(super().format_field(value, format_spec)))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """The value as ``!r`` or ``!s`` asks for it."""
        return super().convert_field(measured(value), conversion)


def binary(symbol: str, left: Any, right: Any, plain: Callable[[Any, Any], Any]) -> Any:
    """Result of a binary operator.

    Args:
        symbol: the operator.
        left: first operand.
        right: second operand.
        plain: the operator's own function.
    """
    budget = current()
    if symbol == "**":
        power_bits(left, right)
    elif symbol == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                budget.spend(shallow_size(value) * max(times, 0))
    elif symbol == "%" and isinstance(left, str):
        pay_percent_format(left, right)
    budget.spend(shallow_size(left) + shallow_size(right))
    return glanced(bounded_integer(plain(left, right)))


def compare(left: Any, symbol: str, right: Any) -> Any:
    """Result of a comparison, or of ``in``."""
    budget = current()
    budget.spend(2 * ELEMENT_COST)
    if symbol not in ("in", "notin"):
        budget.spend(min(size := size_of(left, budget.left), size_of(right, size)))
    elif isinstance(right, str):
        budget.spend(search_cost(right, left))
    else:
        size = size_of(left, budget.left)
        budget.spend(size + (0 if isinstance(right, dict) else shallow_size(right) // ELEMENT_COST * size))
        right = right if hasattr(right, "__len__") else counted(right)
    return _COMPARISONS[symbol](left, right)


def pay_method(value: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Pay for a method of a text, list, dictionary or number; returns its arguments, to be passed instead.

    Raises:
        SecurityError: a template may not call it.
        TemplateLimitError: it would do too much.
    """
    kind = next((kind for kind in _METHODS if isinstance(value, kind)), None)
    if kind is None or name not in _METHODS[kind]:
        raise SecurityError(f"chat templates cannot call {name!r} of a {type(value).__name__}")
    budget = current()
    if kind is str:
        args = tuple(list(counted(arg)) if isinstance(arg, Iterator) else arg for arg in args)
        budget.spend(_text_cost(value, name, (*args, *kwargs.values())))
    elif kind in (list, tuple) and name != "copy":
        budget.spend(shallow_size(value) // ELEMENT_COST * size_of(args, budget.left))
    else:
        budget.spend(shallow_size(value) + size_of(args[:1], budget.left))
    return args


def refuse(reason: Any = "") -> None:
    """``raise_exception(...)`` of a template."""
    raise TemplateError(str(measured(reason)))


def now(form: str) -> str:
    """``strftime_now(...)`` of a template."""
    if len(form) > 1000:
        raise TemplateLimitError(f"a form of a date has {len(form)} characters, expected at most 1000")
    return datetime.now().strftime(form)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name[:80]!r}: its name begins with an underscore")


def as_number(digits: Any) -> int:
    """A number in a template, or one too long to count."""
    if isinstance(digits, str) and len(digits) > 18:
        raise TemplateLimitError("a width has more than 18 digits")
    return abs(int(digits))


def search_cost(text: str, pattern: Any) -> int:
    """Cost of searching a text for a pattern."""
    size = text.__sizeof__()
    return size + (len(text) * len(pattern) // 8 if len(text) < _SMALL_SEARCH and isinstance(pattern, str) else 0)


def _text_cost(text: str, name: str, args: tuple[Any, ...]) -> int:
    """Cost of a method of a text, result included."""
    budget = current()
    cost = text.__sizeof__() + size_of(args, budget.left)
    if name in _SEARCHES and args:
        cost += search_cost(text, args[0])
        if name.startswith("r") and name != "replace" and isinstance(args[0], str):  # from the right, at worst each
            cost += len(text) * len(args[0])
    if name == "replace":
        cost += replaced_size(text, *args[:2])
    elif name == "join" and args and hasattr(args[0], "__len__"):
        cost += text.__sizeof__() * len(args[0])
    elif name in ("center", "ljust", "rjust", "zfill"):
        cost += 4 * as_number(args[0] if args else 0)
    elif name == "expandtabs":
        cost += 4 * (text.count("\t") + 1) * as_number(args[0] if args else 8)
    return cost


def replaced_size(text: str, old: Any = "", new: Any = "") -> int:
    """Most bytes of a text after a replacement."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return 0
    return int(text.__sizeof__() + text.count(old) * new.__sizeof__())


def pay_percent_format(text: str, args: Any) -> None:
    """Pay for ``text % args``; widths are in the text, and ``*`` would take them from the arguments."""
    budget = current()
    if "*" in text:
        raise TemplateLimitError("a format takes its width from an argument ('*'): write the width itself")
    widths = sum(map(as_number, _NUMBER.findall(text)))
    budget.spend(widths + text.count("%") * size_of(args, budget.left))
