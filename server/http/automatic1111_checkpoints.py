"""Which model a client of AUTOMATIC1111 has chosen: there it is a setting, and not of a request."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Final

from fastapi import Depends, Request

from server.errors import UnknownModel
from server.http.automatic1111_jobs import Owner
from server.requests.catalog import ModelEntry

__all__ = ["Checkpoints", "CheckpointsDep", "chosen", "named"]

MOST_OWNERS: Final = 1024

_SUFFIX: Final = re.compile(r"(\.(safetensors|ckpt|gguf))?( \[[0-9a-f]+\])?$", re.IGNORECASE)
"""What AUTOMATIC1111 writes after a model's name in its title."""


class Checkpoints:
    """The models that clients have chosen, each for itself; those chosen longest ago are forgotten.

    There the setting is the server's, so that one client changes the pictures of another.
    """

    def __init__(self) -> None:
        self._names: OrderedDict[Owner, str] = OrderedDict()

    def choose(self, owner: Owner, name: str) -> None:
        """Let a client's requests that name no model have this one."""
        self._names[owner] = name
        self._names.move_to_end(owner)
        if len(self._names) > MOST_OWNERS:
            self._names.popitem(last=False)

    def of(self, owner: Owner) -> str | None:
        """The model that a client has chosen; None for the default."""
        return self._names.get(owner)


def named(text: str, models: Sequence[ModelEntry]) -> str:
    """The name of the model that a text means: a name, a title, or the beginning of a hash.

    Raises:
        UnknownModel: none does.
    """
    wanted = text.strip().casefold()
    plain = _SUFFIX.sub("", wanted)
    for entry in models:
        if entry.name.casefold() in (wanted, plain) or (
            len(wanted) >= 8 and entry.revision.startswith(wanted)
        ):
            return entry.name
    raise UnknownModel(text[:60], [entry.name for entry in models])


def chosen(name: str | None, models: Sequence[ModelEntry]) -> Sequence[ModelEntry]:
    """The entry of a model, or of the default one; none while models are loading."""
    if name is None:
        return models[:1]
    return [entry for entry in models if entry.name == name]


def _checkpoints(request: Request) -> Checkpoints:
    return request.app.state.automatic1111_checkpoints


CheckpointsDep = Annotated[Checkpoints, Depends(_checkpoints)]
