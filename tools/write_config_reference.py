#!/usr/bin/env python3
"""Writes the reference of all settings into configs/README.md, between its two marker comments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megasparse.config.reference import render_reference, replace_reference
from megasparse.utils.streams import use_utf8

PAGE = Path(__file__).resolve().parents[1] / "configs" / "README.md"


def main() -> int:
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is out of date")
    arguments = parser.parse_args()
    try:
        found = PAGE.read_text(encoding="utf-8")
        current = replace_reference(found, render_reference())
    except (OSError, ValueError) as error:
        print(f"write_config_reference: error: configs/README.md: {error}", file=sys.stderr)
        return 2
    if current == found:
        print("configs/README.md is up to date")
        return 0
    if arguments.check:
        print("configs/README.md is out of date: run python tools/write_config_reference.py", file=sys.stderr)
        return 1
    PAGE.write_text(current, encoding="utf-8")
    print("configs/README.md written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
