"""Requests of excessive size or depth are refused before their content is examined."""

from typing import Any

import pytest

from server.errors import InvalidRequest
from server.requests.checks.shape import check_shape


def refusal(body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        check_shape(body, {"image"})
    return refused.value


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (
            {str(k): k for k in range(65)},
            None,
            "The body has 65 fields; at most 64 are allowed.",
        ),
        (
            {"guidance": {str(k): k for k in range(65)}},
            "guidance",
            "guidance has 65 fields; at most 64 are allowed.",
        ),
        (
            {"spacing": {"name": "custom", "times": [0] * 2049}},
            "spacing.times",
            "spacing.times has 2049 entries; at most 2048 are allowed.",
        ),
        (
            {"prompt": "x" * 8193},
            "prompt",
            "prompt has 8193 characters; at most 8192 are allowed.",
        ),
        (
            {"guidance": {"perturbed": [{"name": "x" * 8193}]}},
            "guidance.perturbed.0.name",
            "guidance.perturbed.0.name has 8193 characters; at most 8192 are allowed.",
        ),
        (
            {"guidance": {"x" * 65: 1}},
            None,
            "guidance has a field whose name has 65 characters; at most 64 are allowed.",
        ),
        (
            {"guidance": {"image": "x" * 8193}},
            "guidance.image",
            "guidance.image has 8193 characters; at most 8192 are allowed.",
        ),
        ("x" * 8193, None, "The body has 8193 characters; at most 8192 are allowed."),
    ],
    ids=lambda value: str(value)[:24],
)
def test_the_first_thing_out_of_proportion_is_named(
    body: Any, field: str | None, message: str
) -> None:
    refused = refusal(body)
    assert refused.message == message
    assert refused.field == field


def test_what_a_request_may_contain_passes() -> None:
    check_shape({str(k): "x" * 8192 for k in range(64)}, ())
    check_shape({"image": "x" * 100_000, "n": 1, "a": [None, 1.5, True, []] * 512}, {"image"})
