"""Commands whose help shows no type for flags, which take no value."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

__all__ = ["PlainCommand", "PlainGroup"]


class PlainCommand(TyperCommand):
    """A command without `<bool>` next to its flags."""

    @override
    def get_params(self, ctx: Any) -> list[Any]:
        """Options and arguments of the command, including `--help`."""
        return _without_types(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """A group of commands without `<bool>` next to its flags."""

    @override
    def get_params(self, ctx: Any) -> list[Any]:
        """Options of the group, including `--help`."""
        return _without_types(super().get_params(ctx))


def _without_types(params: list[Any]) -> list[Any]:
    for one in params:
        if getattr(one, "is_flag", False) and one.metavar is None:
            one.metavar = ""
    return params
