"""Who may use the server, measured on every route of its table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from starlette.routing import WebSocketRoute

from benchmarks.promises.promise import Outcome, Promise
from server.http.app import create_app
from server.http.gate import PROBES, needs_key
from server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.real_server import Served

__all__ = ["PROMISES"]

WRONG_KEYS: Final = ("", "Bearer", "Bearer ", "Bearer wrong", "Basic wrong", "Bearer \x00")
UPGRADE: Final = {
    "connection": "upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}
FOREIGN_HOSTS: Final = (
    "evil.example",
    "127.0.0.1.evil.example",
    "127.0.0.1@evil.example",
    "evil.example#127.0.0.1",
    "",
    "127.0.0.1:port",
    "[::1",
    "0.0.0.0",  # noqa: S104
    "127.0.0.2",
    "localhost.evil.example",
)
FOREIGN_ORIGINS: Final = ("null", "http://evil.example", "http://127.0.0.1:9", "file://", "")


def _routes() -> list[tuple[str, str]]:
    """Every method and path that the application serves; WebSockets have the method WS."""
    app = create_app(Settings())
    schema = app.openapi()["paths"]
    served = [(method.upper(), path) for path, item in schema.items() for method in item]
    served = [(method, path.replace("{identifier}", "abc")) for method, path in served]
    served += [("WS", route.path) for route in _sockets(app.routes)]
    return [*served, ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json")]


def _sockets(routes: Sequence[Any]) -> Iterator[WebSocketRoute]:
    for route in routes:
        if isinstance(route, WebSocketRoute):
            yield route
        elif hasattr(route, "original_router"):
            yield from _sockets(route.original_router.routes)


def _asked(server: Served, method: str, path: str, header: str, value: str) -> int:
    if method == "WS":
        return server.status("GET", path, None, {**UPGRADE, header: value})
    return server.status(method, path, b"{}" if method == "POST" else None, {header: value})


def _let_through(
    server: Served, header: str, values: tuple[str, ...], asks: Callable[[str], bool]
) -> Outcome:
    tried = through = 0
    refusals = {401, 403}
    for method, path in _routes():
        if not asks(path):
            continue
        for value in values:
            status = _asked(server, method, path, header, value)
            tried += 1
            # A header that is not valid HTTP is refused before it is read.
            through += status not in {*refusals, 400, 0}
    return Outcome(f"{through} of {tried} let through", through == 0)


def _keys(server: Served) -> Outcome:
    return _let_through(server, "authorization", WRONG_KEYS, needs_key)


def _hosts(server: Served) -> Outcome:
    return _let_through(server, "host", FOREIGN_HOSTS, _is_no_probe)


def _origins(server: Served) -> Outcome:
    return _let_through(server, "origin", FOREIGN_ORIGINS, _is_no_probe)


def _is_no_probe(path: str) -> bool:
    return path not in PROBES


def _listeners(server: Served) -> Outcome:
    """Count listening sockets of the server's process in the kernel's tables."""
    own = {str(link.readlink()) for link in Path(f"/proc/{server.process}/fd").iterdir()}
    found: list[str] = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{server.process}/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and f"socket:[{cells[9]}]" in own:
                found.append(cells[1].partition(":")[0])
    loopback = "0100007F"
    figure = (
        f"{len(found)} listeners, {sum(one != loopback for one in found)} of them open to others"
    )
    return Outcome(figure, found == [loopback])


PROMISES: Final = (
    Promise(
        "Every route needs a key, except the page, the probes and stored images, whose URLs cannot "
        "be guessed.",
        f"all routes with {len(WRONG_KEYS)} missing, wrong and malformed keys",
        "0 let through",
        "no gate",
        _keys,
    ),
    Promise(
        "A web page cannot reach a local server through a name of its own.",
        f"all routes but the probes with {len(FOREIGN_HOSTS)} foreign and malformed Host headers",
        "0 let through",
        "no gate",
        _hosts,
    ),
    Promise(
        "A web page from elsewhere cannot use the server.",
        f"all routes but the probes with {len(FOREIGN_ORIGINS)} foreign Origin headers",
        "0 let through",
        "no gate",
        _origins,
    ),
    Promise(
        "By default there is one listener, on loopback.",
        "listening sockets of the process, from /proc",
        "1, of them 0 open to others",
        "a second listener",
        _listeners,
    ),
)
