"""The Python of the page on data calls what is there, with arguments that it has."""

from __future__ import annotations

import ast
import inspect
import re

from test_architecture import ROOT

import megasparse.data


def test_calls_on_the_page_have_the_arguments_of_today() -> None:
    page = (ROOT / "megasparse" / "data" / "README.md").read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S):
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        for call in calls:
            name = ast.unparse(call.func)
            if hasattr(megasparse.data, name):
                given = {keyword.arg: None for keyword in call.keywords}
                inspect.signature(getattr(megasparse.data, name)).bind(*call.args, **given)
                found.append(name)
    assert found == ["build_datasets", "BatchLoader"]
