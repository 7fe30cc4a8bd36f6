"""Engines with full ticks, for tests of how images in a tick affect each other.

On a CPU a tick of twice the rows may take twice the time; the engine then runs few rows at once.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from server.engine.tick.preview import fit_preview
from server.models.hosted import HostedModel

_fitted: dict[tuple[Any, ...], Tensor] = {}


@contextmanager
def full_ticks() -> Generator[None]:
    """Within this context, engines start as if ticks of all sizes took the same time.

    The colors of previews, which take most of a start, are fitted only once for the same weights.
    """
    with (
        patch("server.engine.warmup.time_forwards", lambda _, most: {1: 0.01, most: 0.01}),
        patch("server.engine.warmup.fit_preview", _fitted_once),
    ):
        yield


def _fitted_once(model: HostedModel) -> Tensor:
    key = type(model), model.facts.revision, model.device, model.dtype
    if key not in _fitted:
        _fitted[key] = fit_preview(model)
    return _fitted[key]
