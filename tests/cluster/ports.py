"""Free ports for servers that cannot choose their own."""

from __future__ import annotations

import errno
import random
import socket

# Below Linux' ephemeral range (32768 and up), so that no outgoing connection takes a port between its choice and its
# use, and above the usual fixed services.
_FIRST, _LAST = 12_000, 32_000

# Not the global generator: tests seed it, and two seeded test processes would then choose the same ports.
_random = random.SystemRandom()


def free(count: int, address: str = "127.0.0.1") -> list[int]:
    """Returns `count` different ports on which nothing listens at `address`.

    Raises:
        OSError: `address` is not one of this machine, or no free port was found in 1000 attempts.
    """
    found: set[int] = set()
    for _ in range(1000):
        if len(found) == count:
            return sorted(found)
        port = _random.randrange(_FIRST, _LAST)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
        found.add(port)
    raise OSError(f"no {count} free ports at {address} between {_FIRST} and {_LAST}; end what listens there")
