"""Heartbeats between the ranks: who still answers, and at which place in the run.

    heartbeats = Heartbeats(mesh, interval=1.0)                  # every rank, at the same point
    heartbeats.exchange("step 12: backward", idle_seconds=0.4)   # from one thread, again and again
    heartbeats.known                                             # what was heard of the others

Datagrams go straight from every rank to every other of its groups in `mesh.control`: to all of them in a run of up to
32 ranks, to at most 31 for each level of the tree where there are more. There each says besides which ranks it misses
or knows to have stood longest at one place, so that such news reaches all ranks in a few intervals. Nothing here waits
for another rank, so that any rank that is stopped or dead, rank 0 too, is missed and not waited for. (A read from a
``TCPStore`` of torch 2.13 whose server was stopped did not end at its time-out of 3 s; it ended when the server was
killed.) A lost datagram does no harm, as the next one says the same. All carry a random number of the run; others are
ignored.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import os
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasparse.launching.environment import LOOPBACK
from megasparse.parallel import CommunicationGroup, Mesh

ADDRESS_BYTES = 128
MAX_DATAGRAM_BYTES = 16384
"""More than 1,600 characters need in JSON, six bytes each."""
MAX_NEWS = 4
"""Other ranks that a heartbeat tells of."""
NEWS_INTERVALS = 10.0
"""Old news is forgotten: the rank may answer again. More than the way through the tree takes."""
SILENT_INTERVALS = 3.0
"""A rank is silent when nothing came from it for so many intervals."""


@dataclass
class Peer:
    """What is known of another rank."""

    rank: int
    address: tuple[str, int]
    place: str = ""
    """Where it was when last heard of; empty: never heard of."""
    idle_seconds: float = 0.0
    """How long it had been there then."""
    left: str | None = None
    """Why it has left the run, in its own words; empty where another rank was the reason, None: it has not left."""
    quiet_seconds: float = 0.0
    """How long nothing came from it."""
    seen: float = 0.0
    """Time, of the clock of this process, at which all this was so. Of news from other ranks only."""


class Heartbeats:
    """This rank's heartbeats to the others, and theirs. Every rank must make one at the same point."""

    def __init__(self, mesh: Mesh, interval: float) -> None:
        self.interval, self._rank = interval, mesh.rank
        host, family = _own_host(mesh)
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        # Where the others send to, and nowhere else: a host has networks of strangers, too.
        self._socket.bind((host, 0))
        self._own_address = (host, self._socket.getsockname()[1])
        self._run = _read(mesh.from_first(_row([secrets.token_hex(8)])))[0]
        # What does not begin like this is not of this run, and is not even read: nesting can break a reader.
        self._beginning = json.dumps([self._run])[:-1].encode()
        found = [row for group in mesh.control.groups for row in _rows_of(group, [mesh.rank, *self._own_address])]
        self._peers = {rank: Peer(rank, (host, port)) for rank, host, port in sorted(found) if rank != mesh.rank}
        # Otherwise it hears some, who tell of others.
        self.hears_all = len(self._peers) == mesh.world_size - 1
        self._news: dict[int, Peer] = {}

    @property
    def peers(self) -> list[Peer]:
        """The ranks that this one hears, in order."""
        return list(self._peers.values())

    @property
    def known(self) -> list[Peer]:
        """Those, and ranks that others have told of."""
        oldest = time.monotonic() - NEWS_INTERVALS * self.interval
        return [*self.peers, *(peer for peer in list(self._news.values()) if peer.seen >= oldest)]

    def exchange(self, place: str, idle_seconds: float, left: str | None = None) -> None:
        """Tell the others where this rank is, and listen to them for one interval."""
        self.tell(place, idle_seconds, left)
        started = time.monotonic()
        heard = self._listen(started + self.interval)
        # Longer than asked for means that this process was itself stopped, or starved: no silence of the others.
        elapsed = min(time.monotonic() - started, 2 * self.interval)
        for peer in self.peers:
            peer.quiet_seconds = 0.0 if peer.rank in heard else peer.quiet_seconds + elapsed

    def tell(self, place: str, idle_seconds: float, left: str | None = None) -> None:
        """Tell the others where this rank is, or why it leaves."""
        news = [] if self.hears_all else [self._told()]
        message = json.dumps([self._run, self._rank, place[:200], round(idle_seconds, 1), left and left[:400], *news])
        for peer in self.peers:
            # A full buffer, a host that is gone: the next heartbeat says the same.
            with contextlib.suppress(OSError):
                self._socket.sendto(message.encode(), peer.address)

    def is_silent(self, peer: Peer) -> bool:
        return peer.quiet_seconds >= SILENT_INTERVALS * self.interval

    def wake(self) -> None:
        """End the ``exchange`` that another thread is in."""
        with contextlib.suppress(OSError):  # it then ends by itself, after its interval
            self._socket.sendto(b"", self._own_address)

    def close(self) -> None:
        self._socket.close()

    def _listen(self, deadline: float) -> set[int]:
        """Ranks that were heard until the deadline."""
        heard: set[int] = set()
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            with contextlib.suppress(OSError):
                datagram = self._socket.recv(MAX_DATAGRAM_BYTES)
                if not datagram:
                    break
                heard |= self._note(datagram)
        return heard

    def _note(self, datagram: bytes) -> set[int]:
        """The rank that sent it, as a set; empty where it is not of this run."""
        if not datagram.startswith(self._beginning):
            return set()
        try:
            _, rank, place, idle_seconds, left, *news = json.loads(datagram)
            peer = self._peers[rank]
            idle_seconds = float(idle_seconds)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return set()
        if not isinstance(place, str) or not isinstance(left, str | None) or not math.isfinite(idle_seconds):
            return set()
        peer.place, peer.idle_seconds, peer.left = place, idle_seconds, left
        self._take(news)
        return {rank}

    def _told(self) -> list[list[Any]]:
        """Of the ranks that are most worth to be known of: gone, or longest at one place."""
        now = time.monotonic()
        others = [peer for peer in self.known if peer.place or self.is_silent(peer)]
        others.sort(key=lambda peer: (peer.left not in (None, ""), self.is_silent(peer), peer.idle_seconds))
        return [
            [
                *(peer.rank, peer.place[:80], round(peer.idle_seconds, 1), peer.left and peer.left[:160]),
                *(round(peer.quiet_seconds, 1), round(now - peer.seen if peer.rank in self._news else 0.0, 2)),
            ]
            for peer in others[-MAX_NEWS:]
        ]

    def _take(self, news: list[Any]) -> None:
        """Note what another rank has told of others, where this one knows nothing better."""
        now = time.monotonic()
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            for rank, place, idle_seconds, left, quiet_seconds, age in news[0] if news else ():
                numbers = (float(idle_seconds), float(quiet_seconds), float(age))
                if not isinstance(left, str | None) or not all(map(math.isfinite, numbers)):
                    continue
                idle_seconds, quiet_seconds, age = numbers
                found = Peer(int(rank), ("", 0), str(place), idle_seconds, left, quiet_seconds, now - max(age, 0.0))
                before = self._news.get(found.rank)
                is_better = before is None or found.seen > before.seen
                if is_better and found.rank != self._rank and found.rank not in self._peers:
                    self._news[found.rank] = found


def _own_host(mesh: Mesh) -> tuple[str, int]:
    """The address under which the other ranks reach this one, and its family."""
    name = os.environ.get("MASTER_ADDR", LOOPBACK) if mesh.world_size > 1 else LOOPBACK
    # Looked up once: later a name server that hangs must not hold up the heartbeats.
    family, *_, address = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)[0]
    host = _host_towards(str(address[0]), family)
    # A rank that sees itself under a loopback address is on the host of the master. Others may be elsewhere.
    is_here = ipaddress.ip_address(host).is_loopback
    first = mesh.first_rank_where(not is_here)
    if first is not None:
        elsewhere = str(_read(mesh.from_rank(_row([host]), first))[0])
        if is_here:
            family = socket.AF_INET6 if ":" in elsewhere else socket.AF_INET
            host = _host_towards(elsewhere, family)
    return host, family


def _host_towards(address: str, family: int) -> str:
    """The address under which this host talks to another one."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        return probe.getsockname()[0]


def _rows_of(group: CommunicationGroup, values: list[str | int]) -> list[list[Any]]:
    """Those of every rank of a group."""
    # A sum, as torch 2.13 warns of its own names when it gathers.
    rows = torch.zeros((group.size, ADDRESS_BYTES), dtype=torch.uint8)
    rows[group.rank] = _row(values)
    return [_read(row) for row in group.sum_(rows)]


def _row(values: list[str | int]) -> Tensor:
    """As bytes of a fixed number."""
    text = json.dumps(values).encode().ljust(ADDRESS_BYTES)
    assert len(text) == ADDRESS_BYTES, text
    return torch.tensor(list(text), dtype=torch.uint8)


def _read(row: Tensor) -> list[Any]:
    """What ``_row`` was given."""
    return json.loads(bytes(row.tolist()))
