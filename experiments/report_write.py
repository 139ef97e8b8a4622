"""The page of experiments/report.py written out: as Markdown, and as HTML in one file."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from jinja2 import Environment

from experiments.report_page import CONTROLS, Page, Picture, Sample, Table
from minir1.log import markdown_table

# ---- Markdown ----------------------------------------------------------------------------------


def markdown(page: Page, folder: Path) -> str:
    """The page, its figures as links relative to `folder`."""
    lines = [f"# {_quoted(page.title)}", page.finding]
    for section in page.sections:
        lines.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, Table):
                rows = [[_quoted(cell) for cell in row] for row in part.rows]
                lines.append(markdown_table([_quoted(cell) for cell in part.head], rows, part.text_columns))
            elif isinstance(part, Picture):
                lines.append(f"![{part.alt}]({part.file.relative_to(folder).as_posix()})")
            elif isinstance(part, Sample):
                lines += ["### Question", _fenced(part.question)]
                for label, verdict, tokens, thinking, answer in part.answers:
                    lines += [f"**{label}**: {verdict}, {tokens} tokens", _fenced(f"{thinking}\n----\n{answer}")]
            else:
                lines.append(part)
    return "\n\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A text of one line in which nothing is markup."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", " ".join(CONTROLS.sub("\ufffd", text).split()))


def _fenced(text: str) -> str:
    """A code block; its fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{CONTROLS.sub(chr(0xFFFD), text)}\n{fence}"


# ---- HTML --------------------------------------------------------------------------------------


def html(page: Page) -> str:
    """The page as one file that reaches for nothing: figures as data, no script, every text escaped."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    environment.filters["kind"] = lambda part: type(part).__name__
    return environment.from_string(TEMPLATE).render(page=page)


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ page.title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1f2933; --muted: #566370; --paper: #fff; --card: #f4f6f8; --rule: #d5dae0;
  --yes: #1d7a55; --no: #b3303f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --muted: #a3aeb9; --paper: #15191e; --card: #1f252c;
  --rule: #39424c; --yes: #5cc79a; --no: #f08a94; } }
body { max-width: 70rem; margin: 0 auto; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.6rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
.finding { font-size: 1.1rem; max-width: 52rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 40rem; }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td.text, th.text { text-align: left; }
td.number { white-space: nowrap; }
img { width: 100%; height: auto; background: #fff; border-radius: 6px; margin: .6rem 0; }
.yes, .right { color: var(--yes); font-weight: 600; }
.no, .wrong { color: var(--no); font-weight: 600; }
h3 { font: 600 1rem/1.5 ui-monospace, monospace; unicode-bidi: isolate; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border-radius: 6px; padding: .7rem .9rem; min-width: 0; break-inside: avoid; }
.card p { margin: 0 0 .4rem; font-size: .9rem; }
pre { margin: 0; font: .8rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: isolate; max-height: 18rem; overflow-y: auto; }
pre.answer { margin-top: .5rem; padding-top: .5rem; border-top: 1px dashed var(--rule); font-weight: 600; }
.muted { color: var(--muted); }
@media print {
  :root { color-scheme: light; --ink: #000; --muted: #444; --paper: #fff; --card: #f4f6f8; --rule: #bbb; --yes: #060;
    --no: #900; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  table { font-size: 7.5pt; min-width: 0; }
  td.number { white-space: normal; }
  img, tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  pre { max-height: none; overflow: visible; }
  .scroll { overflow: visible; }
}
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
<p class="finding">{{ page.finding }}</p>
{% for section in page.sections %}
<h2>{{ section.title }}</h2>
{% for part in section.parts %}
{% if part|kind == "Table" %}
<div class="scroll"><table>
<thead><tr>
{%- for cell in part.head %}<th{% if loop.index0 < part.text_columns %} class="text"{% endif %}>{{ cell }}</th>
{% endfor %}</tr></thead>
<tbody>
{% for row in part.rows %}
<tr>{% for cell in row %}<td class="{{ 'text' if loop.index0 < part.text_columns else 'number' }}
{{- ' ' ~ cell if cell in ('yes', 'no') }}">{{ {"yes": "✓ yes", "no": "✗ no"}.get(cell, cell) }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% elif part|kind == "Picture" %}
<img alt="{{ part.alt }}" src="data:image/png;base64,{{ part.file|inline }}">
{% elif part|kind == "Sample" %}
<h3>{{ part.question }}</h3>
<div class="answers">
{% for label, verdict, tokens, thinking, answer in part.answers %}
<div class="card">
<p><b>{{ label }}</b> · <span class="{{ verdict }}">{{ {"right": "✓ right", "wrong": "✗ wrong"}.get(verdict, verdict) }}
</span> <span class="muted">· {{ tokens }} tokens</span></p>
<pre>
{{ thinking }}</pre>
<pre class="answer">
{{ answer or "no answer: the thinking never ends" }}</pre>
</div>
{% endfor %}
</div>
{% else %}
<p class="muted">{{ part }}</p>
{% endif %}
{% endfor %}
{% endfor %}
</body>
</html>
"""
