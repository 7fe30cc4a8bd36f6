import pytest

from server.errors import NotAcceptable
from server.http.native.negotiation import Wanted, negotiate
from server.requests.schema import GenerateRequest

BODY = GenerateRequest(prompt="x")


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("text/html, */*;q=0.1", "json"),
        ("image/avif,image/webp,*/*", "image"),
        ("application/json;q=0.5, text/event-stream", "events"),
        ("text/event-stream;q=0.1, application/json", "json"),
        ("image/png;q=nonsense", "image"),
        ("IMAGE/PNG", "image"),
        ("image/png;q=0, application/json", "json"),
    ],
)
def test_the_most_wanted_form_that_there_is_wins(accept: str, wanted: Wanted) -> None:
    assert negotiate(accept, BODY)[0] == wanted


@pytest.mark.parametrize("accept", ["text/html", "image/avif", "image/png;q=0", ","])
def test_what_there_is_not_is_refused(accept: str) -> None:
    with pytest.raises(NotAcceptable, match=r"allowed are: application/json, text/event-stream"):
        negotiate(accept, BODY)


def test_the_body_may_ask_for_events_too() -> None:
    wanted, body = negotiate("application/json", GenerateRequest(prompt="x", stream=True))
    assert wanted == "events"
    assert body.stream


def test_events_by_header_are_events_in_the_body() -> None:
    assert negotiate("text/event-stream", BODY)[1].stream
