"""The example packages, installed by pip, are found and used, and fulfill their contracts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples/plugins"

# `guidance` is imported for its list of rules, which loads a plug-in that imports CFG from it.
USE = """
import gc, json, sys

gc.disable()

from guidance import RULES
from samplers import SAMPLERS
from server.requests.catalog import catalog
from server.requests.schema import GenerateRequest

request = GenerateRequest.model_validate({
    "prompt": "a star",
    "sampler": {"name": "extrapolated_ddim", "strength": 0.5},
    "guidance": {"name": "scheduled_cfg", "power": 2.0, "policy": "reuse"},
})
listed = catalog()
print(json.dumps({
    "listed": [RULES[-1].__name__, SAMPLERS[-1].__name__],
    "catalog": [listed.samplers[-1].model_dump(), listed.rules[-1].model_dump()],
    "request": [request.sampler.model_dump(), request.guidance.model_dump()],
    "torch": "torch" in sys.modules,
}, default=str))

import pytest

sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The output of a process with both packages installed, which then runs their tests."""
    folder = tmp_path_factory.mktemp("plugins")
    source, target = folder / "source", folder / "installed"
    # pip builds in the package's folder, so a copy is used.
    shutil.copytree(EXAMPLES, source)
    packages = sorted(source.iterdir())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*install, *packages], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", USE, *packages],
        cwd=folder,
        env={"PYTHONPATH": f"{ROOT}:{target}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told, _, rest = done.stdout.partition("\n")
    return {**json.loads(told), "pytest": rest, "warned": done.stderr}


def test_both_are_listed_with_their_parameters(found: dict[str, Any]) -> None:
    assert found["listed"] == ["ScheduledCFG", "ExtrapolatedDDIM"]
    sampler, rule = found["catalog"]
    assert (sampler["name"], rule["name"]) == ("extrapolated_ddim", "scheduled_cfg")
    assert sampler["plugin"] == "weft-extrapolation"
    assert rule["plugin"] == "weft-scheduled-cfg"
    assert "0 is DDIM" in json.dumps(sampler)
    assert "Mean strength over the run" in json.dumps(rule)
    assert not found["warned"]
    assert not found["torch"], "listing them needs no torch"


def test_a_request_chooses_them(found: dict[str, Any]) -> None:
    sampler, guidance = found["request"]
    assert sampler == {"name": "extrapolated_ddim", "strength": 0.5}
    assert (guidance["name"], guidance["power"]) == ("scheduled_cfg", 2)
    assert guidance["policy"]["name"] == "reuse"


def test_their_own_tests_pass(found: dict[str, Any]) -> None:
    assert "8 passed" in found["pytest"]
