"""The import graph of megasparse/, read from the code and drawn in its README.

    python tests/draw_packages.py        # writes the drawing anew, after an import between packages came or went

An arrow goes from a package to one that it imports. Left out are arrows that follow from others: where training imports
cost and cost imports models, training -> models says nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping

from test_architecture import ORDER, ROOT, imported_modules

MAP = ROOT / "megasparse" / "README.md"
BEGIN, END = "<!-- Drawn by tests/draw_packages.py -->\n", "<!-- End of the drawing -->\n"

Graph = Mapping[str, set[str]]


def package_imports() -> Graph:
    """The packages that each package of megasparse/ imports, itself left out."""
    graph: dict[str, set[str]] = {package: set() for package in ORDER}
    for package, imported in graph.items():
        for path in (ROOT / "megasparse" / package).rglob("*.py"):
            names = (module.split(".") for _, module in imported_modules(path))
            imported |= {name[1] for name in names if name[0] == "megasparse" and name[1] in graph}
        imported.discard(package)
    return graph


def reachable(graph: Graph, start: str) -> set[str]:
    """All that one arrives at from `start` over one arrow or more."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def reduced(graph: Graph) -> Graph:
    """Without the arrows that follow from others. The graph must have no cycle."""
    beyond = {package: reachable(graph, package) for package in graph}
    return {
        package: imported - set().union(*(beyond[other] for other in imported)) for package, imported in graph.items()
    }


def drawing(graph: Graph) -> str:
    """The reduced graph as a Mermaid flowchart: the last package first, so that all arrows point down."""
    kept = reduced(graph)
    lines = ["```mermaid", "flowchart TD"]
    for package in reversed(ORDER):
        below = sorted(kept[package], key=ORDER.index)
        lines.append(f"    {package} --> {' & '.join(below)}" if below else f"    {package}")
    return "\n".join([*lines, "```", ""])


def with_drawing(text: str, graph: Graph) -> str:
    """The page with the drawing between its two marks made anew."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{MAP.name} must hold {BEGIN.strip()} and {END.strip()}"
    return before + BEGIN + drawing(graph) + END + after


if __name__ == "__main__":
    MAP.write_text(with_drawing(MAP.read_text(encoding="utf-8"), package_imports()), encoding="utf-8")
