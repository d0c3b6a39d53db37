"""Turns a run's data and figures into the HTML page of the report.

``render_page(run)`` returns the page. What it says is worked out here; ``templates/`` holds the HTML and the style, and
writes numbers as ``utils.format`` does. Jinja escapes every value; only figures, built from escaped parts, are
marked as markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jinja2
import numpy as np

from megasparse.reporting.figures import PARTS, all_figures, spread
from megasparse.reporting.run_data import Film, RunData, column, items, lookup, spans_of
from megasparse.reporting.svg import thin_out, tinted_picture
from megasparse.utils import format as formats
from megasparse.utils.format import (
    MISSING,
    describe_kernel,
    divide,
    finite,
    format_bytes,
    format_compact,
    format_count,
    format_decimal,
    format_factor,
    format_flops,
    format_integer,
    format_phase,
    format_seconds,
    format_share,
)

FRAMES_PER_FILM = 10
MAX_FILMS = 24
PICTURE_SIDE = 128
"""Pixels of the longer side of a picture of a topology; larger ones are averaged down."""

PICTURE_BUDGET = 800_000
"""Bytes of all pictures together; films beyond it are left out, with a remark."""

MAX_TEXT_CHARACTERS = 60_000
"""Longer texts (configuration, sample) are cut, with a remark: the page is to stay below two megabytes."""

PHASE_COSTS = ("step", "tokens", "seconds", "flops_dense", "flops_algorithmic", "flops_executed")
"""Cumulative numbers of the log that are told by phase."""


class Row(NamedTuple):
    """A labelled value of a table; `note` explains it."""

    label: str
    value: str
    note: str = ""


def render_page(run: RunData) -> str:
    """The whole report as HTML: one file that loads nothing."""
    films, film_remark = film_strips(run)
    return fill_in(
        "report.html",
        run=run,
        verdict=verdict(run),
        outcome=outcome(run),
        ribbon=ribbon(run),
        summary=summary_rows(run),
        flops={kind: run.number(f"flops_{kind}") for kind in ("dense", "algorithmic", "executed")},
        kernels=kernels_used(run),
        phases=phase_rows(run),
        parts=PARTS,
        seconds=seconds_by_part(run),
        topology=topology_rows(run),
        plan=plan_groups(run.plan),
        plan_warnings=[flat(warning) for warning in _listed(run.plan.get("warnings"))],
        figures=all_figures(run),
        films=films,
        film_remark=film_remark,
        max_characters=MAX_TEXT_CHARACTERS,
    )


def fill_in(template: str, **values: Any) -> str:
    """A file of ``templates/`` with its values; what they hold that is no text of one UTF-8 file becomes `?`."""
    page = template_environment().get_template(template).render(values).strip() + "\n"
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def template_environment() -> jinja2.Environment:
    """Of the files of ``templates/``; it keeps what it has compiled."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megasparse.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: value for name, value in vars(formats).items() if name.startswith("format_")}
    environment.filters["fewer"] = fewer
    return environment


def outcome(run: RunData) -> dict[str, Any]:
    """What the run reached and what it cost: numbers, None where nothing is known."""
    valid, train = run.number("val_loss"), run.number("loss")
    seconds, tokens = run.number("seconds"), run.number("tokens")
    best = finite(run.summary.get("best_val_loss"))
    losses, densities = (column(run.metrics, key)[1] for key in ("val_loss", "density"))
    return {
        "steps": int(finite(run.summary.get("steps")) or run.last_step),
        "loss": train if valid is None else valid,
        "loss_name": "training loss" if valid is None and train is not None else "validation loss",
        "best_loss": min(losses, default=None) if best is None else best,
        "share": divide(run.number("flops_algorithmic"), run.number("flops_dense")),
        "seconds": seconds,
        "tokens": tokens,
        "rate": divide(tokens, seconds),
        "density": run.number("final_density", "density"),
        "mean_density": np.mean(densities) if len(densities) else None,
    }


def verdict(run: RunData) -> str:
    """The run in one sentence."""
    found, planned = outcome(run), run.planned_steps
    if run.finished:
        beginning = f"Finished {found['steps']:,} steps"
    elif run.summary:
        reason = run.summary.get("reason")
        beginning = f"Stopped at step {found['steps']:,} of {planned:,}" + (f" ({reason})" if reason else "")
    elif run.metrics:
        beginning = f"Logged up to step {found['steps']:,} of {planned:,}, without a summary: still running, or killed"
    else:
        return "Nothing was logged in this folder yet."
    of_what = "the dense FLOPs" if run.finished else "the dense FLOPs of the same steps"
    facts = {
        "loss": f"{found['loss_name']} {format_decimal(found['loss'])}",
        "share": f"{format_share(found['share'])} of {of_what}",
        "seconds": f"{format_seconds(found['seconds'])} of training",
        "density": f"density {format_share(found['density'])} at the end",
    }
    known = ", ".join(words for name, words in facts.items() if found[name] is not None)
    return f"{beginning}: {known}." if known else f"{beginning}."


def ribbon(run: RunData) -> dict[str, Any] | None:
    """The density over the planned steps as an area in a 1000 x 100 box, with lanes of phases and patterns."""
    steps, densities = column(run.metrics, "density")
    end = float(run.planned_steps)
    if not len(steps) or end <= 0.0:
        return None
    x, y = thin_out(steps, densities, 400)
    line = _points(1000.0 * x / end, y.clip(0.0, 1.0))
    planned = np.array([finite(value) for value in _listed(lookup(run.plan, "schedule", "curve"))], dtype=np.float64)
    has_plan = len(planned) > 1 and np.isfinite(planned).all()
    reached = 1000.0 * x[-1] / end
    rest = round(100.0 - reached / 10.0, 3)
    lanes = {"phase": run.phase_spans(), "attention": spans_of(run.metrics, "pattern")}
    return {
        "line": line,
        "area": f"{1000.0 * x[0] / end:.1f},100 {line} {reached:.1f},100",
        "planned": _points(np.linspace(0.0, 1000.0, len(planned)), planned) if has_plan else "",
        "lanes": {
            title: [
                {"name": name, "first": first, "last": last, "share": (min(last, end) - first) / end}
                for name, first, last in spans
                if first < end
            ]
            for title, spans in lanes.items()
        },
        # Logging stops at the last multiple of its interval; less than two hundredths is no early stop.
        "rest": rest if rest > 2.0 else 0.0,
    }


def _points(x: np.ndarray, share: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{100.0 - 100.0 * b:.1f}" for a, b in zip(x, share, strict=True))


def summary_rows(run: RunData) -> list[Row]:
    summary, found = run.summary, outcome(run)
    parameters = finite(summary.get("parameters")) or finite(lookup(run.plan, "parameters", "total"))
    reason = None if run.finished else summary.get("reason")
    executed = divide(run.number("flops_executed"), found["seconds"])
    rows = [
        Row("Steps", f"{found['steps']:,} of {run.planned_steps:,}", str(reason) if reason else ""),
        Row("Tokens", format_count(found["tokens"])),
        Row("Parameters", format_count(parameters)),
        Row("Training loss", format_decimal(run.number("loss"))),
        Row("Validation loss", format_decimal(run.number("val_loss"))),
        Row("Best validation loss", format_decimal(found["best_loss"])),
        Row("Final density", format_share(found["density"])),
        Row("Training time", format_seconds(found["seconds"])),
        Row("Tokens per second", format_count(found["rate"]), "mean over the run"),
        Row("Executed FLOPs per second", MISSING if executed is None else f"{format_flops(executed)[:-1]}/s"),
        Row("Hardware", flat(summary.get("hardware"))),
    ]
    versions = summary.get("versions")
    if isinstance(versions, Mapping):
        rows.append(Row("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def kernels_used(run: RunData) -> dict[str, int]:
    """How many sparse layers each kernel computes where they are sparsest, as the plan says."""
    counts: Counter[str] = Counter()
    for row in items(lookup(run.summary, "kernels", "block_sparse") or lookup(run.plan, "kernels", "block_sparse")):
        counts[str(row.get("kernel"))] += int(finite(row.get("count")) or 0)
    return counts


def phase_rows(run: RunData) -> list[dict[str, Any]]:
    """What each phase cost: from the differences between consecutive complete lines of the log."""
    complete = [
        record
        for record in run.metrics
        if isinstance(record.get("phase"), str)
        and all(finite(record.get(key)) is not None for key in (*PHASE_COSTS, "density"))
    ]
    if not complete:
        return []
    changes = np.diff([[float(record[key]) for key in PHASE_COSTS] for record in complete], axis=0, prepend=0.0)
    phases = np.array([record["phase"] for record in complete])
    densities = np.array([float(record["density"]) for record in complete])
    rows = []
    for name in dict.fromkeys(phases.tolist()):
        inside = phases == name
        steps, tokens, seconds, dense, algorithmic, executed = changes[inside].sum(axis=0).tolist()
        rows.append(
            {
                "name": name,
                "steps": steps,
                "density": divide(float(densities[inside] @ changes[inside, 0]), steps),
                "algorithmic": divide(algorithmic, dense),
                "executed": divide(executed, dense),
                "seconds": divide(seconds, steps),
                "rate": divide(tokens, seconds),
            }
        )
    dense_rate = next((row["rate"] for row in rows if row["name"] == "dense"), None)
    return [{**row, "speedup": divide(row["rate"], dense_rate)} for row in rows]


def seconds_by_part(run: RunData) -> dict[str, float]:
    """Seconds of each part of the training time; empty where none are known."""
    parts = lookup(run.summary, "seconds_by_part")
    if not isinstance(parts, Mapping):
        parts = {part: run.latest(f"seconds_{part}") for part in PARTS}
        total = run.latest("seconds")
        if total is not None:
            parts["other"] = max(0.0, total - sum(value or 0.0 for value in parts.values()))
    known = {str(name): seconds for name, value in parts.items() if (seconds := finite(value)) is not None}
    return known if sum(known.values()) > 0.0 else {}


def topology_rows(run: RunData) -> list[Row]:
    if not run.topology:
        return []
    dropped, grown, seconds, flips = (
        column(run.topology, key)[1] for key in ("dropped", "grown", "seconds", "flip_rate")
    )
    last = run.topology[-1]
    return [
        Row("Topology updates", f"{len(run.topology):,}"),
        Row("Units dropped", format_count(dropped.sum())),
        Row("Units grown", format_count(grown.sum())),
        Row("Mean flip rate", format_share(flips.mean() if len(flips) else None)),
        Row("Weights ever active", format_share(last.get("ever_active"))),
        Row("Inactive rows at the last step", format_integer(last.get("inactive_rows"))),
        Row("Time in topology updates", format_seconds(seconds.sum() if len(seconds) else None)),
    ]


def film_strips(run: RunData) -> tuple[list[dict[str, Any]], str]:
    """Films as data URIs within the budget, and a sentence on what was left out."""
    strips: list[dict[str, Any]] = []
    spent = unreadable = 0
    for film in (run.films[i] for i in spread(len(run.films), MAX_FILMS)):
        frames, failed = _frames(run, film)
        unreadable += failed
        size = sum(len(frame["source"]) for frame in frames)
        if frames and spent + size <= PICTURE_BUDGET:
            spent += size
            strips.append({"layer": film.layer, "frames": frames})
    words = []
    if len(strips) < len(run.films):
        words.append(f"{len(strips)} of {len(run.films)} layers are shown, to keep this page small.")
    if unreadable:
        words.append(f"{unreadable} pictures cannot be read.")
    return strips, " ".join(words)


def _frames(run: RunData, film: Film) -> tuple[list[dict[str, Any]], int]:
    steps, densities = column(run.metrics, "density")
    spans = run.phase_spans()
    frames, failed = [], 0
    for picture in (film.pictures[i] for i in spread(len(film.pictures), FRAMES_PER_FILM)):
        try:
            source, width, height = tinted_picture(picture.path, PICTURE_SIDE)
        except (OSError, ValueError, SyntaxError):
            failed += 1
            continue
        density = picture.density
        if density is None and len(steps):
            density = float(np.interp(picture.step, steps, densities))
        # The end of a phase is the start of the next; only the last step belongs to the last phase.
        last_phase = spans[-1][0] if spans else ""
        phase = next((name for name, first, last in spans if first <= picture.step < last), last_phase)
        # Small grids of blocks are enlarged to where a block is easy to see.
        scale = PICTURE_SIDE / max(width, height)
        size = {"width": max(6, round(scale * width)), "height": max(6, round(scale * height))}
        frames.append({"source": source, **size, "step": picture.step, "phase": phase, "density": density})
    return frames, failed


def plan_groups(plan: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """The plan as titled tables, with units; keys that are not known are shown as they are."""
    single = [Row(key, flat(plan[key])) for key in ("run", "steps", "documents") if key in plan]
    groups = [("run", single)] if single else []
    for key, section in plan.items():
        if key not in ("run", "steps", "warnings") and isinstance(section, Mapping) and section:
            rows = [row for name, entry in section.items() for row in _plan_rows(str(key), str(name), entry)]
            groups.append(("memory per rank" if key == "memory" else _in_words(key), rows))
    return groups


def _plan_rows(section: str, name: str, entry: Any) -> list[Row]:
    """Rows of one entry of a section of the plan; none for a long list, such as the curve of the density."""
    if (section, name) == ("schedule", "phases"):
        return [_phase_row(phase) for phase in items(entry)]
    if (section, name) == ("kernels", "block_sparse") and isinstance(entry, list):
        return [Row(str(row.get("layer")), describe_kernel(row)) for row in items(entry)]
    if isinstance(entry, list) and len(entry) > 12:
        return []
    units = {"parameters": format_count, "flops": format_flops, "memory": format_bytes, "tokens": format_count}
    shown = format_share if name in ("mean_density", "min_density", "ratio") else units.get(section, flat)
    return [Row(_in_words(name), flat(entry) if finite(entry) is None else shown(entry))]


def _phase_row(phase: Mapping[str, Any]) -> Row:
    steps = [format_integer(phase.get(key)) for key in ("start_step", "end_step")]
    ends = [format_share(phase[key]) for key in ("start_density", "end_density") if key in phase]
    words = [f"density {' to '.join(dict.fromkeys(ends))}"] if ends else []
    words += [f"attention {phase['pattern']}"] if "pattern" in phase else []
    return Row(format_phase(phase.get("name")), f"steps {' to '.join(steps)}", ", ".join(words))


def flat(value: Any) -> str:
    """Any JSON value in one line."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return format_compact(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {flat(entry)}" for name, entry in value.items())
    return ", ".join(map(flat, value)) if isinstance(value, list) else str(value)


def fewer(share: float | None) -> str:
    """How a cost compares with dense, of which it is a share: `2.64x fewer`, or `1.05x more`."""
    if not share:
        return MISSING
    return f"{format_factor(1.0 / share)} fewer" if share <= 1.0 else f"{format_factor(share)} more"


def _in_words(name: Any) -> str:
    return str(name).replace("_", " ")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []
