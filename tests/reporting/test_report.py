"""The report page: complete on a whole run, honest on a partial one, closed to the outside, safe against its input."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image

from megasparse.reporting.figures import short_layer_names, smooth
from megasparse.reporting.report import main, write_report
from megasparse.reporting.run_data import RunData, column, natural_order, read_run, spans_of
from megasparse.reporting.svg import ROLES, colour, thin_out, tinted_picture

PHASES = {"warm_up": (0.0, 0.1), "ultra_sparse": (0.1, 0.7), "restoration": (0.7, 0.85), "dense": (0.85, 1.0)}
PARTS = {"data": 0.02, "forward": 0.3, "backward": 0.55, "optimizer": 0.08, "topology": 0.03}


def phase_and_density(progress: float, lowest: float = 0.1) -> tuple[str, float]:
    name = next(name for name, (_, end) in PHASES.items() if progress < end or end == 1.0)
    start, end = PHASES[name]
    inside = (progress - start) / (end - start)
    density = {
        "warm_up": 1.0 - (1.0 - lowest) * (1.0 - (1.0 - inside) ** 3),
        "ultra_sparse": lowest,
        "restoration": lowest + (1.0 - lowest) * inside,
        "dense": 1.0,
    }[name]
    return name, density


def make_metrics(steps: int, interval: int, stop: int, rng: random.Random) -> list[dict]:
    records, seconds, flops = [], 0.0, {"dense": 0.0, "algorithmic": 0.0, "executed": 0.0}
    for step in range(interval, stop + 1, interval):
        phase, density = phase_and_density(step / steps)
        flops["dense"] += interval * 2.0e12
        flops["algorithmic"] += interval * 2.0e12 * (0.08 + 0.92 * density)
        flops["executed"] += interval * 2.0e12 * (0.12 + 0.88 * density)
        seconds += interval * (0.2 + 0.9 * density) * rng.uniform(0.97, 1.05)
        ideal = 1.6 + 9.0 * math.exp(-step / (0.03 * steps)) + 1.5 * math.exp(-step / (0.35 * steps))
        records.append(
            {
                "step": step,
                "tokens": step * 32768,
                "loss": ideal + rng.gauss(0.0, 0.05),
                "val_loss": ideal + 0.02 if step % (10 * interval) == 0 else None,
                "density": density,
                "phase": phase,
                "pattern": "sparse" if phase == "ultra_sparse" else "full",
                "lr": 6e-4 * min(1.0, 20 * step / steps) * 0.5 * (1.1 + math.cos(math.pi * step / steps)),
                "grad_norm": 0.4 + 3.0 * math.exp(-step / (0.05 * steps)) + rng.expovariate(12.0),
                "tokens_per_s": 32768 / (0.2 + 0.9 * density) * rng.uniform(0.95, 1.02),
                **{f"flops_{kind}": value for kind, value in flops.items()},
                "seconds": seconds,
                **{f"seconds_{part}": share * seconds for part, share in PARTS.items()},
            }
        )
    return records


def make_plan(name: str, steps: int) -> dict:
    phases = [
        {
            "name": phase,
            "start_step": round(start * steps),
            "end_step": round(end * steps),
            "start_density": phase_and_density(start)[1],
            "end_density": phase_and_density(end)[1],
            "pattern": "sparse" if phase == "ultra_sparse" else "full",
        }
        for phase, (start, end) in PHASES.items()
    ]
    memory = {
        "weights": 250e6,
        "masks": 2e6,
        "gradients": 500e6,
        "optimizer": 1.5e9,
        "activations": 2e9,
        "total": 4.3e9,
    }
    return {
        "run": name,
        "parameters": {"total": 124_439_808, "sparsifiable": 84_934_656, "active_at_min_density": 48_000_000},
        "tokens": {"total": steps * 32768, "per_step": 32768},
        "steps": steps,
        "schedule": {
            "phases": phases,
            "mean_density": 0.27,
            "min_density": 0.1,
            "curve": [phase_and_density(point / 60)[1] for point in range(61)],
        },
        "flops": {"dense": 2.0e12 * steps, "algorithmic": 0.34e12 * steps, "ratio": 0.33},
        "memory": memory,
        "parallel": {
            "world_size": 8,
            "data_parallel_size": 8,
            "tensor_parallel_size": 1,
            "zero_stage": 1,
            "micro_batch_size": 4,
            "accumulation_steps": 1,
        },
        "kernels": {
            "block_sparse": [
                {
                    "layer": "mlp.up",
                    "count": 12,
                    "in": 768,
                    "out": 3072,
                    "block_size": 64,
                    "density": 0.1,
                    "kernel": "cpu",
                    "break_even": 0.82,
                },
            ],
            "hybrid_attention": "reference",
        },  # fmt: skip
        "warnings": ["hybrid_attention: the reference kernel is slow on this machine"],
    }


def make_summary(name: str, steps: int, metrics: list[dict]) -> dict:
    last = metrics[-1]
    losses = [record["val_loss"] for record in metrics if record["val_loss"] is not None]
    return {
        "run": name,
        "steps": last["step"],
        "tokens": last["tokens"],
        "loss": last["loss"],
        "val_loss": losses[-1] if losses else None,
        "best_val_loss": min(losses, default=None),
        "final_density": last["density"],
        **{key: last[key] for key in ("flops_dense", "flops_algorithmic", "flops_executed", "seconds")},
        "seconds_by_part": {**{part: share * last["seconds"] for part, share in PARTS.items()}, "other": 3.0},
        "parameters": 124_439_808,
        "hardware": "2 x AVX-512 CPU",
        "versions": {"megasparse": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8"},
        "finished": last["step"] == steps,
        "reason": "all steps done" if last["step"] == steps else "stop signal",
    }


def make_topology(folder: Path, layers: list[str], steps: int, stop: int, interval: int) -> list[dict]:
    rng = np.random.default_rng(7)
    scores = {layer: rng.random((48 if "qkv" in layer else 16, 16)) for layer in layers}
    records, ever = [], 0.3
    for index, step in enumerate(range(interval, stop + 1, interval)):
        phase, density = phase_and_density(step / steps)
        if phase == "dense":
            break
        ever = ever + 0.08 * (1.0 - ever)
        spread = {layer: min(1.0, density * (0.7 + 0.6 * i / len(layers))) for i, layer in enumerate(layers)}
        records.append(
            {
                "step": step,
                "density": density,
                "phase": phase,
                "densities": spread,
                "dropped": 40,
                "grown": 38,
                "flip_rate": 0.3 * 0.5 * (1 + math.cos(math.pi * step / steps)),
                "ever_active": ever,
                "inactive_rows": 2,
                "seconds": 0.4,
            }
        )
        for layer in layers:
            scores[layer] = 0.8 * scores[layer] + 0.2 * rng.random(scores[layer].shape)
            if index % 3 == 0:
                active = scores[layer] >= np.quantile(scores[layer], 1.0 - spread[layer])
                (folder / "topology" / layer).mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray((255 * active).astype(np.uint8))
                picture.save(folder / "topology" / layer / f"step-{step:08d}.png")
    return records


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_run(
    folder: Path,
    name: str = "mst-small",
    steps: int = 2000,
    stop: int | None = None,
    interval: int = 20,
    layers: int = 2,
) -> Path:
    """A run folder with everything that training writes; stopped early where `stop` is below `steps`."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = make_metrics(steps, interval, stop or steps, random.Random(5))
    kinds = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    names = [f"layers.{layer}.{kind}.weight" for layer in range(layers) for kind in kinds]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "topology.jsonl", make_topology(folder, names, steps, stop or steps, steps // 20))
    (folder / "plan.json").write_text(json.dumps(make_plan(name, steps)))
    (folder / "summary.json").write_text(json.dumps(make_summary(name, steps, metrics)))
    (folder / "config.yaml").write_text("model:\n  num_layers: 12\nsparsity:\n  density: 0.1\n")
    (folder / "sample.txt").write_text("\nThe river kept its own count of the days.\n")
    return folder


class PageParser(html.parser.HTMLParser):
    """Collects tags with attributes and checks that tags are closed in order."""

    VOID = ("meta", "br", "img", "link", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1] == "style"):
            self.words.append(data)


def parse(page: str) -> PageParser:
    parser = PageParser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(parse(page).words))


def report_of(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def whole_page(whole_run: Path) -> str:
    return report_of(whole_run)


def test_whole_run_shows_everything(whole_run: Path, whole_page: str) -> None:
    summary = json.loads((whole_run / "summary.json").read_text())
    text = text_of(whole_page)
    share = summary["flops_algorithmic"] / summary["flops_dense"]
    assert f"Finished 2,000 steps: validation loss {summary['val_loss']:.3f}, {100 * share:.1f} % of" in text
    assert "density 100 % at the end" in text
    for words in (
        "mst-small", "Loss over steps", "Loss over FLOPs", "Dense-equivalent", "Algorithmic", "Executed",
        "Seconds by part", "Speed over steps", "Density of every layer", "flip rate", "ever active", "Film strips",
        "Learning rate and gradient norm", "num_layers: 12", "The river kept its own count", "124 M", "84.9 M",
        "steps 200 to 1,400", "blocks of 64: cpu at density 10 %, dense above 82 %", "12 by the kernel cpu",
        "hybrid_attention: the reference kernel is slow", "2 x AVX-512 CPU",
        "48.0 M", "deepspeed 0.19.8", "layers.0.attention.qkv.weight", "What each phase cost",
        "dense-equivalent: 4.00 PFLOPs",
    ):  # fmt: skip
        assert words in text, words
    assert "What this folder lacks" not in text and "No figure here" not in text
    # Seven figures, each wide and narrow, and the ribbon.
    assert parse(whole_page).tags.count("svg") == 15
    assert len(whole_page) < 2_000_000


def test_page_loads_nothing_and_has_unique_identifiers(whole_page: str) -> None:
    parser = parse(whole_page)
    assert not {"script", "link", "iframe", "object", "base"} & set(parser.tags)
    for tag, name, value in parser.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert "http:" not in whole_page and "https:" not in whole_page and "@import" not in whole_page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", whole_page))
    identifiers = [value for _, name, value in parser.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    references = re.findall(r"url\(#([^)]*)\)", whole_page)
    references += [value[1:] for _, name, value in parser.attributes if name.endswith("href") and value[0] == "#"]
    assert set(references) <= set(identifiers)


def test_colours_and_fonts_come_from_the_page(whole_page: str) -> None:
    assert not [role for role in ROLES if colour(role) in whole_page]
    light, dark = whole_page.split("prefers-color-scheme: dark", 1)
    for role in ROLES:
        assert f"--{role}:" in light.replace(" ", "") and f"--{role}:" in dark.split("* {")[0].replace(" ", "")
    drawings = re.findall(r"<svg.*?</svg>", whole_page, flags=re.S)
    assert not re.search(r"(?:fill|stroke): ?(?:#|black|white)", "".join(drawings))
    assert "DejaVu" not in whole_page


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    attack = '</pre><script>alert(1)</script><img src="https://evil.example/x" onerror="x">{{ 7 * 7 }}'
    folder = make_run(tmp_path / "run", name=f"<b>{attack}</b>", steps=400, layers=1)
    (folder / "sample.txt").write_text(attack + " $\\frac{1}{0}$ \x00 \ud83d".encode("utf-8", "replace").decode())
    (folder / "config.yaml").write_text(f"name: '{attack}'")
    plan = json.loads((folder / "plan.json").read_text())
    plan["warnings"] = [attack]
    plan["kernels"] = {attack: attack}
    plan["schedule"]["phases"][1]["name"] = attack
    (folder / "plan.json").write_text(json.dumps(plan))
    summary = json.loads((folder / "summary.json").read_text())
    summary.update(reason=attack, hardware=attack, finished=False, seconds_by_part={attack: 3.0})
    (folder / "summary.json").write_text(json.dumps(summary))
    topology = [json.loads(line) for line in (folder / "topology.jsonl").read_text().splitlines()]
    write_lines(
        folder / "topology.jsonl",
        [{**line, "phase": attack, "densities": {attack: 0.5, "$x_{": 0.2}} for line in topology],
    )
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_lines(folder / "metrics.jsonl", [{**line, "phase": attack, "pattern": attack} for line in metrics])
    page = report_of(folder)
    parser = parse(page)
    assert "script" not in parser.tags and "b" in parser.tags
    assert not [
        value for _, name, value in parser.attributes if name.startswith("on") or "evil" in value and name == "src"
    ]
    assert text_of(page).count("alert(1)") >= 8
    assert "{{ 7 * 7 }}" in page


def test_early_stop_is_said(tmp_path: Path) -> None:
    text = text_of(report_of(make_run(tmp_path / "run", steps=1000, stop=600, layers=1)))
    assert "stopped early" in text and "Stopped at step 600 of 1,000 (stop signal)" in text
    assert "not run" in text and "600 of 1,000" in text


@pytest.mark.parametrize(
    "missing", ["config.yaml", "plan.json", "metrics.jsonl", "topology.jsonl", "topology", "summary.json", "sample.txt"]
)
def test_each_missing_piece_is_named(tmp_path: Path, missing: str) -> None:
    folder = make_run(tmp_path / "run", steps=200, layers=1)
    (folder / missing).rename(tmp_path / "elsewhere")
    remarks = read_run(folder).remarks
    assert len(remarks) == 1 and re.search(rf"{re.escape(missing)}\b.* is missing", remarks[0])


def test_page_of_a_partial_folder_says_what_it_lacks(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=200, layers=1)
    (folder / "metrics.jsonl").unlink()
    text = text_of(report_of(folder))
    assert "What this folder lacks" in text and "metrics.jsonl is missing" in text
    assert "No figure here: no losses were logged" in text
    assert "Finished 200 steps" in text and "Density of every layer" in text


def test_empty_folder_makes_a_page(tmp_path: Path) -> None:
    text = text_of(report_of(tmp_path))
    assert "Nothing was logged in this folder yet." in text and "no summary" in text
    assert text.count("is missing") == 7


def test_killed_run_uses_the_log_in_place_of_the_summary(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=400, stop=200, layers=1)
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 220, "loss": 1.')
    text = text_of(report_of(folder))
    assert "Logged up to step 200 of 400, without a summary: still running, or killed" in text
    assert "The last line of metrics.jsonl is cut off" in text


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=200, layers=1)
    (folder / "plan.json").write_text("{")
    (folder / "summary.json").write_text("[1]")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(["nonsense", '{"loss": 3}', *lines]))
    (folder / "sample.txt").write_bytes(b"\xff\xfe broken")
    picture = next((folder / "topology").glob("*/*.png"))
    picture.write_bytes(b"no picture")
    text = text_of(report_of(folder))
    for words in (
        "plan.json is not valid JSON", "summary.json does not hold a JSON object",
        "metrics.jsonl: lines 1, 2 cannot be read: left out.", "1 pictures cannot be read", "broken",
    ):  # fmt: skip
        assert words in text, words


def test_numbers_of_the_wrong_type_do_not_stop_the_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=200, layers=1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1].update(loss=float("nan"), grad_norm=float("inf"), tokens_per_s="fast", density=None, phase=3)
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "summary.json").write_text(json.dumps({"seconds_by_part": [], "versions": 3, "flops_dense": 0}))
    (folder / "plan.json").write_text(
        json.dumps({"steps": "many", "schedule": {"phases": [3, {"name": None}]}, "flops": 4, "warnings": "one"})
    )
    assert "1 logged steps have a loss that is not a finite number" in text_of(report_of(folder))


def test_later_lines_win_and_validation_lines_merge(tmp_path: Path) -> None:
    lines = [
        {"step": 10, "loss": 5.0, "val_loss": None},
        {"step": 20, "loss": 4.0},
        {"step": 20, "val_loss": 4.5},
        {"step": 30, "loss": 3.0},
        {"step": 40, "loss": 2.0},
        {"step": 20, "loss": 4.1},
        {"step": 30, "loss": 3.1},
        {"step": 30, "val_loss": 3.3},
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    metrics = read_run(tmp_path).metrics
    # Step 40 belongs to the history that the resumed run left behind, and so does the validation of step 20.
    assert metrics == [{"step": 10, "loss": 5.0}, {"step": 20, "loss": 4.1}, {"step": 30, "loss": 3.1, "val_loss": 3.3}]
    steps, values = column(metrics, "val_loss")
    assert steps.tolist() == [30.0] and values.tolist() == [3.3]


def test_phase_table_adds_up(whole_run: Path, whole_page: str) -> None:
    rows = re.findall(r"<tr><th>([^<]*)</th><td[^>]*>([^<]*)</td>", whole_page)
    assert [name for name, _ in rows] == ["warm-up", "ultra-sparse", "restoration", "dense"]
    assert sum(int(steps.replace(",", "")) for _, steps in rows) == 2000


def test_many_large_pictures_stay_within_the_budget(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for layer in range(40):
        (tmp_path / "topology" / f"layers.{layer}").mkdir(parents=True)
        picture = Image.fromarray((255 * (rng.random((160, 160)) < 0.5)).astype(np.uint8))
        for step in range(0, 1200, 100):
            picture.save(tmp_path / "topology" / f"layers.{layer}" / f"step-{step:08d}.png", compress_level=0)
    page = report_of(tmp_path)
    assert len(page) < 1_500_000
    shown = int(re.search(r"(\d+) of 40 layers are shown", page).group(1))
    assert 0 < shown < 40
    assert "layers.0<" in page and "<b>0</b>" in page and "<b>1,100</b>" in page


def test_many_steps_stay_small(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", make_metrics(8_000, 1, 8_000, random.Random(1)))
    assert len(report_of(tmp_path)) < 2_000_000


def test_tinted_picture_keeps_the_active_units(tmp_path: Path) -> None:
    active = np.random.default_rng().random((12, 5)) < 0.4
    Image.fromarray((255 * active).astype(np.uint8)).save(tmp_path / "x.png")
    source, width, height = tinted_picture(tmp_path / "x.png", 128)
    assert (width, height) == (5, 12)
    decoded = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGBA")
    assert np.array_equal(np.asarray(decoded)[..., 3], 255 * active)


def test_smooth_is_a_mean_and_does_not_lag() -> None:
    line = np.linspace(5.0, 1.0, 400)
    # A centred mean of a straight line is the line; only the last stretch looks back.
    assert np.allclose(smooth(line)[:390], line[:390], atol=1e-9)
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise)[100:-100].std() < 0.25 * noise.std()
    assert smooth(np.array([])).shape == (0,) and smooth(np.array([3.0])).tolist() == [3.0]


def test_thin_out_keeps_the_extremes() -> None:
    values = np.random.default_rng().normal(size=5000)
    values[3217] = 99.0
    x, y = thin_out(np.arange(5000.0), values, 300)
    assert len(x) <= 300 and (np.diff(x) > 0).all()
    assert y.max() == 99.0 and y.min() == values.min() and x[0] == 0 and x[-1] == 4999
    assert np.array_equal(values[x.astype(int)], y)


def test_names_and_spans() -> None:
    assert sorted(["layers.10.x", "layers.2.x"], key=natural_order) == ["layers.2.x", "layers.10.x"]
    assert short_layer_names(["layers.0.mlp.up.weight", "layers.1.qkv.weight"]) == ["0.mlp.up", "1.qkv"]
    assert short_layer_names(["head.weight"]) == ["head.weight"]
    records = [{"step": 5, "phase": "a"}, {"step": 10, "phase": "a"}, {"step": 15, "phase": "b"}, {"step": 20}]
    assert spans_of(records, "phase") == [("a", 0.0, 10.0), ("b", 10.0, 15.0)]


def test_a_phase_that_the_plan_cuts_is_one() -> None:
    phases = [("warm_up", 0, 5), ("ultra_sparse", 5, 7), ("ultra_sparse", 7, 9), ("dense", 9, 9), ("dense", 9, 12)]
    plan = {"schedule": {"phases": [{"name": n, "start_step": a, "end_step": b} for n, a, b in phases]}}
    expected = [("warm_up", 0, 5), ("ultra_sparse", 5, 9), ("dense", 9, 12)]
    assert RunData("x", plan=plan).phase_spans() == expected


def test_a_picture_takes_the_density_of_the_topology_that_held(tmp_path: Path) -> None:
    layer = "layers.0.mlp.up"
    (tmp_path / "topology" / layer).mkdir(parents=True)
    for step in (0, 10, 11, 25, 300):
        Image.new("L", (4, 4), 255).save(tmp_path / "topology" / layer / f"step-{step:08d}.png")
    write_lines(
        tmp_path / "topology.jsonl",
        [{"step": 10, "densities": {layer: 0.4}}, {"step": 20, "densities": {layer: 0.2}}],
    )
    (film,) = read_run(tmp_path).films
    assert [picture.step for picture in film.pictures] == [0, 10, 11, 25, 300]
    assert [picture.density for picture in film.pictures] == [None, 0.4, 0.4, 0.2, 0.2]


def test_command_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=100, layers=1)
    command = [sys.executable, "-m", "megasparse.reporting.report", str(folder)]
    done = processes.run(command, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.html")
    assert sorted(path.name for path in folder.glob("*report*")) == ["report.html"]


def test_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="not a directory"):
        write_report(tmp_path / "nothing")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing")])
    assert "not a directory" in capsys.readouterr().err
