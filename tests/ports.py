"""TCP ports for programs that must be told one before they start.

with reserve_port() as reserved:
    start_something(port=port_of(reserved))
"""

from __future__ import annotations

import socket


def reserve_port() -> socket.socket:
    """A socket that keeps a free port for those who are told its number, as long as it is open.

    It is bound, with SO_REUSEADDR, and never listens. Linux then gives the port to nobody who asks for just any, nor to
    an outgoing connection, but whoever names it and sets SO_REUSEADDR, too, may listen there: torch's stores and the
    daemons of SLURM do. A port that was looked for and let go may be somebody else's before it is used.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    return reserved


def port_of(reserved: socket.socket) -> int:
    return reserved.getsockname()[1]
