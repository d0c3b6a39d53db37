"""Builds the C++ kernels on first use and keeps the library in the user's cache folder.

``load_library(source)`` returns it, compiled for this machine's processor. The file name carries a digest of everything
that the result depends on, so that machines of different kinds may share one cache folder; a lock lets one process
compile while the others wait. Loading a library runs it: one that does not have the checksum written beside it is
built anew, and none is taken from where others than the user could have put it. The library knows nothing of Python or
torch (addresses and sizes go in), which keeps the build to seconds and free of version conflicts.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from megasparse.utils.files import write_at_once

COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 300
LOCK_SECONDS = 2 * BUILD_SECONDS
"""Another process may compile and link meanwhile."""
SILENT_SECONDS = 2
"""So long another process is waited for without a word."""

COMMON = Path(__file__).parent
"""Of headers that several kernels include."""
NOWHERE = Path(os.devnull) / "megasparse"
"""In place of a cache folder where there is none: nothing can be there, and nothing can be written."""


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


def cache_folder() -> Path:
    """$MEGASPARSE_CACHE, or `megasparse` in $XDG_CACHE_HOME or ~/.cache; NOWHERE for a user without a home."""
    own = os.environ.get("MEGASPARSE_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megasparse"
    except RuntimeError:  # no HOME, and no entry among the users, as in containers
        return NOWHERE


@cache
def load_library(source: Path, *definitions: str) -> ctypes.CDLL:
    """The kernels of a C++ file, compiled. Raises BuildError where there is no compiler, or it fails.

    source: headers of ours lie beside it, or here. definitions: macros to define, for tests.
    """
    compiler = find_compiler()
    flags, runtime = [*compile_flags(), *(f"-D{name}" for name in definitions)], openmp_runtime()
    folder = _folder_to_build_in()
    path = folder / f"{source.stem}-{_digest(source, compiler, [flags, runtime])}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_what_others_write(folder)
        if not _is_as_built(path):
            with _lock(folder / "build.lock"):
                if not _is_as_built(path):
                    _build(source, compiler, flags, runtime, path)
        return ctypes.CDLL(str(path))
    except (OSError, NotImplementedError) as error:  # NotImplementedError: of a file system without locks
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
        _folder_to_build_in()
    except BuildError as error:
        return str(error)
    return None


def find_compiler() -> list[str]:
    """The words of $CXX, such as `ccache g++`, or the first of c++, g++ and clang++ on the path."""
    wanted = os.environ.get("CXX", "")
    try:
        own = shlex.split(wanted)
    except ValueError as error:
        raise BuildError(f"CXX: {wanted!r} in the environment: {error}; must be words as a shell reads them") from None
    for name, *words in [own] if own else [[name] for name in COMPILERS]:
        found = shutil.which(name)
        if found:
            return [found, *words]
    raise BuildError(f"no C++ compiler found: {wanted or ', '.join(COMPILERS)} (CXX names another one)")


def compile_flags() -> list[str]:
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return ["-std=c++17", "-O3", native, "-fno-strict-aliasing", "-fno-math-errno", "-ffp-contract=fast", "-fPIC"]


def openmp_runtime() -> list[str]:
    """Linker arguments for the OpenMP runtime that torch uses: a second one would keep threads of its own spinning."""
    own = Path(torch.__file__).parent / "lib"
    libraries = sorted(path for name in ("libgomp*.so*", "libiomp5*", "libomp*") for path in own.glob(name))
    return [str(libraries[0])] if libraries else ["-fopenmp"]


def _folder_to_build_in() -> Path:
    folder = cache_folder()
    if folder == NOWHERE:
        raise BuildError("no cache folder for compiled kernels: this user has no home; MEGASPARSE_CACHE names one")
    return folder


def _refuse_what_others_write(path: Path) -> None:
    """Raise PermissionError where somebody else could have put code of his own."""
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {found.st_uid}; must be of user {os.geteuid()}, who runs this")
    if found.st_mode & 0o022:
        raise PermissionError(f"{path} has mode {found.st_mode & 0o777:o}; must not be writable by others (chmod go-w)")


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _is_as_built(path: Path) -> bool:
    """Whether the library is there, and is what was compiled."""
    try:
        content, known = path.read_bytes(), _checksum_file(path).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return False
    for file in (path, _checksum_file(path)):
        _refuse_what_others_write(file)
    return hashlib.sha256(content).hexdigest() == known.strip()


def _lock(path: Path) -> AbstractContextManager:
    """Keep other processes from building; says so where they do."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=SILENT_SECONDS)
    except Timeout:
        _say(f"waiting for another process that compiles the kernels, for {LOCK_SECONDS} s at most: {path}")
        return lock.acquire(timeout=LOCK_SECONDS)


def _say(text: str) -> None:
    print(f"megasparse: {text}", file=sys.stderr, flush=True)


def _build(source: Path, compiler: list[str], flags: list[str], runtime: list[str], path: Path) -> None:
    _say(f"compiling the kernels for this CPU, once: {path}")
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        compiled, library = Path(name) / "products.o", Path(name) / "products.so"
        try:
            _run([*compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(compiled)])
            _run([*compiler, "-shared", str(compiled), *runtime, "-o", str(library)])
        except BuildError as error:
            # Apple's compiler has no OpenMP; the kernels then run on one thread.
            if sys.platform != "darwin":
                raise error
            _run([*compiler, *flags, "-shared", str(source), "-o", str(library)])
        content = library.read_bytes()
    # The checksum last: without the right one the library counts as not there.
    for file, part in ((path, content), (_checksum_file(path), hashlib.sha256(content).hexdigest() + "\n")):
        write_at_once(file, part)
        file.chmod(0o600)


def _run(command: list[str]) -> str:
    """What it prints."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise BuildError(f"{' '.join(command)}: exit status {done.returncode}\n{last}")
    return done.stdout


def _digest(source: Path, compiler: list[str], commands: list[list[str]]) -> str:
    state = hashlib.sha256()
    for path in (*sorted(COMMON.glob("*.h")), *sorted(source.parent.glob("*.h")), source):
        state.update(path.read_bytes())
    for text in (_run([*compiler, "--version"]), repr(compiler), repr(commands), platform.machine(), _processor()):
        state.update(text.encode())
    return state.hexdigest()[:16]


def _processor() -> str:
    """Model and instruction sets: what `native` stands for on this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
