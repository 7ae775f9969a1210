"""The cohort's QC page: one static HTML from the content of `qc.json`, what went wrong first. No script from elsewhere.

It lies in `report/` and links the pictures of `../tile/`, which a browser loads only when they come into view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2

from mad.reporting.quality import BLURRED, INKED, num_stored

GALLERY = 'loading="lazy" width="240" height="180"'
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1500px;padding:0 1.5rem 4rem;color:#1a1a1a}
h1{margin-bottom:.2rem} h2{margin-top:2.2rem;border-bottom:1px solid #ccc} nav a{margin-right:1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums} td,th{padding:.2rem .6rem;text-align:left;vertical-align:top}
tr:nth-child(even) td{background:#f6f6f6} thead th{border-bottom:2px solid #888;background:#fff;position:sticky;top:0}
#slides thead th{cursor:pointer} td.n,th.n{text-align:right} .tables{display:flex;flex-wrap:wrap;gap:1rem 3rem}
.bar{display:inline-block;height:.8em;background:#0072b2} .failed,.none{font-weight:600;color:#a33c00} .warned{color:#7a5600}
.gallery{display:flex;flex-wrap:wrap;gap:12px} figure{margin:0;width:240px} figcaption{overflow-wrap:anywhere;font-size:13px}
img{object-fit:contain;background:#f3f3f3;border:1px solid #ddd} .wide{overflow-x:auto} input,select{font:inherit;padding:.2rem}
"""
SCRIPT = """
const body=document.querySelector('#slides tbody'),rows=[...body.rows],text=document.querySelector('#find'),
kind=document.querySelector('#kind'),shown=document.querySelector('#shown');
function filter(){const t=text.value.toLowerCase(),k=kind.value;let n=0;
for(const r of rows){r.hidden=!(r.textContent.toLowerCase().includes(t)&&(!k||r.dataset.kind===k));n+=!r.hidden}
shown.textContent=n+' of '+rows.length}
text.oninput=kind.onchange=filter;filter();
document.querySelectorAll('#slides thead th').forEach((head,c)=>head.onclick=()=>{
const down=head.dataset.down=head.dataset.down==='1'?'0':'1',value=r=>r.cells[c].dataset.v??r.cells[c].textContent,
empty=v=>v===''||v==='–';
rows.sort((a,b)=>{const x=value(a),y=value(b);if(empty(x)||empty(y))return empty(x)-empty(y);
const d=isNaN(x)||isNaN(y)?x.localeCompare(y):x-y;return down==='1'?d:-d});body.append(...rows)});
if(location.protocol==='data:'){ // inside Snakemake's report, which has the pictures themselves
for(const gone of document.querySelectorAll('#gallery,.gallery,a[href="#gallery"]'))gone.remove();
for(const link of document.querySelectorAll('a[href^="../"]'))link.replaceWith(...link.childNodes)}
"""
TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Slides: quality control</title><style>{{ style|safe }}</style></head><body>
{%- macro table(heads, lines) %}<table><thead><tr>{% for head in heads %}<th{% if not loop.first %} class="n"{% endif %}>
{{- head }}</th>{% endfor %}</tr></thead><tbody>
{% for line in lines %}<tr>{% for cell in line %}<td{% if not loop.first %} class="n"{% endif %}>{{ cell|number }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody></table>{% endmacro %}
{%- macro picture(id) %}<a href="../tile/{{ id|urlencode }}.png">{{ id }}</a>{% endmacro %}
<h1>Slides: quality control</h1>
<p>{{ q.num_slides }} slides of {{ q.num_patients }} patients: {{ q.states.ok }} gave tiles,
<span class="{{ 'failed' if q.states.failed }}">{{ q.states.failed }} failed</span>,
<span class="{{ 'none' if q.states['no tile'] }}">{{ q.states['no tile'] }} gave no tile</span>
{%- if q.states['not made yet'] %}, {{ q.states['not made yet'] }} not made yet{% endif %},
<span class="{{ 'warned' if q.num_warned }}">{{ q.num_warned }} with remarks</span>.
{{ q.num_annotated }} annotated, {{ q.num_slides - q.num_annotated }} unlabelled.
{{ q.unreadable|number }} unreadable tiles. {{ q.inked_slides }} slides with pen marks.</p>
<nav><a href="#bad">Failed and empty</a><a href="#warned">Remarks</a><a href="#cohort">Cohort</a><a href="#all">All slides</a>
<a href="#gallery">Pictures</a></nav>
<h2 id="bad">Failed, or without a tile</h2>
{% if bad %}<table><thead><tr><th>Slide</th><th>State</th><th>Cause</th><th>What mends it</th></tr></thead><tbody>
{% for s in bad %}<tr><td>{{ picture(s.slide_id) }}</td><td class="failed">{{ s.state }}</td><td>{{ s.cause or '–' }}</td>
<td>{{ s.mend }}</td></tr>
{% endfor %}</tbody></table>{% else %}<p>None.</p>{% endif %}
<h2 id="warned">Remarks</h2>
{% if warned %}<table><thead><tr><th>Slide</th><th>Remarks</th></tr></thead><tbody>
{% for s in warned %}<tr><td>{{ picture(s.slide_id) }}</td><td>{% for text in s.warnings %}{{ text }}
{%- if not loop.last %}<br>{% endif %}{% endfor %}</td></tr>
{% endfor %}</tbody></table>{% else %}<p>None.</p>{% endif %}
<h2 id="cohort">Cohort</h2><div class="tables">
<section><h3>Splits</h3>{{ table(['Split', 'Slides', 'Patients', 'Tiles in shards'], splits) }}</section>
<section><h3>Magnifications</h3>{{ table(['', 'Slides', 'Tiles ok', 'Blank', 'Edge', 'In shards'], scales) }}</section>
<section><h3>Classes (ok tiles)</h3>{% if classes %}{{ table(['Class', 'Slides'] + magnifications, classes) }}
{%- else %}<p>No tile is labelled.</p>{% endif %}</section>
<section><h3>Scale read from</h3>{{ table(['Source', 'Slides'], q.mpp_sources.items()) }}</section>
<section><h3>µm/px of level 0</h3><table>{% for value, n in q.mpp_histogram.items()|sort(attribute='0') %}<tr><td>{{ value }}</td>
<td class="n">{{ n }}</td><td><span class="bar" style="width:{{ (200 * n / mpp_most)|round(1) }}px"></span></td></tr>
{% endfor %}</table></section>
<section><h3>Focus (variance of the Laplacian)</h3>
{{ table(['', 'Cohort median', 'Blurred under'], focus) }}
<p>Tiles with tissue; blurred: under {{ blurred }} of the cohort's median.</p></section></div>
<h2 id="all">All slides</h2>
<p><input id="find" type="search" placeholder="find in any column"> <select id="kind"><option value="">every state</option>
{% for state in q.states %}<option>{{ state }}</option>{% endfor %}</select> <span id="shown"></span>.
A click on a heading sorts. Inked: ok tiles with ink on at least {{ '{:.0%}'.format(inked) }} of them.</p>
<div class="wide"><table id="slides"><thead><tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr></thead><tbody>
{% for kind, line in lines %}<tr data-kind="{{ kind }}"><td>{{ picture(line[0]) }}</td>{% for cell in line[1:] %}
{%- if cell is string or cell is none %}<td>{{ cell or '–' }}</td>
{%- else %}<td class="n" data-v="{{ cell }}">{{ cell|number }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<h2 id="gallery">Pictures</h2><div class="gallery">
{% for s in q.slides if s.state != 'failed' %}<figure><a href="../tile/{{ s.slide_id|urlencode }}.png">
<img {{ gallery|safe }} alt="" src="../tile/{{ s.slide_id|urlencode }}.png"></a><figcaption>{{ s.slide_id }}
{%- if s.state != 'ok' %}: <span class="none">{{ s.state }}</span>{% endif %}</figcaption></figure>
{% endfor %}</div>
<script>{{ script|safe }}</script></body></html>
"""


def qc_page(quality: Mapping[str, Any]) -> str:
    """The page as HTML. Whatever comes from the cohort sheet, a slide or an error is escaped.

    Args:
        quality: as `mad.reporting.quality.cohort_quality` gives it.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = _number
    slides, scales = quality["slides"], quality["scales"]
    magnifications = list(scales)
    heads = ["Slide", "State", "Patient", "Split", "Site", "Scanner", "Stain", "µm/px", "Scale from", "Tissue %"]
    heads += [*(f"ok {m}" for m in magnifications), "In shards", "Labelled %", "Unreadable", "Ink on tissue %", "Inked"]
    heads += [f"{what} {m}" for m in quality["focus"] for what in ("Focus", "Blurred %")]
    return environment.from_string(TEMPLATE).render(
        q=quality,
        style=STYLE,
        script=SCRIPT,
        gallery=GALLERY,
        blurred=BLURRED,
        inked=INKED,
        bad=[s for s in slides if s["state"] in ("failed", "no tile")],
        warned=[s for s in slides if s["warnings"]],
        splits=[(name, *line.values()) for name, line in quality["splits"].items()],
        scales=[(name, *line.values()) for name, line in scales.items()],
        magnifications=magnifications,
        classes=[(n, c["slides"], *(c.get(m, 0) for m in magnifications)) for n, c in quality["classes"].items()],
        focus=[(name, *line.values()) for name, line in quality["focus"].items()],
        mpp_most=max(quality["mpp_histogram"].values(), default=1),
        heads=heads,
        lines=[(s["state"], _line(s, magnifications, list(quality["focus"]))) for s in slides],
    )


def _line(facts: Mapping[str, Any], magnifications: list[str], focused: list[str]) -> list[Any]:
    """A slide's cells of the big table: texts, and numbers in what their column prints."""
    cells = [facts[key] for key in ("slide_id", "state", "patient_id", "split", "site", "scanner", "stain")]
    cells += [facts["mpp"], facts["mpp_source"], _percent(facts["tissue_share"])]
    cells += [(facts["tiles"] or {}).get(magnification, {}).get("ok") for magnification in magnifications]
    cells += [num_stored(dict(facts)), _percent(facts["labelled_share"]), facts["unreadable"]]
    cells += [_percent(facts["pen_share"]), facts["inked"]]
    for magnification in focused:
        numbers = facts["focus"].get(magnification)
        cells += [None, None] if numbers is None else [numbers["median"], _percent(numbers["blurred"])]
    return [float(f"{cell:.4g}") if isinstance(cell, float) else cell for cell in cells]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(value: Any) -> str:
    """Counts with separators, other numbers to four digits, null as a dash; texts as they are."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
