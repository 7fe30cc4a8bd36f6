"""Plug-in files whose classes join Weft's own, and files that cannot be used."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from guidance import CFG, Rule
from guidance.registry import BESIDE_RULES
from samplers import DDIM, Sampler
from weft_plugins import VARIABLE, PluginError, origin_of, plugin_files, with_plugins

ROOT = Path(__file__).resolve().parent.parent

OWN = """
from __future__ import annotations

from typing import Literal

from samplers import DDIM

Share = Literal[1, 2]


class Mine(DDIM, frozen=True):
    name: Literal["{0}"] = "{0}"
    share: Share = 1


class _Hidden(Mine, frozen=True):
    name: Literal["hidden"] = "hidden"


Again = Mine
"""


def named(monkeypatch: pytest.MonkeyPatch, *files: Path) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps([str(file) for file in files]))


def written(path: Path, source: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    return path


def registered() -> tuple[type[Sampler], ...]:
    return with_plugins("weft.no_such_group", Sampler, (DDIM,))


def test_public_classes_that_a_file_defines_join_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, written(tmp_path / "mine.py", OWN.format("mine")))
    ours, theirs = registered()
    assert ours is DDIM
    assert theirs.model_validate({"share": 2}).name == "mine"
    assert origin_of(theirs) == "mine.py"
    assert origin_of(DDIM) is None


@pytest.mark.parametrize(
    ("example", "kind", "name"),
    [
        ("weft-extrapolation/weft_extrapolation.py", Sampler, "extrapolated_ddim"),
        ("weft-scheduled-cfg/weft_scheduled_cfg.py", Rule, "scheduled_cfg"),
    ],
)
def test_the_module_of_an_example_package_is_a_plug_in_file(
    monkeypatch: pytest.MonkeyPatch, example: str, kind: type[Sampler | Rule], name: str
) -> None:
    named(monkeypatch, ROOT / "examples/plugins" / example)
    [found] = with_plugins("weft.no_such_group", kind, ())
    assert found.model_fields["name"].default == name


def test_a_file_of_samplers_adds_no_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, written(tmp_path / "mine.py", OWN.format("mine")))
    assert with_plugins("weft.no_such_group", Rule, (CFG,)) == (CFG,)


def test_files_of_one_name_are_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(tmp_path / "a/mine.py", OWN.format("first"))
    second = written(tmp_path / "b/mine.py", OWN.format("second"))
    named(monkeypatch, first, second, first)
    names = [kind.model_fields["name"].default for kind in registered()]
    assert names == ["ddim", "first", "second"]


def test_two_files_may_not_take_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(tmp_path / "first.py", OWN.format("mine"))
    second = written(tmp_path / "second.py", OWN.format("mine"))
    named(monkeypatch, first, second)
    with pytest.raises(PluginError, match=r"second\.py cannot be used: .* 'mine' is taken\.$"):
        registered()


def test_a_file_with_the_name_of_a_module_shadows_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, written(tmp_path / "samplers.py", OWN.format("mine")))
    assert registered()[1].__name__ == "Mine"
    assert sys.modules["samplers"].DDIM is DDIM


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("absent.py", None, "there is no such file"),
        (".", None, "it is a folder; name a Python file"),
        ("mine.txt", "", "it is not a Python file, whose name ends with .py"),
        ("mine.py", "\n\nx = (1,", "line 3: SyntaxError: '(' was never closed"),
        ("mine.py", "\nimport scypi", "line 2: ModuleNotFoundError: No module named 'scypi'"),
        (
            "mine.py",
            "def f():\n    return 1 / 0\nf()",
            "line 2: ZeroDivisionError: division by zero",
        ),
        ("mine.py", "import sys\nsys.exit(3)", "line 2: SystemExit: 3"),
        ("mine.py", "x = '\0'", "contain null bytes"),
        (
            "mine.py",
            "from samplers import DDIM\nclass Mine(DDIM): ...",
            "its class Mine cannot be registered: ValueError: its name 'ddim' is taken",
        ),
        (
            "mine.py",
            "from samplers import Sampler\nclass Mine(Sampler): ...",
            "its class Mine cannot be registered: TypeError: its field name must be a Literal",
        ),
        (
            "mine.py",
            "from typing import Literal\nfrom samplers import Sampler\n"
            "class Mine(Sampler, frozen=True):\n    name: Literal['mine'] = 'mine'",
            "TypeError: it does not define convergence_order, plan",
        ),
        (
            "mine.py",
            "from typing import Literal\nfrom samplers import Sampler\n"
            "class Mine(Sampler, frozen=True):\n    name: Literal['mine'] = 'mine'\n"
            "    @property\n    def convergence_order(self): return 1\n"
            "    def plan(self, grid): ...",
            "its class Mine cannot be registered: TypeError: it has no summary, a ClassVar[str]",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, source: str | None, reason: str
) -> None:
    path = tmp_path / file
    if source is not None:
        path.write_text(source)
    named(monkeypatch, path)
    with pytest.raises(PluginError) as refused:
        registered()
    sentence = str(refused.value)
    assert sentence.startswith(f"The plug-in {path} cannot be used: ")
    assert reason in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_parameter_with_the_name_of_another_field_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from guidance import CFG\nfrom typing import Literal\nclass Mine(CFG, frozen=True):\n"
    source += "    name: Literal['mine'] = 'mine'\n    policy: float = 1.0"
    named(monkeypatch, written(tmp_path / "mine.py", source))
    with pytest.raises(PluginError, match="'policy' has the name of another field"):
        with_plugins("weft.no_such_group", Rule, (CFG,), BESIDE_RULES)


class Political(Rule, frozen=True):
    name: Literal["political"] = "political"
    policy: float = Field(default=1.0, description="Would hide the policy of a request.")


def test_a_rule_whose_parameter_is_another_field_of_guidance_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = EntryPoint("political", f"{__name__}:Political", "weft.guidance_rules")
    monkeypatch.setattr("weft_plugins.entry_points", lambda **_: [entry])
    assert with_plugins("weft.guidance_rules", Rule, (CFG,), BESIDE_RULES) == (CFG,)
    assert "'political' of an unknown distribution is left out" in caplog.text
    assert "its parameter 'policy' has the name of another field" in caplog.text


def test_an_interrupt_is_no_failure_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, written(tmp_path / "mine.py", "raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        registered()


def test_files_are_named_with_commas_or_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv(VARIABLE, " a.py, ~/b.py,,a.py ")
    files = Path.cwd() / "a.py", Path("/home/somebody/b.py")
    assert plugin_files() == files
    named(monkeypatch, *files)
    assert plugin_files() == files
    monkeypatch.setenv(VARIABLE, "[")
    with pytest.raises(PluginError, match="WEFT_PLUGINS is not valid JSON"):
        plugin_files()
    monkeypatch.delenv(VARIABLE)
    assert plugin_files() == ()


def test_a_file_that_imports_the_list_it_joins_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", "\nfrom samplers import SAMPLERS")
    code = (
        "from weft_plugins import PluginError, classes_of, plugin_files\n"
        "try: classes_of(*plugin_files(), object)\n"
        "except PluginError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, VARIABLE: str(file)},
        capture_output=True,
        text=True,
        check=True,
    )
    reason = "line 2: ImportError: cannot import name 'SAMPLERS' from 'samplers'"
    assert done.stdout.startswith(f"The plug-in {file} cannot be used: {reason}")
