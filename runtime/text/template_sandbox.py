"""Sandbox of chat templates: Jinja's immutable sandbox, with a budget for every step.

A template comes with a checkpoint and is a program. Jinja's sandbox keeps it from Python's internals and from changing
what it is given. Here its syntax tree is rewritten before it is compiled, so that each loop, call, comparison and
output pays from a budget first. Constants are not folded, since that would compute outside of the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinMethodType, MethodType
from typing import Any, cast

from jinja2 import TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Joiner
from jinja2.visitor import NodeTransformer

from adalink.runtime.text.template_budget import NODE_COST, charge, glanced, measured
from adalink.runtime.text.template_filters import make_filters, make_tests
from adalink.runtime.text.template_operations import (
    BoundedFormatter,
    TemplateDict,
    TemplateNamespace,
    binary,
    compare,
    now,
    pay_method,
    refuse,
)

# Filters that only the rewritten tree can name: no name in a template holds a space.
_CHARGE, _COMPARE, _MEASURE, _GLANCE = " charge", " compare", " measure", " glance"
_INHERITANCE = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The Jinja environment of transformers' ``apply_chat_template``, with a budget."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_as_text,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        priced = {_CHARGE: charge, _COMPARE: compare, _MEASURE: measured, _GLANCE: glanced}
        self.filters = make_filters() | priced
        self.tests = cast(dict[str, Any], make_tests())
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own, of a limited length
            "joiner": Joiner,
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
            "raise_exception": refuse,
            "strftime_now": now,
        }
        self._functions = tuple(self.globals.values())

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - names of kwargs
        """Call what a template may call; raises ``SecurityError`` for anything else."""
        charge(16 * NODE_COST)
        if isinstance(__obj, BuiltinMethodType) or (isinstance(__obj, MethodType) and isinstance(__obj.__self__, str)):
            named = {name: value for name, value in kwargs.items() if not name.startswith("_")}  # less Jinja's own
            args = pay_method(__obj.__self__, __obj.__name__, args, named)
        elif not __self._may_call(__obj):
            raise SecurityError(f"chat templates cannot call a {type(__obj).__name__}")
        else:
            for arg in args if isinstance(__obj, (Macro, LoopContext)) else ():
                glanced(arg)
            if not isinstance(__obj, (Macro, LoopContext)):
                measured(args)
        return glanced(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Result of a binary operator."""
        return binary(operator, left, right, self.binop_table[operator])

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An element or attribute; looking a tuple up reads all of it."""
        return super().getitem(obj, argument if isinstance(argument, (str, int)) else measured(argument))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` and ``str.format_map`` at a price; ``None`` for anything else."""
        if not isinstance(value, (MethodType, BuiltinMethodType)) or value.__name__ not in ("format", "format_map"):
            return None
        return (
            _Format(self, value.__self__, value.__name__ == "format_map") if isinstance(value.__self__, str) else None
        )

    def _may_call(self, function: Any) -> bool:
        """Whether a template may call something that is no method of a text, list or dictionary."""
        if isinstance(function, MethodType):
            owner, name = function.__self__, function.__name__
            return isinstance(owner, (LoopContext, TemplateDict, _Generation)) and not name.startswith("__")
        is_made = isinstance(function, (Macro, LoopContext, BlockReference, Joiner, Undefined, _Format))
        return is_made or any(function is allowed for allowed in self._functions)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Python code of a template, from its rewritten syntax tree."""
        return super()._generate(_Pricing().rewrite(source), *args, **kwargs)


class _Format:
    """``"...".format`` of a template."""

    def __init__(self, environment: TemplateSandbox, text: str, is_map: bool) -> None:
        self._environment, self._text, self._is_map = environment, text, is_map

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        """The formatted text."""
        if self._is_map:
            (kwargs,), args = args, ()
        return BoundedFormatter(self._environment).vformat(self._text, args, kwargs)


class _Generation(Extension):
    """The block ``{% generation %}``, which marks replies for training; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The statements in the block, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("render_body"), [], [], body).set_lineno(line)

    def render_body(self, caller: Callable[[], str]) -> str:
        """The text of the block."""
        return str(caller())


class _Pricing(NodeTransformer):
    """Rewrites a template so that it pays for what it does."""

    def __init__(self) -> None:
        self._rules: dict[type[nodes.Node], Callable[..., nodes.Node]] = {
            nodes.For: self._price_loop,
            nodes.Macro: self._price_body,
            nodes.CallBlock: self._price_body,
            nodes.Block: self._price_body,
            nodes.Output: self._price_output,
            nodes.Compare: self._price_comparison,
            nodes.Concat: self._price_concatenation,
            nodes.Getitem: self._price_slice,
            nodes.Pair: self._price_pair,
        }

    def get_visitor(self, node: nodes.Node) -> Callable[..., nodes.Node] | None:
        """The rule for a node, if there is one."""
        return self._rules.get(type(node))

    def rewrite(self, template: nodes.Template) -> nodes.Template:
        """The same template with prices; raises ``TemplateSyntaxError`` for tags that chat templates cannot have."""
        for node in template.find_all((*_INHERITANCE, nodes.EvalContextModifier)):
            raise TemplateSyntaxError("chat templates cannot include, import, extend or escape", node.lineno)
        self.generic_visit(template)
        _charge_body(template)
        return template

    def _price_loop(self, node: nodes.For) -> nodes.Node:
        """A loop pays for each round and each test."""
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_price(node.test), node.test)
        return _charge_body(node)

    def _price_body(self, node: nodes.Macro) -> nodes.Node:
        """A macro pays for each call."""
        self.generic_visit(node)
        return _charge_body(node)

    def _price_output(self, node: nodes.Output) -> nodes.Node:
        """Text of the template becomes a value, which pays for being written."""
        self.generic_visit(node)
        node.nodes = [
            nodes.Const(child.data, lineno=child.lineno) if isinstance(child, nodes.TemplateData) else child
            for child in node.nodes
        ]
        return node

    def _price_comparison(self, node: nodes.Compare) -> nodes.Node:
        """A comparison pays for the smaller side; one with a short constant costs no more than a node."""
        self.generic_visit(node)
        compared, left = list[nodes.Expr](), node.expr
        for operand in node.ops:
            compared.append(_comparison(left, operand))
            left = operand.expr
        result = compared[0]
        for following in compared[1:]:
            result = nodes.And(result, following, lineno=node.lineno)
        return result

    def _price_concatenation(self, node: nodes.Concat) -> nodes.Node:
        """``~`` pays for each part."""
        self.generic_visit(node)
        node.nodes = [_call(_MEASURE, part) for part in node.nodes]
        return node

    def _price_slice(self, node: nodes.Getitem) -> nodes.Node:
        """A slice pays for what it copies."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call(_GLANCE, node.node)
        return node

    def _price_pair(self, node: nodes.Pair) -> nodes.Node:
        """The key of a dictionary is read as a whole."""
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _call(_MEASURE, node.key)
        return node


@pass_context
def _as_text(context: Context, value: Any) -> str:
    """The text of a value that is written."""
    text = value if isinstance(value, str) else str(measured(value))
    glanced(text)
    return text


def _call(name: str, value: nodes.Expr, *args: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _price(node: nodes.Node) -> nodes.Expr:
    """An expression that pays for the nodes under a node, and is true."""
    cost = NODE_COST * (1 + sum(1 for _ in node.find_all(nodes.Node)))
    return _call(_CHARGE, nodes.Const(cost, lineno=node.lineno))


def _charge_body(node: Any) -> nodes.Node:
    """Let the body of a loop, macro, block or template pay each time that it runs."""
    price = nodes.ExprStmt(_price(node), lineno=node.lineno)
    node.body = [price, *node.body]
    return node  # type: ignore[no-any-return]


def _comparison(left: nodes.Expr, operand: nodes.Operand) -> nodes.Expr:
    is_short = any(isinstance(side, nodes.Const) for side in (left, operand.expr)) and operand.op not in ("in", "notin")
    if is_short:
        return nodes.Compare(left, [operand], lineno=left.lineno)
    return _call(_COMPARE, left, nodes.Const(operand.op, lineno=left.lineno), operand.expr)
