"""The server with a leak of each kind, which the soak test must find.

python -m benchmarks.soak.leaky --port PORT
"""

from __future__ import annotations

import os
import sys
from itertools import count
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Final

from server.cli import main as command_line
from server.service.streams import Streams

if TYPE_CHECKING:
    from server.service.stream import StreamSession

LEAKED_BYTES: Final = 4 * 2**20
LEFT_OPEN: Final = 3
"""Number of sessions that are never closed; more would leave no room for others."""


def leak() -> None:
    """Leak memory, a file and a thread for every live stream, and some of the streams."""
    kept: list[object] = []
    closed = count()
    close = Streams.close

    def close_some(self: Streams, session: StreamSession) -> None:
        kept.append(bytearray(os.urandom(LEAKED_BYTES)))
        kept.append(os.open(os.devnull, os.O_RDONLY))
        thread = Thread(target=Event().wait, daemon=True)
        thread.start()
        if next(closed) >= LEFT_OPEN:
            close(self, session)

    replaced: Any = Streams
    replaced.close = close_some


if __name__ == "__main__":
    leak()
    sys.argv[1:] = ["serve", *sys.argv[1:]]
    command_line()
