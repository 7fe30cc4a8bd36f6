"""Checks on the source: which package may import which, and that a name has one meaning."""

import ast
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SHIPPED = ("samplers", "guidance", "server")
FOLDERS = (*SHIPPED, "embedded", "benchmarks", "studies")

FORBIDDEN = {
    "weft_plugins": {"samplers", "guidance", "server", "embedded"},
    "samplers": {"guidance", "server", "embedded"},
    "guidance": {"samplers", "server", "embedded"},
    "server": {"benchmarks", "studies"},
    "server.models": {"server.engine", "server.requests", "server.service", "server.http"},
    "server.decoding": {"server.engine", "server.requests", "server.service", "server.http"},
    "server.engine": {"server.requests", "server.service", "server.http", "fastapi", "starlette"},
    "server.requests": {"server.service", "server.http", "fastapi", "starlette"},
    "server.service": {"server.http", "fastapi", "starlette"},
    "server.jobs": {"server.http", "fastapi", "starlette"},
    "server.http": {"torch", "samplers", "guidance", "server.models.loading"},
}
"""What a package must not import, not even for type annotations."""


class Source(NamedTuple):
    """What a module imports anywhere, and the public classes that it defines."""

    imported: frozenset[str]
    classes: tuple[str, ...]


@cache
def sources() -> dict[str, Source]:
    """Every module by its name.

    The trees are not kept: the collector of cycles would traverse all of them again and again.
    """
    below = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    paths = (*sorted(ROOT.glob("*.py")), *below)
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): source(
            ast.parse(path.read_text())
        )
        for path in paths
    }


def source(tree: ast.Module) -> Source:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    defined = (node.name for node in tree.body if isinstance(node, ast.ClassDef))
    return Source(frozenset(names), tuple(name for name in defined if not name.startswith("_")))


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def package_of(module: str) -> str:
    """The folder under ``server``, or at the root, that a module is in."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "server" else 1])


def test_a_package_imports_nothing_above_it() -> None:
    upwards = [
        f"{module} imports {name}"
        for package, forbidden in FORBIDDEN.items()
        for module, found in sources().items()
        if within(module, package)
        for name in found.imported
        if any(within(name, above) for above in forbidden)
    ]
    assert not upwards


def test_no_two_packages_of_the_server_need_each_other() -> None:
    needs: dict[str, set[str]] = defaultdict(set)
    for module, found in sources().items():
        if within(module, "server"):
            own = package_of(module)
            needs[own] |= {package_of(name) for name in found.imported if within(name, "server")}
            needs[own].discard(own)
    list(TopologicalSorter(needs).static_order())


def test_a_class_that_others_may_import_has_a_name_of_its_own() -> None:
    defined: dict[str, list[str]] = defaultdict(list)
    for module, found in sources().items():
        if module.startswith(SHIPPED):
            for name in found.classes:
                defined[name].append(module)
    assert not {name: modules for name, modules in defined.items() if len(modules) > 1}
