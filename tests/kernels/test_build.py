"""The library of compiled kernels: what is in the cache folder is run only if it is what was built, by this user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest

from megasparse.kernels.block_sparse import break_even, tile_cache
from megasparse.kernels.common import build, tables

ROOT = Path(__file__).resolve().parents[2]
SOURCE = 'extern "C" int answer() { return 42; }\n'
needs_compiler = pytest.mark.skipif(build.no_compiler() is not None, reason=f"{build.no_compiler()}")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source, and a cache folder of its own."""
    monkeypatch.setenv("MEGASPARSE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def load(source: Path) -> int:
    """The answer, by another process: one that has loaded a library keeps it."""
    code = "from pathlib import Path\nfrom megasparse.kernels.common.build import load_library\n"
    code += f"print(load_library(Path({str(source)!r})).answer())"
    done = processes.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_another(path: Path) -> None:
    other = path.with_name("other.cpp")
    other.write_text(SOURCE.replace("answer", "question"), encoding="utf-8")
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", str(other), "-o", str(path)], check=True)


def forget_the_checksum(path: Path) -> None:
    build._checksum_file(path).unlink()


@needs_compiler
@pytest.mark.parametrize("damage", [truncate, flip, put_another, forget_the_checksum])
def test_a_library_that_is_not_what_was_built_is_built_anew(source: Path, damage) -> None:
    build.load_library.__wrapped__(source)
    (path,) = build.cache_folder().glob("*.so")
    # A new file, as this process has the other one mapped.
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)
    damage(path)
    assert load(source) == 42
    assert build._is_as_built(path)


@needs_compiler
@pytest.mark.parametrize("which", ["folder", "library", "checksum"])
def test_what_others_could_have_written_is_not_run(source: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_library.__wrapped__(source)
    (path,) = build.cache_folder().glob("*.so")
    wrong = {"folder": path.parent, "library": path, "checksum": build._checksum_file(path)}[which]
    mode = wrong.stat().st_mode
    wrong.chmod(mode | 0o020)
    with pytest.raises(build.BuildError, match=r"must not be writable by others"):
        build.load_library.__wrapped__(source)
    wrong.chmod(mode)
    build.load_library.__wrapped__(source)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(build.BuildError, match=f"belongs to user {own}; must be of user {own + 1}"):
        build.load_library.__wrapped__(source)


@needs_compiler
def test_who_waits_for_a_build_says_so(source: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder = build.cache_folder()
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(build, "SILENT_SECONDS", 0.1)
    code = "import filelock, sys, time\nwith filelock.FileLock(sys.argv[1]):\n    print(flush=True); time.sleep(3)"
    with processes.Process([sys.executable, "-c", code, folder / "build.lock"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        began = time.monotonic()
        assert build.load_library.__wrapped__(source).answer() == 42
    assert time.monotonic() - began > 1
    assert "waiting for another process that compiles the kernels" in capsys.readouterr().err


def test_cxx_is_split_as_a_shell_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env 'LANG=a b' g++")
    assert build.find_compiler() == [shutil.which("env"), "LANG=a b", "g++"]
    monkeypatch.setenv("CXX", "g++ 'x")
    assert 'CXX: "g++ \'x" in the environment: No closing quotation' in str(build.no_compiler())


@needs_compiler
def test_a_compiler_of_several_words_compiles(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env LANG=C {build.find_compiler()[0]}")
    assert build.load_library.__wrapped__(source).answer() == 42


def test_a_user_without_a_home_has_no_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEGASPARSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert build.cache_folder() == build.NOWHERE and not (build.NOWHERE / "break_even.json").exists()
    assert "MEGASPARSE_CACHE names one" in str(build.no_compiler())
    with pytest.raises(build.BuildError, match="no cache folder"):
        build.load_library.__wrapped__(ROOT / "none.cpp")


@pytest.mark.parametrize("tokens", ["Infinity", "1e999", "NaN", 100000 * "[", "{" + 5000 * '"a":{'])
def test_a_table_with_odd_numbers_or_deep_nesting_is_passed_over_with_a_sentence(tmp_path: Path, tokens: str) -> None:
    row = f'{{"backend": "cpu", "dtype": "float32", "block": 16, "break_even": 0.5, "tokens": {tokens}}}'
    head = '"hardware": "", "device": "cpu", "threads": 1, "versions": {}'
    path = tmp_path / "table.json"
    path.write_text(f'{{"format": "{break_even.TABLE.form}", "measurements": [{{{head}, "rows": [{row}]}}]}}', "utf-8")
    measurements, problem = tables.read_once(break_even.TABLE, path)
    assert measurements == () and problem and f"{path}: no table of break-even measurements: " in problem
    with pytest.warns(UserWarning, match="default tiles are used"):
        assert tile_cache.load(path) == {}


def test_a_user_without_a_home_has_no_tables() -> None:
    assert tables.read_once(break_even.TABLE, build.NOWHERE / "break_even.json") == ((), None)
    assert tile_cache.load(build.NOWHERE / "tiles.json") == {}
