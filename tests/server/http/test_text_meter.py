"""Text is distinguished from pictures as it arrives, wherever it is cut into chunks."""

import base64
import json
import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http.text_meter import LONG_STRING, QUOTES, TEXT_BYTES, TextMeter

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


@pytest.mark.parametrize(
    "body", [b'{"a":1,' * 1000, b'"",' * 1000, b'"' + b"x" * LONG_STRING + b'"']
)
def test_fields_and_short_strings_are_text(body: bytes) -> None:
    assert text_of(body, []) == len(body)


@pytest.mark.parametrize(
    ("body", "costly"),
    [(b'"' * QUOTES, False), (b'"' * (QUOTES + 1), True), (b"1," * TEXT_BYTES, True)],
)
def test_a_body_of_many_strings_or_much_text_is_too_costly(body: bytes, costly: bool) -> None:
    meter = TextMeter()
    meter.feed(body)
    assert meter.too_costly == costly


def test_a_chunk_of_very_many_strings_is_not_looked_at_one_by_one() -> None:
    meter = TextMeter()
    began = time.process_time()
    meter.feed(b'"a":1,' * 1_000_000)
    assert meter.too_costly
    assert time.process_time() - began < 0.1
