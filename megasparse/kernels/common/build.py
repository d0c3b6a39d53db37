"""Builds the C++ kernels on first use and keeps the library in the user's cache folder.

``load_library(source)`` returns it, compiled for this machine's processor. The file name carries a digest of everything
that the result depends on, so that machines of different kinds may share one cache folder; a lock lets one process
compile while the others wait. The library knows nothing of Python or torch (addresses and sizes go in), which keeps the
build to seconds and free of version conflicts.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from megasparse.utils.files import write_at_once

COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 300


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


def cache_folder() -> Path:
    """$MEGASPARSE_CACHE, or `megasparse` in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("MEGASPARSE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megasparse"


@cache
def load_library(source: Path, *definitions: str) -> ctypes.CDLL:
    """The kernels of a C++ file, compiled. Raises BuildError where there is no compiler, or it fails.

    source: headers of ours lie beside it. definitions: macros to define, for tests.
    """
    compiler = find_compiler()
    flags, runtime = [*compile_flags(), *(f"-D{name}" for name in definitions)], openmp_runtime()
    folder = cache_folder()
    path = folder / f"{source.stem}-{_digest(source, compiler, [flags, runtime])}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            with FileLock(folder / "build.lock", timeout=BUILD_SECONDS):
                if not path.exists():
                    _build(source, compiler, flags, runtime, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the kernels for CPUs cannot be kept in {folder}: {error}") from None


@cache
def build_failure(source: Path) -> str | None:
    """Why the kernels of a C++ file cannot be used here; None where they can. Builds them."""
    try:
        load_library(source)
    except BuildError as error:
        return str(error)
    return None


def no_compiler() -> str | None:
    """Why nothing can be built here, as far as that can be told without a build."""
    try:
        find_compiler()
    except BuildError as error:
        return str(error)
    return None


def find_compiler() -> str:
    """$CXX, or the first of c++, g++ and clang++ on the path."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C++ compiler found: {wanted or ', '.join(COMPILERS)} (CXX names another one)")


def compile_flags() -> list[str]:
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return ["-std=c++17", "-O3", native, "-fno-strict-aliasing", "-fno-math-errno", "-ffp-contract=fast", "-fPIC"]


def openmp_runtime() -> list[str]:
    """Linker arguments for the OpenMP runtime that torch uses: a second one would keep threads of its own spinning."""
    own = Path(torch.__file__).parent / "lib"
    libraries = sorted(path for name in ("libgomp*.so*", "libiomp5*", "libomp*") for path in own.glob(name))
    return [str(libraries[0])] if libraries else ["-fopenmp"]


def _build(source: Path, compiler: str, flags: list[str], runtime: list[str], path: Path) -> None:
    print(f"megasparse: compiling the kernels for this CPU, once: {path}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        compiled, library = Path(name) / "products.o", Path(name) / "products.so"
        try:
            _run([compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(compiled)])
            _run([compiler, "-shared", str(compiled), *runtime, "-o", str(library)])
        except BuildError as error:
            # Apple's compiler has no OpenMP; the kernels then run on one thread.
            if sys.platform != "darwin":
                raise error
            _run([compiler, *flags, "-shared", str(source), "-o", str(library)])
        write_at_once(path, library.read_bytes())


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise BuildError(f"{' '.join(command)}: exit status {done.returncode}\n{last}")


def _digest(source: Path, compiler: str, commands: list[list[str]]) -> str:
    state = hashlib.sha256()
    for path in (*sorted(source.parent.glob("*.h")), source):
        state.update(path.read_bytes())
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, encoding="utf-8", errors="replace", timeout=60
    ).stdout
    for text in (compiler, version, repr(commands), platform.machine(), _processor()):
        state.update(text.encode())
    return state.hexdigest()[:16]


def _processor() -> str:
    """Model and instruction sets: what `native` stands for on this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
