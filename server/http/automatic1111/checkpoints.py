"""The model that each of AUTOMATIC1111's clients has chosen, as a setting and not per request."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Final

from fastapi import Depends, Request

from server.errors import UnknownModel
from server.http.automatic1111.jobs import Owner
from server.service.model_shelf import ModelState

__all__ = ["Checkpoints", "CheckpointsDep", "chosen", "named"]

MAX_OWNERS: Final = 1024

MIN_DIGITS: Final = 8
"""Minimum number of digits of a hash that names a model."""

_SUFFIX: Final = re.compile(r"(\.(safetensors|ckpt|gguf))?( \[[0-9a-f]+\])?$", re.IGNORECASE)
"""Suffix that AUTOMATIC1111 appends to a model's name in its title."""


class Checkpoints:
    """The models that clients have chosen for their own requests; the oldest choices are forgotten.

    In AUTOMATIC1111 the setting is global, so that one client changes the images of another.
    """

    def __init__(self) -> None:
        self._names: OrderedDict[Owner, str] = OrderedDict()

    def choose(self, owner: Owner, name: str) -> None:
        """Use a model for a client's requests that name none."""
        self._names[owner] = name
        self._names.move_to_end(owner)
        if len(self._names) > MAX_OWNERS:
            self._names.popitem(last=False)

    def of(self, owner: Owner) -> str | None:
        """Return the model that a client has chosen; None for the default."""
        return self._names.get(owner)


def named(text: str, models: Sequence[ModelState]) -> str:
    """Return the name of the model that a text refers to by name, title, or beginning of the hash.

    Raises:
        UnknownModel: the text refers to no model.
    """
    wanted = text.strip().casefold()
    plain = _SUFFIX.sub("", wanted)
    for state in models:
        revision = "" if state.model is None else state.model.facts.revision
        by_hash = len(wanted) >= MIN_DIGITS and revision.startswith(wanted)
        if by_hash or state.name.casefold() in (wanted, plain):
            return state.name
    raise UnknownModel(text[:60], [state.name for state in models])


def chosen(name: str | None, models: Sequence[ModelState]) -> ModelState | None:
    """Return a model by name, or the default one; None while models are loading."""
    found = [state for state in models if name in (None, state.name)]
    return found[0] if found else None


async def _checkpoints(request: Request) -> Checkpoints:
    return request.app.state.automatic1111_checkpoints


CheckpointsDep = Annotated[Checkpoints, Depends(_checkpoints)]
