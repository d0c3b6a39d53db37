"""Heartbeats where not every rank hears every other: what one knows of a rank reaches all."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from harness import run_distributed

from megasparse.launching.heartbeats import MAX_NEWS, NEWS_INTERVALS, Heartbeats
from megasparse.parallel import Mesh
from megasparse.parallel.tree import make_control

INTERVAL = 0.2


def hear_of(mesh: Mesh, what: str) -> dict:
    """What each of seven ranks, in groups of two, knows of the last one."""
    many = replace(mesh, control=make_control(mesh.world, timedelta(seconds=120), group_ranks=2))
    heartbeats = Heartbeats(many, INTERVAL)
    last = mesh.world_size - 1
    is_odd, known = mesh.rank == last, None
    if is_odd and what == "has left":
        heartbeats.tell("step 4: data", 0.0, "ValueError at step 4: data")
    deadline = time.monotonic() + 60
    waits = not (is_odd and what in ("has left", "is silent"))
    while waits and known is None and time.monotonic() < deadline:
        heartbeats.exchange("step 4: data" if is_odd else "step 4: backward", 9.0 if is_odd else 1.0)
        found = [peer for peer in heartbeats.known if peer.rank == last]
        known = next((peer for peer in found if is_known(peer, what, heartbeats)), None) if not is_odd else found
    # The others are not all as quick to hear of it.
    deadline = time.monotonic() + 4 * INTERVAL
    while waits and time.monotonic() < deadline:
        heartbeats.exchange("step 4: data" if is_odd else "step 4: backward", 9.0 if is_odd else 1.0)
    mesh.barrier()
    return {
        "peers": [peer.rank for peer in heartbeats.peers],
        "hears_all": heartbeats.hears_all,
        "place": known.place if known and not is_odd else None,
        "left": known.left if known and not is_odd else None,
    }


def is_known(peer, what: str, heartbeats: Heartbeats) -> bool:
    if what == "has left":
        return bool(peer.left)
    return heartbeats.is_silent(peer) if what == "is silent" else peer.place == "step 4: data"


@pytest.mark.parametrize("what", ["is elsewhere", "is silent", "has left"])
def test_all_ranks_hear_of_one(what: str) -> None:
    found = run_distributed(hear_of, 7, what)
    assert [of_rank["peers"] for of_rank in found] == [[1, 2, 4], [0], [0, 3], [2], [0, 5, 6], [4], [4]]
    for of_rank in found[:-1]:
        assert not of_rank["hears_all"]
        if what == "is elsewhere":
            assert of_rank["place"] == "step 4: data"
        if what == "has left":
            assert of_rank["left"] == "ValueError at step 4: data"


def take_nonsense(mesh: Mesh) -> dict:
    heartbeats = Heartbeats(mesh, INTERVAL)
    begin, last = json.dumps([heartbeats._run])[:-1], heartbeats.peers[-1].rank
    good = [77, "step 9", 3.0, None, 0.0, 0.5]
    for news in (
        '"x"',
        "[1]",
        '[[77, "x", "y", null, 0, 0]]',
        '[[77, "x", 1, 5, 0, 0]]',
        '[[77, "x", NaN, null, 0, 0]]',
        "[[[]]]",
        "{}",
        "[[NaN]]",
        "null",
    ):
        heartbeats._note(f'{begin}, {last}, "step 8", 1, null, {news}]'.encode())
    ignored = [peer.rank for peer in heartbeats.known]
    heartbeats._note(f'{begin}, {last}, "step 8", 1, null, {json.dumps([good])}]'.encode())
    older = [77, "step 8", 9.0, None, 0.0, 0.9]
    heartbeats._note(f'{begin}, {last}, "step 8", 1, null, {json.dumps([older])}]'.encode())
    known = {peer.rank: peer.place for peer in heartbeats.known}
    told = heartbeats._told()
    heartbeats._news[77].seen -= NEWS_INTERVALS * INTERVAL
    return {"ignored": ignored, "known": known, "told": len(told), "later": [peer.rank for peer in heartbeats.known]}


def test_nonsense_and_old_news_are_not_believed() -> None:
    for rank, found in enumerate(run_distributed(take_nonsense, 2)):
        assert found["ignored"] == [1 - rank] and found["later"] == [1 - rank]
        assert found["known"] == {1 - rank: "step 8", 77: "step 9"}
        assert found["told"] == 2 <= MAX_NEWS
