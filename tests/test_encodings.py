"""Text is UTF-8 in every file and from every program, whatever the locale: no call leaves the encoding to it."""

from __future__ import annotations

import ast

import pytest
from test_architecture import ROOT, sources, tree

# Where the second argument, or the first of a method, is the mode.
OPENERS = {"open", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
# Pictures and folders: what these open is no text.
OTHER_OPENERS = {"Image", "os"}
PROGRAMS = {"run", "Popen", "check_output", "check_call", "call"}


def leaves_encoding_to_the_locale(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    if name in PROGRAMS:
        return any(word in keywords for word in ("text", "universal_newlines"))
    if not isinstance(function, ast.Attribute) and name != "open":
        return False
    if name in ("read_text", "write_text"):
        # A writer of ours takes a name as well, and no encoding.
        return len(call.args) <= (name == "write_text")
    owner = getattr(function.value, "id", "") if isinstance(function, ast.Attribute) else ""
    if name not in OPENERS or owner in OTHER_OPENERS and name == "open":
        return False
    words = [value.value for value in (*call.args, keywords.get("mode")) if isinstance(value, ast.Constant)]
    return not any(isinstance(word, str) and "b" in word for word in words)


@pytest.mark.parametrize("folder", ["megasparse", "launch", "tools", "benchmarks"])
def test_every_file_of_text_is_utf_8(folder) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(folder)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and leaves_encoding_to_the_locale(node)
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ["launch", "tools"])
def test_every_program_of_ours_bears_any_locale(folder) -> None:
    for path in sources(folder):
        names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
        assert names & {"use_utf8", "run_tool"}, path


@pytest.mark.parametrize(
    "source, expected",
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, 'rb')", False),
        ("open(path, mode='wb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open('a')", True),
        ("path.open('rb')", False),
        ("path.read_text()", True),
        ("path.write_text('x')", True),
        ("path.write_text('x', encoding='utf-8')", False),
        ("writer.write_text(name, text)", False),
        ("Image.open(path)", False),
        ("os.open(folder, flags)", False),
        ("os.fdopen(handle, 'w')", True),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, text=True, encoding='utf-8')", False),
        ("subprocess.run(command)", False),
    ],
)
def test_what_counts(source, expected) -> None:
    assert leaves_encoding_to_the_locale(ast.parse(source).body[0].value) is expected
