"""A reserved port goes to those who are told its number, and to nobody else."""

from __future__ import annotations

import socket
import struct

import pytest
import torch.distributed as dist
from ports import port_of, reserve_port

IP_LOCAL_PORT_RANGE = 51
"""Of Linux 6.3 and later; Python 3.11 has no name for it."""


def any_port_of(first: int, last: int) -> socket.socket:
    """A socket that takes just any free port of a range."""
    found = socket.socket()
    try:
        found.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", last << 16 | first))
        found.bind(("", 0))
    except BaseException:
        found.close()
        raise
    return found


def test_nobody_who_asks_for_any_port_gets_a_reserved_one() -> None:
    with reserve_port() as reserved:
        port = port_of(reserved)
        try:
            any_port_of(port, port).close()
        except OSError as error:
            if "in use" not in str(error):
                pytest.skip(f"this system cannot choose ports from a range: {error}")
        else:
            pytest.fail(f"port {port} was given away")
    with any_port_of(port, port) as other:
        assert port_of(other) == port


def test_the_store_of_rank_0_listens_at_a_reserved_port() -> None:
    with reserve_port() as reserved:
        store = dist.TCPStore("127.0.0.1", port_of(reserved), is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert dist.TCPStore("127.0.0.1", port_of(reserved), is_master=False).get("key") == b"value"
