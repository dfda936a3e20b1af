"""The page of a study: HTML as one file with its images, and the same as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from adalink.runtime.errors import WriteError
from studies.report.table import accuracy_rows, comparison_rows, not_compared_line, overall_rows, shared_rows

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ summary.study.name }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { border: 1px solid #ccc; padding: 0.2rem 0.6rem; }
th { background: #f2f2f2; text-align: left; } td { font-variant-numeric: tabular-nums; } img { max-width: 100%; }
</style></head><body>
<h1>{{ summary.study.name }}</h1>
<p>{{ summary.study.description }}</p>
<p>{{ summary.runs.finished }} runs are finished, {{ summary.runs.open }} are open. Devices:
{{ summary.devices | join(", ") or "none" }}; training steps in {{ summary.study.training.precision }}, scores in
float32. {{ summary.scoring }}{% if not_compared %} {{ not_compared }}{% endif %}</p>
{% for title, note, columns, rows in tables if rows %}
<h2>{{ title }}</h2>
<p>{{ note }}</p>
<table><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
{% for title, image in images %}
<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}">
{% endfor %}
<h2>Versions</h2>
<p>{% for name, versions in summary.versions.items() %}{{ name }} {{ versions | join(" and ") }}. {% endfor %}</p>
</body></html>
"""


_MARKDOWN = """# {{ summary.study.name }}

{{ summary.study.description }}

{{ summary.runs.finished }} runs are finished, {{ summary.runs.open }} are open.
Devices: {{ summary.devices | join(", ") or "none" }}; training steps in {{ summary.study.training.precision }},
scores in float32.
{{ summary.scoring }}
{%- if not_compared %}
{{ not_compared }}
{%- endif %}
{% for title, note, columns, rows in tables if rows %}
## {{ title }}
{% if note %}
{{ note }}
{% endif %}
| {{ columns | join(" | ") }} |
|{{ " --- |" * (columns | length) }}
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
{%- endfor %}
{%- for title, plot in plots.items() %}
![{{ title }}](plots/{{ plot.name }})
{% endfor %}
## Versions

{% for name, versions in summary.versions.items() %}{{ name }} {{ versions | join(" and ") }}. {% endfor %}
"""


def write_pages(out: Path, summary: Mapping[str, Any], plots: Mapping[str, Path]) -> None:
    """Write ``study.html`` and ``study.md``; raises ``WriteError``.

    Args:
        out: the study's folder.
        summary: what ``summarize`` gave.
        plots: PNG files in ``out / "plots"``, by what they show.
    """
    tables = [
        ("Accuracy", "In percent of the test rows: mean and standard deviation over seeds.", *accuracy_rows(summary)),
        ("Paired, seed by seed", summary["paired"], *comparison_rows(summary)),
        ("All data sets together", "", *overall_rows(summary)),
        (
            "One for all",
            "One trained on all data sets that are combined, beside one for each, whose parameters are added up.",
            *shared_rows(summary),
        ),
    ]
    try:
        images = [(title, base64.b64encode(plot.read_bytes()).decode("ascii")) for title, plot in plots.items()]
        for name, template, escapes in (("study.html", _TEMPLATE, True), ("study.md", _MARKDOWN, False)):
            page = jinja2.Environment(autoescape=escapes, keep_trailing_newline=True).from_string(template)
            text = page.render(
                summary=summary, tables=tables, images=images, plots=plots, not_compared=not_compared_line(summary)
            )
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise WriteError(f"study: cannot write {error.filename}: {error.strerror}; choose a writable --out") from error
