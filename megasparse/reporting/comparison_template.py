"""HTML of a comparison of runs; style and macros are those of a run's own report."""

from __future__ import annotations

from megasparse.reporting.template import MACROS

COMPARISON_STYLE = """
.runs { list-style: none; margin: 18px 0 0; padding: 0; display: grid; gap: 12px; }
.runs li { display: grid; grid-template-columns: 28px minmax(0, 1fr); align-items: start; }
.runs .mark { margin-top: 12px; }
.runs b { overflow-wrap: anywhere; margin-right: 10px; }
.runs p { margin: 0; color: var(--muted); font-size: 15px; overflow-wrap: anywhere; }
.comparison th, .comparison td { overflow-wrap: anywhere; }
.comparison thead th { min-width: 88px; }
.comparison tbody th { white-space: normal; min-width: 150px; }
.comparison small { display: block; color: var(--muted); font-size: 13px; font-weight: 400; }
.comparison tr.title th { padding-top: 22px; color: var(--muted); font-size: 13px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 7px;
  background: var(--mark); }
"""

COMPARISON_TEMPLATE = (
    MACROS
    + """{% macro head(first) %}
<thead><tr><th>{{ first }}</th>{% for run in runs %}<th class="number"><span class="swatch"
style="--mark: var(--{{ run.role }})"></span>{{ run.label }}</th>{% endfor %}</tr></thead>
{% endmacro %}
{% macro line(row) %}
<tr><th>{{ row.label }}{% if row.note %}<small>{{ row.note }}</small>{% endif %}</th>
{% for value in row['values'] %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}: MegaSparse runs compared</title>
<style>{{ style }}</style>
</head>
<body>
<div class="layout">
<header>
<h1>{{ runs|length }} run{{ "" if runs|length == 1 else "s" }} compared</h1>
<ul class="runs">
{% for run in runs %}
<li><span class="mark {{ run.mark }}" style="--mark: var(--{{ run.role }})"></span>
<div><b>{{ run.label }}</b> <span class="status {{ run.status.kind }}">{{ run.status.word }}</span>
<p>{{ run.verdict }}</p></div></li>
{% endfor %}
</ul>
</header>
<nav aria-label="Sections">
<a href="#losses">Losses</a><a href="#budgets">Equal cost</a><a href="#ledger">Ledger</a>
<a href="#topology">Topology</a><a href="#settings">Settings</a>
</nav>
<main>
{% for run in runs if run.remarks %}
<div class="remarks" role="note"><strong>What {{ run.label }} lacks</strong>
<ul>{% for remark in run.remarks %}<li>{{ remark }}</li>{% endfor %}</ul></div>
{% endfor %}
<section id="losses"><h2>Losses</h2>
{{ figure("loss-step") }}
{{ figure("loss-tokens") }}
{{ figure("loss-flops_algorithmic") }}
{{ figure("loss-flops_executed") }}
{{ figure("loss-seconds") }}
</section>
<section id="budgets"><h2>At equal cost</h2>
{% if budgets %}
<p class="absent">The loss of each run at the largest cost that all of them have reached. One run of each kind ranks
nothing: seeds differ, and so do schedules that were cut short.</p>
<div class="scroll"><table class="comparison">{{ head("At") }}<tbody>
{% for row in budgets %}{{ line(row) }}{% endfor %}
</tbody></table></div>
{% else %}
<p class="absent">No cost was logged by all runs.</p>
{% endif %}
</section>
<section id="ledger"><h2>Ledger</h2>
<div class="scroll"><table class="comparison">{{ head("") }}<tbody>
{% for title, rows in ledger %}
<tr class="title"><th colspan="{{ runs|length + 1 }}">{{ title }}</th></tr>
{% for row in rows %}{{ line(row) }}{% endfor %}
{% endfor %}
</tbody></table></div>
</section>
<section id="topology"><h2>Topology</h2>
{{ figure("density") }}
{% for run in runs %}{{ figure("layers-%d" % loop.index0) }}{% endfor %}
{% for film in films if film.strips %}
<h3><span class="swatch" style="--mark: var(--{{ film.role }})"></span>{{ film.label }}</h3>
<p class="absent">Active blocks or weights of a layer are coloured, inactive ones empty. {{ film.remark }}</p>
{% for one in film.strips %}{{ strip(one) }}{% endfor %}
{% endfor %}
</section>
<section id="settings"><h2>Settings that differ</h2>
{% if settings is none %}
<p class="absent">Fewer than two of these folders hold a configuration that can be read.</p>
{% elif settings %}
<div class="scroll"><table class="comparison">{{ head("Setting") }}<tbody>
{% for row in settings %}{{ line(row) }}{% endfor %}
</tbody></table></div>
{% else %}
<p class="absent">All settings are the same.</p>
{% endif %}
</section>
</main>
<footer>Written by MegaSparse from the files of these run folders.</footer>
</div>
</body>
</html>
"""
)
