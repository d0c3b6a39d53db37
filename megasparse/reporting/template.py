"""HTML and style of the report. ``report_page`` fills them in; every value is escaped there by Jinja."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f7f8; --surface: #ffffff; --ink: #13202a; --muted: #586a78; --grid: #dce5ea; --hair: #e4ebef;
  --loss: #2a5bd7; --validation: #cf4a12; --density: #0c8f86; --dense: #7a8894;
  --warm_up: #0c8f86; --ultra_sparse: #0c8f86; --restoration: #0c8f86;
  --forward: #3f74e0; --backward: #7754c9; --optimizer: #d98a1f; --topology: #0c8f86; --data: #93a3ae;
  --run_1: #2a5bd7; --run_2: #cf4a12; --run_3: #0c8f86; --run_4: #7754c9; --run_5: #b67a06; --run_6: #c2337a;
  --run_7: #4d7c0f; --run_8: #586a78;
  --good: #0b7a4b; --warn: #a85408; --tint: #109e94;
  --sans: "Inter", "Segoe UI", system-ui, -apple-system, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #0d1317; --surface: #141c22; --ink: #e5edf2; --muted: #95a7b4; --grid: #27343d; --hair: #222e37;
    --loss: #7da4ff; --validation: #ff9259; --density: #36c9bd; --dense: #8a9aa7;
    --warm_up: #36c9bd; --ultra_sparse: #36c9bd; --restoration: #36c9bd;
    --forward: #6f9bff; --backward: #a78bf2; --optimizer: #f0b04f; --topology: #36c9bd; --data: #6d7f8c;
    --run_1: #7da4ff; --run_2: #ff9259; --run_3: #36c9bd; --run_4: #b39df5; --run_5: #f0b04f; --run_6: #ff7fb8;
    --run_7: #a3d14f; --run_8: #a9b8c4;
    --good: #4fd39a; --warn: #ffb066;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--sans);
  font-variant-numeric: tabular-nums; }
.layout { max-width: 1200px; margin: 0 auto; padding: 40px 28px 80px; display: grid;
  grid-template-columns: 148px minmax(0, 1fr); gap: 0 44px; }
header { grid-column: 1 / -1; margin-bottom: 40px; }
main { min-width: 0; }
nav { position: sticky; top: 28px; align-self: start; font-size: 14px; }
nav a { display: block; padding: 4px 0; color: var(--muted); text-decoration: none; }
nav a:hover, nav a:focus-visible { color: var(--ink); }
:focus-visible { outline: 2px solid var(--density); outline-offset: 3px; border-radius: 3px; }
h1 { margin: 0; font-size: clamp(30px, 5.2vw, 46px); line-height: 1.1; font-weight: 680; letter-spacing: -0.025em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 20px; font-size: 23px; line-height: 1.25; font-weight: 660; letter-spacing: -0.015em; }
h3 { margin: 0 0 4px; font-size: 16px; font-weight: 640; }
section { padding: 34px 0 38px; border-top: 1px solid var(--grid); scroll-margin-top: 8px; }
section:first-of-type { padding-top: 0; border-top: 0; }
p { margin: 0 0 12px; max-width: 68ch; }
.heading { display: flex; flex-wrap: wrap; align-items: baseline; gap: 6px 16px; }
.status { font-size: 14px; font-weight: 600; white-space: nowrap; }
.status::before { content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 7px; border-radius: 2px;
  background: currentColor; }
.good { color: var(--good); } .warn { color: var(--warn); }
.verdict { margin: 14px 0 26px; font-size: clamp(17px, 2vw, 20px); line-height: 1.45; color: var(--ink);
  max-width: 76ch; overflow-wrap: anywhere; }
.ribbon { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 10px; margin-bottom: 30px; }
.ribbon .strip { position: relative; height: 92px; border-bottom: 1px solid var(--muted);
  border-top: 1px dashed var(--grid); }
.ribbon svg { display: block; width: 100%; height: 100%; overflow: visible; }
.ribbon .area { fill: var(--density); opacity: .2; }
.ribbon .line { fill: none; stroke: var(--density); stroke-width: 2; vector-effect: non-scaling-stroke; }
.ribbon .planned { fill: none; stroke: var(--muted); stroke-width: 1.2; stroke-dasharray: 4 4;
  vector-effect: non-scaling-stroke; }
.ribbon .rest { position: absolute; right: 0; top: 0; bottom: 0; color: var(--muted); font-size: 13px; display: flex;
  align-items: center; padding-left: 12px; overflow: hidden;
  background: repeating-linear-gradient(135deg, transparent 0 6px, var(--grid) 6px 7px); }
.ribbon .rest span { background: var(--page); padding: 1px 7px; border-radius: 3px; white-space: nowrap; }
.ribbon .scale { display: flex; flex-direction: column; justify-content: space-between; font-size: 12px;
  line-height: 1; color: var(--muted); }
.lane { display: flex; margin-top: 5px; gap: 2px; min-width: 0; }
.lane div { min-width: 0; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; font-size: 13px;
  line-height: 1.3; padding: 2px 7px 3px; border-radius: 2px; background: var(--hair); color: var(--ink); }
.lane .ultra_sparse { background: color-mix(in srgb, var(--density) 34%, var(--page)); }
.lane .warm_up, .lane .restoration { background: color-mix(in srgb, var(--density) 18%, var(--page)); }
.lane-title { font-size: 12px; line-height: 1; color: var(--muted); align-self: center; margin-top: 5px; }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 20px 28px; margin: 0; }
.tiles dd { margin: 0; font-size: clamp(22px, 2.9vw, 33px); line-height: 1.15; font-weight: 660;
  letter-spacing: -0.02em; }
.tiles dt { font-size: 14px; color: var(--muted); }
.tiles .note { font-size: 14px; color: var(--muted); font-weight: 400; letter-spacing: 0; line-height: 1.5; }
.tiles > div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.remarks { margin: 0 0 30px; padding: 14px 18px; background: color-mix(in srgb, var(--warn) 10%, var(--page));
  border-radius: 6px; font-size: 15px; }
.remarks ul { margin: 4px 0 0; padding-left: 19px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 13px; vertical-align: bottom; }
th, td { padding: 8px 14px 8px 0; border-bottom: 1px solid var(--hair); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
tbody th { color: var(--ink); font-size: 15px; vertical-align: top; white-space: nowrap; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 390px), 1fr));
  gap: 0 40px; margin: 0; }
.pairs > div { display: flex; justify-content: space-between; gap: 20px; padding: 8px 0;
  border-bottom: 1px solid var(--hair); font-size: 15px; }
.pairs dt { color: var(--muted); flex: none; }
.pairs dd { margin: 0; text-align: right; min-width: 0; overflow-wrap: anywhere; }
.pairs small { display: block; color: var(--muted); font-size: 13px; }
.pairs .whole { grid-column: 1 / -1; }
figure { margin: 0 0 36px; }
figure:last-child { margin-bottom: 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; font-family: var(--sans);
  font-variant-numeric: tabular-nums; stroke-linejoin: round; }
figure .narrow { display: none; }
figcaption { font-size: 14px; color: var(--muted); margin-bottom: 12px; }
figcaption p { margin: 0; }
figcaption h3 { color: var(--ink); }
.keys { display: flex; flex-wrap: wrap; gap: 2px 20px; margin-top: 5px; color: var(--ink); }
.key { display: inline-flex; align-items: center; gap: 7px; }
.mark { flex: none; width: 20px; height: 0; border-top: 3px solid var(--mark); }
.mark.faint { opacity: .4; } .mark.dashed { border-top-style: dashed; border-top-width: 2px; }
.mark.dot { width: 9px; height: 9px; border: 0; border-radius: 50%; background: var(--mark); }
.mark.area { width: 13px; height: 13px; border: 0; border-radius: 2px; background: var(--mark); }
.mark.ramp { width: 90px; height: 12px; border: 0; border-radius: 2px;
  background: linear-gradient(90deg, rgb(16 158 148 / .05), rgb(16 158 148)); outline: 1px solid var(--grid); }
.bar { height: 8px; border-radius: 2px; background: var(--mark); min-width: 2px; margin-top: 7px; }
.ledger { display: grid; gap: 24px; margin: 0; }
.ledger .top { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 20px; align-items: baseline; }
.ledger p { margin: 8px 0 0; font-size: 15px; color: var(--muted); }
.ledger .numbers { font-size: 15px; } .ledger .numbers b { font-weight: 640; font-size: 17px; }
.stack { display: flex; gap: 2px; height: 34px; margin-bottom: 14px; }
.stack div { background: var(--mark); min-width: 1px; }
.stack div:first-child { border-radius: 4px 0 0 4px; } .stack div:last-child { border-radius: 0 4px 4px 0; }
.stack-keys { display: flex; flex-wrap: wrap; gap: 4px 26px; margin: 0 0 34px; padding: 0; list-style: none;
  font-size: 14px; }
.stack-keys span { color: var(--muted); }
.film { margin-bottom: 26px; }
.film h3 { font-family: var(--mono); font-size: 13px; font-weight: 500; overflow-wrap: anywhere; }
.frames { display: flex; gap: 14px; overflow-x: auto; padding: 8px 1px 12px; align-items: flex-start; }
.frames figure { margin: 0; flex: none; font-size: 12.5px; line-height: 1.35; min-width: 78px; }
.frames .picture { height: 130px; display: flex; align-items: center; }
.frames.low .picture { height: auto; }
.frames img { display: block; image-rendering: pixelated; outline: 1px solid var(--grid); background: var(--surface); }
.frames figcaption { margin: 6px 0 0; font-size: 12.5px; }
.frames figcaption b { color: var(--ink); font-weight: 600; }
details { border-bottom: 1px solid var(--hair); }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; }
pre { margin: 0 0 16px; padding: 16px 18px; background: var(--surface); border: 1px solid var(--hair);
  border-radius: 6px; font: 13px/1.6 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; }
.config pre { max-height: 620px; overflow: auto; }
.sample { font-size: 14px; }
.plan { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 390px), 1fr)); gap: 26px 40px; }
.plan .pairs { display: block; } .plan h3::first-letter { text-transform: uppercase; }
.absent { color: var(--muted); font-size: 15px; }
footer { grid-column: 1 / -1; margin-top: 26px; color: var(--muted); font-size: 13px; }
@media (max-width: 900px) {
  .layout { display: block; padding: 28px 20px 60px; }
  nav { display: none; }
}
@media (max-width: 640px) {
  figure .wide { display: none; } figure .narrow { display: block; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .lane .slim { color: transparent; padding: 2px 0 3px; }
  .ribbon .strip { height: 74px; }
  section { padding: 26px 0 28px; }
}
@media print {
  body { background: #fff; font-size: 11pt; }
  .layout { display: block; max-width: none; padding: 0; }
  nav { display: none; }
  figure, .film, .ledger > div, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll, .frames { overflow: visible; } .frames { flex-wrap: wrap; }
  header { margin-bottom: 18px; } section { padding: 18px 0; } figure { margin-bottom: 18px; } br { display: none; }
  figcaption br, th br { display: inline; }
  .pairs { display: block; columns: 2; column-gap: 36px; } .pairs > div { break-inside: avoid; padding: 4px 0; }
  .plan { display: block; columns: 2; column-gap: 36px; } .plan > div { break-inside: avoid; margin-bottom: 16px; }
  .plan .pairs { columns: auto; }
  .pairs > div, .ledger p, td, tbody th { font-size: 10pt; }
  .frames { zoom: .62; } .film { margin-bottom: 8px; }
  .config details::details-content { content-visibility: visible; height: auto; }
  .config pre { max-height: none; }
  .ribbon, .lane div, .stack div, .bar, .mark, .remarks { print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
"""

MACROS = """{% macro figure(name) %}
{% if name in figures %}
{% set entry = figures[name] %}
<figure id="figure-{{ name }}">
<figcaption><h3>{{ entry.figure.title }}</h3>{% if entry.figure.caption %}<p>{{ entry.figure.caption }}</p>{% endif %}
{% if entry.figure.keys %}
<div class="keys">{% for key in entry.figure['keys'] %}<span class="key"><span class="mark {{ key.mark }}"
style="--mark: var(--{{ key.role }})"></span>{{ key.label }}</span>{% endfor %}</div>
{% endif %}
</figcaption>
<div class="wide">{{ entry.wide }}</div>
<div class="narrow">{{ entry.narrow }}</div>
</figure>
{% else %}
<p class="absent">No figure here: {{ absent[name] }}.</p>
{% endif %}
{% endmacro %}
{% macro pairs(rows) %}
<dl class="pairs">
{% for row in rows %}
<div{% if row.value|length > 44 %} class="whole"{% endif %}><dt>{{ row.label }}</dt>
<dd>{{ row.value }}{% if row.note %}<small>{{ row.note }}</small>{% endif %}</dd></div>
{% endfor %}
</dl>
{% endmacro %}
{% macro strip(film) %}
<div class="film"><h3>{{ film.layer }}</h3>
<div class="frames{% if film.frames[0].height < 100 %} low{% endif %}" tabindex="0">
{% for frame in film.frames %}
<figure><div class="picture"><img src="{{ frame.source }}" width="{{ frame.width }}" height="{{ frame.height }}"
alt="{{ film.layer }} at step {{ frame.step }}"></div>
<figcaption><b>{{ frame.step }}</b><br>{{ frame.phase }}<br>{{ frame.density }}</figcaption></figure>
{% endfor %}
</div></div>
{% endmacro %}
"""

TEMPLATE = (
    MACROS
    + """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ run.name }}: MegaSparse run</title>
<style>{{ style }}</style>
</head>
<body>
<div class="layout">
<header>
<div class="heading"><h1>{{ run.name }}</h1><span class="status {{ status.kind }}">{{ status.word }}</span></div>
<p class="verdict">{{ verdict }}</p>
{% if ribbon %}
<div class="ribbon">
<div class="strip"><svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img"
aria-label="Density over the planned steps"><polygon class="area"
points="{{ ribbon.area }}"/>
{% if ribbon.planned %}<polyline class="planned" points="{{ ribbon.planned }}"/>{% endif %}
<polyline class="line" points="{{ ribbon.line }}"/></svg>
{% if ribbon.rest %}<div class="rest" style="width: {{ ribbon.rest }}%"><span>not run</span></div>{% endif %}
</div>
<div class="scale"><span>100 %</span><span>density</span><span>0</span></div>
{% for lane in ribbon.lanes %}
<div class="lane">{% for span in lane.spans %}<div class="{{ span.kind }}{% if span.slim %} slim{% endif %}"
style="width: {{ span.width }}%" title="{{ span.name }}, {{ span.steps }}">{{ span.name }}</div>{% endfor %}</div>
<div class="lane-title">{{ lane.title }}</div>
{% endfor %}
</div>
{% endif %}
<dl class="tiles">
{% for tile in tiles %}
<div><dt>{{ tile.label }}{% if tile.note %}<div class="note">{{ tile.note }}</div>{% endif %}</dt>
<dd>{{ tile.value }}</dd></div>
{% endfor %}
</dl>
</header>
<nav aria-label="Sections">
<a href="#summary">Summary</a><a href="#learning">Learning</a><a href="#cost">FLOPs</a><a href="#time">Time</a>
<a href="#topology">Topology</a><a href="#optimizer">Optimizer</a><a href="#plan">Plan</a>
<a href="#configuration">Configuration</a><a href="#sample">Sample</a>
</nav>
<main>
{% if run.remarks %}
<div class="remarks" role="note"><strong>What this folder lacks</strong>
<ul>{% for remark in run.remarks %}<li>{{ remark }}</li>{% endfor %}</ul></div>
{% endif %}
<section id="summary"><h2>Summary</h2>
{{ pairs(summary) }}
</section>
<section id="learning"><h2>Learning</h2>
{{ figure("losses") }}
{{ figure("flops") }}
</section>
<section id="cost"><h2>FLOPs</h2>
{% if ledger %}
<div class="ledger">
{% for row in ledger %}
<div><div class="top"><h3>{{ row.name }}</h3><div class="numbers"><b>{{ row.value }}</b>{% if row.factor %},
{{ row.share }} of dense, {{ row.factor }}{% endif %}</div></div>
<div class="bar" style="width: {{ row.width }}%; --mark: var(--{{ {'dense': 'dense', 'algorithmic': 'loss',
'executed': 'validation'}[row.kind] }})"></div>
<p>{{ row.sentence }}</p></div>
{% endfor %}
</div>
{% else %}
<p class="absent">No FLOPs were recorded.</p>
{% endif %}
</section>
<section id="time"><h2>Time</h2>
{% if seconds %}
<h3>Seconds by part</h3>
<div class="stack" role="img" aria-label="Seconds by part">{% for part in seconds %}<div
style="width: {{ part.width }}%; --mark: var(--{{ part.role }})" title="{{ part.name }}: {{ part.seconds }}"></div>
{% endfor %}</div>
<ul class="stack-keys">{% for part in seconds %}<li class="key"><span class="mark area"
style="--mark: var(--{{ part.role }})"></span>{{ part.name }} <b>{{ part.seconds }}</b> <span>{{ part.share }}</span>
</li>{% endfor %}</ul>
{% else %}
<p class="absent">No seconds by part were recorded.</p>
{% endif %}
{% if phases %}
<h3>What each phase cost</h3>
<div class="scroll"><table>
<thead><tr><th>Phase</th><th class="number">Steps</th><th class="number">Mean density</th>
<th class="number">Algorithmic<br>of dense</th><th class="number">Executed<br>of dense</th>
<th class="number">Time per step</th><th class="number">Tokens/s</th>
<th class="number">Speed against<br>dense phase</th>
</tr></thead><tbody>
{% for row in phases %}
<tr><th>{{ row.name }}</th><td class="number">{{ row.steps }}</td><td class="number">{{ row.density }}</td>
<td class="number">{{ row.algorithmic }}</td><td class="number">{{ row.executed }}</td>
<td class="number">{{ row.milliseconds }}</td><td class="number">{{ row.rate }}</td>
<td class="number">{{ row.speedup }}</td></tr>
{% endfor %}
</tbody></table></div><br>
{% endif %}
{{ figure("step_time") }}
{{ figure("throughput") }}
</section>
<section id="topology"><h2>Topology</h2>
{% if topology %}{{ pairs(topology) }}<br>{% endif %}
{{ figure("layers") }}
{{ figure("churn") }}
<h3>Film strips</h3>
<p class="absent">Active blocks or weights of a layer are coloured, inactive ones empty.
{% if film_remark %}{{ film_remark }}{% endif %}</p>
{% for film in films[:4] %}{{ strip(film) }}{% else %}
<p class="absent">There are no pictures of the topology.</p>
{% endfor %}
{% if films|length > 4 %}
<details><summary>{{ films|length - 4 }} more layers</summary>
{% for film in films[4:] %}{{ strip(film) }}{% endfor %}
</details>
{% endif %}
</section>
<section id="optimizer"><h2>Optimizer</h2>
{{ figure("optimizer") }}
</section>
<section id="plan"><h2>Plan</h2>
{% if plan_warnings %}
<div class="remarks" role="note"><strong>Warnings at the start</strong>
<ul>{% for warning in plan_warnings %}<li>{{ warning }}</li>{% endfor %}</ul></div>
{% endif %}
<div class="plan">
{% for title, rows in plan %}
<div><h3>{{ title }}</h3>{{ pairs(rows) }}</div>
{% else %}
<p class="absent">There is no plan in this folder.</p>
{% endfor %}
</div></section>
<section id="configuration" class="config"><h2>Configuration</h2>
{% if config %}
<details><summary>Resolved configuration</summary><pre>{{ config[0] }}</pre>
{% if config[1] %}<p class="absent">{{ config[1] }}</p>{% endif %}</details>
{% else %}
<p class="absent">There is no configuration in this folder.</p>
{% endif %}
</section>
<section id="sample"><h2>Sample text</h2>
{% if sample %}
<pre class="sample">{{ sample[0] }}</pre>
{% if sample[1] %}<p class="absent">{{ sample[1] }}</p>{% endif %}
{% else %}
<p class="absent">There is no sample text in this folder.</p>
{% endif %}
</section>
</main>
<footer>Written by MegaSparse from the files of this run folder.</footer>
</div>
</body>
</html>
"""
)
