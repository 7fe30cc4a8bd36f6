"""Requests for DPM-Solver-v3 get the statistics of their own guidance and size, or an answer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Generate = Callable[..., httpx2.Response]

EXACT: dict[str, Any] = {"name": "dpm_solver_v3", "statistics": "exact"}
NEAREST = EXACT | {"statistics": "nearest"}


def picture(answer: httpx2.Response) -> NDArray[np.uint8]:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["images"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def test_statistics_are_those_of_the_scale(generate: Generate) -> None:
    """At scale 4, for which statistics exist, the nearest statistics are the exact ones."""
    fields: dict[str, Any] = {"steps": 4, "guidance": {"name": "cfg", "scale": 4}}
    exact = picture(generate(sampler="dpm_solver_v3", **fields))
    assert np.array_equal(exact, picture(generate(sampler=NEAREST, **fields)))
    without = picture(generate(sampler=EXACT | {"statistics": "none"}, **fields))
    assert not np.array_equal(exact, without)


@pytest.mark.parametrize(
    "guidance",
    [
        {"name": "cfg", "scale": 3},
        {"name": "cfg", "scale": 0},
        {"name": "none"},
        {"name": "apg", "scale": 8},
        {"name": "cfg", "scale": 4, "policy": "adaptive"},
    ],
    ids=str,
)
def test_the_nearest_serve_all_guidance_and_sizes(
    generate: Generate, guidance: dict[str, Any]
) -> None:
    picture(generate(sampler=NEAREST, guidance=guidance))
    picture(generate(sampler=NEAREST, guidance=guidance, width=96, height=64))


@pytest.mark.parametrize(
    ("sampler", "guidance", "taken"),
    [
        (NEAREST, {"name": "cfg", "scale": 5}, "cfg 4"),
        (NEAREST, {"name": "apg", "scale": 30}, "cfg 7.5"),
        (NEAREST, {"name": "cfg", "scale": 1.2}, "none"),
        (EXACT, {"name": "cfg", "scale": 2}, "cfg 2"),
        (EXACT, {"name": "none"}, "none"),
        (EXACT | {"statistics": "none"}, {"name": "cfg", "scale": 4}, None),
        ("ddim", {"name": "cfg", "scale": 4}, None),
    ],
    ids=str,
)
def test_answer_and_picture_say_which_statistics_were_taken(
    generate: Generate, sampler: Any, guidance: dict[str, Any], taken: str | None
) -> None:
    answer = generate(sampler=sampler, guidance=guidance)
    assert answer.status_code == 200, answer.text
    assert answer.json()["statistics"] == taken
    data = base64.b64decode(answer.json()["images"][0]["b64_json"])
    parameters = Image.open(io.BytesIO(data)).info["parameters"]
    assert (f"Sampler statistics: {taken}, " in parameters) == (taken is not None)
    assert ("Sampler statistics" in parameters) == (taken is not None)


def test_a_stream_says_so_at_its_beginning_and_its_end(client: httpx2.Client) -> None:
    wanted = {
        "prompt": "a red circle",
        "steps": 2,
        "sampler": NEAREST,
        "guidance": {"name": "cfg", "scale": 3},
        "stream": True,
    }
    with client.stream("POST", "/v1/generate", json=wanted) as answer:
        told = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert told[0]["statistics"] == told[-1]["statistics"] == "cfg 4"


@pytest.mark.parametrize(
    ("guidance", "says"),
    [
        (
            {"name": "cfg", "scale": 3},
            "no statistics for guidance 'cfg 3', only for none, cfg 2, cfg 4, cfg 7.5; compute "
            "them with `weft ems --model FOLDER --guidance cfg --scale 3`, or choose 'nearest' or "
            "'none'.",
        ),
        (
            {"name": "apg", "scale": 4},
            "there are no statistics for the rule 'apg', only for none, cfg 2",
        ),
        (
            {"name": "cfg", "scale": 4, "policy": "interval"},
            "there are no statistics for guidance with `policy`, only for none",
        ),
        (
            {"name": "cfg", "scale": 4, "perturbed": ["pag"]},
            "there are no statistics for guidance with `perturbed`",
        ),
    ],
    ids=str,
)
def test_where_there_are_none_the_answer_says_what_there_is(
    generate: Generate, guidance: dict[str, Any], says: str
) -> None:
    answer = generate(sampler=EXACT, guidance=guidance)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == "sampler.statistics"
    assert says in error["message"]


def test_the_catalog_says_what_there_are_statistics_of(client: httpx2.Client) -> None:
    models = {one["name"]: one for one in client.get("/v1/catalog").json()["models"]}
    assert models["embedded"]["statistics"] == ["none", "cfg 2", "cfg 4", "cfg 7.5"]
