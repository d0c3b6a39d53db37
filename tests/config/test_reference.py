"""The generated part of configs/README.md: complete, current, and checked by the tool; its example is true."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import processes
import pytest

from megasparse.config import schema
from megasparse.config.loader import describe_fields, load_config
from megasparse.config.reference import BEGIN, END, render_reference, replace_reference

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "configs" / "README.md"


def test_the_committed_page_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert replace_reference(page, render_reference()) == page, "run python tools/write_config_reference.py"
    tool = [sys.executable, str(ROOT / "tools" / "write_config_reference.py"), "--check"]
    done = processes.run(tool, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "up to date" in done.stdout, done.stderr


def test_every_field_has_a_row_with_default_and_help() -> None:
    rows, section = {}, ""
    for line in render_reference().splitlines():
        if line.startswith("### "):
            section = line.strip("# `")
        elif line.startswith("| `"):
            cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[f"{section}.{cells[0].strip('`')}"] = cells[1:]
    for name, default, text in describe_fields():
        allowed, shown, meaning = rows[name]
        assert (shown, meaning) == (f"`{default}`", text) and allowed, name
    assert rows["train.steps"][0] == "integer >= 1"
    assert rows["data.valid_fraction"][0] == "number >= 0, < 1"
    assert rows["deepspeed.zero_stage"][0] == "`0`, `1`, `2`, `3`"
    assert rows["sparsity.points"][0] == "list of [number, number] or `null`"
    assert rows["SparsityGroup.pattern"][1] == "required" and rows["PatternWindow.end"][0] == "number >= 0, <= 1"


def test_only_the_part_between_the_markers_changes() -> None:
    page = f"above\n{BEGIN}\nold\n{END}\nbelow\n"
    assert replace_reference(page, "new") == f"above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n"
    for broken in ("nothing", BEGIN, END, f"{END}\n{BEGIN}"):
        with pytest.raises(ValueError, match="has no pair of lines"):
            replace_reference(broken, "new")


def test_the_worked_example_is_true(tmp_path: Path) -> None:
    page = PAGE.read_text()
    short = tmp_path / "short.yaml"
    short.write_text(re.search(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[1])
    config = load_config([ROOT / "configs" / "gpt2-124m-paper.yaml", short], ["train.save_interval=250"])
    table = page.split("| field | schema |", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \|(?:[^|\n]*\|)* (\S+) \|$", table, flags=re.MULTILINE)
    assert len(rows) == 7
    for section, field, result in rows:
        assert str(getattr(getattr(config, section), field)) == result


def test_every_section_can_be_imported_from_the_schema() -> None:
    names = schema.RunConfig.model_json_schema()["$defs"].keys()
    assert "SparsityGroup" in names and not sorted(names - set(schema.__all__))
    assert not [name for name in schema.__all__ if not hasattr(schema, name)]
