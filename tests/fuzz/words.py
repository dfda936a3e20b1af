"""What is put into texts: fragments that parsers, templates and calls of the kit must refuse or answer."""

from __future__ import annotations

TEMPLATE_WORDS = r"""
{% break %}
{% continue %}
{% if
%}
{{
{% for x in range(10) %}
{% endfor %}
{{ messages }}
{{ '\ud800' }}
{{ 1/0 }}
{{ ''[9] }}
{{ 10**10000 }}
{{ none.x }}
{{ messages[5].x }}
{{ messages|tojson }}
{{ messages.append(1) }}
{{ bos_token }}
{{ self }}
{{ ''.__class__.__mro__ }}
{{ cycler.__init__.__globals__ }}
{{ namespace().x }}
{% set a = a ~ a %}
{{ 'a' * 100000000 }}
{{ 'x'|center(99999999) }}
{{ lipsum(n=1000) }}
{{ range(100000)|list|length }}
{% for i in range(9999999) %}{% endfor %}
{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}
{% include 'x' %}
{% generation %}x{% endgeneration %}
{{ raise_exception('no') }}
{{ strftime_now('%Y') }}
""".strip().splitlines()

_DEEP, _DIGITS = "[" * 3000, "1" * 5000
ROW_WORDS = [
    *r"""
"images": ["/dev/zero"]
"images": [3]
"task": "alpha"
"Prompt": ""
{"prompt": "a"}
\ud800
\u0000
NaN
1e400
null
{
}
,
:
"
é
""".strip().splitlines(),
    *("\ufeff", "\u2028", "\r", "\x00", _DEEP, _DIGITS),
]
STUDY_WORDS = [
    *r"""
a = 1
a.b.c = 1
[[methods]]
[training]
kind = "full"
sizes = [1, 2]
combine = ["a", "b"]
name = 'x'
= 1e400
= nan
= inf
= -1
= 0
= [
= {}
= true
= ""
= 1979-05-27
= 99999999999
\"\"\"
'''
#
é
\ud800
""".strip().splitlines(),
    *("\x00", f"= {_DEEP}", f"= {_DIGITS}", "= 0x" + "f" * 5000, "." * 3000, "a." * 1000 + "b = 1"),
]

# Arguments of calls, as Python source: right ones, wrong ones, and ones of another type.
INTEGERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "True",
    "1.5",
    "None",
    "'1'",
    "float('nan')",
    "95",
    "96",
    "10**9",
    "2**31",
    "2**63",
    "2**64",
    "10**30",
]
FRACTIONS = ["0.0", "1.0", "0.5", "-0.1", "1e-320", "1e400", "float('nan')", "2.0", "None", "'a'"]
TEXTS = [
    "'abc'",
    "''",
    "'a'*40",
    "'a'*5000",
    "'\\ud800'",
    "'\\x00'",
    "'é'",
    "b'abc'",
    "5",
    "None",
    "[]",
    "['a']",
    "'<eos>'",
    "'@'",
]
TASKS = r"""
None
'alpha'
'beta'
'double'
'prompted'
'none'
''
5
['alpha']
[None, 'beta']
[5]
('alpha',)
'../x'
b'alpha'
{}
""".strip().splitlines()
IDS = r"""
[[5, 6]]
[[5]]
[[]]
[]
[[5, 6], [7]]
[[5.5]]
[['a']]
[[96]]
[[-1]]
[[2**63]]
[[True]]
None
5
'a'
[[5] * 64]
[[5] * 65]
[[float('nan')]]
[[5, 6, 7, 8]] * 9
np.ones((1, 0), int)
np.ones((0, 3), int)
np.ones((2, 3), np.int8)
np.ones((1, 2, 3), int)
np.full((1, 2), 5, np.uint64)
np.array([[5, None]], object)
""".strip().splitlines()
MASKS = r"""
None
[[1, 1]]
[[0, 1]]
[[1, 0]]
[[0, 0]]
[[1]]
[[2, 1]]
[[1.0, 1.0]]
'a'
[[True, True]]
np.ones((1, 2))
[]
""".strip().splitlines()
EMBEDS = r"""
np.zeros((1, 2, 48), np.float32)
np.zeros((1, 2, 48))
np.zeros((1, 2, 47), np.float32)
np.full((1, 2, 48), np.nan, np.float32)
np.full((1, 2, 48), 3e38, np.float32)
np.zeros((1, 0, 48), np.float32)
np.zeros((2, 48), np.float32)
'a'
""".strip().splitlines()
STOPS = r"""
()
''
'a'
['a', '']
[5]
None
5
'\ud800'
['a'] * 1000
('b', None)
'<eos>'
""".strip().splitlines()
SAMPLING = r"""
None
5
{{}}
SamplingParams()
SamplingParams(temperature={0})
SamplingParams(top_k={0})
SamplingParams(top_p={0})
SamplingParams(seed={0})
SamplingParams(temperature=1.0, top_p={1}, top_k={0})
""".strip().splitlines()
LENGTHS = ["1", "2", "3", "0", "-1", "10**9", "2**63", "True", "1.5", "None", "'1'"]
