#!/usr/bin/env python3
"""Writes the reference of all settings into configs/README.md, between its two marker comments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megasparse.config.reference import render_reference, replace_reference
from megasparse.data.arguments import run_tool

PAGE = Path(__file__).resolve().parents[1] / "configs" / "README.md"


def main(check: bool) -> None:
    found = PAGE.read_text(encoding="utf-8")
    current = replace_reference(found, render_reference())
    if current == found:
        print("configs/README.md is up to date")
    elif check:
        sys.exit("configs/README.md is out of date: run python tools/write_config_reference.py")
    else:
        PAGE.write_text(current, encoding="utf-8")
        print("configs/README.md written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is out of date")
    options = parser.parse_args()
    sys.exit(run_tool("write_config_reference", lambda: main(options.check)))
