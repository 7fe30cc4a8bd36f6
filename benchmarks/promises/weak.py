"""The server without its defenses, on which every measurement must fail.

    python -m benchmarks.promises.weak --port PORT

A measurement that finds nothing wrong here would find nothing wrong anywhere.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from fastapi.routing import APIRoute
from uvicorn import Server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.cli import main as command_line
from server.decoding import picture
from server.decoding.pool import Decoded, DecodePool
from server.decoding.worker import DecodingJob, decoded
from server.engine import fair_queue, selection
from server.engine.scheduler import fill
from server.engine.stages import Failure, Stages
from server.engine.tick import newcomers
from server.http import body, connection, drain, errors, gate, making
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.shelf import AdapterShelf
from server.service.service import Service

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping, Sequence

    from server.engine.scheduler import Candidate, LaneCosts
    from server.settings import Settings

MANY: Final = 10**9


def weaken() -> None:
    """Remove each defense, as servers without it behave."""
    _replace(gate.Gate, "_admit", _let_everybody_in)
    _replace(body.JsonRoute, "get_route_handler", APIRoute.get_route_handler)
    _replace(connection, "connections", _plain_connections)
    _replace(picture, "MAX_SCANS", MANY)
    _replace(picture, "MAX_ASPECT_RATIO", MANY)
    for method in ("_uploaded", "_decoded"):
        _replace(DecodePool, method, _decode_in_a_thread)
    _replace(making, "cancel_on_disconnect", _whether_or_not_disconnected)
    _replace(errors, "explain", _stumble)
    _replace(newcomers, "varied_noise", _any_noise)
    serve_in_order()
    _replace(Service, "admit", _tell_the_log(Service.admit))
    _replace(AdapterShelf, "find", _wherever_it_is)
    _replace(Stages, "_divided", _end_all)
    _replace(drain.DrainingServer, "handle_exit", Server.handle_exit)
    _replace(drain.DrainingServer, "on_tick", Server.on_tick)
    _replace(drain.DrainMiddleware, "__call__", _say_nothing)


def serve_in_order() -> None:
    """Replace fair shares of the device by first come, first served."""
    _replace(selection, "fair_tick", _oldest_first)
    _replace(fair_queue.Turns, "flow_due", lambda *_: True)
    _replace(fair_queue.Turns, "virtual_times_of", lambda *_: (0.0, 0.0))


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        raise AttributeError(f"{owner} has no {name}; the negative control is out of date")
    setattr(owner, name, value)


def _let_everybody_in(own: Any, scope: Any, headers: Any) -> None:
    """Recognize a key, so that its work can be counted, but require none."""
    offered = headers.get("authorization", "").removeprefix("Bearer ")
    for key in own._keys:
        if key.opens_for(offered):
            scope.setdefault("state", {})["api_key"] = key


def _plain_connections(_: Settings) -> type[asyncio.Protocol]:
    return HttpToolsProtocol


async def _decode_in_a_thread(_: DecodePool, one: Any, **__: bool) -> Decoded:
    content = one.data.encode() if isinstance(one.data, str) else one.data
    coded = isinstance(one.data, str)
    job = DecodingJob(len(content), one.field, False, one.mask, coded, MANY, one.target, MANY)
    return Decoded(np.asarray(await asyncio.to_thread(decoded, job, content)), {})


async def _whether_or_not_disconnected(_: Any, work: Coroutine[Any, Any, Any]) -> Any:
    return await work


def _stumble(*_: Any, **__: Any) -> None:
    raise LookupError("an error while an error was explained")


def _any_noise(_: int, shape: tuple[int, ...], *__: Any) -> torch.Tensor:
    return torch.randn(shape)


def _oldest_first(
    candidates: Sequence[Candidate],
    _: Any,
    lanes: Mapping[int, LaneCosts],
    *__: Any,
) -> list[int]:
    """First come, first served, in ticks as large as allowed."""
    if not candidates:
        return []
    lane = candidates[0].lane
    here = [i for i, one in enumerate(candidates) if one.lane == lane]
    return fill(candidates, here, lanes[lane].max_rows)


def _end_all(_: Any, chosen: list[Any], __: int | None, error: Exception) -> Iterator[Failure]:
    """Treat an error of a tick as an error of all its images."""
    yield Failure(chosen, error)


async def _say_nothing(own: Any, *connection: Any) -> None:
    await own._app(*connection)


def _wherever_it_is(shelf: Any, name: str) -> AdapterFile:
    """Join the name of an adapter to the folder without checks."""
    path = shelf._folders[0] / f"{name.removesuffix('.safetensors')}.safetensors"
    return AdapterFile.read(name, path, shelf._target)


def _tell_the_log(admit: Any) -> Any:
    async def admit_and_tell(service: Service, request: Any, *more: Any) -> Any:
        logging.getLogger("weft").warning("admitting %r", request)
        return await admit(service, request, *more)

    return admit_and_tell


def main() -> None:
    """Serve without defenses, and also listen on a second port on all addresses."""
    weaken()
    door = socket.create_server(("0.0.0.0", 0))  # noqa: S104 - the weakness itself
    with door:
        sys.argv[1:1] = ["serve"]
        command_line()


if __name__ == "__main__":
    main()
