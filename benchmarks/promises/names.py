"""Names that are paths, in every text of a request and in the files of a model."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from benchmarks.promises.attackers import FORM, form_with, picture
from benchmarks.promises.opened import watched
from benchmarks.promises.promise import WEAK, Outcome, Promise
from benchmarks.real_server import SERVE, served
from server.errors import ModelMismatch
from server.http.app import create_app
from server.models.folder import embedded_folders
from server.models.loading import FAMILIES, load_model
from server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from benchmarks.real_server import Served

__all__ = ["PROMISES", "texts"]

OUTSIDE: Final = "outside"
STEM: Final = "canary"
CHEAP: Final = {"prompt": "x", "steps": 1, "width": 64, "height": 64, "seed": 1}
DEPTH: Final = 6
"""Depth of nested schemas; deeper ones repeat."""

MIN_CASES: Final = 200


@contextmanager
def _place() -> Generator[Path]:
    """Create the folders of a server, and next to them one that it must not touch."""
    with TemporaryDirectory() as made:
        place = Path(made)
        for folder in ("adapters", "models", "jobs", f"{OUTSIDE}/{STEM}"):
            (place / folder).mkdir(parents=True)
        secret = place / OUTSIDE
        plain = embedded_folders()["embedded"]
        shutil.copytree(plain, place / "models/own", ignore=shutil.ignore_patterns("weak"))
        shutil.copy(plain / "model_index.json", secret / STEM)
        for ending in ("", ".safetensors", ".png", ".json"):
            (secret / f"{STEM}{ending or '.txt'}").write_bytes(picture())
        for folder in ("adapters", "models"):
            (place / folder / "link").symlink_to(secret)
        yield place


def _paths(place: Path) -> tuple[str, ...]:
    """Names of files and folders outside the server's, as a client would write them."""
    inside = f"{place}/{OUTSIDE}/{STEM}"
    return (
        f"../{OUTSIDE}/{STEM}",
        f"x/../../{OUTSIDE}/{STEM}.safetensors",
        f"..\\{OUTSIDE}\\{STEM}",
        f"..%2f{OUTSIDE}%2f{STEM}",
        inside,
        f"{inside}.safetensors",
        f"file://{inside}.png",
        f"{inside}.png\x00.png",
        f"link/{STEM}",
        "link",
    )


def _requests(_: Served, arguments: tuple[str, ...] = SERVE) -> Outcome:
    """Send every path in every text of every route of the application's own schema."""
    with _place() as place:
        settings = {
            "WEFT_ADAPTERS": str(place / "adapters"),
            "WEFT_MODELS_FOLDER": str(place / "models"),
            "WEFT_JOBS__FOLDER": str(place / "jobs"),
            "WEFT_MAX_PENDING": "65536",
        }
        schema = create_app(Settings()).openapi()
        cases = [one for path in _paths(place) for one in _cases(schema, path)]
        with (
            served([*arguments, "--row-budget", "8"], **settings) as server,
            watched(place / OUTSIDE) as opened,
            ThreadPoolExecutor(4) as threads,
        ):
            statuses = list(threads.map(lambda ask: ask(server), cases))
            found = opened()
    broken = sum(status >= 500 and status != 503 for status in statuses)
    figure = f"{len(found)} opened by {len(cases)} requests, {broken} of them answered with 5xx"
    return Outcome(figure, not found and broken == 0 and len(cases) >= MIN_CASES)


def _cases(schema: Mapping[str, Any], path: str) -> Iterator[Callable[[Served], int]]:
    parts = schema["components"]["schemas"]
    for route, methods in schema["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                yield partial(_with_parameter, method.upper(), route, parameter, path)
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                own = content["schema"]
                if kind == "multipart/form-data":
                    yield partial(_with_file, route, path)
                    continue
                for value in texts(own, parts, path, DEPTH):
                    yield partial(_with_body, method.upper(), route, value)


def _with_parameter(
    method: str, route: str, parameter: Mapping[str, Any], path: str, server: Served
) -> int:
    name, place = parameter["name"], parameter["in"]
    whole = route.replace("{index}", "0").replace("{identifier}", "abc")
    if place == "header":
        return server.status(method, whole, b"{}", {name: quote(path, safe="/:.\\")})
    quoted = quote(path, safe="")
    if place == "query":
        return server.status(method, f"{whole}?{name}={quoted}")
    return server.status(method, route.replace(f"{{{name}}}", quoted).replace("{index}", "0"))


def _with_body(method: str, route: str, value: Any, server: Served) -> int:
    return server.status(method, route, json.dumps(value).encode())


def _with_file(route: str, path: str, server: Served) -> int:
    return server.status("POST", route, form_with(path, path), FORM)


def texts(
    schema: Mapping[str, Any], parts: Mapping[str, Any], text: str, depth: int
) -> Iterator[Any]:
    """Values of a schema, in each of which another one of its texts is the given text."""
    if depth == 0:
        return
    if "$ref" in schema:
        yield from texts(parts[schema["$ref"].rpartition("/")[2]], parts, text, depth - 1)
    for one in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from texts(one, parts, text, depth - 1)
    if schema.get("type") == "string" and "const" not in schema:
        yield text
    if schema.get("type") == "array":
        yield from ([one] for one in texts(schema["items"], parts, text, depth - 1))
    own = schema.get("properties", {})
    needed = {name: own[name]["const"] for name in own if "const" in own[name]}
    needed |= {name: value for name, value in CHEAP.items() if name in own}
    for name, inner in own.items():
        yield from ({**needed, name: one} for one in texts(inner, parts, text, depth - 1))


def _files(_: Served, *, trusting: bool = False) -> Outcome:
    """Load model folders whose files name others outside, for each model family."""
    tried = unexplained = 0
    with _place() as place, watched(place / OUTSIDE) as opened:
        for family in FAMILIES:
            for spoil in (_part_elsewhere, _shards_elsewhere, _configuration_elsewhere):
                folder = place / "models/hostile"
                shutil.copytree(place / "models/own", folder)
                index = folder / "model_index.json"
                _rewrite(index, _class_name=family)
                spoil(folder)
                tried += 1
                unexplained += not _settled(_follow if trusting else _load, folder)
                shutil.rmtree(folder)
        found = opened()
    figure = (
        f"{len(found)} opened by {tried} folders, {unexplained} of them refused without a sentence"
    )
    return Outcome(figure, not found and unexplained == 0)


def _part_elsewhere(folder: Path) -> None:
    """Name a part of the pipeline whose folder is outside."""
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("unet", "transformer"):
        index.pop(part, None)
    index[f"../../{OUTSIDE}/{STEM}"] = ["diffusers", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "unet")


def _shards_elsewhere(folder: Path) -> None:
    """Index weights in several files, all of them outside."""
    for weights in [*folder.rglob("*.safetensors")]:
        if weights.parent == folder or weights.parent.name == "weft":
            continue
        weights.unlink()
        up = "../" * len(weights.relative_to(folder).parts)
        index = {"metadata": {}, "weight_map": {"x": f"{up}../{OUTSIDE}/{STEM}.safetensors"}}
        weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))


def _configuration_elsewhere(folder: Path) -> None:
    """Let configurations claim that they are outside."""
    for file in [*folder.rglob("config.json")]:
        _rewrite(
            file, _name_or_path=f"../../{OUTSIDE}/{STEM}", _class_name=f"../../{OUTSIDE}/{STEM}"
        )


def _rewrite(file: Path, **changes: str) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _load(folder: Path) -> None:
    load_model(folder, name="hostile", device="cpu", dtype="float32")


def _follow(folder: Path) -> None:
    """Open files as a loader that trusts the names in files would."""
    for file in folder.rglob("*.json"):
        for word in file.read_text().split('"'):
            if OUTSIDE in word:
                with suppress(OSError):
                    (file.parent / word).read_bytes()


def _settled(load: Callable[[Path], None], folder: Path) -> bool:
    """Whether a folder is loaded, because the name has no effect, or refused in one sentence."""
    try:
        load(folder)
    except ModelMismatch as error:
        return bool(error.message) and "\n" not in error.message
    except Exception:  # noqa: BLE001 - any other error is not a proper refusal
        return False
    return True


PROMISES: Final = (
    Promise(
        "Names in requests are never paths.",
        f"{len(_paths(Path()))} paths to files outside the server's folders, in each text, "
        "parameter and upload's name of each route of the application's schema; the kernel tells "
        "what is opened",
        "0 opened, 0 answers of 5xx",
        "adapters found by joining their name to the folder",
        _requests,
        partial(_requests, arguments=WEAK),
    ),
    Promise(
        "Names in a model's files are never paths.",
        "3 kinds of folders that name files outside themselves, as each pipeline class that the "
        "loader takes; the kernel tells what is opened",
        "0 opened, each loaded or refused in one sentence",
        "a loader that follows the names",
        _files,
        partial(_files, trusting=True),
    ),
)
