"""`--plugin FILE` of the commands: what it adds, and the errors for unusable files."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from server.cli import app
from server.plugin_files import register
from studies.samplers import compare
from tests.test_readme import indented_block
from weft_plugins import VARIABLE, PluginError

ROOT = Path(__file__).resolve().parents[2]

RULE_AND_MORE = """
from typing import ClassVar, Literal

from guidance import CFG, PAG, Always
from samplers import Trailing


class Plain(CFG, frozen=True):
    \"\"\"CFG under another name.\"\"\"

    summary: ClassVar[str] = "Plain guidance."
    name: Literal["plain"] = "plain"


class Constant(Always, frozen=True):
    name: Literal["constant"] = "constant"


class Layout(Trailing, frozen=True):
    name: Literal["layout"] = "layout"


class Disturbing(PAG, frozen=True):
    name: Literal["disturbing"] = "disturbing"
"""

WIDE = {"COLUMNS": "200"}

USE = """
import gc, json, sys

gc.disable()

from server.cli import app
from studies.samplers.compare import main

sampler, rule, folder = sys.argv[1:]
plugins = ["--plugin", sampler, "--plugin", rule]
chosen = ["--sampler", '{"name": "my_euler", "kept": 0.9}', "--spacing", "layout", "--steps", "2"]
chosen += ["--guidance", '{"name": "plain", "perturbed": ["disturbing"]}', "--policy", "constant"]
drawn = ["generate", "a star", "-o", f"{folder}/out.png", *chosen, *plugins]
app(drawn, standalone_mode=False)

# The registries have them now, and the environment names them.
app(["catalog", "--json"], standalone_mode=False)
print("--")
app(["catalog"], standalone_mode=False)
print("--")

from server.http.app import create_app
from server.settings import Settings

print(json.dumps(create_app(Settings()).openapi()["components"]["schemas"]["MyEuler"]))
print("--")

# The first that it does not know ends it.
main(["my_euler", "nobody", *plugins])
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process's output for the README's sampler, and for a file of several classes."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "my_sampler.py").write_text(indented_block("class MyEuler"))
    (folder / "several.py").write_text(RULE_AND_MORE)
    done = subprocess.run(
        [sys.executable, "-c", USE, "my_sampler.py", "several.py", folder],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | WIDE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    listed, table, schema, _ = done.stdout.split("--\n")
    return {
        "picture": folder / "out.png",
        "listed": json.loads(listed.partition("\n")[2]),
        "table": table,
        "schema": json.loads(schema),
        "refused": done.stderr.splitlines()[-1],
    }


def test_a_picture_is_drawn_with_all_of_them(used: dict[str, Any]) -> None:
    with Image.open(used["picture"]) as picture:
        settings = json.loads(picture.text["weft"])  # type: ignore[attr-defined]
    assert settings["sampler"] == {"name": "my_euler", "kept": 0.9}
    assert settings["spacing"]["name"] == "layout"
    guidance = settings["guidance"]
    assert (guidance["name"], guidance["policy"]["name"]) == ("plain", "constant")
    assert guidance["perturbed"][0]["name"] == "disturbing"


def test_the_catalog_says_which_file_each_is_from(used: dict[str, Any]) -> None:
    listed = used["listed"]
    lists = ("samplers", "spacings", "rules", "policies", "perturbations")
    last = [listed[title][-1] for title in lists]
    assert [(entry["name"], entry["plugin"]) for entry in last] == [
        ("my_euler", "my_sampler.py"),
        ("layout", "several.py"),
        ("plain", "several.py"),
        ("constant", "several.py"),
        ("disturbing", "several.py"),
    ]
    assert listed["samplers"][0]["plugin"] is None
    assert "(from my_sampler.py)" in " ".join(used["table"].split())


def test_openapi_describes_their_parameters(used: dict[str, Any]) -> None:
    kept = used["schema"]["properties"]["kept"]
    assert (kept["minimum"], kept["maximum"], kept["default"]) == (0, 1, 1)
    assert kept["description"] == "Share of the noise; 1 is Euler."


def test_the_comparison_knows_the_sampler_of_a_file(used: dict[str, Any]) -> None:
    assert "nobody: no sampler 'nobody' is registered" in used["refused"].replace('"', "'")


@pytest.mark.parametrize(
    "command", [["serve"], ["generate", "a star"], ["catalog"], ["linear-ag"]], ids=" ".join
)
def test_commands_refuse_a_file_that_is_not_there(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    absent = tmp_path / "absent.py"
    refused = CliRunner().invoke(app, [*command, "--plugin", str(absent)])
    assert refused.exit_code == 2
    assert refused.stderr == f"The plug-in {absent} cannot be used: there is no such file.\n"


@pytest.mark.parametrize("command", [["catalog"], ["ems", "--scale", "4"]], ids=" ".join)
def test_commands_refuse_a_file_of_the_environment_in_one_sentence(
    command: list[str], tmp_path: Path
) -> None:
    absent = tmp_path / "absent.py"
    refused = CliRunner().invoke(app, command, env={VARIABLE: str(absent)})
    assert refused.exit_code == 2
    assert refused.stderr == f"The plug-in {absent} cannot be used: there is no such file.\n"


def test_the_comparison_refuses_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(SystemExit):
        compare.main(["ddim", "--plugin", str(tmp_path / "absent.py")])
    assert "absent.py cannot be used: there is no such file." in capsys.readouterr().err


@pytest.mark.parametrize("source", ["from samplers import DDIM", "class Mine: ..."])
def test_a_file_that_defines_nothing_to_register_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "empty.py"
    file.write_text(source)
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(PluginError, match="defines no public class that is a Sampler, Spacing, "):
        register()


def test_a_file_is_refused_once_the_registries_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    file = tmp_path / "late.py"
    file.write_text(RULE_AND_MORE)
    with pytest.raises(PluginError, match="registries were built before it was named"):
        register([file])


def test_the_log_of_a_server_says_what_a_file_adds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    added = {Path("/mine.py"): ["my_euler", "layout"]}
    monkeypatch.setattr("server.plugin_files.register", lambda _: added)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert CliRunner().invoke(app, ["serve", "--port", port]).exit_code == 2
    assert "plug-in /mine.py: my_euler, layout" in caplog.text


def test_files_of_the_command_line_take_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "variable.py"))
    with pytest.raises(PluginError, match=r"option\.py cannot be used"):
        register([tmp_path / "option.py"])
