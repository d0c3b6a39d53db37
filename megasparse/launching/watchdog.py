"""A run that hangs says where and because of whom, and ends.

    with Watchdog(mesh, folder / "hangs", step_seconds=300, slow_seconds=1800) as watchdog:
        watchdog.beat("loading the checkpoint", slow=True)
        ...
        watchdog.beat("step 12: backward")

A daemon thread of every rank looks whether the main thread goes on. Where it stays at one place longer than the limit,
the thread writes the stacks of the process to `<folder>/rank-00000.txt`, names the ranks that do not answer or are at
another place, and ends the process with status 3. `slow_seconds` holds until the first ``beat`` and after a beat with
``slow``; `step_seconds` after the others. Time in which the whole process was stopped does not count. A main thread
that hangs in native code and keeps the interpreter's lock silences this thread too: then the other ranks name it.
Where the launcher has ended, the thread sends this process SIGTERM, for which it saves and leaves.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megasparse.launching.failures import GO_ON, LOST_PEER_STATUS, exit_now, is_lost_peer
from megasparse.launching.heartbeats import SILENT_INTERVALS, Heartbeats, Peer
from megasparse.launching.launcher import Launchers, find_launchers
from megasparse.parallel.mesh import Mesh

MAX_NAMED = 8
"""Ranks of a kind that a message names."""

REPORT_SECONDS = 10.0
"""A report that takes longer, on a file system that hangs perhaps, is left unfinished."""


class Place(NamedTuple):
    """Where the main thread is."""

    name: str
    slow: bool


class Watchdog:
    """Watches the main thread from ``__enter__`` to ``__exit__``; every rank must make one at the same point."""

    def __init__(self, mesh: Mesh, folder: Path, step_seconds: float, slow_seconds: float) -> None:
        self._rank, self._folder = mesh.rank, folder
        self._slow_seconds = slow_seconds
        self._step_seconds = min(step_seconds, slow_seconds)
        interval = min(1.0, self._step_seconds / 4)
        self._place = Place("the start", slow=True)
        self._heartbeats = Heartbeats(mesh, interval)
        self._launchers: Launchers | None = find_launchers()
        self._closed, self._leaving = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Stop watching. Where a collective failed, first find out who is gone, and add it to the error as a note."""
        self._leaving = True
        place, reason = self._place.name, "it had finished"
        if error is not None and is_lost_peer(error):
            reason = ""
            if lost := self._roll_call():
                error.add_note(lost)
        elif error is not None:
            reason = f"{type(error).__name__} at {place}"
        self._closed.set()
        self._heartbeats.wake()
        self._thread.join()
        self._heartbeats.tell(place, 0.0, reason)
        self._heartbeats.close()

    def beat(self, place: str, *, slow: bool = False) -> None:
        """The main thread has come to this place; slow: it may stay there for `slow_seconds`."""
        self._place = Place(place, slow)

    def _watch(self) -> None:
        """Until the watchdog is closed, or the main thread hangs."""
        seen, idle, before = self._place, 0.0, time.monotonic()
        while not self._closed.is_set():
            self._heartbeats.exchange(seen.name, idle, left="" if self._leaving else None)
            self._look_for_launchers()
            now = time.monotonic()
            # Longer than asked for means that this process was itself stopped, or starved, and the main thread too.
            elapsed, before = min(now - before, 2 * self._heartbeats.interval), now
            idle = idle + elapsed if self._place is seen else 0.0
            seen = self._place
            if idle > self._limit(seen) and not self._leaving and self._others_are_known(idle - self._limit(seen)):
                self._end_run(seen, idle)

    def _look_for_launchers(self) -> None:
        """Once one has gone, stop as for SIGTERM: all ranks then save and leave."""
        if self._launchers is not None and not self._leaving and (gone := self._launchers.gone()):
            self._launchers = None
            message = f"rank {self._rank}: its launcher {gone} has ended; stopping as for SIGTERM\n"
            with contextlib.suppress(OSError):  # the launcher may have read what this process writes
                os.write(2, message.encode(errors="backslashreplace"))
            os.kill(os.getpid(), signal.SIGTERM)

    def _limit(self, place: Place) -> float:
        return self._slow_seconds if place.slow else self._step_seconds

    def _others_are_known(self, waited: float) -> bool:
        """Whether it is clear of every other rank if it answers; not so where one has been quiet for a moment only."""
        unclear = any(
            peer.left is None and peer.quiet_seconds > 0 and not self._heartbeats.is_silent(peer)
            for peer in self._heartbeats.peers
        )
        return not unclear or waited > (SILENT_INTERVALS + 1) * self._heartbeats.interval

    def _end_run(self, place: Place, idle: float) -> None:
        """Report, and exit."""
        last_resort = threading.Timer(REPORT_SECONDS, os._exit, [LOST_PEER_STATUS])
        last_resort.daemon = True
        last_resort.start()
        setting = "train.distributed_timeout_seconds" if place.slow else "train.step_timeout_seconds"
        message = (
            f"error: rank {self._rank} has made no progress for {idle:.0f} s, at {place.name} (limit: "
            f"{self._limit(place):g} s, {setting}). {self._describe_others(place)}. {self._dump()}. "
            f"Checkpoints are as they were; {GO_ON}."
        )
        # Not through sys.stderr, whose lock the main thread may hold.
        os.write(2, f"{message}\n".encode(errors="backslashreplace"))
        self._heartbeats.tell(place.name, idle, f"it made no progress for {idle:.0f} s at {place.name}")
        exit_now(LOST_PEER_STATUS)

    def _describe_others(self, place: Place) -> str:
        peers = self._heartbeats.known
        if not peers:
            return "There is no other rank"
        others = [peer for peer in peers if peer.left is None and not self._is_gone(peer) and peer.place != place.name]
        found = _name_gone(filter(self._is_gone, peers)) + _enumerate(
            f"rank {peer.rank} answers and is at {peer.place} for {peer.idle_seconds:.0f} s" for peer in others
        )
        if not found:
            ranks = "other ranks" if self._heartbeats.hears_all else f"{len(peers)} ranks that it hears of"
            return f"All {ranks} answer and are at the same place"
        text = "; ".join(found)
        return text[0].upper() + text[1:]

    def _is_gone(self, peer: Peer) -> bool:
        return bool(peer.left) or (peer.left is None and self._heartbeats.is_silent(peer))

    def _roll_call(self) -> str:
        """The ranks that have left or do not answer, in words; empty: all answer."""
        with _termination_ignored():
            # One interval more than makes a rank silent, and one for those that count the same way.
            deadline = time.monotonic() + (SILENT_INTERVALS + 2) * self._heartbeats.interval
            while time.monotonic() < deadline and not all(map(self._is_gone, self._heartbeats.peers)):
                time.sleep(self._heartbeats.interval / 4)
        return "; ".join(_name_gone(filter(self._is_gone, self._heartbeats.known)))

    def _dump(self) -> str:
        """Write the stacks of all threads; returns a sentence that says where they are."""
        path = self._folder / f"rank-{self._rank:05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with path.open("x", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f"The stacks could not be written: {error}"
        return f"Stacks of all threads: {path}"


def _name_gone(peers: Iterator[Peer]) -> list[str]:
    return _enumerate(_describe_gone(peer) for peer in peers)


def _describe_gone(peer: Peer) -> str:
    if peer.left:
        return f"rank {peer.rank} has left the run: {peer.left}"
    last_seen = f"last seen at {peer.place}" if peer.place else "and was never heard of"
    return f"rank {peer.rank} has not answered for {peer.quiet_seconds:.0f} s, {last_seen}"


def _enumerate(clauses: Iterator[str]) -> list[str]:
    words = list(clauses)
    more = [f"and {len(words) - MAX_NAMED} more of the kind"] if len(words) > MAX_NAMED else []
    return words[:MAX_NAMED] + more


@contextlib.contextmanager
def _termination_ignored() -> Iterator[None]:
    """A launcher that has seen one rank fail terminates the others, which shall first say what they know."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
