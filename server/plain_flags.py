"""Commands whose help has no type beside flags, which take no value."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

__all__ = ["PlainCommand", "PlainGroup"]


class PlainCommand(TyperCommand):
    """A command without `<bool>` beside its flags."""

    @override
    def get_params(self, ctx: Any) -> list[Any]:
        """Its options and arguments, that for help included."""
        return _without_types(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """A group of commands without `<bool>` beside its flags."""

    @override
    def get_params(self, ctx: Any) -> list[Any]:
        """Its options, that for help included."""
        return _without_types(super().get_params(ctx))


def _without_types(params: list[Any]) -> list[Any]:
    for one in params:
        if getattr(one, "is_flag", False) and one.metavar is None:
            one.metavar = ""
    return params
