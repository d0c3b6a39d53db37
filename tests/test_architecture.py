"""The rules of the house, read from the syntax trees of all sources: who may import whom, sizes, and what is unsafe."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Every package imports only packages that stand before it, and itself.
ORDER = (
    "utils",
    "config",
    "data",
    "parallel",
    "launching",
    "kernels",
    "sparsity",
    "layers",
    "models",
    "cost",
    "engine",
    "checkpoint",
    "inference",
    "serving",
    "monitoring",
    "evaluation",
    "reporting",
    "tuning",
    "objectives",
    "methods",
    "training",
    "conversion",
    "pruning",
    "quantization",
    "planning",
    "gpu_check",
    "studies",
)

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle"}
GENERATED_FOLDERS = {"build", "dist", "runs", "__pycache__"}


def sources(*folders: str) -> list[Path]:
    """All Python files of these top-level folders (of the whole repository where none is named)."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") or part.endswith(".egg-info") for part in parts)
        if hidden or GENERATED_FOLDERS & set(parts[:-1]) or (folders and parts[0] not in folders):
            continue
        found.append(path)
    assert found, folders
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imported_modules(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Absolute dotted names of everything that a file imports, function-level and relative imports included."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from megasparse import training` imports a package under a name.
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))


def keyword_value(call: ast.Call, name: str) -> object:
    for keyword in call.keywords:
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return keyword.value.value
    return None


def test_every_package_has_a_rule() -> None:
    packages = {path.parent.name for path in (ROOT / "megasparse").glob("*/__init__.py")}
    assert packages == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_only_what_lies_below_them(package) -> None:
    allowed = {*ORDER[: ORDER.index(package) + 1], "__version__"}
    wrong = []
    for path in (ROOT / "megasparse" / package).rglob("*.py"):
        for node, module in imported_modules(path):
            parts = module.split(".")
            if parts[0] in ("launch", "tools", "tests", "benchmarks"):
                wrong.append(f"{place(path, node)} imports {module}")
            if parts[0] == "megasparse" and parts[1] not in allowed:
                wrong.append(f"{place(path, node)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_scripts_import_nothing_of_ours_but_the_package() -> None:
    wrong = []
    for path in sources("launch", "tools", "benchmarks"):
        own = {p.stem for p in path.parent.glob("*.py")} | {"launch", "tools", "tests", "benchmarks"}
        if path.parent.name == "benchmarks":
            # What the benchmarks share, and the world of the one that counts.
            own -= {"bench_setup", "part_timer", "result_file", "measured_tool", "fake_ranks", "made_up_parts"}
            own -= {"adapter_arms", "adapter_start", "adapter_table"}
        for node, module in imported_modules(path):
            if module.split(".")[0] in own:
                wrong.append(f"{place(path, node)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES}
    assert not long, long


def test_functions_are_short() -> None:
    long = [
        f"{place(path, node)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_modules_say_what_they_are_for() -> None:
    mute = [
        str(p.relative_to(ROOT)) for p in sources("megasparse", "launch", "tools") if not ast.get_docstring(tree(p))
    ]
    assert not mute, mute


def test_no_global_state_is_rebound() -> None:
    wrong = [place(p, node) for p in sources() for node in ast.walk(tree(p)) if isinstance(node, ast.Global)]
    assert not wrong, wrong


def test_nothing_runs_code_from_data() -> None:
    wrong = []
    for path in sources():
        wrong += [
            f"{place(path, node)} imports {module}"
            for node, module in imported_modules(path)
            if module.split(".")[0] in UNSAFE_MODULES
        ]
        for call in calls(path):
            name = ast.unparse(call.func)
            if name in ("eval", "exec", "os.system", "os.popen", "__import__"):
                wrong.append(f"{place(path, call)} calls {name}")
            if name == "torch.load" and keyword_value(call, "weights_only") is not True:
                wrong.append(f"{place(path, call)} calls torch.load without weights_only=True")
            if keyword_value(call, "shell") is True:
                wrong.append(f"{place(path, call)} runs a shell")
            if keyword_value(call, "allow_pickle") is True or name in ("yaml.load", "yaml.unsafe_load"):
                wrong.append(f"{place(path, call)} calls {name} unsafely")
    assert not wrong, "\n".join(wrong)


def test_models_do_not_branch_on_sparsity_or_parallelism() -> None:
    wrong = []
    for path in sorted((ROOT / "megasparse" / "models").rglob("*.py")):
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
                continue
            # Refusing a user's mistake is no branch of the model.
            if isinstance(node, ast.If) and not node.orelse and all(isinstance(n, ast.Raise) for n in node.body):
                continue
            names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
            branches = [name for name in names if "sparse" in name.lower() or name in ("tp", "tensor_parallel_size")]
            wrong += [f"{place(path, node)} branches on {name}" for name in branches]
    assert not wrong, "\n".join(wrong)


def test_the_checks_can_fail(tmp_path, monkeypatch) -> None:
    """The rules above, tried on a file that breaks them."""
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    bad = tmp_path / "megasparse" / "kernels" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("from ..training import loop\nimport torch\ntorch.load('x')\ndef f():\n    global y\n    y = 1\n")
    assert [module for _, module in imported_modules(bad)] == ["megasparse.training.loop", "torch"]
    for check in (
        test_nothing_runs_code_from_data,
        test_no_global_state_is_rebound,
        test_modules_say_what_they_are_for,
    ):
        with pytest.raises(AssertionError):
            check()
    with pytest.raises(AssertionError, match="megasparse.training.loop"):
        test_packages_import_only_what_lies_below_them("kernels")


def test_test_modules_have_names_of_their_own() -> None:
    """There are no packages of tests: two modules of one name cannot both be imported."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert {name for name in names if names.count(name) > 1} <= {"conftest.py"}
