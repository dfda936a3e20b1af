"""Operations of a chat template: methods, filters, tests and operators that it may use, each with its price.

What is not listed here, a template cannot call. Prices are paid before the operation runs
(`adalink.runtime.text.template_budget`).
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, filters, tests
from jinja2.sandbox import SandboxedFormatter, SecurityError
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
# Filters that read elements one by one, or only some; those that read all of a value; both give little more back.
_LAZY_FILTERS = (
    *("attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject"),
    *("rejectattr", "reverse", "select", "selectattr"),
)
_WHOLE_FILTERS = (
    *("abs", "capitalize", "e", "escape", "filesizeformat", "float", "forceescape", "lower", "max", "min", "safe"),
    *("string", "title", "trim", "truncate", "upper", "urlencode", "wordcount"),
)
_SORTING_FILTERS = ("dictsort", "groupby", "sort", "unique")
_PLAIN_TESTS = (
    *("boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable", "mapping", "none"),
    *("number", "sameas", "sequence", "string", "true", "undefined"),
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        [
            "capitalize",
            "casefold",
            "center",
            "count",
            "endswith",
            "expandtabs",
            "find",
            "index",
            "isalnum",
            "isalpha",
            "isascii",
            "isdecimal",
            "isdigit",
            "isidentifier",
            "islower",
            "isnumeric",
            "isprintable",
            "isspace",
            "istitle",
            "isupper",
            "join",
            "ljust",
            "lower",
            "lstrip",
            "partition",
            "removeprefix",
            "removesuffix",
            "replace",
            "rfind",
            "rindex",
            "rjust",
            "rpartition",
            "rsplit",
            "rstrip",
            "split",
            "splitlines",
            "startswith",
            "strip",
            "swapcase",
            "title",
            "upper",
            "zfill",
        ]
    ),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    float: frozenset({"is_integer"}),
}
_SEARCHES = frozenset(
    ["count", "find", "index", "partition", "replace", "rfind", "rindex", "rpartition", "rsplit", "split"]
)
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
        current().spend(sum(map(_as_number, _NUMBER.findall(format_spec))))
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
        _pay_percent_format(left, right)
    budget.spend(shallow_size(left) + shallow_size(right))
    return glanced(bounded_integer(plain(left, right)))


def compare(left: Any, symbol: str, right: Any) -> Any:
    """Result of a comparison, or of ``in``."""
    budget = current()
    if symbol not in ("in", "notin"):
        budget.spend(min(size := size_of(left, budget.left), size_of(right, size)))
    elif isinstance(right, str):
        budget.spend(_search_cost(right, left))
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


def make_filters() -> dict[str, Function]:
    """The filters of chat templates, by name."""
    named = filters.FILTERS
    made = {name: _priced(named[name], glanced) for name in _LAZY_FILTERS}
    made |= {name: _priced(named[name], measured) for name in _WHOLE_FILTERS}
    made |= {name: _priced(named[name], _pay_sorting) for name in _SORTING_FILTERS}
    for name, pay in {"batch": _pay_fill, "slice": _pay_fill, "center": _pay_width, "indent": _pay_indent}.items():
        made[name] = _priced(named[name], measured, pay)
    made["replace"] = _priced(named["replace"], measured, _pay_replace)
    made["int"] = _priced(named["int"], measured, _pay_integer)
    made["round"] = _priced(named["round"], measured, _pay_round)
    made["sum"] = _priced(named["sum"], measured, _pay_sum)
    made["join"] = _priced(named["join"], measured, _pay_join)
    made["format"] = _priced(named["format"], measured, _pay_format)
    return made | {"tojson": tojson}


def make_tests() -> dict[str, Function]:
    """The tests of chat templates, by name."""
    named = tests.TESTS
    made = {name: named[name] for name in _PLAIN_TESTS}
    made |= {name: _priced(named[name], measured) for name in ("lower", "upper", "filter", "test")}
    made |= {name: _priced(named[name], _number) for name in ("divisibleby", "even", "odd")}
    comparisons = {"==": "eq", "!=": "ne", ">": "gt", ">=": "gteq", "<": "lt", "<=": "lteq", "in": "in"}
    words = {"equalto": "eq", "greaterthan": "gt", "lessthan": "lt", "ge": "gteq", "le": "lteq"}
    for name, symbol in {**comparisons, **words, "eq": "eq", "ne": "ne", "gt": "gt", "lt": "lt"}.items():
        made[name] = _comparison(symbol)
    return made


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """``tojson`` without the HTML escapes of Jinja's own filter, as transformers gives it to templates."""
    measured((value, separators))
    settings: dict[str, Any] = {"ensure_ascii": ensure_ascii, "separators": separators, "sort_keys": sort_keys}
    if indent is None:
        return str(measured(json.dumps(value, **settings)))
    current().spend(_as_number(indent) if isinstance(indent, int) else shallow_size(indent))
    return "".join(map(measured, json.JSONEncoder(indent=indent, **settings).iterencode(value)))


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


def _priced(function: Function, pay: Function, more: Function | None = None) -> Function:
    """A filter or test that pays for each argument, then for its result; generators pay for each element."""
    leading = int(hasattr(function, "jinja_pass_arg"))  # the context that Jinja passes first to some

    @wraps(function)  # with that mark
    def priced(*given: Any, **kwargs: Any) -> Any:
        args = tuple(counted(arg) if isinstance(arg, Iterator) else arg for arg in given[leading:])
        for arg in (*args, *kwargs.values()):
            pay(arg)
        if more is not None:
            args = more(args, kwargs) or args
        result = function(*given[:leading], *args, **kwargs)
        return counted(result) if isinstance(result, Iterator) else glanced(bounded_integer(result))

    return priced


def _comparison(symbol: str) -> Function:
    return lambda left, right: compare(left, symbol, right)


def _number(value: Any) -> None:
    if not isinstance(value, (int, float)):
        raise TemplateError(f"expected a number, received a {type(value).__name__}")


def _as_number(digits: Any) -> int:
    """A number in a template, or one too long to count."""
    if isinstance(digits, str) and len(digits) > 18:
        raise TemplateLimitError("a width has more than 18 digits")
    return abs(int(digits))


def _search_cost(text: str, pattern: Any) -> int:
    """Cost of searching a text for a pattern."""
    size = text.__sizeof__()
    return size + (len(text) * len(pattern) // 8 if len(text) < _SMALL_SEARCH and isinstance(pattern, str) else 0)


def _text_cost(text: str, name: str, args: tuple[Any, ...]) -> int:
    """Cost of a method of a text, result included."""
    budget = current()
    cost = text.__sizeof__() + size_of(args, budget.left)
    if name in _SEARCHES and args:
        cost += _search_cost(text, args[0])
        if name.startswith("r") and name != "replace" and isinstance(args[0], str):  # from the right, at worst each
            cost += len(text) * len(args[0])
    if name == "replace":
        cost += _replaced_size(text, *args[:2])
    elif name == "join" and args and hasattr(args[0], "__len__"):
        cost += text.__sizeof__() * len(args[0])
    elif name in ("center", "ljust", "rjust", "zfill"):
        cost += 4 * _as_number(args[0] if args else 0)
    elif name == "expandtabs":
        cost += 4 * (text.count("\t") + 1) * _as_number(args[0] if args else 8)
    return cost


def _replaced_size(text: str, old: Any = "", new: Any = "") -> int:
    """Most bytes of a text after a replacement."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return 0
    return int(text.__sizeof__() + text.count(old) * new.__sizeof__())


def _pay_percent_format(text: str, args: Any) -> None:
    """Pay for ``text % args``; widths are in the text, and ``*`` would take them from the arguments."""
    budget = current()
    if "*" in text:
        raise TemplateLimitError("a format takes its width from an argument ('*'): write the width itself")
    widths = sum(map(_as_number, _NUMBER.findall(text)))
    budget.spend(widths + text.count("%") * size_of(args, budget.left))


def _pay_sorting(value: Any) -> None:
    budget = current()
    length = len(value) if hasattr(value, "__len__") else 1
    budget.spend(size_of(value, budget.left) * max(1, length.bit_length()))


def _pay_fill(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for count in (*args[1:2], kwargs.get("linecount", 0), kwargs.get("slices", 0)):
        current().spend(ELEMENT_COST * _as_number(count))


def _pay_width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    current().spend(4 * _as_number([*args[1:2], kwargs.get("width", 80)][0]))


def _pay_indent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    width = [*args[1:2], kwargs.get("width", 4)][0]
    size = 4 * _as_number(width) if isinstance(width, int) else shallow_size(width)
    current().spend(size * (1 + str(args[0]).count("\n")))


def _pay_replace(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    text, *rest = args
    old, new = [*rest, *(kwargs[name] for name in ("old", "new") if name in kwargs)][:2]
    budget = current()
    budget.spend(_search_cost(str(text), str(old)) + _replaced_size(str(text), str(old), str(new)))


def _pay_integer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if isinstance(args[0], str) and len(args[0]) > 4300:
        raise TemplateLimitError(f"a number has {len(args[0])} characters, expected at most 4300")


def _pay_round(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _number(args[0])
    precision = [*args[1:2], kwargs.get("precision", 0)][0]
    if _as_number(precision) > 400:
        raise TemplateLimitError(f"a number is rounded to {precision} digits, expected at most 400")


def _pay_sum(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _number([*args[2:3], kwargs.get("start", 0)][0])


def _pay_join(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Pay for the texts between elements; the elements of a generator are needed for that."""
    values, *rest = args
    values = list(values) if isinstance(values, Iterator) else values
    between = [*rest[:1], kwargs.get("d", "")][0]
    current().spend(len(values) * shallow_size(between) if hasattr(values, "__len__") else 0)
    return measured(values), *rest


def _pay_format(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _pay_percent_format(str(args[0]), kwargs or args[1:])
