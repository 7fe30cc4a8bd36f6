"""How much may wait, in seconds of the device and in bytes, with a reserve for each client."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from server.engine.backlog import LATITUDE, MAX_FRACTION, Amounts, Backlog, Bounds, Holding
from server.engine.client import ANONYMOUS, Client
from server.engine.footprint import Kind
from server.errors import InvalidRequest, Overloaded

A, B = Client("a"), Client("b")
SMALL: Kind = ("model", (4, 16, 16))
LARGE: Kind = ("model", (4, 128, 128))
SECONDS: dict[Kind, float] = {SMALL: 0.01, LARGE: 1.0}


def backlog(images: int = 1000, seconds: float = 100.0, nbytes: float = 1000.0) -> Backlog:
    return Backlog(Bounds(images, seconds, nbytes), SECONDS.__getitem__)


def admit(
    queue: Backlog,
    client: Client,
    rows: int = 100,
    kind: Kind = SMALL,
    images: int = 1,
    nbytes: int = 0,
) -> Holding:
    """Admit a request, by default of 1 s."""
    holding = queue.reserve(client, images)
    try:
        queue.claim(holding, Counter({kind: rows}), nbytes)
    except (Overloaded, InvalidRequest):
        queue.release(holding)
        raise
    return holding


def fill(queue: Backlog, client: Client, **request: Any) -> int:
    """How many equal requests are admitted before one is refused."""
    count = 0
    while True:
        try:
            admit(queue, client, **request)
        except Overloaded:
            return count
        count += 1


def test_the_queue_is_as_long_as_its_seconds_and_not_as_many_images():
    assert fill(backlog(), ANONYMOUS) == 100
    assert fill(backlog(), ANONYMOUS, images=4) == 100
    assert fill(backlog(), ANONYMOUS, rows=10, images=1) == 1000, "which is the last bound"


def test_what_is_done_makes_room():
    queue = backlog()
    held = [admit(queue, ANONYMOUS) for _ in range(100)]
    with pytest.raises(Overloaded) as full:
        admit(queue, ANONYMOUS)
    assert full.value.retry_after_s == pytest.approx(1.0)
    queue.count_rows(held[0], SMALL, -50)
    queue.release(held[1])
    waiting = queue.by_client()[ANONYMOUS]
    assert waiting == Amounts(99, waiting.seconds, 0)
    assert waiting.seconds == pytest.approx(98.5)
    admit(queue, ANONYMOUS)


def test_a_client_that_always_has_work_leaves_no_sizes_behind():
    prices = Counter[Kind]()

    def priced(kind: Kind) -> float:
        prices[kind] += 1
        return 0.001

    queue = Backlog(Bounds(1000), priced)
    admit(queue, ANONYMOUS)
    for side in range(100):
        queue.release(admit(queue, ANONYMOUS, kind=("model", (4, 8, 8 + side))))
    prices.clear()
    assert queue.by_client()[ANONYMOUS].seconds == pytest.approx(0.1)
    assert list(prices) == [SMALL]


@pytest.mark.parametrize("client", [A, Client(ANONYMOUS.name)])
def test_one_client_leaves_room_for_the_next_and_equal_ones_get_equal_parts(client):
    queue = backlog()
    alone = fill(queue, client)
    assert alone == 100 * LATITUDE / (1 + LATITUDE)
    assert fill(queue, B) >= 100 / (1 + LATITUDE) / 1.3
    assert fill(queue, client) == 0


def test_a_client_with_nothing_waiting_is_admitted_though_others_fill_the_queue():
    queue = backlog()
    others = [Client(str(number)) for number in range(60)]
    for other in others:
        fill(queue, other)
    admit(queue, A)
    with pytest.raises(Overloaded):
        admit(queue, A)


def test_a_request_larger_than_the_queue_is_possible_and_shuts_nobody_out():
    queue = backlog()
    admit(queue, ANONYMOUS, rows=5000, kind=LARGE)
    assert queue.by_client()[ANONYMOUS].seconds == MAX_FRACTION * 100
    assert fill(queue, ANONYMOUS) == 50


def test_bytes_are_bounded_for_good():
    queue = backlog()
    assert fill(queue, ANONYMOUS, rows=1, nbytes=100) == 10
    with pytest.raises(InvalidRequest, match=r"for its images; at most 0 MB are allowed") as never:
        admit(backlog(), ANONYMOUS, nbytes=1001, images=2)
    assert never.value.field == "n"


def test_quotas_of_a_key_say_what_is_used_up_and_what_is_never_allowed():
    queue = backlog()
    few = Client("few", max_images=3, max_device_s=5.0)
    with pytest.raises(InvalidRequest, match="n is 4; at most 3 images of this key") as never:
        admit(queue, few, images=4)
    assert never.value.field == "n"
    with pytest.raises(InvalidRequest, match="needs about 6 s of device time; at most 5 s of this"):
        admit(queue, few, rows=600)
    admit(queue, few, images=2, rows=300)
    with pytest.raises(Overloaded, match="has 2 images waiting or running; at most 3 are allowed"):
        admit(queue, few, images=2)
    with pytest.raises(Overloaded, match=r"has about 3 s of work waiting.* at most 5 s") as used:
        admit(queue, few, rows=400)
    assert used.value.retry_after_s == pytest.approx(2.0)
    admit(queue, A)


def test_an_image_that_is_drawn_twice_is_one_of_those_that_its_key_may_have():
    queue = backlog()
    few = Client("few", max_images=3)
    with pytest.raises(InvalidRequest, match="n is 4; at most 3 images of this key"):
        queue.reserve(few, 8, runs=2)
    twice = queue.reserve(few, 4, runs=2)
    first = queue.move(twice, 2, {}, 0)
    queue.reserve(few, 1)
    with pytest.raises(Overloaded, match="has 3 images waiting or running; at most 3 are allowed"):
        queue.reserve(few, 1)
    # Each has been drawn once.
    queue.end_image(first)
    queue.end_image(first)
    queue.reserve(few, 1)
    assert queue.by_client()[few].images == 2 + 1 + 1


def test_the_wait_follows_from_the_client_s_share():
    queue = backlog()
    heavy = Client("heavy", weight=3.0)
    fill(queue, heavy)
    fill(queue, A)
    waiting = queue.by_client()
    own, free = waiting[A].seconds, 100 - sum(one.seconds for one in waiting.values())
    with pytest.raises(Overloaded) as refusal:
        admit(queue, A)
    assert refusal.value.retry_after_s == pytest.approx(max(1, 4 * (own - LATITUDE * free)))


def test_a_small_weight_waits_for_no_longer_than_all_work_takes():
    queue = backlog()
    small, large = Client("small", weight=0.01, max_device_s=2.0), Client("large", weight=100.0)
    admit(queue, large, rows=1000)
    admit(queue, small, rows=200)
    with pytest.raises(Overloaded) as refusal:
        admit(queue, small)
    assert refusal.value.retry_after_s == pytest.approx(10 + 2)


def test_the_images_of_a_second_larger_run_stay_counted_when_those_of_the_first_are_submitted():
    queue = backlog()
    room = queue.reserve(A, 4)
    queue.claim(room, {SMALL: 40.0, LARGE: 20.0}, 400)
    first = queue.move(room, 2, {SMALL: 40.0}, 80)
    queue.count_rows(first, SMALL, 40.0)
    waiting = queue.by_client()[A]
    assert waiting == (4, pytest.approx(20.4), 400)
    for _ in range(2):
        queue.count_rows(first, SMALL, -20.0)
        queue.end_image(first)
    for images in (2, 1):
        assert queue.by_client()[A] == (images, pytest.approx(10.0 * images), 160 * images)
        second = queue.move(room, 1, {LARGE: 10.0}, 160)
        queue.count_rows(second, LARGE, 10.0)
        assert queue.by_client()[A] == (images, pytest.approx(10.0 * images), 160 * images)
        queue.count_rows(second, LARGE, -10.0)
        queue.end_image(second)
    assert queue.by_client() == {}


def test_images_that_are_submitted_and_end_keep_the_count():
    queue = backlog()
    room = admit(queue, A, images=4, nbytes=400)
    own = queue.move(room, 3, {SMALL: 75}, 300)
    queue.count_rows(own, SMALL, 75)
    assert (room.images, room.nbytes, room.rows[SMALL], own.nbytes) == (1, 100, 25, 300)
    for _ in range(3):
        queue.count_rows(own, SMALL, -25)
        queue.end_image(own)
    queue.release(room)
    assert queue.by_client() == {}
