"""Plug-ins: classes that installed packages and the operator's files add to Weft's own.

`samplers` and `guidance` build their registries with this module. Neither may import the other, so
the module is part of neither, and it imports neither.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from functools import cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import entry_points
from importlib.util import module_from_spec
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from types import ModuleType

__all__ = [
    "FAILURES",
    "VARIABLE",
    "PluginError",
    "classes_of",
    "origin_of",
    "plugin_files",
    "with_plugins",
]

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")

VARIABLE: Final = "WEFT_PLUGINS"
"""Environment variable with the names of plug-in files; child processes inherit it."""

FAILURES: Final = (Exception, SystemExit)
"""Exceptions that count as failures of the plug-in whose code raises them. KeyboardInterrupt is the
operator's."""

_ORIGINS: Final[dict[type, str]] = {}
"""Distribution or file name of each registered class that is not Weft's own."""


class PluginError(Exception):
    """A plug-in file cannot be used; the message is a sentence for the operator."""


def with_plugins(
    group: str,
    kind: type[Kind],
    ours: Iterable[type[Kind]],
    reserved: Collection[str] = (),
) -> tuple[type[Kind], ...]:
    """Our classes, followed by those of an entry-point group and those of the operator's files.

    A class of a package that cannot be used is left out, with a warning that names it: the package
    may have been installed for something else. A failing file is an error, because the operator
    named it.

    Args:
        group: name of the entry-point group.
        kind: class that each plug-in must be a subclass of.
        ours: our own classes, whose names are taken.
        reserved: names that no parameter may have, as requests have other fields of these names.

    Raises:
        PluginError: a file, or one of its classes of this kind, cannot be used.
    """
    found = list(ours)
    taken = {_name_of(one) for one in found}

    def add(one: Any, origin: str) -> None:
        name = _name_of(one)
        _check(one, name, reserved)
        if name in taken:
            raise ValueError(f"its name {name!r} is taken")
        taken.add(name)
        found.append(one)
        _ORIGINS[one] = origin

    for entry in entry_points(group=group):
        distribution = "an unknown distribution" if entry.dist is None else entry.dist.name
        try:
            one = entry.load()
            if not (isinstance(one, type) and issubclass(one, kind)):
                raise TypeError(f"{entry.value} is not a subclass of {kind.__name__}")
            add(one, distribution)
        except FAILURES as error:
            logger.warning(
                "%s %r of %s is left out: %s", group, entry.name, distribution, _describe(error)
            )
    for file in plugin_files():
        for one in classes_of(file, kind):
            try:
                add(one, file.name)
            except FAILURES as error:
                reason = f"its class {one.__name__} cannot be registered: {_describe(error)}"
                raise _unusable(file, reason) from error
    return tuple(found)


def plugin_files() -> tuple[Path, ...]:
    """The files that :data:`VARIABLE` names, separated by commas or as a JSON list.

    Raises:
        PluginError: its value is neither.
    """
    text = os.environ.get(VARIABLE, "").strip()
    named = text.split(",")
    if text.startswith("["):
        try:
            named = [str(one) for one in json.loads(text)]
        except (ValueError, RecursionError):
            raise PluginError(
                f"{VARIABLE} is not valid JSON; write the files with commas between them, or as a "
                "JSON list."
            ) from None
    stripped = (os.path.expanduser(one.strip()) for one in named if one.strip())
    return tuple(dict.fromkeys(Path(os.path.abspath(one)) for one in stripped))


def classes_of(file: Path, kind: type[Kind]) -> tuple[type[Kind], ...]:
    """The public subclasses of a class that a file defines, in the order of their definition.

    Args:
        file: path of the file, which runs when this is first called for it.
        kind: base class.

    Raises:
        PluginError: the file is missing, or its code fails.
    """
    module = _module_of(file)
    own = (one for one in vars(module).values() if isinstance(one, type))
    return tuple(
        dict.fromkeys(
            one
            for one in own
            if issubclass(one, kind)
            and one.__module__ == module.__name__
            and not one.__name__.startswith("_")
        )
    )


def origin_of(kind: type) -> str | None:
    """The distribution or the file name of a registered class.

    None for Weft's own classes and for classes that are not registered.
    """
    return _ORIGINS.get(kind)


@cache
def _module_of(file: Path) -> ModuleType:
    """Run a file as a module, under a name that no other module has."""
    # Unlike pathlib, os.path takes a path that is too long for one at which there is nothing.
    if not os.path.isfile(file):
        folder = "it is a folder; name a Python file" if os.path.isdir(file) else None
        raise _unusable(file, folder or "there is no such file")
    if file.suffix != ".py":
        raise _unusable(file, "it is not a Python file, whose name ends with .py")
    name = "weft_plugin_" + re.sub(r"\W", "_", file.stem)
    while name in sys.modules:
        name += "_"
    loader = SourceFileLoader(name, str(file))
    spec = ModuleSpec(name, loader, origin=str(file))
    spec.has_location = True
    module = module_from_spec(spec)
    # pydantic resolves annotations that are strings in this module.
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except FAILURES as error:
        del sys.modules[name]
        if isinstance(error, PluginError):
            # The file imports a registry, which ran it once more; the error says where that failed.
            raise
        raise _unusable(file, _describe(error, file)) from error
    return module


def _unusable(file: Path, reason: str) -> PluginError:
    return PluginError(f"The plug-in {file} cannot be used: {reason.rstrip('.')}.")


def _describe(error: BaseException, file: Path | None = None) -> str:
    """Describe an error in one line: line of the file that raised it, type and message."""
    lines = [
        frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    message = str(error)
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines, message = [error.lineno], error.msg
    where = f"line {lines[-1]}: " if lines and lines[-1] else ""
    return f"{where}{type(error).__name__}: {' '.join(message.split())}"


def _name_of(kind: type) -> str:
    """The default of the class's field `name`, by which requests choose it; empty without one."""
    field = getattr(kind, "model_fields", {}).get("name")
    return field.default if field is not None and isinstance(field.default, str) else ""


def _check(one: Any, name: str, reserved: Collection[str]) -> None:
    """Raise what would fail later in requests and the catalog, which share one schema."""
    if taken := [field for field in one.model_fields if field in reserved]:
        raise ValueError(f"its parameter {taken[0]!r} has the name of another field of requests")
    if get_args(one.model_fields["name"].annotation) != (name,):
        raise TypeError("its field name must be a Literal with one name, which is its default")
    if missing := sorted(getattr(one, "__abstractmethods__", ())):
        raise TypeError(f"it does not define {', '.join(missing)}")
    if missing := [
        text for text in ("summary", "source") if not isinstance(getattr(one, text, None), str)
    ]:
        raise TypeError(f"it has no {missing[0]}, a ClassVar[str] that the catalog shows")
    # The instance that the bare name stands for must be hashable: plans are cached, and rows
    # grouped, by equality.
    hash(one.model_validate({}))
    one.model_json_schema()
