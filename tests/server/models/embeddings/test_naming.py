"""Which places in a text name an embedding."""

from __future__ import annotations

import time

import pytest

from server.models.embeddings.naming import divided, named

NAMES = ("bad", "bad-hands-5", "line art", "v1.5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", ()),
        ("badly lit", ()),
        ("not_bad", ()),
        ("BAD, (Line  Art:1.2)", ("bad", "line art")),
        ("bad-hands-5", ("bad-hands-5",)),
        ("bad-hands-50", ("bad",)),
        ("v1.5.", ("v1.5",)),
        ("v1x5", ()),
    ],
)
def test_a_name_is_a_word_of_any_case_and_the_longest_counts(
    text: str, expected: tuple[str, ...]
) -> None:
    assert named(text, NAMES) == expected


def test_the_parts_of_a_text_are_the_text() -> None:
    parts = list(divided("a Bad line\tart, good", NAMES))
    assert parts == [
        ("a ", None),
        ("Bad", "bad"),
        (" ", None),
        ("line\tart", "line art"),
        (", good", None),
    ]
    assert list(divided("a cat", NAMES)) == [("a cat", None)]


def test_many_names_and_a_long_text_take_no_time() -> None:
    names = [f"name {number} of many" for number in range(1000)]
    began = time.process_time()
    assert not named("name 1000 of none " * 450, names)
    assert named("a" * 8000 + " " + "name\n" * 400 + "7 of many", names) == ("name 7 of many",)
    assert time.process_time() - began < 0.5
