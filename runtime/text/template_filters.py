"""Filters and tests of chat templates, each with its price (`adalink.runtime.text.template_operations`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from jinja2 import TemplateError, filters, tests

from adalink.runtime.text.template_budget import (
    ELEMENT_COST,
    TemplateLimitError,
    bounded_integer,
    counted,
    current,
    glanced,
    measured,
    shallow_size,
    size_of,
)
from adalink.runtime.text.template_operations import (
    as_number,
    compare,
    pay_percent_format,
    replaced_size,
    search_cost,
)

Function = Callable[..., Any]

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
    named: dict[str, Any] = dict(tests.TESTS)  # Jinja's own type is narrower than what is called
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
    current().spend(as_number(indent) if isinstance(indent, int) else shallow_size(indent))
    return "".join(map(measured, json.JSONEncoder(indent=indent, **settings).iterencode(value)))


def _priced(function: Function, pay: Function, more: Function | None = None) -> Function:
    """A filter or test that pays for each argument, then for its result; generators pay for each element."""
    leading = int(hasattr(function, "jinja_pass_arg"))  # the context that Jinja passes first to some

    @wraps(function)  # with that mark
    def priced(*given: Any, **kwargs: Any) -> Any:
        current().spend(2 * ELEMENT_COST)
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


def _pay_sorting(value: Any) -> None:
    budget = current()
    length = len(value) if hasattr(value, "__len__") else 1
    budget.spend(size_of(value, budget.left) * max(1, length.bit_length()))


def _pay_fill(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for count in (*args[1:2], kwargs.get("linecount", 0), kwargs.get("slices", 0)):
        current().spend(ELEMENT_COST * as_number(count))


def _pay_width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    current().spend(4 * as_number([*args[1:2], kwargs.get("width", 80)][0]))


def _pay_indent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    width = [*args[1:2], kwargs.get("width", 4)][0]
    size = 4 * as_number(width) if isinstance(width, int) else shallow_size(width)
    current().spend(size * (1 + str(args[0]).count("\n")))


def _pay_replace(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    text, *rest = args
    old, new = [*rest, *(kwargs[name] for name in ("old", "new") if name in kwargs)][:2]
    budget = current()
    budget.spend(search_cost(str(text), str(old)) + replaced_size(str(text), str(old), str(new)))


def _pay_integer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if isinstance(args[0], str) and len(args[0]) > 4300:
        raise TemplateLimitError(f"a number has {len(args[0])} characters, expected at most 4300")


def _pay_round(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _number(args[0])
    precision = [*args[1:2], kwargs.get("precision", 0)][0]
    if as_number(precision) > 400:
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
    pay_percent_format(str(args[0]), kwargs or args[1:])
