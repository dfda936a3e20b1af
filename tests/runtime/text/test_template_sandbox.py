"""Hostile chat templates: bounded work, text and time, and no way out of the sandbox."""

from __future__ import annotations

import time

import pytest
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adalink.runtime.errors import RequestError
from adalink.runtime.text import template_budget
from adalink.runtime.text.chat_template import ChatTemplate
from adalink.runtime.text.template_sandbox import TemplateSandbox

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
# A value that doubles in each round, as a text or as a list of itself.
_DOUBLE = "{{% set ns = namespace(v={0}) %}}{{% for i in range(200) %}}{{% set ns.v = {1} %}}{{% endfor %}}"
_NESTED = _DOUBLE.format("('a',)", "(ns.v, ns.v)")


def render(source: str) -> str:
    return ChatTemplate(source, "chat_template.jinja", {"bos_token": "<s>"}).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}" + 50 * "text " + "{% endfor %}{% endfor %}",
        "{% for x in [range(9000)] * 9000 recursive %}{{ loop(x) if x is iterable }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(100000) %}{{ range(100000) | map('string') | list | length }}{% endfor %}",
        "{% for i in range(100000) %}{{ range(100000) | select('eq', -1) | first }}{% endfor %}",
        "{% for i in range(100000) %}{{ -1 in range(100000) | list }}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 10 ** 9 * 'a' }}",
        "{{ 10 ** 5000 ** 50 }}",
        "{{ 'aaaa'.replace('a', 'b' * 1000000).replace('b', 'c' * 1000000) }}",
        "{{ ('aaaa' | replace('a', 'b' * 1000000)) | replace('b', 'c' * 1000000) }}",
        "{{ ('a' * 1000000).replace('', 'b' * 1000) }}",
        _DOUBLE.format("'a'", "ns.v ~ ns.v") + "{{ ns.v }}",
        _DOUBLE.format("'a'", "ns.v + ns.v") + "{{ ns.v }}",
        _DOUBLE.format("['a']", "ns.v + ns.v") + "{{ ns.v }}",
        _NESTED + "{{ ns.v }}",
        _NESTED + "{{ ns.v | tojson }}",
        _NESTED + "{{ ns.v ~ '' }}",
        _NESTED + "{{ {}[ns.v] }}",
        _NESTED + "{{ {ns.v: 1} }}",
        _NESTED + "{{ ns.v in {} }}",
        _NESTED + "{{ '%s' % (ns.v,) }}",
        _NESTED + "{{ '{}'.format(ns.v) }}",
        _NESTED + "{{ '{!r}'.format(ns.v) }}",
        _NESTED + "{{ [1].index(ns.v) }}",
        _NESTED + "{{ raise_exception(ns.v) }}",
        _NESTED + "{% for i in [1] %}{{ loop.changed(ns.v) }}{{ loop.changed(ns.v) }}{% endfor %}",
        _DOUBLE.format("['a'], w=['a']", "[ns.v, ns.v] %}{% set ns.w = [ns.w, ns.w]") + "{{ ns.v == ns.w }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ 'a'.zfill(10 ** 9) }}",
        "{{ 'a\t'.expandtabs(10 ** 9) }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ ('\n' * 100000) | indent(100000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%.1000000000f' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%1000000000d' is even }}",
        "{{ '%1000000000d' is divisibleby(2) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=10 ** 9) }}",
        "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
        "{{ ','.join(['a' * 10000] * 100000) }}",
        "{{ (['a' * 10000] * 10000) | join('x' * 10000) }}",
        "{{ [1, 2] | batch(10 ** 9, 'x') | list }}",
        "{{ [1, 2] | slice(10 ** 9) | list }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ messages | tojson(indent='a' * 100000000) }}",
        "{{ 5.5 | round(10 ** 9, 'ceil') }}",
        "{{ 'a' | round(9, 'ceil') }}",
        "{{ [[1]] * 10000 | sum(start=[]) }}",
        "{{ ('a' * 1000000).rfind('b' + 'a' * 500000) }}",
        "{{ ('a' * 1000000).rsplit('b' + 'a' * 500000) }}",
        "{% set x, y = 'a' * 2000, 'b' + 'a' * 1000 %}{% for i in range(100000) %}{{ x.find(y) }}{% endfor %}",
        "{% for i in range(100000) %}{{ ('b' * 10000) | upper }}{% endfor %}",
        "{{ lipsum(n=10 ** 7) }}",
        "{{ (5).to_bytes(10 ** 9, 'big') }}",
        "{{ strftime_now('%c' * 1000000) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "a" * 1000000,
    ],
)
def test_templates_that_would_never_end_are_refused_quickly(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of work is paid for: a 16th of the limit is spent in a 16th of the time."""
    monkeypatch.setattr(template_budget, "WORK", template_budget.WORK // 16)
    begun = time.process_time()
    with pytest.raises(RequestError, match=r"^chat_template.jinja ") as caught:
        render(source)
    assert time.process_time() - begun < 1
    assert len(str(caught.value)) < 1000


def test_the_whole_limit_is_a_few_seconds() -> None:
    begun = time.process_time()
    with pytest.raises(RequestError, match="computes more than a chat template may"):
        render("{% for i in range(100000) %}{{ range(100000) | select('eq', -1) | first }}{% endfor %}")
    assert 0.1 < time.process_time() - begun < 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages.clear() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(_a=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ 'a'.encode() }}",
        "{{ 'a'.translate({97: 'b' * 1000}) }}",
        "{{ range.__self__ }}{{ range.mro() }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
    ],
)
def test_ways_out_of_the_sandbox_are_closed(source: str) -> None:
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(RequestError, match=r"chat_template.jinja"):
        ChatTemplate(source, "chat_template.jinja", {}).render(messages)
    assert messages == MESSAGES


def test_functions_that_no_rule_prices_cannot_be_called() -> None:
    """Jinja's own sandbox would call them."""
    with (
        template_budget.limited(template_budget.Budget(100)),
        pytest.raises(SecurityError, match="cannot call a function"),
    ):
        TemplateSandbox().from_string("{{ f() }}").render(f=lambda: "called")


def test_the_sandbox_is_jinjas_immutable_one() -> None:
    assert issubclass(TemplateSandbox, ImmutableSandboxedEnvironment)
    assert render("{{ messages.append is defined }}{{ messages[0].update is defined }}") == "FalseFalse"
    assert render("{{ ''.__class__ }}{{ messages | attr('__len__') }}") == ""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 'e' in messages[0].content }}", "TrueFalseTrue"),
        ("{{ 'x' not in messages[0] }}{{ 'role' in messages[0] }}{{ 2 in (1, 2) }}", "TrueTrueTrue"),
        ("{% for k, v in messages[1].items() %}{{ k }}={{ v }};{% endfor %}", "role=assistant;content=hi;"),
        ("{{ messages[::-1] | map(attribute='content') | join(', ') }}", "hi, hello"),
        ("{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is sequence else x }}{% endfor %}", "123"),
        ("{{ dict(a=1).a }}{{ namespace(self=2).self }}{{ dict.fromkeys('ab') | length }}", "122"),
        ("{{ [3, 1] | sort }}{{ {'b': 1} | dictsort }}{{ [1, 2] | sum }}", "[1, 3][('b', 1)]3"),
        ("{{ ['b', 'a', 'b'] | unique | list }}{{ 'a b'.split() }}{{ 'a' ~ 1 ~ none }}", "['b', 'a']['a', 'b']a1None"),
        ("{% set x %}abc{% endset %}{{ x | upper }}{% filter upper %}q{% endfilter %}", "ABCQ"),
        ("{{ 'a' is eq 'a' }}{{ [1, 2] | select('in', [1]) | list }}{{ 7 is odd }}", "True[1]True"),
        ("{{ '%s-%03d' % ('a', 5) }}{{ '{:>4}|{a}'.format(1, a=2) }}{{ '%s' | format(1) }}", "a-005   1|21"),
        ("{% set j = joiner(', ') %}{% for i in range(3) %}{{ j() }}{{ i }}{% endfor %}", "0, 1, 2"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.cycle('a', 'b') }}{% endfor %}", "1/2a2/2b"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}", "hello"),
        ("{% macro f(a, b='x') %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(2, b='y') }}", "1x2y"),
        ("{% macro f(a) %}{{ a }}{{ caller() }}{% endmacro %}{% call f(2) %}c{% endcall %}", "2c"),
        ("{{ messages | groupby('role') | map('first') | list }}", "['assistant', 'user']"),
        ("{{ 'a,b' | replace(',', ' ') | indent(2) | trim | title }}{{ 5.26 | round(1) }}{{ '12' | int }}", "A B5.312"),
        ("{% block b %}{{ bos_token }}{% endblock %}{{ self.b() }}", "<s><s>"),
    ],
)  # fmt: skip
def test_what_templates_use_works_as_in_jinja(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize("source", ["{% break %}", "{% continue %}", "{{ 'a' | nosuch }}", "{% if %}", "{{ '\ud800"])
def test_templates_that_cannot_be_compiled(source: str) -> None:
    with pytest.raises(RequestError, match=r"chat_template.jinja is no Jinja template for chats"):
        ChatTemplate(source, "chat_template.jinja", {})


def test_half_characters_of_a_template_are_an_error() -> None:
    with pytest.raises(RequestError, match=r"the text of chat_template.jinja holds '\\ud800' at character 1"):
        render(r"a{{ '\ud800' }}")
    with pytest.raises(RequestError, match=r"cannot render this message: \\ud800$"):
        render(r"{{ raise_exception('\ud800') }}")


def test_time_is_the_last_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "DEADLINE_S", 0.0)
    with pytest.raises(RequestError, match="it ran for more than 0 s"):
        render("{% for i in range(10) %}{{ i }}{% endfor %}")


def test_limits_grow_with_the_messages() -> None:
    """A long document passes through a template several times, and its text is longer than a template's own."""
    text = "a word " * 1_000_000
    source = "{% for m in messages %}{{ m.content | trim | replace('word', 'words') | upper | lower }}{% endfor %}"
    template = ChatTemplate(source, "chat_template.jinja", {})
    assert len(template.render([{"role": "user", "content": text}])) == 8_000_000 - 1
    assert len(template.render([{"role": "user", "content": "a"}] * 20_000)) == 20_000


def test_a_usual_template_takes_little_time() -> None:
    source = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    template = ChatTemplate(source, "chat_template.jinja", {})
    messages = [{"role": "user", "content": "a word " * 20}] * 20
    template.render(messages)
    begun = time.process_time()
    for _ in range(20):
        template.render(messages)
    assert (time.process_time() - begun) / 20 < 0.02
