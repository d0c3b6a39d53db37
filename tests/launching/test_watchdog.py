"""Hanging runs end with the name of the rank that hangs; runs that go on are left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from harness import RankFailure, run_distributed

from megasparse.launching.failures import GO_ON, exit_after_lost_peer
from megasparse.launching.heartbeats import Heartbeats
from megasparse.launching.watchdog import Watchdog
from megasparse.parallel import Mesh

LIMIT = 2.0


def misbehave(mesh: Mesh, folder: str, how: str, wrong: int) -> None:
    """All ranks go on for a while, then rank `wrong` misbehaves and the others wait for it in a collective."""
    with (Path(folder) / f"{mesh.rank}.stderr").open("w") as errors:
        os.dup2(errors.fileno(), 2)
    with exit_after_lost_peer(mesh.rank, GO_ON), Watchdog(mesh, Path(folder) / "hangs", LIMIT, 60) as watchdog:
        for step in range(4):
            watchdog.beat(f"step {step}: data")
            mesh.barrier()
            time.sleep(0.2)
        if mesh.rank == wrong:
            heartbeats = Observed(watchdog)
            watchdog.beat("step 4: data")
            heartbeats.wait_until_told("step 4: data")
            while how == "sleep" and heartbeats.all_are_there():
                watchdog.beat("step 4: data")
                time.sleep(0.1)
            be_wrong(how)
        watchdog.beat("step 4: backward")
        mesh.barrier()


class Observed:
    """What a rank tells the others by its heartbeats, and hears."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._heartbeats, self._told = watchdog._heartbeats, set()
        tell = self._heartbeats.tell

        def tell_and_note(place: str, *rest) -> None:
            tell(place, *rest)
            self._told.add(place)

        self._heartbeats.tell = tell_and_note

    def wait_until_told(self, place: str) -> None:
        while place not in self._told:
            time.sleep(0.01)

    def all_are_there(self) -> bool:
        """False, too, where there is no other."""
        return bool(self._heartbeats.peers) and all(peer.left is None for peer in self._heartbeats.peers)


def be_wrong(how: str) -> None:
    if how == "raise":
        raise ValueError("bad token")
    if how == "sleep":
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)


def messages(folder: Path, how: str, wrong: int, world_size: int = 2) -> dict[int, str]:
    """What each rank wrote on standard error."""
    with pytest.raises(RankFailure) as failure:
        run_distributed(misbehave, world_size, str(folder), how, wrong)
    assert "not done after" not in str(failure.value), failure.value
    assert f"rank {1 - wrong} ended with exit code 3" in str(failure.value)
    return {rank: (folder / f"{rank}.stderr").read_text() for rank in range(world_size)}


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path, wrong: int) -> None:
    message = messages(tmp_path, "stop", wrong)[1 - wrong]
    assert re.search(rf"rank {1 - wrong} has made no progress for \d+ s, at step 4: backward", message), message
    assert f"Rank {wrong} has not answered for " in message and "last seen at step 4: data" in message
    assert "limit: 2 s, train.step_timeout_seconds" in message and GO_ON in message
    assert len([line for line in message.splitlines() if "error: " in line]) == 1
    stacks = (tmp_path / "hangs" / f"rank-0000{1 - wrong}.txt").read_text()
    assert "in barrier" in stacks and "in misbehave" in stacks


def test_a_rank_that_answers_but_is_elsewhere_is_named_by_its_place(tmp_path: Path) -> None:
    """Rank 1 goes on without rank 0 until that has left, and hangs then."""
    found = messages(tmp_path, "sleep", wrong=1)
    assert "rank 0 has made no progress" in found[0] and "Rank 1 answers and is at step 4: data" in found[0]
    assert "rank 1 has made no progress" in found[1] and "Rank 0 has left the run: it made no progress" in found[1]
    assert "in be_wrong" in (tmp_path / "hangs" / "rank-00001.txt").read_text()


def test_a_dead_rank_is_named_among_three(tmp_path: Path) -> None:
    found = messages(tmp_path, "kill", wrong=1, world_size=3)
    assert "rank 0 lost contact with another rank: rank 1 has not answered for" in found[0]
    assert "last seen at step 4: data" in found[0] and "rank 2 has" not in found[0] and GO_ON in found[0]
    assert not (tmp_path / "hangs").exists()


def test_a_rank_that_left_with_an_error_is_named_with_it(tmp_path: Path) -> None:
    message = messages(tmp_path, "raise", wrong=1)[0]
    assert "rank 0 lost contact with another rank: rank 1 has left the run: ValueError at step 4: data" in message


def go_on_slowly(mesh: Mesh, folder: str) -> dict:
    """Beats within the limit, one long stay that was announced, one in which the whole process was stopped."""
    with Watchdog(mesh, Path(folder), LIMIT, 60) as watchdog:
        time.sleep(1.5 * LIMIT)
        for step in range(5):
            watchdog.beat(f"step {step}")
            time.sleep(LIMIT / 4)
        watchdog.beat("checkpoint", slow=True)
        time.sleep(1.5 * LIMIT)
        watchdog.beat("step 6")
        # More than once: where this process is slow, the first may come before it has stopped.
        waker = f"while sleep {1.5 * LIMIT}; do kill -CONT {os.getpid()}; done"
        with subprocess.Popen(["sh", "-c", waker]) as sleeper:
            os.kill(os.getpid(), signal.SIGSTOP)
            sleeper.kill()
        time.sleep(LIMIT / 4)
    try:
        with Watchdog(mesh, Path(folder), LIMIT, 60):
            raise ValueError("of the run")
    except ValueError as error:
        notes = getattr(error, "__notes__", [])
    return {"threads": [thread.name for thread in threading.enumerate()], "notes": notes}


def test_a_run_that_goes_on_is_left_alone_and_the_threads_end(tmp_path: Path) -> None:
    for result in run_distributed(go_on_slowly, 2, str(tmp_path / "hangs")):
        assert result == {"threads": ["MainThread"], "notes": []}
    assert not (tmp_path / "hangs").exists()


def test_one_rank_alone_reports_too(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="exit code 3"):
        run_distributed(misbehave, 1, str(tmp_path), "sleep", 0)
    message = (tmp_path / "0.stderr").read_text()
    assert (
        re.search(r"rank 0 has made no progress for \d+ s, at step 4: data", message)
        and "There is no other rank" in message
    )
    assert "in be_wrong" in (tmp_path / "hangs" / "rank-00000.txt").read_text()


def hang_where_nothing_can_be_written(mesh: Mesh, folder: str) -> None:
    (Path(folder) / "hangs").write_text("a file in the place of the folder")
    misbehave(mesh, folder, "sleep", 0)


def test_stacks_that_cannot_be_written_do_not_keep_the_run(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="exit code 3"):
        run_distributed(hang_where_nothing_can_be_written, 1, str(tmp_path))
    assert "The stacks could not be written" in (tmp_path / "0.stderr").read_text()


def listen(mesh: Mesh) -> dict:
    """Rank 0 stays silent, and somebody else sends nonsense in its name."""
    heartbeats = Heartbeats(mesh, interval=0.1)
    (peer,) = heartbeats.peers
    if mesh.rank == 1:
        heartbeats.tell("step 7", 3.0, None)
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            own = json.dumps([heartbeats._run])[:-1].encode()
            of_this_run = (
                b"]",
                b", " + 2000 * b"[",
                b', [], "x", 1, null]',
                b", 0, 7, 1, null]",
                b', 0, "x", NaN, null]',
            )
            for datagram in (
                b"\xff",
                b"{}",
                b"[1, 2]",
                2000 * b"[",
                b'["other run", 0, "x", 1, null]',
                *(own + rest for rest in of_this_run),
            ):
                stranger.sendto(datagram, peer.address)
    mesh.barrier()
    expected = "step 7" if mesh.rank == 0 else "step 8"
    while mesh.rank == 0 and peer.place != expected:
        heartbeats.exchange("step 8", 0.0)
    mesh.barrier()
    # The datagrams of the stranger, then those of rank 0's exchanges, until nothing is left to be heard.
    while mesh.rank == 1 and (peer.place != expected or peer.quiet_seconds == 0):
        heartbeats.exchange("step 8", 0.0)
    quiet = []
    # An exchange counts for one interval at least and for two at most: the first is not enough, the third is.
    for _ in range(3):
        quiet.append(heartbeats.is_silent(peer))
        heartbeats.exchange("step 9", 0.0) if mesh.rank == 1 else None
    quiet.append(heartbeats.is_silent(peer))
    mesh.barrier()
    bound = heartbeats._socket.getsockname()[0]
    return {"place": peer.place, "idle": peer.idle_seconds, "quiet": quiet, "bound": bound}


def test_strangers_are_not_heard_and_silence_takes_three_intervals() -> None:
    first, second = run_distributed(listen, 2)
    assert (first["place"], first["idle"]) == ("step 7", 3.0)
    assert second["place"] == "step 8"
    assert first["bound"] == second["bound"] == "127.0.0.1"
    assert not second["quiet"][0] and second["quiet"][2] and second["quiet"][3]
