"""What is installed and from where, and which dependencies and functions are forbidden."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import packages_distributions
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from server.settings import JobSettings, Settings
from tests.covering import covering

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [p.rstrip("*") for p in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
MODULES = [f"{name}.py" for name in PROJECT["tool"]["setuptools"]["py-modules"]]
BANNED = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]


def blocks(path: str) -> list[str]:
    """The requirements of a lock file, each with the lines of its hashes."""
    return re.findall(r"^[a-z].*(?:\n .*)*", (ROOT / path).read_text(), flags=re.MULTILINE)


def pins(path: str) -> dict[str, str]:
    """The version of each distribution in a lock file."""
    named = [block.split()[0].split("==") for block in blocks(path)]
    return {canonicalize_name(name): version for name, version in named}


LOCKS = [f"requirements/{name}.lock" for name in ("runtime", "dev", "torch", "torch-cpu")]


@pytest.mark.parametrize("lock", [*LOCKS, "requirements/uv.lock"])
def test_every_locked_package_is_pinned_and_hashed(lock: str) -> None:
    for block in blocks(lock):
        assert re.fullmatch(r"[a-z0-9.-]+==[^\s;]+( ;.*)?", block.split(" \\\n")[0])
        assert "--hash=sha256:" in block


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_hold_the_versions_of_the_constraints(lock: str) -> None:
    public = {name: version.partition("+")[0] for name, version in pins(lock).items()}
    assert public.items() <= pins("constraints.txt").items()


def test_runtime_packages_are_the_same_under_test() -> None:
    assert pins("requirements/runtime.lock").items() <= pins("requirements/dev.lock").items()


def declared() -> list[Requirement]:
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in ("jobs", "postgresql", "dev"):
        lines += PROJECT["project"]["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def test_declared_dependencies_are_locked_at_a_version_they_allow() -> None:
    locked = pins("requirements/dev.lock") | pins("requirements/torch.lock")
    for requirement in declared():
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def imported_by(source: str) -> set[str]:
    """Top-level modules that a source imports anywhere."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    parts = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in (*plain, *parts)}


def test_what_a_runtime_environment_holds_is_all_that_the_server_imports() -> None:
    """The tests' own dependencies, such as scipy, are only in the dev lock."""
    ours = pins("requirements/dev.lock").keys() - pins("requirements/runtime.lock").keys()
    assert {"scipy", "hypothesis", "pytest"} <= ours
    modules = {
        module
        for module, names in packages_distributions().items()
        if ours & {canonicalize_name(name) for name in names}
    }
    assert "scipy" in modules
    for package in ("samplers", "guidance", "server", "embedded"):
        for path in (ROOT / package).rglob("*.py"):
            source = path.read_text()
            named = modules & {*re.findall(r"\w+", source)}
            assert not named or not imported_by(source) & named, path


# Older versions have a published vulnerability.
FLOORS = {"starlette": "1.0.1", "diffusers": "0.38.0", "transformers": "5.3.0", "torch": "2.10"}


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_versions_with_known_holes_are_not_allowed(name: str, floor: str) -> None:
    requirement = next(r for r in declared() if r.name == name)
    lowest = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
    assert max(lowest) >= Version(floor)


def lint(source: str, path: str) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise"]
    command += ["--stdin-filename", path, "-"]
    run = subprocess.run(
        command, cwd=ROOT, input=source, capture_output=True, text=True, check=False
    )
    return run.stdout


@pytest.mark.parametrize(
    ("banned", "package"), covering(product(BANNED, [*PACKAGES, "tests"]), tuple)
)
def test_lint_refuses_whatever_unpickles(banned: str, package: str) -> None:
    module, _, member = banned.partition(".")
    source = f"import {module}\n\nprint({banned if member else module})\n"
    assert "TID251" in lint(source, f"{package}/x.py")


def test_lint_lets_safetensors_pass() -> None:
    assert "TID251" not in lint("from safetensors.torch import load_file\n", "server/x.py")


def test_no_source_lifts_the_ban() -> None:
    lifted = re.compile(r"noqa:.*TID251")
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert not [path for path in sources if lifted.search(path.read_text())]
    assert "TID251" not in json.dumps(PROJECT["tool"]["ruff"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds of the packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc")

    def copied(file: str, to: str) -> None:
        """Weights are copied as empty files, as packing 40 MB takes seconds."""
        Path(to).write_bytes(b"" if file.endswith(".safetensors") else Path(file).read_bytes())

    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=skipped, copy_function=copied)
    for name in ("pyproject.toml", "LICENSE", *MODULES):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    [built] = folder.glob("weft-*.whl")
    return built


def test_the_wheel_carries_every_file_of_the_packages(wheel: Path) -> None:
    source = wheel.parent / "source"
    files = [path for package in PACKAGES for path in (source / package).rglob("*")]
    named = {path.relative_to(source).as_posix() for path in files if path.is_file()}
    assert named | {*MODULES} <= set(zipfile.ZipFile(wheel).namelist())


def fake_guidance(folder: Path) -> None:
    """What pip installs of another distribution with a package `guidance`."""
    (folder / "guidance").mkdir(parents=True, exist_ok=True)
    (folder / "guidance/__init__.py").write_text("")
    (folder / "guidance/_grammar.py").write_text("")
    described = folder / "guidance-0.3.1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: guidance\nVersion: 0.3.1\n")
    (described / "RECORD").write_text("guidance/__init__.py,,\nguidance/_grammar.py,,\n")


def test_the_command_names_a_distribution_that_it_cannot_share_an_environment_with(
    wheel: Path, tmp_path: Path
) -> None:
    """`guidance` exists on the package index; whichever is installed last overwrites the other."""
    site = tmp_path / "site"
    ours = zipfile.ZipFile(wheel)
    needed = [n for n in ours.namelist() if n.endswith(".py") or ".dist-info/" in n]

    def run(*arguments: str, folders: Sequence[Path] = (site,)) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={"PYTHONPATH": ":".join(map(str, folders))},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def clash(*folders: Path) -> str:
        """The clash found in an environment of only these folders."""
        return run("-S", "-c", "import weft; print(weft.clash())", folders=folders)[1].strip()

    ours.extractall(site, needed)
    status, told = run("-c", "import weft; weft.main()", "--help")
    assert (status, "Usage" in told) == (0, True)
    (site / "guidance/notes.txt").write_text("a file of the user's own is no clash")
    assert clash(site) == "None"

    fake_guidance(site)
    shared = "the distribution guidance 0.3.1 and Weft have both installed a package `guidance`"
    status, told = run("-c", "import weft; weft.main()", "--help")
    assert status == 1
    assert f"weft: {shared}" in told
    ours.extract("guidance/__init__.py", site)
    assert clash(site).startswith(shared)

    fake_guidance(tmp_path / "before")
    hidden = clash(tmp_path / "before", site)
    assert f"the package `guidance` from {tmp_path / 'before/guidance'}" in hidden
    assert "belongs to the distribution guidance 0.3.1, and not from Weft's own" in hidden

    # `pip uninstall guidance` takes Weft's module with it.
    (site / "guidance/__init__.py").unlink()
    assert clash(site).startswith("Weft's package `guidance` is no longer in")


class Readyz(HTTPServer):
    """Answers /readyz with a given status."""

    status = 200

    def finish_request(self, request: Any, client_address: Any) -> None:
        line, *_ = request.recv(4096).decode().splitlines()
        status = self.status if line.startswith("GET /readyz ") else 404
        request.sendall(f"HTTP/1.0 {status} \r\n\r\nthe reason".encode())


@pytest.fixture
def readyz() -> Iterator[Readyz]:
    with Readyz(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


DOCKERFILE = (ROOT / "Dockerfile").read_text()


def probe(port: int, host: str = "0.0.0.0") -> tuple[int, str]:  # noqa: S104
    """Exit status and output of the image's health check, with a proxy configured that is down."""
    (command,) = re.findall(r"HEALTHCHECK[^\n]*\\\n\s*CMD (\[.*\])", DOCKERFILE)
    _, file = json.loads(command)
    (copied,) = re.findall(rf"COPY (\S+) {file}\n", DOCKERFILE)
    environment = {"WEFT_HOST": host, "WEFT_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, ROOT / copied],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (404, False), (503, False)])
def test_the_image_is_healthy_while_readyz_says_so(
    readyz: Readyz, status: int, healthy: bool
) -> None:
    readyz.status = status
    told = "" if healthy else f"/readyz answers {status}: the reason\n"
    assert probe(readyz.server_port) == (0 if healthy else 1, told)


def test_the_image_is_healthy_at_an_address_of_its_own(readyz: Readyz) -> None:
    assert probe(readyz.server_port, "127.0.0.1") == (0, "")


def test_the_image_is_unhealthy_when_nothing_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        status, told = probe(unused.getsockname()[1])
    assert status == 1
    assert told.startswith("/readyz does not answer: ")
    assert "refused" in told


def test_the_image_s_base_is_pinned_by_its_digest() -> None:
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert re.fullmatch(r"python:3\.11-slim@sha256:[0-9a-f]{64}", base)
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE)) == {"${PYTHON_IMAGE}"}


def test_the_image_is_configured_by_settings_alone() -> None:
    (command,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, flags=re.MULTILINE)
    assert json.loads(command) == ["weft", "serve"]
    named = dict(re.findall(r"\b(WEFT_[A-Z_]+)=(\S+)", DOCKERFILE))
    given = {name.removeprefix("WEFT_").lower(): value for name, value in named.items()}
    settings = Settings.model_validate(given | {"insecure": True})
    assert settings.models_folder == Path("/models")
    assert settings.drain_s < 10, "what `docker stop` waits before it kills"


def test_the_image_has_a_folder_of_its_user_for_each_volume_that_is_written_to() -> None:
    """Docker gives a new volume the owner of the folder; without a folder it would be root."""
    (made,) = re.findall(
        r"install --directory --owner weft --group weft --mode 700 (.*)", DOCKERFILE
    )
    documents = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("operating", "jobs"))
    volumes = set(re.findall(r"-v [\w-]+:(/\w+)", documents))
    assert volumes == {"/cache", "/data"} == set(made.split())


def test_compose_waits_for_a_database_that_is_reached_by_tcp() -> None:
    """During initialization PostgreSQL listens only on its socket, and then restarts."""
    service = yaml.safe_load((ROOT / "compose.jobs.yaml").read_text())["services"]["postgres"]
    command, *arguments = service["healthcheck"]["test"].split()
    assert command == "pg_isready"
    assert arguments[arguments.index("--host") + 1] == "localhost"


def test_compose_keeps_jobs_in_the_database_that_it_starts() -> None:
    services = yaml.safe_load((ROOT / "compose.jobs.yaml").read_text())["services"]
    given = {
        name.removeprefix("WEFT_JOBS__").lower(): value
        for name, value in services["weft"]["environment"].items()
    }
    jobs = JobSettings.model_validate(given)
    assert jobs.place_of_pictures == "/data"
    assert [volume.partition(":")[2] for volume in services["weft"]["volumes"]] == ["/data"]
    assert f"@{[*services][1]}/{services['postgres']['environment']['POSTGRES_USER']}" in str(
        given["database"]
    )


def test_compose_starts_the_image_with_settings_that_exist() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["weft"]
    gpu = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]["weft"]
    named = [*service["environment"], *gpu["environment"]]
    assert {name.removeprefix("WEFT_").lower() for name in named} <= Settings.model_fields.keys()
    assert int(service["stop_grace_period"].rstrip("s")) > service["environment"]["WEFT_DRAIN_S"]
    assert service["volumes"] == ["${MODELS:-./models}:/models:ro"]
    assert [service["build"]["args"]["TORCH"], gpu["build"]["args"]["TORCH"]] == ["cpu", "cuda"]


def test_commands_of_the_makefile_keep_what_python_compiles() -> None:
    """Otherwise each process would compile all its imports again, which takes longer than most
    tests."""
    shown = subprocess.run(
        ["make", "-s", "-f", "-", "show"],
        input="include Makefile\nshow:\n\t@env\n",
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "PYRIGHT_PYTHON_IGNORE_WARNINGS=1" in shown.stdout
    assert "PYTHONDONTWRITEBYTECODE" not in shown.stdout
