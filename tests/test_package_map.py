"""megasparse/README.md shows the packages as they are: their imports drawn from the code, and a line for each."""

from __future__ import annotations

import re
from statistics import median

import pytest
from draw_packages import MAP, drawing, package_imports, reachable, reduced, with_drawing
from test_architecture import ORDER, ROOT, sources

MAX_MEDIAN_LINES = 150
MAX_TRAINING_FILES = 18


def test_the_drawing_is_that_of_the_code() -> None:
    page = MAP.read_text(encoding="utf-8")
    assert page == with_drawing(page, package_imports()), "python tests/draw_packages.py draws it anew"


def test_no_arrow_points_up() -> None:
    graph = package_imports()
    up = [(a, b) for a, imported in graph.items() for b in imported if ORDER.index(b) >= ORDER.index(a)]
    assert not up
    assert not [package for package in graph if package in reachable(graph, package)]


def test_the_map_has_a_row_for_each_package() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|", MAP.read_text(encoding="utf-8"), flags=re.M)
    assert rows == list(ORDER)


def test_arrows_that_follow_from_others_are_left_out() -> None:
    graph = {"utils": set(), "config": {"utils"}, "data": {"utils", "config"}, "parallel": {"utils"}}
    assert reduced(graph) == {"utils": set(), "config": {"utils"}, "data": {"config"}, "parallel": {"utils"}}
    whole = {package: graph.get(package, set()) for package in ORDER}
    assert "    data --> config\n" in drawing(whole)
    with pytest.raises(AssertionError):
        with_drawing("a page without the marks", whole)


def test_files_of_the_library_are_short_on_the_whole() -> None:
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in sources("megasparse")]
    assert median(lines) < MAX_MEDIAN_LINES


def test_training_holds_one_trade() -> None:
    assert len(list((ROOT / "megasparse" / "training").rglob("*.py"))) <= MAX_TRAINING_FILES
