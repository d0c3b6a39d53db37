"""Turns a run's data and figures into the HTML page of the report.

``render_page(run)`` returns the page. The words and tables are worked out here, ``templates/`` holds the HTML and the
style. Jinja escapes every value; only figures, which are built from escaped parts, are marked as markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from megasparse.reporting.figures import PARTS, all_figures
from megasparse.reporting.run_data import MAX_TEXT_CHARACTERS, Film, RunData, column, items, lookup, spans_of
from megasparse.reporting.svg import thin_out, tinted_picture
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


LEDGER = {
    "dense": (
        "Dense-equivalent",
        "What these steps would have cost with every weight active and full attention. "
        "A yardstick: it was not executed.",
    ),
    "algorithmic": (
        "Algorithmic",
        "What the method needs: active weights and attended pairs only. "
        "It is the figure that papers report, and no promise of saved time.",
    ),
    "executed": (
        "Executed",
        "What the kernels that ran really multiplied, dense steps and fallbacks included. "
        "Where it exceeds the algorithmic figure, the difference was saved on paper only.",
    ),
}
"""Kinds of FLOPs: name, and what the number means."""


@dataclass(frozen=True)
class Row:
    """A labelled value of a table; `note` explains it."""

    label: str
    value: str
    note: str = ""


def render_page(run: RunData) -> str:
    """The whole report as HTML: one file that loads nothing."""
    figures = all_figures(run)
    expected = {
        "losses": "no losses were logged",
        "flops": "no FLOPs were logged",
        "throughput": "no speeds were logged",
        "step_time": "no seconds by part were logged",
        "layers": "no topology updates were logged",
        "churn": "no topology updates were logged",
        "optimizer": "no learning rates were logged",
    }
    films, film_remark = film_strips(run)
    return fill_in(
        "report.html",
        run=run,
        status=status(run),
        verdict=verdict(run),
        tiles=tiles(run),
        ribbon=ribbon(run),
        summary=summary_rows(run),
        ledger=ledger_rows(run),
        phases=phase_rows(run),
        seconds=seconds_by_part(run),
        topology=topology_rows(run),
        plan=plan_groups(run.plan),
        plan_warnings=[flat(warning) for warning in _listed(run.plan.get("warnings"))],
        figures=figures,
        absent={name: words for name, words in expected.items() if name not in figures},
        films=films,
        film_remark=film_remark,
        config=cut(run.config),
        sample=cut(run.sample),
    )


def fill_in(template: str, **values: Any) -> str:
    """A file of ``templates/`` with its values; what they hold that is no text of one UTF-8 file becomes `?`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megasparse.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(values).strip() + "\n"
    return page.encode("utf-8", "replace").decode("utf-8")


def status(run: RunData) -> Mapping[str, str]:
    """How the run ended, as a word and its kind (`good`, `warn`)."""
    if not run.summary:
        return {"word": "no summary", "kind": "warn"}
    if run.summary.get("finished") is True:
        return {"word": "finished", "kind": "good"}
    return {"word": "stopped early", "kind": "warn"}


def final_loss(run: RunData) -> tuple[str, float | None]:
    """The loss to report: validation where there is one, else training."""
    for words, key in (("validation loss", "val_loss"), ("training loss", "loss")):
        value = finite(run.summary.get(key))
        value = run.latest(key) if value is None else value
        if value is not None:
            return words, value
    return "validation loss", None


def recorded(run: RunData, key: str, metric: str | None = None) -> float | None:
    """A number of the summary, or the last one logged where the summary lacks it."""
    value = finite(run.summary.get(key))
    return run.latest(metric or key) if value is None else value


def best_loss(run: RunData) -> float | None:
    """The lowest validation loss, of the log where there is no summary."""
    _, losses = column(run.metrics, "val_loss")
    best = finite(run.summary.get("best_val_loss"))
    return float(losses.min()) if best is None and len(losses) else best


def steps_done(run: RunData) -> int:
    return int(finite(run.summary.get("steps")) or run.last_step)


def verdict(run: RunData) -> str:
    """The run in one sentence."""
    words, loss = final_loss(run)
    done, planned = steps_done(run), run.planned_steps
    if run.summary.get("finished") is True:
        beginning = f"Finished {done:,} steps"
    elif run.summary:
        reason = run.summary.get("reason")
        beginning = f"Stopped at step {done:,} of {planned:,}" + (f" ({reason})" if reason else "")
    elif run.metrics:
        beginning = f"Logged up to step {done:,} of {planned:,}, without a summary: still running, or killed"
    else:
        return "Nothing was logged in this folder yet."
    facts = []
    if loss is not None:
        facts.append(f"{words} {format_decimal(loss)}")
    share = divide(recorded(run, "flops_algorithmic"), recorded(run, "flops_dense"))
    if share is not None:
        so_far = "" if run.summary.get("finished") is True else " of the same steps"
        facts.append(f"{format_share(share)} of the dense FLOPs{so_far}")
    seconds = recorded(run, "seconds")
    if seconds is not None:
        facts.append(f"{format_seconds(seconds)} of training")
    density = recorded(run, "final_density", "density")
    if density is not None:
        facts.append(f"density {format_share(density)} at the end")
    return f"{beginning}: {', '.join(facts)}." if facts else f"{beginning}."


def tiles(run: RunData) -> list[Row]:
    """The four numbers that are read first."""
    words, loss = final_loss(run)
    best = best_loss(run)
    share = divide(recorded(run, "flops_algorithmic"), recorded(run, "flops_dense"))
    seconds = recorded(run, "seconds")
    rate = divide(recorded(run, "tokens"), seconds)
    _, densities = column(run.metrics, "density")
    mean = f"mean {format_share(np.mean(densities))}" if len(densities) else ""
    return [
        Row(words, format_decimal(loss), f"best {format_decimal(best)}" if best is not None else ""),
        Row("of the dense FLOPs", format_share(share), _fewer(divide(1.0, share)) if share else ""),
        Row("training time", format_seconds(seconds), f"{format_count(rate)} tokens/s" if rate else ""),
        Row("final density", format_share(recorded(run, "final_density", "density")), mean),
    ]


def ribbon(run: RunData) -> dict[str, Any] | None:
    """The density over the planned steps as an area in a 1000 x 100 box, with lanes of phases and patterns."""
    steps, densities = column(run.metrics, "density")
    end = float(run.planned_steps)
    if not len(steps) or end <= 0.0:
        return None
    x, y = thin_out(steps, densities, 400)
    points = " ".join(
        f"{1000.0 * a / end:.1f},{100.0 - 100.0 * min(max(b, 0.0), 1.0):.1f}" for a, b in zip(x, y, strict=True)
    )
    reached = 1000.0 * x[-1] / end
    lanes = []
    for title, spans in (("phase", run.phase_spans()), ("attention", spans_of(run.metrics, "pattern"))):
        shown = [
            {
                "name": format_phase(name),
                "kind": name if title == "phase" and name in ("warm_up", "ultra_sparse", "restoration") else "other",
                "width": round(100.0 * (min(last, end) - first) / end, 3),
                "slim": (last - first) < 0.2 * end,
                "steps": f"steps {first:,.0f} to {last:,.0f}",
            }
            for name, first, last in spans
            if first < end
        ]
        if shown:
            lanes.append({"title": title, "spans": shown})
    rest = round(100.0 - reached / 10.0, 3)
    return {
        "line": points,
        "area": f"{1000.0 * x[0] / end:.1f},100 {points} {reached:.1f},100",
        "planned": _planned_curve(run),
        "lanes": lanes,
        # Logging stops at the last multiple of its interval; less than two hundredths is no early stop.
        "rest": rest if rest > 2.0 else 0.0,
        "end": f"{end:,.0f}",
    }


def summary_rows(run: RunData) -> list[Row]:
    summary = run.summary
    tokens = recorded(run, "tokens")
    seconds = recorded(run, "seconds")
    parameters = finite(summary.get("parameters")) or finite(lookup(run.plan, "parameters", "total"))
    reason = None if summary.get("finished") is True else summary.get("reason")
    rows = [
        Row("Steps", f"{steps_done(run):,} of {run.planned_steps:,}", str(reason) if reason else ""),
        Row("Tokens", format_count(tokens)),
        Row("Parameters", format_count(parameters)),
        Row("Training loss", format_decimal(recorded(run, "loss"))),
        Row("Validation loss", format_decimal(recorded(run, "val_loss"))),
        Row("Best validation loss", format_decimal(best_loss(run))),
        Row("Final density", format_share(recorded(run, "final_density", "density"))),
        Row("Training time", format_seconds(seconds)),
        Row("Tokens per second", format_count(divide(tokens, seconds)), "mean over the run"),
        Row("Executed FLOPs per second", _per_second(divide(recorded(run, "flops_executed"), seconds))),
        Row("Hardware", flat(summary.get("hardware"))),
    ]
    versions = summary.get("versions")
    if isinstance(versions, Mapping):
        rows.append(Row("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def ledger_rows(run: RunData) -> list[dict[str, Any]]:
    """The FLOPs of the run three times, each with a sentence on what it does and does not mean."""
    values = {kind: recorded(run, f"flops_{kind}") for kind in LEDGER}
    if not any(value is not None for value in values.values()):
        return []
    dense = values["dense"]
    return [
        {
            "kind": kind,
            "name": name,
            "value": format_flops(values[kind]),
            "share": format_share(divide(values[kind], dense)),
            "factor": "" if kind == "dense" else _fewer(divide(dense, values[kind])),
            "width": round(min(100.0, 100.0 * (divide(values[kind], dense) or 0.0)), 2),
            "sentence": sentence + (_kernels_used(run) if kind == "executed" else ""),
        }
        for kind, (name, sentence) in LEDGER.items()
    ]


def _kernels_used(run: RunData) -> str:
    """Which kernels the sparse layers had where they are sparsest, as the plan says."""
    counts: dict[str, int] = {}
    for row in items(lookup(run.summary, "kernels", "block_sparse") or lookup(run.plan, "kernels", "block_sparse")):
        counts[str(row.get("kernel"))] = counts.get(str(row.get("kernel")), 0) + int(finite(row.get("count")) or 0)
    if not counts:
        return ""
    words = ", ".join(f"{number:,} by the kernel {kernel}" for kernel, number in counts.items())
    return f" Of the sparse layers, at their lowest density: {words}."


def phase_rows(run: RunData) -> list[dict[str, str]]:
    """What each phase cost: from the differences between consecutive complete lines of the log."""
    keys = ("tokens", "seconds", "flops_dense", "flops_algorithmic", "flops_executed")
    totals: dict[str, dict[str, float]] = {}
    previous: dict[str, float] = dict.fromkeys(("step", *keys), 0.0)
    for record in run.metrics:
        current: dict[str, Any] = {key: finite(record.get(key)) for key in ("step", *keys)}
        density = finite(record.get("density"))
        if None in current.values() or density is None or not isinstance(record.get("phase"), str):
            continue
        change = {key: current[key] - previous[key] for key in current}
        previous = current
        total = totals.setdefault(record["phase"], dict.fromkeys(("step", "density", *keys), 0.0))
        for key, value in change.items():
            total[key] += value
        total["density"] += density * change["step"]
    dense_phase = totals.get("dense")
    dense_rate = divide(dense_phase["tokens"], dense_phase["seconds"]) if dense_phase else None
    rows = []
    for name, total in totals.items():
        rate = divide(total["tokens"], total["seconds"])
        rows.append(
            {
                "name": format_phase(name),
                "steps": format_integer(total["step"]),
                "density": format_share(divide(total["density"], total["step"])),
                "algorithmic": format_share(divide(total["flops_algorithmic"], total["flops_dense"])),
                "executed": format_share(divide(total["flops_executed"], total["flops_dense"])),
                "milliseconds": format_seconds(divide(total["seconds"], total["step"])),
                "rate": format_count(rate),
                "speedup": format_factor(divide(rate, dense_rate)),
            }
        )
    return rows


def seconds_by_part(run: RunData) -> list[dict[str, Any]]:
    """Seconds, share and width of each part of the training time."""
    parts = lookup(run.summary, "seconds_by_part")
    if isinstance(parts, Mapping):
        known = {str(name): seconds for name, value in parts.items() if (seconds := finite(value)) is not None}
    else:
        logged = {part: run.latest(f"seconds_{part}") for part in PARTS}
        known = {name: value for name, value in logged.items() if value is not None}
        total = run.latest("seconds")
        if known and total is not None:
            known["other"] = max(0.0, total - sum(known.values()))
    whole = sum(known.values())
    if whole <= 0.0:
        return []
    return [
        {
            "name": name,
            "role": name if name in PARTS else "muted",
            "seconds": format_seconds(value),
            "share": format_share(value / whole),
            "width": round(100.0 * value / whole, 3),
        }
        for name, value in known.items()
    ]


def topology_rows(run: RunData) -> list[Row]:
    if not run.topology:
        return []
    totals = {key: column(run.topology, key)[1] for key in ("dropped", "grown", "seconds", "flip_rate")}
    last = run.topology[-1]
    return [
        Row("Topology updates", f"{len(run.topology):,}"),
        Row("Units dropped", format_count(totals["dropped"].sum())),
        Row("Units grown", format_count(totals["grown"].sum())),
        Row("Mean flip rate", format_share(totals["flip_rate"].mean() if len(totals["flip_rate"]) else None)),
        Row("Weights ever active", format_share(last.get("ever_active"))),
        Row("Inactive rows at the last step", format_integer(last.get("inactive_rows"))),
        Row("Time in topology updates", format_seconds(totals["seconds"].sum() if len(totals["seconds"]) else None)),
    ]


def film_strips(run: RunData) -> tuple[list[dict[str, Any]], str]:
    """Films as data URIs within the budget, and a sentence on what was left out."""
    chosen = [run.films[i] for i in _spread(len(run.films), MAX_FILMS)]
    strips: list[dict[str, Any]] = []
    spent = unreadable = 0
    for film in chosen:
        frames, failed = _frames(run, film)
        unreadable += failed
        size = sum(len(frame["source"]) for frame in frames)
        if spent + size > PICTURE_BUDGET:
            continue
        spent += size
        if frames:
            strips.append({"layer": film.layer, "frames": frames, "of": len(film.pictures)})
    words = []
    if len(strips) < len(run.films):
        words.append(f"{len(strips)} of {len(run.films)} layers are shown, to keep this page small.")
    if unreadable:
        words.append(f"{unreadable} pictures cannot be read.")
    return strips, " ".join(words)


def plan_groups(plan: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """The plan as titled tables, with units; keys that are not known are shown as they are."""
    formats = {"parameters": format_count, "flops": format_flops, "memory": format_bytes, "tokens": format_count}
    groups: list[tuple[str, list[Row]]] = []
    single = [Row(str(key).replace("_", " "), flat(plan[key])) for key in ("run", "steps", "documents") if key in plan]
    if single:
        groups.append(("run", single))
    for key, value in plan.items():
        if key in ("run", "steps", "warnings") or not isinstance(value, Mapping) or not value:
            continue
        rows = []
        for name, entry in value.items():
            if key == "schedule" and name == "phases":
                for phase in items(entry):
                    span = f"{format_integer(phase.get('start_step'))} to {format_integer(phase.get('end_step'))}"
                    ends = [format_share(phase[key]) for key in ("start_density", "end_density") if key in phase]
                    words = [f"density {' to '.join(dict.fromkeys(ends))}"] if ends else []
                    words += [f"attention {phase['pattern']}"] if "pattern" in phase else []
                    rows.append(Row(format_phase(phase.get("name")), f"steps {span}", ", ".join(words)))
                continue
            if key == "kernels" and name == "block_sparse" and isinstance(entry, list):
                rows += [Row(str(row.get("layer")), describe_kernel(row)) for row in items(entry)]
                continue
            if isinstance(entry, list) and len(entry) > 12:
                continue
            shares = name in ("mean_density", "min_density", "ratio")
            format_number = format_share if shares else formats.get(key)
            is_number = finite(entry) is not None
            rows.append(
                Row(str(name).replace("_", " "), format_number(entry) if format_number and is_number else flat(entry))
            )
        title = "memory per rank" if key == "memory" else str(key).replace("_", " ")
        groups.append((title, rows))
    return groups


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
    if isinstance(value, list):
        return ", ".join(flat(entry) for entry in value)
    return str(value)


def cut(text: str | None) -> tuple[str, str] | None:
    """A text that may be long, and a sentence where its end was left out."""
    if text is None:
        return None
    if len(text) <= MAX_TEXT_CHARACTERS:
        return text, ""
    return text[:MAX_TEXT_CHARACTERS], f"Only the first {MAX_TEXT_CHARACTERS:,} of {len(text):,} characters are shown."


def _frames(run: RunData, film: Film) -> tuple[list[dict[str, Any]], int]:
    steps, densities = column(run.metrics, "density")
    frames, failed = [], 0
    for index in _spread(len(film.pictures), FRAMES_PER_FILM):
        picture = film.pictures[index]
        try:
            source, width, height = tinted_picture(picture.path, PICTURE_SIDE)
        except (OSError, ValueError, SyntaxError):
            failed += 1
            continue
        density = picture.density
        if density is None and len(steps):
            density = float(np.interp(picture.step, steps, densities))
        # Small grids of blocks are enlarged to where a block is easy to see.
        scale = PICTURE_SIDE / max(width, height)
        frames.append(
            {
                "source": source,
                "width": max(6, round(scale * width)),
                "height": max(6, round(scale * height)),
                "step": f"{picture.step:,}",
                "phase": format_phase(_phase_at(run, picture.step)),
                "density": format_share(density),
            }
        )
    return frames, failed


def _phase_at(run: RunData, step: int) -> str:
    spans = run.phase_spans()
    # The end of a phase is the start of the next; only the last step belongs to the last phase.
    return next((name for name, first, last in spans if first <= step < last), spans[-1][0] if spans else "")


def _planned_curve(run: RunData) -> str:
    """The density of the plan as points of the ribbon; empty where the plan has no curve."""
    curve: list[Any] = [finite(value) for value in _listed(lookup(run.plan, "schedule", "curve"))]
    if len(curve) < 2 or None in curve:
        return ""
    return " ".join(f"{1000.0 * i / (len(curve) - 1):.1f},{100.0 - 100.0 * d:.1f}" for i, d in enumerate(curve))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` evenly spread indices of `count` entries, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int)).tolist() if count else []


def _fewer(factor: float | None) -> str:
    """How a cost compares with dense: `2.64x fewer`, or `1.05x more`."""
    if not factor:
        return MISSING
    return f"{format_factor(factor)} fewer" if factor >= 1.0 else f"{format_factor(1.0 / factor)} more"


def _per_second(value: float | None) -> str:
    return MISSING if value is None else f"{format_flops(value).removesuffix('s')}/s"
