"""Text is told from pictures while it arrives, wherever the chunks are cut."""

import base64
import json
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http.text_meter import LONG_STRING, TextMeter

PICTURE = base64.b64encode(random.Random(0).randbytes(3 * LONG_STRING)).decode()


def text_of(body: bytes, cuts: list[int]) -> int:
    meter = TextMeter()
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for begin, end in pairwise(places):
        meter.feed(body[begin:end])
    return meter.text


TEXTS = st.text(alphabet=st.sampled_from('ab"\\/\n\té, :{}[]'), max_size=30)


@given(
    st.dictionaries(TEXTS, TEXTS | st.integers(), max_size=5),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 10**6), max_size=12),
)
def test_all_but_long_strings_is_text_however_it_is_cut(
    fields: dict[str, object], ascii_only: bool, with_picture: bool, cuts: list[int]
) -> None:
    body = {**fields, "image": PICTURE} if with_picture else fields
    written = json.dumps(body, ensure_ascii=ascii_only).encode()
    assert text_of(written, cuts) == len(written) - len(PICTURE) * with_picture


@pytest.mark.parametrize(
    "picture",
    [
        PICTURE.replace("/", "\\/"),
        "\\r\\n".join(PICTURE[k : k + 76] for k in range(0, len(PICTURE), 76)),
    ],
    ids=["escaped slashes", "lines"],
)
def test_base64_may_be_escaped_as_programs_do(picture: str) -> None:
    body = f'{{"image": "{picture}"}}'.encode()
    assert text_of(body, [50, 20_000, 40_000]) == len('{"image": ""}')


@pytest.mark.parametrize("unit", ["\\n", '\\"', "\\\\", "é", "a\\u0041"])
def test_a_long_string_that_is_costly_to_parse_is_text(unit: str) -> None:
    body = f'{{"image": "{unit * 50_000}"}}'.encode()
    assert text_of(body, list(range(0, len(body), 4096))) > len(body) - LONG_STRING - 4096


def test_many_fields_and_many_strings_are_text() -> None:
    for body in (b'{"a":1,' * 10_000, b'"",' * 10_000, b'"' + b"x" * LONG_STRING + b'"'):
        assert text_of(body, []) == len(body)
