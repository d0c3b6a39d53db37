"""Any locale: files are UTF-8, and what a console cannot show is replaced and ends no run."""

from __future__ import annotations

import codecs
import io
import locale
import os
import sys


def use_utf8() -> None:
    """For entry scripts, first of all: files and their names are UTF-8, for all packages; the console stays as it is.

    In a Latin-1 or C locale a bar of the plan or a sampled text would be an error, and torch 2.13 cannot read sources
    of its own. Python takes UTF-8 only when it starts, so it starts once more in the place of this process.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8" and not sys.flags.utf8_mode:
        console = getattr(sys.stdout, "encoding", None) or "ascii"
        variables = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": f"{console}:replace"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None, where the process was started without
            stream.reconfigure(errors="replace")
