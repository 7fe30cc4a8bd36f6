import subprocess
import sys
from collections.abc import Callable

import httpx2
import pytest
from pydantic import BaseModel

from guidance import CLASSIFIERS, PERTURBATIONS, POLICIES, RULES
from samplers import SAMPLERS, SPACINGS
from server.catalog import catalog
from server.choice import name_of

REGISTRIES = {
    "samplers": SAMPLERS,
    "spacings": SPACINGS,
    "rules": RULES,
    "policies": POLICIES,
    "perturbations": PERTURBATIONS,
    "classifiers": CLASSIFIERS,
}


@pytest.mark.parametrize("title", REGISTRIES)
def test_the_catalog_is_the_registry(title: str) -> None:
    entries = getattr(catalog(), title)
    assert [entry.name for entry in entries] == [name_of(member) for member in REGISTRIES[title]]


@pytest.mark.parametrize(
    ("title", "member"),
    [(title, member) for title, members in REGISTRIES.items() for member in members],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_every_entry_explains_itself(title: str, member: type[BaseModel]) -> None:
    entry = next(e for e in getattr(catalog(), title) if e.name == name_of(member))
    assert entry.summary
    assert entry.source
    assert entry.defaults == member().model_dump(mode="json")
    assert set(entry.parameters["properties"]) == set(member.model_fields)
    for name, parameter in entry.parameters["properties"].items():
        assert "default" in parameter
        assert name == "name" or parameter["description"]


@pytest.mark.parametrize("entry", catalog().samplers, ids=lambda entry: entry.name)
def test_every_sampler_says_its_order_cost_and_spacing(entry: BaseModel) -> None:
    assert set(entry.properties) >= {  # type: ignore[attr-defined]
        "convergence_order",
        "default_spacing",
        "evaluations_per_step",
        "stochastic",
    }


def test_the_catalog_needs_no_torch() -> None:
    code = (
        "import sys; from server.catalog import catalog; catalog(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_catalog_names_the_models(client: httpx2.Client) -> None:
    answer = client.get("/v1/catalog").json()
    assert set(answer) == {*REGISTRIES, "models"}
    (model,) = answer["models"]
    assert model["name"] == "embedded"
    assert model["width"] % model["size_multiple"] == 0
    assert int(model["revision"], 16)


def test_the_catalog_is_there_before_the_models(unloaded: Callable[..., httpx2.Client]) -> None:
    answer = unloaded().get("/v1/catalog")
    assert answer.status_code == 200
    assert answer.json()["models"] == []
