"""Which step caches are refused, and with which messages."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.errors import InvalidRequest
from server.requests.messages import explain
from server.requests.resolve import make_plan, prepare, resolve
from server.requests.schema import GenerateRequest
from server.settings import Limits
from tests.server.toy_model import SCHEDULE, Toy

SDE = {"name": "ddim", "eta": 1.0}


def prepared(**fields: Any) -> Any:
    body = {"prompt": "x", "steps": 6, "cache": "easy_cache", "guidance": "cfg", **fields}
    resolved = resolve(GenerateRequest.model_validate(body), Toy(), Limits(), None)
    layout = resolved.sampler, resolved.spacing, resolved.steps, resolved.strength
    return prepare(resolved, Toy(), make_plan(SCHEDULE, *layout))


def test_a_bare_name_takes_the_published_defaults() -> None:
    cache = prepared().request.cache
    assert (cache.name, cache.threshold, cache.start) == ("easy_cache", 0.05, 0.15)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"n": 2, "guidance": {"name": "cfg", "particles": "fkc"}, "sampler": SDE},
            "cache is 'easy_cache', but the images of a request with guidance.particles need each "
            "other's predictions at every step; leave cache out.",
        ),
        (
            {"n": 2, "guidance": {"name": "cfg", "negtome": {}}},
            "cache is 'easy_cache', but the images of a request with guidance.negtome need each "
            "other's predictions at every step; leave cache out.",
        ),
        (
            {"steps": 3},
            "cache is 'easy_cache'; it can skip none of the 3 evaluations of this run, because the "
            "first 2 and the last are always made and none of the others lies within its window; "
            "take more steps, or widen low, high, start or stop.",
        ),
    ],
    ids=["particles", "images apart", "few steps"],
)
def test_a_cache_that_cannot_act_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        prepared(**fields)
    assert (refusal.value.field, refusal.value.message) == ("cache", sentence)


@pytest.mark.parametrize(
    ("cache", "field", "sentence"),
    [
        ("teacache", "cache", "cache 'teacache' is unknown; allowed are: easy_cache."),
        (
            {"name": "easy_cache", "threshold": 2},
            "cache.threshold",
            "cache.threshold is 2; it must be at most 1.",
        ),
        (
            {"name": "easy_cache", "treshold": 0.1},
            "cache.treshold",
            "cache.treshold is not a known field (did you mean threshold?); allowed are: low, "
            "high, start, stop, name, threshold.",
        ),
    ],
)
def test_a_cache_that_is_not_one_is_refused(cache: object, field: str, sentence: str) -> None:
    with pytest.raises(ValidationError) as invalid:
        GenerateRequest.model_validate({"prompt": "x", "cache": cache})
    refusal = explain(invalid.value.errors(), GenerateRequest)
    assert (refusal.field, refusal.message) == (field, sentence)
