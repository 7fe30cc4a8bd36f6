"""A request with a step cache, and its answer."""

from __future__ import annotations

from collections.abc import Callable

import httpx2


def test_an_answer_says_what_the_cache_saved_and_its_settings_make_the_image_again(
    generate: Callable[..., httpx2.Response],
) -> None:
    cache = {"name": "easy_cache", "threshold": 0.2}
    fields = {"steps": 12, "width": 64, "height": 64, "guidance": "none"}
    first = generate(cache=cache, **fields).json()
    again = generate(**first["settings"]).json()
    assert first["settings"]["cache"] == {
        "name": "easy_cache",
        "threshold": 0.2,
        "start": 0.15,
        "stop": 1.0,
        "low": 0.0,
    }
    assert first["images"] == again["images"]
    for answer in (first, again):
        assert answer["evaluations"]["saved"] > 0
        assert sum(answer["evaluations"].values()) == 12
    assert generate(**fields).json()["images"] != first["images"]
