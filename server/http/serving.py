"""The process behind `weft serve`: binds its port, serves, and ends with an exit status."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
import sys
import threading
from typing import Any, Final, NoReturn

from server.errors import BindError
from server.heap import gc_frozen
from server.settings import Settings

__all__ = ["end_process", "listen", "run"]

log = logging.getLogger("weft")

NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
GIL_SWITCH_INTERVAL_S: Final = 0.0002
"""Seconds that a thread may keep the GIL when another wants it; Python's default is 5 ms. The
engine releases it at each operation of torch, and busy connections would then hold it for so long
each time."""

OTHER_FILES: Final = 512
"""Open files that the process needs besides its connections: models, pipes, devices."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Open sockets that listen on every address of a name, before anything slow is done.

    Connections that arrive during start-up wait until the server answers.

    Raises:
        BindError: the name has no address of this machine, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise BindError("host", f"host is {host!r}, which names no address.") from None
    listeners: list[socket.socket] = []
    absent: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            listeners.append(_listener(family, kind, protocol, address))
        except OSError as error:
            if error.errno in NOT_HERE:
                # "localhost" has an IPv6 address even if IPv6 is disabled.
                absent = error
                continue
            for opened in listeners:
                opened.close()
            raise _unusable(port, address, error) from None
    if absent is not None and not listeners:
        raise BindError("host", f"host is {host!r}, which is not an address of this machine.")
    return listeners


def _listener(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _unusable(port: int, address: Any, error: OSError) -> BindError:
    reason = (error.strerror or str(error)).lower()
    return BindError(
        "port",
        f"port is {port}, which cannot be used on {address[0]}: {reason}; choose another with "
        "--port or WEFT_PORT.",
    )


def run(settings: Settings, listeners: list[socket.socket]) -> int:
    """Serve until a signal or a failure ends it.

    Returns:
        Exit status of the process: 0 after a signal, 1 if the models could not be loaded, or the
        engine or its device failed.
    """
    # As process 1 of a container, a process without a handler would not receive the signal at all.
    # Raising an exception would break the import of torch and end the process with a core dump.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))

    sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
    _allow_open_files(settings.max_connections + OTHER_FILES)

    with gc_frozen():
        import uvicorn

        from server.http.app import create_app
        from server.http.connection import connections
        from server.http.drain import CLOSE_S, DrainingServer
        from server.http.live.websockets import websocket_options

    failed: list[bool] = []

    def give_up() -> None:
        failed.append(True)
        server.should_exit = True

    app = create_app(settings, on_failure=give_up, while_loading=gc_frozen)
    config = uvicorn.Config(
        app,
        http=connections(settings),
        server_header=False,
        access_log=False,
        timeout_graceful_shutdown=CLOSE_S,
        **websocket_options(settings.streams),
    )
    server = DrainingServer(config, app.state.service, settings)
    for listener in listeners:
        log.info("listening on %s (Ctrl-C ends)", _url(*listener.getsockname()[:2]))
    server.run(sockets=listeners)
    return 1 if failed or not server.started else 0


def end_process(status: int) -> NoReturn:
    """End the process, even if a thread still loads a model or waits for a device.

    Python would let that thread run while it finalizes the interpreter, and crash.
    """
    if threading.active_count() == 1:
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _allow_open_files(wanted: int) -> None:
    """Raise the soft limit on open files, up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
