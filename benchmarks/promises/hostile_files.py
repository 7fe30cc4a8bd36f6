"""Model folders and adapters that would run code, given to a loader that must refuse them.

    python -m benchmarks.promises.hostile_files [--trusting]

Prints how many were tried, how many ran their code, and how many were not refused with a one-line
message.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import torch

from server.errors import WeftError
from server.models.adapters.adapter_file import AdapterFile
from server.models.adapters.placing import Target
from server.models.folder import embedded_folders
from server.models.loading import FAMILIES, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Load = Callable[[Path], Any]

CANARY: Final = "ran"
PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FILES: Final = (*PICKLED, ".safetensors")


def _pickle(canary: Path) -> bytes:
    """A pickle of protocol 0 that creates a file when it is loaded."""
    return f"cbuiltins\nopen\n(S'{canary}'\nS'w'\ntR.".encode()


def _script(canary: Path) -> str:
    return f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"


def _pickled_weights(ending: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, canary: Path) -> None:
        for file in [*folder.rglob("*.safetensors")]:
            file.unlink()
            file.with_suffix(ending).write_bytes(_pickle(canary))

    return spoil


def _classes_of_its_own(folder: Path, canary: Path) -> None:
    index = _read(folder / "model_index.json")
    for part, named in index.items():
        if isinstance(named, list):
            index[part] = ["hostile", "Hostile"]
            (folder / part).mkdir(exist_ok=True)
            (folder / part / "hostile.py").write_text(_script(canary))
    _write(folder / "model_index.json", index)


def _pipeline_of_its_own(folder: Path, canary: Path) -> None:
    family = _read(folder / "model_index.json")["_class_name"]
    _write(folder / "model_index.json", {"_class_name": ["pipeline", family]})
    (folder / "pipeline.py").write_text(_script(canary))


def _code_in_configs(folder: Path, canary: Path) -> None:
    own = {"auto_map": {"AutoModel": "hostile.Hostile"}, "trust_remote_code": True}
    for file in [*folder.rglob("*config.json")]:
        _write(file, {**_read(file), **own, "_class_name": "Hostile", "architectures": ["Hostile"]})
        (file.parent / "hostile.py").write_text(_script(canary))
    _classes_of_its_own(folder, canary)


HOSTILE: Final = {
    **{f"weights as {ending}": _pickled_weights(ending) for ending in FILES},
    "classes of its own": _classes_of_its_own,
    "a pipeline of its own": _pipeline_of_its_own,
    "code in its configs": _code_in_configs,
}


def cases(place: Path) -> Iterator[tuple[str, Path, Load]]:
    """Each kind of hostile folder for each model family, and adapters of each kind of file."""
    plain = embedded_folders()["embedded"]
    for family in FAMILIES:
        for kind, spoil in HOSTILE.items():
            folder = place / f"{family}, {kind}"
            shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("weft", "weak"))
            index = _read(folder / "model_index.json")
            _write(folder / "model_index.json", {**index, "_class_name": family})
            spoil(folder, folder / CANARY)
            yield folder.name, folder, _load_folder
            shutil.rmtree(folder)
    target = Target.of("m", load_model(plain, name="m", device="cpu", dtype="float32").adaptable())
    for ending in FILES:
        folder = place / f"adapter as {ending}"
        folder.mkdir()
        (folder / f"hostile{ending}").write_bytes(_pickle(folder / CANARY))
        yield (
            folder.name,
            folder,
            lambda one: AdapterFile.read("hostile", next(one.iterdir()), target),
        )


def _load_folder(folder: Path) -> Any:
    return load_model(folder, name="hostile", device="cpu", dtype="float32")


def _trusting(folder: Path) -> None:
    """Load files as a loader that trusts them would."""
    for file in [*folder.rglob("*")]:
        with suppress(Exception):
            if file.suffix == ".py":
                runpy.run_path(str(file))
            elif file.suffix in FILES:
                torch.load(file, weights_only=False)  # noqa: TID251 - the weakness itself


def _refused(load: Load, folder: Path) -> bool:
    try:
        load(folder)
    except WeftError as error:
        return bool(str(error)) and "\n" not in str(error)
    except Exception:  # noqa: BLE001 - any other error is not a proper refusal
        return False
    return False


def main() -> None:
    """Load all cases and print the result."""
    trusting = "--trusting" in sys.argv
    tried, ran, unexplained = 0, 0, 0
    with TemporaryDirectory() as made:
        for _, folder, load in cases(Path(made)):
            tried += 1
            unexplained += not _refused(_trusting if trusting else load, folder)
            ran += (folder / CANARY).exists()
    print(json.dumps({"tried": tried, "ran": ran, "unexplained": unexplained}))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value))


if __name__ == "__main__":
    main()
