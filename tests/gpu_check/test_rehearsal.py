"""The whole check, rehearsed: all sections end well, every number is marked, the file is as its README says."""

from __future__ import annotations

import importlib.util
import re

import pytest
from commands import ROOT, check, rows, states

from megasparse.gpu_check.sections import SECTIONS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

README = ROOT / "megasparse" / "gpu_check" / "README.md"
KERNELS = [section.name for section in SECTIONS if section.kernels_only]
OTHERS = [section.name for section in SECTIONS if not section.kernels_only]
PATIENCE = ("--minutes", "30")
"""Against hanging, not for measuring."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The sections that must do without DeepSpeed, pydantic and OmegaConf, where these cannot be imported."""
    options = ("--sections", ",".join(KERNELS), *PATIENCE)
    return check(tmp_path_factory.mktemp("kernels"), *options, forbid=True)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return check(tmp_path_factory.mktemp("others"), "--sections", ",".join(OTHERS), *PATIENCE)


def test_all_sections_end_well(kernels, others) -> None:
    for (done, report), names in ((kernels, KERNELS), (others, OTHERS)):
        assert done.returncode == 0, done.stdout + done.stderr
        assert states(report) == dict.fromkeys(names, "done"), report
        assert report["status"] == 0 and re.fullmatch(r"all \d+ comparisons are right", report["verdict"])
    assert KERNELS == ["facts", "compiling", "numerics", "products", "attention"]


def test_every_kernel_was_compared(kernels) -> None:
    _, report = kernels
    compared = [row for name, row in rows(report) if name == "numerics"]
    assert all(row["right"] is True for row in compared)
    products = {row["case"]["product"] for row in compared if row["name"] == "product"}
    three = {"forward", "input gradient", "weight gradient"}
    swapped = {"swapped forward", "swapped input gradient"}
    activated = {"activated forward", "activated input gradient"}
    assert products == {*three, "autograd", *(f"packed {name}" for name in three), *swapped, *activated}
    operators = {row["case"]["operator"] for row in compared if row["name"] == "elementwise"}
    assert operators == {"gate", "rotation", "sum and norm"}
    assert {row["name"] for row in compared} == {"product", "attention", "elementwise", "large"}


def test_training_was_compared(others) -> None:
    _, report = others
    found = {row["name"]: row["right"] for name, row in rows(report) if name == "training"}
    assert found == {"losses": True, "resumed": True}


def test_every_number_is_marked(kernels, others) -> None:
    for done, report in (kernels, others):
        assert report["rehearsed"] is True and "REHEARSED" in done.stdout
        numbers = [number for _, row in rows(report) for number in row["numbers"].values()]
        assert numbers and all(list(number) == ["rehearsed"] for number in numbers)
        # On the screen they stand in brackets.
        finite = [number["rehearsed"] for number in numbers if number["rehearsed"] is not None]
        assert all(f"({value:.4g})" in done.stdout for value in finite)


def test_the_file_is_as_its_page_says(kernels, others) -> None:
    page = README.read_text(encoding="utf-8")
    fields = [set(re.findall(r"`(\w+)`", cell)) for cell in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.M)]
    documented = set().union(*fields)
    written = []
    for _, report in (kernels, others):
        assert {*report} == {"format", "rehearsed", "date", "host", "minutes", "status", "verdict", "sections"}
        parts = [report, *report["sections"].values(), *(row for _, row in rows(report))]
        assert {key for part in parts for key in part} <= documented
        written += [(name, row["name"], frozenset(row["numbers"])) for name, row in rows(report)]
    table = re.findall(r"^\| `(\w+)` \| `([\w ]+)` \|(.*)\| (yes|no) \|$", page, flags=re.M)
    assert len(table) > 20
    rehearsed = {(section, row) for section, row, _, when in table if when == "yes"}
    assert {(section, row) for section, row, _ in written} == rehearsed
    names = {(section, row): set(re.findall(r"`(\w+)`", cell)) for section, row, cell, _ in table}
    for section, row, numbers in written:
        assert numbers == names[section, row] - {"missing_bytes"}, (section, row)


def test_sections_that_lack_a_package_are_told(tmp_path) -> None:
    done, report = check(tmp_path, "--sections", "components,tuning", *PATIENCE, forbid=True)
    assert done.returncode == 0
    assert states(report) == {"components": "unavailable", "tuning": "unavailable"}
    assert report["verdict"] == "nothing was compared; besides: components unavailable, tuning unavailable"
    assert "is forbidden here" in done.stdout
