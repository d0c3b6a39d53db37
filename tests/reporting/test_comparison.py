"""The page that compares runs: complete, honest about gaps, closed to the outside, safe against its input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
from test_report import make_run, parse, text_of, write_lines

from megasparse.reporting.comparison import read_runs, render_comparison, write_comparison
from megasparse.reporting.comparison_tables import COSTS, budget_rows, curve, ledger_groups, setting_rows
from megasparse.reporting.run_data import RunData
from megasparse.reporting.svg import ROLES, colour

CONFIG = "model:\n  num_layers: {layers}\nsparsity:\n  density: {density}\ndata:\n  train: [{{path: x}}]\n"


def page_of(*folders: Path) -> str:
    return render_comparison(read_runs(folders))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole run and a shorter one that was stopped, with other settings."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "a", name="mst", steps=400, layers=1)
    second = make_run(folder / "b", name="static", steps=400, stop=200, layers=1)
    (first / "config.yaml").write_text(CONFIG.format(layers=12, density=0.1))
    (second / "config.yaml").write_text(CONFIG.format(layers=12, density=0.5) + "  seed: 3\n")
    return first, second


@pytest.fixture(scope="module")
def page(two_runs: tuple[Path, Path]) -> str:
    return page_of(*two_runs)


def test_two_runs_are_shown_side_by_side(two_runs: tuple[Path, Path], page: str) -> None:
    text = text_of(page)
    for words in (
        "2 runs compared", "Finished 400 steps", "Stopped at step 200 of 400 (stop signal)", "stopped early",
        "Loss over steps", "Loss over tokens", "Loss over algorithmic FLOPs", "Loss over executed FLOPs",
        "Loss over training time", "Density over steps", "Settings that differ", "training time in minutes",
        "400 of 400", "200 of 400", "Dense-equivalent", "density 100 % at the end", "layers.0.attention.qkv.weight",
        "Further layers (2) are in the report of this run", "2 x AVX-512 CPU",
    ):  # fmt: skip
        assert words in text, words
    assert "lacks" not in text and "No figure here" not in text and "Without" not in text
    # Six figures of both runs and one of the layers of each, wide and narrow.
    assert parse(page).tags.count("svg") == 2 * (6 + 2)
    for label in ("mst", "static"):
        # The legends of six figures, and the heads of three tables.
        assert page.count(f"</span>{label}</span>") == 6 and page.count(f"</span>{label}</th>") == 3


def test_page_loads_nothing_and_has_unique_identifiers(page: str) -> None:
    parser = parse(page)
    assert not {"script", "link", "iframe", "object", "base"} & set(parser.tags)
    for tag, name, value in parser.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert "http:" not in page and "https:" not in page and "@import" not in page
    identifiers = [value for _, name, value in parser.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    references = re.findall(r"url\(#([^)]*)\)", page)
    references += [value[1:] for _, name, value in parser.attributes if name.endswith("href") and value[0] == "#"]
    assert set(references) <= set(identifiers)
    assert not [role for role in ROLES if colour(role) in page]
    # Each run has its own colour, in lines and legend.
    assert page.count("var(--run_1)") >= 10 and page.count("var(--run_2)") >= 10 and "var(--run_3)" not in page
    assert len(page) < 1_500_000


def test_only_what_differs_is_listed(two_runs: tuple[Path, Path]) -> None:
    rows = {row.label: row.values for row in setting_rows(read_runs(two_runs))}
    assert rows == {"sparsity.density": ("0.1", "0.5"), "data.seed": ("not set", "3")}


def test_losses_are_compared_at_equal_cost(two_runs: tuple[Path, Path]) -> None:
    runs = read_runs(two_runs)
    rows = budget_rows(runs)
    assert [row.label.split()[-1] for row in rows] == ["steps", "tokens", "algorithmic", "executed", "training"]
    assert rows[0].label == "200 steps" and rows[0].note == "validation loss"
    # The logs are those of the same seed up to step 200.
    assert all(row.values[0] == row.values[1] for row in rows[:2])
    metrics = runs[1].data.metrics
    assert rows[0].values[1] == f"{metrics[-1]['val_loss']:.3f}"
    assert curve(runs[0].data, "val_loss", "tokens")[0].tolist() == [32768.0 * s for s in (200, 400)]


def test_ledger_shows_shares(two_runs: tuple[Path, Path]) -> None:
    summary = json.loads((two_runs[0] / "summary.json").read_text())
    groups = dict(ledger_groups(read_runs(two_runs)))
    rows = {row.label: row.values for rows in groups.values() for row in rows}
    share = 100 * summary["flops_algorithmic"] / summary["flops_dense"]
    assert rows["Algorithmic"][0].endswith(f"({share:.1f} %)") and rows["Steps"] == ("400 of 400", "200 of 400")
    assert rows["other"][0] == "3.0 s" and list(groups) == ["Outcome", "FLOPs", "Time"]


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    attack = '</td><script>alert(1)</script><img src="https://evil.example/x" onerror="x">{{ 7 * 7 }} $x_{'
    folders = [make_run(tmp_path / name, name=f"{attack}{name}", steps=100, layers=1) for name in "ab"]
    for number, folder in enumerate(folders):
        (folder / "config.yaml").write_text(json.dumps({attack: f"{attack} {number}"}))
        summary = json.loads((folder / "summary.json").read_text())
        summary.update(reason=attack, hardware=attack, finished=False)
        (folder / "summary.json").write_text(json.dumps(summary))
        topology = [json.loads(line) for line in (folder / "topology.jsonl").read_text().splitlines()]
        write_lines(folder / "topology.jsonl", [{**line, "densities": {attack: 0.5}} for line in topology])
    page = page_of(*folders)
    parser = parse(page)
    assert "script" not in parser.tags
    assert not [name for _, name, _ in parser.attributes if name.startswith("on")]
    assert not [value for _, name, value in parser.attributes if name == "src" and "evil" in value]
    assert "{{ 7 * 7 }}" in page and text_of(page).count("alert(1)") >= 20


def test_runs_that_lack_records_are_compared_as_far_as_it_goes(tmp_path: Path, two_runs: tuple[Path, Path]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    write_lines(bare / "metrics.jsonl", [{"step": step, "loss": 5.0 - step / 100} for step in range(10, 100, 10)])
    with (bare / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "lo')
    only_plan = tmp_path / "plan"
    only_plan.mkdir()
    (only_plan / "plan.json").write_text('{"run": "planned", "steps": 50}')
    text = text_of(page_of(two_runs[0], bare, only_plan))
    for words in (
        "What bare lacks", "config.yaml is missing", "The last line of metrics.jsonl is cut off",
        "What planned lacks", "Nothing was logged in this folder yet", "Logged up to step 90 of 90",
        "Without algorithmic FLOPs in their logs: bare, planned", "No cost was logged by all runs",
        "bare logged no topology updates", "Fewer than two of these folders hold a configuration",
    ):  # fmt: skip
        assert words in text, words
    rows = budget_rows(read_runs([two_runs[0], bare]))
    assert [row.label for row in rows] == ["90 steps"] and rows[0].note == "smoothed training loss"


def test_nothing_at_all_was_logged(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    text = text_of(page_of(tmp_path))
    assert "1 run compared" in text and "No figure here: no losses with steps were logged" in text
    assert "No figure here: no densities were logged" in text


def test_equal_settings_are_said_to_be_equal(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    copy = make_run(tmp_path / "copy", name="mst", steps=100, layers=1)
    (copy / "config.yaml").write_text((two_runs[0] / "config.yaml").read_text())
    runs = read_runs([two_runs[0], copy])
    # Runs of one name are told apart by their folders.
    assert [run.label for run in runs] == [f"mst ({two_runs[0]})", f"mst ({copy})"]
    assert "All settings are the same" in text_of(render_comparison(runs))
    (copy / "config.yaml").write_text("{")
    assert setting_rows(read_runs([two_runs[0], copy])) is None


def test_many_runs_have_different_looks(tmp_path: Path) -> None:
    folders = []
    for number in range(17):
        folders.append(tmp_path / f"r{number}")
        folders[-1].mkdir()
        write_lines(folders[-1] / "metrics.jsonl", [{"step": s, "loss": 3.0 + number / s} for s in (1, 2, 3)])
    runs = read_runs(folders[:16])
    assert len({(run.role, run.mark) for run in runs}) == 16 and runs[8].mark == "dashed"
    assert 'class="mark dashed"' in render_comparison(runs)
    with pytest.raises(ValueError, match="17 run folders; must be 1 to 16"):
        read_runs(folders)


def test_costs_that_were_not_logged_at_a_loss_are_left_out() -> None:
    metrics = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0, "seconds": 5.0}, {"step": 3, "loss": 2.0}]
    run = RunData("x", metrics=metrics)
    x, y = curve(run, "val_loss", "seconds")
    assert not len(x) and not len(y)
    x, y = curve(run, "loss", "seconds")
    assert x.tolist() == [5.0] and np.allclose(y, [3.0])
    assert {cost.key for cost in COSTS} == {"step", "tokens", "flops_algorithmic", "flops_executed", "seconds"}


def test_bad_input_is_refused(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    for folders, output, message in (
        ([tmp_path / "nothing"], "x.html", "is not a directory"),
        ([tmp_path], "x.html", "holds no run; must be a folder with config.yaml"),
        ([two_runs[0], two_runs[0] / "."], "x.html", "is given twice"),
        (two_runs, "x.txt", "must be a file whose name ends in .html"),
        (two_runs, "nowhere/x.html", "a file in a folder that exists"),
    ):
        with pytest.raises(ValueError, match=message):
            write_comparison(folders, tmp_path / output)
    assert list(tmp_path.iterdir()) == []


def test_command_line(two_runs: tuple[Path, Path], tmp_path: Path, repository: Path) -> None:
    output = tmp_path / "compare.html"
    command = [sys.executable, str(repository / "tools" / "report.py"), *map(str, two_runs), "--output", str(output)]
    environment = {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = processes.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output) and "2 runs compared" in output.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["compare.html"]
